"""LoRA files: every key format means what it means to diffusers and PEFT; what cannot be applied is refused."""

import copy
import json
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from deploy.model_sections import LoRA
from sp_core.lora import Adapters
from sp_core.verify import examples
from sp_core.verify.verify import BAR
from tests.sp_core.test_families import worst
from tests.support.deployments import model
from tests.support.lora_files import by_peft, forward, kind_of, linears, pair, write
from workers.model.lora import check_lora, read_lora


def same_as_peft(name: str, path: Path) -> None:
    """One file, at scale 0.7, by us and by PEFT."""
    model = copy.deepcopy(examples.TINY[name].model)
    switch = Adapters(model)
    switch.load("a", read_lora(path, kind_of(name))["transformer"])
    switch.activate({"a": 0.7})
    references = by_peft(name, {"a": path}, {"a": {"a": 0.7}})
    assert worst(forward(model, name), references["a"]) <= BAR
    assert worst(references["a"], references["off"]) > 100 * BAR


@pytest.mark.parametrize("root", [False, True])
def test_alpha_by_rank_or_its_root(tmp_path: Path, root: bool) -> None:
    targets = list(linears("qwen-image"))
    config = {"r": 4, "lora_alpha": 6, "use_rslora": root, "target_modules": targets}
    same_as_peft("qwen-image", write(tmp_path / "a.safetensors", "qwen-image", config=config))


KOHYA = {
    "qwen-image": {
        "lora_unet_transformer_blocks_0_attn_to_q": "transformer_blocks.0.attn.to_q",
        "lora_unet_transformer_blocks_1_attn_to_out_0": "transformer_blocks.1.attn.to_out.0",
        "lora_unet_transformer_blocks_1_img_mlp_net_0_proj": "transformer_blocks.1.img_mlp.net.0.proj",
    },
    "flux": {
        "lora_unet_double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
        "lora_unet_double_blocks_1_img_mlp_2": "transformer_blocks.1.ff.net.2",
        "lora_unet_double_blocks_1_txt_mod_lin": "transformer_blocks.1.norm1_context.linear",
    },
    "flux-2": {
        "lora_unet_double_blocks_0_img_attn_proj": "transformer_blocks.0.attn.to_out.0",
        "lora_unet_single_blocks_1_linear2": "single_transformer_blocks.1.attn.to_out",
    },
    "z-image": {
        "lora_unet_layers_0_attention_to_q": "layers.0.attention.to_q",
        "lora_unet_layers_1_attention_to_out_0": "layers.1.attention.to_out.0",
        "lora_unet_layers_1_feed_forward_w2": "layers.1.feed_forward.w2",
    },
}


@pytest.mark.parametrize("name", KOHYA)
def test_trainers_own_formats(tmp_path: Path, name: str) -> None:
    """lora_down, lora_up and alpha, by names of the model's authors."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (theirs, module) in enumerate(KOHYA[name].items()):
        a, b = pair(linears(name)[module], 3 + i, seed=i)
        tensors |= {f"{theirs}.lora_down.weight": a, f"{theirs}.lora_up.weight": b}
        tensors[f"{theirs}.alpha"] = torch.tensor(2.0 + i)
    if name == "flux":  # query, key and value are one layer there
        shared, parts = zip(
            *(pair(linears(name)[f"transformer_blocks.1.attn.to_{x}"], 4, seed=5) for x in "qkv"), strict=True
        )
        fused = "lora_unet_double_blocks_1_img_attn_qkv"
        tensors |= {f"{fused}.lora_down.weight": shared[0], f"{fused}.lora_up.weight": torch.cat(parts)}
        tensors[f"{fused}.alpha"] = torch.tensor(8.0)
    save_file(tensors, tmp_path / "a.safetensors")
    same_as_peft(name, tmp_path / "a.safetensors")


def test_what_a_file_holds_twice(tmp_path: Path) -> None:
    """Some trainers' files for Z-Image have query, key and value fused too."""
    at = "layers_0_attention"
    tensors: dict[str, torch.Tensor] = {}
    for i, x in enumerate("qkv"):
        a, b = pair(linears("z-image")[f"layers.0.attention.to_{x}"], 4, seed=i)
        tensors |= {f"lora_unet_{at}_to_{x}.lora_down.weight": a, f"lora_unet_{at}_to_{x}.lora_up.weight": b}
    tensors |= {f"lora_unet_{at}_qkv.lora_{s}.weight": examples.randn(288, 288) for s in ("down", "up")}
    save_file(tensors, tmp_path / "a.safetensors")
    same_as_peft("z-image", tmp_path / "a.safetensors")


