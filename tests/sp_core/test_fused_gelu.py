"""GELU inside the product is the two operators that it stands for, where it is used; and it is used where it may be."""

from typing import Any

import pytest
import torch
from torch import nn
from torch._decomp import get_decompositions
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from sp_core import fused_gelu, torch_private
from sp_core.degrees import ParallelDegrees
from sp_core.lora import Adapters, LowRank
from sp_core.mesh import ParallelMesh
from sp_core.parallelize import parallelize
from sp_core.tensor_parallel import RowParallelLinear
from sp_core.verify import examples
from sp_core.verify.divergence import error
from sp_core.verify.rank_pool import RankPool
from sp_core.verify.verify import BAR
from tests.support import qwen
from tests.support.fake_cuda.attention import STAND_INS
from tests.support.fake_cuda.guard import needs_guard
from tests.support.fake_cuda.pretend import PretendCuda, move, pretended
from tests.support.fake_cuda.seen import Seen

FUSED = {"qwen-image": 4, "flux": 4, "wan": 2, "wan vace": 5, "ltx": 2, "hunyuan-video": 4, "sd3": 3}
"""Layers that fuse in the example of a family. The last block of SD3 has no feed-forward of the text."""
LAYOUTS = {
    "tp 2": ParallelDegrees(tensor_parallel_size=2),
    "ulysses 3": ParallelDegrees(ulysses_degree=3),
    "tp 2 x ring 2": ParallelDegrees(tensor_parallel_size=2, ring_degree=2),
}
TANH = STAND_INS[torch.ops.aten._addmm_activation.default]


class Forced:
    """Inside, layers fuse on the CPU as well, by the product that CUDA has.

    Attributes:
        calls: how often.
    """

    def __init__(self, operator: Any = TANH) -> None:
        self.calls = 0
        self._operator = operator

    def __enter__(self) -> "Forced":
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(fused_gelu, "_has_tanh", lambda _: True)
        self._patch.setattr(torch_private, "gelu_of_product", self._counted)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()

    def _counted(self, *args: Any, **options: Any) -> Any:
        self.calls += 1
        return self._operator(*args, **options)


def one_rank() -> ParallelMesh:
    return ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)


@torch.no_grad()
def answer(model: nn.Module, name: str) -> torch.Tensor:
    found: torch.Tensor = model(**examples.inputs(name, "uneven", "none", 1), return_dict=False)[0]
    return found


@pytest.mark.parametrize("name", FUSED)
def test_the_product_gives_the_models_own_answer(name: str) -> None:
    model = examples.TINY[name].build()
    expected = answer(model, name)
    handle = parallelize(model, one_rank())
    with Forced() as forced:
        assert error(answer(model, name), expected) <= BAR
    assert forced.calls == FUSED[name]
    with Forced(lambda bias, rows, columns, **_: torch._addmm_activation(bias, rows, columns)):  # the control: ReLU
        assert error(answer(model, name), expected) > 100 * BAR
    handle.remove()
    with Forced() as forced:
        assert torch.equal(answer(model, name), expected)
    assert forced.calls == 0


def on_ranks(mesh: ParallelMesh, name: str) -> tuple[float, int]:
    model = examples.TINY[name].build()
    expected = answer(model, name)
    parallelize(model, mesh)
    with Forced() as forced:
        return error(answer(model, name), expected), forced.calls


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["qwen-image", "wan"])
def test_ranks_fuse_their_part_of_the_layers(ranks: RankPool, name: str, layout: str) -> None:
    for difference, calls in ranks.run(LAYOUTS[layout], on_ranks, name):
        assert difference <= BAR
        assert calls == FUSED[name]


