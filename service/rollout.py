"""Changes a running cluster to what a deployment file says: `spray deploy`, and the start of `spray serve`.

A spec comes in. It is compared with what Serve runs, verified on the cluster's nodes (weights, layout, devices), and
only then told to Serve, all in one config. Models that the file does not change are not touched.
"""

import copy
import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ServeDeploySchema
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.check import check_deployment
from deploy.pipelines import PIPELINES, pipeline_name
from deploy.spec import DeploymentSpec, ModelSpec, SpecError, Task
from service.app import gateway_table, serve_config
from service.names import GATEWAY_APP, app_name
from workers.placement import Node, alive_nodes, bundle, free_resources, may_host, obstacle
from workers.sources import fetch

Action = Literal["add", "upgrade", "adjust", "keep", "remove", "leave"]

TOUCHED: frozenset[Action] = frozenset({"add", "upgrade", "adjust"})
"""What is verified before it is done, and waited for afterwards."""

WORDS: dict[Action, str] = {
    "add": "new",
    "upgrade": "new gangs, one by one; each old one stops when a new one serves",
    "adjust": "its gangs go on",
    "keep": "unchanged",
    "remove": "its gangs finish what they compute, then stop",
    "leave": "not in the file, goes on; --prune removes it",
}


@dataclass(frozen=True)
class Change:
    """What becomes of one model.

    Attributes:
        model: its name.
        action: what is done.
        keys: what differs, as `key old -> new`.
    """

    model: str
    action: Action
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        keys = f" ({', '.join(self.keys)})" if self.keys else ""
        return f"{self.action:<8}{self.model}: {WORDS[self.action]}{keys}"


def running_models() -> dict[str, ModelSpec]:
    """The models that the cluster serves now, as they were deployed."""
    gateway = _applications().get(GATEWAY_APP)
    if gateway is None:
        return {}
    models = (ModelSpec.model_validate(model) for model in _user_config(gateway)["models"])
    return {model.name: model for model in models}


def plan_changes(running: dict[str, ModelSpec], wanted: Sequence[ModelSpec], prune: bool = False) -> list[Change]:
    """What it takes to get from the models that run to those that are wanted."""
    changes = []
    for model in wanted:
        before = running.get(model.name)
        if before is None:
            changes.append(Change(model.name, "add"))
            continue
        fixed, live = _differences(before.fixed, model.fixed), _differences(before.live, model.live)
        action: Action = "upgrade" if fixed else "adjust" if live else "keep"
        changes.append(Change(model.name, action, (*fixed, *live)))
    names = {model.name for model in wanted}
    changes += [Change(name, "remove" if prune else "leave") for name in running if name not in names]
    return changes


def deploy(spec: DeploymentSpec, changes: Sequence[Change], allow_downtime: bool = False) -> None:
    """Carry out the changes; Serve works on them when this returns.

    Args:
        spec: what the file says.
        changes: of `plan_changes`, for this spec.
        allow_downtime: let the old gangs of a model stop before the new ones start, where devices do not suffice.

    Raises:
        SpecError: devices do not suffice. Nothing was changed then.
    """
    starved = _starved(spec, changes)
    if starved and not allow_downtime:
        raise SpecError("\n".join(starved.values()))
    running = running_models()
    left = [running[change.model] for change in changes if change.action == "leave"]
    present = _applications()
    config = serve_config(spec, _instance_id(present))
    applications = {application["name"]: application for application in config["applications"]}
    for name in starved:
        applications[app_name(name)]["deployments"][0]["max_surge_percent"] = 0
    for model in left:
        applications[app_name(model.name)] = present[app_name(model.name)]
    gateway = applications[GATEWAY_APP]["deployments"][0]
    gateway["user_config"] |= gateway_table([*spec.models, *left])
    removed = {app_name(change.model) for change in changes if change.action == "remove"}
    others = {name: app for name, app in present.items() if name not in applications and name not in removed}
    config["applications"] = [*applications.values(), *others.values()]
    apply_config(config)


def apply_config(config: dict[str, Any]) -> None:
    """Hand a whole config to Serve. Applications that are not in it are removed."""
    client = _get_global_client()
    assert client is not None, "Serve runs here"
    client.deploy_apps(ServeDeploySchema.model_validate(config))


def derive_tasks(spec: DeploymentSpec) -> DeploymentSpec:
    """The spec with the tasks of those models filled in whose folders can be read on this machine."""

    def derived(model: ModelSpec) -> ModelSpec:
        try:
            return model.model_copy(
                update={"tasks": model.tasks or (PIPELINES[pipeline_name(Path(model.source))].task,)}
            )
        except ValueError:
            return model

    return spec.model_copy(update={"models": tuple(derived(model) for model in spec.models)})


def settled(spec: DeploymentSpec, running: dict[str, ModelSpec]) -> DeploymentSpec:
    """The spec with what was derived when its models were deployed, so that only the file's changes count."""

    def known(model: ModelSpec) -> ModelSpec:
        before = running.get(model.name)
        same = before and (before.source, before.revision) == (model.source, model.revision)
        return model.model_copy(update={"tasks": before.tasks}) if before and same and model.tasks is None else model

    return spec.model_copy(update={"models": tuple(known(model) for model in spec.models)})


