"""Rank: one process, one device, one place in the mesh.

The same method is called on all ranks at once (SPMD): by a gang on Ray through `workers.gang.rank_actor`, or by
`workers.gang.local` without Ray. `status`, `renumber`, `cancel` and `answer` may be called from other threads while
`generate` computes.

What a rank raises tells the gang what to do. All ranks agree on a `RequestError` or `RequestFailed` at a boundary: the
gang is sound. Anything else may have left the others inside a collective: the gang is lost.
"""

import gc
import os
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any, TypeVar

import torch

from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from sp_core.cuda_kernels import in_use
from sp_core.tile_parallel import HandOverFailed, PeerTileFailed
from workers.errors import OutOfMemory, PeerFailed, RequestError, RequestFailed
from workers.gang.boundary import Boundary
from workers.gang.encoding import Encoding
from workers.gang.preview_files import PreviewFiles
from workers.gang.profiling import StepProfile
from workers.gang.rank_telemetry import RankTelemetry
from workers.gang.rendezvous import find_store, form_mesh, host_store
from workers.gang.self_test import self_test
from workers.gang.warm_up import warm_up_requests
from workers.messages import (
    Drawn,
    GenerationRequest,
    GenerationResult,
    Preview,
    Profiled,
    RankStatus,
    StepEvent,
    Traced,
)
from workers.model.classic_denoising import begin
from workers.model.compiler import Compiler
from workers.model.denoising import Denoising
from workers.model.diffusers_internals import drop_kept_features
from workers.model.loader import LoadedModel, load_model
from workers.model.out_of_memory import advice, free_memory, is_device_failure, is_out_of_memory
from workers.model.step_ends import StepEnd

Result = TypeVar("Result")


