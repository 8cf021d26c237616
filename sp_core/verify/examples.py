"""A tiny transformer of every family, and what it is proved with: the product of lengths, masks and batches.

For `sp_core.verify.verify` and the tests. `python -m sp_core.verify.examples` prints the product, with the reason for
each cell that does not apply.

Weights are random and scaled so that attention shows in the output (`gains`), norm weights and learnt pad tokens are
random too. Lengths: "even" divides by 2, 3 and 4 on all streams, "uneven" by none, "short" has streams with fewer
tokens than there are ranks.
"""

import functools
import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

diffusers.logging.set_verbosity_error()  # some inputs are of a kind that it calls deprecated, and accepts

LENGTHS = ("even", "uneven", "short")
MASKS = ("none", "suffix", "scattered", "per row", "whole stream")
BATCHES = (1, 2)

SIZES = {"even": ((1, 3, 4), 12), "uneven": ((1, 5, 5), 7), "short": ((1, 1, 3), 1)}
"""Frames, height and width in tokens, and the length of the text."""

Cell = tuple[str, str, int]
"""Length, mask, batch."""

HEADS = {"attention_head_dim": 12, "num_attention_heads": 12}


@dataclass(frozen=True)
class Tiny:
    """A family in small.

    Attributes:
        build: makes the transformer.
        inputs: `(frames, height, width, text, batch)` in tokens to keyword arguments.
        gains: factors on parameters by a part of their name.
        masks: why masks do not apply.
        mask_key: the input that is the mask of the text, if there is one.
        lengths: why a length does not apply.
    """

    build: Callable[[], nn.Module]
    inputs: Callable[..., dict[str, Any]]
    gains: Mapping[str, float] = field(default_factory=dict)
    masks: str = "it has no mask"
    mask_key: str | None = None
    lengths: Mapping[str, str] = field(default_factory=dict)

    @functools.cached_property
    def model(self) -> nn.Module:
        """The transformer, built once a process."""
        torch.manual_seed(0)
        model: Any = self.build().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "norm" in name and parameter.ndim == 1 and name.endswith("weight"):
                    parameter.copy_(torch.rand_like(parameter) + 1)
                if "pad_token" in name or "image_embedder.pos_embed" in name:
                    nn.init.normal_(parameter)
                for part, gain in self.gains.items():
                    if part in name:
                        parameter.mul_(gain)
        return model  # type: ignore[no-any-return]


def randn(*shape: int, seed: int = 1) -> torch.Tensor:
    """Normal numbers, the same on every rank."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def text_mask(kind: str, batch: int, text: int) -> torch.Tensor | None:
    """`(batch, text)`, boolean; None for "none"."""
    at = torch.arange(text)
    if kind == "none":
        return None
    rows: dict[str, Callable[[int], torch.Tensor]] = {
        "suffix": lambda row: at < max(1, text - 3),
        "scattered": lambda row: (at + row) % 3 != 1,
        "per row": lambda row: at < max(1, text - 4 * row),
        "whole stream": lambda row: at < 0,
    }
    return torch.stack([rows[kind](row) for row in range(batch)])


def why_not(name: str, length: str, mask: str, batch: int) -> str | None:
    """Why a cell of the product does not apply; None where it does."""
    tiny = TINY[name]
    if length in tiny.lengths:
        return tiny.lengths[length]
    if mask == "none":
        return None
    if tiny.mask_key is None and not (mask == "per row" and tiny.masks.startswith("only")):
        return tiny.masks
    if mask == "per row" and batch == 1:
        return "one row"
    if tiny.mask_key == COUNTED and mask in ("scattered", "whole stream"):
        return "the model takes the mask's number of tokens, not their places"
    return None


def inputs(name: str, length: str, mask: str, batch: int) -> dict[str, Any]:
    """Keyword arguments of one forward."""
    tiny = TINY[name]
    size, text = SIZES[length]
    if name == "z-image":
        return z_image_inputs(*size, batch, unequal=mask == "per row")
    arguments = tiny.inputs(*size, text, batch)
    if tiny.mask_key is not None:
        chosen = text_mask(mask, batch, text)
        if chosen is None and tiny.mask_key == COUNTED:
            chosen = torch.ones(batch, text, dtype=torch.bool)
        arguments[tiny.mask_key] = chosen
    return arguments


def cells(name: str) -> list[Cell]:
    """The cells of the product that apply to a family."""
    return [cell for cell in itertools.product(LENGTHS, MASKS, BATCHES) if why_not(name, *cell) is None]


def residuals(tokens: int, batch: int, width: int, count: int, seed: int = 10) -> list[torch.Tensor]:
    """ControlNet's outputs: `count` tensors `(batch, tokens, width)`."""
    return [randn(batch, tokens, width, seed=seed + i) for i in range(count)]


