"""DeploymentSpec -> the config that Ray Serve takes: one application per model, and the gateway.

`serve_config` is what `spray build` prints, what KubeRay's `serveConfigV2` holds and what `service.rollout.apply` tells
Serve. On the cluster, Serve imports `gang_app` and `gateway_app` from here to build each application.

Each model is an application of its own, because Serve restarts a whole application when its arguments change. The
arguments therefore hold only what a gang cannot change while it runs; Serve applies everything else to running gangs.
"""

from collections.abc import Iterable
from typing import Any

from ray import serve
from ray.serve import Application, Deployment

from deploy.gateway_spec import is_loopback
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from service.autoscaling import LOOK_BACK_S
from service.gateway import Gateway
from service.names import GANG, GATEWAY, GATEWAY_APP, app_name
from service.rpc.proxy import SERVICES
from workers.gang.elastic import slots
from workers.gang.gang import Gang
from workers.gang.placement import placement_group

METRICS_INTERVAL_S = 1.0
ROUTING_STATS_PERIOD_S = 1.0

SPARE_REQUESTS = 1000
"""Of a gateway, beyond all that its models may queue: health checks are answered however full it is."""

GATEWAY_ROUTE = "/"
"""Of the gateway: it answers all paths."""

HEALTH_CHECK = {"health_check_period_s": 1.0, "health_check_timeout_s": 2.0}
"""Serve replaces a replica after three checks without an answer: within ten seconds, where its defaults take 100."""


def gang_app(args: dict[str, Any]) -> Application:
    """Build a model's application, whose replicas are its gangs. Called by Serve.

    Args:
        args: `ModelSpec.fixed`; `Gang.reconfigure` gets the rest.
    """
    deployment: Deployment = serve.deployment(name=GANG)(Gang)
    return deployment.bind(args)


def gateway_app(args: dict[str, Any]) -> Application:
    """Build the application of the gateway, which answers HTTP and gRPC. Called by Serve.

    Args:
        args: `{"instance_id": ...}`.
    """
    deployment: Deployment = serve.deployment(name=GATEWAY)(serve.ingress()(Gateway))
    return deployment.bind(args.get("instance_id", ""))


def serve_config(spec: DeploymentSpec, instance_id: str = "") -> dict[str, Any]:
    """All applications of a deployment, as a `ServeDeploySchema` in plain types.

    Args:
        instance_id: tells this deployment from another that may answer on the same port.
    """
    on_nodes = {
        "storage": spec.storage.model_dump(include={"models", "compiled"}),
        "metrics": spec.metrics_at,
        "tracing": spec.tracing.model_dump(),
    }
    models = [model_application(model, on_nodes) for model in spec.models]
    return {
        "proxy_location": "EveryNode",
        "http_options": {"host": spec.gateway.host, "port": spec.gateway.port},
        "grpc_options": grpc_options(spec.gateway.grpc_port),
        "applications": [*models, gateway_application(spec, instance_id)],
    }


def grpc_options(port: int | None) -> dict[str, Any]:
    """Serve's options for gRPC. Without services, it does not listen.

    Args:
        port: where it listens, at the host of HTTP; None: nowhere.
    """
    return {"grpc_servicer_functions": []} if port is None else {"port": port, "grpc_servicer_functions": [*SERVICES]}


def check_ports(spec: DeploymentSpec) -> None:
    """Reject ports that work for `spray serve` only.

    Raises:
        SpecError: the metrics port or the gRPC port is 0; the processes of a node could not agree on a free one.
    """
    if spec.gateway.grpc_port == 0:
        raise SpecError("gateway.grpc_port: 0 takes a free port for `spray serve`; on a cluster, name a port or null")
    if spec.metrics.port == 0:
        raise SpecError("metrics.port: 0 takes a free port for `spray serve`; on a cluster, name a port or null")


