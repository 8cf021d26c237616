"""LTX-Video: video tokens attend to themselves; text is only attended to (cross-attention) and stays whole.

Peculiarities:
- The pipeline packs the latents, so the tokens exist when the transformer is entered.
- Cross-attention (`attn2`) passes the parallel configuration on like self-attention, so it is kept local by name.
  Lengths cannot tell the two apart: a rank's share may be as long as the text. diffusers' own plan splits the text
  instead, and fails on the mask that its pipeline always passes.
- The rotations are `(B, S, D)`, which looks like a stream: companions.
- The timestep comes as `(B,)`, `(B, 1)`, `(B, S)` or `(B, S, 1)`: split where it has one value per token.
"""

import functools
from typing import Any, Literal

from sp_core.models.family import Example, FusedGelu, ModelFamily, Tokens
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput
from sp_core.tp_plan import AcrossHeads, Channels, Colwise, Heads, Rowwise


def _inputs(tokens: Tokens, timestep: Literal["column", "token", "deep"] = "column") -> dict[str, Any]:
    """Timesteps as `(B, 1)`, `(B, S)` or `(B, S, 1)`."""
    batch, count = tokens.batch, tokens.frames * tokens.height * tokens.width
    ramp = tokens.tensor(
        [[900.0 * (row * count + i) / (batch * count - 1) for i in range(count)] for row in range(batch)]
    )
    timesteps = {"column": tokens.full(500.0, batch, 1), "token": ramp, "deep": ramp[..., None]}
    return {
        "hidden_states": tokens.normal(batch, count, 8),
        "encoder_hidden_states": tokens.normal(batch, tokens.text, 16, seed=2),
        "encoder_attention_mask": tokens.text_mask("per row").long(),
        "timestep": timesteps[timestep],
        "num_frames": tokens.frames,
        "height": tokens.height,
        "width": tokens.width,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


_example = functools.partial(
    Example,
    "LTXVideoTransformer3DModel",
    {
        "in_channels": 8, "out_channels": 8, "cross_attention_dim": 144, "num_layers": 2, "caption_channels": 16,
        "attention_head_dim": 12, "num_attention_heads": 12,
    },
    gains={"attn1.to_out": 4, "scale_shift_table": 6},
    no_mask="its mask is that of cross-attention, which stays local",
)  # fmt: skip

LTX = ModelFamily(
    transformer_classes=("LTXVideoTransformer3DModel",),
    pipelines=("LTXPipeline", "LTXImageToVideoPipeline", "LTXConditionPipeline"),
    refused_pipelines={
        "LTXI2VLongMultiPromptPipeline": "it reads prompts again for each of its windows, when its loop has begun",
    },
    sp_plan={
        "": {
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "timestep": SequenceParallelCompanion(split_dim=1, optional=True),
        },
        "rope": {
            0: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
            1: SequenceParallelCompanion(split_dim=1, expected_dims=3, split_output=True),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
    tp_plan={
        "rope": Channels(),  # it returns the features of all heads
        "*.attn[12]": Heads(),
        "*.attn[12].to_[qkv]": Colwise(),
        "*.attn[12].norm_[qk]": AcrossHeads(),
        "*.attn[12].to_out.0": Rowwise(),
        "*.ff.net.0.proj": Colwise(),
        "*.ff.net.2": Rowwise(),
    },
    local_attention=("*.attn2",),
    replacements=(FusedGelu(("transformer_blocks.*.ff.net.0",)),),
    examples={
        "ltx": _example(_inputs),
        "ltx per token": _example(functools.partial(_inputs, timestep="token")),
        "ltx per token, deep": _example(functools.partial(_inputs, timestep="deep")),
    },
)
