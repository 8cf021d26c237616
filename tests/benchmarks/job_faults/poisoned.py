"""A request that kills whatever runs it: it may cost two gangs, and those beside it must not fail. For `strikes`.

No model here dies of a request, so the harness kills a rank whenever the poisoned job has taken a step on it.
"""

import os
import signal
import time

from tests.benchmarks.job_faults.cluster import FAR, NEAR, wait
from tests.benchmarks.job_faults.ledger import LEAST_FAULTS
from tests.benchmarks.job_faults.scene import NOTICED_S, WAITING, Facts, NotNoticed, Scene

STEPS = 100
"""Of the poisoned job: some seconds, in which it is seen to run."""

MOST_GANGS = 2

LOOK_S = 0.05


def poison(scene: Scene) -> Facts:
    """Submit a poisoned job among others, and kill a rank of its gang whenever it runs, until it has ended."""
    beside = scene.callers.burst(WAITING)
    scene.wait_at_work()
    facts = scene.meet()
    job = scene.callers.submit(NEAR, "interactive", poisoned_steps=STEPS)
    if job is None:
        raise NotNoticed("the poisoned job was not accepted")
    followed = scene.callers.follow_beside(job)
    killed: list[int] = []
    until = time.monotonic() + NOTICED_S
    while (told := scene.callers.look(job)).get("state") in (None, "queued", "running"):
        if time.monotonic() > until:
            raise NotNoticed(f"after {len(killed)} ranks the poisoned job has not ended: {told}")
        ranks = scene.cluster.find("rank") - scene.cluster.find("rank", FAR)
        if not told or told["state"] == "queued" or not told["step"] or not ranks:
            time.sleep(LOOK_S)
            continue
        pid = scene.rng.choice(sorted(ranks))
        os.kill(pid, signal.SIGKILL)
        killed.append(pid)
        wait(NOTICED_S, lambda: (now := scene.callers.look(job)) and (now["state"] != "running" or not now["step"]))
    followed.result()
    scene.recover()
    for call in beside:
        call.result()
    wait(scene.callers.patience_s, lambda: not any(each.open for each in scene.met))
    facts |= {"killed": killed, "ended": f"{job.state}: {job.code}"}
    if len(killed) != MOST_GANGS:
        facts["trouble"] = f"the poisoned job has cost {len(killed)} gangs, not {MOST_GANGS}"
    if failed := [each.id for each in scene.met if each.state != "succeeded" and each.struck < LEAST_FAULTS]:
        facts["trouble"] = f"jobs beside the poisoned one have failed: {', '.join(failed)}"
    return facts