def test_alphas_beside_the_tensors(tmp_path: Path) -> None:
    """Not the last layer of all, whose alpha PEFT takes for that of others too: it goes by ends of names."""
    tensors: dict[str, torch.Tensor] = {}
    for i, (module, linear) in enumerate(list(linears("flux").items())[:-1]):
        a, b = pair(linear, 2 + i % 3, seed=i)
        tensors |= {f"transformer.{module}.lora_A.weight": a, f"transformer.{module}.lora_B.weight": b}
        tensors[f"transformer.{module}.alpha"] = torch.tensor(1.0 + i % 4)
    save_file(tensors, tmp_path / "a.safetensors")
    same_as_peft("flux", tmp_path / "a.safetensors")
    del tensors[next(name for name in tensors if name.endswith("alpha"))]
    save_file(tensors, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="an alpha for every layer or for none"):
        read_lora(tmp_path / "b.safetensors", diffusers.FluxPipeline)


def test_a_file_for_the_second_denoiser(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", "wan")
    assert list(read_lora(path, diffusers.WanPipeline, "transformer_2")) == ["transformer_2"]
    with pytest.raises(ValueError, match="has no component 'transformer_2'; it has: transformer"):
        read_lora(path, diffusers.QwenImagePipeline, "transformer_2")


PLACE = "transformer.transformer_blocks.0.attn.to_q"
A, B = torch.ones(2, 144), torch.ones(144, 2)
GOOD = {f"{PLACE}.lora_A.weight": A, f"{PLACE}.lora_B.weight": B}
TEXT = {"text_encoder.layers.0.q_proj.lora_A.weight": A, "text_encoder.layers.0.q_proj.lora_B.weight": B}

FILES: dict[str, tuple[dict[str, torch.Tensor], dict[str, Any]]] = {
    "holds DoRA weights": (GOOD | {f"{PLACE}.dora_scale": B}, {}),
    "holds weights that replace the model's, or biases": (GOOD | {f"{PLACE}.lora_B.bias": torch.ones(144)}, {}),
    "holds LyCORIS weights": ({f"{PLACE}.lokr_w1": A, f"{PLACE}.lokr_w2": B}, {}),
    "holds weights for text encoders": (GOOD | TEXT, {}),
    "holds something other than LoRA": (GOOD | {"transformer.norm_out.weight": torch.ones(144)}, {}),
    r"not hold A and B of every layer: missing \['transformer_blocks.0.attn.to_q.lora_B": (
        {f"{PLACE}.lora_A.weight": A},
        {},
    ),
    "has no key format that diffusers knows for QwenImagePipeline": (GOOD | {"diffusion_model.a.lora_A.weight": A}, {}),
    r"expected weights for transformer, got \['unet.a.lora_A": ({"unet.a.lora_A.weight": A}, {}),
    "has rank 2 for 'transformer_blocks.0.attn.to_q', but its config says 8": (GOOD, {"lora_alpha": 8}),
    "was trained with use_dora": (GOOD, {"r": 2, "use_dora": True}),
    "was trained with init_lora_weights=pissa": (GOOD, {"r": 2, "init_lora_weights": "pissa"}),
}


@pytest.mark.parametrize("said", FILES)
def test_files_that_cannot_be_applied(tmp_path: Path, said: str) -> None:
    tensors, config = FILES[said]
    header = {"lora_adapter_metadata": json.dumps({f"transformer.{k}": v for k, v in config.items()})}
    separate = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(separate, tmp_path / "a.safetensors", header if config else None)
    with pytest.raises(ValueError, match=said):
        read_lora(tmp_path / "a.safetensors", diffusers.QwenImagePipeline)


def strength(folder: Path, header: dict[str, str] | None = None, tensors: dict[str, torch.Tensor] = GOOD) -> float:
    """How much stronger than B A the adapter is; diffusers multiplies the alphas of some formats into A and B."""
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "a.safetensors", header)
    (layer,) = read_lora(folder / "a.safetensors", diffusers.QwenImagePipeline)["transformer"].values()
    return float(layer.scaling * (layer.b @ layer.a / (B @ A))[0, 0])


