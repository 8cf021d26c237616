"""What the file of a served family declares: plain data that `deploy.check`, `deploy.memory` and the workers read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from deploy.families.schedulers import FLOW_MATCH, Schedulers
from deploy.model_spec import Task

Config = Mapping[str, Any]
"""A `config.json`, or `model_index.json`."""


@dataclass(frozen=True)
class ForwardBytes:
    """Bytes per token that a rank holds in a forward of a transformer.

    Measured by `python -m tests.benchmarks.activation_memory` in bfloat16.

    Attributes:
        width: features of a token in the measured model.
        alone: bytes on one rank.
        ulysses: bytes with Ulysses ranks.
        ring: bytes with ring ranks.
        shared: the part of these bytes that tensor-parallel ranks divide.
        text: tokens of the longest text that joins the picture's tokens in the sequence.
    """

    width: int
    alone: int
    ulysses: int
    ring: int
    shared: int
    text: int


@dataclass(frozen=True)
class DecodeBytes:
    """Bytes per pixel of a frame in a decode of a VAE. Measured like `ForwardBytes`.

    Attributes:
        width: base channels of the measured model.
        picture: bytes for one frame.
        video: bytes for the first five frames together; equal to `picture` if it makes no video.
        frame: bytes for each further frame.
        tiles: bytes per frame of the output that all tiles hold while one of them is decoded.
    """

    width: int
    picture: int
    video: int
    frame: int
    tiles: int


AUTOENCODER_KL = DecodeBytes(128, picture=1536, video=1536, frame=0, tiles=10)
"""The image VAE that several families share."""


def _ffn_dim(config: Config) -> int | None:
    width = config.get("ffn_dim")
    return width if isinstance(width, int) else None


@dataclass(frozen=True)
class PipelineFamily:
    """One of diffusers' pipeline classes, as spray serves it.

    Attributes:
        pipeline: the class name in `model_index.json`.
        makes: images or videos.
        with_pictures: the tasks that begin with a picture or a clip, each with the pipeline class that defines the
            answer.
        begins_with: the roles of the inputs that it takes, each with the name of the pipeline's parameter.
        needs: the roles that it needs to begin.
        takes_several: whether it makes one picture from several.
        sized_by_image: whether the output takes its size or shape from the input picture. The picture is then scaled to
            the request's size first.
        takes_strength: whether a request can say which share of the steps to do.
        guided_above: the guidance scale above which a second branch is evaluated (classifier-free guidance). None:
            never, so there are no branches for `cfg_parallel_size` to divide, and no negative prompt.
        guided_by_negative_prompt: whether guidance needs a negative prompt as well.
        batches_branches: whether the pipeline itself puts both branches into one forward, which groups of ranks cannot
            divide.
        forward_bytes: activations of a forward, by transformer class.
        decode_bytes: activations of a decode, by VAE class.
        ffn_dim: hidden features of the feed-forward layers, by the transformer's config; None if they follow from the
            heads.
        kept_in_fp32: modules and parameters that diffusers keeps in fp32 in half precision, by transformer class; as
            path components of their names.
        vae_in_fp32: whether its authors decode in fp32 even if the transformer runs in half precision.
        schedulers: the schedulers that it runs with.
        refused: keys of `model_index.json` that must not be set, with the reason.
        components: the components that a request uses, by their names in `model_index.json`.
        needed_with: a further component, by the key of `model_index.json` that makes it necessary.
        prompt_form: the form of a prompt, with `%s` for plain text; used for the gang's own prompts.
        chats: whether prompts are written into the tokenizer's chat template.
        packages: packages that its license requires.
    """

    pipeline: str
    makes: Literal["image", "video"]
    with_pictures: Mapping[Task, str] = field(default_factory=dict)
    begins_with: Mapping[str, str] = field(default_factory=lambda: {"image": "image", "mask": "mask_image"})
    needs: tuple[str, ...] = ()
    takes_several: bool = False
    sized_by_image: bool = False
    takes_strength: bool = True
    guided_above: float | None = 1.0
    guided_by_negative_prompt: bool = False
    batches_branches: bool = False
    forward_bytes: Mapping[str, ForwardBytes] = field(default_factory=dict)
    decode_bytes: Mapping[str, DecodeBytes] = field(default_factory=dict)
    ffn_dim: Callable[[Config], int | None] = _ffn_dim
    kept_in_fp32: Mapping[str, frozenset[str]] = field(default_factory=dict)
    vae_in_fp32: bool = False
    schedulers: Schedulers = field(default_factory=lambda: FLOW_MATCH)
    refused: Mapping[str, str] = field(default_factory=dict)
    components: tuple[str, ...] = ("scheduler", "text_encoder", "tokenizer", "transformer", "vae")
    needed_with: Mapping[str, str] = field(default_factory=dict)
    prompt_form: str = "%s"
    chats: bool = False
    packages: tuple[str, ...] = ()

    @property
    def tasks(self) -> tuple[Task, ...]:
        """The tasks that a request may ask for."""
        alone: tuple[Task, ...] = ("text-to-image" if self.makes == "image" else "text-to-video",)
        return (*(() if self.needs else alone), *self.with_pictures)

    def needed_components(self, index: Config) -> tuple[str, ...]:
        """The components that a model must have.

        Args:
            index: its `model_index.json`.
        """
        return (*self.components, *(name for key, name in self.needed_with.items() if index.get(key) is not None))

    def branches(self, guidance_scale: float, negative_prompt: str | None) -> int:
        """Forwards of the transformer per step."""
        if self.guided_above is None or guidance_scale <= self.guided_above:
            return 1
        return 1 if self.guided_by_negative_prompt and negative_prompt is None else 2
