"""torchvision can be imported beside any build of torch, and only its two operators are declared for that."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from sp_core.torchvision_operators import OPERATORS, declare_missing_operators

DECLARES = "from sp_core.torchvision_operators import declare_missing_operators as d; d(); d(); "
DESCRIBES = 'import torch\nfor name in ("nms", "qnms"): torch.library.register_fake(f"torchvision::{name}")(print)\n'


def imported(path: Path, code: str) -> subprocess.CompletedProcess[str]:
    """A new process that has this folder first on its path."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(path), str(Path.cwd())])}
    return subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder with what torchvision is where its compiled operators cannot be loaded."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(DESCRIBES)
    (tmp_path / "torchvision" / "_C.so").write_bytes(b"no library")
    return tmp_path


def test_operators_that_cannot_be_loaded_are_declared(broken: Path) -> None:
    without = imported(broken, "import torchvision")
    assert "operator torchvision::nms does not exist" in without.stderr
    found = imported(broken, f"{DECLARES} import sys; assert 'torch' not in sys.modules; import torchvision")
    assert found.returncode == 0, found.stderr


def test_a_second_try_finds_them_declared(broken: Path) -> None:
    place = broken / "torchvision" / "__init__.py"
    place.write_text("import sys, torch\nif not hasattr(sys, 'tried'): sys.tried = 1; raise ImportError\n" + DESCRIBES)
    twice = "\ntry: import torchvision\nexcept ImportError: import torchvision"
    found = imported(broken, f"{DECLARES}{twice}")
    assert found.returncode == 0, found.stderr


def test_without_compiled_operators_they_are_declared(broken: Path) -> None:
    (broken / "torchvision" / "_C.so").unlink()
    found = imported(broken, f"{DECLARES} import torchvision")
    assert found.returncode == 0, found.stderr


def test_operators_that_can_be_loaded_are_left_alone(broken: Path) -> None:
    """A library that loads defines them itself, which can be done once."""
    library = next(Path(torch.__file__).parent.glob("lib/libtorch_global_deps.so"))
    (broken / "torchvision" / "_C.so").unlink()
    (broken / "torchvision" / "_C.so").symlink_to(library)
    found = imported(broken, f"{DECLARES} import torchvision")
    assert "operator torchvision::nms does not exist" in found.stderr


def test_these_are_all_that_torchvision_describes() -> None:
    place = find_spec("torchvision")
    if place is None or place.origin is None:
        pytest.skip("torchvision is not installed")
    described = Path(place.origin).with_name("_meta_registrations.py").read_text()
    assert set(re.findall(r'register_fake\("torchvision::(\w+)"', described)) == OPERATORS.keys()


def test_torchvision_itself_scales_a_picture() -> None:
    declare_missing_operators()
    functional = pytest.importorskip("torchvision.transforms.v2.functional")
    scaled = functional.resize(torch.arange(256.0).reshape(1, 16, 16), [8, 8], antialias=True)
    assert scaled.shape == (1, 8, 8) and scaled.mean() == pytest.approx(127.5, abs=0.1)
