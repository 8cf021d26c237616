"""Linear attention over a sequence that is divided among ranks: one sum of a small matrix, whatever the length.

Without softmax, attention is `q (k^T v)`: each rank sums `k^T v` and `k` over its own tokens, one all-reduce joins the
sums, `(B, H, D + 1, D)`, and each rank applies its own queries to them. Ulysses and ring ranks do the same here. The
answer equals that of one process, except for the order of a sum. In half precision the sum of the weights of SANA-Video
is computed in fp32; diffusers uses the model's dtype. Under `torch.compile` it is one opaque operator.

`LinearProcessor` replaces diffusers' processors of this kind, which sum only over the tokens that they see.
`sp_core.attention.diffusers_backend` puts it into the modules that a family names by `linear_processors`.
"""

from typing import Any

import torch
from torch.nn.functional import relu

from sp_core import collectives
from sp_core.attention.region_attention import AttentionSite, is_kept_local, layout_of
from sp_core.region import SequenceContext
from sp_core.token_layout import TokenLayout

EPS = 1e-15
"""diffusers' own, below the sum of weights."""

KNOWN = ("SanaLinearAttnProcessor2_0", "SanaLinearAttnProcessor3_0")
"""The processors of diffusers whose answer `LinearProcessor` gives. Both make features positive by ReLU; the second
also rotates them, except in the sum of the weights (SANA, arXiv 2410.10629; SANA-Video, arXiv 2509.24695)."""

Rotation = tuple[torch.Tensor, torch.Tensor]


class LinearProcessor:
    """The processor of one self-attention, across the sequence ranks inside a region and local outside one.

    Args:
        site: which attention this is.
    """

    def __init__(self, site: AttentionSite) -> None:
        self.sequence_parallel = site

    def __call__(
        self,
        attn: Any,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: Rotation | None = None,
    ) -> torch.Tensor:
        """`(B, L, C)` to the same.

        Args:
            attn: diffusers' `Attention`.
            hidden_states: this rank's tokens.
            encoder_hidden_states: must be None.
            attention_mask: must be None.
            rotary_emb: cosines and sines of this rank's tokens, each number twice, `(1, L, 1, D)`.

        Raises:
            ValueError: another stream to attend to, or a mask, is given; or the tokens are not those of the region.
        """
        if encoder_hidden_states is not None or attention_mask is not None:
            given = "a mask" if encoder_hidden_states is None else "another stream"
            raise ValueError(
                f"linear attention {self.sequence_parallel.name!r} is given {given}, and attends to its own tokens, "
                "all of them; leave it out"
            )
        query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query = query if attn.norm_q is None else attn.norm_q(query)
        key = key if attn.norm_k is None else attn.norm_k(key)
        query, key, value = (each.unflatten(2, (attn.heads, -1)) for each in (relu(query), relu(key), value))
        attended = linear_attention(query, key, value, rotary_emb, self.sequence_parallel)
        output: torch.Tensor = attn.to_out[1](attn.to_out[0](attended.flatten(2).to(hidden_states.dtype)))
        if output.dtype is torch.float16:
            largest = torch.finfo(output.dtype).max
            output = output.clip(-largest, largest)
        return output


def linear_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, rotation: Rotation | None, site: AttentionSite
) -> torch.Tensor:
    """Linear attention of this rank's queries, computed in fp32.

    Args:
        query: `(B, L, H, D)`, nothing negative.
        key: the same.
        value: `(B, L, H, D)`.
        rotation: of queries and keys in the product; the sum of the weights takes them unrotated.
        site: which attention this is.

    Returns:
        `(B, L, H, D)`, fp32.

    Raises:
        ValueError: the tokens are not those of the region; on all ranks, if it happens at an attention's first call.
    """
    if torch.compiler.is_compiling():
        cosine, sine = (None, None) if rotation is None else rotation
        return _linear_operator(  # type: ignore[no-any-return]
            query, key, value, cosine, sine, site.context.number, site.stream
        )
    forward = site.context.running()
    layout: TokenLayout | None = None
    real: torch.Tensor | None = None
    misfit: ValueError | None = None
    try:
        if forward is not None:
            layout = layout_of(forward.region, query, key, value, site)
        if layout is not None:
            real = layout.real(key.device)
    except ValueError as error:
        misfit = error
    site.context.agree(f"attention {site.name!r}", f"{site.name}/{site.stream}/linear", misfit)
    if real is not None:  # padding is no token: it must not be in the sums
        key = key.masked_fill(~real[None, :, None, None], 0)
    turned_query, turned_key = (x if rotation is None else _rotated(x, rotation) for x in (query, key))
    products = value.float().permute(0, 2, 3, 1) @ turned_key.float().transpose(1, 2)  # (B, H, D, D)
    sums = torch.cat((products, key.float().sum(1).unsqueeze(2)), dim=2)
    if forward is not None and layout is not None:
        forward.record_attention()
        if not is_kept_local():
            sums = collectives.all_reduce(sums, site.context.mesh.axis("sequence"))
    products, weights = sums[:, :, :-1], sums[:, :, -1:]
    attended = turned_query.float().transpose(1, 2) @ products.transpose(2, 3)  # (B, H, L, D)
    return (attended / (query.float().transpose(1, 2) @ weights.transpose(2, 3) + EPS)).transpose(1, 2)


@torch.library.custom_op("sp_core::linear_attention", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _linear_operator(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    number: int,
    stream: str,
) -> torch.Tensor:
    rotation = None if cosine is None or sine is None else (cosine, sine)
    site = AttentionSite(SequenceContext.numbered(number), stream=stream)
    return linear_attention(query, key, value, rotation, site).contiguous()


@_linear_operator.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cosine: torch.Tensor | None,
    sine: torch.Tensor | None,
    number: int,
    stream: str,
) -> torch.Tensor:
    return query.new_empty(query.shape, dtype=torch.float32)


def _rotated(tensor: torch.Tensor, rotation: Rotation) -> torch.Tensor:
    """Pairs of neighboring features, rotated by their angles."""
    cosine, sine = rotation[0][..., ::2], rotation[1][..., ::2]
    first, second = tensor[..., ::2], tensor[..., 1::2]
    pairs = torch.stack((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
    return pairs.flatten(-2).type_as(tensor)
