"""What is relied on of Ray's and Serve's private APIs, in one file; head's store and proxies have theirs."""

import ast
import inspect
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.serve._private.autoscaling_state import DeploymentAutoscalingState
from ray.serve._private.client import ServeControllerClient
from ray.serve._private.common import DeploymentID, DeploymentStatus, DeploymentStatusTrigger, ReplicaState
from ray.serve._private.controller import ServeController
from ray.serve.config import AutoscalingConfig, HTTPOptions, gRPCOptions
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.schema import (
    APIType,
    ApplicationDetails,
    ApplicationStatus,
    DeploymentDetails,
    DeploymentSchema,
    HTTPOptionsSchema,
    ReplicaDetails,
    ServeActorDetails,
    ServeDeploySchema,
    ServeInstanceDetails,
    ServeStatus,
    gRPCOptionsSchema,
)

from service.names import GANG
from service.rollout import serve_client
from workers.errors import GangLost

SERVICE = Path(__file__).resolve().parents[2] / "service"
SEAM = SERVICE / "rollout" / "serve_client.py"
PROXY = SERVICE / "rpc" / "proxy.py"
STORE = SERVICE / "state" / "head_store.py"


def private_uses(source: str) -> Iterator[str]:
    """Private names of Ray that a module imports, and underscored arguments that it passes to a call."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == "ray":
            names = [*str(node.module).split("."), *(alias.name for alias in node.names)]
            yield from (name for name in names if name.startswith("_"))
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("ray.") and "._" in a.name)
        elif isinstance(node, ast.Attribute) and ast.unparse(node).startswith(("ray._", "ray.serve._", "serve._")):
            yield ast.unparse(node)
        elif isinstance(node, ast.Call):
            yield from (str(keyword.arg) for keyword in node.keywords if str(keyword.arg).startswith("_"))


def test_one_file_uses_private_apis() -> None:
    users = {path for path in SERVICE.rglob("*.py") if "_pb2" not in path.name and list(private_uses(path.read_text()))}
    assert users == {SEAM, STORE, PROXY}
    used = set(private_uses(SEAM.read_text()))
    assert used == {
        "_get_global_client", "_disconnect", "_node_ip_address", "_private", "_temp_dir", "_check_exists",
        "_record_telemetry",
    }  # fmt: skip


def test_rays_arguments() -> None:
    source = inspect.getsource(ray.init)
    assert 'kwargs.pop("_node_ip_address"' in source
    assert 'kwargs.pop("_temp_dir"' in source


def test_serves_client() -> None:
    parameters = inspect.signature(_get_global_client).parameters
    assert parameters["raise_if_no_controller_running"].default is True
    assert not inspect.signature(_disconnect).parameters
    assert list(inspect.signature(ServeControllerClient.get_serve_details).parameters) == ["self"]
    config = list(inspect.signature(ServeControllerClient.deploy_apps).parameters.values())[1]
    assert config.name == "config"


def test_what_serve_tells_and_takes() -> None:
    assert {"applications", "http_options", "grpc_options"} < set(ServeInstanceDetails.model_fields)
    assert {"deployed_app_config", "deployments"} < set(ApplicationDetails.model_fields)
    assert "target_num_replicas" in DeploymentDetails.model_fields
    assert {"host", "port"} < set(HTTPOptions.model_fields)
    assert {"port", "grpc_servicer_functions"} < set(gRPCOptions.model_fields)
    assert {"applications", "logging_config"} < set(ServeDeploySchema.model_fields)


def test_the_state_of_serve_is_what_it_says_by_its_own_model_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    replicas = [
        ReplicaDetails(replica_id=str(number), state=state, pid=1, start_time_s=0.0)
        for number, state in enumerate((ReplicaState.RUNNING, ReplicaState.STARTING, ReplicaState.RUNNING))
    ]
    gangs = DeploymentDetails(
        name=GANG,
        status=DeploymentStatus.UPDATING,
        status_trigger=DeploymentStatusTrigger.AUTOSCALING,
        message="one more",
        deployment_config=DeploymentSchema(name=GANG),
        target_num_replicas=3,
        required_resources={},
        replicas=replicas,
    )
    application = ApplicationDetails(
        name="model-m",
        route_prefix=None,
        docs_path=None,
        external_scaler_enabled=False,
        status=ApplicationStatus.DEPLOYING,
        message="soon",
        last_deployed_time_s=7.0,
        source=APIType.DECLARATIVE,
        deployments={GANG: gangs},
    )
    options = {"http_options": HTTPOptionsSchema(), "grpc_options": gRPCOptionsSchema(), "target_capacity": None}
    details = ServeInstanceDetails(
        controller_info=ServeActorDetails(), proxies={}, applications={"model-m": application}, **options
    )
    told = details._get_user_facing_json_serializable_dict(exclude_unset=True)  # what the controller sends
    client = SimpleNamespace(get_serve_details=lambda: told)
    monkeypatch.setattr(serve_client, "_get_global_client", lambda **_: client)
    status, targets = serve_client.serve_state()
    assert status.applications == details._get_status().applications
    assert targets == {"model-m": 3}
    monkeypatch.setattr(serve_client, "_get_global_client", lambda **_: None)
    assert serve_client.serve_state() == (ServeStatus(), {})


def test_serves_autoscaler_adds_what_waits_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    scaling = DeploymentAutoscalingState(DeploymentID("Gang", "film"))
    scaling._config = AutoscalingConfig(metrics_interval_s=1.0)
    call = SimpleNamespace(remote=scaling.record_request_metrics_for_handle)
    controller = SimpleNamespace(record_autoscaling_metrics_from_handle=call)
    client = SimpleNamespace(_controller=controller)
    monkeypatch.setattr(serve_client.ray, "is_initialized", lambda: True)
    monkeypatch.setattr(serve_client, "_get_global_client", lambda **_: client)
    now = time.time()
    for _ in range(2):  # gateways that tell of the same jobs
        serve_client.report_waiting("jobs", {"film": [(now - 10, 8.0), (now - 5, 2.5)]})
    serve_client.report_waiting("others", {"film": [(now - 10, 1.0)]})
    assert scaling.get_autoscaling_context(1).total_queued_requests == pytest.approx(
        (8.0 * 5 + 2.5 * 5) / 10 + 1.0, rel=0.05
    )
    scaling.drop_stale_handle_metrics(set())
    assert scaling.get_autoscaling_context(1).total_queued_requests > 0
    later = time.monotonic() + 11
    monkeypatch.setattr(time, "monotonic", lambda: later)
    scaling.drop_stale_handle_metrics(set())  # of a deployment whose gateways say nothing anymore
    assert scaling.get_autoscaling_context(1).total_queued_requests == 0
    assert hasattr(ServeController, "record_autoscaling_metrics_from_handle")


def test_a_node_that_does_not_start_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Ray raises plain exceptions, such as on a machine that is too busy."""

    def late(**_: Any) -> None:
        raise Exception("The current node timed out during startup.")

    monkeypatch.setattr(serve_client, "_connect", late)
    with pytest.raises(GangLost, match="Ray does not start: The current node timed out"):
        serve_client.start_ray("127.0.0.1", tmp_path, {"cpu": 1, "cuda": 0}, 10**8)
