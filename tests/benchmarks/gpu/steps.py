"""Part 4: what a denoising step of a full-size transformer costs, beside plain diffusers.

A step is the transformer's forwards: two where guidance has two branches. "diffusers" calls the model as its pipelines
do; "spray" is the same weights as a rank of one has them, through the guider of the loop. Eager, they take turns; where
they are compiled, one follows the other. "spray, one forward" has both branches in one, however many tokens they have.
"a rank of" a layout is one rank's share of the step with the exchange left out: the least that the layout can take.
"""

import contextlib
import copy
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import diffusers
import torch
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from torch import nn

from sp_core import cuda_kernels
from sp_core.batched_guidance import guidance_batch
from sp_core.compiled_blocks import compile_blocks
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import MeshAxis, ParallelMesh
from sp_core.parallelize import parallelize
from tests.benchmarks.gpu import machine, timing
from tests.benchmarks.gpu.one_rank import without_peers
from tests.benchmarks.gpu.part import Part, release
from tests.benchmarks.gpu.staged import name_what_torch_lacks
from tests.benchmarks.gpu.transformers import Case, Inputs, cases
from tests.support.guided import batched_step, guided_step
from workers.model.adapters.pipeline_adapter import keep_timestep_exact
from workers.model.loader import GRAPHS, RECOMPILE_LIMIT
from workers.model.torch_internals import recordings_refused

ALONE = MeshAxis("cfg", 0, 1, None, None)

COLUMNS = (
    "model", "step", "by", "mode", "ms", "least ms", "TFLOP", "floor ms", "share of the floor", "launches", "peak GB",
    "x diffusers", "first s",
)  # fmt: skip

KERNEL_COLUMNS = ("mode", "kernel", "ms", "calls", "share")

ENOUGH_S = 4.0
"""Of turns for each model and mode."""

SHARES = (*(ParallelDegrees(ulysses_degree=n) for n in (2, 4, 8)), ParallelDegrees(ring_degree=4))
FAKE_SHARES = (ParallelDegrees(ulysses_degree=2), ParallelDegrees(ring_degree=2))
"""Layouts of which one rank is measured alone."""

GUIDANCE = 4.0

LONGEST = 12
"""Kernels of which the time is told."""

HEAD_SIZE = 128
"""Of all full-size transformers."""


def run(part: Part) -> None:
    """Write the table."""
    diffusers.logging.set_verbosity_error()
    name_what_torch_lacks()
    torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
    card = "" if part.fake else torch.cuda.get_device_name(part.device)
    peak = machine.peak(card)
    best = timing.best_gemm(part.device, part.dtype, 256 if part.fake else 8192)
    floor = f"{(peak or best) / 1e12:.3g} TFLOP/s, " + (f"what {card} promises" if peak else "the best product here")
    said = (
        f"{part.dtype}, random weights. Floor: FLOP / {floor}; a product of {256 if part.fake else 8192} wide ran at "
        f"{best / 1e12:.3g}. ms: median of turns. x diffusers: the median of the ratios of one turn; "
        "compiled, the ratio of the medians. Launches: "
        f"{'operators, for want of a GPU' if part.fake else 'kernels and copies'}. first s: the first call, compiling "
        "included. FLOP of the packages flash-attn 2 and 3 are not counted."
    )
    for case in [case for case in cases(part.fake) if part.only.lower() in case.name.lower()]:
        part.table.begin(f"Steps of {case.name}", said, COLUMNS)
        said = "As above."
        head = (case.name, case.size)
        held: list[nn.Module] = []
        longest: list[Sequence[object]] = []
        if part.row((*head, "-", "load"), functools.partial(_load, part, case, held), needs_s=20):
            _measure_case(part, case, held[0], peak or best, longest)
        if longest:
            part.table.begin(f"Where a step of {case.name} goes", "spray's longest kernels.", KERNEL_COLUMNS)
        for row in longest:
            part.table.row(*row)
        for parameter in (p for model in held for p in model.parameters()):
            parameter.data = parameter.new_empty(0)  # diffusers keeps modules forever, in caches of methods
        torch._dynamo.reset()
        release(part.device)


