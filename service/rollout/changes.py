"""Changes a running cluster to what a deployment file says: `spray deploy`, and the start of `spray serve`.

A spec comes in. It is compared with what Serve runs, verified on the cluster's nodes (`service.rollout.preflight`), and
only then told to Serve, all in one config. Models that the file does not change are not touched.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError
from ray import serve
from ray.serve.context import _disconnect, _get_global_client
from ray.serve.schema import ServeDeploySchema

from deploy.spec import DeploymentSpec, ModelSpec, SpecError
from service.app import gateway_table, serve_config
from service.names import GATEWAY_APP, MODEL_APP_PREFIX, app_name
from service.state.model_states import failure

Action = Literal["add", "upgrade", "adjust", "keep", "remove", "leave"]

WORDS: dict[Action, str] = {
    "add": "new",
    "upgrade": "new gangs, one by one; each old one stops when a new one serves",
    "adjust": "its gangs go on",
    "keep": "unchanged",
    "remove": "its gangs finish what they compute, then stop",
    "leave": "not in the file, goes on; --prune removes it",
}

TOUCHED: tuple[Action, ...] = ("add", "upgrade", "adjust")


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


def running_models(present: Mapping[str, dict[str, Any]]) -> dict[str, ModelSpec]:
    """The models among Serve's applications, as they were deployed.

    Raises:
        SpecError: another version of spray deployed them, and this one cannot read it.
    """
    found = {}
    for name, application in present.items():
        if name.startswith(MODEL_APP_PREFIX):
            try:
                model = ModelSpec.model_validate(application["args"] | _user_config(application)["model"])
            except (KeyError, TypeError, ValidationError):
                raise SpecError(f"the application {name} is none of this version of spray; remove it first") from None
            found[model.name] = model
    return found


def find_changes(running: dict[str, ModelSpec], wanted: Sequence[ModelSpec], prune: bool = False) -> list[Change]:
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


def find_gateway_changes(spec: DeploymentSpec) -> list[str]:
    """What becomes of the gateway, in lines to print; its table of models is not mentioned."""
    present = applications().get(GATEWAY_APP)
    if present is None:
        return [f"add     {GATEWAY_APP}: at {spec.gateway.host}:{spec.gateway.port}"]
    client = _get_global_client()
    assert client is not None, "its application was just read"
    options = present["deployments"][0]
    before = {
        "gateway": {"replicas": options["num_replicas"]},
        "limits": {"max_body_bytes": options["user_config"]["max_body_bytes"]},
        "auth": {"api_keys_env": options["user_config"]["api_keys_env"]},
        "metrics": options["user_config"]["metrics"],
    }
    after = spec.model_dump(include={name: set(keys) for name, keys in before.items()}) | {"metrics": spec.metrics_at}
    changed = _differences(before, after)
    lines = [f"adjust  {GATEWAY_APP}: requests in flight go on ({', '.join(changed)})"] if changed else []
    where = client.get_serve_details()["http_options"]
    if (where["host"], where["port"]) != (spec.gateway.host, spec.gateway.port) and spec.gateway.port:
        lines.append(f"keep    {GATEWAY_APP}: listens at {where['host']}:{where['port']} until Serve starts anew")
    return lines


def settled(spec: DeploymentSpec, running: dict[str, ModelSpec]) -> DeploymentSpec:
    """The spec with what was derived when its models were deployed, so that only the file's changes count."""

    def known(model: ModelSpec) -> ModelSpec:
        before = running.get(model.name)
        if before is None or model.tasks or (before.source, before.revision) != (model.source, model.revision):
            return model
        return model.model_copy(update={"tasks": before.tasks})

    return spec.model_copy(update={"models": tuple(known(model) for model in spec.models)})


