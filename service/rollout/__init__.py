"""From a deployment file to running applications.

changes.py        what differs between the file and the cluster
preflight.py      what is checked on the nodes before anything changes
apply.py          carries changes out, and follows their progress
serve_client.py   Ray and Serve themselves; the only file that uses their private APIs
environment.py    what Ray reads from the environment; set by entry points, before Ray is imported
attach.py         a running Ray cluster, for `spray deploy`
local_cluster.py  a Ray cluster of our own on this machine, for `spray serve`, the demo and the tests
cluster_folder.py  the folder of such a cluster, for its user alone
drain.py          before a node ends, what it serves goes on elsewhere; for Kubernetes
core_watch.py     notices when the core of such a cluster is gone
stopped_processes.py  ends what a signal has stopped of Serve there, so that Serve starts it again
devices.py        what this machine offers
ports.py          why a port cannot be bound, and who reaches it
"""
