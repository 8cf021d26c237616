"""service: two doors, one hall. REST today, gRPC to come, the same gateway behind both.

    cli.py       the command `spray`
    demo.py      `make demo`
    client.py    what a client of the REST door does
    local.py     a Ray cluster of our own on this machine, for `spray serve`, the demo and the tests
    app.py       DeploymentSpec -> Serve applications: one per model, one for the gateway
    autoscaling.py  how many gangs a model needs, for Serve's controller
    routing.py   which gang a request goes to, for Serve's router
    gateway.py   the hall: model table, admission, retry on a lost gang
    rest.py      the REST door: routes only
    schemas.py   REST bodies <-> messages
    status.py    the one table of errors -> HTTP answers

This file imports nothing.
"""
