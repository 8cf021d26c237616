"""The facts of a cluster: each model's state with its reason."""

import contextlib
from typing import Any
from unittest.mock import Mock

import pytest
from ray.exceptions import RayActorError
from ray.serve._private.common import ReplicaState
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeStatus,
)

from deploy.model_sections import Autoscaling, Placement
from deploy.model_spec import ModelSpec
from service.names import GANG, app_name
from service.rollout import local_cluster
from service.state.model_states import SERVING, STATES, ModelState, cluster_object, model_state
from sp_core.degrees import ParallelDegrees
from workers.errors import GangLost
from workers.gang.placement import Node

MODEL = ModelSpec(name="a", source="/a", parallel=ParallelDegrees(ulysses_degree=2))
SLEEPY = MODEL.model_copy(update={"autoscaling": Autoscaling(min_replicas=0)})
HUGE = MODEL.model_copy(update={"parallel": ParallelDegrees(ulysses_degree=8)})
HUNGRY = MODEL.model_copy(update={"placement": Placement(memory=40 << 30)})
NODES = [Node({"CPU": 64, "GPU": 4, "memory": 200 << 30}, {})] * 2
FREE = NODES
FULL = [Node({"CPU": 64, "GPU": 1, "memory": 5 << 30}, {})] * 2
NEVER = "needs 8 GPUs on one node, the largest node has 4"


def status(application: str, states: dict[str, int], message: str = "", of_deployment: str = "") -> ServeStatus:
    """Serve's status with one model, whose replicas are given as Serve gives them: names of states."""
    deployment = DeploymentStatusOverview(
        DeploymentStatus.UPDATING, DeploymentStatusTrigger.UNSPECIFIED, states, of_deployment
    )
    overview = ApplicationStatusOverview(ApplicationStatus(application), message, 0.0, {GANG: deployment})
    return ServeStatus(applications={app_name("a"): overview})


CASES = [
    (MODEL, status("RUNNING", {"RUNNING": 1}), FREE, "running", ""),
    (MODEL, status("UNHEALTHY", {"RUNNING": 1, "STARTING": 1}), FREE, "running", ""),  # one still answers
    (
        MODEL,
        status("DEPLOYING", {"UPDATING": 1, "STARTING": 1}),
        FULL,
        "running",
        "1 more: loading, or waiting: needs 2 GPUs on one node, the largest node has 1 free",
    ),
    (
        HUGE,
        status("DEPLOYING", {"RUNNING": 1, "STARTING": 1}),
        FREE,
        "running",
        f"1 more: loading, or waiting: {NEVER} free",
    ),
    (MODEL, status("RUNNING", {"PENDING_MIGRATION": 1}), FREE, "running", ""),  # its node drains
    (MODEL, status("DEPLOY_FAILED", {"PENDING_MIGRATION": 1}, "it"), FREE, "running", ""),
    (MODEL, status("DEPLOYING", {"STARTING": 1}), FREE, "starting", ""),
    (MODEL, status("DEPLOYING", {}), FREE, "starting", ""),
    (MODEL, ServeStatus(), FREE, "starting", ""),  # Serve does not know it yet
    (
        MODEL,
        status("DEPLOYING", {"STARTING": 1}),
        FULL,
        "starting",
        "loading, or waiting: needs 2 GPUs on one node, the largest node has 1 free",
    ),
    (
        HUNGRY,
        status("DEPLOYING", {"STARTING": 1}),
        [Node(NODES[0].resources | {"memory": 5 << 30}, {})],
        "starting",
        "loading, or waiting: needs 80.0 GiB memory on one node, the largest node has 5.0 GiB free",
    ),
    (HUGE, status("DEPLOYING", {"STARTING": 1}), FREE, "waiting", NEVER),
    (HUGE, status("DEPLOYING", {}), FREE, "waiting", NEVER),
    (SLEEPY, status("RUNNING", {}), FULL, "asleep", ""),
    (SLEEPY, status("RUNNING", {"STARTING": 1}), FREE, "starting", ""),
    (SLEEPY, status("RUNNING", {"STOPPING": 1}), FREE, "asleep", ""),
    (SLEEPY, status("RUNNING", {"STOPPING": 1, "STARTING": 1}), FREE, "starting", ""),
    (MODEL, status("RUNNING", {"STOPPING": 1}), FREE, "starting", ""),
    (MODEL, status("DEPLOY_FAILED", {}, "no weights"), FREE, "failed", "no weights"),
    (MODEL, status("DEPLOY_FAILED", {"STARTING": 1}, "it", "rank 1 died"), FREE, "failed", "it rank 1 died"),
    (SLEEPY, status("UNHEALTHY", {}, "", "rank 1 died"), FREE, "failed", "rank 1 died"),
    (MODEL, status("UNHEALTHY", {"STARTING": 1}, "", "rank 1 died"), FREE, "starting", ""),  # it is being replaced
]


@pytest.mark.parametrize(("model", "serve", "free", "state", "reason"), CASES)
def test_the_state_of_a_model(model: ModelSpec, serve: ServeStatus, free: list[Node], state: str, reason: str) -> None:
    found = model_state(model, serve, NODES, free, queued=3, gangs=())
    assert (found.state, found.reason, found.queued) == (state, reason, 3)


def test_serve_knows_the_states_of_gangs_that_serve() -> None:
    assert {state.value for state in ReplicaState} >= set(SERVING)


def test_what_a_gang_holds_itself_is_not_what_it_lacks() -> None:
    """Its ranks have taken the last GPUs, and load."""
    found = model_state(MODEL, status("DEPLOYING", {"STARTING": 1}), NODES, FULL, placed=True)
    assert (found.state, found.reason) == ("starting", "")


