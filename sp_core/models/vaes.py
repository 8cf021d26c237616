"""How the VAEs of diffusers decode, by their class names. For `sp_core.tile_parallel`."""

SHARED = frozenset(
    {
        "AutoencoderDC",
        "AutoencoderKL",
        "AutoencoderKLFlux2",
        "AutoencoderKLHunyuanImage",
        "AutoencoderKLHunyuanVideo",
        "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLLTXVideo",
        "AutoencoderKLQwenImage",
        "AutoencoderKLWan",
    }
)
"""Classes whose decoder keeps nothing between calls, or only in the list that it is given as `feat_cache`. Each has a
test. Others may keep frames in their layers (`AutoencoderKLMagvit`) or return them (`AutoencoderKLCogVideoX`)."""

WRONG_TILES = frozenset({"AutoencoderKLHunyuanImageRefiner"})
"""Classes whose own tiled decode is wrong in diffusers 0.42: this one returns a few rows of each tile."""
