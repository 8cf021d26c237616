"""Local clusters leave each other alone, and leave nothing behind."""

import contextlib
import ctypes
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import ray
from PIL import Image

from deploy.spec import Auth, Metrics, SpecError
from service.cli.commands import serve as serve_command
from service.cli.options import Terminated
from service.names import GATEWAY_APP
from service.rollout import apply
from service.rollout import local_cluster as local
from service.rollout.cluster_folder import make_folder, place
from tests.support.deployments import deployment, model
from tests.support.processes import cluster_processes, hear_signals, marked_processes

DRAINED = deployment(model(Path("/nowhere")))

DEMO = [sys.executable, "-m", "service.cli.demo"]


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    """An environment variable's value that all processes of the test's subprocesses carry."""
    value = uuid.uuid4().hex
    monkeypatch.setenv("TEST_MARK", value)
    return value


@pytest.fixture
def foreign_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Somebody else's Ray cluster, which `RAY_ADDRESS` points at."""
    folder = tempfile.mkdtemp(prefix="ray-", dir=place())
    context = ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, _temp_dir=folder)
    monkeypatch.setenv("RAY_ADDRESS", context.address_info["gcs_address"])
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def marked(mark: str) -> list[str]:
    """Command lines of the living processes that carry the mark, but for this one."""
    return list(marked_processes(mark).values())


def wait_gone(mark: str, folders: Iterable[str] = (), seconds: float = 10) -> list[str]:
    deadline = time.monotonic() + seconds
    while (left := cluster_processes(mark, folders)) and time.monotonic() < deadline:
        time.sleep(0.2)
    return list(left.values())


def end(demos: list[subprocess.Popen[str]]) -> None:
    """Those that have not ended, with all that is theirs, so that later tests have the machine for themselves."""
    for demo in demos:
        if demo.poll() is None:
            demo.terminate()
            demo.wait(timeout=120)


def test_two_demos_at_once_beside_a_foreign_cluster(foreign_cluster: None, mark: str, tmp_path: Path) -> None:
    demos = [
        subprocess.Popen(
            [*DEMO, "--output", str(tmp_path / name)],
            cwd=tmp_path,  # works from any directory
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in ("one.png", "two.png")
    ]
    try:
        says = [demo.communicate(timeout=280)[0] for demo in demos]
    finally:
        end(demos)
    assert [demo.returncode for demo in demos] == [0, 0], says
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png")]
    assert pictures[0].shape == (256, 256, 3)
    assert pictures[0].min() != pictures[0].max()
    assert np.array_equal(*pictures)
    for said in says:
        assert "layout:   ulysses_degree=2" in said
        assert "step 20/20" in said  # plain lines, since no terminal is there
        assert "curl" in said
    assert wait_gone(mark) == []
    assert ray.cluster_resources()["CPU"] == 1  # the foreign cluster is untouched


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_demo_leaves_nothing_behind(mark: str, sign: signal.Signals, tmp_path: Path) -> None:
    demo = subprocess.Popen(
        [*DEMO, "--output", str(tmp_path / "x.png")],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_signals,
    )
    assert demo.stdout is not None
    try:
        for line in demo.stdout:
            if line.startswith("demo: ") and line.endswith("% loaded\n"):
                break
        folders = set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(marked(mark))))
        demo.send_signal(sign)
        rest = demo.stdout.read()
        assert demo.wait(timeout=120) == 130, rest
    finally:
        end([demo])
    assert "Traceback" not in rest
    assert wait_gone(mark, folders) == []
    assert len(folders) == 1  # its own: others come and go here as well
    assert not any(Path(folder).exists() for folder in folders)
    assert not (tmp_path / "x.png").exists()


@pytest.fixture
def serving(mark: str, demo_model: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """`spray serve` of the demo model, ready."""
    file = tmp_path / "demo.yaml"
    file.write_text(
        f"models: [{{name: demo, source: {demo_model}, device: cpu, placement: {{cpus_per_rank: 0.1}}}}]\n"
        "metrics: {port: null}\n"
    )
    command = [sys.executable, "-m", "service.cli.main", "serve", str(file), "--port", "0"]
    serving = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, preexec_fn=hear_signals
    )
    try:
        assert serving.stdout is not None
        said: list[str] = []
        while not said or "ready: " not in said[-1]:
            said.append(serving.stdout.readline())
            assert said[-1], said
        yield serving
    finally:
        end([serving])


def own(mark: str, name: str) -> list[int]:
    """The ids of the marked processes whose command line has this name."""
    return [pid for pid, command in marked_processes(mark).items() if name in command]


@pytest.mark.fault
@pytest.mark.parametrize("core", ["/raylet/raylet", "/gcs/gcs_server"])
def test_serve_ends_with_the_reason_when_its_core_dies(serving: subprocess.Popen[str], mark: str, core: str) -> None:
    folders = set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(marked(mark))))
    (pid,) = own(mark, core)
    os.kill(pid, signal.SIGKILL)
    said, _ = serving.communicate(timeout=60)
    assert serving.returncode == 1, said
    assert f"error: the cluster is gone: Ray has ended: {core.rpartition('/')[2]} died" in said
    assert "Traceback" not in said
    assert wait_gone(mark, folders) == []
    assert not any(Path(folder).exists() for folder in folders)


