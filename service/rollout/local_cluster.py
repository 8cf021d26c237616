"""A Ray cluster of our own on this machine that serves one deployment. For `spray serve`, the demo and the tests.

It never attaches to another cluster, whatever `RAY_ADDRESS` says. It has its own temporary folder and free ports,
listens on loopback only, and removes everything when it stops. Any number of them run side by side. Entry points call
`service.rollout.environment.use_private_cluster` before they import this file, because it imports Ray.
"""

import contextlib
import os
import random
import shutil
import socket
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
import ray
from ray import serve
from ray.exceptions import RayError

from deploy.check import check_deployment
from deploy.spec import DeploymentSpec, SpecError
from service.api.errors import GATEWAY_LOST
from service.app import grpc_options, serve_config
from service.names import MODEL_APP_PREFIX
from service.rollout.apply import drain
from service.rollout.cluster_folder import make_folder, remove_abandoned
from service.rollout.cluster_guard import end_guard, start_guard
from service.rollout.core_watch import aside, impatient, within
from service.rollout.devices import local_devices
from service.rollout.ports import bind_error
from service.rollout.preflight import settle_here
from service.rollout.serve_client import apply_config, dead_processes, disconnect, start_ray, start_serve
from service.rollout.stopped_processes import StoppedProcesses
from service.state.keyring import check_keys
from service.state.model_states import failure, is_broken
from workers.errors import GangLost

LOOPBACK = "127.0.0.1"
SILENT_POLLS = 5
"""Failed calls in a row after which a gateway is gone. One may mean that it is busy."""

METRICS_PORTS = range(20000, 30000)
"""A port below those that systems hand out: nothing reserves it until a process of ours binds it."""

ANSWERS_WITHIN_S = 20.0
"""Seconds to wait for the core to follow an order."""

SHARED_MEMORY = Path("/dev/shm")

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
        # One machine: there is no other node to choose by its labels.
        one = spec.gateway.model_copy(update={"node_labels": {}})
        self.spec = settle_here(spec.model_copy(update={"gateway": one}))
        self.instance_id = uuid.uuid4().hex
        self.url = ""
        self.grpc_target = ""
        self.metrics_url = ""
        self.address = ""
        self.token_file: Path | None = None
        self._folder: Path | None = None
        self._reservations: list[socket.socket] = []
        self._guard: subprocess.Popen[bytes] | None = None
        self._stopped_processes = StoppedProcesses()

    def __enter__(self) -> Self:
        if ray.util.get_node_ip_address() != LOOPBACK:  # type: ignore[no-untyped-call]
            raise RuntimeError("call use_private_cluster before Ray is imported, or the cluster would leave loopback")
        devices = local_devices()
        check_deployment(self.spec, devices)
        if SHARED_MEMORY.is_dir() and not os.access(SHARED_MEMORY, os.W_OK):
            raise SpecError(f"{SHARED_MEMORY} cannot be written, and Ray keeps its objects there; mount it writable")
        check_keys(self.spec.auth)  # the gateway inherits this environment
        # Ports before Ray: what cannot be bound is reported here in one line, not later in the log of a replica.
        host, port, grpc_port = self._reserve_ports()
        self._find_metrics_port()
        remove_abandoned()
        self._folder, self._lock = make_folder()
        try:
            if token := os.environ.get("RAY_AUTH_TOKEN"):
                self.token_file = self._folder / "auth_token"
                self.token_file.touch(mode=0o600)
                self.token_file.write_text(token)
            os.environ.pop("RAY_ADDRESS", None)
            metrics, outputs = self._folder / "metrics", self._folder / "outputs"
            self._guard = start_guard(self._folder)
            with _inherited("SPRAY_METRICS_DIR", metrics), _inherited("SPRAY_OUTPUTS_DIR", outputs):
                start_ray(LOOPBACK, self._folder / "ray", devices, OBJECT_STORE_BYTES)
            self._stopped_processes.start()
            self.address = ray.get_runtime_context().gcs_address
            quiet = {"log_level": "WARNING"}
            start_serve(host, port, grpc_options(grpc_port), proxy_location="HeadOnly", logging_config=quiet)
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
        """Return when every model answers, or sleeps as it should.

        Args:
            timeout_s: how long to wait.
            on_wait: called several times a second with how far each model is loaded, from 0 to 1.

        Raises:
            GangLost: a model cannot be started, or the gateway fails; the reason is in the message.
            TimeoutError: not ready in time.
        """
        deadline = time.monotonic() + timeout_s
        waiting = [model.name for model in self.spec.models]
        while time.monotonic() < deadline:
            # First: what has failed never becomes ready, and its reason beats a timeout.
            _raise_if_gone()
            within(ANSWERS_WITHIN_S, _raise_failures, "asking Serve for its state", meanwhile=_raise_if_gone)
            answer = _readiness(self.url)
            if "error" in answer and answer["error"]["code"] != GATEWAY_LOST:
                raise GangLost(f"the gateway cannot answer: {answer['error']}")
            if answer.get("instance_id") == self.instance_id:  # else another server answers at this port
                waiting = answer["waiting_for"]
            loaded = {model.name: 0.0 if model.name in waiting else 1.0 for model in self.spec.models}
            on_wait(loaded | {name: fraction for name, fraction in _loaded().items() if name in waiting})
            if not waiting:
                return
            time.sleep(0.25)
        raise TimeoutError(f"not ready after {timeout_s:g} s: waiting for {', '.join(waiting)}")

    def answers(self) -> bool:
        """Whether a gateway listens: it may have requests, also while some models still start."""
        return any("status" in _readiness(self.url) for _ in range(SILENT_POLLS))

    def drain(self) -> None:
        """Refuse new requests, and return when those in flight are answered, or the gateways are gone.

        Serve lets any of several gateways answer. A draining gateway without requests gets no new ones, so it is enough
        to hear this once from each gateway.

        Raises:
            TimeoutError: Serve or a gateway does not listen, or requests are unfinished after the grace period.
        """
        gateways, limit_s = within(ANSWERS_WITHIN_S, drain, "telling the gateways to take no more requests")
        silent, heard, done = 0, False, set[str]()
        told = time.monotonic()
        while silent < SILENT_POLLS:
            waited_s = time.monotonic() - told
            if not heard and waited_s > ANSWERS_WITHIN_S:
                raise TimeoutError(f"the gateway still takes requests {ANSWERS_WITHIN_S:g} s after it was told not to")
            if waited_s > limit_s:
                raise TimeoutError(f"requests in flight did not end within {limit_s:g} s, their grace period")
            answer = _readiness(self.url)
            if answer.get("status") == "draining":
                heard = True
                if not answer["in_flight"]:
                    done.add(answer.get("gateway", ""))
            if len(done) >= gateways:
                return
            silent = 0 if "status" in answer else silent + 1  # an error: no gateway
            time.sleep(0.1)

    def stop(self) -> None:
        """End every process of the cluster and remove its folder. May be called more than once.

        A signal meanwhile ends the processes at once; the folder is removed all the same.
        """
        self._stopped_processes.stop()
        with impatient() as arm:
            if ray.is_initialized():
                aside(disconnect, arm)  # halfway through, Ray gives SIGTERM its default action
            while self._reservations:
                self._reservations.pop().close()
            if self._guard is not None:
                end_guard(self._guard)
                self._guard = None
            if self._folder is not None:
                shutil.rmtree(self._folder, ignore_errors=True)
                self._lock.close()
                self._folder = None

    def _reserve_ports(self) -> tuple[str, int, int | None]:
        """Host, HTTP port and gRPC port, reserved until Serve binds them.

        Raises:
            SpecError: one of them is taken.
        """
        gateway = self.spec.gateway
        try:
            self._reservations.append(_reserve_port(gateway.host, gateway.port))
            host, port = self._reservations[-1].getsockname()[:2]
            self.url = f"http://{_in_url(host)}:{port}"
            if gateway.grpc_port is None:
                return host, port, None
            self._reservations.append(_reserve_port(gateway.host, gateway.grpc_port, "gateway.grpc_port"))
        except SpecError:
            self.stop()
            raise
        grpc_port = self._reservations[-1].getsockname()[1]
        self.grpc_target = f"{_in_url(host)}:{grpc_port}"
        return host, port, grpc_port

    def _find_metrics_port(self) -> None:
        """Choose a free port if the file says 0; reject one that is taken.

        Raises:
            SpecError: the port cannot be bound.
        """
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
        self.metrics_url = f"http://{_in_url(host)}:{port}/metrics"


