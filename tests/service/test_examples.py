"""Each example of service/README.md, run as it is written there, and compared with the answer that is shown."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from service.api.backend import Found
from service.api.rest import rest_app
from tests.support.backend import SMALL, FakeBackend, a_model
from tests.support.in_process import served

README = (Path(__file__).parents[2] / "service" / "README.md").read_text()
BLOCKS = [(match[1], match[2].strip()) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)]
CURLS = [i for i, (_, text) in enumerate(BLOCKS) if text.startswith("curl")]
PROGRAMS = [
    text for kind, text in BLOCKS if kind == "python" and "grpc" not in text
]  # for that: tests/live/test_grpc.py
AT = "http://127.0.0.1:8000"


class AsInTheReadme(FakeBackend):
    """Serves the models that the examples name."""

    def __init__(self) -> None:
        super().__init__()
        film = next(model for model in self._models if model.name == "film")
        self._models = [a_model("demo", defaults=SMALL), film]
        self.found = {"demo": self.found["film"], "film": self.found["film"]}

    async def find_requests(self) -> Found:
        """The one that is shown."""
        shown = next(text for kind, text in BLOCKS if kind == "json" and "silent_gateways" in text)
        return Found(json.loads(shown)["data"])

    async def cancel(self, request_id: str) -> bool:
        """It is."""
        return True


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path_factory.mktemp("outputs")))
        with served(rest_app(AsInTheReadme())) as url:
            yield url


def shape(value: Any) -> Any:
    """The keys of a JSON value, to the last object. Of a list, those of its first element."""
    if isinstance(value, dict):
        return {key: shape(inner) for key, inner in value.items()}
    return [shape(value[0])] if isinstance(value, list) and value and isinstance(value[0], dict) else None


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize("number", CURLS)
def test_curl(server: str, tmp_path: Path, number: int) -> None:
    command = BLOCKS[number][1].replace(AT, server)
    found = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, timeout=60)
    assert found.returncode == 0, found.stderr
    files = [file.read_bytes() for file in tmp_path.iterdir()]
    assert all(not file.startswith(b'{"error"') for file in files)
    kind, shown = BLOCKS[number + 1] if number + 1 < len(BLOCKS) else ("", "")
    if kind == "json" and "cluster" not in command:
        answer, expected = json.loads(found.stdout), json.loads(shown)
        assert shape(answer) == shape(expected)
        assert not expected.get("error") or answer == expected
    elif "-N" in command:
        assert found.stdout.endswith(b"data: [DONE]\n\n")
        assert re.findall(r"^event: .*", shown, re.M)[-1:] in (
            [],
            [found.stdout.decode().split("\n\n")[-3].split("\n")[0]],
        )
    elif "-D -" in command:
        names = [line.partition(":")[0] for line in shown.splitlines()[1:]]
        assert set(names) <= {line.partition(":")[0] for line in found.stdout.decode().splitlines()}
        assert files == [b"picture 7"]
    elif "-o" in command:
        assert len(files) == 1
        assert files[0]
    else:
        assert b'"error"' not in found.stdout


def test_there_are_examples() -> None:
    assert len(CURLS) >= 10
    assert len(PROGRAMS) == 3


@pytest.mark.parametrize("program", PROGRAMS)
def test_python(server: str, tmp_path: Path, program: str) -> None:
    command = [sys.executable, "-c", program.replace(AT, server)]
    found = subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120)
    assert found.returncode == 0, found.stderr
    (made,) = tmp_path.glob("cup.*")
    assert made.read_bytes() == b"picture 7"
