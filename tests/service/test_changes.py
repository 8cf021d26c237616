"""What a change of the file does to running models, and what Serve is told: no gang restarts without a reason."""

from pathlib import Path
from typing import Any

import pytest
from ray.serve import Application
from ray.serve._private.deploy_utils import get_app_code_version
from ray.serve.config import gRPCOptions
from ray.serve.schema import ServeDeploySchema

from deploy.gateway_spec import GatewaySpec
from deploy.load import load_spec
from deploy.model_sections import Autoscaling, Defaults, Elastic, Limits, LoRA, Placement, Timeouts, WarmupShape
from deploy.model_spec import LIVE, ModelSpec
from deploy.spec import Auth, DeploymentSpec, GatewayLimits, Metrics, SpecError, Tracing
from deploy.storage_spec import Idempotency, Outputs, Storage
from service.app import (
    SPARE_REQUESTS,
    check_ports,
    gang_app,
    gateway_app,
    gateway_application,
    model_application,
    serve_config,
)
from service.gateway import Gateway
from service.names import GANG, GATEWAY, GATEWAY_APP, app_name
from service.rollout.changes import Change, find_changes, keep_derived, with_digests_of
from service.rpc.proxy import SERVICES
from sp_core.degrees import ParallelDegrees
from workers.gang.gang import Gang

SHIPPED = sorted((Path(__file__).resolve().parents[2] / "deploy").glob("*.yaml"))

ON_NODES = {"storage": {"models": "/hub", "compiled": None}, "metrics": {"host": "127.0.0.1", "port": 9464}}

BEFORE = ModelSpec(name="a", source="/models/a", tasks=("text-to-image",))

CHANGES: dict[str, tuple[Any, str, str]] = {
    "source": ("/models/b", "upgrade", "source /models/a -> /models/b"),
    "revision": ("v2", "upgrade", "revision None -> v2"),
    "digest": ("0" * 64, "upgrade", f"digest None -> {'0' * 64}"),
    "device": ("cpu", "upgrade", "device cuda -> cpu"),
    "dtype": ("float16", "upgrade", "dtype None -> float16"),
    "vae_dtype": ("float32", "upgrade", "vae_dtype None -> float32"),
    "attention_kernel": ("torch-cudnn", "upgrade", "attention_kernel None -> torch-cudnn"),
    "parallel": (ParallelDegrees(ulysses_degree=2), "upgrade", "parallel.ulysses_degree 1 -> 2"),
    "compile": (True, "upgrade", "compile False -> True"),
    "cuda_graphs": (True, "upgrade", "cuda_graphs False -> True"),
    "warmup_shapes": ((WarmupShape(width=64, height=64),), "upgrade", "warmup_shapes"),
    "batch_guidance": (False, "upgrade", "batch_guidance auto -> False"),
    "text_encoder": ("replicate", "upgrade", "text_encoder rank0 -> replicate"),
    "vae": ("rank0", "upgrade", "vae all -> rank0"),
    "vae_tiling_above": (0, "upgrade", "vae_tiling_above 4194304 -> 0"),
    "plan": ("a.b:C", "upgrade", "plan None -> a.b:C"),
    "transformer_class": ("a.b:C", "upgrade", "transformer_class None -> a.b:C"),
    "env": ({"A": "1"}, "upgrade", "env"),
    "placement": (Placement(cpus_per_rank=2), "upgrade", "placement.cpus_per_rank 1.0 -> 2.0"),
    "timeouts": (Timeouts(ping_s=5), "upgrade", "timeouts.ping_s 10.0 -> 5.0"),
    "elastic": (Elastic(), "upgrade", "elastic"),
    "spare_ranks": (True, "upgrade", "spare_ranks False -> True"),
    "self_test": (False, "adjust", "self_test True -> False"),
    "aliases": (("b",), "adjust", "aliases"),
    "tasks": (("text-to-video",), "adjust", "tasks"),
    "loras": ((LoRA(name="ink", source="/ink"),), "adjust", "loras"),
    "defaults": (Defaults(width=512), "adjust", "defaults.width 1024 -> 512"),
    "limits": (Limits(max_n=2), "adjust", "limits.max_n 4 -> 2"),
    "autoscaling": (Autoscaling(max_replicas=3), "adjust", "autoscaling.max_replicas 1 -> 3"),
    "grace_period_s": (60.0, "adjust", "grace_period_s 900.0 -> 60.0"),
    "max_queued": (8, "adjust", "max_queued 64 -> 8"),
    "max_queued_s": (60.0, "adjust", "max_queued_s 600.0 -> 60.0"),
}
"""By field: another value, what a change of it does to running gangs, and how it is told."""

