"""What a library reports of a component's files is read: no tensor is made up, and none is left out."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, ModularPipeline
from safetensors.torch import load_file, save_file

from deploy.components import verify_components
from deploy.families.lookup import families, find_family
from deploy.model_folder import read_index
from deploy.model_spec import ModelSpec
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from tests.support.deployments import model
from tests.support.families import IN_THE_SHORT_RUN, tried
from tests.support.model_folders import edit
from workers.demo_models import vocabulary
from workers.demo_models.vision_language import PIXTRAL_TOKENS
from workers.demo_models.writer import FAMILIES, write_demo_model
from workers.model.components import verify_loadable
from workers.model.loader import load_model

Tensors = dict[str, torch.Tensor]


def spec(folder: Path) -> ModelSpec:
    return model(folder)


def refused(folder: Path) -> str:
    """Why a model is refused: on a node before a deployment, and by a rank in the same words."""
    with pytest.raises(ValueError) as before:
        verify_loadable(spec(folder), folder)
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    with pytest.raises(ValueError) as loading:
        load_model(spec(folder), mesh)
    assert str(loading.value) in str(before.value)
    return str(before.value)


MODULAR = [family for family in FAMILIES if family.replace("-", "_") in families()]


@pytest.mark.parametrize("family", MODULAR)
def test_a_family_needs_what_its_pipeline_loads(demo_models: dict[str, Path], family: str) -> None:
    folder = demo_models[family]
    blocks = ModularPipeline.from_pretrained(str(folder), local_files_only=True).blocks
    drawn = blocks.get_execution_blocks(prompt="a").expected_components
    loaded = {component.name for component in drawn if component.default_creation_method == "from_pretrained"}
    assert loaded == set(find_family(folder).needed_components(read_index(folder)))
    verify_components(folder)
    verify_loadable(spec(folder), folder)


@pytest.mark.parametrize("family", [each for each in tried() if each.values[0] not in MODULAR])
def test_a_classic_pipeline_needs_what_it_is_built_of(demo_models: dict[str, Path], family: str) -> None:
    folder = demo_models[family]
    built_of = set(DiffusionPipeline.from_pretrained(folder, local_files_only=True).components)
    assert set(find_family(folder).needed_components(read_index(folder))) <= built_of
    verify_components(folder)
    verify_loadable(spec(folder), folder)


PARTS = [(family.replace("_", "-"), "text_encoder") for family in sorted(IN_THE_SHORT_RUN)] + [
    ("flux", "text_encoder_2"),
    ("flux", "vae"),
    ("wan", "vae"),
]


def without_one(tensors: Tensors) -> Tensors:
    return {name: tensor for name, tensor in tensors.items() if name != min(tensors)}


def renamed(tensors: Tensors) -> Tensors:
    return {f"wrong.{name}": tensor for name, tensor in tensors.items()}


def surplus(tensors: Tensors) -> Tensors:
    return tensors | {"more.weight": torch.zeros(2)}


def fp8(suffix: str) -> Callable[[Tensors], Tensors]:
    def scaled(tensors: Tensors) -> Tensors:
        wide = {name for name, tensor in tensors.items() if tensor.dim() >= 2 and name.endswith(".weight")}
        scales = {name.removesuffix(".weight") + suffix: torch.ones(()) for name in wide}
        return {n: t.to(torch.float8_e4m3fn) if n in wide else t for n, t in tensors.items()} | scales

    return scaled


def other_shape(tensors: Tensors) -> Tensors:
    name = max(tensors, key=lambda name: tensors[name].dim())
    return tensors | {name: torch.zeros(2, *tensors[name].shape[1:])}


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (without_one, "missing ["),
        (renamed, "missing ["),
        (surplus, "surplus ['more.weight']"),
        (fp8(".weight_scale"), ".weight_scale'"),
        (fp8(".scale_weight"), ".scale_weight'"),
        (other_shape, "shape"),
    ],
    ids=["one is deleted", "wrong prefix", "surplus", "fp8", "fp8 by another", "another shape"],
)
@pytest.mark.parametrize(("family", "part"), PARTS)
def test_tensors_are_those_of_the_class(
    demo_models: dict[str, Path],
    tmp_path: Path,
    family: str,
    part: str,
    change: Callable[[Tensors], Tensors],
    said: str,
) -> None:
    folder = shutil.copytree(demo_models[family], tmp_path / "model")
    (file,) = (folder / part).glob("*.safetensors")
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    reason = refused(folder)
    assert f"{folder}/{part} " in reason
    assert said in reason


def test_weights_beside_older_ones(demo_model: Path, tmp_path: Path) -> None:
    """transformers would take the single file, and checks the index."""
    folder = shutil.copytree(demo_model, tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    names = dict.fromkeys(load_file(file), "model-00001-of-00001.safetensors")
    shutil.copy(file, file.with_name("model-00001-of-00001.safetensors"))
    file.with_name("model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    assert "text_encoder has both model.safetensors.index.json and model.safetensors" in refused(folder)
    file.unlink()
    verify_loadable(spec(folder), folder)


def test_a_head_that_turns_embeddings_into_words_is_left_out(demo_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(demo_models["z-image"], tmp_path / "model")
    file = folder / "text_encoder" / "model.safetensors"
    save_file(load_file(file) | {"lm_head.weight": torch.zeros(2, 2)}, file, metadata={"format": "pt"})
    verify_loadable(spec(folder), folder)


@pytest.mark.parametrize(
    ("file", "changes", "said"),
    [
        ("scheduler/scheduler_config.json", {"use_karras_sigmas": True, "use_beta_sigmas": True}, "/scheduler cannot"),
        ("transformer/config.json", {"num_attention_heads": "x"}, "/transformer: QwenImageTransformer2DModel refuses"),
        ("vae/config.json", {"base_dim": "x"}, "/vae cannot be loaded: "),
        ("text_encoder/config.json", {"text_config": 3}, "/text_encoder cannot be loaded: "),
        ("tokenizer/tokenizer.json", {"version": "9"}, "/tokenizer cannot be loaded: "),
    ],
)
def test_settings_that_a_library_refuses(
    demo_model: Path, tmp_path: Path, file: str, changes: dict[str, Any], said: str
) -> None:
    folder = shutil.copytree(demo_model, tmp_path / "model")
    edit(folder / file, changes)
    assert f"{folder}{said}" in refused(folder)


def test_a_tokenizer_without_words(demo_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(demo_models["z-image"], tmp_path / "model")
    (folder / "tokenizer" / "tokenizer.json").unlink()
    assert "/tokenizer has an empty vocabulary" in refused(folder)


def test_a_tokenizer_of_another_model(demo_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(demo_models["flux"], tmp_path / "model")
    shutil.rmtree(folder / "tokenizer_2")
    shutil.copytree(demo_models["qwen-image"] / "tokenizer", folder / "tokenizer_2")
    edit(folder / "model_index.json", {"tokenizer_2": ["transformers", "Qwen2Tokenizer"]})
    assert "/tokenizer_2 has a token 364, but the text encoder has embeddings for 98 tokens" in refused(folder)


def test_a_tokenizer_of_two_files(demo_models: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(demo_models["z-image"], tmp_path / "model")
    file = folder / "tokenizer" / "tokenizer.json"
    whole = json.loads(file.read_text())["model"]
    file.unlink()
    (file.parent / "vocab.json").write_text(json.dumps(whole["vocab"]))
    (file.parent / "merges.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in whole["merges"]))
    verify_components(folder)
    verify_loadable(spec(folder), folder)


def test_a_processor_in_the_place_of_the_tokenizer(tmp_path: Path) -> None:
    write_demo_model(tmp_path, "flux-2", "Flux2Pipeline")
    verify_components(tmp_path)
    verify_loadable(spec(tmp_path), tmp_path)
    vocabulary.qwen2(vocabulary.EDIT_WORDS, PIXTRAL_TOKENS).save_pretrained(tmp_path / "tokenizer")
    said = r"/tokenizer.* has a token \d+, but the text encoder has embeddings for \d+ tokens"
    assert re.search(said, refused(tmp_path))
    with pytest.raises(ValueError, match=said):
        verify_components(tmp_path)


def test_a_processor_beside_the_tokenizer(tmp_path: Path) -> None:
    write_demo_model(tmp_path, "qwen-image", "QwenImageEditPipeline")
    verify_components(tmp_path)
    (tmp_path / "processor" / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"/processor has no vocabulary"):
        verify_components(tmp_path)
    edit(tmp_path / "model_index.json", {"processor": [None, None]})
    with pytest.raises(ValueError, match=r"has no processor, which the pipeline needs"):
        verify_components(tmp_path)
