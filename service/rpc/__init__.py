"""The API over gRPC: the same gateway, rules and errors as REST, in the shapes of `service.proto`.

methods.py     the RPCs, as methods of the gateway: Serve's gRPC proxies call a method by the RPC's name
jobs.py        those of jobs
calls.py       errors -> statuses, around each method; lets a request in
requests.py    messages -> GenerationRequest, by REST's rules
answers.py     results, reports and models -> messages
statuses.py    the table of errors -> gRPC statuses with details; access
health.py      grpc.health.v1, for the server and for each model
proxy.py       what the proxies listen at and take in
"""
