"""Helios: refused. diffusers ships a `_cp_plan`, which would be silently wrong here."""

from sp_core.models.family import ModelFamily

HELIOS = ModelFamily(
    transformer_classes=("HeliosTransformer3DModel",),
    refused="its attention slices shares by lengths of the whole sequence",
)