def _load(part: Part, case: Case, held: list[nn.Module]) -> tuple[object, ...]:
    """A row of its own, for what does not fit fails here."""
    release(part.device)
    took = timing.once(lambda: held.append(case.model(part.device, part.dtype, part.fake)), part.device)
    size = sum(p.nbytes for p in held[0].parameters()) / 1e9
    return (*["-"] * 6, size, "-", took)


def _measure_case(part: Part, case: Case, model: nn.Module, rate: float, longest: list[Sequence[object]]) -> None:
    """Eager, then a rank's shares, then compiled: what is compiled stays so."""
    inputs = case.steps_inputs(part.device, part.dtype)
    counted: list[int] = []
    kernel = None
    if not part.fake:
        kernel = cuda_kernels.fastest(part.device, part.dtype, HEAD_SIZE, cuda_kernels.TORCHS_OWN)
    mesh = ParallelMesh.create(ParallelDegrees(), device_type=part.device.type, timeout_s=60)
    ours = _as_a_rank_has_it(_twin(model), case, part, mesh, kernel)
    calls = {"diffusers": _plain_step(model, inputs), "spray": _step(ours, inputs)}
    if len(inputs) == 2:
        calls["spray, one forward"] = _batched_step(ours, inputs)

    def count() -> tuple[object, ...]:
        counted.append(timing.flops(calls["diffusers"], part.device))
        return ("-", "-", counted[0] / 1e12, counted[0] / rate * 1e3)

    part.row((case.name, case.size, "diffusers", "counting"), count)
    total = counted[0] if counted else 0
    _measure_mode(part, case, "eager", calls, total, rate)
    for degrees in FAKE_SHARES if part.fake else SHARES:
        head = (case.name, case.size, f"a rank of {degrees}", "eager, nothing exchanged")
        part.row(head, functools.partial(_share, part, case, model, inputs, degrees, rate), needs_s=10)
        release(part.device)
    _note_longest(part, "eager", calls["spray"], longest)
    options = {"backend": "eager"} if part.fake else {}  # on the CPU, generating code would take longer than the rest

    def compiled() -> tuple[object, ...]:
        model.compile_repeated_blocks(fullgraph=True, **options)  # type: ignore[operator]
        compile_blocks(ours, **options)
        return ()

    if not part.row((case.name, case.size, f"kernel of spray: {kernel}", "compile"), compiled, needs_s=60):
        return
    against = None
    for by, call in calls.items():  # one by one, because a graph of one would serve the other, its kernel included
        torch._dynamo.reset()
        against = _measure_mode(part, case, "compiled", {by: call}, total, rate, against) or against
        if by == "spray":
            _note_longest(part, "compiled", call, longest)
    if part.fake:
        return

    def recorded() -> tuple[object, ...]:
        torch._dynamo.reset()
        compile_blocks(ours, options=GRAPHS)
        ours.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
        refused = recordings_refused()
        for _ in range(2):  # once to record, once to see it run
            calls["spray"]()
        if refused := recordings_refused() - refused:
            raise RuntimeError(f"{refused} graphs were not recorded; torch's log says why")
        return ()

    if part.row((case.name, case.size, "spray", "record CUDA graphs"), recorded, needs_s=30):
        _measure_mode(part, case, "recorded", {"spray": calls["spray"]}, total, rate, against)


def _note_longest(part: Part, mode: str, call: Callable[[], object], longest: list[Sequence[object]]) -> None:
    if part.fake or time.monotonic() > part.deadline:
        return
    with contextlib.suppress(Exception):  # its row has failed already
        longest += [(mode, *each) for each in timing.longest_kernels(call, part.device, LONGEST)]


