"""`spray deploy` without a cluster: what Serve is told when a file meets what runs, and what is refused before."""

import contextlib
import copy
import shutil
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from ray.exceptions import RayActorError, RayTaskError, RpcError
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeStatus,
)
from safetensors.torch import save_file

from deploy.gateway_spec import GatewaySpec
from deploy.model_sections import Autoscaling, LoRA
from deploy.model_spec import ModelSpec
from deploy.spec import Auth, DeploymentSpec, Metrics, SpecError
from deploy.storage_spec import Idempotency, Outputs, Storage
from service.app import serve_config
from service.cli.main import main
from service.rollout import apply, changes, preflight, serve_client
from service.rollout.apply import apply_changes, failures, unfinished
from service.rollout.attach import attach
from service.rollout.changes import Change, find_changes, find_gateway_changes, running_models
from sp_core.degrees import ParallelDegrees
from tests.conftest import OTHER
from tests.support.deployments import model as a_demo
from workers.gang.placement import Node

A = ModelSpec(name="a", source="/a", tasks=("text-to-image",), parallel=ParallelDegrees(ulysses_degree=2))
B = A.model_copy(update={"name": "b"})
FOREIGN = {"name": "not-ours", "import_path": "somebody:app", "route_prefix": "/else", "deployments": []}


class Cluster:
    """A cluster that serves two models and an application of somebody else."""

    def __init__(self) -> None:
        config = serve_config(DeploymentSpec(models=(A, B)), "the instance")
        self.applications = {application["name"]: application for application in [*config["applications"], FOREIGN]}
        self.told: list[dict[str, Any]] = []

    def tell(self, wanted: list[dict[str, Any]]) -> None:
        self.told.append({application["name"]: application for application in wanted})


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch) -> Cluster:
    cluster = Cluster()
    for module in (apply, serve_client):
        monkeypatch.setattr(module, "applications", lambda: cluster.applications)
    monkeypatch.setattr(apply, "start_serve", lambda host, port, grpc_options: None)
    monkeypatch.setattr(apply, "listens_at", lambda: ("127.0.0.1", 8000))
    monkeypatch.setattr(apply, "apply_config", cluster.tell)
    return cluster


def carried_out(*models: ModelSpec, prune: bool = False, **options: Any) -> None:
    present = copy.deepcopy(apply.applications())
    wanted = find_changes(running_models(present), models, prune)
    apply_changes(DeploymentSpec(models=models), wanted, present, **options)


def test_what_runs_is_read_from_what_was_deployed(cluster: Cluster) -> None:
    assert running_models(cluster.applications) == {"a": A, "b": B}
    assert running_models({"not-ours": FOREIGN}) == {}


def in_table(told: dict[str, Any]) -> list[str]:
    return [model["name"] for model in told["gateway"]["deployments"][0]["user_config"]["models"]]


def test_one_upgraded_model_leaves_everything_else_as_it_is(cluster: Cluster) -> None:
    carried_out(A.model_copy(update={"dtype": "float16"}))
    (told,) = cluster.told
    assert set(told) == {"model-a", "model-b", "gateway", "not-ours"}
    assert told["model-a"]["args"]["dtype"] == "float16"
    assert told["model-a"]["deployments"][0]["max_surge_percent"] == 1
    for name in ("model-b", "not-ours"):
        assert told[name] == cluster.applications[name]
    assert told["gateway"]["args"] == {"instance_id": "the instance"}  # else the gateway would restart
    assert in_table(told) == ["a", "b"]


def test_the_same_file_again_tells_serve_the_same(cluster: Cluster) -> None:
    carried_out(A, B)
    assert cluster.told == [cluster.applications]


def test_a_new_model_beside_the_others(cluster: Cluster) -> None:
    carried_out(B.model_copy(update={"name": "c"}))
    (told,) = cluster.told
    assert set(told) == {"model-a", "model-b", "model-c", "gateway", "not-ours"}
    assert sorted(in_table(told)) == ["a", "b", "c"]