class Rank:
    """One rank of a gang.

    Args:
        rank: its number, `0 <= rank < model.parallel.world_size`.
        model: what to load, and the layout.
        device_index: which of the visible CUDA devices it uses; ignored on CPU.
        node_id: the Ray node it runs on; empty outside Ray.
        replica: the gang's number among those of its model, for metrics.
        compiled_folder: `storage.compiled` of the deployment.

    Attributes:
        telemetry: what it tells of its work.
    """

    def __init__(
        self,
        rank: int,
        model: ModelSpec,
        device_index: int = 0,
        node_id: str = "",
        replica: str = "0",
        compiled_folder: str | None = None,
    ) -> None:
        self.rank = rank
        self.model = model
        self._node_id = node_id
        self._replica = replica
        self._store: Any = None  # once it has joined; rank 0 hosts it as long as it lives
        self._usable: LoadedModel | None = None  # until it has joined; `_loaded` asserts that it has
        self._boundary = Boundary(rank)
        self._encoding = Encoding()
        self._previews = PreviewFiles()
        self._ahead = int(model.device == "cuda")  # steps that are queued before the host waits; a CPU queues nothing
        self._device = torch.device(f"cuda:{device_index}" if model.device == "cuda" else "cpu")
        self.telemetry = RankTelemetry(rank, model, self._device)
        self._compiler = Compiler(model, compiled_folder, self._device)
        if model.device == "cpu":
            torch.set_num_threads(max(1, int(model.placement.cpus_per_rank)))

    def open_rendezvous(self, host: str) -> int:
        """On rank 0: host the store where the ranks of this gang meet, and return its port.

        Args:
            host: the address to bind, reachable by all ranks.
        """
        self._store, port = host_store(host, self.model.timeouts.startup_s)
        return port

    def join(self, host: str, port: int) -> RankStatus:
        """Meet the other ranks, form the mesh, load the model, test it, and warm it up. All ranks must call it at once.

        Raises:
            ValueError: the model cannot be loaded or the layout does not fit it.
            RuntimeError: the ranks did not meet within the start-up limit, or receive wrong data from one another, or
                compute something else than one rank would.
        """
        began = time.monotonic()
        self._use_device()
        if self.rank != 0:
            self._store = find_store(host, port, self.model.timeouts.startup_s)
        mesh = form_mesh(self._store, self.rank, self.model, self._device)
        met = time.monotonic()
        self.telemetry.phase = "load"
        self._use(load_model(self.model, mesh, self._on_progress))
        self.telemetry.phase = "starting"
        loaded = time.monotonic()
        tests = self.model.self_test and self.model.parallel.world_size > 1
        if tests:
            self._test()
        tested = time.monotonic()
        with self._compiler.warming("start"), self._loaded.colors.warm_up():
            self._warm_up()
            self._warm_up_adapters(self.model.loras)
        gc.collect()
        gc.freeze()  # the model stays; looking through its objects between steps would only cost time
        mesh.traffic.forget()  # what the start has sent
        self.telemetry.latest_step = ()
        self.renumber(self._replica)  # metrics begin here: warming up counts nowhere
        self.telemetry.phase = "idle"
        warming = "compile" if self._compiler.has_compiled else "warm_up"
        start = (
            ("rendezvous", met - began),
            ("load", loaded - met),
            *((("self_test", tested - loaded),) if tests else ()),
            (warming, time.monotonic() - tested),
        )
        return replace(self.status(), start=start)

    def generate(self, request: GenerationRequest) -> Iterator[StepEvent | Preview | Profiled | Drawn | Traced]:
        """Run one request. Rank 0 yields its steps and previews, if asked to, and then that it is drawn.

        The others yield nothing, but if the request is profiled or traced. Rank 0 keeps the pictures until `answer` is
        called for them.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: it failed on some rank, or was canceled; all ranks have stopped at the same boundary.
            OutOfMemory: likewise, or inside a step, where other ranks may wait for this one.
        """
        self.telemetry.begin(request)
        self._use_device()
        agreed: bool | None = None
        try:
            yield from self._generate(request)
        except Exception as error:
            self._drop_kept_features()
            told = isinstance(error, RequestFailed | HandOverFailed)
            if not is_out_of_memory(error.__cause__ if told else error):
                raise
            agreed = isinstance(error, RequestFailed) or self.model.parallel.world_size == 1
        finally:
            self.telemetry.phase = "idle"
            self._boundary.forget(request.request_id)
        if agreed is not None:  # only here, where the error and the tensors of its frames are gone
            raise OutOfMemory(advice(self.model, request, free_memory(self._device)), agreed)

    def answer(self, request_id: str) -> GenerationResult:
        """On rank 0: encode what was drawn for a request. From a thread of its own: the next request may compute.

        Raises:
            RequestFailed: the pictures cannot be encoded. No other request is affected.
        """
        result = self._encoding.encode(request_id, self.model)
        self.telemetry.observe_stages(encode_media=result.encode_media_seconds)
        return result

    def set_loras(self, loras: tuple[LoRA, ...]) -> None:
        """Use exactly these adapters from the next request on. All ranks must call it at once, between requests.

        Those that are new, or new under a name, are read, and warmed up where blocks are compiled.

        Raises:
            RequestFailed: some rank could not read or run one; every rank keeps the adapters that it had.
        """
        self._use_device()
        former = self._loaded
        self.telemetry.phase = "load"
        try:
            self._use(self._run_on_all_ranks(None, lambda: former.with_loras(loras)))
            try:
                with self._compiler.warming("new adapters"):
                    self._warm_up_adapters(lora for lora in loras if lora not in former.shares)
            except (RequestError, RequestFailed):
                self._use(former)
                raise
        finally:
            self.telemetry.phase = "idle"

    def _use_device(self) -> None:
        """Compute on this rank's GPU. First in what computes: torch keeps it by thread, and Ray has several."""
        if self.model.device == "cuda":
            torch.cuda.set_device(self._device)

    def _drop_kept_features(self) -> None:
        """After a failure, which may have been inside the VAE: the next request begins without them."""
        if self._usable is not None:
            drop_kept_features(getattr(self._usable.pipeline, "vae", None))

    def _on_progress(self, loaded: float) -> None:
        self.telemetry.loaded = loaded

    @property
    def _loaded(self) -> LoadedModel:
        assert self._usable is not None, "a rank joins before it generates"
        return self._usable

    def _use(self, loaded: LoadedModel) -> None:
        loaded.use_loras()
        self._usable, self.model = loaded, loaded.spec

    def _test(self) -> None:
        self_test(self._loaded, lambda request: self._begin(request)[0])
        self.telemetry.phase = "starting"
        self.telemetry.step = self.telemetry.total_steps = 0
        if self._device.type == "cuda":
            torch.cuda.empty_cache()  # whole weights are not needed again

    def _warm_up(self) -> None:
        """Run the spec's shapes once, so that no caller waits for what a first run compiles and allocates."""
        for request in warm_up_requests(self.model):
            for _ in self._generate(request):
                pass
            if self.rank == 0:
                self.answer(request.request_id)

    def _warm_up_adapters(self, loras: Iterable[LoRA]) -> None:
        """Compile what these adapters need. Not to the end: rank 0 decodes alone, and could not fail together."""
        names = dict.fromkeys(lora.name for lora in loras) if self.model.compile else {}
        for name in names:
            for request in warm_up_requests(self.model, ((name, 1.0),)):
                for _ in self._denoise(self._begin(request)[0]):
                    pass

    def _generate(self, request: GenerationRequest) -> Iterator[StepEvent | Preview | Profiled | Drawn | Traced]:
        reports, mesh = self.rank == 0, self._loaded.mesh
        started = time.perf_counter()
        denoising, encode_seconds = self._begin(request)
        self._previews.begin(request)
        prepared = time.perf_counter()
        seconds: list[float] = []
        profile = StepProfile(self.rank, request.profile, self._device)
        for end, waited in profile.around(self._denoise(denoising)):
            seconds.append(end.seconds)
            self.telemetry.observe_step(denoising, end, waited, mesh.traffic)
            yield from self.telemetry.trace.told()
            if reports and request.report_steps:
                yield StepEvent(end.step, denoising.total_steps, end.seconds)
            if preview := denoising.preview(end.step):
                self._previews.offer(preview[0], end.step, preview[1])
            yield from self._previews.finished()
        self.telemetry.enter("decode")
        before = time.perf_counter()
        denoising.join_pictures()
        pictures = self._finish(denoising)
        decode_seconds = time.perf_counter() - before
        prepare_seconds = prepared - started - encode_seconds
        self.telemetry.observe_stages(
            encode=encode_seconds, prepare=prepare_seconds, denoise=sum(seconds), decode=decode_seconds
        )
        self.telemetry.observe_drawn(denoising, mesh.traffic)
        yield from self._previews.finished(wait=True)
        yield from profile.report()
        if reports:
            result = GenerationResult(
                outputs=(),
                seeds=request.all_seeds,
                degrees=self.model.parallel,
                encode_seconds=prepared - started,
                step_seconds=tuple(seconds),
                decode_seconds=decode_seconds,
                warnings=denoising.warnings,
            )
            yield self._encoding.keep(denoising.request, pictures, result)

    def status(self) -> RankStatus:
        """What this rank is doing. Answers while it computes."""
        return RankStatus(
            rank=self.rank,
            pid=os.getpid(),
            node_id=self._node_id,
            progress=self._boundary.progress,
            kernel=in_use(self._device) if self._usable else "",
            **self.telemetry.now,
        )

    def renumber(self, replica: str) -> None:
        """Observe under another number of the gang from now on."""
        self.telemetry.renumber(replica)

    def cancel(self, request_id: str) -> None:
        """Stop this request, and no other, at the next boundary, together with all ranks.

        A GPU then finishes the step that is queued, for nobody, before it begins the next request.
        """
        self._boundary.cancel(request_id)

    def _begin(self, request: GenerationRequest) -> tuple[Denoising, float]:
        """Encode and prepare; also returns the seconds of encoding."""
        began = time.perf_counter()
        self.telemetry.enter("encode")
        self.telemetry.step = self.telemetry.total_steps = 0

        def encode() -> Denoising:
            denoising = begin(self._loaded, request)
            denoising.encode()
            return denoising

        denoising = self._run_on_all_ranks(request, encode)
        denoising.share_encoded()
        encode_seconds = time.perf_counter() - began
        self.telemetry.trace.stage("prepare")
        self._run_on_all_ranks(request, denoising.prepare)
        self.telemetry.total_steps = denoising.total_steps
        return denoising, encode_seconds

    def _denoise(self, denoising: Denoising) -> Iterator[tuple[StepEnd, float]]:
        """Run all steps; yield the end of each, and the seconds that this rank waited in it for slower ones."""
        self.telemetry.enter("denoise")
        # An error inside a step is not agreed: the other ranks may wait in a collective of the forward.
        for end in denoising.steps(self._ahead):
            after = f"step {end.step} of {denoising.total_steps}"
            broken = None if end.finite else FloatingPointError(f"the latents are not finite after {after}")
            spent = sum((end.in_collectives or {}).values())
            waited = self._boundary.cross(self._loaded.mesh, denoising.request, broken, spent)
            self.telemetry.crossed(end, spent, waited, denoising.guidance)
            yield end, waited

    def _run_on_all_ranks(self, request: GenerationRequest | None, work: Callable[[], Result]) -> Result:
        return self._boundary.run(self._loaded.mesh, request, work)

    def _finish(self, denoising: Denoising) -> list[Any]:
        try:
            return denoising.finish()
        except (PeerFailed, HandOverFailed, RequestError):  # the last: what was made may be refused
            raise
        except PeerTileFailed as error:
            raise PeerFailed(f"rank {self.rank} stopped because another rank failed") from error
        except Exception as error:  # no rank waits for this one: where decoding is shared, the others have been told
            if is_device_failure(error):
                raise
            raise RequestFailed(f"decoding failed: {type(error).__name__}: {error}") from error
