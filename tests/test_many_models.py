"""Three models of different families and degrees on one cluster; each is changed, upgraded and removed alone."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.spec import Autoscaling, DeploymentSpec
from tests.deployments import deployment, model

CUP = {"prompt": "a cup of coffee", "seed": 7}


def as_file(spec: DeploymentSpec, folder: Path, **changes: dict[str, Any]) -> Path:
    """The deployment as a file, with changes by model name."""
    models = [each.model_dump(mode="json", exclude_unset=True) for each in spec.models]
    for each in models:
        each.update(changes.get(each["name"], {}))
    file = folder / "deployment.yaml"
    file.write_text(yaml.safe_dump({"models": [each for each in models if each.get("source")]}))
    return file


@pytest.fixture(scope="module")
def spec(demo_models: dict[str, Path]) -> DeploymentSpec:
    scaling = Autoscaling(
        min_replicas=0,
        max_replicas=1,
        upscale_delay_s=0,
        downscale_delay_s=4,
        downscale_to_zero_delay_s=4,
        target_backlog_seconds=2,
    )
    wan = model(demo_models["wan"], "wan", tensor_parallel_size=2)
    return deployment(
        model(demo_models["qwen-image"], "qwen", ulysses_degree=2).model_copy(update={"aliases": ("cup-maker",)}),
        wan.model_copy(update={"defaults": wan.defaults.model_copy(update={"num_frames": 9})}),
        model(demo_models["z-image"], "z").model_copy(update={"autoscaling": scaling}),
    )
