"""The demo models of Kandinsky 5. Those of pictures draw a megapixel: the pipeline has no smaller size."""

from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5Transformer3DModel
from torch import nn
from transformers import CLIPTextModel

from workers.demo_models import vocabulary
from workers.demo_models.classic.hunyuan_video import pooled_config, video_vae
from workers.demo_models.parts import LATENT_CHANNELS, TEXT_WIDTH, amplify, image_vae, qwen_vl_encoder
from workers.demo_models.vision_language import qwen2_vl_processor

TRANSFORMER_GAINS = {"modulation": 2, "self_attention.out_layer": 4, "self_attention.to_value": 3, "cross_attention": 2}

REQUESTS = {
    "Kandinsky5T2IPipeline": {"width": 640, "height": 1408, "n": 1, "num_inference_steps": 2},
    "Kandinsky5I2IPipeline": {"width": 640, "height": 1408, "n": 1, "num_inference_steps": 2},
    "Kandinsky5T2VPipeline": {"num_frames": 5},
    "Kandinsky5I2VPipeline": {"num_frames": 17},
}

WORDS = (
    "system\nYou are a prompt engineer. Describe the video in detail.\n"
    "Describe how the camera moves or shakes, describe the zoom and view angle, whether it follows the objects.\n"
    "Describe the location of the video, main characters or objects and their action.\n"
    "Describe the dynamism of the video and presented actions.\n"
    "Name the visual style of the video: whether it is a professional footage, user generated content, some kind of "
    "animation, video game or scren content.\n"
    "Describe the visual effects, postprocessing and transitions if they are presented in the video.\n"
    "Pay attention to the order of key actions shown in the scene.\nuser\n"
)
"""Of the prompt that the pipelines of videos write, of which they drop the first 128 tokens."""


def demo_pipeline(name: str = "Kandinsky5T2IPipeline") -> Any:
    """A pipeline of this class, the same weights at every call."""
    makes_video = "2V" in name
    tokenizer = vocabulary.qwen2(WORDS) if makes_video else vocabulary.qwen2()
    words = vocabulary.clip()
    torch.manual_seed(0)
    transformer = Kandinsky5Transformer3DModel(
        in_visual_dim=LATENT_CHANNELS,
        in_text_dim=TEXT_WIDTH,
        in_text_dim2=TEXT_WIDTH,
        time_dim=32,
        out_visual_dim=LATENT_CHANNELS,
        model_dim=144,
        ff_dim=192,
        num_text_blocks=1,
        num_visual_blocks=2,
        axes_dims=(4, 4, 4),
        visual_cond="I2" in name,
    )
    for parameter in transformer.parameters():
        if not parameter.any() and parameter.ndim > 1:  # modulation begins as zeros, and shuts off all that it gates
            nn.init.normal_(parameter, std=0.1)
    amplify(transformer, TRANSFORMER_GAINS)
    return getattr(diffusers, name)(
        transformer=transformer.eval(),
        vae=video_vae().eval() if makes_video else image_vae(),
        text_encoder=qwen_vl_encoder(tokenizer),
        tokenizer=qwen2_vl_processor(tokenizer),
        text_encoder_2=CLIPTextModel(pooled_config(words)).eval(),
        tokenizer_2=words,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