def model_application(model: ModelSpec, on_nodes: dict[str, Any]) -> dict[str, Any]:
    """The application of one model.

    Args:
        model: with its `tasks` derived, if its folder can be read.
        on_nodes: what all gangs share: the folders of `storage` that ranks use, `DeploymentSpec.metrics_at`, `tracing`.
    """
    scaling = model.autoscaling
    options = {
        "name": GANG,
        "user_config": {"model": model.live, **on_nodes},
        "max_ongoing_requests": slots(model),  # the others wait where they can be rerouted
        "max_queued_requests": -1,  # the gateway limits them: Serve would refuse one that lost its gang and waits again
        "max_surge_percent": 1,  # rounded up: new gangs start one by one, and an old one stops when a new one serves
        "autoscaling_config": {
            "min_replicas": scaling.min_replicas,
            "max_replicas": scaling.max_replicas,
            "upscale_delay_s": scaling.upscale_delay_s,
            "downscale_delay_s": scaling.downscale_delay_s,
            "downscale_to_zero_delay_s": scaling.downscale_to_zero_delay_s,
            "look_back_period_s": LOOK_BACK_S,
            "metrics_interval_s": METRICS_INTERVAL_S,
            "policy": {"policy_function": "service.autoscaling:BacklogPolicy"},
        },
        "request_router_config": {
            "request_router_class": "service.routing:LeastBacklogRouter",
            "request_routing_stats_period_s": ROUTING_STATS_PERIOD_S,
        },
        "ray_actor_options": {"num_cpus": 0},
        **placement_group(model),
        **HEALTH_CHECK,
        "graceful_shutdown_timeout_s": model.grace_period_s,
        "graceful_shutdown_wait_loop_s": 0.1,
    }
    return {
        "name": app_name(model.name),
        "route_prefix": None,
        "import_path": "service.app:gang_app",
        "args": model.fixed,
        "deployments": [options],
    }


def gateway_application(spec: DeploymentSpec, instance_id: str) -> dict[str, Any]:
    """The application of the gateway."""
    labels = dict(spec.gateway.node_labels)
    options = {
        "name": GATEWAY,
        "num_replicas": spec.gateway.replicas,
        "ray_actor_options": {"num_cpus": 0} | ({"label_selector": labels} if labels else {}),
        "max_ongoing_requests": SPARE_REQUESTS + sum(_most_at_once(model) for model in spec.models),
        **HEALTH_CHECK,
        # What waits and runs is finished before it stops, as gangs do; Serve's default would cut it off after 20 s.
        "graceful_shutdown_timeout_s": max((model.grace_period_s for model in spec.models), default=20.0),
        "user_config": gateway_table(spec.models)
        | {
            "draining": False,
            "gateways": spec.gateway.replicas,
            "local_only": is_loopback(spec.gateway.host) and not spec.auth.needs_key,
            "cors_origins": list(spec.gateway.cors_origins),
            "public_url": spec.gateway.public_url,
            "media_hosts": list(spec.gateway.media_hosts),
            "log": {"log_format": spec.gateway.log_format, "prompts": spec.gateway.log_prompts},
            "max_body_bytes": spec.limits.max_body_bytes,
            "api_keys_env": spec.auth.api_keys_env,
            "api_keys_file": spec.auth.api_keys_file,
            "metrics": spec.metrics_at,
            "tracing": spec.tracing.model_dump(),
            "models_folder": spec.storage.models,
            "outputs": spec.storage.outputs.model_dump(),
            "idempotency": spec.storage.idempotency.model_dump(),
            "jobs": {"folder": spec.storage.jobs, "url_env": spec.storage.jobs_url_env},
            "webhook_hosts": list(spec.gateway.webhook_hosts),
            "webhook_key_env": spec.gateway.webhook_key_env,
        },
    }
    return {
        "name": GATEWAY_APP,
        "route_prefix": GATEWAY_ROUTE,
        "import_path": "service.app:gateway_app",
        "args": {"instance_id": instance_id},
        "deployments": [options],
    }


def _most_at_once(model: ModelSpec) -> int:
    """Requests of one model that a gateway may have: those that wait, and one on each gang."""
    return model.max_queued + model.autoscaling.max_replicas


def gateway_table(models: Iterable[ModelSpec]) -> dict[str, Any]:
    """What the gateway knows of each model: everything but the environment of its ranks, which may hold secrets."""
    return {"models": [model.model_dump(mode="json", exclude={"env"}) for model in models]}
