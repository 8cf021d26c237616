"""Jobs under faults: a served cluster is struck again and again while callers submit jobs, and no job may be lost.

    __main__.py   the command: strikes, resumes, reports
    cluster.py    the cluster: `spray serve`, and a second node
    node.py       the second node, as a command
    disk.py       small disks of their own for outputs and for the store, which can be full
    link.py       the way to PostgreSQL, which can be cut for one gateway
    ledger.py     what was accepted, and how it ended, as its callers saw it
    callers.py    callers that submit, retry, follow and download
    strikes.py    the kinds of faults: each does harm, and proves that it was noticed
    together.py   which faults strike together
    poisoned.py   the kind that comes with a request: whatever runs it dies
    verdict.py    what the faults of one run have cost, by the ledger and by the store
    report.py     the table of all runs

Only processes that carry the cluster's mark are struck. This file imports nothing.
"""
