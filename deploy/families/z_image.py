"""Z-Image: guided from a scale of 0 on."""

from deploy.families.family import AUTOENCODER_KL, Config, ForwardBytes, PipelineFamily


def _ffn_dim(config: Config) -> int | None:
    return int(config.get("dim", 3840) / 3 * 8)  # the class's own default


FAMILY = PipelineFamily(
    pipeline="ZImagePipeline",
    makes="image",
    with_pictures={"image-to-image": "ZImageImg2ImgPipeline"},
    guided_above=0.0,
    chats=True,
    forward_bytes={
        "ZImageTransformer2DModel": ForwardBytes(
            3840, alone=121_357, ulysses=137_754, ring=156_394, shared=81_920, text=512
        ),
    },
    decode_bytes={"AutoencoderKL": AUTOENCODER_KL},
    ffn_dim=_ffn_dim,
)
