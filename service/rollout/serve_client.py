"""Connecting to Ray, and telling Serve what to run. The only file of this layer that uses their private APIs.

The public APIs fall short. `serve.run` takes one bound application and `serve.status` leaves out the configs, but a
rollout reads the configs of all applications and applies them together. `ray.init` has no public argument for the
address and the folder of a node. No public API tells the autoscaler about work that waits elsewhere.
`tests/service/test_serve_client.py` pins the private names.
"""

import copy
import logging
import signal
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from pydantic import ValidationError
from ray import serve
from ray._private import worker
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, HandleMetricReport, TimeStampedValue
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.handle import DeploymentHandle
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatusOverview,
    ServeDeploySchema,
    ServeStatus,
)

from deploy.spec import SpecError
from service.names import GANG
from workers.errors import GangLost

CORE = ("gcs_server", "raylet")
"""Ray's names of the processes without which a node does not run."""

ENDS_WITHIN_S = 15.0
"""Seconds for a node to end; a sound node takes two."""


def start_ray(address: str, folder: Path, devices: Mapping[str, float], object_store_bytes: int) -> None:
    """Start a Ray node on this machine and connect to it.

    Args:
        address: the IP address on which it listens.
        folder: where it keeps its sockets and logs.
        devices: its devices by kind: see `local_devices`.
        object_store_bytes: the size of its shared memory.

    Raises:
        GangLost: Ray does not start.
    """
    try:
        _connect(
            address="local",
            num_cpus=int(devices["cpu"]),
            num_gpus=int(devices["cuda"]),
            include_dashboard=False,
            object_store_memory=object_store_bytes,
            _node_ip_address=address,
            _temp_dir=str(folder),
        )
    except Exception as error:  # of no class of its own where a node of Ray is not up within 30 seconds
        raise GangLost(f"Ray does not start: {error}") from error


def connect(address: str, node_ip_address: str | None) -> None:
    """Connect to a running Ray cluster.

    Args:
        address: as `ray.init` takes it.
        node_ip_address: of this machine, as the cluster sees it; None lets Ray find out.
    """
    own = {"_node_ip_address": node_ip_address} if node_ip_address else {}
    _connect(address=address, **own)


def disconnect() -> None:
    """Leave the cluster, which ends if this process started it.

    A core that hangs is killed after `ENDS_WITHIN_S` seconds; otherwise this would wait forever. Serve's cached client
    is dropped too, because it outlives `ray.shutdown` and would be taken for that of the next cluster.
    """
    impatience = threading.Timer(ENDS_WITHIN_S, kill_node)
    impatience.start()
    try:
        ray.shutdown()
    finally:
        impatience.cancel()
    _disconnect()  # type: ignore[no-untyped-call]


def dead_processes() -> list[str]:
    """The processes of a Ray node that this process started and that died, such as `raylet`, without asking Ray."""
    node = worker._global_node
    return [] if node is None else [kind for kind, _ in node.dead_processes() if kind in CORE]


def kill_node() -> None:
    """Kill Ray's processes that this process started; their children end by themselves. May be called in any thread."""
    if (node := worker._global_node) is not None:
        node.kill_all_processes(check_alive=False, allow_graceful=False)


def start_serve(host: str, port: int, grpc_options: dict[str, Any], **options: Any) -> None:
    """Start Serve. If it runs already, its addresses stay as they are.

    Args:
        host: the address on which it listens.
        port: the HTTP port.
        grpc_options: the result of `service.app.grpc_options`.
        options: other options of Serve.
    """
    if _get_global_client(raise_if_no_controller_running=False) is None:
        where = {"http_options": {"host": host, "port": port}, "grpc_options": grpc_options}
        serve.start(**({"proxy_location": "EveryNode"} | where | options))


def applications() -> dict[str, dict[str, Any]]:
    """The configs with which Serve's applications were deployed, by name; none if Serve does not run."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    details = client.get_serve_details()["applications"]
    configs = {name: application.get("deployed_app_config") for name, application in details.items()}
    return {name: copy.deepcopy(config) for name, config in configs.items() if config}


def routes() -> dict[str, str]:
    """Where Serve's applications answer HTTP, by name, without those that answer none or are being removed.

    Others than ours too, also those that were deployed without a config, as `serve.run` does.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    found = {}
    for name, told in client.get_serve_details()["applications"].items():
        if told["status"] != ApplicationStatus.DELETING:
            config = told.get("deployed_app_config")
            found[name] = (
                config.get("route_prefix", "/") if config else told.get("route_prefix")
            )  # "/": Serve's default
    return {name: route for name, route in found.items() if route is not None}


