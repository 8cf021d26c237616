"""Only right kernels are chosen, by rank 0 for all ranks, or by the deployment."""

from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend

from sp_core import cuda_kernels
from sp_core.kernel_choice import settle_kernel
from sp_core.kernels import attention_with_lse
from sp_core.mesh import ParallelMesh
from sp_core.verify.rank_pool import RankPool
from tests.support.toys import TWO

CPU = torch.device("cpu")
CUDA = torch.device("cuda", 0)


def right(query: Any, key: Any, value: Any, scale: Any) -> Any:
    return attention_with_lse(query, key, value, scale=scale)


def wrong(query: Any, key: Any, value: Any, scale: Any) -> Any:
    output, lse = right(query, key, value, scale)
    return output, lse * 0.95  # outputs are right, but would merge wrongly


def absent(query: Any, key: Any, value: Any, scale: Any) -> Any:
    raise ImportError("No module named 'flash_attn'\nlong explanation")


def test_only_right_kernels_are_chosen() -> None:
    found = cuda_kernels.try_kernels(
        {"right": right, "wrong": wrong, "absent": absent}, CPU, torch.float16, 16, tokens=300
    )
    assert isinstance(found["right"], float)
    assert str(found["wrong"]).startswith("is wrong by")
    assert found["absent"] == "ImportError: No module named 'flash_attn'"


def test_without_any_kernel_it_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "KERNELS", {"absent": absent})
    with pytest.raises(RuntimeError, match=r"no attention kernel works on cpu .* head size 8: .*flash_attn"):
        cuda_kernels.choose(CPU, torch.float16, 8)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_kernels_of_the_device(capsys: pytest.CaptureFixture[str]) -> None:
    """A table of what is there; whatever is chosen is right, by the way it is chosen."""
    device = torch.device("cuda", torch.cuda.current_device())
    found = cuda_kernels.try_kernels(cuda_kernels.KERNELS, device, torch.bfloat16, 128)
    with capsys.disabled():
        for name, line in found.items():
            flops = 4 * 4096**2 * 8 * 128
            print(f"{name:<16} {flops / line / 1e12:.0f} TFLOP/s" if isinstance(line, float) else f"{name:<16} {line}")
    assert any(isinstance(line, float) for line in found.values())


def settled(mesh: ParallelMesh, pinned: str | None) -> str:
    """The kernel in use after ranks have settled, where each finds another one the fastest."""
    mesh.device = CUDA
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "_in_use", {})
        patch.setattr(cuda_kernels, "fastest", lambda *_: sorted(cuda_kernels.KERNELS)[mesh.axis("gang").rank])
        patch.setattr(cuda_kernels, "try_kernels", lambda kernels, *_: dict.fromkeys(kernels, 1e-3))
        settle_kernel(mesh, torch.bfloat16, 128, pinned)
        name = cuda_kernels.in_use(CUDA).split(";")[0]
        assert cuda_kernels.choose(CUDA, torch.bfloat16, 128) is cuda_kernels.KERNELS[name]
        return name


def test_all_ranks_take_what_rank_0_chose_or_what_is_pinned(ranks: RankPool) -> None:
    assert ranks.run(TWO, settled, None) == ["flash-attn-2"] * 2
    assert ranks.run(TWO, settled, "torch-cudnn") == ["torch-cudnn"] * 2


def test_a_pinned_kernel_that_does_not_work_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_kernels, "KERNELS", {"absent": absent, "right": right})
    with pytest.raises(RuntimeError, match=r"absent cannot be used on cpu .*flash_attn"):
        cuda_kernels.use(CPU, torch.float16, 8, "absent")
    monkeypatch.setattr(cuda_kernels, "_in_use", {})
    cuda_kernels.use(CPU, torch.float16, 8, "right")
    assert cuda_kernels.choose(CPU, torch.float16, 8) is right


ALONE = ParallelMesh.create(TWO.__class__(), device_type="cpu", timeout_s=60)


def test_one_rank_can_only_pin_what_torch_has() -> None:
    with pytest.raises(ValueError, match="cannot be used where no ranks share a sequence; choose from torch-flash, "):
        settle_kernel(ALONE, torch.bfloat16, 128, "flash-attn-3")
    settle_kernel(ALONE, torch.bfloat16, 128, "torch-flash")()  # on CPU nothing is to choose


def test_torchs_attention_prefers_the_kernel_until_it_is_undone() -> None:
    def first() -> int:
        return int(torch._C._get_sdp_priority_order()[0])

    before = torch._C._get_sdp_priority_order()
    undo = cuda_kernels.prefer("torch-cudnn")
    assert first() == int(SDPBackend.CUDNN_ATTENTION)
    undo_inner = cuda_kernels.prefer("torch-flash")
    assert first() == int(SDPBackend.FLASH_ATTENTION)
    undo_inner()
    undo()
    assert torch._C._get_sdp_priority_order() == before
