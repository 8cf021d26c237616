"""service: two APIs, one gateway.

    app.py          DeploymentSpec -> Serve applications: one per model, one for the gateway
    gateway.py      the gateway: table of models, admission
    access.py       who calls, and what his API key allows
    dispatch.py     a request on its way to a gang, and to another one if the first is lost
    deadline.py     the end of a request that is late or canceled
    routing.py      which gang a request goes to, when its turn comes
    autoscaling.py  how many gangs a model needs
    edge.py         limits on reading requests, in the proxies of Serve
    authorities.py      who vouches for the servers that somebody else named
    public_address.py   where a host that somebody else named is called, if that is safe
    names.py        what the applications are called in Serve
    api/            the REST API, and the table of errors
    rpc/            the gRPC API
    proto/          its contract, and the code generated from it
    jobs/           requests that are kept until they have ended
    state/          what the cluster is doing
    rollout/        what differs between a file and a cluster, the checks before a change, and the change itself
    cli/            the command `spray`

Serve's configs name `service.app`, `service.routing` and `service.autoscaling`, and its proxies `service.edge`, so
these paths stay. `README.md` is the reference of the API and the commands. This file imports nothing.
"""
