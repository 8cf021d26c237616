"""What measuring costs a step stays below its bar, on every layout that the benchmark has."""

import re
import subprocess
import sys

import pytest

from tests.benchmarks.observing import BAR_MS, LAYOUTS


@pytest.mark.processes
def test_measuring_costs_a_step_less_than_the_bar() -> None:
    command = [sys.executable, "-m", "tests.benchmarks.observing", "--rounds", "20"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr
    rows = re.findall(r"^\| `(.+?)` \| (\d+) \| ([\d.]+) \|", run.stdout, re.MULTILINE)
    assert [layout for layout, *_ in rows] == [str(layout) for layout in LAYOUTS]
    assert all(int(calls) > 100 and 0 < float(median) <= BAR_MS for _, calls, median in rows), run.stdout
