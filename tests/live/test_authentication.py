"""`spray deploy` at a cluster that asks for a token: it uses the operator's, wherever Ray would find it."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from service.rollout.cluster_folder import place

TOKEN = "an operator's token, as long as Ray wants"

HEAD = """
import sys
from service.rollout.environment import use_private_cluster
use_private_cluster()
import ray
from service.rollout.serve_client import start_ray
start_ray("127.0.0.1", sys.argv[1], {"cpu": 1, "cuda": 0}, 10**8)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""

LOOK = """
import sys
from service.rollout.environment import use_running_cluster
use_running_cluster()
import ray
from service.rollout.attach import attach
with attach(sys.argv[1]):
    print(ray.cluster_resources()["CPU"])
"""


def environment(home: Path, **variables: str) -> dict[str, str]:
    """Of an operator with this home, who has set nothing else for Ray."""
    return {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | {
        "HOME": str(home),
        **variables,
    }


@contextlib.contextmanager
def head(home: Path, mode: str) -> Iterator[str]:
    """The address of a cluster that authenticates in this mode."""
    variables = {"RAY_AUTH_MODE": mode, "RAY_AUTH_TOKEN": TOKEN}
    with tempfile.TemporaryDirectory(prefix="ray-", dir=place(), ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-c", HEAD, folder]
        with subprocess.Popen(
            command, env=environment(home, **variables), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        ) as running:
            assert running.stdout is not None and running.stdin is not None
            yield running.stdout.readline().strip()
            running.stdin.close()


def look(address: str, home: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", LOOK, address]
    return subprocess.run(command, env=environment(home, **variables), capture_output=True, text=True, timeout=120)


def with_token(home: Path) -> Path:
    """An operator's home with Ray's file of the token."""
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text(TOKEN)
    return home


def test_the_operators_token_opens(tmp_path: Path) -> None:
    with head(tmp_path, "token") as address:
        for found in (look(address, tmp_path, RAY_AUTH_TOKEN=TOKEN), look(address, with_token(tmp_path / "home"))):
            assert found.stdout == "1.0\n", found.stderr
        refused = look(address, tmp_path)
        assert refused.returncode == 1
        assert "no Ray cluster at" in refused.stderr.splitlines()[-1]
        assert "RAY_AUTH_TOKEN" in refused.stderr.splitlines()[-1]


def test_a_token_does_no_harm_where_nobody_asks_for_it(tmp_path: Path) -> None:
    with head(tmp_path, "disabled") as address:
        found = look(address, with_token(tmp_path / "home"))
        assert found.stdout == "1.0\n", found.stderr