def test_the_gateway_has_time_and_places_for_models_that_are_left(cluster: Cluster) -> None:
    small, long = A.model_copy(update={"grace_period_s": 60.0}), B.model_copy(update={"max_queued": 500})
    deployed = serve_config(DeploymentSpec(models=(small, long)), "the instance")["applications"]
    cluster.applications = {application["name"]: application for application in deployed}
    carried_out(small)
    (told,) = cluster.told
    assert told["gateway"] == cluster.applications["gateway"]
    assert told["gateway"]["deployments"][0]["graceful_shutdown_timeout_s"] == long.grace_period_s


def test_pruning_removes_models_of_ours_and_no_others(cluster: Cluster) -> None:
    carried_out(A, prune=True)
    (told,) = cluster.told
    assert set(told) == {"model-a", "gateway", "not-ours"}
    assert in_table(told) == ["a"]


def test_where_there_is_no_room_old_gangs_stop_first(cluster: Cluster) -> None:
    carried_out(A.model_copy(update={"dtype": "float16"}), without_surge=("a",))
    (told,) = cluster.told
    assert told["model-a"]["deployments"][0]["max_surge_percent"] == 0
    assert told["model-b"]["deployments"][0]["max_surge_percent"] == 1


def test_names_of_models_that_go_on_are_taken(cluster: Cluster) -> None:
    with pytest.raises(SpecError, match="two models are called 'b'"):
        carried_out(A.model_copy(update={"aliases": ("b",)}))
    assert cluster.told == []


@pytest.mark.parametrize(
    ("other", "changed"),
    [
        ({"models": (A.model_copy(update={"max_queued": 9}), B)}, "a, gateway"),
        ({"models": (A, B), "gateway": GatewaySpec(replicas=2)}, "gateway"),
    ],
)
def test_two_who_deploy_at_once_do_not_undo_each_other(cluster: Cluster, other: dict[str, Any], changed: str) -> None:
    compared_with = dict(cluster.applications)
    found = find_changes(running_models(compared_with), [A, B])
    applied = serve_config(DeploymentSpec(**other), "the instance")
    cluster.applications = compared_with | {application["name"]: application for application in applied["applications"]}
    with pytest.raises(SpecError, match=f"another deployment changed {changed} meanwhile"):
        apply_changes(DeploymentSpec(models=(A, B)), found, compared_with)
    assert cluster.told == []


def test_models_that_are_left_answer_prometheus_where_the_node_does(cluster: Cluster) -> None:
    spec = DeploymentSpec(models=(A,), metrics=Metrics(port=9500))
    present = copy.deepcopy(cluster.applications)
    apply_changes(spec, find_changes(running_models(present), spec.models), present)
    (told,) = cluster.told
    for name in ("model-a", "model-b", "gateway"):
        assert told[name]["deployments"][0]["user_config"]["metrics"] == {"host": "127.0.0.1", "port": 9500}


NODE = Node({"CPU": 64.0, "GPU": 2.0}, {})


@pytest.mark.parametrize(
    ("free", "added", "upgraded", "asleep", "lack"),
    [
        ([NODE], [], ["a"], [], []),
        ([NODE], ["b"], ["a"], [], []),  # in the file's order, a takes the room first
        ([NODE], [], ["a", "b"], [], ["b"]),
        ([NODE], [], ["a", "b"], ["a"], ["b"]),
        ([NODE, NODE], [], ["a", "b"], [], []),
        ([Node({"CPU": 64.0, "GPU": 1.0}, {})] * 2, [], ["a"], [], ["a"]),  # enough in sum, not on one node
        ([], [], ["a"], ["a"], []),  # no old gang to stand beside
    ],
)
def test_room_beside_the_old_gangs(
    monkeypatch: pytest.MonkeyPatch,
    free: list[Node],
    added: list[str],
    upgraded: list[str],
    asleep: list[str],
    lack: Any,
) -> None:
    states = {name: {} if name in asleep else {"RUNNING": 1} for name in "ab"}
    statuses = {
        f"model-{name}": SimpleNamespace(deployments={"Gang": SimpleNamespace(replica_states=states[name])})
        for name in "ab"
    }
    monkeypatch.setattr(preflight.serve, "status", lambda: SimpleNamespace(applications=statuses))
    monkeypatch.setattr(preflight, "free_nodes", lambda: free)
    missing = preflight.missing_surge_room(DeploymentSpec(models=(A, B)), added, upgraded)
    assert list(missing) == lack
    assert all(
        line.startswith(f"{name}: a new gang beside the old ones needs 2 GPUs on one node")
        for name, line in missing.items()
    )


