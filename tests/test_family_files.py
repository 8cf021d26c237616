"""One place per fact of a family: a plan, and with it either an adapter and facts, or a demo model of the classic call.

No code outside these rooms names a family.
"""

import ast
import functools
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from deploy.families import lookup as deployed
from sp_core.models import lookup as planned
from workers.model.adapters.classic import ClassicAdapter
from workers.model.adapters.lookup import find_adapter
from workers.model.adapters.pipeline_adapter import PipelineAdapter

ROOT = Path(__file__).resolve().parent.parent
ROOMS = {
    "plans": "sp_core/models",
    "planned": "sp_core/models/planned",
    "facts": "deploy/families",
    "adapters": "workers/model/adapters",
    "demos": "workers/demo_models/classic",
}
NOT_FAMILIES = {
    "__init__",
    "as_flux",
    "as_wan",
    "family",
    "lookup",
    "no_plan",
    "pipeline_adapter",
    "pipeline_source",
    "schedulers",
    "source_patterns",
    "vaes",
    deployed.CLASSIC,
}
CODE = [path for layer in ("sp_core", "deploy", "workers", "service") for path in sorted((ROOT / layer).rglob("*.py"))]


def files(room: str) -> set[str]:
    return {path.stem for path in (ROOT / ROOMS[room]).glob("*.py")} - NOT_FAMILIES


def test_a_served_family_is_three_files_of_one_name() -> None:
    assert files("adapters") == files("facts") == set(deployed.families())
    assert files("adapters") <= files("plans"), "an adapter without a plan"


def test_a_family_of_the_classic_call_is_its_plan_and_a_demo_model(demo_models: dict[str, Path]) -> None:
    assert files("demos") <= files("plans") | files("planned"), "a demo model without a plan"
    assert not files("demos") & files("adapters")
    called = {name for name, found in planned.files().items() if any(plan.pipelines for plan in found)}
    assert files("demos") == called - files("adapters")
    folder = demo_models["chroma"]
    assert deployed.family_name(folder) == deployed.CLASSIC
    assert type(find_adapter(folder)) is ClassicAdapter


@pytest.mark.parametrize("name", sorted(files("adapters")))
def test_each_file_has_its_part(name: str, demo_models: dict[str, Path]) -> None:
    adapter = importlib.import_module(f"workers.model.adapters.{name}")
    folder = demo_models[name.replace("_", "-")]
    assert issubclass(adapter.ADAPTER, PipelineAdapter)
    assert type(find_adapter(folder)) is adapter.ADAPTER
    family = deployed.families()[name]
    assert deployed.find_family(folder) is family
    assert all(planned.find_family([kind]) is not None for kind in family.forward_bytes)


def words(text: str) -> list[str]:
    """The words of an identifier or a text, whether CamelCase or snake_case."""
    return [word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+", text)]


@functools.cache
def any_family() -> re.Pattern[str]:
    """Finds the name of a family, or of a transformer class, among words."""
    stems = {" ".join(words(stem)) for stem in files("plans")}
    classes = {" ".join(words(name)) for family in planned.families() for name in family.transformer_classes}
    return re.compile(rf"\b({'|'.join(map(re.escape, stems | classes))})\b")


def names_a_family(text: str) -> bool:
    return any_family().search(" ".join(words(text))) is not None


def said(source: str) -> Iterator[tuple[int, str]]:
    """Names and texts of a module, with their lines; docstrings and comments are prose and may name families."""
    tree = ast.parse(source)
    prose = {
        id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            yield node.lineno, node.value
        elif isinstance(node, ast.Name):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.ImportFrom | ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
            yield node.lineno, getattr(node, "module", "") or ""


def offences(source: str) -> list[str]:
    return [f"line {line}: {text[:60]}" for line, text in said(source) if names_a_family(text)]


@pytest.mark.parametrize(
    "path",
    [path for path in CODE if not str(path.relative_to(ROOT)).startswith(tuple(ROOMS.values()))],
    ids=lambda path: str(path.relative_to(ROOT)),
)
def test_no_other_code_names_a_family(path: Path) -> None:
    assert not offences(path.read_text())


@pytest.mark.parametrize(
    "source",
    [
        "from sp_core.models.wan import WAN",
        "if kind == 'FluxTransformer2DModel': pass",
        "class QwenImageThing: pass",
        "x = z_image",
        "KNOWN = {'SD3Transformer2DModel'}",
        "def helios(): pass",
    ],
)
def test_the_law_sees_offences(source: str) -> None:
    assert offences(source)
    assert not offences('"""Wan does so."""\nwanted = 1  # as Flux')