def qwen(**options: Any) -> Any:
    """The transformer, tiny."""
    return diffusers.QwenImageTransformer2DModel(
        patch_size=2, in_channels=16, out_channels=4, num_layers=2, joint_attention_dim=16, axes_dims_rope=(4, 4, 4),
        **HEADS, **options,
    )  # fmt: skip


def qwen_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Keyword arguments of one forward; sizes in tokens."""
    return {
        "hidden_states": randn(batch, height * width, 16),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "timestep": torch.full((batch,), 0.5),
        "img_shapes": [[(1, height, width)]] * batch,
    }


def qwen_edit_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """The reference image is as large as the image."""
    return qwen_inputs(frames, height, width, text, batch) | {
        "hidden_states": randn(batch, 2 * height * width, 16),
        "img_shapes": [[(1, height, width)] * 2] * batch,
    }


def qwen_control_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """One residual for two blocks."""
    plain = qwen_inputs(frames, height, width, text, batch)
    return plain | {"controlnet_block_samples": residuals(height * width, batch, 144, 1)}


def flux() -> Any:
    """The transformer, tiny."""
    return diffusers.FluxTransformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, joint_attention_dim=16, pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 4), **HEADS,
    )  # fmt: skip


def flux_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Keyword arguments of one forward; sizes in tokens."""
    image = height * width
    return {
        "hidden_states": randn(batch, image, 8),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "pooled_projections": randn(batch, 8, seed=3),
        "timestep": torch.full((batch,), 0.5),
        "img_ids": torch.arange(3.0 * image).view(image, 3),
        "txt_ids": torch.zeros(text, 3),
    }