@pytest.mark.parametrize(
    ("action", "fewest", "lack"),
    [("upgrade", 0, []), ("upgrade", 1, ["b"]), ("add", 0, []), ("add", 1, ["b"]), ("add", 2, ["b"])],
)
def test_room_is_taken_by_gangs_that_start(
    monkeypatch: pytest.MonkeyPatch, action: str, fewest: int, lack: list[str]
) -> None:
    first = A.model_copy(update={"autoscaling": Autoscaling(min_replicas=fewest, max_replicas=2)})
    states = {"model-a": {}, "model-b": {"RUNNING": 1}}  # the first sleeps, or is new
    statuses = {
        name: SimpleNamespace(deployments={"Gang": SimpleNamespace(replica_states=of_replicas)})
        for name, of_replicas in states.items()
    }
    monkeypatch.setattr(preflight.serve, "status", lambda: SimpleNamespace(applications=statuses))
    added, upgraded = (["a"], ["b"]) if action == "add" else ([], ["a", "b"])
    spec = DeploymentSpec(models=(first, B))
    for room, missing in ((max(fewest, 1), lack), (fewest + 1, [])):
        monkeypatch.setattr(preflight, "free_nodes", lambda room=room: [NODE] * room)
        assert list(preflight.missing_surge_room(spec, added, upgraded)) == missing


def test_a_model_whose_application_is_being_built_needs_room(monkeypatch: pytest.MonkeyPatch) -> None:
    statuses = {"model-a": SimpleNamespace(deployments={})}
    monkeypatch.setattr(preflight.serve, "status", lambda: SimpleNamespace(applications=statuses))
    for free, lack in (([NODE], []), ([], ["a"])):
        monkeypatch.setattr(preflight, "free_nodes", lambda free=free: free)
        assert list(preflight.missing_surge_room(DeploymentSpec(models=(A,)), [], ["a"])) == lack


def test_an_adjusted_model_keeps_its_arguments(cluster: Cluster) -> None:
    carried_out(A.model_copy(update={"max_queued": 5}))
    (told,) = cluster.told
    assert told["model-a"]["args"] == cluster.applications["model-a"]["args"]
    assert told["model-a"]["deployments"][0]["user_config"]["model"]["max_queued"] == 5


def status(**applications: str) -> ServeStatus:
    deployment = DeploymentStatusOverview(
        DeploymentStatus.HEALTHY, DeploymentStatusTrigger.UNSPECIFIED, {}, "rank 1 died"
    )
    return ServeStatus(
        applications={
            name.replace("_", "-"): ApplicationStatusOverview(ApplicationStatus(state), "", 0.0, {"Gang": deployment})
            for name, state in applications.items()
        }
    )


@pytest.mark.parametrize(
    ("action", "serve", "waits", "fails"),
    [
        ("add", {}, ["a"], []),
        ("add", {"model_a": "DEPLOYING"}, ["a"], []),
        ("upgrade", {"model_a": "RUNNING"}, [], []),
        ("adjust", {"model_a": "DEPLOY_FAILED"}, ["a"], ["a: rank 1 died"]),
        ("upgrade", {"model_a": "UNHEALTHY"}, ["a"], []),  # its gang is being replaced
        ("remove", {"model_a": "DELETING"}, ["a"], []),
        ("remove", {}, [], []),
        ("keep", {"model_a": "DEPLOY_FAILED"}, [], []),  # broken before, and none of this deployment's business
        ("leave", {"model_a": "UNHEALTHY"}, [], []),
        ("adjust", {"model_a": "RUNNING", "gateway": "DEPLOYING"}, ["gateway"], []),
        ("adjust", {"model_a": "RUNNING", "gateway": "DEPLOY_FAILED"}, ["gateway"], ["gateway: rank 1 died"]),
    ],
)
def test_what_a_deployment_waits_for(
    monkeypatch: pytest.MonkeyPatch, action: Any, serve: dict[str, str], waits: list[str], fails: list[str]
) -> None:
    monkeypatch.setattr(apply.serve, "status", lambda: status(**{"gateway": "RUNNING"} | serve))
    assert unfinished([Change("a", action)]) == waits
    assert list(failures([Change("a", action)])) == fails


