"""Values shared by the processes of a node, and what `workers.exporter` relies on inside prometheus_client.

What Prometheus reads of them is in `tests/live/test_metrics.py` and `test_looking_inside.py`.
"""

import ast
import contextlib
import itertools
import math
import os
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict, mmap_key

from workers import exporter
from workers.exporter import NOTE, Exporter, NodeCollector, share_values


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
import signal
before = dict(os.environ)
import prometheus_client, workers.metrics, workers.exporter
assert dict(os.environ) == before
from workers.observing import GangMetrics
unshared = GangMetrics("early", "0")
assert workers.exporter.share_values()
gang = GangMetrics("m", "0")
gang.lost("died")
gang.lost("died")
gang.now(1.5, True, 7.0)
unshared.lost("died")
print(os.getpid())
"""
    pid = run(work, RAY_RAYLET_PID="1", SPRAY_METRICS_DIR=str(tmp_path)).strip()
    kinds = ("counter", "gauge_livemostrecent", "gauge_livesum")
    assert sorted(file.name for file in tmp_path.glob("*.db")) == [f"{kind}_{pid}.db" for kind in kinds]
    counted = list(MmapedDict.read_all_values_from_file(str(tmp_path / f"counter_{pid}.db")))
    assert all('"spray_gang_restarts_total"' in key and "early" not in key for key, *_ in counted)
    assert [value for key, value, *_ in counted if '"died"' in key] == [2.0]
    assert sum(value for _, value, *_ in counted) == 2


@pytest.mark.parametrize("given", ["TMPDIR", ""])
def test_a_models_processes_share_the_nodes_folder_wherever_their_own_files_go(tmp_path: Path, given: str) -> None:
    """The node's is that of its raylet, of which all of its processes are children."""
    node, own = tmp_path / "node", tmp_path / "own"
    node.mkdir(), own.mkdir()
    environment = {name: value for name, value in os.environ.items() if name != "TMPDIR"}
    raylet = subprocess.Popen(["sleep", "60"], env=environment | ({given: str(node)} if given else {}))
    try:
        work = "import workers.exporter; print(workers.exporter.share_values())"
        said = run(work, RAY_RAYLET_PID=str(raylet.pid), TMPDIR=str(own)).strip()
        assert said == f"{node if given else '/tmp'}/spray-metrics-{raylet.pid}"
    finally:
        raylet.kill(), raylet.wait()
        if not given:
            shutil.rmtree(f"/tmp/spray-metrics-{raylet.pid}", ignore_errors=True)


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
from workers import exporter
exporter.watch_disk = lambda *_: None  # else its thread makes a gauge again
exporter.share_values()
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


ENDED = 4194300
"""A pid that no process has."""


def count(folder: Path, process: int | str, value: float, name: str = "spray_x") -> Path:
    """The file of a process that has counted."""
    file = folder / f"counter_{process}.db"
    values_of_process = MmapedDict(str(file))
    values_of_process.write_value(mmap_key(name, f"{name}_total", [], [], "help"), value, 0.0)
    values_of_process.close()
    return file


def total(collector: NodeCollector, name: str = "spray_x") -> float:
    """What a scrape says."""
    samples = [sample for metric in collector.collect() for sample in metric.samples]
    return sum(sample.value for sample in samples if sample.name == f"{name}_total")


def test_counts_of_ended_processes_are_kept_once(tmp_path: Path) -> None:
    collector = NodeCollector(tmp_path)
    count(tmp_path, os.getpid(), 1)
    for more in range(1, 4):
        count(tmp_path, ENDED, 10)
        assert [total(collector) for _ in range(3)] == [10 * more + 1] * 3
    assert sorted(file.name for file in tmp_path.glob("*.db")) == [f"counter_{os.getpid()}.db", "counter_kept.db"]


@pytest.mark.parametrize("port", [None, 1])
def test_counts_of_ended_processes_are_kept_once_though_nobody_asks(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, port: int | None
) -> None:
    monkeypatch.setattr(exporter, "FOLD_PERIOD_S", 0.05)
    process = Exporter(tmp_path)
    process.serve_at("127.0.0.1", port)  # nowhere, or where it may not listen
    try:
        for _ in range(2):
            ended = count(tmp_path, ENDED, 10)
            deadline = time.monotonic() + 10
            while ended.exists() and time.monotonic() < deadline:
                time.sleep(0.05)
            assert not ended.exists()
    finally:
        process.serve_at("127.0.0.1", None)
    assert total(NodeCollector(tmp_path)) == 20


