"""The checks on a cluster before Serve changes it: weights on its nodes, and room for the gangs.

A spec and the names of the models that change come in; lines that say what is missing go out. For `spray deploy`.
"""

import logging
import math
from collections.abc import Collection, Mapping
from pathlib import Path

import ray
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.check import check_deployment
from deploy.families.lookup import find_family
from deploy.model_folder import model_folder
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec
from service.app import GATEWAY_ROUTE
from service.names import GANG, GATEWAY_APP, app_name
from service.rollout.changes import with_digests_of
from service.rollout.serve_client import routes
from sp_core.torchvision_operators import declare_missing_operators
from workers.gang.placement import alive_nodes, free_nodes, hosts, unschedulable, without
from workers.model.digests import settle_loras, verify_lora
from workers.model.files import fetch, settle_files

logger = logging.getLogger(__name__)


def derive_tasks(spec: DeploymentSpec) -> DeploymentSpec:
    """The spec with the tasks of all models whose folders this machine can read."""

    def derived(model: ModelSpec) -> ModelSpec:
        folder = model_folder(spec, model)
        try:
            tasks = model.tasks or (find_family(folder).tasks if folder else None)
        except ValueError:
            return model
        return model.model_copy(update={"tasks": tasks})

    return spec.model_copy(update={"models": tuple(derived(model) for model in spec.models)})


def settle_here(spec: DeploymentSpec) -> DeploymentSpec:
    """The spec with the tasks of all models whose folders this machine can read, and the digests of folders."""

    def settled(model: ModelSpec) -> ModelSpec:
        try:
            return settle_loras(model) if model.from_hub else settle_files(model, spec.storage.models)
        except (ValueError, OSError):
            return model  # reported where the model is checked, or by its gang

    return derive_tasks(spec.model_copy(update={"models": tuple(map(settled, spec.models))}))


def settle_running(spec: DeploymentSpec, running: Mapping[str, ModelSpec]) -> DeploymentSpec:
    """The spec with the digests of the running models, as a node sees their files now.

    If its files cannot be read, a model keeps the digests of its deployment.
    """
    asked = {}
    for model in spec.models:
        before = running.get(model.name)
        if before is None or (before.source, before.revision) != (model.source, model.revision):
            continue  # its files may have to be fetched first
        if (host := next(iter(hosts(model)), None)) is not None:
            on_host = NodeAffinitySchedulingStrategy(host, soft=False)
            asked[model.name] = _settle.options(scheduling_strategy=on_host).remote(model, spec.storage.models)

    def settled(model: ModelSpec) -> ModelSpec:
        try:
            found: ModelSpec | None = ray.get(asked[model.name]) if model.name in asked else None
        except RayError:
            found = None
        if found is not None:
            return found
        before = running.get(model.name)
        return model if before is None else with_digests_of(before, model)

    return spec.model_copy(update={"models": tuple(map(settled, spec.models))})


def verify_on_nodes(spec: DeploymentSpec, changed: Collection[str]) -> tuple[DeploymentSpec, list[str]]:
    """Fetch and check the weights of the changed models on every node that may run them, before any device is taken.

    Returns:
        The spec with the tasks and digests of these models, and a line for each reason why they cannot run.
    """
    models: list[ModelSpec] = []
    problems: dict[str, None] = {}
    for model in spec.models:
        if model.name not in changed:
            models.append(model)
            continue
        answers = _answers(model, spec.storage.models)
        problems |= dict.fromkeys(line for _, line in answers if line)
        settled = [answer for answer, line in answers if not line]
        if any(each != settled[0] for each in settled):
            problems[f"{model.name}: its files differ from node to node; copy the same ones to all"] = None
        models.append(settled[0] if settled else model)
    return spec.model_copy(update={"models": tuple(models)}), list(problems)


def unschedulable_models(spec: DeploymentSpec, names: Collection[str]) -> list[str]:
    """A line for each of these models whose gangs fit on no node of the cluster, even an empty one."""
    nodes = alive_nodes()
    reasons = ((model, unschedulable(model, nodes)) for model in spec.models if model.name in names)
    return [f"{model.name}: {reason}" for model, reason in reasons if reason]