@pytest.mark.parametrize(
    ("trigger", "replicas", "said", "fails"),
    [
        ("HEALTH_CHECK_FAILED", {"RUNNING": 1}, "A replica's health check failed.", False),
        ("HEALTH_CHECK_FAILED", {}, "A replica's health check failed.", True),
        ("HEALTH_CHECK_FAILED", {"RUNNING": 1}, "The deployment failed to start 3 times in a row during a", True),
        ("REPLICA_STARTUP_FAILED", {"RUNNING": 1}, "rank 1 died", True),  # old gangs, but no new ones
    ],
)
def test_a_gang_that_is_lost_meanwhile_is_no_failed_deployment(
    monkeypatch: pytest.MonkeyPatch, trigger: str, replicas: Any, said: str, fails: bool
) -> None:
    gang = DeploymentStatusOverview(DeploymentStatus.DEPLOY_FAILED, DeploymentStatusTrigger(trigger), replicas, said)
    application = ApplicationStatusOverview(ApplicationStatus.DEPLOY_FAILED, "", 0.0, {"Gang": gang})
    monkeypatch.setattr(apply.serve, "status", lambda: ServeStatus(applications={"model-a": application}))
    assert bool(list(failures([Change("a", "upgrade")]))) == fails


FILE = "models: [{name: a, source: %s, parallel: {ulysses_degree: 2}, dtype: float16}]"


@pytest.fixture
def command(cluster: Cluster, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """`spray deploy` of model `a` in another dtype, with flags; `obstacles` and `unschedulable`: what the nodes say."""
    addresses: list[str | None] = []

    @contextlib.contextmanager
    def attach(address: str | None) -> Iterator[None]:
        addresses.append(address)
        yield

    def run(
        *flags: str,
        obstacles: tuple[str, ...] = (),
        unschedulable: tuple[str, ...] = (),
        routes: Mapping[str, str] = {"gateway": "/", "not-ours": "/else"},
        starved: Mapping[str, str] = {},
    ) -> tuple[int, list[str | None]]:
        monkeypatch.setattr(preflight, "verify_on_nodes", lambda spec, touched: (spec, list(obstacles)))
        monkeypatch.setattr(preflight, "unschedulable_models", lambda spec, names: list(unschedulable))
        monkeypatch.setattr(preflight, "homeless_gateway", lambda spec: [])
        monkeypatch.setattr(preflight, "routes", lambda: routes)
        monkeypatch.setattr(preflight, "missing_surge_room", lambda spec, added, upgraded: starved)
        file = tmp_path / "a.yaml"
        file.write_text(FILE % "/a")
        return main(["deploy", str(file), *flags]), addresses

    monkeypatch.setattr("service.rollout.attach.attach", attach)
    monkeypatch.setattr(preflight, "settle_running", lambda spec, running: spec)
    monkeypatch.setattr(changes, "find_gateway_changes", lambda spec, present: [])
    monkeypatch.setattr(apply.serve, "status", lambda: status(gateway="RUNNING", model_a="RUNNING"))
    return run


def test_a_gateway_whose_labels_no_node_has_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preflight, "alive_nodes", lambda: [Node({"CPU": 4}, {"pool": "cpu", "zone": "a"})])
    for labels, told in ({}, []), ({"pool": "cpu"}, []), ({"pool": "gpu"}, ["no node is labeled pool=gpu"]):
        spec = DeploymentSpec(models=(A,), gateway=GatewaySpec(node_labels=labels))
        assert preflight.homeless_gateway(spec) == [f"gateway.node_labels: {line}" for line in told]
        options = serve_config(spec)["applications"][-1]["deployments"][0]["ray_actor_options"]
        assert options == {"num_cpus": 0} | ({"label_selector": labels} if labels else {})


