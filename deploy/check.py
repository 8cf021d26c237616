"""Checks whether a deployment can work. `spray check` and `spray serve` call it before any process starts.

A `DeploymentSpec` and the machine's devices come in; a report comes out, or a `SpecError` with one line per problem.
"""

import importlib.util
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deploy.components import verify_components
from deploy.families.family import PipelineFamily
from deploy.families.lookup import CLASSIC, family_name, find_family
from deploy.memory import RankMemory, format_bytes, memory_by_degree, what_fits
from deploy.model_folder import model_folder, read_config
from deploy.model_spec import ModelSpec
from deploy.safetensors_headers import read_header
from deploy.spec import DeploymentSpec, SpecError
from sp_core.degrees import AXES, axis_groups, check_layout, layout_advice, num_heads, smaller_layouts


def check_deployment(
    spec: DeploymentSpec, devices: dict[str, float], memory_per_gpu: int | None = None, gpus_per_node: int | None = None
) -> list[str]:
    """A line for each model's layout, the devices of a replica, and what an uneven layout costs.

    The gangs that always run (`min_replicas` of each model) must fit together. A model that sleeps (`min_replicas` 0)
    needs room for one gang beside them, or it could never wake; two that sleep may take turns.

    The layout and memory of a hub model whose files are not on this machine stay unchecked.

    Args:
        spec: the deployment.
        devices: how many devices there are, by kind: `{"cpu": 2.0, "cuda": 0.0}`.
        memory_per_gpu: bytes of memory of each GPU; None leaves memory unchecked.
        gpus_per_node: GPUs of the largest node, for gangs that must not span nodes; None: one node has all GPUs.

    Raises:
        SpecError: a model folder is missing, a layout does not fit its model, all gangs together do not fit, or a
            rank needs more memory than a GPU has.
    """
    folders = {model.name: _whole_folder(spec, model) for model in spec.models}
    problems = [problem for model in spec.models for problem in _problems(model, folders[model.name])]
    problems += _missing_devices(spec, devices) + _gangs_wider_than_a_node(spec, gpus_per_node)
    memory = []
    if memory_per_gpu is not None and not problems:
        found = [_memory(model, folders[model.name], memory_per_gpu) for model in spec.models]
        problems = [line for fits, line in found if not fits and line]
        memory = [line for _, line in found]
    if problems:
        raise SpecError("\n".join(problems))
    reports = [_report(model, folders[model.name]) for model in spec.models]
    for report, line in zip(reports, memory, strict=False):
        report += [line] if line else []
    return [line for report in reports for line in report]


def _whole_folder(spec: DeploymentSpec, model: ModelSpec) -> Path | None:
    """The model's folder; None for a hub model that is not here, or whose download is unfinished."""
    folder = model_folder(spec, model)
    if folder is None or not model.from_hub:
        return folder
    try:
        find_family(folder)
    except ValueError:
        return folder  # whatever else is fetched, it stays one that cannot be served
    try:
        verify_components(folder)
    except ValueError:
        return None
    return folder


def _report(model: ModelSpec, folder: Path | None) -> list[str]:
    devices = _amount(_per_replica(model, model.device), model.device)
    lines = [
        f"{model.name}: {model.parallel}, each replica takes {devices} "
        f"({model.parallel.world_size} ranks, {model.torch_dtype})",
        *_groups(model),
    ]
    if folder is None:
        revision = f" at {model.revision}" if model.revision else ""
        lines.append(
            f"{model.name}: the config of {model.source}{revision} is not on this machine, so layout and memory are "
            "unchecked until it is deployed"
        )
        return lines
    own = (model.parallel, *(smaller_layouts(model.parallel, model.elastic.min_degree) if model.elastic else ()))
    heads = num_heads(_transformer_config(folder))
    advice = list(dict.fromkeys(layout_advice(each, heads) for each in own))
    if model.elastic:
        advice.append(f"elastic: a request has {', or '.join(str(each) for each in reversed(own))}")
    groups, branches = model.parallel.cfg_parallel_size, find_family(folder).branches(math.inf, "")
    if groups > branches:
        advice.append(
            f"cfg_parallel_size={groups}, but guidance has {branches} branches: {groups - branches} of {groups} groups "
            f"idle in guided requests; cfg_parallel_size={branches} leaves them to other replicas"
        )
    return [*lines, *(f"{model.name}: {line}" for line in advice if line)]