RESTARTING = {
    "ray_actor_options", "max_replicas_per_node", "placement_group_bundles", "placement_group_strategy",
    "placement_group_bundle_label_selector", "gang_scheduling_config", "request_router_config", "name",
}  # fmt: skip
"""Options of a deployment for which Serve starts new replicas."""


def changed(key: str) -> ModelSpec:
    return BEFORE.model_copy(update={key: CHANGES[key][0]})


def test_of_every_field_it_is_known_what_its_change_does() -> None:
    assert set(CHANGES) == set(ModelSpec.model_fields) - {"name"}
    assert {key for key, (_, action, _) in CHANGES.items() if action == "adjust"} == LIVE


@pytest.mark.parametrize("key", CHANGES)
def test_one_changed_key(key: str) -> None:
    _, action, told = CHANGES[key]
    assert find_changes({"a": BEFORE}, [changed(key)]) == [Change("a", action, (told,))]  # type: ignore[arg-type]


@pytest.mark.parametrize("key", CHANGES)
def test_serve_starts_new_gangs_for_a_fixed_key_and_for_no_live_one(key: str) -> None:
    applications = [model_application(model, ON_NODES) for model in (BEFORE, changed(key))]
    versions = {get_app_code_version(schema) for schema in _schemas(applications)}
    (before,), (after,) = (application["deployments"] for application in applications)
    differing = {option for option in after if before[option] != after[option]}
    if CHANGES[key][1] == "adjust":
        assert applications[0]["args"] == applications[1]["args"]
        assert len(versions) == 1
        assert differing >= {"user_config"}  # so the gang hears of it
        assert not differing & RESTARTING
    else:
        assert applications[0]["args"] != applications[1]["args"]
        assert len(versions) == 2
        assert "user_config" not in differing


def test_both_parts_of_a_model_make_the_whole() -> None:
    assert set(BEFORE.fixed) & set(BEFORE.live) == set()
    assert ModelSpec.model_validate(BEFORE.fixed | BEFORE.live) == BEFORE
    application = model_application(BEFORE, ON_NODES)
    (options,) = application["deployments"]
    assert application["args"] == BEFORE.fixed
    assert options["user_config"] == {"model": BEFORE.live, **ON_NODES}


@pytest.mark.parametrize(("prune", "last"), [(False, "leave"), (True, "remove")])
def test_a_whole_plan(prune: bool, last: Any) -> None:
    running = {
        name: BEFORE.model_copy(update={"name": name}) for name in ("kept", "adjusted", "upgraded", "both", "gone")
    }
    wanted = [
        running["kept"],
        running["adjusted"].model_copy(update={"max_queued": 8}),
        running["upgraded"].model_copy(update={"dtype": "float16"}),
        running["both"].model_copy(update={"max_queued": 8, "dtype": "float16"}),
        BEFORE.model_copy(update={"name": "added"}),
    ]
    queued, dtype = "max_queued 64 -> 8", "dtype None -> float16"
    assert find_changes(running, wanted, prune) == [
        Change("kept", "keep"),
        Change("adjusted", "adjust", (queued,)),
        Change("upgraded", "upgrade", (dtype,)),
        Change("both", "upgrade", (dtype, queued)),
        Change("added", "add"),
        Change("gone", last),
    ]


def test_a_change_is_told_in_a_line() -> None:
    assert str(Change("a", "keep")) == "keep    a: unchanged"
    assert str(Change("a", "adjust", ("max_queued 64 -> 8", "loras"))) == (
        "adjust  a: its gangs go on (max_queued 64 -> 8, loras)"
    )
    assert "--prune" in str(Change("a", "leave"))


@pytest.mark.parametrize(
    ("written", "change", "tasks"),
    [
        (None, {}, ("text-to-image",)),
        (None, {"max_queued": 8}, ("text-to-image",)),
        (None, {"dtype": "float16"}, ("text-to-image",)),
        (None, {"source": "/models/b"}, None),  # another model, perhaps for something else
        (None, {"revision": "v2"}, None),
        (None, {"name": "b"}, None),
        (("text-to-video",), {}, ("text-to-video",)),
    ],
)
def test_what_was_derived_is_no_change(written: Any, change: dict[str, Any], tasks: Any) -> None:
    wanted = BEFORE.model_copy(update={"tasks": written} | change)
    (model,) = keep_derived(DeploymentSpec(models=(wanted,)), {"a": BEFORE}).models
    assert model == wanted.model_copy(update={"tasks": tasks})
    if not change and written is None:
        assert find_changes({"a": BEFORE}, [model]) == [Change("a", "keep")]


