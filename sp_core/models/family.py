"""What the file of a model family declares. Plain data without torch or diffusers, so that `deploy` can read it.

`sp_core.models.lookup` finds the families. `sp_core.parallelize` and the attention backend apply their plans,
`sp_core.verify.verify` proves them on their examples, and `deploy.memory` reads off the tensor plan which weights are
sharded.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from sp_core.sp_plan import SequenceParallelModelPlan
from sp_core.tp_plan import TensorParallelPlan

Config = Mapping[str, Any]
"""The `config.json` of a transformer."""


class Tokens(Protocol):
    """The size of one example forward, in tokens, and tensors for it. Made by `sp_core.verify.examples`.

    Attributes:
        frames: of a video; 1 for an image.
        height: of a frame.
        width: of a frame.
        text: tokens of the prompt.
        batch: samples.
        mask: the kind of text mask that the example is proved with, one of `sp_core.verify.examples.MASKS`.
    """

    frames: int
    height: int
    width: int
    text: int
    batch: int
    mask: str

    def normal(self, *shape: int, seed: int = 1) -> Any:
        """Normal numbers of this shape, the same on every rank."""

    def full(self, value: float, *shape: int) -> Any:
        """A tensor of this shape that holds one value."""

    def ramp(self, last: float, *shape: int) -> Any:
        """Evenly spaced numbers from 0 to `last`, in this shape."""

    def tensor(self, values: object) -> Any:
        """A tensor of nested lists of numbers."""

    def text_mask(self, kind: str) -> Any:
        """A mask of the prompt, `(batch, text)`, boolean; None for the kind "none"."""


@dataclass(frozen=True)
class Example:
    """One variant of a family, small enough to prove on a laptop.

    Attributes:
        transformer_class: the diffusers class.
        init: its constructor's arguments.
        inputs: the keyword arguments of one forward.
        gains: factors on the random weights, by a part of the parameter's name. A tiny model with the default
            initialization hardly uses its attention, and a proof without attention proves nothing.
        mask_input: the input that holds the text mask, if there is one.
        own_masks: kinds of mask that the model makes by itself, without such an input.
        counts_mask: whether the model reads only how many tokens the mask shows, not which.
        no_mask: why masks do not apply.
        no_length: why a length of `sp_core.verify.examples.SIZES` does not apply.
    """

    transformer_class: str
    init: Mapping[str, Any]
    inputs: Callable[[Tokens], dict[str, Any]]
    gains: Mapping[str, float] = field(default_factory=dict)
    mask_input: str | None = None
    own_masks: tuple[str, ...] = ()
    counts_mask: bool = False
    no_mask: str = "it has no mask"
    no_length: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class RealRotation:
    """Processors that rotate queries and keys by complex numbers, and by real ones in compiled blocks.

    Applied by `sp_core.real_rotation`.

    Attributes:
        source: the name of what makes the rotations: a module of the model, or another attribute that it calls.
        parameter: the parameter of the processors' call that takes them: one tensor, or a tuple of several.
        processor: class name of diffusers' processors that take them. All attention of the model uses this class.
        norms: names of the attention's norms right after which it rotates, each with the rotation that it takes.
    """

    source: str
    parameter: str
    processor: str
    norms: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class SharedModulation:
    """Layers whose only input is one embedding, of the timestep and maybe of more, so that their output can be shared.

    Applied by `sp_core.shared_modulation`.

    Attributes:
        source: the module of the model that makes the embedding, `(B, D)`, once a forward.
        layers: patterns of the layers that take it; each is an `nn.Linear`, or an `nn.Sequential` that ends with one.
        silu: whether their input is the SiLU of the embedding.
        timestep_only: whether the embedding depends only on the timestep, so that the forwards of one step share it.
        across_ranks: whether each sequence rank computes some of the layers. It pays if reading their weights takes
            longer than a gather: from about 1 GB on.
        unless: keys of the model's config. If one is true, modulation depends on something else as well.
    """

    source: str
    layers: tuple[str, ...]
    silu: bool = False
    timestep_only: bool = True
    across_ranks: bool = True
    unless: tuple[str, ...] = ()


@dataclass(frozen=True)
class FusedGelu:
    """Layers that widen and apply the tanh approximation of GELU: on CUDA one operator can do both.

    Applied by `sp_core.fused_gelu`.

    Attributes:
        layers: patterns of the layers, each diffusers' `GELU`.
    """

    layers: tuple[str, ...]


@dataclass(frozen=True)
class GuidanceBatch:
    """How the branches of guidance, which differ only in their prompts, become one batch of a forward.

    Applied by `sp_core.batched_guidance`, if no branch then needs a mask.

    Attributes:
        prompt: the parameter of the forward for prompts: one tensor `(B, S, D)`, or a list of B tensors `(S, D)`.
        per_sample: parameters with an entry for each sample, the same in all branches: tensors and lists.
        pads_to: the model itself pads each prompt to a multiple of this many tokens, with tokens that take part.
    """

    prompt: str
    per_sample: tuple[str, ...]
    pads_to: int = 1


def _refuse_none(config: Config) -> str:
    """Refuses no config. It has a name because families are pickled to rank processes."""
    return ""


@dataclass(frozen=True)
class ModelFamily:
    """How one family of transformers is parallelized.

    Module names are patterns in which `*` matches anything (`"*.attn2"`).

    Attributes:
        transformer_classes: names of its transformer classes in diffusers.
        sp_plan: their sequence plan, or a function that makes it from the model's config.
        tp_plan: their tensor plan, or a function that makes it from the model's config. Empty: diffusers' own
            `_tp_plan` is right.
        local_attention: modules whose attention stays local, because every rank has their tokens whole
            (cross-attention, refiners before the region), whatever their processor is.
        own_stream: modules whose attention does not join all streams, with those that it joins: the parameter name of
            one, or names as `Region.layout` takes them; or a function that makes this from the model's config.
        keys_of: modules whose queries come from one stream and whose keys from another, with the name of the latter.
        keys_in_front: modules whose keys begin with tokens that every rank has whole and that are no queries.
        masks_queries: modules whose mask of keys hides the queries as well, `(B, 1, L, L)` of this rank's tokens. The
            outputs of hidden queries must not matter.
        scales_by_length: modules whose attention scales its scores by the logarithm of the number of all tokens, with
            the parameter of their processors' call that is the base.
        drops_hidden: modules whose processors keep, by `torch.nonzero`, only the tokens that a mask shows of the last
            stream that they join, with the model's input that holds the whole mask. Hidden tokens must be at its end.
        captured_processors: class names of processors that call torch's attention directly instead of diffusers'
            dispatch. All of that attention must be over the region's own tokens.
        linear_processors: class names of processors whose attention is linear, over the region's own tokens: see
            `sp_core.attention.linear`.
        refused_processors: class names of processors that would be silently wrong, with the reason.
        replacements: the parts that `sp_core.replacements` exchanges for faster ones with the same answer.
        guidance_batch: how the branches of guidance become one batch; None: each needs a forward of its own.
        pipelines: pipelines of diffusers that run through their classic call, each proved by a demo model of the
            family's name in `workers.demo_models.classic`, or beside its adapter. A pipeline with an adapter is not
            among them.
        refused: why the whole family cannot be parallelized; empty if it can.
        refuses: returns why a model with this config cannot be parallelized; empty if it can.
        rounds: what its forward rounds to half precision, whatever dtype the model has. A last-bit difference may
            become 4e-3 there, so its proofs are made without this rounding (`sp_core.verify.alone.in_fp32`).
        refused_pipelines: why some of its pipelines are not served, by class name, if their calls do not show it.
        examples: the proofs of the family, by the name of the variant.
    """

    transformer_classes: tuple[str, ...]
    sp_plan: SequenceParallelModelPlan | Callable[[Config], SequenceParallelModelPlan] = field(default_factory=dict)
    tp_plan: TensorParallelPlan | Callable[[Config], TensorParallelPlan] = field(default_factory=dict)
    local_attention: tuple[str, ...] = ()
    own_stream: Mapping[str, str] | Callable[[Config], Mapping[str, str]] = field(default_factory=dict)
    keys_of: Mapping[str, str] = field(default_factory=dict)
    keys_in_front: tuple[str, ...] = ()
    masks_queries: tuple[str, ...] = ()
    scales_by_length: Mapping[str, str] = field(default_factory=dict)
    drops_hidden: Mapping[str, str] = field(default_factory=dict)
    captured_processors: tuple[str, ...] = ()
    linear_processors: tuple[str, ...] = ()
    refused_processors: Mapping[str, str] = field(default_factory=dict)
    replacements: tuple[RealRotation | SharedModulation | FusedGelu, ...] = ()
    guidance_batch: GuidanceBatch | None = None
    pipelines: tuple[str, ...] = ()
    refused: str = ""
    refuses: Callable[[Config], str] = _refuse_none
    rounds: str = ""
    refused_pipelines: Mapping[str, str] = field(default_factory=dict)
    examples: Mapping[str, Example] = field(default_factory=dict)

    def sequence_plan(self, config: Config) -> SequenceParallelModelPlan:
        """The sequence plan of a model with this config."""
        return self.sp_plan(config) if callable(self.sp_plan) else self.sp_plan

    def own_streams(self, config: Config) -> Mapping[str, str]:
        """`own_stream` of a model with this config."""
        return self.own_stream(config) if callable(self.own_stream) else self.own_stream

    def tensor_plan(self, config: Config) -> TensorParallelPlan:
        """The tensor plan of a model with this config."""
        return self.tp_plan(config) if callable(self.tp_plan) else self.tp_plan