def _memory(model: ModelSpec, folder: Path | None, memory: int) -> tuple[bool, str]:
    """Whether the largest rank fits, and a line that says so; an empty line if its memory is not known."""
    if folder is None:
        return True, ""
    config = _transformer_config(folder)
    try:
        degrees = memory_by_degree(model, folder)
        needed = max(reversed(degrees.values()), key=lambda each: each.total)  # of equals the smallest degree
        line = f"{model.name}: largest rank{_of_degree(degrees, needed)}: {needed}"
        if model.device == "cpu":
            return True, line
        line += f" of {format_bytes(memory)}"
        if needed.total <= memory:
            return True, line + _per_degree(degrees, memory)
        changes = what_fits(model, folder, memory, num_heads(config), find_family(folder).ffn_dim(config))
    except (ValueError, TypeError) as error:
        return False, f"{model.name}: {error}"
    line += _per_degree(degrees, memory)
    return False, f"{line}; " + (f"what fits: {'; or '.join(changes)}" if changes else "take GPUs with more memory")


def _of_degree(degrees: Mapping[int, RankMemory], needed: RankMemory) -> str:
    """Which degree of an elastic gang needs most; empty for a gang of one degree."""
    return "" if len(degrees) < 2 else f", at degree {next(d for d, each in degrees.items() if each is needed)}"


def _per_degree(degrees: Mapping[int, RankMemory], memory: int) -> str:
    """Which degrees of an elastic gang fit, and what each needs; empty for a gang of one degree."""
    if len(degrees) < 2:
        return ""
    said = (
        f"{degree} {'fits' if needed.total <= memory else 'does not fit'} ({format_bytes(needed.total)})"
        for degree, needed in sorted(degrees.items())
    )
    return f"; degree {', '.join(said)}"


def _groups(model: ModelSpec) -> list[str]:
    """The ranks of each group, if the layout has more than one axis."""
    groups = {axis: of_axis for axis, of_axis in axis_groups(model.parallel).items() if axis in AXES}
    wide = {axis: of_axis for axis, of_axis in groups.items() if len(of_axis[0]) > 1}
    if len(wide) < 2:
        return []
    return [
        f"{model.name}: {axis:<8} {' | '.join(' '.join(map(str, group)) for group in of_axis)}"
        for axis, of_axis in wide.items()
    ]


def _check_packages(family: PipelineFamily) -> None:
    for package in family.packages:
        if importlib.util.find_spec(package) is None:
            raise ValueError(
                f"the license of {family.pipeline} asks for the package {package}, which checks prompts and pictures "
                f"and is not installed here; on each node: pip install {package}"
            )