def flux_control_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Residuals as a list and as a tuple; positions with a batch dimension, as older callers give them."""
    plain = flux_inputs(frames, height, width, text, batch)
    image = height * width
    return plain | {
        "controlnet_block_samples": residuals(image, batch, 144, 2),
        "controlnet_single_block_samples": tuple(residuals(image, batch, 144, 1, seed=20)),
        "img_ids": plain["img_ids"][None],
        "txt_ids": plain["txt_ids"][None],
    }


def flux_2() -> Any:
    """The transformer, tiny."""
    return diffusers.Flux2Transformer2DModel(
        in_channels=8, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=12,
        joint_attention_dim=16, timestep_guidance_channels=32, axes_dims_rope=(4, 4, 4, 4),
    )  # fmt: skip


def flux_2_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Positions are floating, and so look like a stream."""
    at, words = torch.arange(float(height * width)), torch.arange(float(text))
    return {
        "hidden_states": randn(batch, height * width, 8),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "timestep": torch.full((batch,), 0.5),
        "guidance": torch.full((batch,), 4.0),
        "img_ids": torch.stack([0 * at, at // width, at % width, 0 * at], -1).expand(batch, -1, -1),
        "txt_ids": torch.stack([0 * words] * 3 + [words], -1).expand(batch, -1, -1),
    }


def ltx() -> Any:
    """The transformer, tiny."""
    return diffusers.LTXVideoTransformer3DModel(
        in_channels=8, out_channels=8, cross_attention_dim=144, num_layers=2, caption_channels=16, **HEADS
    )


def ltx_inputs(frames: int, height: int, width: int, text: int, batch: int, timestep: str = "column") -> dict[str, Any]:
    """Keyword arguments of one forward; sizes in tokens."""
    tokens = frames * height * width
    per_token = torch.linspace(0, 900, batch * tokens).view(batch, tokens)
    return {
        "hidden_states": randn(batch, tokens, 8),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "encoder_attention_mask": text_mask("per row", batch, text).long(),  # type: ignore[union-attr]
        "timestep": {"column": torch.full((batch, 1), 500.0), "token": per_token, "deep": per_token[..., None]}[
            timestep
        ],
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def hunyuan(**options: Any) -> Any:
    """The transformer, tiny."""
    return diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_layers=2, num_single_layers=2, num_refiner_layers=1, mlp_ratio=2.0,
        patch_size=1, patch_size_t=1, text_embed_dim=16, pooled_projection_dim=8, rope_axes_dim=(4, 4, 4), **HEADS,
        **options,
    )  # fmt: skip


def hunyuan_inputs(
    frames: int, height: int, width: int, text: int, batch: int, guidance: bool = True
) -> dict[str, Any]:
    """Two frames, so that replacing the first one's tokens differs from replacing all."""
    return {
        "hidden_states": randn(batch, 4, 2 * frames, height, width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "pooled_projections": randn(batch, 8, seed=3),
        "guidance": torch.full((batch,), 6000.0) if guidance else None,
    }


def sd3(**options: Any) -> Any:
    """The transformer, tiny."""
    return diffusers.SD3Transformer2DModel(
        sample_size=16, patch_size=2, in_channels=4, out_channels=4, num_layers=2, joint_attention_dim=16,
        caption_projection_dim=144, pooled_projection_dim=8, pos_embed_max_size=8, **HEADS, **options,
    )  # fmt: skip


def sd3_inputs(frames: int, height: int, width: int, text: int, batch: int, control: int = 0) -> dict[str, Any]:
    """Keyword arguments of one forward; sizes in tokens."""
    return {
        "hidden_states": randn(batch, 4, 2 * height, 2 * width),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
        "pooled_projections": randn(batch, 8, seed=3),
        "timestep": torch.full((batch,), 500.0),
        "block_controlnet_hidden_states": residuals(height * width, batch, 144, control) or None,
    }


WAN = {
    "num_attention_heads": 12, "attention_head_dim": 12, "out_channels": 4, "text_dim": 16, "freq_dim": 32,
    "ffn_dim": 64, "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 32,
}  # fmt: skip


def wan(**options: Any) -> Any:
    """The transformer, tiny."""
    return diffusers.WanTransformer3DModel(**WAN, num_layers=2, **({"in_channels": 4} | options))


def wan_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Keyword arguments of one forward; sizes in tokens."""
    return {
        "hidden_states": randn(batch, 4, frames, 2 * height, 2 * width),
        "timestep": torch.full((batch,), 500.0),
        "encoder_hidden_states": randn(batch, text, 16, seed=2),
    }


def wan_per_token_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Keyword arguments of one forward; sizes in tokens."""
    tokens = frames * height * width
    timesteps = torch.linspace(0, 900, batch * tokens).view(batch, tokens)
    return wan_inputs(frames, height, width, text, batch) | {"timestep": timesteps}


def wan_image_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """The text is 512 tokens always: the model takes all in front of the last 512 for the image's."""
    return wan_inputs(frames, height, width, 512, batch) | {
        "hidden_states": randn(batch, 9, frames, 2 * height, 2 * width),
        "encoder_hidden_states_image": randn(batch, 5, 8, seed=3),
    }


def vace() -> Any:
    """The transformer, tiny."""
    return diffusers.WanVACETransformer3DModel(
        **WAN, in_channels=4, num_layers=3, vace_layers=[0, 2], vace_in_channels=6
    )


def vace_inputs(frames: int, height: int, width: int, text: int, batch: int) -> dict[str, Any]:
    """Two frames and control for the first; the model pads the control."""
    return wan_inputs(2 * frames, height, width, text, batch) | {
        "control_hidden_states": randn(batch, 6, frames, 2 * height, 2 * width, seed=3),
        "control_hidden_states_scale": torch.tensor([1.0, 0.5]),
    }


def z_image() -> Any:
    """The transformer, tiny."""
    return diffusers.ZImageTransformer2DModel(
        in_channels=4, dim=96, n_layers=2, n_refiner_layers=2, n_heads=6, n_kv_heads=6, cap_feat_dim=16,
        axes_dims=[8, 4, 4], axes_lens=[256, 64, 64],
    )  # fmt: skip


def z_image_inputs(frames: int, height: int, width: int, batch: int, unequal: bool) -> dict[str, Any]:
    """Unequal captions of a batch are padded, so that a rank's whole chunk may be hidden for a row."""
    captions = [5, 40][:batch] if unequal else [20] * batch
    return {
        "x": [randn(4, 1, 2 * height, 2 * width, seed=i) for i in range(batch)],
        "t": torch.full((batch,), 0.5),
        "cap_feats": [randn(length, 16, seed=length + i) for i, length in enumerate(captions)],
    }


COUNTED = "encoder_attention_mask"
QWEN_MASK = "encoder_hidden_states_mask"
WAN_GAINS = {"attn1.to_out": 4, "scale_shift_table": 4}
CROSS = "its mask is that of cross-attention, which stays local"

TINY = {
    "qwen-image": Tiny(qwen, qwen_inputs, {"_mod.": 4}, mask_key=QWEN_MASK),
    "qwen-image edit": Tiny(lambda: qwen(zero_cond_t=True), qwen_edit_inputs, {"_mod.": 4}, mask_key=QWEN_MASK),
    "qwen-image control": Tiny(qwen, qwen_control_inputs, {"_mod.": 4}, mask_key=QWEN_MASK),
    "flux": Tiny(flux, flux_inputs, {"norm1.linear": 3, "norm.linear": 3}),
    "flux control": Tiny(flux, flux_control_inputs, {"norm1.linear": 3, "norm.linear": 3}),
    "flux-2": Tiny(flux_2, flux_2_inputs, {"modulation": 4}),
    "ltx": Tiny(ltx, ltx_inputs, {"attn1.to_out": 4, "scale_shift_table": 6}, CROSS),
    "ltx per token": Tiny(
        ltx, functools.partial(ltx_inputs, timestep="token"), {"attn1.to_out": 4, "scale_shift_table": 6}, CROSS
    ),
    "ltx per token, deep": Tiny(
        ltx, functools.partial(ltx_inputs, timestep="deep"), {"attn1.to_out": 4, "scale_shift_table": 6}, CROSS
    ),
    "hunyuan-video": Tiny(hunyuan, hunyuan_inputs, {"norm1.linear": 3, "norm.linear": 3}, mask_key=COUNTED),
    "hunyuan-video token replace": Tiny(
        lambda: hunyuan(image_condition_type="token_replace", guidance_embeds=False),
        functools.partial(hunyuan_inputs, guidance=False),
        {"norm1.linear": 3, "norm.linear": 3}, mask_key=COUNTED,
    ),
    "sd3": Tiny(
        sd3, functools.partial(sd3_inputs, control=2),
        {"norm1.linear": 3, "norm1_context.linear": 3, "attn.to_q": 3, "attn.to_k": 3, "add_q": 3, "add_k": 3},
    ),
    "sd3.5": Tiny(
        lambda: sd3(dual_attention_layers=(0,), qk_norm="rms_norm"), sd3_inputs,
        {"norm1.linear": 3, "norm1_context.linear": 3},
    ),
    "wan": Tiny(wan, wan_inputs, WAN_GAINS),
    "wan per token": Tiny(wan, wan_per_token_inputs, WAN_GAINS),
    "wan image": Tiny(lambda: wan(in_channels=9, image_dim=8, added_kv_proj_dim=144), wan_image_inputs, WAN_GAINS),
    "wan vace": Tiny(vace, vace_inputs, WAN_GAINS),
    "z-image": Tiny(
        z_image, z_image_inputs, masks="only batches of unequal captions have a mask",
        lengths={"short": "image and caption are padded to multiples of 32 by the model"},
    ),
}  # fmt: skip


def main() -> None:
    """Print the product."""
    product = list(itertools.product(LENGTHS, MASKS, BATCHES))
    for name in TINY:
        print(f"{name}: {len(cells(name))} of {len(product)} cells apply")
        reasons: dict[str, list[Cell]] = {}
        for cell in product:
            reason = why_not(name, *cell)
            if reason is not None:
                reasons.setdefault(reason, []).append(cell)
        for reason, without in reasons.items():
            sides = (dict.fromkeys(str(part) for part in side) for side in zip(*without, strict=True))
            print(f"  {len(without):>2} do not, because {reason}: {' x '.join('|'.join(side) for side in sides)}")


if __name__ == "__main__":
    main()
