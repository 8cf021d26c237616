"""Can a deployment work? Asked before any process is started, by `spray check` and by `spray serve`.

A `DeploymentSpec` and the machine's devices come in; a report comes out, or a `SpecError` with one line per obstacle.
"""

from pathlib import Path
from typing import Any

from deploy.pipelines import PIPELINES, pipeline_name, read_config
from deploy.spec import DeploymentSpec, ModelSpec, SpecError
from sp_core.degrees import AXES, axis_groups, check_layout, layout_advice


def check_deployment(spec: DeploymentSpec, devices: dict[str, float]) -> list[str]:
    """For each model its layout and the devices that each of its replicas takes, and what the layout costs needlessly.

    Args:
        spec: the deployment.
        devices: how many devices there are, by kind: `{"cpu": 2.0, "cuda": 0.0}`.

    Raises:
        SpecError: a model folder is missing, a layout does not fit its model, or all gangs together do not fit.
    """
    obstacles = [obstacle for model in spec.models for obstacle in _obstacles(model)]
    for kind, wanted in _wanted(spec).items():
        if wanted > devices[kind]:
            takers = ", ".join(f"{m.name} {_per_replica(m, kind):g}" for m in spec.models if _per_replica(m, kind))
            obstacles.append(
                f"{wanted:g} {_unit(kind)} are needed ({takers}), {devices[kind]:g} are there; lower the degrees"
                + (" or placement.cpus_per_rank" if kind == "cpu" else " or add devices")
            )
    if obstacles:
        raise SpecError("\n".join(obstacles))
    return [line for model in spec.models for line in _report(model)]


def _report(model: ModelSpec) -> list[str]:
    advice = layout_advice(model.parallel, _num_heads(_transformer_config(model)))
    return [
        f"{model.name}: {model.parallel}, each replica takes {_per_replica(model, model.device):g} "
        f"{_unit(model.device)} ({model.parallel.world_size} ranks, {model.torch_dtype})",
        *_groups(model),
        *([f"{model.name}: {advice}"] if advice else []),
    ]


def _groups(model: ModelSpec) -> list[str]:
    """Which ranks work together on which axis, where there is more than one axis."""
    groups = {axis: of_axis for axis, of_axis in axis_groups(model.parallel).items() if axis in AXES}
    wide = {axis: of_axis for axis, of_axis in groups.items() if len(of_axis[0]) > 1}
    if len(wide) < 2:
        return []
    return [
        f"{model.name}: {axis:<8} {' | '.join(' '.join(map(str, group)) for group in of_axis)}"
        for axis, of_axis in wide.items()
    ]


def _obstacles(model: ModelSpec) -> list[str]:
    try:
        kind = PIPELINES[pipeline_name(Path(model.source))]
        config = _transformer_config(model)
        check_layout(model.parallel, _num_heads(config), _ffn_dim(config))
    except ValueError as error:
        return [f"{model.name}: {error}"]
    if kind.guided_above is None and model.parallel.cfg_parallel_size > 1:
        return [
            f"{model.name}: cfg_parallel_size={model.parallel.cfg_parallel_size}, but the model evaluates one branch "
            "only; use Ulysses or ring ranks"
        ]
    absent = [lora for lora in model.loras if not Path(lora.source).is_file()]
    return [f"{model.name}: the adapter {lora.name!r} has no file at {lora.source}" for lora in absent]


def _transformer_config(model: ModelSpec) -> dict[str, Any]:
    return read_config(Path(model.source) / "transformer" / "config.json")


def _num_heads(config: dict[str, Any]) -> int | None:
    heads = config.get("num_attention_heads", config.get("n_heads"))
    return heads if isinstance(heads, int) else None


def _ffn_dim(config: dict[str, Any]) -> int | None:
    """Hidden features of the feed-forward layers, where they do not follow from the heads."""
    if config.get("_class_name") == "ZImageTransformer2DModel":
        return int(config["dim"] / 3 * 8)
    width = config.get("ffn_dim")
    return width if isinstance(width, int) else None


def _wanted(spec: DeploymentSpec) -> dict[str, float]:
    kinds = ("cpu", "cuda")
    return {kind: round(sum(_per_replica(model, kind) for model in spec.models), 6) for kind in kinds}


def _per_replica(model: ModelSpec, kind: str) -> float:
    each = model.placement.cpus_per_rank if kind == "cpu" else float(model.device == "cuda")
    return model.parallel.world_size * each


def _unit(kind: str) -> str:
    return "CPU cores" if kind == "cpu" else "GPUs"
