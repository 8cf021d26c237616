"""Jobs: requests that are kept until they have ended, whatever ends first.

    records.py      the record of a job, and what may happen to one
    tables.py       the same as rows; migrations/ makes and changes the tables
    engines.py      SQLite in a file, or PostgreSQL
    bounded.py      how long PostgreSQL may take to answer
    store.py        submits, finds, lists, cancels: each call is one transaction of database.py
    leases.py       the part of it for runners: claims, renews, publishes
    queries.py      how jobs are found
    transitions.py  what becomes of a job whose runner is silent, or whose attempt failed
    store_actor.py  the store as gateways reach it: one actor that owns the file, or PostgreSQL
    requests.py     the request of a job as JSON
    inputs.py       pictures and clips that jobs begin with, as files
    input_notes.py  which files these are, as rows
    outbox.py       webhooks that have to be sent or given up, as rows
    webhooks.py     which URLs may be called, and the calls
    observed.py     metrics of jobs and of the store
    runner.py       claims and runs jobs in a gateway
    patience.py     how long jobs wait for a model that cannot be started; unserved.py for one that is not there
    results.py      writes and publishes their outputs
    lost_runners.py which other gateways that run jobs have died
    backlog.py      jobs that wait, for the autoscaler, metrics and deadlines

A job is committed before its caller hears of it. Whoever runs it holds a lease and a fence: without a word for the
length of the lease the job is queued again, and its former runner can change nothing anymore. This file imports
nothing.

Why a queue of our own: DBOS Transact, which runs on both databases too, was looked at. It hands the work of a dead
process to another one through a coordinator of its own or by a call that names the process, not by a lease that
expires; its attempts do not tell a lost gang from a lost gateway; and it has no progress that extends a lease. What it
would save is smaller than what would have to be built around it.
"""