def test_what_becomes_of_the_gateway_is_said(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "listens_at", lambda: ("127.0.0.1", 8000))
    monkeypatch.setattr(changes, "grpc_port", lambda: 9000)
    spec = DeploymentSpec(models=(A, B))
    assert find_gateway_changes(spec, cluster.applications) == []
    gateway, auth = (
        GatewaySpec(port=8001, grpc_port=None, replicas=2, node_labels={"a": "b"}),
        Auth(api_keys_env="KEYS"),
    )
    other = spec.model_copy(update={"gateway": gateway, "auth": auth, "metrics": Metrics(port=None)})
    assert find_gateway_changes(other, cluster.applications) == [
        "adjust  gateway: requests in flight go on (gateway.replicas 1 -> 2, gateway.node_labels, "
        "metrics.port 9464 -> None, auth.api_keys_env None -> KEYS)",
        "keep    gateway: listens at 127.0.0.1:8000 until Serve is restarted",
        "keep    gateway: answers gRPC at 127.0.0.1:9000 until Serve is restarted",
    ]
    storage = Storage(outputs=Outputs(ttl_s=60, max_bytes=1 << 30), idempotency=Idempotency(ttl_s=70))
    (line,) = find_gateway_changes(spec.model_copy(update={"storage": storage}), cluster.applications)
    assert "(storage.outputs.ttl_s 3600.0 -> 60.0, storage.outputs.max_bytes None -> 1073741824, storage.idem" in line
    storage = Storage(outputs=Outputs(folder="/o"), idempotency=Idempotency(folder="/i"), jobs_url_env="URL")
    moved = find_gateway_changes(spec.model_copy(update={"storage": storage}), cluster.applications)
    assert "storage.outputs.folder None -> /o" in moved[0] and "storage.jobs_url_env None -> URL" in moved[0]
    for line, what in zip(moved[1:], ("files in the former", "keys that callers", "jobs in the former"), strict=True):
        assert line.startswith(f"lose    gateway: {what}")
    monkeypatch.setattr(changes, "grpc_port", lambda: None)
    (line,) = find_gateway_changes(spec, cluster.applications)
    assert line == "keep    gateway: does not answer gRPC until Serve is restarted"
    cluster.applications = {}
    assert find_gateway_changes(other, cluster.applications) == ["add     gateway: at 127.0.0.1:8001"]
    assert find_gateway_changes(spec, {}) == ["add     gateway: at 127.0.0.1:8000, gRPC at 127.0.0.1:9000"]


PLAN = [
    "upgrade a: new gangs, one by one; each old one stops when a new one serves (dtype None -> float16)",
    "leave   b: not in the file, goes on; --prune removes it",
]


