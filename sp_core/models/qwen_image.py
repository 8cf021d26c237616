"""Qwen-Image: two streams, text and image, joined in every attention.

Peculiarities:
- The pipeline packs the latents, so image tokens exist when the transformer is entered; text arrives embedded.
- The text mask must stay whole until the blocks: the forward derives the text length from it.
- Each block receives the mask and `modulate_index` (editing models) anew, hence the `*` entry; both are cheap views.
- `pos_embed` returns one rotation per image token and one per text token, without a batch dimension.
- Attention joins [text, image], so the plan names the text stream first. On each rank the order is [its text, its
  image]: another order of keys than one process's, which softmax does not see.
- Editing appends the reference images' tokens to the image's; `modulate_index` then says which timestep each has.
- ControlNet residuals are a list or None, as long as the image tokens.
- The ragged split is what a native size needs: 1328x1328 pixels are 83x83 = 6889 tokens, an odd number.
"""

from sp_core.models.family import ModelFamily
from sp_core.sp_plan import SequenceParallelCompanion, SequenceParallelInput, SequenceParallelOutput

QWEN_IMAGE = ModelFamily(
    transformer_classes=("QwenImageTransformer2DModel",),
    sp_plan={
        "": {"controlnet_block_samples": SequenceParallelCompanion(split_dim=1, expected_dims=3)},
        "pos_embed": {
            0: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
            1: SequenceParallelInput(split_dim=0, expected_dims=2, split_output=True),
        },
        "transformer_blocks.0": {
            "encoder_hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
            "hidden_states": SequenceParallelInput(split_dim=1, expected_dims=3),
        },
        "transformer_blocks.*": {
            "encoder_hidden_states_mask": SequenceParallelInput(split_dim=1, expected_dims=2),
            "modulate_index": SequenceParallelInput(split_dim=1, expected_dims=2),
        },
        "proj_out": SequenceParallelOutput(gather_dim=1, expected_dims=3, stream="hidden_states"),
    },
)
