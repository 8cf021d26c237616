"""ElasticRank: a rank whose requests come in parts, each with as many of its neighbors as the dealer chose.

Called like `workers.gang.rank`, by `workers.gang.rank_actor`. `advance` is called on the ranks of one block at once;
other blocks run other requests meanwhile. `encode` comes in a thread of its own, on rank 0, and takes its turn between
two steps.

All state of a request travels as bytes: what was encoded, and where its steps stand. A rank keeps nothing of a request
between two parts, so any block can go on.
"""

import functools
import itertools
import struct
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from deploy.families.lookup import find_family
from deploy.model_sections import LoRA
from sp_core.degrees import ParallelDegrees, smaller_layout, smaller_layouts
from sp_core.tile_parallel import HandOverFailed
from workers.errors import OutOfMemory, RequestError, RequestFailed
from workers.gang.profiling import StepProfile
from workers.gang.rank import Rank
from workers.gang.warm_up import warm_up_requests
from workers.messages import (
    Drawn,
    GenerationRequest,
    GenerationResult,
    Kept,
    Part,
    Preview,
    Profiled,
    StepEvent,
    Traced,
)
from workers.model.classic_denoising import begin
from workers.model.denoising import Denoising
from workers.model.out_of_memory import advice, free_memory, is_device_failure, is_out_of_memory

KEEP_STEPS = 5
"""After so many steps a request's progress leaves its ranks: so many are done again, at most, if they are lost."""

SECONDS = struct.Struct("<d")
"""Begins what was encoded: how long that took."""


class Turnstile:
    """One thread computes; another may come in between two of its steps."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting = 0
        self._counting = threading.Lock()

    @contextmanager
    def visit(self) -> Iterator[None]:
        """Compute now, or as soon as the other thread passes."""
        with self._counting:
            self._waiting += 1
        try:
            with self._lock:
                yield
        finally:
            with self._counting:
                self._waiting -= 1

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Compute, and `let_pass` now and then."""
        with self._lock:
            yield

    def let_pass(self) -> None:
        """Let all that wait compute first. Inside only."""
        while self._waiting:
            self._lock.release()
            time.sleep(0.0005)  # a lock is not fair: who waits must be awake to take it
            self._lock.acquire()