def test_the_plan_is_printed_and_carried_out(
    cluster: Cluster, command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_ADDRESS", "10.0.0.1:6379")
    assert command() == (0, ["10.0.0.1:6379"])
    assert command("--address", "10.0.0.2:6379")[1][1:] == ["10.0.0.2:6379"]
    assert capsys.readouterr() == ("\n".join(PLAN * 2) + "\n", "done\ndone\n")
    assert len(cluster.told) == 2


@pytest.mark.parametrize(
    ("flags", "reasons", "code"),
    [
        (["--dry-run"], {}, 0),
        (["--dry-run"], {"obstacles": ("a: no model at /a",)}, 1),
        ([], {"obstacles": ("a: no model at /a",)}, 1),
        (["--allow-pending", "--allow-downtime"], {"obstacles": ("a: no model at /a",)}, 1),
        ([], {"unschedulable": ("a: needs 2 GPUs",)}, 1),
        ([], {"starved": {"a: no room": "a: no room"}}, 1),
        (["--dry-run"], {"starved": {"a: no room": "a: no room"}}, 1),
    ],
)
def test_what_is_refused_or_only_tried_changes_nothing(
    cluster: Cluster, command: Any, capsys: pytest.CaptureFixture[str], flags: list[str], reasons: Any, code: int
) -> None:
    assert command(*flags, **reasons)[0] == code
    out, err = capsys.readouterr()
    assert out.splitlines() == PLAN
    for said in (said for several in reasons.values() for said in several):
        assert f"error: {said}" in err
    assert ("nothing was changed" in err) == bool(code)
    assert cluster.told == []


def test_a_model_that_fits_nowhere_yet_is_deployed_on_demand(cluster: Cluster, command: Any) -> None:
    assert command("--allow-pending", unschedulable=("a: needs 2 GPUs",))[0] == 0
    assert len(cluster.told) == 1


@pytest.mark.parametrize("flags", [["--dry-run"], [], ["--allow-pending", "--allow-downtime"]])
def test_another_application_in_the_gateways_place_is_named(
    cluster: Cluster, command: Any, capsys: pytest.CaptureFixture[str], flags: list[str]
) -> None:
    assert command(*flags, routes={"gateway": "/", "theirs": "/"})[0] == 1
    assert "error: the application 'theirs' has the route prefix '/', which the gateway" in capsys.readouterr().err
    assert cluster.told == []


def test_the_routes_of_all_applications_are_known(monkeypatch: pytest.MonkeyPatch) -> None:
    details = {
        "gateway": {"status": "RUNNING", "route_prefix": "/", "deployed_app_config": {"route_prefix": "/"}},
        "model-a": {"status": "RUNNING", "route_prefix": None, "deployed_app_config": {"route_prefix": None}},
        "starting": {"status": "DEPLOYING", "route_prefix": None, "deployed_app_config": {"name": "starting"}},
        "run-by-hand": {"status": "RUNNING", "route_prefix": "/hand", "deployed_app_config": None},
        "going": {"status": "DELETING", "route_prefix": "/", "deployed_app_config": None},
    }
    client = SimpleNamespace(get_serve_details=lambda: {"applications": details})
    monkeypatch.setattr(serve_client, "_get_global_client", lambda **_: client)
    assert serve_client.routes() == {"gateway": "/", "starting": "/", "run-by-hand": "/hand"}


def test_what_serve_does_not_accept_is_said_in_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serve_client, "_get_global_client", lambda: object())
    wanted = serve_config(DeploymentSpec(models=(A,)))["applications"]
    with pytest.raises(
        SpecError, match='not accept the applications: Found duplicate applications for route prefix "/"'
    ):
        serve_client.apply_config([*wanted, FOREIGN | {"route_prefix": "/"}])


def test_a_gang_that_cannot_start_is_the_commands_failure(
    command: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(apply.serve, "status", lambda: status(gateway="RUNNING", model_a="DEPLOY_FAILED"))
    assert command()[0] == 1
    assert capsys.readouterr().err == "error: a: rank 1 died\n"


@pytest.mark.parametrize(("patience", "code"), [(30.0, 0), (-1.0, None)])
def test_a_controller_that_is_replaced_meanwhile_is_waited_for(
    command: Any, monkeypatch: pytest.MonkeyPatch, patience: float, code: int | None
) -> None:
    said = [status(gateway="RUNNING", model_a="RUNNING")] * 2
    monkeypatch.setattr(apply.serve, "status", Mock(side_effect=[RayActorError(), *said]))
    monkeypatch.setattr("service.cli.commands.deploy.SILENT_S", patience)
    if code is None:
        with pytest.raises(RayActorError):  # which `attach` says in a line
            command()
    else:
        assert command()[0] == code


def test_a_head_that_does_not_answer_is_said_at_once() -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(SpecError, match=f"no Ray cluster at '{address}': .*refused"), attach(address):
            pass
    with pytest.raises(SpecError, match="no Ray cluster at 'host:x'"), attach("host:x"):
        pass


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RayActorError(error_msg="The actor died.\nIts log:"), "no longer answers: The actor died.; where"),
        (RpcError("UNAVAILABLE"), "no longer answers: .*UNAVAILABLE"),
        (ConnectionError(), "no longer answers: ConnectionError"),
    ],
)
def test_a_cluster_that_goes_meanwhile_is_said(monkeypatch: pytest.MonkeyPatch, error: Exception, said: str) -> None:
    ended = []
    monkeypatch.setattr("service.rollout.attach.connect", lambda address, own: None)
    monkeypatch.setattr("service.rollout.attach.disconnect", lambda: ended.append(True))
    with pytest.raises(SpecError, match=said), attach("auto"):
        raise error
    assert ended == [True]


