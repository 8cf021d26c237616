"""Values shared by the processes of a node, and what `workers.exporter` relies on inside prometheus_client.

What Prometheus reads from them is in `tests/live/test_metrics.py`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict

from workers.exporter import share_values


def run(work: str, **env: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", work], env=os.environ | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_values_are_shared_whatever_was_imported_before(tmp_path: Path) -> None:
    """The class of a value is looked up when a labeled child is made: `prometheus_client.values.ValueClass`."""
    work = """
import os
before = dict(os.environ)
import prometheus_client, workers.metrics, workers.exporter
assert dict(os.environ) == before
from workers.metrics import GangMetrics
unshared = GangMetrics("early", "0")
assert workers.exporter.share_values()
gang = GangMetrics("m", "0")
gang.lost()
gang.lost()
gang.backlog(1.5)
unshared.lost()
print(os.getpid())
"""
    pid = run(work, RAY_RAYLET_PID="1", SPRAY_METRICS_DIR=str(tmp_path)).strip()
    kinds = ("counter", "gauge_livemostrecent", "histogram")
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"{kind}_{pid}.db" for kind in kinds]
    counted = list(MmapedDict.read_all_values_from_file(str(tmp_path / f"counter_{pid}.db")))
    assert [(('"spray_gang_losses_total"' in key), value) for key, value, *_ in counted] == [(True, 2.0)]
    assert "early" not in counted[0][0]


def test_outside_ray_nothing_is_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_RAYLET_PID", raising=False)
    before, environment = values.ValueClass, dict(os.environ)
    assert share_values() is None
    assert values.ValueClass is before
    assert dict(os.environ) == environment


def test_gauges_of_an_ended_process_with_the_same_pid_go(tmp_path: Path) -> None:
    """Its counts stay: the new process continues them."""
    work = """
import os, pathlib, sys
folder = pathlib.Path(os.environ["SPRAY_METRICS_DIR"])
for kind in ("gauge_livesum", "gauge_livemostrecent", "counter"):
    (folder / f"{kind}_{os.getpid()}.db").touch()
(folder / "gauge_livesum_1.db").touch()
from workers.exporter import share_values
share_values()
print(os.getpid())
"""
    pid = run(work, RAY_RAYLET_PID="1", SPRAY_METRICS_DIR=str(tmp_path)).strip()
    assert sorted(file.name for file in tmp_path.iterdir()) == [f"counter_{pid}.db", "gauge_livesum_1.db"]


def test_files_of_values_can_be_read_added_to_and_closed(tmp_path: Path) -> None:
    file = MmapedDict(str(tmp_path / "counter_kept.db"))
    assert file.read_value("key")[0] == 0.0
    file.write_value("key", 2.5, 0.0)
    file.close()
    ((key, value, *_),) = MmapedDict.read_all_values_from_file(str(tmp_path / "counter_kept.db"))
    assert (key, value) == ("key", 2.5)
