"""Transformers that no sequence plan can divide yet, with the reasons, which are the errors of their deployment."""

from sp_core.models.family import ModelFamily

HI_DREAM = ModelFamily(
    transformer_classes=("HiDreamImageTransformer2DModel",),
    refused="each block joins a text of its own behind the image, which a plan cannot keep whole",
)
NUCLEUS_MOE = ModelFamily(
    transformer_classes=("NucleusMoEImageTransformer2DModel",),
    refused="its experts choose among all tokens, and would choose among this rank's",
)
QWEN_IMAGE_2_1 = ModelFamily(
    transformer_classes=("QwenImage21Transformer2DModel",),
    refused="it attends to its text causally, in segments of the whole sequence",
)
