"""A Ray cluster of our own on this machine, serving one deployment. For `spray serve`, the demo and the tests.

It never attaches to another cluster, whatever `RAY_ADDRESS` says; it takes a temporary folder and free ports of its
own, listens on loopback only, and takes everything along when it stops. Any number of them run side by side.
"""

import contextlib
import logging
import os
import random
import shutil
import signal
import socket
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

# Read by Ray when it is imported, and inherited by every process of the cluster.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"  # Ray's switch for listening on loopback only, on any system
os.environ.setdefault("RAY_AUTH_MODE", "disabled")  # else a token is left behind that breaks later clusters
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
os.environ["RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS"] = "1"  # a hung gang must not be waited for
os.environ["RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S"] = "60"  # a busy laptop takes longer than Serve's 5 s
os.environ.setdefault("RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")  # else 10: too slow for seconds
os.environ.setdefault("RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S", "1")

import httpx
import ray
from ray import serve
from ray.exceptions import RayError

from deploy.check import check_deployment
from deploy.spec import DeploymentSpec, SpecError
from service.app import serve_config
from service.gateway import api_keys
from service.names import MODEL_APP_PREFIX
from service.rollout.changes import apply_config, drain, forget, start_serve
from service.rollout.ports import bind_error
from service.rollout.preflight import derive_tasks
from service.state.model_states import failure
from workers.errors import GangLost

LOOPBACK = "127.0.0.1"
SILENT_LOOKS = 5
"""A gateway that does not answer so often in a row is gone; once may mean that it is busy."""

METRICS_PORTS = range(20000, 30000)
"""Below those that systems give away by themselves: until the first process of ours binds it, nobody holds the port."""

OBJECT_STORE_BYTES = 200 * 2**20


class LocalCluster:
    """One deployment on a private Ray cluster; a context manager.

    Args:
        spec: what to serve. Port 0 takes a free one.

    Raises:
        SpecError: on entry, when the deployment cannot work here or its port is taken.
        GangLost: on entry, when Ray or Serve does not start.
    """

    def __init__(self, spec: DeploymentSpec) -> None:
        one = spec.gateway.model_copy(
            update={"replicas": 1}
        )  # a second one survives nothing that this machine does not
        self.spec = derive_tasks(spec.model_copy(update={"gateway": one}))
        self.instance_id = uuid.uuid4().hex
        self.url = ""
        self.metrics_url = ""
        self.address = ""
        self._folder: Path | None = None
        self._reservation: socket.socket | None = None

    def __enter__(self) -> Self:
        if ray.util.get_node_ip_address() != LOOPBACK:  # type: ignore[no-untyped-call]
            raise RuntimeError(
                "import service.rollout.local_cluster before ray, or the cluster would not stay on loopback"
            )
        check_deployment(self.spec, local_devices())
        try:
            api_keys(self.spec.auth.api_keys_env)
        except RuntimeError as error:  # the gateway inherits this environment
            raise SpecError(f"{error}; set it, as keys by comma") from None
        self._reservation = _reserve_port(self.spec.gateway.host, self.spec.gateway.port)
        host, port = self._reservation.getsockname()[:2]
        self.url = f"http://{host}:{port}"
        self._find_metrics_port()
        self._folder = Path(tempfile.mkdtemp(prefix="spray-", dir="/tmp"))  # short: socket paths end at 107 bytes
        os.environ.pop("RAY_ADDRESS", None)
        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        on_sigterm = signal.getsignal(signal.SIGTERM)
        try:
            devices = local_devices()
            with _inherited("SPRAY_METRICS_DIR", self._folder / "metrics"):
                ray.init(
                    address="local",
                    num_cpus=int(devices["cpu"]),
                    num_gpus=int(devices["cuda"]),
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=OBJECT_STORE_BYTES,
                    _node_ip_address=LOOPBACK,
                    _temp_dir=str(self._folder),
                )
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray has put its own, which ends this process at once
            self.address = ray.get_runtime_context().gcs_address
            quiet = {"log_level": "WARNING"}
            where = {"host": host, "port": port}
            start_serve(self.spec, proxy_location="HeadOnly", http_options=where, logging_config=quiet)
            apply_config(serve_config(self.spec, self.instance_id)["applications"], logging_config=quiet)
        except RayError as error:
            self.stop()
            raise GangLost(f"the local cluster cannot be started: {error}") from None
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def wait_ready(
        self, timeout_s: float, on_wait: Callable[[Mapping[str, float]], None] = lambda progress: None
    ) -> None:
        """Return when every model answers, or sleeps as it is meant to.

        Args:
            timeout_s: patience.
            on_wait: told several times a second how far each model has got, from 0 to 1.

        Raises:
            GangLost: a model cannot be started, or the gateway fails; the reason is in the message.
            TimeoutError: not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        waiting = [model.name for model in self.spec.models]
        while time.monotonic() < deadline:
            self._raise_failures()
            answer = _readiness(self.url)
            if "error" in answer:
                raise GangLost(f"the gateway cannot answer: {answer['error']}")
            if answer.get("instance_id") == self.instance_id:
                waiting = answer["waiting_for"]
            loaded = {model.name: 0.0 if model.name in waiting else 1.0 for model in self.spec.models}
            on_wait(loaded | {name: fraction for name, fraction in _loaded().items() if name in waiting})
            if not waiting:
                return
            time.sleep(0.25)
        raise TimeoutError(f"not ready after {timeout_s:g} s: waiting for {', '.join(waiting)}")

    def drain(self) -> None:
        """Refuse new requests, and return when those in flight are answered."""
        drain()
        silent = 0
        while silent < SILENT_LOOKS:
            answer = _readiness(self.url)
            if answer.get("status") == "draining" and not answer["in_flight"]:
                return
            silent = 0 if answer else silent + 1
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process of the cluster and remove its folder. May be called more than once."""
        if ray.is_initialized():
            ray.shutdown()
            forget()
        if self._reservation is not None:
            self._reservation.close()
            self._reservation = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _find_metrics_port(self) -> None:
        """Take a free port where the file says 0, and say so if the one that it names is taken."""
        host, port = self.spec.metrics_at["host"], self.spec.metrics_at["port"]
        if port is None:
            return
        candidates = [port] if port else random.sample(METRICS_PORTS, 20)
        port = next((candidate for candidate in candidates if not bind_error(host, candidate)), candidates[0])
        reason = bind_error(host, port)
        if reason:
            self.stop()
            raise SpecError(
                f"metrics.port: {host}:{port} cannot be bound ({reason}); choose another port or metrics.host"
            )
        self.spec = self.spec.model_copy(update={"metrics": self.spec.metrics.model_copy(update={"port": port})})
        self.metrics_url = f"http://{host}:{port}/metrics"

    def _raise_failures(self) -> None:
        for name, application in serve.status().applications.items():
            if application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
                raise GangLost(f"{name.removeprefix(MODEL_APP_PREFIX)} cannot be started: {failure(application)}")


