"""The commands of `spray`. Each docstring is the command's help.

files.py     check, build, schema: a deployment file, without a cluster; the schema of requests
serve.py     serve: a cluster of its own
deploy.py    deploy: change a running cluster
status.py    ps, top, models, requests: look at a server; cancel
jobs.py      jobs, job, download
generate.py  generate, edit, video: one request
bench.py     bench: load a server, and measure it
profile.py   profile: the steps of a gang, operator by operator
key.py       key: make an API key
doctor.py    doctor: look at this machine
verify.py    verify: prove a model class
plan.py      plan: find and prove its sequence plan

Modules that import Ray or torch are imported inside the functions that need them: both take seconds, which `spray
schema` or `spray ps` should not, and Ray must find its environment set (`service.rollout.environment`).
"""
