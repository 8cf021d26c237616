"""Only right kernels are chosen, by rank 0 for all ranks, or by the deployment."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.attention import SDPBackend

from sp_core import cuda_kernels
from sp_core.degrees import ParallelDegrees
from sp_core.kernel_choice import settle_kernel
from sp_core.kernels import attention_with_lse
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import _head_size
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


def forgets(query: Any, key: Any, value: Any, scale: Any) -> Any:
    return right(query, key[:, :-64], value[:, :-64], scale)  # a last block that is not whole, for one


def weak(query: Any, key: Any, value: Any, scale: Any) -> Any:
    output, lse = right(query, key, value, scale)
    return output * 0.6, lse


def unscaled(query: Any, key: Any, value: Any, scale: Any) -> Any:
    return right(query, key, value, None)


def packed(query: Any, key: Any, value: Any, scale: Any) -> Any:
    if not query.is_contiguous():  # it would read the tokens of another sample
        query = query.as_strided(query.shape, torch.empty(query.shape).stride())
    return right(query, key, value, scale)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_only_right_kernels_are_chosen(dtype: torch.dtype) -> None:
    mistaken = {each.__name__: each for each in (wrong, forgets, weak, unscaled, packed)}
    found = cuda_kernels.try_kernels({"right": right, "absent": absent, **mistaken}, CPU, dtype, 16, tokens=2048)
    assert isinstance(found["right"], float)
    assert [name for name in mistaken if str(found[name]).startswith("is wrong by")] == list(mistaken)
    assert found["absent"] == "ImportError: No module named 'flash_attn'"


@pytest.mark.parametrize(
    ("config", "size"),
    [
        ({"attention_head_dim": 64, "dim": 512, "num_attention_heads": 4}, 64),
        ({"dim": 512, "n_heads": 4}, 128),
        ({"hidden_size": 512, "num_attention_heads": 4}, 128),
        ({"hidden_size": 512, "num_heads": 8}, 64),
        ({"model_dim": 512, "axes_dims": (16, 24, 24)}, 64),
        ({}, None),
    ],
)
def test_the_head_size_is_known_by_any_of_its_names(config: dict[str, Any], size: int | None) -> None:
    assert _head_size(config) == size


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 128), (torch.bfloat16, None)])
def test_a_pinned_kernel_that_would_not_be_used_is_refused(dtype: torch.dtype, size: int | None) -> None:
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    mesh.device = CUDA
    with pytest.raises(ValueError, match=r"'torch-cudnn' cannot be used: .*; leave it out"):
        settle_kernel(nn.Identity(), mesh, dtype, size, "torch-cudnn")
    settle_kernel(nn.Identity(), mesh, dtype, size, None)()


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
        settle_kernel(nn.Identity(), mesh, torch.bfloat16, 128, pinned)()
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


ALONE = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)


def test_one_rank_can_only_pin_what_torch_has() -> None:
    with pytest.raises(ValueError, match="cannot be used where no ranks share a sequence; choose from torch-flash, "):
        settle_kernel(nn.Identity(), ALONE, torch.bfloat16, 128, "flash-attn-3")
    settle_kernel(nn.Identity(), ALONE, torch.bfloat16, 128, "torch-flash")()  # on CPU nothing is to choose


def order() -> list[int]:
    """The kernels that torch's attention would try, the preferred one first."""
    return list(torch._C._get_sdp_priority_order())


FLASH, CUDNN = int(SDPBackend.FLASH_ATTENTION), int(SDPBackend.CUDNN_ATTENTION)


class Asking(nn.Module):
    """Writes down which kernel is preferred while it runs, and runs another inside, or fails."""

    def __init__(self, inner: "Asking | None" = None) -> None:
        super().__init__()
        self.others = [inner] if inner else []  # not a submodule
        self.preferred: list[int] = []

    def forward(self, fails: bool = False) -> None:
        self.preferred.append(order()[0])
        for other in self.others:
            other()
        self.preferred.append(order()[0])
        if fails:
            raise ZeroDivisionError


