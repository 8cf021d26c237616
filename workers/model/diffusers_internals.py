"""The private names of diffusers that workers uses, here and nowhere else.

`tests/workers/test_diffusers_internals.py` pins them. Called by `workers.model.weights`, `workers.model.lora`,
`workers.model.denoising` and `workers.gang.rank`.
"""

from torch import nn


def stays_fp32(kind: type[nn.Module], tensor: str) -> bool:
    """Tell whether a floating-point tensor of a model is kept in fp32, whatever dtype the model is loaded in.

    The rule is that of diffusers' loader (`models/model_loading_utils.py`): some component of the tensor's dotted name
    is listed. `norm1` thus means `blocks.0.norm1.weight`, and not `blocks.0.norm10.weight`.
    """
    listed: list[str] | str = getattr(kind, "_keep_in_fp32_modules", None) or []
    return not set(tensor.split(".")).isdisjoint([listed] if isinstance(listed, str) else listed)


def lora_components(pipeline: type) -> list[str]:
    """The components of a pipeline that its LoRA files may have weights for; empty if diffusers loads none."""
    components: list[str] = getattr(pipeline, "_lora_loadable_modules", [])
    return components if hasattr(pipeline, "lora_state_dict") else []


def drop_kept_features(vae: object) -> None:
    """Drop what the convolutions of a video VAE keep of one part of a clip for the next, after a failure.

    diffusers drops it after the last part only. A part that fails would leave gigabytes in the model that all requests
    share, and `AutoencoderKLMagvit` would go on from them with the next clip.

    Args:
        vae: of diffusers; one that keeps nothing, or a pipeline's lack of one, stays as it is.
    """
    for name in ("clear_cache", "_clear_conv_cache"):
        if callable(clear := getattr(vae, name, None)):
            clear()
