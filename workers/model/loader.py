"""Loads a model folder as one of diffusers' pipelines, of which this rank holds what it needs.

A `ModelSpec` and the rank's mesh come in, a `LoadedModel` goes out. Transformers are parallelized and read by share;
text encoders are only on ranks that encode, the VAE only on ranks that decode. Called by `workers.gang.rank`; its
result is used by `workers.model.denoising`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from safetensors import safe_open

from deploy.families.lookup import component_dtype, find_family, parts_in_fp32
from deploy.model_folder import component_classes, is_transformer
from deploy.model_sections import LoRA
from deploy.model_spec import ModelSpec
from deploy.safetensors_headers import headers_by_file
from sp_core.compiled_blocks import compile_blocks
from sp_core.lora import Adapters, AdapterShare
from sp_core.mesh import ParallelMesh
from sp_core.stand_in import StandIn
from workers.model.adapters.lookup import find_adapter
from workers.model.adapters.pipeline_adapter import keep_timestep_exact
from workers.model.classic_parts import ClassicParts
from workers.model.components import check_vocabularies, load_component, read_pipeline
from workers.model.controlnets import run_whole
from workers.model.decoder_noise import fix_noise
from workers.model.digests import verify_lora
from workers.model.guardrail import CheckedElsewhere, make_guardrail
from workers.model.guidance import why_not_batched
from workers.model.latent_colors import LatentColors
from workers.model.lora import fit, read_lora
from workers.model.out_of_tree import sequence_plan, transformer_class
from workers.model.weights import build, load_transformer

RECOMPILE_LIMIT = 64
"""Graphs per block. torch's default of 8 is too low for several shapes, each with and without several adapters."""

GRAPHS: dict[str, bool] = {"triton.cudagraphs": True}
"""Options of torch.compile for CUDA graphs. Operators tagged `cudagraph_unsafe` split a recording and run between."""


