"""Carries out changes: tells Serve what to run, and follows its progress. For `spray deploy` and local clusters.

All applications go to Serve in one config, because Serve removes what a config leaves out.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from pydantic import ValidationError
from ray import serve
from ray.serve.schema import ApplicationStatusOverview

from deploy.gateway_spec import is_loopback
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from service.app import gateway_application, grpc_options, serve_config
from service.names import GATEWAY_APP, MODEL_APP_PREFIX, app_name
from service.rollout.changes import DEPLOYING, Change, running_models, user_config
from service.rollout.serve_client import applications, apply_config, listens_at, start_serve
from service.state.model_states import failure, is_broken

GIVEN_UP = "failed to start"
"""In Serve's message about a deployment whose new replicas it starts no more."""


def apply_changes(
    spec: DeploymentSpec,
    changes: Sequence[Change],
    compared_with: Mapping[str, dict[str, Any]],
    without_surge: Sequence[str] = (),
) -> None:
    """Tell Serve to carry out the changes. It works on them after this returns.

    Args:
        spec: what the file says.
        changes: the result of `find_changes` for this spec.
        compared_with: `applications()` when the changes were found.
        without_surge: models whose old gangs stop before the new ones start.

    Raises:
        SpecError: a name in the file belongs to a model that keeps running, or somebody else has deployed since the
            changes were found (fetching weights takes time). Nothing was changed.
    """
    present = applications()
    _reject_other_deployments(present, compared_with)
    running = running_models(present)
    left = [running[change.model] for change in changes if change.action == "leave"]
    _reject_duplicate_names(spec, left)
    instance_id = _instance_id(present)
    config = serve_config(spec, instance_id)
    desired = {application["name"]: application for application in config["applications"]}
    for name in without_surge:
        desired[app_name(name)]["deployments"][0]["max_surge_percent"] = 0
    for model in left:
        desired[app_name(model.name)] = present[app_name(model.name)]
        of_nodes = {"metrics": spec.metrics_at, "tracing": spec.tracing.model_dump()}  # they have one, whatever runs
        user_config(desired[app_name(model.name)]).update(of_nodes)
    # The gateway serves these too: its grace period and its places are for all models that run.
    served = spec.model_copy(update={"models": (*spec.models, *left)})
    desired[GATEWAY_APP] = gateway_application(served, instance_id)
    removed = {app_name(change.model) for change in changes if change.action == "remove"}
    others = {name: app for name, app in present.items() if name not in desired and name not in removed}
    start_serve(spec.gateway.host, spec.gateway.port, grpc_options(spec.gateway.grpc_port))
    host, _ = listens_at()  # not always the file's: Serve may run already
    user_config(desired[GATEWAY_APP])["local_only"] = is_loopback(host) and not spec.auth.needs_key
    apply_config([*desired.values(), *others.values()])


def drain() -> tuple[int, float]:
    """Make the gateways refuse new requests. Everything else keeps running.

    Returns:
        How many gateways there are, and the longest grace period in seconds, as the latest deployment has set them.
    """
    present = applications()
    user_config(present[GATEWAY_APP])["draining"] = True
    apply_config(list(present.values()))
    options = {name: application["deployments"][0] for name, application in present.items()}
    gateways: int = options[GATEWAY_APP]["num_replicas"]
    return gateways, max(float(each["graceful_shutdown_timeout_s"]) for each in options.values())


def unfinished(changes: Sequence[Change]) -> list[str]:
    """The models whose changes Serve is still making; also the gateway, until it knows them."""
    statuses = serve.status().applications
    names = {change.model: app_name(change.model) for change in changes if change.action in DEPLOYING}
    left = [model for model, name in names.items() if name not in statuses or statuses[name].status != "RUNNING"]
    left += [c.model for c in changes if c.action == "remove" and app_name(c.model) in statuses]
    gateway = statuses.get(GATEWAY_APP)
    return left if gateway is not None and gateway.status == "RUNNING" else [*left, GATEWAY_APP]


def failures(changes: Sequence[Change]) -> Iterator[str]:
    """A line for each changed model that cannot be started, and for the gateway, with the reason."""
    statuses = serve.status().applications
    names = {change.model: app_name(change.model) for change in changes if change.action in DEPLOYING}
    for model, name in {**names, GATEWAY_APP: GATEWAY_APP}.items():
        application = statuses.get(name)
        if application is not None and application.status == "DEPLOY_FAILED" and not _is_passing(application):
            yield f"{model}: {failure(application)}"


def _is_passing(application: ApplicationStatusOverview) -> bool:
    """Whether Serve replaces a gang that was lost during the change, which it calls DEPLOY_FAILED too.

    A change that Serve has given up is none, though old gangs serve: only the message says it then, not the trigger.
    """
    return not is_broken(application) and all(
        deployment.status_trigger == "HEALTH_CHECK_FAILED" and GIVEN_UP not in deployment.message
        for deployment in application.deployments.values()
        if deployment.status == "DEPLOY_FAILED"
    )


def _reject_other_deployments(
    present: Mapping[str, dict[str, Any]], compared_with: Mapping[str, dict[str, Any]]
) -> None:
    changed = [name for name in {**present, **compared_with} if present.get(name) != compared_with.get(name)]
    if changed:
        names = ", ".join(name.removeprefix(MODEL_APP_PREFIX) for name in changed)
        raise SpecError(f"another deployment changed {names} meanwhile; look at it, then deploy again")


def _reject_duplicate_names(spec: DeploymentSpec, left: Sequence[ModelSpec]) -> None:
    try:
        DeploymentSpec(models=(*spec.models, *left))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(f"{message}; one of them is not in the file and goes on (--prune removes it)") from None


def _instance_id(present: Mapping[str, dict[str, Any]]) -> str:
    """The id of the running gateway, because another id would restart it."""
    gateway = present.get(GATEWAY_APP, {})
    return str(gateway.get("args", {}).get("instance_id", ""))
