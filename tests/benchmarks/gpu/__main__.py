"""The command `python -m tests.benchmarks.gpu [PART] [--fake]`; see `tests/benchmarks/README.md`.

Each part is a process of its own, so that one that crashes or hangs costs only its own rows. This process loads no
torch: the wheels of `--wheels` are put where the parts find them before anything is imported.
"""

import argparse
import contextlib
import importlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator
from datetime import date
from pathlib import Path

from tests.benchmarks.gpu import machine
from tests.benchmarks.gpu.table import Table

PARTS = ("checks", "pipelines", "kernels", "steps", "serve")
ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "tests" / "benchmarks" / "results"

BUDGET_S = 400.0
"""After this a part begins no further row, if nothing else is asked for."""

GRACE_S = 70.0
"""For the row that is begun then; after that the part is ended."""


def main() -> int:
    """Run what was asked for; 1 where a row has failed."""
    parser = argparse.ArgumentParser(prog="make gpu", description="What has to be seen on a GPU.")
    parser.add_argument("part", nargs="?", choices=PARTS, help="without: all")
    parser.add_argument("--fake", action="store_true", help="on the CPU with small sizes")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the tables")
    parser.add_argument("--wheels", type=Path, help="folder with wheels of what this Python lacks")
    parser.add_argument("--only", default="", metavar="NAME", help="of the models of steps, those whose name has this")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="after which a part begins no further row")
    parser.add_argument("--without-ray", action="store_true", help="as where Ray is missing")
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)  # this is the process of a part
    asked = parser.parse_args()
    if asked.into:
        return _run_here(asked.part, asked.into, asked.fake, not asked.without_ray, asked.only, asked.seconds)
    if not asked.fake and not machine.cards():
        print("no GPU is here: nvidia-smi names none. FAKE=1 tries the script on the CPU", file=sys.stderr)
        return 2
    with _installed(asked.wheels) as path:
        return _run_parts(asked, path)


def _run_parts(asked: argparse.Namespace, path: list[str]) -> int:
    sys.path[:0] = path  # for the versions in the head
    name = "-".join([f"{date.today()}-gpu", *([asked.part] if asked.part else []), *(["fake"] if asked.fake else [])])
    asked.results.mkdir(parents=True, exist_ok=True)
    file = asked.results / f"{name}.md" if asked.fake else machine.free_file(asked.results, name)
    file.unlink(missing_ok=True)
    table = Table(file)
    table.say(machine.head(asked.part or "all parts", _command(asked), asked.fake))
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), *path, *_given_path()])}
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    failed = False
    for part in [asked.part] if asked.part else PARTS:
        command = [sys.executable, "-m", "tests.benchmarks.gpu", part, "--into", str(file)]
        command += [f"--{flag}" for flag in ("fake", "without-ray") if vars(asked)[flag.replace("-", "_")]]
        command += ["--only", asked.only] if asked.only else []
        command += ["--seconds", str(asked.seconds)]
        failed |= _run_part(part, command, environment, table, asked.seconds + GRACE_S)
    print(f"\n{file}")
    return int(failed)


def _run_part(part: str, command: list[str], environment: dict[str, str], table: Table, limit_s: float) -> bool:
    """Run a part in a process group of its own, and end the whole group; True if it failed."""
    began = time.monotonic()
    table.say(f"\n## {part}")
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(limit_s)
        said = "" if code in (0, 1) else f" It ended with exit code {code}: **failed**."
    except subprocess.TimeoutExpired:
        code, said = 1, f" It was ended after {limit_s:.0f} s: **failed**."
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    table.say(f"\n{part} took {time.monotonic() - began:.0f} s.{said}")
    return code != 0


def _run_here(part: str, file: Path, fake: bool, with_ray: bool, only: str, seconds: float) -> int:
    from tests.benchmarks.gpu.part import Part  # here: it loads torch, which must find the wheels' folder

    running = Part(Table(file), fake, time.monotonic() + seconds, with_ray, only)
    try:
        importlib.import_module(f"tests.benchmarks.gpu.{part}").run(running)
    except Exception as error:  # outside of any row
        traceback.print_exc()
        running.table.say(f"\nfailed: {type(error).__name__}: {error}")
        return 1
    return int(running.failures > 0)


@contextlib.contextmanager
def _installed(wheels: Path | None) -> Iterator[list[str]]:
    """Install wheels into a temporary folder, and nothing that they ask for; yield what to put on the path."""
    if wheels is None:
        yield []
        return
    files = sorted(str(wheel) for wheel in wheels.glob("*.whl"))
    if not files:
        raise SystemExit(f"{wheels} holds no wheel")
    with tempfile.TemporaryDirectory(prefix="spray-wheels-") as folder:
        install = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "--quiet",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--target",
            folder,
        ]
        subprocess.run([*install, *files], check=True)
        yield [folder]


def _given_path() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _command(asked: argparse.Namespace) -> str:
    given = {
        "PART": asked.part,
        "ONLY": asked.only,
        "SECONDS": asked.seconds != BUDGET_S and f"{asked.seconds:g}",
        "FAKE": asked.fake and "1",
    }
    given["WHEELS"] = asked.wheels and asked.wheels.name
    return " ".join(["make gpu", *(f"{name}={value}" for name, value in given.items() if value)])


if __name__ == "__main__":
    sys.exit(main())