@pytest.mark.fault
def test_serve_stops_when_it_is_asked_to(serving: subprocess.Popen[str], mark: str) -> None:
    """`test_fault_table` has the codes of the other signals."""
    folders = set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(marked(mark))))
    serving.terminate()
    said, _ = serving.communicate(timeout=120)
    assert (serving.returncode, "stopped" in said, "Traceback" in said) == (0, True, False), said
    assert wait_gone(mark, folders) == []
    assert len(folders) == 1 and not any(Path(folder).exists() for folder in folders)


@pytest.mark.fault
@pytest.mark.parametrize(("sign", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_serve_leaves_nothing_behind_however_often_it_is_interrupted(
    serving: subprocess.Popen[str], mark: str, sign: signal.Signals, code: int
) -> None:
    folders = set(re.findall(r"/[\w./-]*/spray-\w{8}\b", "\n".join(marked(mark))))
    while serving.poll() is None:
        serving.send_signal(sign)
        time.sleep(0.3)
    said, _ = serving.communicate(timeout=120)
    assert serving.returncode in (code, -sign), said  # the second: it had ended but for its last moment
    assert "Traceback" not in said
    assert wait_gone(mark, folders) == []
    assert len(folders) == 1 and not any(Path(folder).exists() for folder in folders)


@pytest.mark.fault
def test_serve_stops_although_its_controller_was_stopped(serving: subprocess.Popen[str], mark: str) -> None:
    (controller,) = own(mark, "ray::ServeController")
    os.kill(controller, signal.SIGSTOP)
    serving.terminate()
    said, _ = serving.communicate(timeout=local.ANSWERS_WITHIN_S + 60)
    assert (serving.returncode, "ray::ServeController has been stopped for" in said) == (0, True), said
    assert wait_gone(mark) == []


def test_a_taken_port_is_refused() -> None:
    with local.socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(local.SpecError, match=f"gateway.port: 127.0.0.1:{port} cannot be bound"):
            local._reserve_port("127.0.0.1", port)


@pytest.mark.parametrize("busy", [1, local.SILENT_POLLS - 1])
def test_draining_waits_for_requests_even_when_the_gateway_is_too_busy_to_say(
    monkeypatch: pytest.MonkeyPatch, busy: int
) -> None:
    at_work = {"status": "draining", "in_flight": 1}
    answers = [{"status": "ok", "in_flight": 1}, *[{}] * busy, at_work, *[{}] * busy, at_work | {"in_flight": 0}]
    left = iter(answers)
    monkeypatch.setattr(local, "drain", lambda: (1, 60.0))
    monkeypatch.setattr(local, "_readiness", lambda url: next(left))
    local.LocalCluster.drain(SimpleNamespace(url=""))  # type: ignore[arg-type]
    assert list(left) == []


def test_draining_waits_for_each_of_several_gateways(monkeypatch: pytest.MonkeyPatch) -> None:
    """As many as there are now: `spray deploy` may have changed what the cluster was started with."""
    idle = [{"status": "draining", "in_flight": 0, "gateway": name} for name in "ab"]
    answers = [idle[0], idle[0], {"status": "ok", "in_flight": 0, "gateway": "b"}, idle[1] | {"in_flight": 1}, *idle]
    left = iter(answers)
    monkeypatch.setattr(local, "drain", lambda: (2, 60.0))
    monkeypatch.setattr(local, "_readiness", lambda url: next(left))
    local.LocalCluster.drain(SimpleNamespace(url=""))  # type: ignore[arg-type]
    assert list(left) == []


def is_caught(sign: signal.Signals) -> bool:
    """Whether this process handles a signal, as the system knows it."""
    (caught,) = re.findall(r"^SigCgt:\s*(\w+)", Path("/proc/self/status").read_text(), re.MULTILINE)
    return bool(int(caught, 16) >> (sign - 1) & 1)


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_the_cluster_stops_ends_its_processes_and_removes_its_folder(
    monkeypatch: pytest.MonkeyPatch, sign: signal.Signals
) -> None:
    killed = threading.Event()

    def disconnect() -> None:
        ctypes.CDLL(None).signal(int(sign), 0)  # its default action, as Ray sets that of SIGTERM
        until = time.monotonic() + 30
        while not is_caught(sign):
            assert time.monotonic() < until
            time.sleep(0.01)
        os.kill(os.getpid(), sign)
        assert killed.wait(30)

    monkeypatch.setattr(local.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(local, "disconnect", disconnect)
    monkeypatch.setattr("service.rollout.core_watch.kill_node", killed.set)
    at_first = signal.signal(sign, signal.SIG_DFL)  # a shell's background processes ignore SIGINT
    before = signal.getsignal(sign)
    cluster = local.LocalCluster(DRAINED)
    folder, cluster._lock = make_folder()
    cluster._folder = folder
    try:
        cluster.stop()
        assert not folder.exists()
        assert signal.getsignal(sign) == before
    finally:
        signal.signal(sign, at_first)


def test_draining_does_not_wait_for_a_gateway_that_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    looks: list[str] = []
    monkeypatch.setattr(local, "drain", lambda: (1, 60.0))
    monkeypatch.setattr(local, "_readiness", lambda url: looks.append(url) or {})
    local.LocalCluster.drain(SimpleNamespace(url=""))  # type: ignore[arg-type]
    assert len(looks) == local.SILENT_POLLS


def test_draining_waits_no_longer_than_the_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "drain", lambda: (1, 0.3))
    monkeypatch.setattr(local, "_readiness", lambda url: {"status": "draining", "in_flight": 1})
    with pytest.raises(TimeoutError, match=r"did not end within 0\.3 s"):
        local.LocalCluster.drain(SimpleNamespace(url=""))  # type: ignore[arg-type]


def test_draining_does_not_wait_for_a_gateway_that_does_not_hear_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ANSWERS_WITHIN_S", 0.1)
    monkeypatch.setattr(local, "drain", lambda: (1, 60.0))
    monkeypatch.setattr(local, "_readiness", lambda url: {"status": "ok", "in_flight": 0})
    with pytest.raises(TimeoutError, match="still takes requests"):
        local.LocalCluster.drain(SimpleNamespace(url=""))  # type: ignore[arg-type]


def test_draining_does_not_wait_for_a_controller_that_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "ANSWERS_WITHIN_S", 0.1)
    monkeypatch.setattr(local, "drain", threading.Event().wait)
    with pytest.raises(TimeoutError, match="telling the gateway"):
        local.LocalCluster.drain(SimpleNamespace(url=""))  # type: ignore[arg-type]


@pytest.mark.parametrize("answers", [True, False])
def test_a_signal_while_a_model_loads_lets_the_others_finish(monkeypatch: pytest.MonkeyPatch, answers: bool) -> None:
    drained: list[bool] = []

    class Loading(contextlib.AbstractContextManager["Loading"]):
        spec, url, grpc_target, metrics_url, token_file, address = DRAINED, "", "", "", None, ""

        def __init__(self, spec: object) -> None:
            """Of any deployment."""

        def __exit__(self, *_: object) -> None:
            """Nothing to stop."""

        def wait_ready(self, *_: object) -> None:
            raise Terminated

        def answers(self) -> bool:
            return answers

        def drain(self) -> None:
            drained.append(True)

    monkeypatch.setattr(local, "LocalCluster", Loading)
    monkeypatch.setattr(serve_command, "load", lambda *_: SimpleNamespace(spec=DRAINED))
    monkeypatch.setattr(serve_command, "check_deployment", lambda *_: None)
    monkeypatch.setattr(serve_command, "use_private_cluster", lambda: None)
    serve_command.serve(Path("any.yaml"), [], None)
    assert drained == [True] * answers


def test_what_the_latest_deployment_says_counts_when_a_cluster_drains(monkeypatch: pytest.MonkeyPatch) -> None:
    gateway = {"num_replicas": 2, "graceful_shutdown_timeout_s": 20.0, "user_config": {"draining": False}}
    gang = {"graceful_shutdown_timeout_s": 300.0, "user_config": {}}
    present = {GATEWAY_APP: {"deployments": [gateway]}, "model-a": {"deployments": [gang]}}
    applied: list[object] = []
    monkeypatch.setattr(apply, "applications", lambda: present)
    monkeypatch.setattr(apply, "apply_config", applied.append)
    assert apply.drain() == (2, 300.0)
    assert applied == [list(present.values())] and gateway["user_config"] == {"draining": True}


def test_keys_that_are_missing_are_said_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, demo_model: Path
) -> None:
    monkeypatch.delenv("NO_KEYS", raising=False)
    spec = deployment(model(demo_model)).model_copy(update={"auth": Auth(api_keys_env="NO_KEYS")})
    with pytest.raises(SpecError, match=r"api_keys_env is NO_KEYS, but .*; set it"), local.LocalCluster(spec):
        pass
    assert not ray.is_initialized()


def test_a_port_of_metrics_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        cluster = SimpleNamespace(spec=deployment(model(Path("/nowhere"))), stop=lambda: None, metrics_url="")
        cluster.spec = cluster.spec.model_copy(update={"metrics": Metrics(port=port)})
        with pytest.raises(SpecError, match=rf"metrics\.port: 127\.0\.0\.1:{port} cannot be bound"):
            local.LocalCluster._find_metrics_port(cluster)
    cluster.spec = cluster.spec.model_copy(update={"metrics": Metrics(port=0)})
    local.LocalCluster._find_metrics_port(cluster)
    assert cluster.metrics_url == f"http://127.0.0.1:{cluster.spec.metrics.port}/metrics"