def empty(file: Path) -> None:
    file.write_bytes(b"")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:60])


def scribble(file: Path) -> None:
    """A length that leads backwards: a reader that trusts it does not end."""
    file.write_bytes(struct.pack("ii", 4096, 0) + struct.pack("i", -24) * 100)


def garble(file: Path) -> None:
    file.write_bytes(file.read_bytes().replace(b"[", b"{"))


@pytest.mark.parametrize("damage", [empty, cut, scribble, garble])
@pytest.mark.parametrize("process", [ENDED, ENDED - 1, "kept"])
def test_a_damaged_file_is_set_aside(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], None], process: int | str
) -> None:
    collector = NodeCollector(tmp_path)
    count(tmp_path, os.getpid(), 1)
    count(tmp_path, ENDED - 1, 2)
    assert total(collector) == 3
    damaged = count(tmp_path, process, 10)
    count(tmp_path, ENDED - 2, 4)
    damage(damaged)
    caplog.clear()
    kept = 0 if process == "kept" else 2
    assert [total(collector) for _ in range(3)] == [1 + kept + 4] * 3
    assert damaged.with_suffix(".damaged").exists()
    assert [record.message for record in caplog.records if damaged.name in record.message] == [caplog.messages[0]]


@pytest.mark.parametrize("name", ["counter_abc.db", "counter_.db", "x.db", "gauge_5.db", "counter_0.db", "_1.db"])
def test_a_name_that_tells_no_process_is_set_aside(tmp_path: Path, name: str) -> None:
    count(tmp_path, os.getpid(), 1)
    (tmp_path / name).write_bytes(b"?")
    assert total(NodeCollector(tmp_path)) == 1
    assert not (tmp_path / name).exists()


def test_a_number_that_is_no_pid_has_ended(tmp_path: Path) -> None:
    count(tmp_path, 10**20, 5)
    assert total(NodeCollector(tmp_path)) == 5


def test_a_file_that_a_running_process_has_just_made_stays(tmp_path: Path) -> None:
    file = tmp_path / f"counter_{os.getpid()}.db"
    file.touch()
    assert total(NodeCollector(tmp_path)) == 0
    assert file.exists()


@pytest.mark.parametrize("struck", ["replace", "unlink"])
@pytest.mark.parametrize("call", range(4))
def test_an_exporter_that_is_killed_counts_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, struck: str, call: int
) -> None:
    """Struck at each of its changes to the folder in turn; the next scrape has all counts, once."""
    for process, value in ((ENDED, 1), (ENDED - 1, 2)):
        count(tmp_path, process, value)
    assert total(NodeCollector(tmp_path)) == 3
    for process, value in ((ENDED, 4), (ENDED - 1, 8)):
        count(tmp_path, process, value)
    sound, calls = getattr(Path, struck), itertools.count()

    def strike(self: Path, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise KeyboardInterrupt
        return sound(self, *args, **kwargs)

    with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt):
        patch.setattr(Path, struck, strike)
        NodeCollector(tmp_path).collect()
    assert [total(NodeCollector(tmp_path)) for _ in range(2)] == [15, 15]


def test_a_damaged_note_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    count(tmp_path, os.getpid(), 3)
    for content in ("", "{}", "[1]", '{"kept": 1, "inode": 2, "ended": []}'):
        (tmp_path / NOTE).write_text(content)
        assert total(NodeCollector(tmp_path)) == 3
        assert not (tmp_path / NOTE).exists()
    assert "is damaged; it is set aside" in caplog.text


