"""What Ray finds in the environment: what an entry point has set by an explicit call, or what the operator has set."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from service.cli.doctor import Machine
from service.rollout.environment import LOOPBACK_SWITCH, PRIVATE_CLUSTER, PRIVATE_CLUSTER_DEFAULTS

ROOT = Path(__file__).resolve().parents[2]

AT_RAYS_IMPORT = """
import json, os, sys

def look(event, arguments):
    if event == "import" and arguments[0] == "ray":
        read = {name: value for name, value in os.environ.items() if name.startswith(("RAY_", "MALLOC_"))}
        print(json.dumps(read), flush=True)
        os._exit(0)

sys.addaudithook(look)
from service.cli.main import main
sys.exit(main(sys.argv[1:]))
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Of an operator with this home, who has set nothing else for Ray."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MALLOC_"))}
    return kept | {"HOME": str(home), **variables}


def at_rays_import(home: Path, command: str, **variables: str) -> dict[str, str]:
    """The variables that Ray reads in a command."""
    file = home / "a.yaml"
    file.write_text("models: [{name: a, source: org/a, device: cpu}]")
    arguments = [command, str(file), *(["--address", "127.0.0.1:1"] if command == "deploy" else [])]
    run = subprocess.run(
        [sys.executable, "-c", AT_RAYS_IMPORT, *arguments],
        env=environment(home, **variables), cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    found: dict[str, str] = json.loads(run.stdout)
    return found


@pytest.mark.parametrize(
    ("given", "file", "mode"),
    [
        ({}, False, None),
        ({}, True, "token"),
        ({"RAY_AUTH_TOKEN": "t"}, False, "token"),
        ({"RAY_AUTH_TOKEN_PATH": "/t"}, False, "token"),
        ({"RAY_AUTH_MODE": "token"}, False, "token"),
        ({"RAY_AUTH_MODE": "disabled"}, True, "disabled"),
    ],
)
def test_deploy_connects_as_the_operator(given: dict[str, str], file: bool, mode: str | None, tmp_path: Path) -> None:
    if file:
        (tmp_path / ".ray").mkdir()
        (tmp_path / ".ray" / "auth_token").write_text("t")
    expected = LOOPBACK_SWITCH | given | ({"RAY_AUTH_MODE": mode} if mode else {})
    assert at_rays_import(tmp_path, "deploy", **given) == expected


def test_serve_prepares_a_cluster_of_its_own(tmp_path: Path) -> None:
    found = at_rays_import(tmp_path, "serve")
    token = found.pop("RAY_AUTH_TOKEN")
    assert (found, len(token)) == (PRIVATE_CLUSTER | PRIVATE_CLUSTER_DEFAULTS, 64)
    assert at_rays_import(tmp_path, "serve")["RAY_AUTH_TOKEN"] != token
    assert "RAY_AUTH_TOKEN" not in at_rays_import(tmp_path, "serve", RAY_AUTH_MODE="disabled")
    given = at_rays_import(tmp_path, "serve", RAY_AUTH_TOKEN_PATH="/t")
    assert (given["RAY_AUTH_TOKEN_PATH"], "RAY_AUTH_TOKEN" in given) == ("/t", False)
    mode = at_rays_import(tmp_path, "serve", RAY_AUTH_MODE="token", RAY_USAGE_STATS_ENABLED="1")
    assert (mode["RAY_AUTH_MODE"], mode["RAY_USAGE_STATS_ENABLED"]) == ("token", "0")


def test_the_doctor_reads_the_environment_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "something")
    assert Machine().environment == dict(os.environ)


@pytest.mark.parametrize("command", [["schema"], ["check", "--help"], ["--help"], ["generate", "--help"]])
def test_commands_that_need_no_ray_do_not_load_it(command: list[str]) -> None:
    code = "import sys\nfrom service.cli.main import main\nmain(sys.argv[1:])\nsys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True).returncode == 0