def test_a_file_with_another_content_is_a_change() -> None:
    ink = LoRA(name="ink", source="/ink", digest="a" * 64)
    before = BEFORE.model_copy(update={"loras": (ink,), "digest": "c" * 64})
    written = BEFORE.model_copy(update={"loras": (LoRA(name="ink", source="/ink"),)})
    assert find_changes({"a": before}, [with_digests_of(before, written)]) == [Change("a", "keep")]
    other = before.model_copy(update={"loras": (ink.model_copy(update={"digest": "b" * 64}),)})
    assert find_changes({"a": before}, [other]) == [Change("a", "adjust", ("loras",))]
    moved = with_digests_of(before, written.model_copy(update={"source": "/elsewhere"}))
    assert (moved.digest, moved.loras) == (None, (ink,))


def test_a_branch_that_moved_is_no_change() -> None:
    before = BEFORE.model_copy(update={"source": "acme/demo", "digest": "a" * 40})
    written = before.model_copy(update={"digest": None, "tasks": None})
    (kept,) = keep_derived(DeploymentSpec(models=(written,)), {"a": before}).models
    assert kept == before
    (pinned,) = keep_derived(
        DeploymentSpec(models=(written.model_copy(update={"revision": "v2"}),)), {"a": before}
    ).models
    assert pinned.digest is None


@pytest.mark.parametrize("file", SHIPPED, ids=lambda file: file.name)
def test_shipped_deployments_build_and_bind(file: Path) -> None:
    spec = load_spec(file)
    schema = ServeDeploySchema.model_validate(serve_config(spec, "id"))
    assert [application.name for application in schema.applications] == [
        *(app_name(model.name) for model in spec.models),
        GATEWAY_APP,
    ]
    assert [application.route_prefix for application in schema.applications] == [None] * len(spec.models) + ["/"]
    for application in schema.applications:
        build = {"service.app:gang_app": gang_app, "service.app:gateway_app": gateway_app}[application.import_path]
        bound = build(application.args)
        name, kind = (GATEWAY, Gateway) if application.name == GATEWAY_APP else (GANG, Gang)
        assert isinstance(bound, Application)
        assert bound._bound_deployment.name == name
        assert issubclass(bound._bound_deployment.func_or_class, kind)
        assert [deployment.name for deployment in application.deployments] == [name]


def test_bundles_and_options_of_a_model() -> None:
    model = BEFORE.model_copy(
        update={
            "parallel": ParallelDegrees(ulysses_degree=2, cfg_parallel_size=2),
            "placement": Placement(strategy="PACK", cpus_per_rank=0.5, node_labels={"zone": "a"}),
            "autoscaling": Autoscaling(min_replicas=0, max_replicas=3, downscale_to_zero_delay_s=7),
            "grace_period_s": 12.0,
            "max_queued": 5,
        }
    )
    (options,) = model_application(model, ON_NODES)["deployments"]
    assert options["placement_group_bundles"] == [{"CPU": 0.5, "GPU": 1}] * 4
    assert options["placement_group_strategy"] == "PACK"
    assert options["placement_group_bundle_label_selector"] == [{"zone": "a"}]
    assert options["max_ongoing_requests"] == 1
    (gateway,) = gateway_application(DeploymentSpec(models=(model,)), "")["deployments"]
    for each in (options, gateway):  # Serve looks three times
        assert 3 * (each["health_check_period_s"] + each["health_check_timeout_s"]) < 10
    assert options["user_config"]["model"]["max_queued"] == 5
    assert options["max_queued_requests"] == -1  # the gateway counts
    assert options["graceful_shutdown_timeout_s"] == gateway["graceful_shutdown_timeout_s"] == 12.0
    longer = model.model_copy(update={"name": "b", "grace_period_s": 1800.0})
    (gateway,) = gateway_application(DeploymentSpec(models=(model, longer)), "")["deployments"]
    assert gateway["graceful_shutdown_timeout_s"] == 1800.0  # it answers for both
    scaling = options["autoscaling_config"]
    assert (scaling["min_replicas"], scaling["max_replicas"]) == (0, 3)
    assert scaling["downscale_to_zero_delay_s"] == 7