@pytest.mark.parametrize("key", ["lora_alpha", "network_alpha", "ss_network_alpha", "alpha", "transformer.lora_alpha"])
def test_a_strength_that_only_the_header_states(tmp_path: Path, key: str) -> None:
    assert strength(tmp_path, {key: "8", "format": "pt", "ss_network_dim": "2"}) == 8 / 2
    assert strength(tmp_path, {key: "8.0"}) == 8 / 2
    assert strength(tmp_path, {key: "None"}) == 1
    for wrong in ("0", "much", "NaN", "-1", "[8]"):
        with pytest.raises(
            ValueError, match=rf"a\.safetensors states {key} .* in its header; expected a number above 0"
        ):
            strength(tmp_path, {key: wrong})


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ({"lora_alpha": "8", "network_alpha": "4"}, "states several alphas in its header"),
        ({"my_alpha": "8"}, "states my_alpha '8' in its header, which is not understood"),
        ({"use_rslora": "true", "lora_alpha": "8"}, "states use_rslora 'true' in its header, which is not understood"),
        ({"peft": '{"lora_alpha": 8}'}, "states peft .* in its header, which is not understood"),
    ],
)
def test_strengths_that_are_not_understood(tmp_path: Path, header: dict[str, str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        strength(tmp_path, header)


def test_strengths_that_are_stated_twice(tmp_path: Path) -> None:
    with_alpha = GOOD | {f"{PLACE}.alpha": torch.tensor(8.0)}
    assert strength(tmp_path, {"ss_network_alpha": "1"}, with_alpha) == 8 / 2  # a note of a trainer's run
    assert strength(tmp_path, {"lora_alpha": "8"}, with_alpha) == 8 / 2
    with pytest.raises(ValueError, match="has alphas that differ from the 4 in its header"):
        strength(tmp_path, {"lora_alpha": "4"}, with_alpha)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 8}')
    with pytest.raises(ValueError, match=r"and the adapter_config\.json beside it both state its strength"):
        strength(tmp_path, None, with_alpha)
    assert strength(tmp_path, {"lora_alpha": "8"}) == 8 / 2
    with pytest.raises(ValueError, match=r"and the adapter_config\.json beside it both state its strength"):
        strength(tmp_path, {"lora_alpha": "4"})


def test_the_config_of_peft_beside_a_file(tmp_path: Path) -> None:
    config = tmp_path / "adapter_config.json"
    config.write_text('{"r": 2, "lora_alpha": 8}')
    assert strength(tmp_path) == 8 / 2
    config.write_text('{"r": 2, "lora_alpha": 8, "use_rslora": true}')
    assert strength(tmp_path) == pytest.approx(8 / 2**0.5)
    for content, said in {
        '{"r": 4, "lora_alpha": 8}': "has rank 2 for .*, but its config says 4",
        '{"r": 2, "use_dora": true}': "was trained with use_dora",
        '{"r": 2, "lora_alpha": "x"}': r"a\.safetensors cannot be read .*'x'",
        "[]": "adapter_config.json must be a JSON object",
    }.items():
        config.write_text(content)
        with pytest.raises(ValueError, match=said):
            strength(tmp_path)
    config.write_text('{"r": 2, "lora_alpha": 8}')
    (tmp_path / "other.safetensors").touch()
    with pytest.raises(ValueError, match=r"may belong to a\.safetensors or to other\.safetensors"):
        strength(tmp_path)
    (tmp_path / "other.safetensors").rename(tmp_path / "adapter_model.safetensors")  # then it is PEFT's
    assert strength(tmp_path) == 1


def test_an_adapter_of_another_flux(tmp_path: Path) -> None:
    """diffusers asserts the width of Flux.1, without a word."""
    layer = "lora_unet_single_blocks_0_linear1"
    tensors = {f"{layer}.lora_down.weight": torch.ones(4, 3072), f"{layer}.lora_up.weight": torch.ones(27648, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors has no key format .* FluxPipeline: AssertionError"):
        read_lora(tmp_path / "a.safetensors", diffusers.FluxPipeline)


def test_layers_are_compared_before_a_deployment(tmp_path: Path, demo_model: Path) -> None:
    save_file(
        {f"{PLACE}.lora_A.weight": A.new_ones(2, 192), f"{PLACE}.lora_B.weight": B.new_ones(192, 2)}, tmp_path / "a"
    )
    lora = LoRA(name="ink", source=str(tmp_path / "a"))
    check_lora(lora, model(demo_model), demo_model)
    save_file({name: tensor.clone() for name, tensor in GOOD.items()}, tmp_path / "a")
    with pytest.raises(ValueError, match=rf"{tmp_path}/a does not fit the model: .*transformer_blocks\.0\.attn\.to_q"):
        check_lora(lora, model(demo_model), demo_model)
    second = lora.model_copy(update={"component": "transformer_2"})
    with pytest.raises(ValueError, match="has no component 'transformer_2'"):
        check_lora(second, model(demo_model), demo_model)


def test_what_diffusers_would_drop(tmp_path: Path) -> None:
    """Its conversion of Flux files says nothing of layers of other models."""
    known, unknown = "lora_unet_double_blocks_0_img_attn_proj", "lora_other_double_blocks_0"
    tensors = {f"{n}.lora_{side}.weight": t for n in (known, unknown) for side, t in (("down", A), ("up", B))}
    tensors = {n: t.clone() for n, t in tensors.items()}
    save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="has no place in FluxPipeline for 144 of 288 features"):
        read_lora(tmp_path / "a.safetensors", diffusers.FluxPipeline)


def test_only_safetensors(tmp_path: Path) -> None:
    torch.save(GOOD, tmp_path / "a.bin")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        read_lora(tmp_path / "a.bin", diffusers.QwenImagePipeline)
    with pytest.raises(FileNotFoundError, match="no file"):
        read_lora(tmp_path / "b.safetensors", diffusers.QwenImagePipeline)
    with pytest.raises(ValueError, match="diffusers loads no LoRA files for Linear"):
        read_lora(tmp_path / "a.bin", nn.Linear)
