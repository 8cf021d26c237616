"""Writes the demo model: a tiny Qwen-Image pipeline in diffusers' folder format, offline, from a seed.

    python -m workers.demo_model OUT

It has every part of the real one (tokenizer, text encoder, transformer, VAE, scheduler) with random weights: it draws
patterns, not things. 12 attention heads let 1, 2, 3 and 4 ranks share it. Used by `make demo` and by the tests.
"""

import argparse
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

TEXT_WIDTH = 64
LATENT_CHANNELS = 4
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
SYSTEM_WORDS = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\n\nassistant\n"
)
TRANSFORMER_GAINS = {"_mod.": 3, "norm_": 1.5, "add_k_proj": 3, "add_v_proj": 10, "to_out": 4, "proj_out": 4}
"""Factors on the initial weights, by a part of the parameter's name. With diffusers' own initialisation the gates of
the residual branches are near zero: without any attention the model would draw nearly the same, whatever the prompt."""


def write_demo_model(out: Path) -> None:
    """Write the model folder `out`, whole or not at all. The same call always writes the same weights."""
    out.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(dir=out.parent))
    try:
        _pipeline().save_pretrained(unfinished)
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _pipeline() -> QwenImagePipeline:
    tokenizer = _tokenizer()
    torch.manual_seed(0)
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=12,
        joint_attention_dim=TEXT_WIDTH,
        axes_dims_rope=(4, 6, 6),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 2, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
    )
    text_encoder = _text_encoder(tokenizer)
    _amplify(transformer, TRANSFORMER_GAINS)
    _amplify(vae, {"decoder.conv_out": 3})
    return QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=tokenizer,
        transformer=transformer.eval(),
    )


def _tokenizer() -> Qwen2Tokenizer:
    """Byte-level BPE that knows the words of Qwen-Image's system prompt: the pipeline counts on its 34 tokens."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        [SYSTEM_WORDS] * 2,
        trainers.BpeTrainer(
            special_tokens=SPECIAL_TOKENS + VISION_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learnt = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learnt["vocab"],
        merges=[tuple(pair) for pair in learnt["merges"]],
        additional_special_tokens=SPECIAL_TOKENS[1:] + VISION_TOKENS,
        model_max_length=2048,
        padding_side="right",
    )


def _text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    token_id = tokenizer.convert_tokens_to_ids
    text = {
        "hidden_size": TEXT_WIDTH,
        "intermediate_size": TEXT_WIDTH,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": len(tokenizer),
        "rope_scaling": {"mrope_section": [2, 3, 3], "rope_type": "default", "type": "default"},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
    }
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": TEXT_WIDTH}
    return Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text,
            vision_config=vision,
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
            vision_token_id=token_id("<|vision_pad|>"),
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
        )
    )


def _amplify(model: nn.Module, gains: dict[str, float]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for part, gain in gains.items():
                if part in name:
                    parameter.mul_(gain)


def main() -> None:
    """Command line: `python -m workers.demo_model OUT`."""
    parser = argparse.ArgumentParser(description="Write the tiny demo model in diffusers' folder format.")
    parser.add_argument("out", type=Path, help="folder to write")
    arguments = parser.parse_args()
    write_demo_model(arguments.out)
    sys.stdout.write(f"{arguments.out}\n")


if __name__ == "__main__":
    main()