def _measure_mode(
    part: Part,
    case: Case,
    mode: str,
    calls: Mapping[str, Callable[[], object]],
    total: int,
    rate: float,
    against: float | None = None,
) -> float | None:
    """A row for each, after they have taken turns. One that fails does not keep the other from its row.

    Returns:
        The seconds of plain diffusers, to which those of a later call can be compared.
    """
    first: dict[str, float] = {}
    usable = {}
    for by, call in calls.items():
        try:
            first[by] = timing.once(call, part.device)
            usable[by] = call
        except Exception as error:
            part.fail((case.name, case.size, by, mode), f"{type(error).__name__}: {str(error)[:200]}")
    turns: dict[str, list[float]] = {}

    def measured(by: str) -> tuple[object, ...]:
        if not turns:
            turns.update(timing.in_turn(usable, part.device, 0.2 if part.fake else ENOUGH_S, least=2))
        launched, peak = timing.launches_and_peak(usable[by], part.device)
        took = statistics.median(turns[by])
        plain = turns.get("diffusers")
        if plain:
            ratio: object = statistics.median(a / b for a, b in zip(turns[by], plain, strict=True))
        else:
            ratio = took / against if against else "-"
        return (
            took * 1e3, min(turns[by]) * 1e3, total / 1e12, total / rate * 1e3, f"{total / rate / took:.0%}",
            launched, "-" if peak is None else peak / 1e9, ratio, first[by],
        )  # fmt: skip

    for by in usable:
        part.row((case.name, case.size, by, mode), functools.partial(measured, by))
    return statistics.median(turns["diffusers"]) if turns.get("diffusers") else None


def _share(
    part: Part, case: Case, model: nn.Module, inputs: list[Inputs], degrees: ParallelDegrees, rate: float
) -> tuple[object, ...]:
    with diffusers_as_it_was(), without_peers(degrees, part.device.type) as mesh:
        call = _step(_as_a_rank_has_it(_twin(model), case, part, mesh, None), inputs)
        total = timing.flops(call, part.device)
        turns = timing.in_turn({"": call}, part.device, 0.1 if part.fake else 1.0, least=2)[""]
        launched, peak = timing.launches_and_peak(call, part.device)
        took = statistics.median(turns)
        return (
            took * 1e3, min(turns) * 1e3, total / 1e12, total / rate * 1e3, f"{total / rate / took:.0%}",
            launched, "-" if peak is None else peak / 1e9,
        )  # fmt: skip


@contextlib.contextmanager
def diffusers_as_it_was() -> Iterator[None]:
    """Take our entry out of diffusers' table of attentions after the block: plain diffusers is measured again."""
    before, _ = _AttentionBackendRegistry.get_active_backend()
    try:
        yield
    finally:
        _AttentionBackendRegistry.set_active_backend(before)


def _twin(model: nn.Module) -> Any:
    """The same weights in modules of its own."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters()})


def _as_a_rank_has_it(model: Any, case: Case, part: Part, mesh: ParallelMesh, kernel: str | None) -> Any:
    parallelize(model, mesh, dtype=part.dtype, kernel=kernel)
    if case.timestep_is_kept and part.dtype != torch.float32:
        keep_timestep_exact(model, part.dtype)
    return model


def _plain_step(model: Any, inputs: list[Inputs]) -> Callable[[], object]:
    """As diffusers' classic pipelines."""

    @torch.no_grad()
    def step() -> object:
        found = [model(**given, return_dict=False)[0] for given in inputs]
        return found[0] if len(found) == 1 else found[1] + GUIDANCE * (found[0] - found[1])

    return step


def _step(model: Any, inputs: list[Inputs]) -> Callable[[], object]:
    """As the loop of a rank."""
    if len(inputs) == 1:
        return _plain_step(model, inputs)
    return lambda: guided_step(model, (inputs[0], inputs[1]), ALONE)


def _batched_step(model: Any, inputs: list[Inputs]) -> Callable[[], object]:
    """The same in one forward."""
    batch = guidance_batch(model)
    assert batch is not None
    other = inputs[0] | {batch.prompt: inputs[1][batch.prompt]}
    return lambda: batched_step(model, (inputs[0], other))
