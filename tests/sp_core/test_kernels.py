"""Attention on one device: partial attentions merge."""

import functools
import math
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.utils._python_dispatch import TorchDispatchMode

from sp_core import kernels
from sp_core.verify.verify import BAR

CPU = torch.device("cpu")


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randn(2, count, 3, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("masked", [False, True])
def test_partial_attentions_merge_to_the_whole(masked: bool) -> None:
    query, key, value = tokens(5, 0), tokens(9, 1), tokens(9, 2)
    mask = torch.zeros(2, 1, 1, 9)
    if masked:
        mask[0, ..., :4] = -math.inf  # the first chunk is hidden as a whole
        mask[1] = -math.inf  # and this row sees nothing
    whole = kernels.attention(query, key, value, mask)
    parts = [
        kernels.partial_attention(query, key[:, chunk], value[:, chunk], mask[..., chunk] if masked else None)
        for chunk in (slice(0, 4), slice(4, 9))
    ]
    merged = kernels.merge(*parts)
    output, lse = merged.output, merged.lse
    assert torch.isfinite(output).all()
    assert (output - whole).abs().max() <= BAR
    if masked:
        assert output[1].abs().max() == 0
        assert torch.isneginf(lse[1]).all()
    else:
        scores = torch.einsum("bshd,bkhd->bshk", query, key) / math.sqrt(8)
        assert (lse - scores.logsumexp(-1)).abs().max() <= BAR


def masked_in_chunks(low: float) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """Merged attention where a mask hides all keys of the first row and all but one of the second."""
    query, key, value = tokens(5, 0), tokens(9, 1), tokens(9, 2)
    mask = torch.full((2, 1, 1, 9), low)
    mask[1, ..., 2] = 0
    parts = [
        kernels.partial_attention(query, key[:, chunk], value[:, chunk], mask[..., chunk])
        for chunk in (slice(0, 3), slice(3, 7), slice(7, 9))
    ]
    merged = kernels.merge(kernels.merge(parts[2], parts[0]), parts[1])
    assert (merged.output[1] - value[1, 2]).abs().max() <= BAR
    return merged.output, [query, key, value], mask


@pytest.mark.parametrize("low", [torch.finfo(torch.float32).min, torch.finfo(torch.bfloat16).min, -1e9])
def test_rows_that_hide_all_keys_by_the_least_number(low: float) -> None:
    """Such a number swallows the scores that it is added to: what is left is the mean, in chunks as at once."""
    output, whole, mask = masked_in_chunks(low)
    assert (output - kernels.attention(*whole, mask)).abs().max() <= BAR
    assert (output[0] - whole[2][0].mean(0)).abs().max() <= BAR
    assert (output[0] - kernels.attention(*whole)[0]).abs().max() > 100 * BAR


def test_rows_that_hide_all_keys_by_a_finite_mask() -> None:
    """A mask of -1e4 hides nothing there, as the softmax sees differences only. Nothing is lost in the merge, though at
    once a few digits would be."""
    output, whole, _ = masked_in_chunks(-1e4)
    assert (output[0] - kernels.attention(*whole)[0]).abs().max() <= BAR


def test_a_nan_is_not_hidden() -> None:
    query, key, value = tokens(5, 0), tokens(9, 1), tokens(9, 2)
    query[0, 3] = math.nan
    mask = torch.full((2, 1, 1, 9), torch.finfo(torch.float32).min)
    part = kernels.partial_attention(query, key, value, mask)
    expected = kernels.attention(query, key, value, mask)
    assert torch.equal(part.output.isnan(), expected.isnan())
    assert expected[0, 3].isnan().all()
    assert expected[0, :3].isfinite().all()


class Passes(TorchDispatchMode):
    """Counts operators that compute as many numbers as an output has."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size, self.names = size, list[str]()

    def __torch_dispatch__(self, operator: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = operator(*args, **(kwargs or {}))
        if made.numel() == self.size and not operator.is_view:
            self.names.append(operator.name())
        return made


@pytest.mark.parametrize(("dtype", "names"), [(torch.float32, ["lerp_"]), (torch.bfloat16, ["_to_copy", "lerp_"])])
def test_a_merge_passes_once_over_the_outputs(dtype: torch.dtype, names: list[str]) -> None:
    """In half precision the new part is made fp32 before; what is merged stays fp32."""
    query, key, value = (tokens(count, count).to(dtype) for count in (5, 9, 9))
    parts = [kernels.partial_attention(query, key[:, [i]], value[:, [i]]) for i in range(3)]
    merged = kernels.merge(parts[0], parts[1])
    with Passes(query.numel()) as passes:
        again = kernels.merge(merged, parts[2])
    assert [name.removeprefix("aten::").partition(".")[0] for name in passes.names] == names
    assert again.output.data_ptr() == merged.output.data_ptr()


def test_half_precision_is_merged_in_fp32() -> None:
    """Of 64 chunks, as near to the exact mean of what they returned as fp32 is; in bf16 digits would be lost."""
    query, key, value = (tokens(count, count).bfloat16() for count in (5, 64, 64))
    parts = [kernels.partial_attention(query, key[:, [i]], value[:, [i]]) for i in range(64)]
    shares = torch.stack([part.lse for part in parts]).double().softmax(0).unsqueeze(-1)
    expected = sum(share * part.output.double() for share, part in zip(shares, parts, strict=True))
    merged = functools.reduce(kernels.merge, parts)
    assert merged.output.dtype == merged.lse.dtype == torch.float32
    assert (merged.output - expected).abs().max() <= BAR


def test_a_row_without_keys_takes_the_other_part_to_the_bit() -> None:
    def parts() -> list[kernels.Partial]:
        lse = torch.tensor([[-math.inf, 2.0, -math.inf, 300.0]])[..., None].expand(-1, -1, 3)
        other = torch.tensor([[1.0, -math.inf, -math.inf, -300.0]])[..., None].expand(-1, -1, 3)
        made = [(torch.randn(1, 4, 3, 8), each) for each in (lse, other)]
        return [kernels.Partial(output * lse.isfinite()[..., None], lse) for output, lse in made]

    first, second = parts()
    before = first.output.clone()
    merged = kernels.merge(first, second)
    assert torch.equal(merged.output[:, 0], second.output[:, 0])
    assert torch.equal(merged.output[:, 1], before[:, 1])
    assert torch.equal(merged.output[:, 3], before[:, 3])  # 600 apart: the other has no part in it
    assert torch.equal(merged.output[:, 2], torch.zeros(1, 3, 8))
    assert merged.lse[0, :, 0].tolist() == [1.0, 2.0, -math.inf, 300.0]


@pytest.mark.parametrize("masked", [False, True])
def test_heads_that_are_padded_give_the_same(masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA, whose kernels take only heads of a multiple of 8."""
    query, key, value = (torch.cat((tokens(count, count), tokens(count, 5)[..., :4]), -1) for count in (5, 9, 9))
    mask = torch.randn(2, 1, 5, 9, generator=torch.Generator().manual_seed(1)) if masked else None
    plain, lse = kernels.attention(query, key, value, mask), kernels.attention_with_lse(query, key, value, mask)[1]
    monkeypatch.setattr(kernels, "_must_pad", lambda query: query.shape[3] % 8 != 0)
    assert (kernels.attention(query, key, value, mask) - plain).abs().max() <= BAR
    output, padded_lse = kernels.attention_with_lse(query, key, value, mask)
    assert output.shape == query.shape
    assert (output - plain).abs().max() <= BAR
    assert (padded_lse - lse).abs().max() <= BAR


def test_a_mask_with_strides_reaches_the_kernel_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    """As it is after an exchange. On CUDA torch has no fused kernel for it, and would keep all scores."""
    strides: list[int] = []

    def attend(*args: torch.Tensor, attn_mask: torch.Tensor, scale: float | None) -> torch.Tensor:
        strides.append(attn_mask.stride(-1))
        return scaled_dot_product_attention(*args, attn_mask=attn_mask, scale=scale)

    query, key, value = tokens(5, 0), tokens(9, 1), tokens(9, 2)
    mask = torch.zeros(9, 16)[:, :2].t()[:, None, None]
    monkeypatch.setattr(kernels, "scaled_dot_product_attention", attend)
    assert mask.stride(-1) == 16
    assert kernels.attention(query, key, value, mask).equal(kernels.attention(query, key, value, mask.contiguous()))
    assert strides == [1, 1]


def test_fewer_key_heads_and_masks_of_models() -> None:
    query, key, value = tokens(5, 0), tokens(9, 1)[:, :, :1], tokens(9, 2)[:, :, :1]
    mask = torch.arange(9).expand(2, 9) < 6
    expected = kernels.attention(query, *(t[:, :6].expand(-1, -1, 3, -1) for t in (key, value)))
    assert (kernels.local_attention(query, key, value, mask) - expected).abs().max() <= BAR