@dataclass(frozen=True)
class LoadedModel:
    """A loaded model, which all requests of this rank share.

    Attributes:
        spec: the model in the deployment.
        mesh: the ranks.
        pipeline: the components of the model that this rank has; a classic pipeline if it has no modular form.
        adapters: the LoRA adapters of each transformer, by its name.
        shares: this rank's share of each adapter of the spec, by transformer.
        colors: the colors of its latents; on rank 0, for previews.
    """

    spec: ModelSpec
    mesh: ParallelMesh
    pipeline: ModularPipeline | DiffusionPipeline
    adapters: dict[str, Adapters]
    shares: dict[LoRA, dict[str, AdapterShare]] = field(default_factory=dict)
    colors: LatentColors = field(default_factory=LatentColors)

    def with_loras(self, loras: tuple[LoRA, ...]) -> "LoadedModel":
        """Return the same model with exactly these adapters. Nothing changes until `use_loras`.

        Adapters that it already has are not read again.

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
        """Make exactly the adapters of this spec available. It cannot fail, so that no rank is left behind."""
        for component, adapters in self.adapters.items():
            adapters.replace({lora.name: parts[component] for lora, parts in self.shares.items() if component in parts})

    def _read(self, lora: LoRA) -> dict[str, AdapterShare]:
        kind = getattr(diffusers, find_family(Path(self.spec.source)).pipeline)
        found = read_lora(Path(lora.source), kind, lora.component)
        verify_lora(lora)
        return fit(lora, found, self.adapters)


def load_model(
    model: ModelSpec, mesh: ParallelMesh, on_progress: Callable[[float], None] = lambda loaded: None
) -> LoadedModel:
    """Load a model folder and its adapters onto this rank's device. All ranks must call it.

    Args:
        model: what to load.
        mesh: the ranks.
        on_progress: called with the share of the files that is read, from 0 to 1.

    Raises:
        ValueError: the layout does not fit the model, the folder's pipeline cannot be run step by step, an adapter
            does not fit, what `plan` or `transformer_class` names cannot be used, or the branches of guidance cannot
            be one batch and must be.
        OSError: an adapter's file is missing.
    """
    pipeline = _load_pipeline(model, mesh, on_progress)
    parts = {name: part for name, part in pipeline.components.items() if part is not None}  # not all have a second
    adapters = {name: Adapters(part) for name, part in parts.items() if is_transformer(name)}
    loaded = LoadedModel(model, mesh, pipeline, adapters).with_loras(model.loras)
    reason = why_not_batched(part for name, part in pipeline.components.items() if name in adapters)
    if model.batch_guidance is True and reason:
        raise ValueError(f"batch_guidance is true, but {reason}; leave it out")
    loaded.use_loras()
    return loaded


def _load_pipeline(
    model: ModelSpec, mesh: ParallelMesh, on_progress: Callable[[float], None]
) -> ModularPipeline | DiffusionPipeline:
    folder = Path(model.source)
    adapter = find_adapter(folder)
    transformer_class(model)  # imports it: the pipeline's index may name it, and then diffusers looks it up
    pipeline = read_pipeline(folder)
    present = component_classes(folder)
    transformers = sorted(name for name in present if is_transformer(name))
    for name, progress in _shares_of_progress(folder, present, transformers, on_progress).items():
        transformer = _load_transformer(model, name, mesh, adapter.rounds_timestep, progress)
        pipeline.register_components(**{name: transformer})
    absent = _absent_here(model, mesh, present)
    others = set(present) & set(pipeline.pretrained_component_names) - absent - set(transformers)
    loaded = {
        name: load_component(pipeline, folder, name, dtype=_dtype(model, folder, name))
        for name in present
        if name in others
    }
    check_vocabularies(folder, loaded)
    for name, part in loaded.items():
        _widen(part, parts_in_fp32(folder, name))
    fix_noise(loaded.get("vae"))
    pipeline.register_components(**loaded)
    absent_vae = _AbsentVAE(folder / "vae", _dtype(model, folder, "vae"), mesh.device) if "vae" in absent else None
    guardrail = None
    if isinstance(pipeline, ClassicParts):
        guardrail = make_guardrail(pipeline.kind, checks_here=mesh.axis("gang").rank == 0)
        pipeline.register_components(**({"safety_checker": CheckedElsewhere()} if guardrail else {}))
        pipeline = pipeline.assembled(absent_vae)
    elif absent_vae:
        pipeline.vae = absent_vae
    pipeline.to(mesh.device)
    if guardrail:  # not earlier: calls move it to the device for as long as it checks
        pipeline.safety_checker = guardrail
    run_whole(pipeline)
    return pipeline


def _absent_here(model: ModelSpec, mesh: ParallelMesh, present: Iterable[str]) -> set[str]:
    """The components that this rank lacks, because other ranks encode or decode."""
    absent = set() if encodes_here(model, mesh) else {name for name in present if is_encoder(name)}
    decodes_elsewhere = model.vae == "rank0" and mesh.axis("gang").rank != 0
    return absent | ({"vae"}.intersection(present) if decodes_elsewhere else set())


def _shares_of_progress(
    folder: Path, present: Iterable[str], transformers: Iterable[str], on_progress: Callable[[float], None]
) -> dict[str, Callable[[float], None]]:
    """A callback for each transformer that takes the share of its files that is read, weighed by its bytes."""
    sizes = {name: sum(file.stat().st_size for file in (folder / name).glob("*.safetensors")) for name in present}
    total, read, found = sum(sizes.values()), 0, {}
    for name in transformers:
        found[name] = _rescaled(on_progress, read / total, sizes[name] / total)
        read += sizes[name]
    return found


def _rescaled(on_progress: Callable[[float], None], start: float, share: float) -> Callable[[float], None]:
    return lambda loaded: on_progress(start + share * loaded)


def _load_transformer(
    model: ModelSpec, name: str, mesh: ParallelMesh, rounds_timestep: bool, on_progress: Callable[[float], None]
) -> torch.nn.Module:
    """One transformer, parallelized; compiled, if the deployment says so, together with its pipeline's hook."""
    dtype = getattr(torch, model.torch_dtype)
    transformer: Any = load_transformer(
        Path(model.source) / name,
        mesh,
        dtype,
        transformer_class(model),
        sequence_plan(model),
        on_progress,
        model.attention_kernel,
    )
    if rounds_timestep and dtype != torch.float32:
        keep_timestep_exact(transformer, dtype)
    if model.compile:
        torch.compiler.config.recompile_limit = RECOMPILE_LIMIT
        compile_blocks(transformer, **({"options": GRAPHS} if model.cuda_graphs else {}))
    if model.cuda_graphs:  # tells where one forward ends and what it has returned may be overwritten
        transformer.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
    loaded: torch.nn.Module = transformer
    return loaded


def is_encoder(component: str) -> bool:
    """Whether a component only makes embeddings of the caller's inputs."""
    return component.startswith(("text_encoder", "image_encoder", "vision_language_encoder"))


def encodes_here(model: ModelSpec, mesh: ParallelMesh) -> bool:
    """Whether this rank has the text encoders."""
    return model.text_encoder == "replicate" or mesh.axis("gang").rank == 0


def _dtype(model: ModelSpec, folder: Path, component: str) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, component_dtype(model, folder, component))
    return dtype


def _widen(component: Any, parts: frozenset[str]) -> None:
    """Make these parts of a component compute in fp32, like the pipeline's authors. The weights stay rounded."""
    for name, module in component.named_modules() if parts else ():
        if name.rpartition(".")[2] in parts:
            module.to(torch.float32)


class _AbsentVAE(StandIn):
    """The geometry of a VAE without its weights, except means and deviations of latents, if these are among them.

    Pipelines ask for these, and guess a geometry if there is no VAE.
    """

    def __init__(self, folder: Path, dtype: torch.dtype, device: torch.device) -> None:
        self._vae: Any = build(folder)
        super().__init__(self._vae)
        self.device, self.dtype = device, dtype  # of which pipelines make what they give to other parts
        place = {name: file for file, names in headers_by_file(folder).items() for name in names}
        for name, buffer in self._vae.named_buffers():
            if name in place:
                with safe_open(place[name], "pt") as tensors:
                    told = tensors.get_tensor(name)
                buffer.data = told.to(dtype) if told.is_floating_point() else told

    def to(self, *_: Any, **__: Any) -> "_AbsentVAE":
        """Nothing of it can move."""
        return self
