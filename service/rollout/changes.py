"""The differences between a deployment file and what Serve runs, model by model: for `spray deploy`.

A spec and the configs of Serve's applications come in; `Change`s come out, and nothing is changed. Carried out by
`service.rollout.apply`, which leaves alone the models that the file does not change.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from pydantic import ValidationError

from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError, Tracing
from deploy.storage_spec import Idempotency, Outputs
from service.names import GATEWAY_APP, MODEL_APP_PREFIX
from service.rollout.serve_client import grpc_port, listens_at

Action = Literal["add", "upgrade", "adjust", "keep", "remove", "leave"]

WORDS: dict[Action, str] = {
    "add": "new",
    "upgrade": "new gangs, one by one; each old one stops when a new one serves",
    "adjust": "its gangs go on",
    "keep": "unchanged",
    "remove": "its gangs finish what they compute, then stop",
    "leave": "not in the file, goes on; --prune removes it",
}

DEPLOYING: tuple[Action, ...] = ("add", "upgrade", "adjust")
"""The actions that change what Serve runs."""


LOST = {
    (
        "outputs.folder",
        "outputs.url",
    ): "files in the former place stay there and are found no more, neither by URLs that "
    "were answered nor by their jobs",
    ("idempotency.folder",): "keys that callers have used are forgotten; a request that is repeated is drawn again",
    (
        "jobs",
        "jobs_url_env",
    ): "jobs in the former store stay there; they are found no more, and those that wait do not run",
}
"""By keys of `storage`, what is out of reach when one of them changes, until it is put back."""


@dataclass(frozen=True)
class Change:
    """What the rollout does to one model.

    Attributes:
        model: its name.
        action: what happens.
        keys: the differences, each as `key old -> new`.
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
                model = ModelSpec.model_validate(application["args"] | user_config(application)["model"])
            except (KeyError, TypeError, ValidationError):
                raise SpecError(
                    f"the application {name} was deployed by another version of spray; remove it first"
                ) from None
            found[model.name] = model
    return found


def find_changes(running: dict[str, ModelSpec], desired: Sequence[ModelSpec], prune: bool = False) -> list[Change]:
    """The changes from the models that run to those of a file.

    Args:
        running: by name.
        desired: the models of the file.
        prune: remove models that are not in the file, instead of leaving them.
    """
    changes = []
    for model in desired:
        before = running.get(model.name)
        if before is None:
            changes.append(Change(model.name, "add"))
            continue
        fixed, live = _differences(before.fixed, model.fixed), _differences(before.live, model.live)
        action: Action = "upgrade" if fixed else "adjust" if live else "keep"
        changes.append(Change(model.name, action, (*fixed, *live)))
    names = {model.name for model in desired}
    changes += [Change(name, "remove" if prune else "leave") for name in running if name not in names]
    return changes


