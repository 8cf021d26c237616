"""The Dockerfile's steps run in a bare environment elsewhere, and what they install serves the demo model.

Takes the packages from the registry that pip is set up for, so it needs a network, minutes, and gigabytes of disk. For
the variant without CUDA pip has PyPI alone, and the index that is given to it: PyTorch's, or where that cannot be
reached, one of this machine.
"""

import base64
import contextlib
import functools
import http.server
import os
import shutil
import socket
import subprocess
import sys
import threading
import venv
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.helm.test_image import ROOT, STEPS, is_in_context
from tests.support.installed import environment, serving

PYTORCH = "download.pytorch.org"

ELSEWHERE = ("PIP_FIND_LINKS", "PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_CONSTRAINT")
"""Where else pip may find packages."""

pytestmark = [pytest.mark.soak, pytest.mark.timeout(3600)]


def context(folder: Path) -> None:
    """Copy what an engine would be given."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for path in filter(is_in_context, listed.stdout.splitlines()):
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, folder / path)


class Engine:
    """Runs the steps of a Dockerfile in folders instead of images.

    Args:
        given: the context.
        root: stands for the root of both stages.
        arguments: of the build, by name.
    """

    def __init__(self, given: Path, root: Path, arguments: dict[str, str]) -> None:
        self.given, self.root, self.arguments = given, root, arguments
        self.source, self.python = root / "src", root / "python"
        self.environment = {key: os.environ[key] for key in ("HOME", "TMPDIR") if key in os.environ}
        self.environment |= {key: value for key, value in os.environ.items() if key.startswith("PIP_")}
        if arguments["VARIANT"] == "cpu":  # nothing but PyPI and the index that is given, as in an engine
            self.environment = {k: v for k, v in self.environment.items() if k not in ELSEWHERE}
            self.environment["PIP_CONFIG_FILE"] = os.devnull

    def base(self, _: str) -> None:
        """Begin with a Python that has nothing installed."""
        shutil.rmtree(self.python, ignore_errors=True)
        venv.create(self.python, with_pip=True)
        self.environment["PATH"] = f"{self.python / 'bin'}:/usr/bin:/bin"

    def arg(self, rest: str) -> None:
        """What is given, or the default."""
        name, _, default = rest.partition("=")
        self.environment[name] = self.arguments.get(name, default)

    def env(self, rest: str) -> None:
        self.environment |= dict(pair.split("=") for pair in rest.split())

    def copy(self, rest: str) -> None:
        *sources, target = rest.split()
        if sources[0] == "--from=build":
            assert target == "/usr/local"
            shutil.copytree(f"{self.root}{sources[1]}", self.python, symlinks=True, dirs_exist_ok=True)
            return
        for path in (self.given / source for source in sources):
            into = self.source / target
            if path.is_dir():
                shutil.copytree(path, into, dirs_exist_ok=True)
            else:
                into = into / path.name if target.endswith("/") else into
                into.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, into)

    def run(self, rest: str) -> None:
        """But for Debian's packages and users, which a folder has not."""
        if rest.startswith("apt-get"):
            return
        here = rest.replace("--prefix=/", f"--prefix={self.root}/")
        done = subprocess.run(
            ["sh", "-ec", here], cwd=self.source, env=self.environment, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{here}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"

    def build(self) -> None:
        """All steps in turn."""
        self.source.mkdir(parents=True)
        known = {"FROM": self.base, "ARG": self.arg, "ENV": self.env, "COPY": self.copy, "RUN": self.run}
        for word, rest in STEPS:
            assert word in (*known, "WORKDIR", "USER", "CMD"), f"{word} is new; say here what it does"
            if word in known:
                known[word](rest)


@pytest.fixture
def torch_index(tmp_path: Path) -> Iterator[dict[str, str]]:
    """The argument that names an index with torch for CPUs; none where PyTorch's own answers."""
    with contextlib.suppress(OSError):
        socket.getaddrinfo(PYTORCH, 443)
        yield {}
        return
    folder = tmp_path / "index" / "torch"
    folder.mkdir(parents=True)
    (pinned,) = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.startswith("torch=="))
    fetch = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", folder, f"{pinned}+cpu"]
    if subprocess.run(fetch, capture_output=True).returncode:
        pytest.skip(f"neither {PYTORCH} nor any other index that pip knows has {pinned}+cpu")
    (wheel,) = folder.iterdir()
    (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"TORCH_INDEX": f"http://127.0.0.1:{server.server_port}"}
        server.shutdown()


@pytest.mark.parametrize("variant", ["cuda", "cpu"])
def test_the_steps_install_what_serves_the_demo(tmp_path: Path, variant: str, request: pytest.FixtureRequest) -> None:
    given, used = tmp_path / "context", tmp_path / "used"
    context(given)
    index = request.getfixturevalue("torch_index") if variant == "cpu" else {}
    engine = Engine(given, tmp_path / "root", {"VARIANT": variant} | index)
    engine.build()
    used.mkdir()
    spray = engine.python / "bin" / "spray"
    where = "import service, torch; print(service.__file__, torch.__file__, torch.version.cuda)"
    found = subprocess.run(
        [spray.parent / "python", "-c", where],
        cwd=used,
        env=environment(spray),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.count(str(engine.python)) == 2
    if variant == "cpu":
        assert found.stdout.split()[-1] == "None"
        (packages,) = engine.python.glob("lib/python*/site-packages")
        assert not [*packages.glob("nvidia*")], "libraries of CUDA are in the variant without"
    with serving(spray, used) as url:
        body = {"model": "demo", "prompt": "a cup of coffee", "seed": 7}
        answer = httpx.post(f"{url}/v1/images/generations", json=body, timeout=300, trust_env=False)
        assert answer.status_code == 200, answer.text
        assert base64.b64decode(answer.json()["data"][0]["b64_json"]).startswith(b"\x89PNG")