def test_what_the_gateway_is_told_restarts_no_gateway() -> None:
    spec = DeploymentSpec(
        models=(BEFORE,), gateway=GatewaySpec(replicas=2, port=1234, host="0.0.0.0"), auth=Auth(insecure=True)
    )
    other = spec.model_copy(
        update={
            "models": (changed("max_queued"), BEFORE.model_copy(update={"name": "b"})),
            "gateway": spec.gateway.model_copy(
                update={
                    "cors_origins": ("https://app.example.com",),
                    "media_hosts": ("images.example.com",),
                    "public_url": "https://media.example.com",
                    "log_format": "json",
                    "webhook_hosts": ("hooks.example.com",),
                    "webhook_key_env": "HOOKS",
                }
            ),
            "limits": GatewayLimits(max_body_bytes=2048),
            "auth": Auth(api_keys_env="KEYS", api_keys_file="/keys.yaml"),
            "metrics": Metrics(port=9500),
            "tracing": Tracing(otlp_endpoint="http://collector:4318"),
            "storage": Storage(outputs=Outputs(ttl_s=60), idempotency=Idempotency(ttl_s=70), jobs_url_env="JOBS_URL"),
        }
    )
    configs = serve_config(spec, "id"), serve_config(other, "id")
    before, after = (config["applications"][-1] for config in configs)
    assert configs[0]["http_options"] == {"host": "0.0.0.0", "port": 1234}
    assert configs[0]["grpc_options"] == {"port": 9000, "grpc_servicer_functions": list(SERVICES)}
    silent = spec.model_copy(update={"gateway": GatewaySpec(grpc_port=None)})
    assert not gRPCOptions(**serve_config(silent, "id")["grpc_options"]).grpc_servicer_functions
    assert before["args"] == after["args"] == {"instance_id": "id"}
    assert len({get_app_code_version(schema) for schema in _schemas([before, after])}) == 1
    (options,) = after["deployments"]
    assert options["num_replicas"] == 2
    table = options["user_config"]
    without_env = [model.model_copy(update={"env": {}}) for model in other.models]
    assert [ModelSpec.model_validate(model) for model in table.pop("models")] == without_env
    metrics = {"host": "0.0.0.0", "port": 9500}
    assert table == {
        "draining": False,
        "gateways": 2,
        "local_only": False,
        "cors_origins": ["https://app.example.com"],
        "media_hosts": ["images.example.com"],
        "public_url": "https://media.example.com",
        "log": {"log_format": "json", "prompts": False},
        "max_body_bytes": 2048,
        "api_keys_env": "KEYS",
        "api_keys_file": "/keys.yaml",
        "metrics": metrics,
        "tracing": {"otlp_endpoint": "http://collector:4318", "sample_ratio": 1.0},
        "models_folder": None,
        "outputs": {"folder": None, "url": None, "ttl_s": 60.0, "max_bytes": None},
        "idempotency": {"folder": None, "ttl_s": 70.0, "max_bytes": 4 << 30},
        "jobs": {"folder": None, "url_env": "JOBS_URL"},
        "webhook_hosts": ["hooks.example.com"],
        "webhook_key_env": "HOOKS",
    }


def test_a_gateway_has_room_beyond_all_that_its_models_may_queue() -> None:
    busy = BEFORE.model_copy(update={"max_queued": 5000, "autoscaling": Autoscaling(max_replicas=7)})
    options = serve_config(DeploymentSpec(models=(busy,)))["applications"][-1]["deployments"][0]
    assert options["max_ongoing_requests"] == 5000 + 7 + SPARE_REQUESTS


def test_where_metrics_are_read_restarts_nothing() -> None:
    specs = [
        DeploymentSpec(models=(BEFORE,), metrics=metrics) for metrics in (Metrics(), Metrics(host="::", port=None))
    ]
    before, after = (serve_config(spec)["applications"][0] for spec in specs)
    assert before["deployments"][0]["user_config"]["metrics"] == {"host": "127.0.0.1", "port": 9464}
    assert after["deployments"][0]["user_config"]["metrics"] == {"host": "::", "port": None}
    assert len({get_app_code_version(schema) for schema in _schemas([before, after])}) == 1
    with pytest.raises(SpecError, match=r"metrics\.port: 0 takes a free port for `spray serve`"):
        check_ports(DeploymentSpec(models=(BEFORE,), metrics=Metrics(port=0)))


def test_where_files_are_kept_restarts_nothing() -> None:
    spec = DeploymentSpec(models=(BEFORE,), storage=Storage(models="/hub", compiled="/compiled"))
    application, _ = serve_config(spec)["applications"]
    assert application["deployments"][0]["user_config"]["storage"] == {"models": "/hub", "compiled": "/compiled"}
    assert application["args"] == serve_config(DeploymentSpec(models=(BEFORE,)))["applications"][0]["args"]


def _schemas(applications: list[dict[str, Any]]) -> list[Any]:
    return ServeDeploySchema.model_validate(
        {
            "applications": [
                application | {"name": str(i), "route_prefix": None} for i, application in enumerate(applications)
            ]
        }
    ).applications
