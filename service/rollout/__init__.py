"""From a deployment file to running applications.

changes.py        what differs between the file and the cluster, and applying it
preflight.py      what is checked on the nodes before anything changes
attach.py         a running Ray cluster, for `spray deploy`
local_cluster.py  a Ray cluster of our own on this machine, for `spray serve`, the demo and the tests
ports.py          why a port cannot be bound
"""