def find_gateway_changes(spec: DeploymentSpec, present: Mapping[str, dict[str, Any]]) -> list[str]:
    """The changes to the gateway, as lines to print. Its table of models follows from the changes of the models."""
    gateway = present.get(GATEWAY_APP)
    if gateway is None:
        grpc = spec.gateway.grpc_port
        also = "" if grpc is None else f", gRPC at {spec.gateway.host}:{grpc}"
        return [f"add     {GATEWAY_APP}: at {spec.gateway.host}:{spec.gateway.port}{also}"]
    options = gateway["deployments"][0]
    before = {
        "gateway": {
            "replicas": options["num_replicas"],
            "cors_origins": options["user_config"].get("cors_origins", []),
            "media_hosts": options["user_config"].get("media_hosts", []),
            "public_url": options["user_config"].get("public_url"),
            "webhook_hosts": options["user_config"].get("webhook_hosts", []),
            "webhook_key_env": options["user_config"].get("webhook_key_env"),
            "node_labels": options["ray_actor_options"].get("label_selector", {}),
            **_log_before(options["user_config"].get("log")),
        },
        "limits": {"max_body_bytes": options["user_config"]["max_body_bytes"]},
        "auth": {key: options["user_config"].get(key) for key in ("api_keys_env", "api_keys_file")},
        "metrics": options["user_config"]["metrics"],
        "tracing": options["user_config"].get("tracing", Tracing().model_dump()),
        "storage": _storage_before(options["user_config"]),
    }
    after = spec.model_dump(mode="json", include={name: set(keys) for name, keys in before.items()}) | {
        "metrics": spec.metrics_at
    }
    changed = _differences(before, after)
    lines = [f"adjust  {GATEWAY_APP}: requests in flight go on ({', '.join(changed)})"] if changed else []
    lines += [f"lose    {GATEWAY_APP}: {lost}" for keys, lost in LOST.items() if _moved(keys, before, after)]
    host, port = listens_at()
    if (host, port) != (spec.gateway.host, spec.gateway.port) and spec.gateway.port:
        lines.append(f"keep    {GATEWAY_APP}: listens at {host}:{port} until Serve is restarted")
    if (before_port := grpc_port()) != spec.gateway.grpc_port:
        place = "does not answer gRPC" if before_port is None else f"answers gRPC at {host}:{before_port}"
        lines.append(f"keep    {GATEWAY_APP}: {place} until Serve is restarted")
    return lines


def _storage_before(told: dict[str, Any]) -> dict[str, Any]:
    """What a gateway keeps; the defaults if an older version is deployed."""
    jobs = told.get("jobs", {"folder": None, "url_env": None})
    return {
        "outputs": Outputs().model_dump() | told.get("outputs", {}),
        "idempotency": Idempotency().model_dump() | told.get("idempotency", {}),
        "jobs": jobs["folder"],
        "jobs_url_env": jobs["url_env"],
    }


def _moved(keys: tuple[str, ...], before: dict[str, Any], after: dict[str, Any]) -> bool:
    """Whether something is kept in another place, which one of these keys of `storage` names."""
    told = _differences(before["storage"], after["storage"])
    return any(each.startswith(f"{key} ") for each in told for key in keys)


def _log_before(log: dict[str, Any] | None) -> dict[str, Any]:
    """The gateway's keys of the log; the defaults if an older version is deployed."""
    log = log or {"log_format": "text", "prompts": False}
    return {"log_format": log["log_format"], "log_prompts": log["prompts"]}


def keep_derived(spec: DeploymentSpec, running: dict[str, ModelSpec]) -> DeploymentSpec:
    """The spec with the values that were derived when its models were deployed, so that these do not look like changes.

    Derived are the tasks, and the commit of a hub id, whose branch may have moved since. A model with another source or
    revision gets neither, because they may be different now.
    """

    def kept(model: ModelSpec) -> ModelSpec:
        before = running.get(model.name)
        if before is None or (before.source, before.revision) != (model.source, model.revision):
            return model
        commit = model.digest or (before.digest if model.from_hub else None)
        return model.model_copy(update={"tasks": model.tasks or before.tasks, "digest": commit})

    return spec.model_copy(update={"models": tuple(kept(model) for model in spec.models)})


def with_digests_of(before: ModelSpec, model: ModelSpec) -> ModelSpec:
    """A model with the digests of the one that runs, for files that both of them name."""
    same = (before.source, before.revision) == (model.source, model.revision)
    known = {(lora.source, lora.component): lora.digest for lora in before.loras}
    loras = (
        lora.model_copy(update={"digest": lora.digest or known.get((lora.source, lora.component))})
        for lora in model.loras
    )
    return model.model_copy(update={"digest": model.digest or (before.digest if same else None), "loras": tuple(loras)})


def user_config(application: dict[str, Any]) -> dict[str, Any]:
    """The object that Serve passes to `reconfigure` of an application's deployment; changing it changes the config."""
    options: dict[str, Any] = application["deployments"][0]["user_config"]
    return options


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
