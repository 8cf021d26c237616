"""What is measured; each module is a command: `python -m tests.benchmarks.NAME`."""

from service.rollout.environment import use_private_cluster

use_private_cluster()  # here, for a command's own imports load Ray before its first line runs