def _raise_failures() -> None:
    try:
        applications = serve.status().applications
    except RayError:  # Serve's controller is replaced: it answers again soon, or the wait ends at its limit
        return
    for name, application in applications.items():
        if is_broken(application):
            raise GangLost(f"{name.removeprefix(MODEL_APP_PREFIX)} cannot be started: {failure(application)}")


def _raise_if_gone() -> None:
    if dead := dead_processes():
        raise GangLost(f"the cluster is gone: Ray has ended: {' and '.join(dead)} died")


@contextlib.contextmanager
def _inherited(variable: str, value: Path) -> Iterator[None]:
    """Set a variable for the processes that start inside the context, and restore it for this process."""
    former = os.environ.get(variable)
    os.environ[variable] = str(value)
    try:
        yield
    finally:
        del os.environ[variable]
        if former is not None:
            os.environ[variable] = former


def _reserve_port(host: str, port: int, key: str = "gateway.port") -> socket.socket:
    """A socket that reserves `port`, or a free one for 0, until Serve binds it.

    Serve binds with SO_REUSEPORT: it would not notice that a port is taken, but it can share the port with this socket,
    which never listens.

    Raises:
        SpecError: the port is taken.
    """
    reason = bind_error(host, port) if port else ""  # 0: the system picks one that nobody has
    if not reason:
        try:
            family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
            reservation = socket.socket(family)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            reservation.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            reservation.bind(address)
            return reservation
        except OSError as error:
            reason = str(error.strerror)
    how = "with --port" if key == "gateway.port" else f"with --set {key}=PORT, or null for none"
    raise SpecError(f"{key}: {host}:{port} cannot be bound ({reason}); choose another {how}")


def _in_url(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _loaded() -> dict[str, float]:
    """How far each model with ranks is loaded, from 0 to 1: the least of its gangs, by one rank of each."""
    actors = ray.util.list_named_actors(all_namespaces=True)
    first = [actor for actor in actors if actor["name"].endswith("-bundle0")]
    found: dict[str, float] = {}
    for actor in first:
        with contextlib.suppress(RayError, ValueError):  # still starting, or already gone
            rank = ray.get_actor(actor["name"], namespace=actor["namespace"])
            status: Any = ray.get(rank.status.remote(), timeout=0.2)
            found[status.model] = min(status.loaded, found.get(status.model, 1.0))
    return found


def _readiness(url: str) -> dict[str, Any]:
    try:
        # `verify=False`, for it is plain HTTP: else httpx would read all certificates first, which takes 20 ms.
        answer = httpx.get(f"{url}/readyz", timeout=5, trust_env=False, verify=False).json()
    except (httpx.TransportError, ValueError):
        return {}
    return answer if isinstance(answer, dict) else {}
