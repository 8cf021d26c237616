"""What the Job runs that fetches weights ahead."""

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.conftest import OTHER
from tests.helm.chart import CHART


def prefetch(folder: Path, *models: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the script as the pod does."""
    code = (CHART / "files" / "prefetch.py").read_text()
    told = {"SPRAY_MODELS": json.dumps(models), "SPRAY_FOLDER": str(folder), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return subprocess.run(command, cwd=CHART.parent, env=os.environ | told, capture_output=True, text=True)


def test_every_model_is_fetched_whatever_becomes_of_the_others(hub: Path) -> None:
    there = {"name": "b", "source": "acme/demo", "revision": "v1"}
    done = prefetch(hub, {"name": "a", "source": "acme/other"}, there)
    assert done.returncode == 1
    assert "a: acme/other, revision main, cannot be fetched" in done.stderr
    assert f"acme/demo is at {hub}" in done.stdout and OTHER in done.stdout
    assert prefetch(hub, there).returncode == 0
