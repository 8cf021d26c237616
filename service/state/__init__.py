"""What the cluster is doing, as the gateway sees it.

model_states.py     the state of each model, with its reason
poller.py           reads that state every second
router_registry.py  the request routers of this process: queues and the gangs' reports
prefetch.py         fetches hub models onto nodes before a gang needs them
"""
