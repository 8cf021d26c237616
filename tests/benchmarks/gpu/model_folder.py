"""A Z-Image folder of real size with random weights: 12.3 GB of transformer, 7.2 GB of text encoder, 0.2 GB of VAE.

The tokenizer is the demo model's, which knows few words. Everything else is as published, and read as published.
"""

import shutil
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, ZImagePipeline, ZImageTransformer2DModel
from transformers import Qwen3Config, Qwen3Model

from tests.benchmarks.gpu.part import LeftOut, release
from tests.benchmarks.gpu.transformers import fill
from workers.demo_models.writer import write_demo_model
from workers.model.adapters.z_image import demo_pipeline

FREE_BYTES = 21e9
"""On the disk, for the folder."""

VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512), "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4, "layers_per_block": 2, "latent_channels": 16, "sample_size": 1024,
    "use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159,
}  # fmt: skip

TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32,
    "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "max_position_embeddings": 40960,
    "rope_theta": 1e6, "tie_word_embeddings": True,
}  # fmt: skip


def write(folder: Path, device: torch.device, dtype: torch.dtype, fake: bool) -> int:
    """Write the folder; the demo model where the script is only tried.

    Returns:
        Bytes of weights.
    """
    if fake:
        write_demo_model(folder, "z-image")
    else:
        free = shutil.disk_usage(folder.parent).free
        if free < FREE_BYTES:
            raise LeftOut(
                f"{folder.parent} has {free / 1e9:.0f} GB free, {FREE_BYTES / 1e9:.0f} are needed; set TMPDIR"
            )
        _full_size(device, dtype).save_pretrained(folder, max_shard_size="5GB")
        release(device)
    return sum(file.stat().st_size for file in folder.rglob("*.safetensors"))


def _full_size(device: torch.device, dtype: torch.dtype) -> ZImagePipeline:
    with init_empty_weights(include_buffers=False):
        parts = {
            "transformer": ZImageTransformer2DModel(),
            "text_encoder": Qwen3Model(Qwen3Config(**TEXT_ENCODER)),
            "vae": AutoencoderKL(**VAE),
        }
    for part in parts.values():
        fill(part, device, dtype)
        part.eval()
    demo = demo_pipeline()
    return ZImagePipeline(scheduler=demo.scheduler, tokenizer=demo.tokenizer, **parts)
