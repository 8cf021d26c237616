"""The import law: four layers, imports point down only, third-party packages stay where they belong."""

import ast
import importlib.util
import os
import re
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
    "deploy": {"pydantic", "yaml", "safetensors", "huggingface_hub"}
    | {"grafana_foundation_sdk"},  # writes the dashboards, in deploy/grafana alone; only developers have it
    "workers": {"ray", "torch", "diffusers", "transformers", "accelerate", "safetensors", "tokenizers", "PIL", "av"}
    | {"huggingface_hub", "prometheus_client", "psutil", "greenlet", "opentelemetry"},
    "service": {
        "ray",
        "fastapi",
        "starlette",
        "uvicorn",
        "httpx",
        "pydantic",
        "typer",
        "rich",
        "PIL",
        "standardwebhooks",
        "obstore",
    }
    | {"grpc", "grpc_health", "grpc_status", "google", "sqlalchemy", "psycopg", "alembic"}
    | {"psutil"}  # the processes of a node that ends
    | {"yaml", "matplotlib"},  # of `spray bench`; the latter where present
}
"""Packages of others, by layer; the standard library besides."""

DIFFUSERS_IN_SP_CORE = ["sp_core/diffusers_private.py", "sp_core/verify/examples.py"]

OF_SP_CORE = {
    "deploy": {"sp_core.degrees", "sp_core.models.lookup", "sp_core.tp_plan"},
    "service": {
        "sp_core.degrees",
        "sp_core.planner.movement",
        "sp_core.planner.planner",
        "sp_core.planner.source",
        "sp_core.torchvision_operators",
        "sp_core.verify.verify",
    },
}
"""Layers for which sp_core is no more than this. Only `spray verify` and `spray plan` load `verify` and
`planner`, inside their functions: they bring torch."""

WITHOUT_TORCH = tuple(
    """
    deploy.spec deploy.load deploy.check deploy.schema deploy.memory
    workers.messages workers.gang.gang workers.gang.placement workers.model.files
    workers.gang.cost workers.gang.stats service.autoscaling service.routing
    service.api.bodies service.api.schemas service.api.rest service.app service.cli.main service.cli.doctor
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


@pytest.mark.parametrize("layer", LAYERS)
def test_package_maps_name_all_files(layer: str) -> None:
    """Those of generated code and of migrations name none; where there is a file per family or migration, not these."""
    for path in (ROOT / layer).rglob("__init__.py"):
        told = ast.get_docstring(ast.parse(path.read_text())) or ""
        if ".py" in told and "ne file per" not in told.partition("\n")[0]:
            files = {each.name for each in path.parent.glob("*.py")} - {"__init__.py", "__main__.py"}
            files |= {f"{each.parent.name}/" for each in path.parent.glob("*/__init__.py")}
            assert {name for name in files if not re.search(rf"(?<![\w.]){re.escape(name)}", told)} == set(), path


WITH_TORCH_AFTER = """
import importlib, sys
for name in sys.argv[1:]:
    importlib.import_module(name)
    if "torch" in sys.modules:
        sys.exit(f"{name} loads torch")
"""


def test_loads_without_torch() -> None:
    """One interpreter for all: the first that loads torch is named."""
    found = subprocess.run([sys.executable, "-c", WITH_TORCH_AFTER, *WITHOUT_TORCH], cwd=ROOT, capture_output=True)
    assert found.returncode == 0, found.stderr.decode()


CHANGED_BY_IMPORT = """
import importlib, os, signal, sys
from sp_core.torchvision_operators import declare_missing_operators
declare_missing_operators()
theirs, ours = (names.split(",") for names in sys.argv[1:])
for name in theirs:  # what other packages do at import is theirs
    importlib.import_module(name)

def state():
    return dict(os.environ), {number: signal.getsignal(number) for number in signal.valid_signals()}, list(sys.path)

for name in ours:
    before = state()
    importlib.import_module(name)
    if state() != before:
        print(name)
"""


def test_imports_change_nothing_of_the_process() -> None:
    """Neither environment nor signal handlers nor the path: an entry point does that, by an explicit call."""
    names = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in modules()]
    ours = [name.removesuffix(".__init__") for name in names if not name.endswith("__main__")]
    theirs = sorted({n for path in modules() for n in imports(path.read_text()) if installed(n)})
    command = [sys.executable, "-c", CHANGED_BY_IMPORT, ",".join(theirs), ",".join(ours)]
    clean = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR") if name in os.environ}  # not what tests set
    found = subprocess.run(command, cwd=ROOT, env=clean, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    assert found.stdout == ""


def installed(name: str) -> bool:
    """True for a module of another package that is there; flash-attn, say, is optional."""
    root = name.split(".")[0]
    return root not in LAYERS and root not in sys.stdlib_module_names and importlib.util.find_spec(root) is not None


def test_nothing_points_outside_the_project() -> None:
    """The project stands alone."""
    outside = "../" + "shared"
    files = [p for pattern in ("**/*.py", "*.md", "**/*.yaml", "Makefile") for p in ROOT.glob(pattern)]
    own = [p for p in files if ".venv" not in p.parts]
    assert [p for p in own if outside in p.read_text()] == []
