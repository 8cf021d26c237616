"""Proves that a model gives the same answer on every layout, for authors of models.

    for is_good, line in verify("my_package.my_module:MyTransformer", worlds=(2, 3, 4)): print(line)

The class is built small, with random weights, and runs on one process and on gloo ranks of this machine, in every
layout of each world size. If the answers differ, the report names the first module whose output differs. Classes of
diffusers that `sp_core.verify.examples` knows need nothing more. Any other class describes the inputs of its forward,
in a class attribute or in a file:

    class MyTransformer(nn.Module):
        _sp_example = {"hidden_states": ["B", "S", 64], "text": ["B", "T", 64], "text_mask": ["B", "T"], "scale": 2.0}

`B` is the batch; any other capital letter is a number of tokens. A list is the shape of a random tensor, boolean if the
name ends in `mask`; anything else is passed unchanged. `init` in the file holds keyword arguments of the constructor.

Called by `spray verify`; needs neither Ray nor a deployment.
"""

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sp_core.attention.region_attention import attention_kept_local
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from sp_core.models.family import ModelFamily
from sp_core.parallelize import parallelize
from sp_core.verify.alone import in_fp32, rounds
from sp_core.verify.divergence import Recording, error, tensors_of
from sp_core.verify.rank_pool import RankFailed, RankPool

BAR = 1e-5
"""Largest difference allowed, times max(1, max|reference|)."""

BLIND = 100 * BAR
"""With attention kept local the answer must differ by more than this, or sameness proves nothing."""

LENGTHS: dict[str, dict[str, int]] = {
    "even": {"B": 1, "S": 24},
    "uneven, batch of 2": {"B": 2, "S": 17, "T": 7},
    "short": {"B": 1, "S": 3, "T": 1},
}
"""Values of the letters of an example. Other letters are as many tokens as `T`, 12 by default."""


@dataclass(frozen=True)
class Proof:
    """One model with several inputs.

    Attributes:
        build: makes the model, the same on every rank.
        inputs: keyword arguments of a forward, by the name of the case.
        without_control: cases that may be the same with attention kept local.
    """

    build: Callable[[], nn.Module]
    inputs: Mapping[str, Mapping[str, Any]]
    without_control: frozenset[str] = frozenset()


@dataclass
class Outcome:
    """The result of one layout.

    Attributes:
        differences: to one process, in units of the bar's scale, by case.
        controls: the same with attention kept local, for cases with a control.
        diverged: the first module whose output differs, for each case whose answer does.
    """

    differences: dict[str, float] = field(default_factory=dict)
    controls: dict[str, float] = field(default_factory=dict)
    diverged: dict[str, str] = field(default_factory=dict)


class Unverifiable(ValueError):
    """The class cannot be found, built or called as described."""


def verify(
    target: str, config: Path | None = None, worlds: Sequence[int] = (2, 3, 4), device_type: str = "cpu"
) -> Iterator[tuple[bool, str]]:
    """Prove a class on all layouts of some world sizes.

    Args:
        target: `package.module:Class`.
        config: a JSON file with `init` and `inputs`, or a diffusers config (which is `init`).
        worlds: numbers of ranks.
        device_type: `cpu`, or `cuda`, where each rank needs a GPU of its own.

    Yields:
        Lines of a report; True with those that are good news.

    Raises:
        Unverifiable: see there.
    """
    if device_type == "cuda" and torch.cuda.device_count() < max(worlds):
        raise Unverifiable(f"{max(worlds)} ranks need as many GPUs, this machine has {torch.cuda.device_count()}")
    arguments = (target, None if config is None else config.read_text())
    proofs = find_proofs(*arguments)
    with closing_pool(max(worlds), device_type) as pool:
        for name, proof in proofs.items():
            _run_alone(name, proof)
            yield True, f"{name}: {len(proof.inputs)} inputs"
            for degrees in (degrees for world in worlds for degrees in layouts(world)):
                yield _report(pool, degrees, (*arguments, name))


