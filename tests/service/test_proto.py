"""The gRPC contract: its generated code is fresh, and buf finds nothing to say about it."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CONTRACT = "service/proto/mediagen/v1/generation_service.proto"
BUF = Path(sys.executable).parent / "buf"


def generate(root: Path, out: Path) -> None:
    """As `make proto` does."""
    to = [f"--{kind}_out={out}" for kind in ("python", "pyi", "grpc_python")]
    subprocess.run([sys.executable, "-m", "grpc_tools.protoc", f"-I{root}", *to, CONTRACT], cwd=root, check=True)


def test_the_generated_code_is_that_of_the_contract(tmp_path: Path) -> None:
    generate(ROOT, tmp_path)
    made = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*.py*"))
    kept = sorted(path.relative_to(ROOT) for path in (ROOT / "service/proto").rglob("*_pb2*") if path.suffix != ".pyc")
    assert made == kept
    for path in made:
        assert (tmp_path / path).read_text() == (ROOT / path).read_text(), f"{path} is stale: run `make proto`"


def test_the_makefile_generates_the_same_way() -> None:
    recipe = (ROOT / "Makefile").read_text().partition("\nproto:")[2].partition("\n\n")[0]
    assert "-I . --python_out=. --pyi_out=. --grpc_python_out=." in recipe
    assert CONTRACT in recipe


@pytest.mark.parametrize("spoiled", ["", "enum Bad { ZERO = 0; }", "message bad {}"])
def test_buf_accepts_the_contract(tmp_path: Path, spoiled: str) -> None:
    proto = tmp_path / "mediagen" / "v1" / "generation_service.proto"
    proto.parent.mkdir(parents=True)
    proto.write_text((ROOT / CONTRACT).read_text() + spoiled)
    (tmp_path / "buf.yaml").write_text((ROOT / "service/proto/buf.yaml").read_text())
    linted = subprocess.run([BUF, "lint", str(tmp_path)], capture_output=True, text=True)
    assert bool(linted.returncode) == bool(spoiled), linted.stdout + linted.stderr
    if not spoiled:
        formatted = subprocess.run([BUF, "format", "--diff", "--exit-code", str(tmp_path)], capture_output=True)
        assert formatted.returncode == 0, formatted.stdout.decode()
