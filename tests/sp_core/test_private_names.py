"""Private names of torch and diffusers: used in one file each, and still there in the installed releases."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import QwenImageTransformer2DModel
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

from sp_core import diffusers_private, torch_private
from tests.support import qwen

SP_CORE = Path(diffusers_private.__file__).parent
ROOMS = {"diffusers_private.py", "torch_private.py"}

NOT_PRIVATE = {"_sp_plan", "_sp_example", "_class_name", "_make"}
"""Ours to read on other people's models, in diffusers' config files, and documented for named tuples."""


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__") and name.isidentifier()


def used(tree: ast.AST) -> Iterator[str]:
    """Private names that are read from other objects, by attribute, by getattr and the like, or imported."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            yield from (a.value for a in node.args[1:2] if isinstance(a, ast.Constant) and isinstance(a.value, str))
        elif isinstance(node, ast.ImportFrom | ast.Import):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                yield from [*module.split("."), *alias.name.split(".")]


def defined(tree: ast.AST) -> Iterator[str]:
    """Names that a file makes itself: functions, classes, variables, and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr if isinstance(node.value, ast.Name) and node.value.id == "self" else ""


def foreign(path: Path) -> set[str]:
    tree = ast.parse(path.read_text())
    return {name for name in used(tree) if is_private(name)} - set(defined(tree)) - NOT_PRIVATE


def test_private_names_are_used_in_one_file_each() -> None:
    found = {str(path.relative_to(SP_CORE)): foreign(path) for path in SP_CORE.rglob("*.py")}
    assert {path: names for path, names in found.items() if names and path not in ROOMS} == {}
    assert all(found[room] for room in ROOMS)


@pytest.mark.parametrize(
    ("source", "names"),
    [
        ("from torch.distributed import _functional_collectives", {"_functional_collectives"}),
        ("import torch._dynamo as d", {"_dynamo"}),
        ("x = mask._version", {"_version"}),
        ("x = getattr(model, '_cp_plan', None)", {"_cp_plan"}),
        ("def _f(self): self._a = self._a + _f()", set()),
    ],
)
def test_what_counts_as_a_private_name(tmp_path: Path, source: str, names: set[str]) -> None:
    (tmp_path / "file.py").write_text(source)
    assert foreign(tmp_path / "file.py") == names


def test_diffusers_still_has_the_table_of_backends() -> None:
    name, function = _AttentionBackendRegistry.get_active_backend()
    assert _AttentionBackendRegistry._backends[name] is function
    native = AttentionBackendName.NATIVE
    assert {"query", "attn_mask", "scale"} <= set(_AttentionBackendRegistry._supported_arg_names[native])
    for call in (_AttentionBackendRegistry.register, _AttentionBackendRegistry.set_active_backend):
        assert callable(call)
    passed = set(inspect.signature(_AttentionBackendRegistry._backends[native]).parameters)
    assert passed <= set(inspect.signature(diffusers_private._dispatch).parameters)


def test_diffusers_still_has_the_attributes() -> None:
    model = qwen.transformer()
    processors = [module.processor for module in model.modules() if hasattr(module, "processor")]
    assert len(processors) == 2
    assert all(processor._parallel_config is None for processor in processors)
    assert all(processor._attention_backend is None for processor in processors)
    assert diffusers_private.context_parallel_plan(model) == QwenImageTransformer2DModel._cp_plan
    assert hasattr(QwenImageTransformer2DModel, "_tp_plan")
    guider = ClassifierFreeGuidance()
    assert guider._count_prepared == 0
    diffusers_private.set_branch(guider, 1)
    guider.prepare_models(model)
    assert guider._count_prepared == 2


def test_torch_still_has_its_private_functions() -> None:
    query = torch.rand(1, 2, 3, 8)
    output, lse = torch_private.flash_cpu(query, query, query, 0.0, False, attn_mask=None, scale=None)
    assert (output.shape, lse.shape) == (query.shape, query.shape[:3])
    for kernel, arguments in (
        (torch_private.flash_cuda, ["query", "key", "value", "dropout_p", "is_causal", "return_debug_mask"]),
        (torch_private.cudnn_cuda, ["query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p"]),
        (torch_private.efficient_cuda, ["query", "key", "value", "attn_bias", "compute_log_sumexp", "dropout_p"]),
    ):
        assert [argument.name for argument in kernel.default._schema.arguments][:6] == arguments
        assert "scale" in [argument.name for argument in kernel.default._schema.arguments]


def test_a_version_counts_writes() -> None:
    mask = torch.zeros(3)
    before = torch_private.version(mask)
    mask[0] = 1
    assert torch_private.version(mask) != before
    with torch.inference_mode():
        assert torch_private.version(torch.zeros(3)) is None