def _problems(model: ModelSpec, folder: Path | None) -> list[str]:
    if model.revision and not model.from_hub:
        return [f"{model.name}: revision belongs to a hub id, but source is the folder {model.source}; remove one"]
    absent = [lora for lora in model.loras if not Path(lora.source).is_file()]
    adapters = [f"{model.name}: the adapter {lora.name!r} has no file at {lora.source}" for lora in absent]
    for lora in (lora for lora in model.loras if lora not in absent):
        try:
            read_header(Path(lora.source))
        except ValueError as error:
            adapters.append(f"{model.name}: the adapter {lora.name!r}: {error}")
    if folder is None:
        return adapters
    try:
        verify_components(folder)
        family = find_family(folder)
        config = _transformer_config(folder)
        _check_packages(family)
    except ValueError as error:
        return adapters + [f"{model.name}: {line}" for line in str(error).splitlines()]
    try:
        check_layout(model.parallel, num_heads(config), family.ffn_dim(config))
    except TypeError as error:  # such as a number that is a text
        return [*adapters, f"{model.name}: {folder / 'transformer' / 'config.json'} cannot be used: {error}"]
    except ValueError as error:
        return adapters + [f"{model.name}: {line}" for line in str(error).splitlines()]
    if family.guided_above is None and model.parallel.cfg_parallel_size > 1:
        return [
            f"{model.name}: cfg_parallel_size={model.parallel.cfg_parallel_size}, but the model evaluates only "
            "one branch; use Ulysses or ring ranks"
        ]
    if family_name(folder) == CLASSIC and model.parallel.cfg_parallel_size > 1:
        return [
            f"{model.name}: cfg_parallel_size={model.parallel.cfg_parallel_size}, but the call of {family.pipeline} "
            "evaluates both branches itself, so ranks cannot divide them; use Ulysses or ring ranks"
        ]
    if family_name(folder) == CLASSIC and model.elastic:
        return [
            f"{model.name}: elastic, but the state of a request is inside the call of {family.pipeline}, so its ranks "
            "cannot change; leave elastic out"
        ]
    if family.guided_above is None and model.batch_guidance is True:
        return [f"{model.name}: batch_guidance is true, but the model evaluates only one branch; leave it out"]
    return adapters


def _transformer_config(folder: Path) -> dict[str, Any]:
    return read_config(folder / "transformer" / "config.json")


def _missing_devices(spec: DeploymentSpec, devices: dict[str, float]) -> list[str]:
    """A line per kind of device that falls short: how many are needed, by which models, and what to change."""
    problems = []
    for kind, there in devices.items():
        takers = [(model, _per_replica(model, kind)) for model in spec.models if _per_replica(model, kind)]
        always = [(model, each) for model, each in takers if model.autoscaling.min_replicas]
        asleep = [(model, each) for model, each in takers if not model.autoscaling.min_replicas]
        largest = max(asleep, key=lambda taker: taker[1], default=None)
        wanted = sum(model.autoscaling.min_replicas * each for model, each in always) + (largest[1] if largest else 0)
        if round(wanted, 6) <= there:
            continue
        names = [
            f"{model.name} {each:g}" + (f" x {n}" if (n := model.autoscaling.min_replicas) > 1 else "")
            for model, each in always
        ] + ([f"{largest[0].name} {largest[1]:g} when it wakes"] if largest else [])
        several = any(model.autoscaling.min_replicas > 1 for model, _ in always)
        problems.append(
            f"{_amount(wanted, kind)} {_be(wanted)} needed ({', '.join(names)}), {there:g} {_be(there)} available; "
            "lower the degrees"
            + (", autoscaling.min_replicas" if several else "")
            + (" or placement.cpus_per_rank" if kind == "cpu" else " or add devices")
        )
    return problems


def _gangs_wider_than_a_node(spec: DeploymentSpec, gpus_per_node: int | None) -> list[str]:
    """A line per gang that must stay on one node but has more ranks than a node has GPUs."""
    return [
        f"{model.name}: its {model.parallel.world_size} ranks must be on one node (placement.strategy STRICT_PACK), "
        f"which has {gpus_per_node} GPUs; lower the degrees, or set placement.strategy to PACK"
        for model in spec.models
        if gpus_per_node is not None
        and model.placement.strategy == "STRICT_PACK"
        and _per_replica(model, "cuda") > gpus_per_node
    ]


def _per_replica(model: ModelSpec, kind: str) -> float:
    each = model.placement.cpus_per_rank if kind == "cpu" else float(model.device == "cuda")
    return model.parallel.world_size * each


def _amount(number: float, kind: str) -> str:
    unit = "CPU core" if kind == "cpu" else "GPU"
    return f"{number:g} {unit}" + ("" if number == 1 else "s")


def _be(number: float) -> str:
    return "is" if number == 1 else "are"
