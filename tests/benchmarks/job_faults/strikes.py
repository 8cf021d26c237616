"""The kinds of faults. Each does harm to a cluster at work, sees that the harm is real, and that it was noticed.

Only processes that carry the cluster's mark are struck, and the PostgreSQL server of the command's own. A process that
was killed must be gone, and another one in its place; whatever holds for a while must have been felt by a caller.
"""

import math
import os
import random
import signal
import time
from collections.abc import Callable, Mapping

from tests.benchmarks.job_faults.cluster import FAR, NEAR, wait
from tests.benchmarks.job_faults.poisoned import poison
from tests.benchmarks.job_faults.scene import AT_WORK_S, NOTICED_S, WAITING, Facts, NotNoticed, Scene, replaced
from tests.benchmarks.job_faults.store_strikes import cut_off, fill_store, kill_store, stop_database, stop_store


def kill(scene: Scene, process: str, sign: signal.Signals = signal.SIGKILL) -> Facts:
    """Give one process of a kind a signal; another one must take its place."""
    scene.wait_at_work()
    pid, before = scene.one_of(process)
    facts = scene.meet()
    model = FAR if pid in scene.cluster.processes(FAR) and process in ("rank", "gang") else NEAR
    os.kill(pid, sign)
    scene.recover(model)
    return facts | replaced(scene.cluster, process, pid, before)


def stop_rank(scene: Scene) -> Facts:
    """Stop a rank. It is not there anymore when it is noticed, for its gang kills it."""
    return kill(scene, "rank", signal.SIGSTOP)


def fill_outputs(scene: Scene) -> Facts:
    """Fill the disk of outputs: submissions are refused with 507, and what runs finds no room for its picture."""
    assert scene.disk is not None
    scene.wait_at_work()
    facts = scene.meet()
    scene.disk.fill()
    began = time.monotonic()
    try:
        scene.refused(507, "outputs_full")
        scene.hold(scene.rng.uniform(2.0, 5.0))
    finally:
        scene.disk.free()
        scene.recover()
    return facts | {"held_s": round(scene.struck_at - began, 1), "felt": "507"}


def lose_node(scene: Scene) -> Facts:
    """Kill the raylet of the second node, with which all that runs there ends, and start another node."""
    scene.wait_at_work()
    facts = scene.meet()
    before = scene.cluster.processes(FAR)
    pid, _ = scene.one_of("raylet", FAR)
    os.kill(pid, signal.SIGKILL)
    scene.recover(FAR)
    by_itself = scene.cluster.end_node(30.0)
    scene.cluster.start_node()
    new = wait(NOTICED_S, lambda: scene.cluster.find("rank", FAR))
    if not new:
        raise NotNoticed("no gang runs on the new node")
    return facts | {"pid": pid, "processes": len(before), "gone_by_itself": by_itself, "replaced_by": min(new)}


def restart(scene: Scene) -> Facts:
    """Kill every process of the cluster, with jobs that wait and run, and start it again."""
    scene.callers.burst(WAITING)
    wait(AT_WORK_S, lambda: len(scene.callers.ledger.open_jobs()) >= WAITING)
    scene.wait_at_work()
    facts = scene.meet()
    killed = scene.cluster.kill()
    scene.recover()
    scene.cluster.start()
    return facts | {"processes": len(killed)}


STRIKES: Mapping[str, Callable[[Scene], Facts]] = {
    "store": kill_store,
    "gateway": lambda scene: kill(scene, "gateway"),
    "rank": lambda scene: kill(scene, "rank"),
    "gang": lambda scene: kill(scene, "gang"),
    "controller": lambda scene: kill(scene, "controller"),
    "proxy": lambda scene: kill(scene, "proxy"),
    "node": lose_node,
    "rank stopped": stop_rank,
    "store stopped": stop_store,
    "outputs full": fill_outputs,
    "store full": fill_store,
    "poisoned": poison,
    "cluster": restart,
    "database": stop_database,
    "partition": cut_off,
}
"""By the name of the kind."""


def plan(seed: int, kinds: list[str], count: int) -> list[str]:
    """The kinds of the first so many faults: in each round every kind once, in an order of its own."""
    rng, planned = random.Random(seed), list[str]()
    for _ in range(math.ceil(count / len(kinds))):
        planned += rng.sample(kinds, len(kinds))
    return planned[:count]
