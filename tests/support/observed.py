"""A process that observes all that spray can: what a busy cluster with one slow rank tells Prometheus.

`python -m tests.support.observed PORT [PAUSE]`, with the mean pause between requests in seconds; RAY_RAYLET_PID and
SPRAY_METRICS_DIR are set as in a cluster.
"""

import contextlib
import random
import sys
import time
from pathlib import Path

from deploy.model_sections import Autoscaling
from service.api.observed import observing
from service.jobs.observed import ObservedJobs, observing_store
from service.jobs.records import Counts
from service.names import app_name
from service.state.model_states import ModelState
from service.state.observed import ObservedModels
from tests.support.backend import a_model
from workers.disk import tell, watch_disk
from workers.errors import JobsUnavailable
from workers.exporter import Exporter, share_values
from workers.observing import GangMetrics, GatewayMetrics, RankMetrics

STEP_S, TRANSFER_S, LATE_S = 0.2, 0.02, 0.08


class Observed:
    """One model on a gang of two ranks, of which rank 1 comes late to each exchange."""

    def __init__(self, name: str = "watched") -> None:
        self._model = a_model(name, autoscaling=Autoscaling(min_replicas=1, max_replicas=4))
        self._ranks = [RankMetrics(name, "0", rank, "ulysses_degree=2") for rank in range(2)]
        self._gang = GangMetrics(name, "0")
        self._gateway = GatewayMetrics(name, ["ok", "queue_full"])
        self._models = ObservedModels()
        self._jobs = ObservedJobs()
        self._requests = 0

    def request(self, now: float) -> None:
        """One request of four steps; every fourth is refused, every fifth costs the gang its ranks."""
        self._requests += 1
        self._gateway.began()
        for rank, metrics in enumerate(self._ranks):
            for _ in range(4):
                waits = LATE_S if rank == 0 else 0.0
                metrics.step(STEP_S * random.uniform(0.9, 1.1), "1024x1024")
                metrics.in_collectives({"all_to_all": TRANSFER_S + waits, "gather": 0.001}, waits)
                metrics.sent({"all_to_all": 1 << 20, "gather": 1 << 14})
            for stage in ("encode", "prepare", "decode", "encode_media"):
                metrics.stage(stage, 0.05)  # type: ignore[arg-type]
            metrics.stage("denoise", 4 * STEP_S)
            metrics.broadcast(0.01)
            metrics.drew(1 << 20, 12)
            metrics.memory(used=6e9, peak=7e9, limit=8e9)
        self._gateway.answered(1.5, 0.5)
        self._gateway.ended("queue_full" if self._requests % 4 == 0 else "ok")
        if self._requests % 5 == 0:
            self._gang.lost("died")
            self._gang.started({"process": 2.0, "rendezvous": 0.5, "load": 20.0, "warm_up": 3.0})
            self._gateway.lost()
        self._gang.now(12.0, True, now)
        self._gang.elastic(0.5, {"move": 1, "pause": 1})
        state = ModelState("running", replicas={"RUNNING": 1, "STARTING": 2}, queued=9, gangs=({"request_s": 1.5},))
        self._models.tell({self._model.name: self._model}, {self._model.name: state}, {app_name(self._model.name): 3})
        with observing("/v1/images/generations", "200"):
            pass
        with observing("GenerateImage", "INTERNAL"):
            pass
        self._jobs.tell({self._model.name: Counts(queued=3, running=1)}, [self._model.name])
        ended = {(self._model.name, "succeeded"): self._requests, (self._model.name, "failed"): self._requests // 4}
        self._jobs.tell_ended(ended, [self._model.name])  # type: ignore[arg-type]
        with contextlib.suppress(JobsUnavailable), observing_store("counts"):
            if self._requests % 4 == 0:
                raise JobsUnavailable("the disk is full")


def main() -> None:
    """Answer Prometheus at the port, and be busy until killed."""
    exporter = Exporter(share_values())
    watch_disk("models", Path("/"))
    tell()
    observed, pause = Observed(), float((*sys.argv, "0.2")[2])
    exporter.serve_at("127.0.0.1", int(sys.argv[1]))
    while True:
        observed.request(time.time())
        time.sleep(pause * random.uniform(0.6, 1.4))


if __name__ == "__main__":
    main()
