"""Loads the components that ranks do not split, and checks the libraries' reports, since these fill gaps with noise.

A `ModelSpec` comes in, components with all of their weights go out; or a `ValueError` that names the folder and the
tensors. Called by `workers.model.loader`; `verify_loadable` by `service.rollout.preflight`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusers import ModelMixin, ModularPipeline
from transformers import PreTrainedModel

from deploy.families.lookup import CLASSIC, family_name
from deploy.model_folder import component_classes, is_transformer
from deploy.model_spec import ModelSpec
from deploy.safetensors_headers import headers_by_file, weights_file
from workers.model.classic_parts import ClassicParts
from workers.model.out_of_tree import transformer_class
from workers.model.weights import build, verified_files

UNUSED = ("lm_head.",)
"""The prefix of surplus tensors that a text encoder may have: they turn its embeddings into words."""

REPORTED = {
    "missing": "missing_keys",
    "surplus": "unexpected_keys",
    "of another shape": "mismatched_keys",
    "not readable": "error_msgs",
}
"""Mistakes of tensors, by keys of the libraries' reports."""


def read_pipeline(folder: Path) -> ModularPipeline | ClassicParts:
    """The pipeline of a model, without components that have weights. A classic one exists only with all of them.

    Raises:
        ValueError: diffusers cannot read the folder.
    """
    if family_name(folder) == CLASSIC:
        return ClassicParts(folder)
    try:
        pipeline: ModularPipeline = ModularPipeline.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # diffusers raises anything
        raise ValueError(f"{folder} cannot be loaded: {type(error).__name__}: {error}") from error
    return pipeline


def load_component(pipeline: ModularPipeline | ClassicParts, folder: Path, name: str, **options: Any) -> Any:
    """Load one component by its library.

    Args:
        pipeline: of `read_pipeline`; it knows the component's class.
        folder: of the model.
        name: of the component.
        options: of the `from_pretrained` of a component with weights: `dtype`, `device_map`.

    Raises:
        ValueError: the component cannot be loaded; its files lack a tensor, or have one of another name or shape; or a
            tokenizer knows no words.
    """
    kind: Any = pipeline.get_component_spec(name).type_hint
    has_weights = isinstance(kind, type) and issubclass(kind, ModelMixin | PreTrainedModel)
    if has_weights:
        weights_file(folder / name)  # rejects two sets of weights, of which the library would choose one
        # Shapes that differ are in the report, where they have names.
        options |= {"use_safetensors": True, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        found = kind.from_pretrained(folder / name, local_files_only=True, **(options if has_weights else {}))
    except Exception as error:  # the libraries raise anything, and some of it has no text
        raise ValueError(f"{folder / name} cannot be loaded: {type(error).__name__}: {error}") from error
    if not has_weights:
        return found
    component, report = found
    _check_report(folder / name, type(component).__name__, report, _borrowed(folder, name))
    return component


def _borrowed(folder: Path, name: str) -> frozenset[str]:
    """Surplus tensors that a ControlNet's files may have: some are saved with the transformer's parts they borrow."""
    if name != "controlnet":
        return frozenset()
    return frozenset(tensor for tensors in headers_by_file(folder / "transformer").values() for tensor in tensors)


def verify_loadable(model: ModelSpec, folder: Path) -> None:
    """Reject a model whose components would not load, by names and shapes: no weights are read.

    Args:
        model: what the deployment says of it.
        folder: its files.

    Raises:
        ValueError: see `load_component`; a line for each component.
    """
    kind = transformer_class(model)
    pipeline = read_pipeline(folder)
    parts, mistakes = {}, []
    for name in component_classes(folder):
        if name not in pipeline.pretrained_component_names:
            continue  # such as Flux's image encoder, for which the pipeline has no use
        try:
            if is_transformer(name):
                verified_files(build(folder / name, kind), folder / name)
            else:
                parts[name] = load_component(pipeline, folder, name, device_map="meta")
        except ValueError as error:
            mistakes.append(str(error))
    try:
        check_vocabularies(folder, parts)
    except ValueError as error:
        mistakes.append(str(error))
    if mistakes:
        raise ValueError("\n".join(mistakes))


def check_vocabularies(folder: Path, components: Mapping[str, Any]) -> None:
    """Reject tokenizers that do not fit their text encoders, as both were loaded.

    Raises:
        ValueError: one knows nothing but special tokens, or more than its text encoder.
    """
    for name, component in components.items():
        text_encoder = components.get(name.replace("tokenizer", "text_encoder"))
        if not name.startswith("tokenizer") or text_encoder is None:
            continue
        tokenizer = getattr(component, "tokenizer", component)  # that of a processor, which prepares pictures as well
        vocabulary, embedded = tokenizer.get_vocab(), len(text_encoder.get_input_embeddings().weight)
        if not set(vocabulary) - set(tokenizer.get_added_vocab()):
            raise ValueError(f"{folder / name} has an empty vocabulary; fetch or copy the tokenizer again")
        if (highest := max(vocabulary.values())) >= embedded:
            raise ValueError(
                f"{folder / name} has a token {highest}, but the text encoder has embeddings for {embedded} tokens: "
                "they belong to different models"
            )


def _check_report(folder: Path, kind: str, report: Mapping[str, Any], borrowed: frozenset[str]) -> None:
    said = {what: sorted(map(str, report.get(key) or ())) for what, key in REPORTED.items()}
    said["surplus"] = [name for name in said["surplus"] if not name.startswith(UNUSED) and name not in borrowed]
    wrong = [f"{what} {names[:5]}" for what, names in said.items() if names]
    if wrong:
        raise ValueError(f"{folder} does not hold the weights of {kind}: {', '.join(wrong)}")
