"""The import law: four layers, imports point down only, third-party packages stay where they belong."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LAYERS = ("sp_core", "deploy", "workers", "service")
"""Low to high."""

ALLOWED = {
    "sp_core": {"torch", "diffusers", "flash_attn", "flash_attn_interface"},  # the latter two where present
    "deploy": {"pydantic", "yaml"},
    "workers": {"ray", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "PIL", "av"}
    | {"huggingface_hub", "prometheus_client"},
    "service": {"ray", "fastapi", "starlette", "httpx", "pydantic", "typer", "rich"},
}
"""Packages of others, by layer; the standard library besides."""

DIFFUSERS_IN_SP_CORE = ["sp_core/attention/diffusers_backend.py", "sp_core/verify/examples.py"]

OF_SP_CORE = {"deploy": {"sp_core.degrees"}, "service": {"sp_core.degrees", "sp_core.verify.verify"}}
"""Layers for which sp_core is no more than this. The command line loads `verify` by name, since it brings torch."""

WITHOUT_TORCH = tuple(
    """
    deploy.spec deploy.load deploy.check deploy.schema deploy.memory
    workers.messages workers.gang.gang workers.gang.placement workers.model.files
    workers.gang.cost workers.gang.stats service.autoscaling service.routing
    service.api.schemas service.api.rest service.app service.cli.main service.cli.doctor
    """.split()
)


def modules() -> list[Path]:
    return sorted(path for layer in LAYERS for path in (ROOT / layer).rglob("*.py"))


def imports(source: str) -> Iterator[str]:
    """Dotted names of everything that a module imports, in functions and by name too; relative imports as '.'."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." if node.level else str(node.module)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from (a.value for a in node.args[:1] if isinstance(a, ast.Constant))  # else a user's own module


def offences(layer: str, source: str) -> set[str]:
    below = set(LAYERS[: LAYERS.index(layer) + 1])
    allowed = below | ALLOWED[layer] | sys.stdlib_module_names
    found = {name for name in imports(source) if name.split(".")[0] not in allowed}
    if layer in OF_SP_CORE:
        found |= {name for name in imports(source) if name.startswith("sp_core")} - OF_SP_CORE[layer]
    return found


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path) -> None:
    assert not offences(path.relative_to(ROOT).parts[0], path.read_text())


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("sp_core", "import ray"),
        ("sp_core", "def f():\n    from workers import gang"),
        ("deploy", "import torch.nn"),
        ("deploy", "from sp_core.mesh import ParallelMesh"),
        ("workers", "from service.gateway import Gateway"),
        ("service", "import diffusers"),
        ("service", "from . import gateway"),
        ("sp_core", "import importlib\nimportlib.import_module('service.gateway')"),
        ("deploy", "import httpx"),
        ("workers", "from tests import ranks"),
    ],
)
def test_the_law_sees_offences(layer: str, source: str) -> None:
    assert offences(layer, source)


def test_diffusers_is_in_two_files_of_sp_core() -> None:
    users = [
        p for p in (ROOT / "sp_core").rglob("*.py") if any(n.startswith("diffusers") for n in imports(p.read_text()))
    ]
    assert [str(path.relative_to(ROOT)) for path in users] == DIFFUSERS_IN_SP_CORE


@pytest.mark.parametrize("layer", LAYERS)
def test_package_maps_import_nothing(layer: str) -> None:
    for path in (ROOT / layer).rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_loads_without_torch(module: str) -> None:
    check = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], cwd=ROOT).returncode == 0


def test_nothing_points_outside_the_project() -> None:
    """The project stands alone."""
    outside = "../" + "shared"
    files = [p for pattern in ("**/*.py", "*.md", "**/*.yaml", "Makefile") for p in ROOT.glob(pattern)]
    own = [p for p in files if ".venv" not in p.parts]
    assert [p for p in own if outside in p.read_text()] == []
