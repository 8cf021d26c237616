"""The wheel carries what the code reads: it is built, installed in an empty environment, and used elsewhere."""

import json
import os
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("sp_core", "deploy", "workers", "service")

SITE = Path(next(path for path in sys.path if path.endswith("site-packages")))
"""Where what spray depends on is installed."""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy, for a build leaves files beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_bytes((ROOT / path).read_bytes())
    into = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", into, source]
    subprocess.run(build, check=True, capture_output=True)
    (made,) = into.glob("spray-*.whl")
    return made


@pytest.fixture(scope="module")
def spray(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The command, in an environment that has the wheel, and beside it what spray depends on."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    install = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", wheel]
    subprocess.run(install, check=True, capture_output=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{SITE}\n")  # a path, so that the .pth files in it are not read
    return folder / "bin" / "spray"


def tracked() -> list[str]:
    """The files of the packages that are part of the project, and what a build reads besides."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard", *PACKAGES, "pyproject.toml", "README.md", "LICENSE"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return listed.stdout.splitlines()


def run(spray: Path, folder: Path, *arguments: str) -> str:
    """What a command prints, where neither the project nor its folder is on the path."""
    environment = {key: os.environ[key] for key in ("PATH", "HOME", "TMPDIR") if key in os.environ}
    done = subprocess.run([spray, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_it_has_every_file_of_the_packages_but_their_documents_and_the_dockerfile(wheel: Path) -> None:
    wanted = {path for path in tracked() if path.split("/")[0] in PACKAGES and not path.endswith("README.md")}
    wanted -= {path for path in wanted if path.startswith(("deploy/docker/",)) or path.endswith("_test.yml")}
    assert wanted <= set(ZipFile(wheel).namelist()), wanted - set(ZipFile(wheel).namelist())
    assert not [name for name in ZipFile(wheel).namelist() if name.startswith(("tests/", "helm/"))]


def test_check_works_elsewhere(spray: Path, tmp_path: Path) -> None:
    where = "import deploy, service; print(deploy.__file__, service.__file__)"
    python = spray.parent / "python"
    found = subprocess.run([python, "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert str(ROOT) not in found and found.count(str(spray.parents[1])) == 2
    shipped = Path(found.split()[0]).parent / "qwen-image.yaml"
    assert "qwen-image" in run(spray, tmp_path, "check", str(shipped), "--gpus", "8", "--cpus", "64")
    assert json.loads(run(spray, tmp_path, "schema"))["properties"]["models"]


@pytest.fixture
def server() -> Iterator[str]:
    """Answers /v1/models as a gateway does that serves nothing yet."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps({"object": "list", "data": []}).encode()
            self.send_response(200 if self.path.startswith("/v1/models") else 404)
            self.send_header("content-type", "application/json")
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    listening = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=listening.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{listening.server_port}"
    listening.shutdown()
    listening.server_close()


def test_models_works_elsewhere(spray: Path, server: str, tmp_path: Path) -> None:
    assert json.loads(run(spray, tmp_path, "models", "--json", "--server", server))["data"] == []
    rows = json.loads(run(spray, tmp_path, "models", "--supported", "--json"))["pipelines"]
    assert {"served", "refused"} == {row["status"] for row in rows}


def test_the_contract_can_be_read_elsewhere(spray: Path, tmp_path: Path) -> None:
    """What the pods of `helm test` import."""
    code = "from service.proto.mediagen.v1 import generation_service_pb2_grpc as g; print(g.MediaGenerationServiceStub)"
    python = spray.parent / "python"
    subprocess.run([python, "-c", code], cwd=tmp_path, check=True, capture_output=True)
