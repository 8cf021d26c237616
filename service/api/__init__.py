"""The API over HTTP: OpenAI's shapes in front of the gateway.

rest.py        assembles the FastAPI application: routers, access, error handlers
images.py      POST /v1/images/generations, POST /v1/images/edits
videos.py      POST /v1/videos/sync
outputs.py     GET /v1/outputs/{name}: finished files, by signed URLs
video_jobs.py  /v1/videos: videos as jobs
stills.py      thumbnails and sheets of a finished video
jobs.py        /v1/jobs: jobs of all kinds
job_calls.py   the operations on jobs, for both APIs
job_events.py  a job as server-sent events
models.py      GET /v1/models
requests.py    GET /v1/requests: the requests that wait or run; DELETE ends one
profiles.py    POST /v1/profiles: the steps of a gang, operator by operator
cluster.py     GET /v1/cluster, and the probes /livez, /readyz and /health
openapi.py     /openapi.json and /docs; page.py makes the page
backend.py     what the API needs from the gateway, and how routes get it
origin.py      where a request comes from: its id, and whether a foreign web page may have sent it
observed.py    counts calls, and passes on their traces
cors.py        lets pages of other sites call, if the deployment names them
once.py        does a request with an idempotency key only once
shares.py      places that stay taken for long, of which one caller has a share
disconnect.py  ends a request whose caller or proxy is gone
streaming.py   server-sent events
fetching.py    pictures by URL, from hosts that the operator has named
reading.py     JSON or a form, within limits -> the fields of a body
pictures.py    pictures that callers send -> plain PNGs, within limits
clips.py       MP4s that callers send -> animated PNGs, decoded in a process of their own
picture_fields.py  fields of bodies that are pictures
bodies.py      the declared bodies of requests
schemas.py     a body -> GenerationRequest
generation.py  a body -> its answer: JSON, a file or a stream
answers.py     the declared bodies of answers
responses.py   results, events and models -> bodies of answers
made.py        the real size of what was made
errors.py      the one table of errors -> HTTP answers
"""
