"""Does this gang compute what one rank would? Asked once, before it serves: a small request on its layout and alone.

A `LoadedModel` comes in; nothing goes out, or `WrongAnswer` on all ranks, with the first module that differs. Called by
`workers.gang.rank` when it starts. The steps run eagerly and leave nothing behind: no graph, no metric.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from deploy.families.lookup import find_family
from sp_core.mesh import ParallelMesh
from sp_core.verify.alone import alone, in_fp32, rounds
from sp_core.verify.divergence import Divergence, Recording, error, spread
from workers.errors import InvalidParameter
from workers.gang.warm_up import STEPS
from workers.messages import GenerationRequest
from workers.model.adapters.lookup import find_adapter
from workers.model.denoising import Denoising
from workers.model.loader import LoadedModel
from workers.model.sample_inputs import with_needed_inputs

BAR = 1e-5
"""Largest difference allowed, times max(1, max|reference|). In half precision: besides twice the error of one rank."""

SIZE = (9, 7)
"""Of the picture, in tokens: a number of them that few numbers of ranks divide."""

BINNING = "use_resolution_binning"
"""What makes some pipelines draw in one of the sizes that they were trained with instead, all of them large."""

NOWHERE = -(2**62)
"""Said to other ranks where nothing differs."""

MESSAGE_BYTES = 400
"""Of what one rank tells the others."""


class WrongAnswer(RuntimeError):
    """The gang computes something else than one rank would; no request may run on it."""


class _Call(NamedTuple):
    """The first forward of a transformer, to be run again."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def self_test(loaded: LoadedModel, begin: Callable[[GenerationRequest], Denoising]) -> None:
    """Compare what the ranks predict together with what each predicts alone. A collective of all ranks.

    In fp32 they may differ by `BAR`. In half precision, or where a model itself rounds to it, the gang may be twice as
    far from fp32 as one rank is.

    Args:
        loaded: the model; no adapter is active.
        begin: encodes and prepares a request, on all ranks.

    Raises:
        WrongAnswer: on all ranks, if it differs on one.
    """
    mesh, request = loaded.mesh, small_request(loaded)
    transformers = {name: loaded.pipeline.components[name] for name in loaded.adapters}
    half = loaded.spec.torch_dtype != "float32" or any(rounds(model) for model in transformers.values())
    together = begin(request)
    with _first_calls(transformers) as calls, torch.compiler.set_stance("force_eager"):
        across = _predictions(together, len(transformers))
    plain = _alone(loaded, begin(request))
    exact = _alone(loaded, begin(request), widen=True) if half else plain
    if half:
        differs = [not spread(a, e) <= BAR + 2 * spread(p, e) for a, p, e in zip(across, plain, exact, strict=True)]
    else:
        differs = [not error(a, p) <= BAR for a, p in zip(across, plain, strict=True)]
    # What is not finite on one rank either is the model's own fault, and each request says so.
    differs = [found and bool(p.isfinite().all()) for found, p in zip(differs, plain, strict=True)]
    if mesh.agree(int(any(differs)))[0]:
        raise WrongAnswer(_where(mesh, transformers, calls, half))


def small_request(loaded: LoadedModel) -> GenerationRequest:
    """A small one. It has both branches of guidance where groups of ranks divide them."""
    kind = find_family(Path(loaded.spec.source))
    adapter = find_adapter(Path(loaded.spec.source))
    multiple = adapter.size_multiple(loaded.pipeline)
    frames = _few_frames(loaded) if kind.makes == "video" else 1
    frames, height, width = adapter.small_size(loaded.pipeline, (frames, SIZE[1] * multiple, SIZE[0] * multiple))
    guided = kind.guided_above is not None and loaded.mesh.axis("cfg").size > 1
    scale = loaded.spec.defaults.guidance_scale if kind.guided_above is None else kind.guided_above + 3.0 * guided
    request = GenerationRequest(
        request_id="self-test",
        model=loaded.spec.name,
        prompt=kind.prompt_form % "a cup of coffee on a table",
        negative_prompt="a fox" if guided else None,
        width=width,
        height=height,
        num_frames=frames,
        num_inference_steps=STEPS,
        guidance_scale=scale,
        seed=0,
        output_format="mp4" if kind.makes == "video" else "png",
        extra_params={BINNING: False} if BINNING in adapter.extra_kinds else {},
    )
    return with_needed_inputs(request, kind)


