"""What part 5 does inside the process of a rank: start, load, draw, cancel, run out of memory, draw again.

The rank is the one that gangs are made of. Each finding goes to the parent at once, as the name of a table, the cells
of a row, and whether it is a failure.
"""

import io
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from deploy.model_spec import ModelSpec
from workers.errors import OutOfMemory
from workers.gang.rank_process import import_rank
from workers.messages import GenerationRequest, GenerationResult, Preview, PreviewOptions, Profiled, StepEvent

LOOPBACK = "127.0.0.1"
CANCELLATIONS = 5
STEPS = 40
"""Of a request that is canceled, so that it does not end by itself before."""

SPARE_BYTES = 64 * 2**20
"""What a request may take on a GPU that shall run out of memory."""


def work(model: ModelSpec, request: GenerationRequest, started: float, parent: Connection) -> None:
    """Run all of it.

    Args:
        model: of one rank.
        request: what to draw.
        started: by `time.time`, when the parent started this process.
        parent: where findings go.
    """
    kind = import_rank()
    imported = time.time()
    parent.send(("cold", ("process, imports", imported - started, ""), False))
    rank = kind(0, model)
    port = rank.open_rendezvous(LOOPBACK)
    with _watched(rank) as seen:
        rank.join(LOOPBACK, port)
    for phase, took, note in _phases(seen, imported):
        parent.send(("cold", (phase, took, note), False))
    reference = _draw(rank, replace(request, request_id="first"), parent, "first request")
    parent.send(("cold", ("all, to the first picture", time.time() - started, ""), False))
    again = _draw(rank, replace(request, request_id="second"), parent, "second request")
    said, differs = _beside(again, reference)
    parent.send(("cold", ("second picture", "-", said), differs))
    cells, failed = _observed(rank, replace(request, request_id="observed"), reference)
    parent.send(("cold", cells, failed))
    step = sorted(again.step_seconds)[len(again.step_seconds) // 2]
    for number in range(CANCELLATIONS):
        long = replace(request, request_id=f"cancel-{number}", report_steps=True, num_inference_steps=STEPS)
        cells, failed = _cancel(rank, long, step)
        parent.send(("cancel", cells, failed))
    for cells, failed in _run_out(rank, request, model.device, reference):
        parent.send(("memory", cells, failed))


@contextmanager
def _watched(rank: Any) -> Iterator[list[tuple[float, str, float]]]:
    """Time, phase and share of the files read, whenever one of these changes inside the block."""
    seen: list[tuple[float, str, float]] = []
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            status = rank.status()
            if not seen or (status.phase, status.loaded) != seen[-1][1:]:
                seen.append((time.time(), status.phase, status.loaded))
            done.wait(0.005)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield seen
    finally:
        seen.append((time.time(), "joined", 1.0))
        done.set()
        thread.join()


def _phases(seen: list[tuple[float, str, float]], began: float) -> Iterator[tuple[str, float, str]]:
    """Seconds of each phase of a start. A phase shorter than a look is 0."""
    end = seen[-1][0] if seen[-1][1] == "joined" else max(at for at, phase, _ in seen if phase == "joined")
    load = next((at for at, phase, _ in seen if phase == "load"), end)
    read = max((at for at, phase, loaded in seen if phase == "load" and loaded > 0), default=load)
    loaded = next((at for at, phase, _ in seen if phase != "load" and at > load), end)
    yield "rendezvous, groups", load - began, ""
    yield "transformer, from its files", read - load, ""
    yield "text encoder, VAE, tokenizer", loaded - read, ""
    yield "warm-up shapes, adapters", end - loaded, ""


def _draw(rank: Any, request: GenerationRequest, parent: Connection, name: str) -> GenerationResult:
    began = time.time()
    result = _drawn(rank, request)
    steps = sorted(result.step_seconds)
    note = (
        f"encode {result.encode_seconds * 1e3:.0f} ms, {len(steps)} steps of {steps[len(steps) // 2] * 1e3:.1f} ms "
        f"(longest {steps[-1] * 1e3:.1f}), decode {result.decode_seconds * 1e3:.0f} ms, "
        f"PNG {result.encode_media_seconds * 1e3:.0f} ms"
    )
    parent.send(("cold", (name, time.time() - began, note), False))
    return result


def _drawn(rank: Any, request: GenerationRequest) -> GenerationResult:
    for _ in rank.generate(request):
        pass
    result: GenerationResult = rank.answer(request.request_id)
    return result


def _observed(rank: Any, request: GenerationRequest, reference: GenerationResult) -> tuple[tuple[object, ...], bool]:
    """With steps, previews and a profile; it must be the same picture."""
    asked = replace(request, report_steps=True, profile=True, previews=PreviewOptions(count=2))
    began, found = time.time(), list(rank.generate(asked))
    said, differs = _beside(rank.answer(asked.request_id), reference)
    took = time.time() - began
    kinds = {kind: sum(isinstance(each, kind) for each in found) for kind in (StepEvent, Preview, Profiled)}
    operators = next((each.operators for each in found if isinstance(each, Profiled)), ())
    first = f"; longest: {operators[0].name} x {operators[0].calls}" if operators else ""
    note = ", ".join(f"{number} {kind.__name__}" for kind, number in kinds.items()) + f"; {said}{first}"
    return ("request with previews and a profile", took, note[:300]), differs or not all(kinds.values())


def _cancel(rank: Any, request: GenerationRequest, step: float) -> tuple[tuple[object, ...], bool]:
    """Cancel half a step after the second, from another thread, as the gang does."""
    asked: list[float] = []

    def cancel() -> None:
        asked.append(time.perf_counter())
        rank.cancel(request.request_id)

    reported = 0
    try:
        for event in rank.generate(request):
            reported += isinstance(event, StepEvent)
            if reported == 2 and not asked:
                threading.Timer(step / 2, cancel).start()
    except Exception as error:
        took = time.perf_counter() - asked[0] if asked else float("nan")
        return (took * 1e3, step * 1e3, took / step, type(error).__name__), type(error).__name__ != "RequestCancelled"
    return ("-", step * 1e3, "-", "it was not canceled"), True


def _run_out(
    rank: Any, request: GenerationRequest, device: str, reference: GenerationResult
) -> Iterator[tuple[tuple[object, ...], bool]]:
    """A request without memory, then the same with it."""
    with _little_memory(rank, device) as how:
        try:
            list(rank.generate(replace(request, request_id="too-much")))
            yield ("request without memory", how, "it was drawn: memory did not run out"), True
        except Exception as error:
            sound = isinstance(error, OutOfMemory) and error.agreed  # the gang goes on, and the caller learns why
            text = f"{type(error).__name__}: {str(error).partition(chr(10))[0][:160]}"
            yield ("request without memory", how, text), not sound
    for number in (1, 2):
        try:
            result = _drawn(rank, request)
        except Exception as error:
            yield (f"request {number} after it", "", f"{type(error).__name__}: {error}"), True
            return
        said, differs = _beside(result, reference)
        yield (f"request {number} after it", "", said), differs


def _beside(result: GenerationResult, reference: GenerationResult) -> tuple[str, bool]:
    """How a picture compares to an earlier one of the same request, and whether it is another."""
    if result.outputs == reference.outputs:
        return "the same, to the byte", False
    from PIL import Image, ImageChops  # here: only where it is needed

    pictures = (Image.open(io.BytesIO(each.outputs[0])).convert("RGB") for each in (result, reference))
    extremes: Any = ImageChops.difference(*pictures).getextrema()  # of each color: least, most
    most = max(high for _, high in extremes)
    return f"differs by {most} of 255", most > 1


@contextmanager
def _little_memory(rank: Any, device: str) -> Iterator[str]:
    """Inside the block there is hardly more memory than the model takes; on a CPU, a forward says so."""
    import torch  # here: the parent imports this file, and needs no torch

    if device == "cuda":
        torch.cuda.empty_cache()
        whole = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        allowed = torch.cuda.memory_reserved() + SPARE_BYTES
        torch.cuda.set_per_process_memory_fraction(allowed / whole)
        try:
            yield f"{allowed / 1e9:.1f} GB allowed of {whole / 1e9:.1f}"
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return

    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("on purpose")

    hook = rank._loaded.pipeline.transformer.register_forward_pre_hook(refuse)
    try:
        yield "raised by a hook, for want of a GPU"
    finally:
        hook.remove()