def deploy(
    spec: DeploymentSpec,
    changes: Sequence[Change],
    planned_on: Mapping[str, dict[str, Any]],
    without_surge: Sequence[str] = (),
) -> None:
    """Carry out the changes; Serve works on them when this returns.

    Args:
        spec: what the file says.
        changes: of `find_changes`, for this spec.
        planned_on: `applications()` when the changes were planned.
        without_surge: models whose old gangs stop before the new ones start.

    Raises:
        SpecError: a name of the file is that of a model that goes on, or somebody else has deployed since the changes
            were planned (fetching weights takes its time). Nothing was changed then.
    """
    present = applications()
    changed = [name for name in {**present, **planned_on} if present.get(name) != planned_on.get(name)]
    if changed:
        names = ", ".join(name.removeprefix(MODEL_APP_PREFIX) for name in changed)
        raise SpecError(f"another deployment changed {names} meanwhile; look at it, then deploy again")
    running = running_models(present)
    left = [running[change.model] for change in changes if change.action == "leave"]
    try:
        DeploymentSpec(models=(*spec.models, *left))
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise SpecError(f"{message}; one of them is not in the file and goes on (--prune removes it)") from None
    config = serve_config(spec, _instance_id(present))
    wanted = {application["name"]: application for application in config["applications"]}
    for name in without_surge:
        wanted[app_name(name)]["deployments"][0]["max_surge_percent"] = 0
    for model in left:
        wanted[app_name(model.name)] = present[app_name(model.name)]
        _user_config(wanted[app_name(model.name)])["metrics"] = spec.metrics_at  # of the node, whatever runs there
    wanted[GATEWAY_APP]["deployments"][0]["user_config"] |= gateway_table([*spec.models, *left])
    removed = {app_name(change.model) for change in changes if change.action == "remove"}
    others = {name: app for name, app in present.items() if name not in wanted and name not in removed}
    start_serve(spec)
    apply_config([*wanted.values(), *others.values()])


def start_serve(spec: DeploymentSpec, **options: Any) -> None:
    """Start Serve where the spec wants it to listen, unless it runs: where it listens then stays as it is."""
    if _get_global_client(raise_if_no_controller_running=False) is None:
        where = {"host": spec.gateway.host, "port": spec.gateway.port}
        serve.start(**({"proxy_location": "EveryNode", "http_options": where} | options))


def apply_config(wanted: Sequence[dict[str, Any]], **options: Any) -> None:
    """Tell Serve which applications to run; others are removed."""
    client = _get_global_client()
    assert client is not None, "Serve runs here"
    client.deploy_apps(ServeDeploySchema.model_validate({"applications": list(wanted), **options}))


def forget() -> None:
    """Serve remembers a cluster's controller beyond `ray.shutdown`, and takes it for that of the next cluster."""
    _disconnect()  # type: ignore[no-untyped-call]


def drain() -> None:
    """Let the gateway take no new requests; all else stays as it is."""
    present = applications()
    _user_config(present[GATEWAY_APP])["draining"] = True
    apply_config(list(present.values()))


def pending(changes: Sequence[Change]) -> list[str]:
    """What is not done yet of the changes, by model; and the gateway, until it knows of them."""
    statuses = serve.status().applications
    names = {change.model: app_name(change.model) for change in changes if change.action in TOUCHED}
    unfinished = [model for model, name in names.items() if name not in statuses or statuses[name].status != "RUNNING"]
    unfinished += [c.model for c in changes if c.action == "remove" and app_name(c.model) in statuses]
    gateway = statuses.get(GATEWAY_APP)
    return unfinished if gateway is not None and gateway.status == "RUNNING" else [*unfinished, GATEWAY_APP]


def failures(changes: Sequence[Change]) -> Iterator[str]:
    """What was changed and cannot be started, with the reason."""
    statuses = serve.status().applications
    names = {change.model: app_name(change.model) for change in changes if change.action in TOUCHED}
    for model, name in {**names, GATEWAY_APP: GATEWAY_APP}.items():
        application = statuses.get(name)
        if application is not None and application.status == "DEPLOY_FAILED":
            yield f"{model}: {failure(application)}"


def applications() -> dict[str, dict[str, Any]]:
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


def _instance_id(present: dict[str, dict[str, Any]]) -> str:
    gateway = present.get(GATEWAY_APP, {})
    return str(gateway.get("args", {}).get("instance_id", ""))


def _differences(before: dict[str, Any], after: dict[str, Any], prefix: str = "") -> list[str]:
    found = []
    for key in after:
        old, new = before.get(key), after[key]
        if isinstance(old, dict) and isinstance(new, dict) and set(old) == set(new) and key != "env":
            found += _differences(old, new, f"{prefix}{key}.")
        elif old != new:
            short = not isinstance(old, list | dict) and not isinstance(new, list | dict)
            found.append(f"{prefix}{key} {old} -> {new}" if short else f"{prefix}{key}")
    return found