def _few_frames(loaded: LoadedModel) -> int:
    """The fewest frames that make more than one of the latents."""
    request = GenerationRequest("self-test", loaded.spec.name, "", 16, 16, 1, seed=0)
    for frames in (5, 7, 9, 17):
        with contextlib.suppress(InvalidParameter):
            find_adapter(Path(loaded.spec.source)).check_frames(loaded.pipeline, replace(request, num_frames=frames))
            return frames
    return 1


def _predictions(request: Denoising, transformers: int) -> list[torch.Tensor]:
    """Of the first step, or of all where the transformers take turns."""
    found = []
    for _ in range(request.total_steps if transformers > 1 else 1):
        request.step()
        found.append(request.prediction.clone())
    return found


def _alone(loaded: LoadedModel, request: Denoising, widen: bool = False) -> list[torch.Tensor]:
    transformers = [loaded.pipeline.components[name] for name in loaded.adapters]
    request.guide_here()
    with alone(transformers, loaded.mesh), in_fp32() if widen else nullcontext():
        return _predictions(request, len(transformers))


@contextmanager
def _first_calls(transformers: dict[str, nn.Module]) -> Iterator[dict[str, _Call]]:
    """What each transformer is given first, in the order in which they are called."""
    calls: dict[str, _Call] = {}

    def keep(name: str) -> Callable[[Any, Any, Any], None]:
        return lambda _model, args, kwargs: calls.setdefault(name, _Call(args, dict(kwargs))) and None

    hooks = [
        model.register_forward_pre_hook(keep(name), with_kwargs=True, prepend=True)
        for name, model in transformers.items()
    ]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _where(mesh: ParallelMesh, transformers: dict[str, nn.Module], calls: dict[str, _Call], half: bool) -> str:
    """What differs first on any rank, in the same words on all of them. A collective of all ranks."""
    rank, world = mesh.axis("gang").rank, mesh.degrees.world_size
    said = "no module of a transformer differs, but how the branches of guidance are exchanged or combined"
    for name in (name for name in transformers if name in calls):
        found = _divergence(transformers[name], mesh, calls[name], half)
        own = NOWHERE if found is None else -(found.place * world + rank)  # the greatest is of the earliest module
        (first,) = mesh.agree(own)
        if first > NOWHERE:
            told = f"rank {rank} first differs at {name}.{found.module}, {found.how}" if found and own == first else ""
            said = _told(mesh, told)
            break
    return (
        f"with {mesh.degrees} the answer is not that of one rank: {said}; mend the plan or the machine, take another "
        "layout, or set self_test: false"
    )


def _divergence(model: nn.Module, mesh: ParallelMesh, call: _Call, half: bool) -> Divergence | None:
    with torch.no_grad(), torch.compiler.set_stance("force_eager"), Recording(model) as across:
        model(*call.args, **call.kwargs)
    recordings = []
    for widen in (False, True)[: 1 + half]:
        with torch.no_grad(), alone([model], mesh), in_fp32() if widen else nullcontext(), Recording(model) as one:
            model(*call.args, **call.kwargs)
        recordings.append(one)
    tp = mesh.axis("tp")
    return across.first_divergence(recordings[0], BAR, recordings[1] if half else None, (tp.rank, tp.size))


def _told(mesh: ParallelMesh, text: str) -> str:
    """The text of the only rank that has one, on all ranks."""
    given = text.encode()[:MESSAGE_BYTES]
    return bytes(filter(None, mesh.agree(*given.ljust(MESSAGE_BYTES, b"\0")))).decode(errors="replace")