def test_a_deleted_folder_is_made_again(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    collector = NodeCollector(tmp_path / "metrics")
    assert [total(collector) for _ in range(2)] == [0, 0]
    assert [record.message for record in caplog.records if "was deleted" in record.message] == [caplog.messages[0]]
    count(tmp_path / "metrics", os.getpid(), 1)
    assert total(collector) == 1


def test_a_gauge_that_has_ended_is_not_exported(tmp_path: Path) -> None:
    work = """
from workers.exporter import NodeCollector, share_values
from workers.observing import GangMetrics, GatewayMetrics
folder = share_values()
old, new = GangMetrics("m", "1"), GangMetrics("m", "0")
for gang in (old, new):
    gang.now(5.0, True, 7.0)
old.end()
removed = GatewayMetrics("removed", ["ok"])
removed.began()
removed.serve(False)
def told():
    return sorted((sample.name, *sample.labels.values(), sample.value) for metric in NodeCollector(folder).collect()
                  for sample in metric.samples if metric.type == "gauge" and "disk" not in metric.name)
print(told())
removed.ended("ok")
print(told())
removed.serve(True)
print(told()[-1])
"""
    while_it_runs, removed, back = map(
        ast.literal_eval, run(work, RAY_RAYLET_PID="1", SPRAY_METRICS_DIR=str(tmp_path)).splitlines()
    )
    gang = [
        ("spray_backlog_seconds", "m", "0", 5.0),
        ("spray_capacity_seconds", "m", "0", 1.0),
        ("spray_progress_timestamp_seconds", "m", "0", 7.0),
    ]
    assert while_it_runs == [*gang, ("spray_requests_in_flight", "removed", 1.0)]  # its gangs finish what they compute
    assert removed == gang
    assert back == ("spray_requests_in_flight", "removed", 0.0)


@pytest.mark.parametrize("mode", ["livesum", "livemostrecent"])
def test_a_gauge_that_has_ended_in_one_process_goes_on_in_another(tmp_path: Path, mode: str) -> None:
    """As when Serve gives the number of one gang to another."""
    key = mmap_key("spray_y", "spray_y", ["replica"], ["1"], "help")
    for process, value, at in ((os.getpid(), 5.0, 10.0), (os.getppid(), math.nan, 20.0)):
        values_of_process = MmapedDict(str(tmp_path / f"gauge_{mode}_{process}.db"))
        values_of_process.write_value(key, value, at)
        values_of_process.close()
    samples = [sample for metric in NodeCollector(tmp_path).collect() for sample in metric.samples]
    assert [(sample.labels["replica"], sample.value) for sample in samples] == [("1", 5.0)]


FULL = """
import errno, os, sys
from pathlib import Path
from workers.exporter import NodeCollector, share_values
from workers.observing import GatewayMetrics
folder = share_values()
first = GatewayMetrics("first", ["ok"])
first.began()
first.ended("ok")
{fill}
second = GatewayMetrics("second" + 60 * "x", [f"outcome {{i}} " + 600 * "y" for i in range(400)])
for i in range(400):
    second.began()
    second.ended(f"outcome {{i}} " + 600 * "y")
print(sum(s.value for m in NodeCollector(folder).collect() for s in m.samples if s.name == "spray_requests_total"))
"""


UNPROTECTED = """
from prometheus_client import values
from prometheus_client.mmap_dict import MmapedDict
values.MmapedDict = MmapedDict
"""


def test_a_full_disk_costs_metrics_and_no_process(tmp_path: Path) -> None:
    """Without the disk's part: what is taken as full is the system's answer to who asks for blocks."""
    fill = """
def full(*_):
    raise OSError(errno.ENOSPC, "No space left on device")
os.posix_fallocate = full
"""
    said = run(FULL.format(fill=fill), RAY_RAYLET_PID="1", SPRAY_METRICS_DIR=str(tmp_path))
    assert 1 <= float(said) < 401  # what was counted until then


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode:
        pytest.skip("this container may not mount")
    fill = """
ballast = os.open(folder / "ballast", os.O_CREAT | os.O_WRONLY)
try:
    while os.write(ballast, bytes(4096)):
        pass
except OSError:
    pass
"""
    try:
        work = FULL.format(fill=fill)
        said = run(work, RAY_RAYLET_PID="1", SPRAY_METRICS_DIR=str(disk / "metrics"))
        assert 1 <= float(said) < 401
        broken = work.replace("folder = share_values()", f"folder = share_values(){UNPROTECTED}")
        env = os.environ | {"RAY_RAYLET_PID": "1", "SPRAY_METRICS_DIR": str(disk / "metrics")}
        (disk / "metrics" / "ballast").unlink()
        for file in (disk / "metrics").glob("*.db"):
            file.unlink()
        died = subprocess.run([sys.executable, "-c", broken], env=env, capture_output=True, timeout=120)
        assert died.returncode == -signal.SIGBUS  # so it would be without `ValueFile`
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_files_of_ended_processes_stay_readable_on_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    collector = NodeCollector(tmp_path)
    count(tmp_path, ENDED, 3.0)
    assert total(collector) == 3.0  # kept
    count(tmp_path, ENDED - 1, 4.0)

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("workers.value_file._take_blocks", full)
        assert [total(collector) for _ in range(3)] == [7.0, 7.0, 7.0]
        assert (tmp_path / f"counter_{ENDED - 1}.db").exists()
    assert total(collector) == 7.0
    assert not (tmp_path / f"counter_{ENDED - 1}.db").exists()