def layouts(world: int) -> list[ParallelDegrees]:
    """All layouts of `world` ranks, Ulysses first."""
    divisors = [d for d in range(world, 0, -1) if world % d == 0]
    return [ParallelDegrees(ulysses_degree=d, ring_degree=world // d) for d in divisors]


@contextmanager
def closing_pool(size: int, device_type: str = "cpu") -> Iterator[RankPool]:
    """A pool of ranks that stops at the end of the block."""
    pool = RankPool(size, device_type)
    try:
        yield pool
    finally:
        pool.stop()


def _run_alone(name: str, proof: Proof) -> None:
    """Raise if the model does not run on one process, so that layouts are not blamed for it."""
    model = proof.build()
    for case, inputs in proof.inputs.items():
        try:
            with torch.no_grad():
                outputs = tensors_of(model(**inputs))
        except Exception as error:
            raise Unverifiable(
                f"{name} does not run on one process ({case}): {type(error).__name__}: {error}"
            ) from error
        if not outputs:
            raise Unverifiable(f"{name} returns no tensor ({case})")


def _report(pool: RankPool, degrees: ParallelDegrees, arguments: tuple[Any, ...]) -> tuple[bool, str]:
    head = f"  {degrees!s:<32}"
    try:
        outcomes = pool.run(degrees, compare, *arguments)
    except RankFailed as failure:
        return False, f"{head} failed: {failure.said}"
    worst = {case: max(o.differences[case] for o in outcomes) for case in outcomes[0].differences}
    control = {case: max(o.controls[case] for o in outcomes) for case in outcomes[0].controls}
    wrong = {case: by for case, by in worst.items() if not by <= BAR}
    if wrong:
        case = next(iter(wrong))
        first = next(o.diverged[case] for o in outcomes if case in o.diverged)
        return False, f"{head} differs by {wrong[case]:.1e} ({case}); first at {first}"
    blind, seen = min(control.items(), key=lambda each: each[1])
    if not seen > BLIND:
        return False, (
            f"{head} proves nothing ({blind}): with attention kept local the answer differs by only {seen:.1e}; "
            "give the model weights with which attention matters"
        )
    return True, f"{head} same within {max(worst.values()):.1e} (with attention kept local: {seen:.1e})"


def compare(
    mesh: ParallelMesh, target: str, config: str | None, name: str, family: ModelFamily | None = None
) -> Outcome:
    """Run every case of a proof on this rank, parallel and plain. `family` replaces that of the class."""
    proof = find_proofs(target, config)[name]
    outcome = Outcome()
    model = proof.build().to(mesh.device)
    given = {case: _on(mesh.device, inputs) for case, inputs in proof.inputs.items()}
    with torch.no_grad(), in_fp32() if rounds(model) else nullcontext():
        plain = {case: tensors_of(model(**inputs)) for case, inputs in given.items()}
        handle = parallelize(model, mesh, family=family)
        try:
            for case, inputs in given.items():
                outcome.differences[case] = difference(tensors_of(model(**inputs)), plain[case])
            with attention_kept_local():
                for case, inputs in given.items():
                    if case in proof.without_control:
                        continue
                    outcome.controls[case] = difference(tensors_of(model(**inputs)), plain[case])
        finally:
            handle.remove()  # also of a plan that does not fit: examples share their models
        wrong = [case for case, by in outcome.differences.items() if not by <= BAR]
        for case in [case for case in given if mesh.agree(int(case in wrong))[0]]:
            outcome.diverged[case] = _first_divergence(model, mesh, given[case], family)
    return outcome


def _on(device: torch.device, value: Any) -> Any:
    """The same inputs with their tensors on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {name: _on(device, each) for name, each in value.items()}
    return type(value)(_on(device, each) for each in value) if isinstance(value, list | tuple) else value


def _first_divergence(
    model: nn.Module, mesh: ParallelMesh, inputs: Mapping[str, Any], family: ModelFamily | None
) -> str:
    with Recording(model) as plain:
        model(**inputs)
    handle = parallelize(model, mesh, family=family)
    with Recording(model) as across:
        model(**inputs)
    handle.remove()
    found = across.first_divergence(plain, BAR)
    return "the model's own output, after all of its modules" if found is None else str(found)


def difference(outputs: Sequence[torch.Tensor], references: Sequence[torch.Tensor]) -> float:
    """Largest difference, in units of max(1, max|reference|); infinite if shapes differ or a value is NaN."""
    if [output.shape for output in outputs] != [reference.shape for reference in references]:
        return math.inf
    return max((error(output, reference) for output, reference in zip(outputs, references, strict=True)), default=0.0)


def find_proofs(target: str, config: str | None) -> dict[str, Proof]:
    """The proofs of a class, by the name of the variant.

    Raises:
        Unverifiable: see there.
    """
    kind = _load(target)
    described = _described(config)
    shapes = described.get("inputs", getattr(kind, "_sp_example", None))
    if shapes is None:
        return _known(kind, target)
    init = described.get("init", {})

    def build() -> nn.Module:
        torch.manual_seed(0)
        try:
            model: nn.Module = kind(**init)
        except TypeError as error:
            raise Unverifiable(f"{target} cannot be built with {init}: {error}; give init in --config FILE") from error
        _randomize(model)
        return model.eval()

    inputs = {case: _make_inputs(shapes, lengths) for case, lengths in LENGTHS.items()}
    return {kind.__name__: Proof(build, inputs)}


def find_probes(target: str, config: str | None, name: str) -> tuple[nn.Module, dict[str, Mapping[str, Any]]]:
    """A variant of a class, and inputs that show which dimensions change with which length.

    Returns:
        The model, and keyword arguments by the letter of the length that is larger than usual; empty: none is.

    Raises:
        Unverifiable: see there.
    """
    model = find_proofs(target, config)[name].build()
    shapes = _described(config).get("inputs", getattr(_load(target), "_sp_example", None))
    if shapes is None:
        from sp_core.verify import examples  # here: only classes without a description need them

        return model, examples.TINY[name].probes()
    letters = {size for shape in shapes.values() if isinstance(shape, list | tuple) for size in shape}
    usual = {
        letter: 6 + 5 * at for at, letter in enumerate(sorted(letters - {"B"}, key=str)) if isinstance(letter, str)
    }
    usual["B"] = 1
    longer = {letter: usual | {letter: 2 if letter == "B" else usual[letter] + 31} for letter in usual}
    return model, {letter: _make_inputs(shapes, sizes) for letter, sizes in {"": usual, **longer}.items()}


def _load(target: str) -> type[nn.Module]:
    module, colon, name = target.partition(":")
    if not colon:
        raise Unverifiable(f"expected package.module:Class, got {target!r}")
    if "" not in sys.path:
        sys.path.insert(0, "")  # finds a module in the working directory, like python -m
    try:
        kind = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unverifiable(f"{target} cannot be imported: {error}") from error
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise Unverifiable(f"{target} is not a torch.nn.Module class")
    return kind


def _described(config: str | None) -> dict[str, Any]:
    if config is None:
        return {}
    try:
        described = json.loads(config)
    except ValueError as error:
        raise Unverifiable(f"the config is not JSON: {error}") from error
    if not isinstance(described, dict):
        raise Unverifiable("the config must be an object with init and inputs")
    if "_class_name" in described:
        return {"init": {key: value for key, value in described.items() if not key.startswith("_")}}
    unknown = set(described) - {"init", "inputs"}
    if unknown:
        raise Unverifiable(f"the config has {', '.join(sorted(unknown))}; allowed: init, inputs")
    return described


def _case(length: str, mask: str, batch: int) -> str:
    return f"{length} length, {mask} mask, batch {batch}"


def _known(kind: type[nn.Module], target: str) -> dict[str, Proof]:
    """The examples of a class of diffusers."""
    from sp_core.verify import examples  # only here: they load diffusers, which a class of one's own does not need

    examples.quiet_diffusers()
    known = {
        name: Proof(
            lambda tiny=tiny: tiny.model,  # type: ignore[misc]
            {_case(*cell): tiny.inputs(*cell) | {"return_dict": False} for cell in examples.cells(name)},
            # Where the whole text is hidden, one rank may hold all that is left.
            frozenset(_case(*cell) for cell in examples.cells(name) if cell[1] == examples.HIDES_ALL),
        )
        for name, tiny in examples.TINY.items()
        if tiny.example.transformer_class == kind.__name__
    }
    if not known:
        raise Unverifiable(
            f"{target} does not say what its forward takes: give it a class attribute _sp_example, or --config FILE "
            'with {"init": {...}, "inputs": {"hidden_states": ["B", "S", 64]}}'
        )
    return known


def _make_inputs(shapes: Mapping[str, Any], lengths: Mapping[str, int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    made: dict[str, Any] = {}
    for name, shape in shapes.items():
        if not isinstance(shape, list | tuple):
            made[name] = shape
            continue
        sizes = [size if isinstance(size, int) else lengths.get(size, lengths.get("T", 12)) for size in shape]
        random = torch.randn(sizes, generator=generator)
        if name.endswith("mask"):
            random = random > -0.5
            random[..., 0] = True
        made[name] = random
    return made


def _randomize(model: nn.Module) -> None:
    """Move norm weights away from one, and make matrices so large that attention is not a plain average."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.rand_like(parameter) * 0.5)
            else:
                parameter.mul_(2)