class ElasticRank(Rank):
    """One rank of an elastic gang. Arguments are those of `Rank`."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._turnstile = Turnstile()

    def encode(self, request: GenerationRequest) -> bytes:
        """On rank 0: encode the prompts of a request, beside what the ranks compute. Returns what `Part.encoded` is.

        Raises:
            RequestError: the request does not suit the model.
            RequestFailed: its prompts cannot be encoded. No other request is affected.
            RuntimeError: the device has failed, and the rank is lost.
        """
        with self._turnstile.visit():
            self._use_device()
            began = time.perf_counter()
            try:
                denoising = begin(self._loaded, request)
                denoising.encode()
                encoded = denoising.encoded()
                seconds = time.perf_counter() - began
                self.telemetry.observe_stages(encode=seconds)
                return SECONDS.pack(seconds) + encoded
            except Exception as error:
                self._drop_kept_features()
                if isinstance(error, RequestError | RequestFailed) or is_device_failure(error):
                    raise
                if not is_out_of_memory(error):
                    raise RequestFailed(f"encoding failed: {type(error).__name__}: {error}") from error
            # Here, where the error and the tensors of its frames are gone.
            raise OutOfMemory(advice(self.model, request, free_memory(self._device)), True)

    def advance(self, part: Part) -> Iterator[StepEvent | Preview | Kept | Profiled | Drawn | Traced]:
        """Take steps of a request, until it is drawn or told to pause. All ranks of the block must call it at once.

        The first rank of the block yields its steps, what it keeps of them, previews if asked for, and at the end
        either `Kept` or `Drawn`. The others yield nothing, but if the request is profiled or traced, and are free after
        the last step.

        Raises:
            As `Rank.generate`.
        """
        request = part.request
        self.telemetry.begin(request)
        self._use_device()
        agreed: bool | None = None
        try:
            with self._turnstile.inside():
                yield from self._advance(part)
        except Exception as error:
            self._drop_kept_features()
            told = isinstance(error, RequestFailed | HandOverFailed)
            if not is_out_of_memory(error.__cause__ if told else error):
                raise
            agreed = isinstance(error, RequestFailed) or part.ranks == 1
        finally:
            self.telemetry.phase = "idle"
            self._boundary.forget(request.request_id)
        if agreed is not None:
            here = self.model.model_copy(update={"parallel": self._loaded.mesh.degrees})
            raise OutOfMemory(advice(here, request, free_memory(self._device)), agreed)

    def pause(self, request_id: str, part: int) -> None:
        """Leave this part of a request at the next boundary, together with all of its ranks."""
        self._boundary.pause(request_id, part)

    def set_loras(self, loras: tuple[LoRA, ...]) -> None:
        """See `Rank.set_loras`."""
        self._loaded.mesh.use(self.model.parallel)
        super().set_loras(loras)

    def _advance(self, part: Part) -> Iterator[StepEvent | Preview | Kept | Profiled | Drawn | Traced]:
        request, mesh, telemetry = part.request, self._loaded.mesh, self.telemetry
        self._boundary.begin(part.number)
        self._take_place(request, part.ranks)
        leads = mesh.axis("gang").rank == 0
        began = time.perf_counter()
        telemetry.phase, telemetry.step, telemetry.total_steps = "denoise", 0, 0
        telemetry.trace.stage("prepare")
        denoising = self._run_on_all_ranks(request, lambda: self._resumed(part))
        telemetry.total_steps = denoising.total_steps
        prepare_s = time.perf_counter() - began
        self._previews.begin(request)
        kept, seconds = denoising.steps_done, []
        profile = StepProfile(self.rank, request.profile, self._device)
        for end, waited in profile.around(self._denoise(denoising)):
            seconds.append(end.seconds)
            telemetry.observe_step(denoising, end, waited, mesh.traffic)
            yield from telemetry.trace.told()
            if leads:
                yield StepEvent(end.step, denoising.total_steps, end.seconds)
            if preview := denoising.preview(end.step):
                self._previews.offer(preview[0], end.step, preview[1])
            yield from self._previews.finished()
            if self._boundary.pauses:
                denoising.hold()
            elif leads and end.step - kept >= KEEP_STEPS and not denoising.done:
                kept = denoising.steps_done
                yield Kept(kept, denoising.progress(), pauses=False)
            self._turnstile.let_pass()
        telemetry.observe_stages(prepare=prepare_s, denoise=sum(seconds))
        yield from profile.report()
        if not denoising.done:
            yield from self._previews.finished(wait=True)
            if leads:
                yield Kept(denoising.steps_done, denoising.progress(), pauses=True)
            return
        if not leads:
            telemetry.observe_drawn(denoising, mesh.traffic)
            return
        telemetry.enter("decode")
        before = time.perf_counter()
        pictures = self._finish(denoising)
        decode_s = time.perf_counter() - before
        telemetry.observe_stages(decode=decode_s)
        telemetry.observe_drawn(denoising, mesh.traffic)
        yield from self._previews.finished(wait=True)
        yield self._encoding.keep(
            denoising.request,
            pictures,
            GenerationResult(
                outputs=(),
                seeds=request.all_seeds,
                degrees=mesh.degrees,
                encode_seconds=SECONDS.unpack_from(part.encoded)[0] + prepare_s,
                step_seconds=tuple(seconds),
                decode_seconds=decode_s,
                warnings=denoising.warnings,
            ),
        )

    def _resumed(self, part: Part) -> Denoising:
        """The request where its last ranks have left it."""
        denoising = begin(self._loaded, part.request, part.encoded[SECONDS.size :])
        denoising.prepare()
        if part.progress:
            denoising.resume(part.progress)
        return denoising

    def _take_place(self, request: GenerationRequest, ranks: int) -> None:
        """Be one of the block's ranks from now on."""
        mesh = self._loaded.mesh
        mesh.use(self._layout(request, ranks // self.model.parallel.tensor_parallel_size))
        self.telemetry.use_layout(str(mesh.degrees), mesh.axis("gang").rank == 0)

    def _layout(self, request: GenerationRequest, degree: int) -> ParallelDegrees:
        """How so many units share this request."""
        family = find_family(Path(self.model.source))
        guided = family.branches(request.guidance_scale, request.negative_prompt) > 1
        return smaller_layout(self.model.parallel, degree, guided)

    def _warm_up(self) -> None:
        """Run the spec's shapes once in every layout. Colors are learned in the smallest.

        All ranks that ever lead a block draw the same pictures there, so previews do not change their colors when a
        request takes other ranks.
        """
        colors, unit = self._loaded.colors, self.model.parallel.tensor_parallel_size
        learns = colors.warming
        for layout, request in self._warm_up_requests():
            colors.warming = learns and layout.world_size == self._least * unit
            encoded = self._encoded_on_rank_0(request)
            for report in self._advance(Part(request, 1, layout.world_size, encoded)):
                if isinstance(report, Drawn):
                    self.answer(request.request_id)
        colors.warming = learns
        self._loaded.mesh.use(self.model.parallel)

    def _warm_up_adapters(self, loras: Iterable[LoRA]) -> None:
        """Compile what these adapters need in every layout, so that a move compiles nothing; see `Rank`."""
        names = dict.fromkeys(lora.name for lora in loras) if self.model.compile else {}
        for name in names:
            for layout, request in self._warm_up_requests(((name, 1.0),)):
                encoded = self._encoded_on_rank_0(request)
                self._take_place(request, layout.world_size)
                part, failure = Part(request, 1, layout.world_size, encoded), None
                try:
                    for _ in self._denoise(self._run_on_all_ranks(request, functools.partial(self._resumed, part))):
                        pass
                except (RequestError, RequestFailed) as error:  # one block may fail alone
                    failure = error
                self._loaded.mesh.use(self.model.parallel)
                self._boundary.cross(self._loaded.mesh, request, failure)
        self._loaded.mesh.use(self.model.parallel)

    def _warm_up_requests(
        self, loras: tuple[tuple[str, float], ...] = ()
    ) -> Iterator[tuple[ParallelDegrees, GenerationRequest]]:
        """What to run in each layout that a request may have, the largest first.

        A layout that divides branches is for guided requests alone, and where it exists, those without guidance have
        another one of as many ranks.
        """
        family, own = find_family(Path(self.model.source)), self.model.parallel
        for layout in (own, *smaller_layouts(own, self._least)):
            here = self.model.model_copy(update={"parallel": layout})
            degree = layout.world_size // layout.tensor_parallel_size
            for request in warm_up_requests(here, loras):
                above = family.guided_above
                others = () if above is None else (above + 1.0, above)
                choices = (request, *(replace(request, guidance_scale=scale, negative_prompt="") for scale in others))
                fitting = (each for each in choices if self._layout(each, degree) == layout)
                yield from ((layout, each) for each in itertools.islice(fitting, 1))

    def _encoded_on_rank_0(self, request: GenerationRequest) -> bytes:
        """What rank 0 has made of the prompts, on all ranks. They fail together."""
        mesh = self._loaded.mesh
        mesh.use(self.model.parallel)
        encoded = self._run_on_all_ranks(request, lambda: self.encode(request) if self.rank == 0 else b"")
        return mesh.broadcast(encoded if self.rank == 0 else None)

    @property
    def _least(self) -> int:
        """Units that a request has at least."""
        return self.model.elastic.min_degree if self.model.elastic else 1
