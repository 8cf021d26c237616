"""What the cluster is doing, as the gateway sees it.

model_states.py     the state of each model, with its reason
poller.py           reads that state, less often while all is well
router_registry.py  the request routers of this process: queues and the gangs' reports
waiting.py          the requests that wait for a gang, and their places
live_requests.py    the requests of this gateway, for callers that list or cancel them
request_log.py      a line for each request that has ended
request_trace.py    the trace of a request
exchange.py         questions of one gateway to all others
kept_answers.py     the answers of requests with an idempotency key; idempotency.py asks for them
turns.py            whose turn it is, and on which gang; shared_turns.py one for all gateways
tickets.py          the questions and answers about turns; gang_state.py what is known of a gang
keyring.py          the API keys of a gateway, and what each has left; key_use.py what other gateways use of it
quarantine.py       which requests have cost gangs; head_store.py where all gateways read this
outputs.py          finished files; output_folder.py and output_bucket.py: places for them; stored.py: one of them
observed.py         the gauges of gangs and queues
prefetch.py         fetches hub models onto nodes before a gang needs them
"""