def test_a_lost_cluster_for_which_ray_has_no_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.rollout.attach.connect", lambda address, own: None)
    monkeypatch.setattr("service.rollout.attach.disconnect", lambda: None)
    lost = RuntimeError("Failed to connect to GCS")
    with pytest.raises(SpecError, match="no longer answers: Failed to connect to GCS"), attach("auto"):
        raises_in_ray(lost)


def raises_in_ray(error: Exception) -> None:
    """Raise it as compiled code of Ray does."""
    exec("raise error", {"__name__": "ray._raylet", "error": error})


def test_what_a_cluster_answers_is_no_loss_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.rollout.attach.connect", lambda address, own: None)
    monkeypatch.setattr("service.rollout.attach.disconnect", lambda: None)
    ours = (SpecError("a: rank 1 died"), TimeoutError(), BrokenPipeError(), RuntimeError("a bug"))
    for error in (RayTaskError("deploy", "trace", ValueError("a bug")), *ours):
        with pytest.raises(type(error)) as raised, attach("auto"):
            raise error
        assert raised.value is error


def test_nodes_must_have_the_same_files(monkeypatch: pytest.MonkeyPatch) -> None:
    here, there = (A.model_copy(update={"digest": digit * 64}) for digit in "12")
    for answers, said in (
        ([here, here], []),
        ([here, there], ["a: its files differ from node to node; copy the same on"]),
    ):
        monkeypatch.setattr(preflight, "_answers", lambda model, folder, said=answers: [(each, "") for each in said])
        spec, obstacles = preflight.verify_on_nodes(DeploymentSpec(models=(A, B)), {"a"})
        assert spec.models == (here, B)
        assert [line[: len(said[0])] for line in obstacles] == said


def test_what_a_node_says_of_a_model(demo_model: Path, ink: LoRA, hub: Path, tmp_path: Path) -> None:
    prepare = preflight._prepare._function
    sound = a_demo(demo_model, "demo").model_copy(update={"loras": (ink,)})
    settled, line = prepare(sound, None)
    assert (settled.tasks, line) == (("text-to-image", "image-to-image", "inpaint"), "")
    assert [len(digest) for digest in (settled.digest, settled.loras[0].digest)] == [64, 64]
    assert prepare(settled, None) == (settled, "")
    pinned = sound.model_copy(update={"source": "acme/demo", "revision": "v1"})
    settled, line = prepare(pinned, str(hub))
    assert (settled.tasks, settled.digest, line) == (("text-to-image", "image-to-image", "inpaint"), OTHER, "")
    save_file({"nonsense.lora_A.weight": torch.ones(2, 2)}, tmp_path / "bad.safetensors")
    bad = sound.model_copy(update={"loras": (ink.model_copy(update={"source": str(tmp_path / "bad.safetensors")}),)})
    assert "demo: " in prepare(bad, None)[1] and "bad.safetensors" in prepare(bad, None)[1]
    with pytest.MonkeyPatch.context() as patch:  # a library that raises what nobody foresaw
        patch.setattr("workers.model.lora.fit", lambda *_: {}["unforeseen"])
        assert prepare(sound, None)[1].endswith("cannot be checked: KeyError: 'unforeseen'")
    broken = tmp_path / "broken"
    shutil.copytree(demo_model, broken)
    (broken / "scheduler" / "scheduler_config.json").write_text("{broken")
    assert "scheduler_config.json is not JSON" in prepare(a_demo(broken, "demo"), None)[1]
