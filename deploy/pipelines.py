"""Which of diffusers' pipelines spray runs, and what can be said of each without loading it.

A model folder comes in; `deploy.check` and `workers.model.loader` ask. How each runs is in
`workers.model.adapters.pipeline_adapter`.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from deploy.spec import Task


@dataclass(frozen=True)
class PipelineFamily:
    """One of diffusers' pipeline classes.

    Attributes:
        makes: what comes out.
        guided_above: the guidance scale above which a second branch is evaluated (classifier-free guidance); None: it
            never is, so that there is nothing that cfg_parallel_size could share out, and no negative prompt.
        guided_by_negative_prompt: whether a negative prompt is needed as well.
    """

    makes: Literal["image", "video"]
    guided_above: float | None = 1.0
    guided_by_negative_prompt: bool = False

    def branches(self, guidance_scale: float, negative_prompt: str | None) -> int:
        """Forwards of the transformer in each step."""
        if self.guided_above is None or guidance_scale <= self.guided_above:
            return 1
        return 1 if self.guided_by_negative_prompt and negative_prompt is None else 2

    @property
    def task(self) -> Task:
        """What it can be asked for."""
        return "text-to-image" if self.makes == "image" else "text-to-video"


PIPELINES = {
    "FluxPipeline": PipelineFamily("image", guided_above=None),
    "QwenImagePipeline": PipelineFamily("image", guided_by_negative_prompt=True),
    "WanPipeline": PipelineFamily("video"),
    "ZImagePipeline": PipelineFamily("image", guided_above=0.0),
}
"""By the class name in a model folder's `model_index.json`."""


def pipeline_name(source: Path) -> str:
    """The name in `PIPELINES` of the pipeline that a model folder is for.

    Raises:
        ValueError: it is no model folder, or one that spray cannot run.
    """
    index = read_config(source / "model_index.json")
    if not index:
        raise ValueError(f"no model at {source}: model_index.json is missing; set source to a diffusers folder")
    name = str(index.get("_class_name"))
    if name not in PIPELINES:
        raise ValueError(f"{source} is for {name}, which spray cannot run step by step; it can: {', '.join(PIPELINES)}")
    if index.get("expand_timesteps"):  # diffusers' modular Wan has no such blocks, and would make another size
        raise ValueError(f"{source} is a Wan TI2V model (expand_timesteps), which spray cannot run step by step yet")
    return name


def read_config(file: Path) -> dict[str, Any]:
    """A JSON object; empty where there is none."""
    try:
        content = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def verify_configs(folder: Path) -> None:
    """Whether the configs of a model's components are JSON.

    Raises:
        ValueError: one is not.
    """
    for file in sorted(folder.glob("*/*config.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{file} is no JSON ({error}); fetch or copy it again") from None
