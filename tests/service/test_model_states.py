"""The facts of a cluster: each model's state with its reason, and how a person sees them in tables and bars."""

import asyncio
import contextvars
import sys
from types import SimpleNamespace
from typing import Any

import prometheus_client
import pytest
from ray.serve._private.common import ReplicaState
from ray.serve.schema import (
    ApplicationStatus,
    ApplicationStatusOverview,
    DeploymentStatus,
    DeploymentStatusOverview,
    DeploymentStatusTrigger,
    ServeStatus,
)

from deploy.families.qwen_image import FAMILY
from deploy.spec import Autoscaling, ModelSpec, Placement
from service.api.responses import model_object
from service.cli.output import cluster_table, models_table, plain, say, show
from service.cli.progress import LoadBars, StepProgress
from service.names import GANG, app_name
from service.state.model_states import STATES, ModelState, cluster_object, model_state
from sp_core.degrees import ParallelDegrees
from tests.support.backend import FakeBackend
from workers.gang.gang import Gang, Setup
from workers.gang.placement import Node
from workers.messages import GenerationRequest, StepEvent
from workers.metrics import GangMetrics

MODEL = ModelSpec(name="a", source="/a", parallel=ParallelDegrees(ulysses_degree=2))
SLEEPY = MODEL.model_copy(update={"autoscaling": Autoscaling(min_replicas=0)})
HUGE = MODEL.model_copy(update={"parallel": ParallelDegrees(ulysses_degree=8)})
HUNGRY = MODEL.model_copy(update={"placement": Placement(memory=40 << 30)})
NODES = [Node({"CPU": 64, "GPU": 4, "memory": 200 << 30}, {})] * 2
FREE = NODES
REQUEST = GenerationRequest("r", "a", "a cup", 64, 64, 4, seed=1)
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


def test_every_state_has_been_seen() -> None:
    assert {case[3] for case in CASES} == set(STATES)


@pytest.mark.parametrize("spelt", [str, ReplicaState])
def test_replicas_are_counted_by_the_names_of_their_states(spelt: Any) -> None:
    states = {spelt("RUNNING"): 2, spelt("STOPPING"): 1}
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
    assert model_state(MODEL, running, NODES, FREE, gangs=gangs[:1]).reason == ""


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
        "max_replicas": 1,
        "queued": 3,
        "gangs": [gang(5, 20), gang(0, 0, "idle")],
    }


def test_ps_has_a_line_per_gang_with_a_bar_for_what_it_computes() -> None:
    assert plain(cluster_table(a_cluster())).splitlines() == [
        "2 nodes, 128 of 128 CPU free, 8 of 8 GPU free",
        "MODEL  STATE    REPLICAS             LAYOUT            QUEUED  RUNNING",
        "a      running  2 (1-1, 1 starting)  ulysses_degree=2  3       [#####...............] denoise 5/20",
        "                                                               idle",
        "b      asleep   0 (0-1)              ulysses_degree=2  0",
    ]


@pytest.mark.parametrize(
    ("step", "total_steps", "bar"),
    [(0, 20, "." * 20), (1, 30, "." * 20), (29, 30, "#" * 19 + "."), (30, 30, "#" * 20), (1, 1, "#" * 20)],
)
def test_a_bar_is_full_only_at_the_last_step(step: int, total_steps: int, bar: str) -> None:
    body = cluster_object([(MODEL, ModelState("running", gangs=(gang(step, total_steps),)))], NODES, FREE)
    assert f"[{bar}] denoise {step}/{total_steps}" in plain(cluster_table(body))


def test_reasons_stand_below_the_table() -> None:
    body = cluster_object([(HUGE, ModelState("waiting", NEVER))], NODES, FREE)
    assert plain(cluster_table(body)).splitlines()[-1] == f"a: {NEVER}"


def test_models_has_a_line_per_model_with_what_may_be_asked() -> None:
    models = FakeBackend().models()
    listed = {"data": [model_object(models[name], ModelState("running")) for name in ("one", "paint", "film")]}
    assert plain(models_table(listed)).splitlines() == [
        "MODEL  TASKS          STATE    DEFAULT SIZE  STEPS  ADAPTERS  ALSO CALLED",
        "one    ?              running  1024x1024     50     ink       -",
        "paint  text-to-image  running  1024x1024     50     ink       brush, pencil",
        "film   text-to-video  running  64x64x5       4      ink       movie",
    ]


