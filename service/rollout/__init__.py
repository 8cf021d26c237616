"""From a deployment file to running applications.

changes.py        the differences between the file and the cluster
preflight.py      the checks on the nodes before anything changes
apply.py          carries changes out, and follows their progress
serve_client.py   Ray and Serve themselves; the only file that uses their private APIs
environment.py    the environment that Ray reads; set by entry points, before Ray is imported
attach.py         a running Ray cluster, for `spray deploy`
local_cluster.py  a Ray cluster of our own on this machine, for `spray serve`, the demo and the tests
cluster_folder.py  the folder of such a cluster, for its user alone
drain.py          moves the gangs and gateways of a node elsewhere before it ends; for Kubernetes
core_watch.py     notices when the core of such a cluster is gone
cluster_guard.py  a small process beside such a cluster, which ends what is left of it
stopped_processes.py  ends processes of such a cluster that a signal has stopped
devices.py        the devices of this machine
ports.py          why a port cannot be bound, and who can reach it
"""
