"""LTX-2: refused. diffusers ships a `_cp_plan`, which would be silently wrong here."""

from sp_core.models.family import ModelFamily

LTX_2 = ModelFamily(
    transformer_classes=("LTX2VideoTransformer3DModel",),
    refused="diffusers' _cp_plan sends its cross-attention across ranks",
)