def test_without_a_terminal_loading_is_told_in_quarters(capsys: pytest.CaptureFixture[str]) -> None:
    with LoadBars(["a", "b"]) as bars:
        for a, b in ((0, 0), (0.1, 0), (0.24, 0), (0.25, 1), (0.7, 1), (0.6, 1), (0.999, 1), (1, 1), (1, 1)):
            bars.show({"a": a, "b": b})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "a: 0 % loaded", "b: 0 % loaded", "a: 25 % loaded", "b: ready", "a: 70 % loaded", "a: 99 % loaded", "a: ready",
    ]  # fmt: skip


def test_on_a_terminal_loading_has_a_bar_per_model(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with LoadBars(["a", "longer"]) as bars:
        bars.show({"a": 0.5, "longer": 1.0})
        bars.show({"a": 0.4})  # a gang that starts again does not turn the bar back
        assert [task.completed for task in bars._bars.tasks] == [0.5, 1.0]
    err = capsys.readouterr().err
    assert "longer" in err and "100%" in err


def test_on_a_terminal_steps_have_a_bar(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with StepProgress() as progress:
        for step in (1, 2, 1):  # the third is a retry
            progress.show(StepEvent(step, 2, 0.5))
        assert [task.completed for task in progress._bar.tasks] == [1]
    assert "1/2" in capsys.readouterr().err


@pytest.mark.parametrize("terminal", [False, True])
def test_tables_have_colors_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, terminal: bool
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    show(cluster_table(a_cluster()))
    out = capsys.readouterr().out
    assert "[#####" in out  # brackets are no markup
    assert ("\x1b[" in out) == terminal


def test_steps_are_lines_where_no_terminal_is(capsys: pytest.CaptureFixture[str]) -> None:
    with StepProgress() as progress:
        progress.show(StepEvent(1, 2, 0.5))
    assert capsys.readouterr().err == "step 1/2 0.500 s\n"


def test_words_go_to_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    say("hello")
    assert capsys.readouterr() == ("", "hello\n")


@pytest.mark.parametrize(
    ("said", "running", "now"),
    [
        (("idle", 4), None, ("idle", 0)),
        (("idle", 4), REQUEST, ("encode", 0)),  # the rank has not said anything since it got the request
        (("denoise", 2), REQUEST, ("denoise", 2)),
        (("decode", 4), REQUEST, ("decode", 4)),
    ],
)
def test_a_gang_knows_of_its_request_before_its_ranks_say_so(
    said: tuple[Any, int], running: GenerationRequest | None, now: tuple[str, int]
) -> None:
    gang = Gang({})
    assert gang._progress() == ("starting", 0)
    gang._ranks = SimpleNamespace(statuses=[SimpleNamespace(phase=said[0], step=said[1])])  # type: ignore[assignment]
    gang._running = running
    assert gang._progress() == now


def test_a_gang_without_its_ranks_says_so_until_new_ones_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = ModelSpec(name="unlucky", source="/a")
    context = SimpleNamespace(replica_id=SimpleNamespace(unique_id="r"))
    monkeypatch.setattr("workers.gang.gang.serve.get_replica_context", lambda: context)

    async def story() -> list[dict[str, Any]]:
        gang, ready = Gang(spec.fixed), asyncio.Event()
        metrics, context = GangMetrics("unlucky", "0"), contextvars.copy_context()
        gang._setup = Setup(spec, FAMILY, None, context, {}, metrics)
        gang._refused = "no such file"
        ranks = SimpleNamespace(statuses=[SimpleNamespace(phase="denoise", step=3, pid=7)], startup_s=1.0)
        gang._ranks = ranks  # type: ignore[assignment]

        async def start() -> Any:
            await ready.wait()
            return ranks

        monkeypatch.setattr(gang, "_start_ranks", start)
        gang._on_lost()
        await asyncio.sleep(0)
        lost = gang.record_routing_stats()["now"]
        ready.set()
        assert gang._replacement is not None
        await gang._replacement
        return [lost, gang.record_routing_stats()["now"]]

    lost, back = asyncio.run(story())
    assert (lost["phase"], lost["pids"]) == ("starting", [])
    assert lost["trouble"] == "a gang has lost its ranks, new ones start"
    assert (back["pids"], back["trouble"]) == ([7], "no such file")
    assert prometheus_client.REGISTRY.get_sample_value("spray_gang_losses_total", {"model": "unlucky"}) == 1