def local_devices() -> dict[str, float]:
    """Devices of this machine by kind: `{"cpu": cores, "cuda": GPUs}`."""
    gpus = len([path for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit()])
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        gpus = min(gpus, len([device for device in visible.split(",") if device.strip() not in ("", "-1")]))
    return {"cpu": float(os.cpu_count() or 1), "cuda": float(gpus)}


@contextlib.contextmanager
def _inherited(variable: str, value: Path) -> Iterator[None]:
    """A variable that processes which are started here find in their environment, and this one does not keep."""
    former = os.environ.get(variable)
    os.environ[variable] = str(value)
    try:
        yield
    finally:
        del os.environ[variable]
        if former is not None:
            os.environ[variable] = former


def _reserve_port(host: str, port: int) -> socket.socket:
    """A socket on `port`, or on a free one for 0, that keeps it from others until Serve has bound it and beyond.

    Serve binds with SO_REUSEPORT, so it would not notice that a port is taken, and may share it with this socket, which
    never listens.

    Raises:
        SpecError: the port is taken.
    """
    reason = bind_error(host, port) if port else ""  # 0: the system gives nobody's, and at once
    if not reason:
        try:
            reservation = socket.socket()
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind((host, port))
            return reservation
        except OSError as error:
            reason = str(error.strerror)
    raise SpecError(f"gateway.port: {host}:{port} cannot be bound ({reason}); choose another with --port")


def _loaded() -> dict[str, float]:
    """How far each model that is loading has got, from 0 to 1: the least of its gangs' first ranks."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    first = [actor for actor in actors if actor["name"].endswith("-rank0")]
    found: dict[str, float] = {}
    for actor in first:
        with contextlib.suppress(RayError, ValueError):  # it may be starting, or gone
            rank = ray.get_actor(actor["name"], namespace=actor["namespace"])
            status: Any = ray.get(rank.status.remote(), timeout=0.2)
            found[status.model] = min(status.loaded, found.get(status.model, 1.0))
    return found


def _readiness(url: str) -> dict[str, Any]:
    try:
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False).json()
    except (httpx.TransportError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}