def test_every_state_has_been_seen() -> None:
    assert {case[3] for case in CASES} == set(STATES)


@pytest.mark.parametrize("spelled", [str, ReplicaState])
def test_replicas_are_counted_by_the_names_of_their_states(spelled: Any) -> None:
    states = {spelled("RUNNING"): 2, spelled("STOPPING"): 1}
    assert model_state(MODEL, status("RUNNING", states), NODES, FREE).replicas == {"RUNNING": 2, "STOPPING": 1}


def gang(step: int, total_steps: int, phase: str = "denoise") -> dict[str, Any]:
    return {
        "backlog_s": 1.0,
        "now": {"phase": phase, "step": step, "total_steps": total_steps, "pids": [1, 2], "trouble": ""},
    }


def a_cluster() -> dict[str, Any]:
    busy = ModelState("running", "", {"RUNNING": 2, "STARTING": 1}, 3, (gang(5, 20), gang(0, 0, "idle")))
    return cluster_object([(MODEL, busy), (SLEEPY.model_copy(update={"name": "b"}), ModelState("asleep"))], NODES, FREE)


def test_a_running_models_trouble_is_its_reason() -> None:
    gangs = [gang(1, 4), gang(0, 0, "starting"), gang(0, 0, "starting")]
    for troubled in gangs[1:]:
        troubled["now"]["trouble"] = "lost its ranks"
    running = status("RUNNING", {"RUNNING": 3})
    assert model_state(MODEL, running, NODES, FREE, gangs=gangs).reason == "lost its ranks"
    assert model_state(MODEL, running, NODES, FREE, gangs=gangs).state == "running"
    assert model_state(MODEL, running, NODES, FREE, gangs=gangs[:1]).reason == ""


@pytest.mark.parametrize(
    ("running", "reported", "state"), [(2, 2, "starting"), (1, 1, "starting"), (2, 1, "running"), (1, 0, "running")]
)
@pytest.mark.parametrize("serving", SERVING)
def test_a_model_runs_only_while_a_gang_takes_requests(running: int, reported: int, state: str, serving: str) -> None:
    """A gang that has not reported yet has just become ready."""
    gangs = [gang(0, 0, "starting") for _ in range(reported)]
    for lost in gangs:
        lost["now"]["trouble"] = "lost its ranks"
    found = model_state(MODEL, status("RUNNING", {serving: running}), NODES, FREE, gangs=gangs)
    assert (found.state, found.reason) == (state, "lost its ranks" if reported else "")


def test_a_model_that_starts_again_and_again_says_why() -> None:
    said = "The deployment failed to start 1 times in a row. Error:\nOSError: [Errno 28] No space left on device: '/x'"
    found = model_state(MODEL, status("DEPLOYING", {"STARTING": 1}, of_deployment=said), NODES, FREE)
    assert (found.state, found.reason) == ("starting", "starting again: [Errno 28] No space left on device: '/x'")


def test_why_a_model_failed_comes_without_its_traceback() -> None:
    said = (
        "The deployment failed to start 3 times in a row. This may be due to a problem with its constructor. See "
        "controller logs for details. Error:\n\x1b[36mray::ServeReplica:model-a:Gang()\x1b[39m (pid=1, ip=127.0.0.1)\n"
        '  File "gang.py", line 1, in reconfigure\nworkers.errors.GangLost: a: bad.safetensors: expected weights\n\n'
        "During handling of the above exception, another exception occurred:\n\n"
        '  File "replica.py", line 2, in initialize\n    raise RuntimeError\nRuntimeError: a: no scheduler: {broken\n'
    )
    assert model_state(MODEL, status("DEPLOY_FAILED", {}, of_deployment=said), NODES, FREE).reason == (
        "a: no scheduler: {broken"
    )


def test_the_body_of_a_cluster() -> None:
    body = a_cluster()
    assert body["devices"] == {"CPU": {"total": 128, "free": 128}, "GPU": {"total": 8, "free": 8}}
    assert (body["object"], body["nodes"]) == ("cluster", 2)
    assert body["models"][0] == {
        "id": "a",
        "state": "running",
        "reason": "",
        "layout": "ulysses_degree=2",
        "ranks": 2,
        "device": "cuda",
        "replicas": {"RUNNING": 2, "STARTING": 1},
        "min_replicas": 1,
        "wanted_replicas": None,
        "wanted_reason": None,
        "max_replicas": 1,
        "queued": 3,
        "gangs": [gang(5, 20), gang(0, 0, "idle")],
    }


@pytest.mark.parametrize(
    ("state", "replicas", "raises"),
    [
        ("UNHEALTHY", {"RUNNING": 1}, False),
        ("UNHEALTHY", {"PENDING_MIGRATION": 1}, False),
        ("UNHEALTHY", {"STARTING": 1}, False),
        ("DEPLOY_FAILED", {"RUNNING": 1, "STARTING": 1}, False),
        ("DEPLOY_FAILED", {"STARTING": 1}, True),
        ("UNHEALTHY", {"STOPPING": 1}, True),
    ],
)
def test_a_local_cluster_ends_for_what_is_broken_only(
    monkeypatch: pytest.MonkeyPatch, state: str, replicas: Any, raises: bool
) -> None:
    monkeypatch.setattr(local_cluster.serve, "status", lambda: status(state, replicas, "rank 1 died"))
    with pytest.raises(GangLost, match="rank 1 died") if raises else contextlib.nullcontext():
        local_cluster._raise_failures()


def test_a_local_cluster_waits_for_a_controller_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_cluster.serve, "status", Mock(side_effect=RayActorError()))
    local_cluster._raise_failures()