def homeless_gateway(spec: DeploymentSpec) -> list[str]:
    """A line if no node of the cluster has the labels that gateways require."""
    wanted = spec.gateway.node_labels
    if any(wanted.items() <= dict(node.labels).items() for node in alive_nodes()):
        return []
    return [f"gateway.node_labels: no node is labeled {', '.join(f'{key}={value}' for key, value in wanted.items())}"]


def taken_route() -> list[str]:
    """A line for each application of somebody else that answers where the gateway must."""
    others = [name for name, route in routes().items() if route == GATEWAY_ROUTE and name != GATEWAY_APP]
    return [
        f"the application {name!r} has the route prefix {GATEWAY_ROUTE!r}, which the gateway needs; "
        "deploy it with another route_prefix, or remove it"
        for name in others
    ]


def missing_surge_room(spec: DeploymentSpec, added: Collection[str], upgraded: Collection[str]) -> Mapping[str, str]:
    """For each upgraded model without room for a new gang beside its old ones: a line that says what is missing.

    A sleeping model has no old gangs. Models are counted in the file's order: new models and earlier upgrades take
    room, as many gangs of each as start at once. A model that may sleep starts none before its first request.
    """
    nodes = free_nodes()
    statuses = serve.status().applications if upgraded else {}
    missing = {}
    for model in spec.models:
        application = statuses.get(app_name(model.name))
        built = application.deployments.get(GANG) if application is not None else None  # not yet, if it is being built
        asleep = built is not None and not built.replica_states
        reason = None
        if model.name in upgraded and not asleep:
            reason = unschedulable(model, nodes)
            if reason:
                missing[model.name] = f"{model.name}: a new gang beside the old ones {reason} free"
        starting = 0
        if model.name in added or (model.name in upgraded and asleep):
            starting = model.autoscaling.min_replicas
        elif model.name in upgraded and not reason:
            starting = 1  # gangs are replaced one by one
        for _ in range(starting):
            nodes = without(model, nodes)
    return missing


def _answers(model: ModelSpec, models_folder: str | None) -> list[tuple[ModelSpec, str]]:
    """The results of `_prepare` on each node that may run the model. All nodes fetch at once."""
    asked = {}
    for host in hosts(model):
        on_host = NodeAffinitySchedulingStrategy(host, soft=False)
        asked[host] = _prepare.options(scheduling_strategy=on_host).remote(model, models_folder)
    answers: list[tuple[ModelSpec, str]] = []
    for host, answer in asked.items():
        try:
            answers.append(ray.get(answer))
        except RayError as error:
            cause = error.cause if isinstance(error, RayTaskError) else error
            reason = f"{type(cause).__name__}: {cause}".splitlines()[0]
            answers.append((model, f"{model.name}: cannot be checked on node {host[:8]}: {reason}"))
    return answers


@ray.remote(num_cpus=0)
def _prepare(model: ModelSpec, models_folder: str | None) -> tuple[ModelSpec, str]:
    """On a node: the model with its tasks and digests, and the reason why it cannot run there; empty if it can."""
    try:
        folder: Path = fetch(model, models_folder)
        here = model.model_copy(update={"source": str(folder), "revision": None})
        check_deployment(DeploymentSpec(models=(here,)), {"cpu": math.inf, "cuda": math.inf})
        declare_missing_operators()
        # Here, because they load torch, which nodes need but the command does not.
        from workers.model.components import verify_loadable
        from workers.model.lora import check_lora
        from workers.model.out_of_tree import sequence_plan

        sequence_plan(here)
        verify_loadable(here, folder)
        for lora in model.loras:
            check_lora(lora, here, folder)
            verify_lora(lora)
        settled = settle_files(model, models_folder)
    except (ValueError, OSError) as error:
        message = str(error)
        return model, message if message.startswith(f"{model.name}: ") else f"{model.name}: {message}"
    except Exception as error:  # of a library: a reason too, and its traceback in the node's log
        logger.exception("%s: cannot be checked", model.name)
        return model, f"{model.name}: {model.source} cannot be checked: {type(error).__name__}: {error}"
    return settled.model_copy(update={"tasks": model.tasks or find_family(folder).tasks}), ""


@ray.remote(num_cpus=0)
def _settle(model: ModelSpec, models_folder: str | None) -> ModelSpec | None:
    """On a node: the model with its digests; None if its files cannot be read."""
    try:
        return settle_files(model, models_folder)
    except (ValueError, OSError):
        return None