def verify_on_nodes(spec: DeploymentSpec, touched: Collection[str]) -> tuple[DeploymentSpec, list[str]]:
    """Fetch and check the weights of the touched models on every node that may run them, before any device is taken.

    Returns:
        The spec with the tasks of these models filled in, and what keeps them from running, a line each.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    models: list[ModelSpec] = []
    obstacles: list[str] = []
    for model in spec.models:
        if model.name not in touched:
            models.append(model)
            continue
        hosts = [node["NodeID"] for node in nodes if may_host(model, Node(node["Resources"], node.get("Labels", {})))]
        checks = [
            _prepare.options(scheduling_strategy=NodeAffinitySchedulingStrategy(host, soft=False)).remote(
                model, spec.storage.models
            )
            for host in hosts
        ]
        answers: list[tuple[tuple[Task, ...], str]] = ray.get(checks)
        obstacles.extend(dict.fromkeys(line for _, line in answers if line))
        tasks = next((tasks for tasks, line in answers if not line), None)
        models.append(model.model_copy(update={"tasks": model.tasks or tasks}))
    return spec.model_copy(update={"models": tuple(models)}), obstacles


@ray.remote(num_cpus=0)
def _prepare(model: ModelSpec, models_folder: str | None) -> tuple[tuple[Task, ...], str]:
    """On a node: what the model is for, and what keeps it from running there."""
    try:
        folder = fetch(model, models_folder)
        here = model.model_copy(update={"source": str(folder)})
        check_deployment(DeploymentSpec(models=(here,)), {"cpu": math.inf, "cuda": math.inf})
    except ValueError as error:
        message = str(error)
        return (), message if message.startswith(f"{model.name}: ") else f"{model.name}: {message}"
    return (PIPELINES[pipeline_name(folder)].task,), ""


def misplaced(spec: DeploymentSpec, touched: Collection[str]) -> list[str]:
    """For each touched model whose gangs cannot be placed on any node of the cluster, why."""
    nodes = alive_nodes()
    reasons = ((model, obstacle(model, nodes)) for model in spec.models if model.name in touched)
    return [f"{model.name}: {reason}" for model, reason in reasons if reason]


def pending(changes: Sequence[Change]) -> list[str]:
    """What is not done yet of the changes, by model, and whether the gateway knows of them."""
    applications = serve.status().applications
    running = {name for name, application in applications.items() if application.status == "RUNNING"}
    unfinished = [
        change.model for change in changes if change.action in TOUCHED and app_name(change.model) not in running
    ]
    unfinished += [
        change.model for change in changes if change.action == "remove" and app_name(change.model) in applications
    ]
    return unfinished if GATEWAY_APP in running else [*unfinished, GATEWAY_APP]


def failures(changes: Sequence[Change]) -> Iterator[str]:
    """What was changed and cannot be started, with the reason. Models that were left alone are not looked at."""
    names = {change.model: app_name(change.model) for change in changes if change.action in TOUCHED}
    applications = serve.status().applications
    for name, of in (names | {GATEWAY_APP: GATEWAY_APP}).items():
        application = applications.get(of)
        if application is not None and application.status in ("DEPLOY_FAILED", "UNHEALTHY"):
            details = [application.message, *(deployment.message for deployment in application.deployments.values())]
            yield f"{name}: {' '.join(detail for detail in details if detail)}"


def _starved(spec: DeploymentSpec, changes: Sequence[Change]) -> dict[str, str]:
    """For each model that is to be upgraded, but has no room for a gang beside those that run: what is missing."""
    upgraded = {change.model for change in changes if change.action == "upgrade"}
    free = free_resources()
    starved = {}
    for model in spec.models:
        if model.name not in upgraded:
            continue
        for resource, each in bundle(model).items():
            needed = each * model.parallel.world_size
            if needed > free.get(resource, 0) + 1e-6:
                starved[model.name] = (
                    f"{model.name}: a new gang needs {needed:g} {resource} beside the old ones, "
                    f"{free.get(resource, 0):g} are free; add devices, or say --allow-downtime"
                )
    return starved


def _applications() -> dict[str, dict[str, Any]]:
    """The configs with which Serve's applications were deployed, by name."""
    client = _get_global_client(raise_if_no_controller_running=False)
    if client is None:
        return {}
    details = client.get_serve_details()["applications"]
    configs = {name: application.get("deployed_app_config") for name, application in details.items()}
    return {name: copy.deepcopy(config) for name, config in configs.items() if config}


def _user_config(application: dict[str, Any]) -> dict[str, Any]:
    user_config: dict[str, Any] = application["deployments"][0]["user_config"]
    return user_config


def _instance_id(applications: dict[str, dict[str, Any]]) -> str:
    gateway = applications.get(GATEWAY_APP)
    return str(gateway["args"]["instance_id"]) if gateway else ""


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in after:
        old, new = before.get(key), after[key]
        if isinstance(old, dict) and isinstance(new, dict) and set(old) == set(new):
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            short = not isinstance(old, list | dict) and not isinstance(new, list | dict)
            found.append(f"{prefix}{key} {old} -> {new}" if short else f"{prefix}{key}")
    return found
