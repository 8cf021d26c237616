"""Loads a model folder as one of diffusers' modular pipelines, of which this rank holds what it needs.

A `ModelSpec` and the rank's mesh come in. The transformers are parallelised and read by share; the text encoders are on
the ranks that encode, the VAE is on those that decode. Called by `workers.gang.rank`; what comes out goes to
`workers.model.denoising`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from diffusers import ModularPipeline

from deploy.pipelines import pipeline_name, read_config
from deploy.spec import LoRA, ModelSpec
from sp_core.lora import Adapters, AdapterShare
from sp_core.mesh import ParallelMesh
from workers.model.adapters.pipeline_adapter import RECIPES, keep_timestep_exact
from workers.model.lora import read_lora
from workers.model.out_of_tree import sequence_plan, transformer_class
from workers.model.weights import load_transformer

RECOMPILE_LIMIT = 64
"""Graphs of one block: torch's 8 are too few for several shapes, each with and without several adapters."""


@dataclass(frozen=True)
class LoadedModel:
    """What all requests of this rank share.

    Attributes:
        spec: how the deployment wants the model to run.
        mesh: the ranks.
        pipeline: the parts of the model that this rank has.
        adapters: the LoRA adapters of each transformer, by its name.
        shares: what this rank holds of each adapter of the spec, by transformer.
    """

    spec: ModelSpec
    mesh: ParallelMesh
    pipeline: ModularPipeline
    adapters: dict[str, Adapters]
    shares: dict[LoRA, dict[str, AdapterShare]] = field(default_factory=dict)

    def with_loras(self, loras: tuple[LoRA, ...]) -> "LoadedModel":
        """The same model with exactly these adapters, for `use_loras`. Until then nothing changes.

        Those that it has already are not read again.

        Raises:
            ValueError: an adapter does not fit.
            OSError: a file is missing.
        """
        shares = {lora: self.shares[lora] if lora in self.shares else self._read(lora) for lora in loras}
        places = [(lora.name, component) for lora, parts in shares.items() for component in parts]
        twice = next((place for place in places if places.count(place) > 1), None)
        if twice:
            raise ValueError(f"two files have weights for {twice[1]} under the name {twice[0]!r}; give each its own")
        return replace(self, spec=self.spec.model_copy(update={"loras": loras}), shares=shares)

    def use_loras(self) -> None:
        """Let requests have the adapters of this spec, and no others. Cannot fail."""
        for component, adapters in self.adapters.items():
            adapters.replace({lora.name: parts[component] for lora, parts in self.shares.items() if component in parts})

    def _read(self, lora: LoRA) -> dict[str, AdapterShare]:
        kind = getattr(diffusers, pipeline_name(Path(self.spec.source)))
        found = read_lora(Path(lora.source), kind, lora.component)
        absent = sorted(set(found) - set(self.adapters))
        if absent:
            raise ValueError(f"{lora.source} is for {absent[0]}, which the model has not; set component")
        return {component: self.adapters[component].share(lora.name, each) for component, each in found.items()}


def load_model(
    model: ModelSpec, mesh: ParallelMesh, on_progress: Callable[[float], None] = lambda loaded: None
) -> LoadedModel:
    """Load a model folder and its adapters onto this rank's device. All ranks must call it.

    Args:
        model: what to load.
        mesh: the ranks.
        on_progress: told how much of the files is behind, from 0 to 1.

    Raises:
        ValueError: the layout does not fit the model, the folder's pipeline cannot be run step by step, an adapter
            does not fit, or what `plan` or `transformer_class` names cannot be used.
        OSError: a file is missing.
    """
    pipeline = _load_pipeline(model, mesh, on_progress)
    adapters = {name: Adapters(part) for name, part in pipeline.components.items() if name.startswith("transformer")}
    loaded = LoadedModel(model, mesh, pipeline, adapters).with_loras(model.loras)
    loaded.use_loras()
    return loaded


def _load_pipeline(model: ModelSpec, mesh: ParallelMesh, on_progress: Callable[[float], None]) -> ModularPipeline:
    folder = Path(model.source)
    adapter = RECIPES[pipeline_name(folder)]
    kind, plan = transformer_class(model), sequence_plan(model)  # first: diffusers asks for a class that was imported
    pipeline: ModularPipeline = ModularPipeline.from_pretrained(model.source, local_files_only=True)
    dtype = getattr(torch, model.torch_dtype)
    index = read_config(folder / "model_index.json")
    there = {name for name, entry in index.items() if isinstance(entry, list) and entry[0]}
    transformers = sorted(name for name in there if name.startswith("transformer"))
    sizes = {name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in there}
    for at, name in enumerate(transformers):
        behind = sum(sizes[earlier] for earlier in transformers[:at])
        tell = _part(on_progress, behind / sum(sizes.values()), sizes[name] / sum(sizes.values()))
        transformer: Any = load_transformer(folder / name, mesh, dtype, kind, plan, tell)
        if adapter.rounds_timestep and dtype != torch.float32:
            keep_timestep_exact(transformer, dtype)
        if model.compile:
            torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
            transformer.compile_repeated_blocks(fullgraph=True)
        pipeline.register_components(**{name: transformer})
    absent = set() if encodes_here(model, mesh) else {name for name in there if is_encoder(name)}
    if model.vae == "rank0" and mesh.axis("gang").rank != 0:
        absent.add("vae")
    names = [name for name in pipeline.pretrained_component_names if name in there - absent - set(transformers)]
    pipeline.load_components(names=names, dtype=dtype, use_safetensors=True, local_files_only=True)
    missing = [name for name in names if getattr(pipeline, name, None) is None]
    if missing:  # diffusers only logs it
        raise ValueError(f"{folder} has no usable {', '.join(missing)}; is the folder complete?")
    pipeline.to(mesh.device)
    if "vae" in absent:
        pipeline.vae = _AbsentVAE(index["vae"][1], folder / "vae")
    return pipeline


def _part(on_progress: Callable[[float], None], behind: float, share: float) -> Callable[[float], None]:
    return lambda loaded: on_progress(behind + share * loaded)


def is_encoder(component: str) -> bool:
    """Whether a component only makes embeddings of what the caller gives."""
    return component.startswith(("text_encoder", "image_encoder"))


def encodes_here(model: ModelSpec, mesh: ParallelMesh) -> bool:
    """Whether this rank has the text encoders."""
    return model.text_encoder == "replicate" or mesh.axis("gang").rank == 0


class _AbsentVAE:
    """The geometry of a VAE without its weights: pipelines ask for it, and assume another one where there is none.

    No `nn.Module`: pipelines take the device of any module they have for theirs.
    """

    def __init__(self, kind: str, folder: Path) -> None:
        with init_empty_weights():
            self._vae = getattr(diffusers, kind).from_config(read_config(folder / "config.json"))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._vae, name)