def serve_state() -> tuple[ServeStatus, dict[str, int]]:
    """The applications of `serve.status`, and the number of gangs that Serve aims at, by application; empty without
    Serve.

    It is one call, and its answer is not validated: `serve.status` validates the whole configuration of each
    application again, which pickles the class of its router, and every gateway asks every few seconds.
    """
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return ServeStatus(), {}
    applications = client.get_serve_details()["applications"]
    targets = {
        name: application["deployments"][GANG]["target_num_replicas"]
        for name, application in applications.items()
        if GANG in application["deployments"]
    }
    return ServeStatus(applications={name: _overview(told) for name, told in applications.items()}), targets


def _overview(told: Mapping[str, Any]) -> ApplicationStatusOverview:
    deployments = {
        name: DeploymentStatusOverview(
            status=each["status"],
            status_trigger=each["status_trigger"],
            replica_states=Counter(replica["state"] for replica in each["replicas"]),
            message=each["message"],
        )
        for name, each in told["deployments"].items()
    }
    return ApplicationStatusOverview(told["status"], told["message"], told["last_deployed_time_s"], deployments)


def gang_handle(application: str) -> DeploymentHandle[Any]:
    """The gangs of an application that is known to be there.

    Unchecked: to ask whether it is there blocks the event loop, without a limit while the controller is away.
    """
    return serve.get_deployment_handle(GANG, application, _check_exists=False, _record_telemetry=False)


def report_waiting(source: str, waiting: Mapping[str, Sequence[tuple[float, float]]]) -> None:
    """Tell Serve's autoscaler about requests that wait outside of Serve's queues; it adds them to those in its queues.

    The last report of a source counts, for ten seconds.

    Args:
        source: the name of the source, the same for all processes that report for it.
        waiting: by application, times in seconds since the epoch, each with the number of requests that waited then;
            the oldest first, over the time that Serve averages.
    """
    client = _get_global_client(raise_if_no_controller_running=False) if ray.is_initialized() else None
    if client is None:
        return
    for application, told in waiting.items():
        report = HandleMetricReport(
            deployment_id=DeploymentID(GANG, application),
            handle_id=source,
            actor_id="",
            handle_source=DeploymentHandleSource.UNKNOWN,  # else it would count while its actor lives
            queued_requests=[TimeStampedValue(at, count) for at, count in told],
            metrics={},
            timestamp=time.time(),
        )
        client._controller.record_autoscaling_metrics_from_handle.remote(report)


def listens_at() -> tuple[str, int]:
    """The host and port on which Serve listens."""
    client = _get_global_client()
    assert client is not None, "Serve runs"
    where = client.get_serve_details()["http_options"]
    return where["host"], where["port"]


def grpc_port() -> int | None:
    """The port on which Serve listens for gRPC; None if it does not."""
    client = _get_global_client()
    assert client is not None, "Serve runs"
    options = client.get_serve_details()["grpc_options"] or {}
    return options["port"] if options.get("grpc_servicer_functions") else None


def apply_config(applications: Sequence[dict[str, Any]], **options: Any) -> None:
    """Tell Serve which applications to run. It removes all others.

    Raises:
        SpecError: Serve does not accept these applications together. Nothing was changed.
    """
    client = _get_global_client()
    assert client is not None, "Serve runs"
    try:
        config = ServeDeploySchema.model_validate({"applications": list(applications), **options})
    except ValidationError as error:
        said = "; ".join(problem["msg"].removeprefix("Value error, ") for problem in error.errors())
        raise SpecError(f"Serve does not accept the applications: {said}") from None
    client.deploy_apps(config)


def _connect(**options: Any) -> None:
    logging.getLogger("ray.serve").setLevel(logging.WARNING)  # else it narrates every step of a deployment
    on_sigterm = signal.getsignal(signal.SIGTERM)
    ray.init(log_to_driver=False, logging_level=logging.ERROR, **options)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray installs its own handler, which ends this process at once
