"""The command `spray` of an installation elsewhere, as its user has it: serving the demo model."""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from deploy.yaml_text import to_yaml

PATIENCE_S = 600


def environment(spray: Path) -> dict[str, str]:
    """Of somebody who has only this installation: neither the project nor its folder is on the path."""
    kept = {key: os.environ[key] for key in ("HOME", "TMPDIR", "OMP_NUM_THREADS") if key in os.environ}
    return kept | {"PATH": f"{spray.parent}:/usr/local/bin:/usr/bin:/bin"}


@contextlib.contextmanager
def serving(spray: Path, folder: Path) -> Iterator[str]:
    """Write the demo model and serve it on two ranks; the URL, as `spray serve` prints it.

    Args:
        spray: the command.
        folder: an empty one.
    """
    model, python = folder / "demo", spray.parent / "python"
    write = [python, "-m", "workers.demo_models", model, "--family", "qwen-image"]
    subprocess.run(write, cwd=folder, env=environment(spray), check=True, capture_output=True)
    demo = {"name": "demo", "source": str(model), "device": "cpu", "parallel": {"ulysses_degree": 2}}
    demo |= {"placement": {"cpus_per_rank": 0.1}, "defaults": {"width": 64, "height": 64, "num_inference_steps": 2}}
    file, said = folder / "demo.yaml", folder / "said"
    file.write_text(to_yaml({"models": [demo]}))
    with said.open("w") as log:
        process = subprocess.Popen(
            [spray, "serve", file, "--port", "0"], cwd=folder, env=environment(spray), stdout=log, stderr=log
        )
    try:
        yield _ready(process, said)
        process.terminate()
        assert process.wait(timeout=PATIENCE_S) == 0, said.read_text()
    finally:
        process.kill()
        process.wait()


def _ready(process: subprocess.Popen[bytes], said: Path) -> str:
    deadline = time.monotonic() + PATIENCE_S
    while not (found := re.search(r"^ready: curl (http://[\w.:]+)", said.read_text(), re.MULTILINE)):
        assert process.poll() is None and time.monotonic() < deadline, said.read_text()
        time.sleep(0.2)
    return found[1]
