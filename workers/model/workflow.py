"""The blocks of a modular pipeline, cut at its loop. For `workers.model.denoising`."""

from dataclasses import dataclass
from typing import Any, Self

from diffusers.modular_pipelines import LoopSequentialPipelineBlocks

from workers.model.loader import is_encoder
from workers.model.picture_inputs import EncodePictures, SamplePictures


@dataclass(frozen=True)
class Workflow:
    """The blocks that one request runs through, in order.

    Attributes:
        encode: up to the last encoder, that of pictures included; on the ranks that encode.
        prepare: from there to the loop: initial latents, timesteps.
        loop: its body is one step.
        decode: after the loop.
    """

    encode: tuple[Any, ...]
    prepare: tuple[Any, ...]
    loop: LoopSequentialPipelineBlocks
    decode: tuple[Any, ...]

    @classmethod
    def split(cls, blocks: tuple[Any, ...]) -> Self:
        """Split the execution blocks of a modular pipeline."""
        loop = next(i for i, block in enumerate(blocks) if isinstance(block, LoopSequentialPipelineBlocks))
        prepare = 1 + max(i for i, block in enumerate(blocks[:loop]) if _encodes(block))
        return cls(blocks[:prepare], blocks[prepare:loop], blocks[loop], blocks[loop + 1 :])


def _encodes(block: Any) -> bool:
    if isinstance(block, EncodePictures | SamplePictures):
        return isinstance(block, EncodePictures)
    return any(is_encoder(component.name) for component in block.expected_components)
