"""A second Ray node beside a head that listens on loopback, until its raylet ends.

    python -m tests.benchmarks.job_faults.node ADDRESS KEY=VALUE

`ray start` joins no cluster on loopback, so the node is made as `ray.cluster_utils` makes its nodes.
"""

import sys
import time

from ray._private.node import Node
from ray._private.parameter import RayParams

LOOPBACK = "127.0.0.1"
LOOK_S = 0.2


def main(address: str, label: str) -> None:
    """Run a node with one core and a label, in the cluster at this address."""
    key, _, value = label.partition("=")
    parameters = RayParams(
        gcs_address=address,
        redis_address=address,
        node_ip_address=LOOPBACK,
        num_cpus=1,
        num_gpus=0,
        labels={key: value},
        object_store_memory=10**8,
        min_worker_port=0,
        max_worker_port=0,
        node_manager_port=0,
        include_log_monitor=False,
        dashboard_agent_listen_port=None,
    )
    node = Node(parameters, head=False, shutdown_at_exit=False, spawn_reaper=False)
    while not node.dead_processes():
        time.sleep(LOOK_S)
    node.kill_all_processes(check_alive=False, allow_graceful=False)
    sys.exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
