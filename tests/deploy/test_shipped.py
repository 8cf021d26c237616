"""The deployments that ship with spray: each loads, and each layout that it uses or recommends fits its model."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

from deploy.load import load_spec
from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees, check_layout, layout_advice

SHIPPED = Path(__file__).resolve().parents[2] / "deploy"
FILES = sorted(SHIPPED.glob("*.yaml"))


class Facts(NamedTuple):
    """What the configs on the hub say of a model."""

    heads: int
    ffn_dim: int | None
    guided: bool
    frames_multiple: int | None = None  # of a video, less one


MODELS = {
    "Qwen/Qwen-Image": Facts(heads=24, ffn_dim=None, guided=True),
    "Wan-AI/Wan2.2-T2V-A14B-Diffusers": Facts(heads=40, ffn_dim=13824, guided=True, frames_multiple=4),
    "Tongyi-MAI/Z-Image-Turbo": Facts(heads=30, ffn_dim=10240, guided=False),
    "black-forest-labs/FLUX.1-dev": Facts(heads=24, ffn_dim=None, guided=False),
}
"""By source; the demo's folder is checked where it is served."""

ON_THE_HUB = [(file.name, model) for file in FILES for model in load_spec(file).models if model.from_hub]


def test_all_are_here() -> None:
    assert {file.stem for file in FILES} == {
        "local", "qwen-image", "wan2.2-t2v-a14b", "z-image-turbo", "flux", "multi-model",
    }  # fmt: skip
    assert {model.source for _, model in ON_THE_HUB} == set(MODELS)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_each_loads_with_what_stands_in_it(file: Path) -> None:
    spec = load_spec(file)
    assert [model.name for model in spec.models] == [
        model["name"] for model in yaml.safe_load(file.read_text())["models"]
    ]
    assert spec.gateway.host == "127.0.0.1"  # nobody is exposed by copying a file


def fits(degrees: ParallelDegrees, facts: Facts) -> bool:
    check_layout(degrees, facts.heads, facts.ffn_dim)
    return layout_advice(degrees, facts.heads) is None and (facts.guided or degrees.cfg_parallel_size == 1)


@pytest.mark.parametrize(("file", "model"), ON_THE_HUB, ids=lambda value: getattr(value, "name", value))
def test_layouts_defaults_and_limits_suit_the_model(file: str, model: ModelSpec) -> None:
    facts = MODELS[model.source]
    assert fits(model.parallel, facts)
    for shape in (model.defaults, *model.warmup_shapes):
        assert shape.width % 16 == shape.height % 16 == 0
        assert shape.num_frames == 1 if facts.frames_multiple is None else (shape.num_frames - 1) % 4 == 0
    asked = model.defaults
    one = asked.width * asked.height * asked.num_frames * asked.num_inference_steps
    assert model.limits.max_work is None or one * model.limits.max_n <= model.limits.max_work


@pytest.mark.parametrize(
    "file", [file for file in FILES if file.stem not in ("local", "multi-model")], ids=lambda f: f.name
)
def test_recommended_layouts_take_the_gpus_that_the_comment_says(file: Path) -> None:
    (model,) = load_spec(file).models
    told: dict[int, list[ParallelDegrees]] = {}
    for gpus, rest in re.findall(r"^# +(\d+) GPUs? +(\{.*)$", file.read_text(), re.MULTILINE):
        layouts = [ParallelDegrees(**yaml.safe_load(flow)) for flow in re.findall(r"\{.*?\}", rest)]
        assert all(degrees.world_size == int(gpus) and fits(degrees, MODELS[model.source]) for degrees in layouts), rest
        told.setdefault(int(gpus), []).extend(layouts)
    assert set(told) >= {1, 2, 4, 8}
    assert model.parallel in told[model.parallel.world_size]


def test_the_cluster_of_four_models_has_the_gpus_that_its_table_says() -> None:
    models = load_spec(SHIPPED / "multi-model.yaml").models
    assert len(models) == 4 == len({model.source for model in models})
    least = sum(model.autoscaling.min_replicas * model.parallel.world_size for model in models)
    most = {model.name: model.autoscaling.max_replicas * model.parallel.world_size for model in models}
    assert least == 7
    assert most == {"wan2.2-t2v-a14b": 4, "qwen-image": 2, "z-image-turbo": 2, "flux.1-dev": 1}