@pytest.fixture
def on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> ParallelMesh:
    """A mesh that says so; every kernel works there."""
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    mesh.device = CUDA
    monkeypatch.setattr(cuda_kernels, "_in_use", {})
    monkeypatch.setattr(cuda_kernels, "try_kernels", lambda kernels, *_: dict.fromkeys(kernels, 1e-3))
    return mesh


def test_models_on_one_gpu_prefer_each_its_own_kernel_and_only_while_they_run(on_one_gpu: ParallelMesh) -> None:
    before = order()
    second = Asking()
    first = Asking(second)
    undo_first = settle_kernel(first, on_one_gpu, torch.bfloat16, 128, "torch-cudnn")
    undo_second = settle_kernel(second, on_one_gpu, torch.bfloat16, 128, "torch-flash")
    assert order() == before
    first()
    assert (first.preferred, second.preferred) == ([CUDNN] * 2, [FLASH] * 2)
    with pytest.raises(ZeroDivisionError):
        second(fails=True)
    assert order() == before
    undo_first()  # in the order in which they came: the later one keeps its own
    second()
    assert second.preferred[-1] == FLASH
    undo_second()
    first(), second()
    assert order() == before
    assert first.preferred[-1] == second.preferred[-1] == before[0]


def test_a_forward_that_was_interrupted_leaves_no_preference(on_one_gpu: ParallelMesh) -> None:
    before, model = order(), Asking()
    undo = settle_kernel(model, on_one_gpu, torch.bfloat16, 128, "torch-cudnn" if before[0] == FLASH else "torch-flash")
    model.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        model()
    assert order() != before
    undo()
    assert order() == before


def settled_twice(mesh: ParallelMesh) -> tuple[list[str], str, list[str]]:
    """The kernels of two models that choose alike, what is said to one that does not, and of one that then may."""
    mesh.device = CUDA
    what = (CUDA, torch.bfloat16, 128)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_kernels, "_in_use", {})
        patch.setattr(cuda_kernels, "fastest", lambda *_: "flash-attn-3")
        patch.setattr(cuda_kernels, "try_kernels", lambda kernels, *_: dict.fromkeys(kernels, 1e-3))
        found, undo, models = [], [], [nn.Identity() for _ in range(3)]
        for model, pinned in zip(models, ("torch-flash", None, "torch-flash"), strict=True):
            undo.append(settle_kernel(model, mesh, torch.bfloat16, 128, pinned))
            found.append(str(cuda_kernels.chosen(*what)))
        with pytest.raises(ValueError) as refused:
            settle_kernel(nn.Identity(), mesh, torch.bfloat16, 128, "torch-cudnn")
        settle_kernel(nn.Identity(), mesh, torch.bfloat16, 64, "torch-cudnn")()  # its heads are others
        lone: Any = SimpleNamespace(shares_sequence=False, device=CUDA, axis=mesh.axis, broadcast=mesh.broadcast)
        settle_kernel(nn.Identity(), lone, torch.bfloat16, 128, "torch-cudnn")()  # it shares with nobody
        found.append(str(cuda_kernels.chosen(*what)))
        undo[0]()
        undo[1]()
        models.clear()  # nobody has the third any more
        undo.clear()
        del model
        for other in ("torch-cudnn", None):
            settle_kernel(nn.Identity(), mesh, torch.bfloat16, 128, other)()
        return found, str(refused.value), [str(cuda_kernels.chosen(*what))]


def test_models_of_one_process_do_not_change_each_others_kernel(ranks: RankPool) -> None:
    for found, said, last in ranks.run(TWO, settled_twice):
        assert found == ["torch-flash"] * 4
        assert (
            "attention_kernel 'torch-cudnn' cannot be used: another model of this process attends by torch-flash"
            in said
        )
        assert last == ["flash-attn-3"]
