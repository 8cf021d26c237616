"""RankActor: a `Rank` as a Ray actor. Made by `workers.gang.rank_group`, in a gang that must start fast without torch.

What watches or steers a rank is in a concurrency group of its own, so that it answers while a step computes.
"""

import logging
from collections.abc import Iterator

import ray

from deploy.spec import LoRA, ModelSpec
from workers.exporter import Exporter, share_values
from workers.gang.rank_process import set_up_rank_process
from workers.messages import GenerationRequest, GenerationResult, RankStatus, StepEvent
from workers.model.files import fetch


@ray.remote(concurrency_groups={"control": 1})  # type: ignore[call-overload]
class RankActor:
    """One rank of a gang, in a process of its own. Arguments and methods are those of `workers.gang.rank.Rank`."""

    def __init__(self, rank: int, model: ModelSpec, models_folder: str | None, replica: str) -> None:
        self._exporter = Exporter(share_values())
        logging.basicConfig(format="%(name)s: %(message)s")
        if rank == 0:  # all ranks would log the same: the kernel, and what the layout costs
            logging.getLogger("sp_core").setLevel(logging.INFO)
        node_id = ray.get_runtime_context().get_node_id()
        folder = fetch(model, models_folder)  # the gang's own node has it; another node may not
        here = model.model_copy(update={"source": str(folder)})
        set_up_rank_process()
        from workers.gang.rank import Rank  # here: the gang imports this module, and must start without torch

        self._rank = Rank(rank, here, node_id=node_id, replica=replica)

    def open_rendezvous(self) -> tuple[str, int]:
        """On rank 0: open the address where the ranks of this gang meet, and return it."""
        host = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        return host, self._rank.open_rendezvous(host)

    def join(self, host: str, port: int) -> RankStatus:
        """See `Rank.join`."""
        return self._rank.join(host, port)

    def generate(self, request: GenerationRequest) -> Iterator[StepEvent | GenerationResult]:
        """See `Rank.generate`."""
        yield from self._rank.generate(request)

    def set_loras(self, loras: tuple[LoRA, ...]) -> None:
        """See `Rank.set_loras`."""
        self._rank.set_loras(loras)

    @ray.method(concurrency_group="control")
    def status(self) -> RankStatus:
        """See `Rank.status`."""
        return self._rank.status()

    @ray.method(concurrency_group="control")
    def serve_metrics(self, host: str, port: int | None) -> None:
        """See `Exporter.serve_at`."""
        self._exporter.serve_at(host, port)

    @ray.method(concurrency_group="control")
    def renumber(self, replica: str) -> None:
        """See `Rank.renumber`."""
        self._rank.renumber(replica)

    @ray.method(concurrency_group="control")
    def cancel(self, request_id: str) -> None:
        """See `Rank.cancel`."""
        self._rank.cancel(request_id)
