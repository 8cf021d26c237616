"""Tiny models that read pictures together with prompts, and what prepares both for them, for demo models.

A tokenizer of `vocabulary.qwen2` comes in, with the special tokens that stand for pictures. Called by the families in
`workers.model.adapters` and in `classic/`.
"""

from typing import Any

from transformers import (
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from workers.demo_models.parts import TEXT_WIDTH

PATCH = 16
"""Pixels of a side of what Qwen 3 VL and Pixtral see as one."""

VISION_WIDTH = 32

PIXTRAL_TOKENS = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
"""Special tokens that stand for pictures."""


def qwen2_vl_processor(tokenizer: Any) -> Any:
    """What prepares pictures and prompts for Qwen 2 VL and Qwen 2.5 VL."""
    return Qwen2VLProcessor(Qwen2VLImageProcessor(), tokenizer, Qwen2VLVideoProcessor())


def qwen3_vl_processor(tokenizer: Any) -> Any:
    """What prepares pictures and prompts for Qwen 3 VL."""
    return Qwen3VLProcessor(Qwen2VLImageProcessor(patch_size=PATCH), tokenizer, Qwen3VLVideoProcessor())


def pixtral_processor(tokenizer: Any, chat_template: str) -> Any:
    """What prepares pictures and prompts for Mistral 3."""
    images = PixtralImageProcessor(patch_size=PATCH)
    return PixtralProcessor(images, tokenizer, patch_size=PATCH, spatial_merge_size=2, chat_template=chat_template)


def qwen3_vl_encoder(tokenizer: Any, layers: int) -> Any:
    """A `Qwen3VLForConditionalGeneration` of so many layers."""
    token_id = tokenizer.convert_tokens_to_ids
    text = _text(tokenizer, layers) | {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 3, 3]}}
    vision = {
        "depth": 2,
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_WIDTH,
        "num_heads": 2,
        "patch_size": PATCH,
        "out_hidden_size": TEXT_WIDTH,
        "num_position_embeddings": 64,
        "deepstack_visual_indexes": [0, 1],
    }
    return Qwen3VLForConditionalGeneration(
        Qwen3VLConfig(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
        )
    ).eval()


def mistral3_encoder(tokenizer: Any, layers: int) -> Any:
    """A `Mistral3ForConditionalGeneration` of so many layers."""
    vision = {
        "model_type": "pixtral",
        "hidden_size": VISION_WIDTH,
        "intermediate_size": VISION_WIDTH,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 8 * PATCH,
        "patch_size": PATCH,
    }
    return Mistral3ForConditionalGeneration(
        Mistral3Config(
            text_config=_text(tokenizer, layers) | {"model_type": "mistral"},
            vision_config=vision,
            image_token_index=tokenizer.convert_tokens_to_ids(PIXTRAL_TOKENS[0]),
        )
    ).eval()


def _text(tokenizer: Any, layers: int) -> dict[str, Any]:
    """The part of a config that both have for the language model."""
    return {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 8192,
    }
