"""RankActor: a `Rank` as a Ray actor. Made by `workers.gang.rank_group`, in a gang that must start fast without torch.

What watches or steers a rank is in a concurrency group of its own, so that it answers while a step computes. So is
what encodes pictures: one after the other, beside the next request.
"""

import logging
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar, cast

import ray

from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from workers.exporter import Exporter, share_values
from workers.gang.device import Place, own_place
from workers.gang.network import use_interface
from workers.gang.rank_process import import_rank
from workers.messages import (
    Drawn,
    GenerationRequest,
    GenerationResult,
    Kept,
    Part,
    Preview,
    Profiled,
    RankStatus,
    StepEvent,
    Traced,
)
from workers.model.files import fetch

if TYPE_CHECKING:
    from workers.gang.elastic_rank import ElasticRank
    from workers.gang.rank import Rank


Report = TypeVar("Report")


@ray.remote(concurrency_groups={"control": 1, "answers": 1, "prompts": 1})  # type: ignore[call-overload]
class RankActor:
    """One rank of a gang, in a process of its own. Arguments and methods are those of `workers.gang.rank.Rank`.

    It learns its number only when all processes are there, because that depends on their devices; a spare one learns
    it when it is needed.

    Args:
        model: see `Rank`. What `take_number` says of it counts.
        storage: where each node keeps files.
    """

    def __init__(self, model: ModelSpec, storage: Storage) -> None:
        self._exporter = Exporter(share_values())
        self._model, self._storage = model, storage
        self._place = own_place()
        self._number, self._replica = -1, ""  # until `take_number`
        self._address = ""  # where other ranks reach this process; from `prepare` on
        self._made: Rank | None = None  # until `prepare`, which takes seconds; `status` answers before

    @ray.method(concurrency_group="control")
    def place(self) -> Place:
        """Where it runs. The first call."""
        return self._place

    def import_libraries(self, elastic: bool) -> None:
        """Do what takes longest in `prepare`, ahead of it. Of a spare process, the only call until it is needed."""
        import_rank(elastic)

    @ray.method(concurrency_group="control")
    def take_number(self, rank: int, model: ModelSpec, replica: str) -> RankStatus:
        """Be this rank of a gang of this model; see `Rank`. The second call."""
        self._number, self._model, self._replica = rank, model, replica
        return self._starting()

    def prepare(self) -> None:
        """Fetch the model, import torch and make the `Rank`. The third call.

        Raises:
            ValueError: the model's files cannot be had, or are damaged, or CUDA does not show the rank's GPU, or the
                network interface is not there.
        """
        logging.basicConfig(format="%(name)s: %(message)s")
        if self._number == 0:  # all ranks would log the same: the kernel, what the layout costs, what was compiled
            for name in ("sp_core", "workers.model"):
                logging.getLogger(name).setLevel(logging.INFO)
        folder = fetch(self._model, self._storage.models)  # the gang's own node has it; another node may not
        here = self._model.model_copy(update={"source": str(folder)})
        rank = import_rank(here.elastic is not None)  # here: the gang imports this module, and must start without torch
        node_address = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
        self._address = use_interface(here.placement.network_interface, node_address)
        place, compiled = self._place, self._storage.compiled
        self._made = rank(self._number, here, place.cuda_index, place.node_id, self._replica, compiled)

    def _starting(self) -> RankStatus:
        return RankStatus(self._number, self._place.pid, self._place.node_id, "starting", 0, self._model.name, 0.0, 0)

    @property
    def _rank(self) -> "Rank":
        assert self._made is not None, "prepare is called first"
        return self._made

    @property
    def _elastic(self) -> "ElasticRank":
        return cast("ElasticRank", self._rank)

    def open_rendezvous(self) -> tuple[str, int]:
        """On rank 0: open the address where the ranks of this gang meet, and return it."""
        return self._address, self._rank.open_rendezvous(self._address)

    def join(self, host: str, port: int) -> RankStatus:
        """See `Rank.join`."""
        return self._rank.join(host, port)

    def generate(self, request: GenerationRequest) -> Iterator[StepEvent | Preview | Profiled | Drawn | Traced]:
        """See `Rank.generate`."""
        yield from self._traced(self._rank.generate(request))

    def advance(
        self, part: Part, encoded: bytes, progress: bytes
    ) -> Iterator[StepEvent | Preview | Kept | Profiled | Drawn | Traced]:
        """See `ElasticRank.advance`. What is large comes as arguments of its own, which Ray fetches from its store."""
        yield from self._traced(self._elastic.advance(replace(part, encoded=encoded, progress=progress)))

    def _traced(self, reports: Iterator[Report]) -> Iterator[Report | Traced]:
        """Of a traced request, also what the rank did since its last step, whatever the end."""
        try:
            yield from reports
        except Exception:
            yield from self._rank.telemetry.trace.end()
            raise
        yield from self._rank.telemetry.trace.end()

    @ray.method(concurrency_group="prompts")
    def encode(self, request: GenerationRequest) -> bytes:
        """See `ElasticRank.encode`."""
        return self._elastic.encode(request)

    @ray.method(concurrency_group="control")
    def pause(self, request_id: str, part: int) -> None:
        """See `ElasticRank.pause`."""
        self._elastic.pause(request_id, part)

    @ray.method(concurrency_group="answers")
    def answer(self, request_id: str) -> GenerationResult:
        """See `Rank.answer`."""
        return self._rank.answer(request_id)

    def set_loras(self, loras: tuple[LoRA, ...]) -> None:
        """See `Rank.set_loras`."""
        self._rank.set_loras(loras)

    @ray.method(concurrency_group="control")
    def status(self) -> RankStatus:
        """See `Rank.status`."""
        if self._made is None:
            return self._starting()
        return self._made.status()

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
