"""service: two doors, one hall. REST today, gRPC to come, the same gateway behind both.

    cli.py       the command `spray`: its flags
    operate.py   check, serve, build, deploy, ps, models, schema, doctor; table.py prints tables
    generate.py  `spray generate`
    doctor.py    what commonly goes wrong on a machine
    demo.py      `make demo`
    client.py    what a client of the REST door does
    progress.py  bars for steps and for loading; printing.py what else a person is told
    local.py     a Ray cluster of our own on this machine, for `spray serve`, the demo and the tests
    ports.py     whether a port can be bound
    attach.py    a running Ray cluster, for `spray deploy`
    rollout.py   from what runs to what the file says: compared, verified on the nodes, applied
    app.py       DeploymentSpec -> Serve applications: one per model, one for the gateway; names.py what they are called
    gateway.py   the hall: model table, admission, retry on a lost gang
    prefetch.py  models from the hub are on a node before a gang is
    routing.py   which gang a request goes to
    autoscaling.py  how many gangs a model needs
    reports.py   what the gangs say of themselves, from the routers to the gateway
    cluster.py   the state of each model
    rest.py      the REST door: routes only
    schemas.py   REST bodies <-> messages
    status.py    the one table of errors -> HTTP answers

This file imports nothing.
"""