def test_on_the_cpu_nothing_fuses(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the operator computes the exact GELU."""
    monkeypatch.setattr(torch_private, "gelu_of_product", None)
    for dtype in (torch.float32, torch.bfloat16):
        model = qwen.transformer().to(dtype)
        parallelize(model, one_rank())
        inputs = {k: v.to(dtype) if torch.is_tensor(v) else v for k, v in qwen.inputs(3, 3, 5).items()}
        with torch.no_grad():
            model(**inputs)


def test_layers_that_are_more_than_a_product_do_not_fuse() -> None:
    """Those with active adapters, and with hooks; the others do."""
    inputs, generator = qwen.inputs(3, 3, 5), torch.Generator().manual_seed(0)
    model: Any = qwen.transformer()
    parallelize(model, one_rank())
    layer = "transformer_blocks.0.img_mlp.net.0.proj"
    into, out = model.get_submodule(layer).in_features, model.get_submodule(layer).out_features
    adapters = Adapters(model)
    weights = LowRank(torch.randn(2, into, generator=generator), torch.randn(out, 2, generator=generator))
    adapters.load("ink", {layer: weights})
    with torch.no_grad():
        without = model(**inputs)[0]
        adapters.activate({"ink": 1.0})
        expected = model(**inputs)[0]
        with Forced() as forced:
            assert error(model(**inputs)[0], expected) <= BAR
        assert forced.calls == 3
        assert error(without, expected) > 100 * BAR
        adapters.activate({})
        seen: list[int] = []
        model.get_submodule(layer).register_forward_hook(lambda *_: seen.append(1))
        with Forced() as forced:
            model(**inputs)
        assert (forced.calls, len(seen)) == (3, 1)


def test_what_does_not_fit() -> None:
    plain, tokens = nn.Linear(4, 8), torch.ones(2, 3, 4)
    row = RowParallelLinear(plain, torch.arange(4), one_rank().axis("tp"))
    with Forced():
        assert not fused_gelu.fits(plain, tokens)  # gradients may be wanted
        with torch.no_grad():
            assert fused_gelu.fits(plain, tokens)
            for layer in (nn.Linear(4, 8, bias=False), plain.__class__(4, 8).double(), row):
                assert not fused_gelu.fits(layer, tokens)
            assert not fused_gelu.fits(plain, tokens[0, 0])
    with torch.no_grad():
        assert not fused_gelu.fits(plain, tokens)


@pytest.mark.parametrize("strange", ["exact", "subclass", "absent"])
def test_layers_that_are_not_as_expected_stay(strange: str) -> None:
    model = qwen.transformer()
    layers = [module for module in model.modules() if type(module).__name__ == "GELU"]
    assert len(layers) == 4
    if strange == "exact":
        layers[0].approximate = "none"
    if strange == "subclass":
        layers[0].__class__ = type("Other", (type(layers[0]),), {})
    kinds = [type(layer) for layer in layers]
    pattern = "nothing.*" if strange == "absent" else "transformer_blocks.*_mlp.net.0"
    assert fused_gelu.replace(model, fused_gelu.FusedGelu((pattern,))) is None
    assert [type(layer) for layer in layers] == kinds


def test_compiled_blocks_are_one_graph_without_the_product() -> None:
    targets: set[str] = set()

    def backend(graph: torch.fx.GraphModule, _inputs: list[torch.Tensor]) -> Any:
        targets.update(str(node.target) for node in graph.graph.nodes)
        return graph.forward

    model: Any = qwen.transformer()
    expected = answer(model, "qwen-image")
    parallelize(model, one_rank())
    torch._dynamo.reset()
    model.compile_repeated_blocks(fullgraph=True, backend=backend)
    with Forced() as forced:
        assert error(answer(model, "qwen-image"), expected) <= BAR
    assert any("gelu" in target for target in targets)
    assert not any("addmm_activation" in target for target in targets)
    assert forced.calls == 0


@needs_guard
def test_layers_fuse_on_pretended_cuda_in_half_precision() -> None:
    layer = next(module for module in qwen.transformer().modules() if type(module).__name__ == "GELU").bfloat16()
    tokens = torch.randn(2, 5, layer.proj.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer.float()(tokens.bfloat16().float())
        layer.bfloat16()
        model = nn.ModuleList([layer])
        assert fused_gelu.replace(model, fused_gelu.FusedGelu(("0",))) is not None
        move(model)
        with Forced(torch._addmm_activation) as forced, pretended(Seen(), set()):
            found = model[0](PretendCuda(tokens.bfloat16()))
    assert forced.calls == 1
    assert found.is_cuda and found.shape == expected.shape
    torch.testing.assert_close(found.host.float(), expected, atol=0.02, rtol=0.01)


def test_torch_says_that_the_product_is_tanh_on_cuda_only() -> None:
    """In its own words: by which operators it would replace this one."""
    operator = torch.ops.aten._addmm_activation
    for device, approximate in (("cuda", "tanh"), ("cpu", "none")):
        with FakeTensorMode():
            given = [torch.empty(shape, device=device) for shape in ((8,), (3, 4), (4, 8))]
            graph = make_fx(lambda *args: operator(*args, use_gelu=True), get_decompositions([operator]))(*given)
        (node,) = [node for node in graph.graph.nodes if "gelu" in str(node.target)]
        assert node.kwargs.get("approximate", "none") == approximate


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_product_of_the_device(dtype: torch.dtype) -> None:
    """Nearer to the tanh approximation in fp64 than to the exact GELU, and than its type can tell."""
    generator = torch.Generator("cuda").manual_seed(0)
    projection = nn.Linear(3072, 12288, device="cuda", dtype=dtype)
    tokens = torch.randn(2, 500, 3072, generator=generator, device="cuda", dtype=dtype)
    with torch.no_grad():
        assert fused_gelu.fits(projection, tokens)
        found = fused_gelu.product(projection, tokens).double()
        wide = nn.functional.linear(tokens.double(), projection.weight.double(), projection.bias.double())
        tanh, exact = (nn.functional.gelu(wide, approximate=each) for each in ("tanh", "none"))
    assert (found - tanh).abs().max() <= 4 * torch.finfo(dtype).eps * tanh.abs().max()
    assert (found - tanh).abs().mean() < (found - exact).abs().mean()
