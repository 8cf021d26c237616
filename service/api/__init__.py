"""The API over HTTP: OpenAI's shapes in front of the gateway.

rest.py        assembles the FastAPI application: routers, access, error handlers
images.py      POST /v1/images/generations
videos.py      POST /v1/videos/sync
models.py      GET /v1/models
cluster.py     GET /v1/cluster, and the probes /livez and /readyz
backend.py     what the API needs of the gateway, and how routes get at it
origin.py      where a request comes from: its id, and whether a foreign web page may have sent it
disconnect.py  ends a request whose caller or proxy is gone
streaming.py   server-sent events
schemas.py     request bodies -> GenerationRequest
responses.py   results, events and models -> response bodies
errors.py      the one table of errors -> HTTP answers
"""
