"""The chart as tests use it: values in, rendered objects out, by helm's own engine; and values worth rendering."""

import copy
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import helm_python
import yaml
from helm_python import _native

CHART = Path(__file__).resolve().parents[2] / "helm"

NEWEST = "v1.36.0"

IMAGE = {"image": {"repository": "registry.example/spray"}}

Values = dict[str, Any]


def with_values(*given: Mapping[str, Any]) -> Values:
    """Values, each over those before it, as helm takes several files."""
    merged: Values = {}
    for values in given:
        for key, value in copy.deepcopy(dict(values)).items():
            both = isinstance(value, dict) and isinstance(merged.get(key), dict)
            merged[key] = with_values(merged[key], value) if both else value
    return merged


def profile(name: str) -> Values:
    """The values of a profile, with an image."""
    return with_values(yaml.safe_load((CHART / f"values-{name}.yaml").read_text()), IMAGE)


def render(values: Values, kubernetes: str = NEWEST, apis: tuple[str, ...] = ()) -> list[Any]:
    """All objects of the chart, as `helm template` prints them.

    Raises:
        helm_python.HelmError: the chart or its schema refuses the values.
    """
    return [each for path, text in texts(values, kubernetes, apis).items() for each in _objects(path, text)]


def texts(values: Values, kubernetes: str = NEWEST, apis: tuple[str, ...] = ()) -> dict[str, str]:
    """What each template makes, NOTES.txt among them."""
    options = {"name": "rel", "namespace": "pictures", "kube_version": kubernetes, "api_versions": [*apis]}
    found: dict[str, str] = json.loads(_rendered(json.dumps(values), json.dumps(options)))
    return found


@functools.cache
def _rendered(values: str, options: str) -> str:
    # Of the two ways to render, the public one does not take a version of Kubernetes.
    with helm_python.Chart.load(CHART) as chart:
        made: str = _native.call_string("helm_render", chart._raw(), values, options)
    return made


def _objects(path: str, text: str) -> list[Any]:
    return [] if path.endswith("NOTES.txt") else [each for each in yaml.safe_load_all(text) if each]


def of_kind(objects: list[Any], kind: str) -> list[Any]:
    """The objects of a kind."""
    return [each for each in objects if each["kind"] == kind]


def ray_service(objects: list[Any]) -> Any:
    """The one RayService."""
    (service,) = of_kind(objects, "RayService")
    return service


def containers(objects: list[Any]) -> list[Any]:
    """All containers that the chart describes: of Ray's pods, of others, and those that run before them."""
    specs = [template["spec"] for template in pod_templates(objects).values()]
    specs += [pod["spec"] for pod in of_kind(objects, "Pod")]
    specs += [each["spec"]["template"]["spec"] for each in objects if each["kind"] in ("StatefulSet", "Job")]
    return [each for spec in specs for each in (*spec.get("initContainers", []), *spec["containers"])]


def pod_templates(objects: list[Any]) -> dict[str, Any]:
    """The templates of the Ray cluster's pods by group."""
    cluster = ray_service(objects)["spec"]["rayClusterConfig"]
    workers = {group["groupName"]: group["template"] for group in cluster["workerGroupSpecs"]}
    return {"head": cluster["headGroupSpec"]["template"], **workers}


def serve_config_of(objects: list[Any]) -> Any:
    """What the RayService tells Serve."""
    return yaml.safe_load(ray_service(objects)["spec"]["serveConfigV2"])


@functools.cache
def defaults() -> Values:
    """values.yaml."""
    values: Values = yaml.safe_load((CHART / "values.yaml").read_text())
    return values


PROFILES = ("trial", "production", "multi-node")

SECRET = {"valueFrom": {"secretKeyRef": {"name": "keys", "key": "keys"}}}

GPU_GROUPS = {
    "groups": [
        {"name": "l40s", "accelerator": "L40S", "gpus": 4, "maxReplicas": 3, "minReplicas": 1},
        {"name": "h100", "gpus": 8, "cpus": 64, "labels": {"zone": "a"}, "tolerations": [{"operator": "Exists"}]},
    ]
}

EVERY_KEY = {
    "name": "all.keys",
    "source": "org/model",
    "revision": "main",
    "digest": "0" * 40,
    "aliases": ["second", "third"],
    "tasks": ["text-to-image"],
    "device": "cuda",
    "dtype": "float16",
    "parallel": {"ulysses_degree": 2, "ring_degree": 2},
    "vae_dtype": "float32",
    "attention_kernel": "torch-cudnn",
    "compile": True,
    "cuda_graphs": True,
    "warmup_shapes": [{"width": 512, "height": 512}, {"width": 64, "height": 64, "num_frames": 5}],
    "text_encoder": "replicate",
    "vae": "rank0",
    "vae_tiling_above": 0,
    "batch_guidance": False,
    "self_test": False,
    "spare_ranks": True,
    "elastic": None,  # goes with neither cuda_graphs nor vae: rank0
    "loras": [{"name": "ink", "source": "/loras/ink.safetensors"}],
    "plan": "package.module:PLAN",
    "transformer_class": "package.module:Model",
    "env": {"A": "1"},
    "defaults": {"width": 512, "height": 512, "guidance_scale": 0.0, "guidance_scale_2": 2.5},
    "limits": {"max_work": 3732480000, "max_n": 1},
    "autoscaling": {"min_replicas": 0, "max_replicas": 3, "upscale_delay_s": 0.5, "target_backlog_seconds": 10},
    "placement": {
        "strategy": "PACK",
        "accelerator_type": "L40S",
        "cpus_per_rank": 1.5,
        "memory": 34359738368,
        "network_interface": "eth0",
    },
    "timeouts": {"startup_s": 60, "phase_s": 30, "ping_s": 5},
    "grace_period_s": 1200.5,
    "max_queued": 7,
    "max_queued_s": None,
}

VARIATIONS: dict[str, Values] = {
    "no gRPC": {"gateway": {"grpc_port": None}},
    "no metrics": {"metrics": {"port": None}, "monitoring": {"podMonitor": {"enabled": True}}},
    "other ports": {"gateway": {"port": 80, "grpc_port": 81}, "metrics": {"port": 82, "host": "127.0.0.1"}},
    "outputs on a volume": {"outputs": {"size": "10Gi"}, "storage": {"outputs": {"ttl_s": 60}}},
    "outputs in a bucket": {
        "outputs": {"s3": {"url": "s3://bucket/pictures", "existingSecret": "s3"}},
        "storage": {"outputs": {"ttl_s": 60}},
    },
    "a bucket that the account may write": {
        "outputs": {"s3": {"url": "s3://bucket"}},
        "serviceAccount": {"annotations": {"eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/spray"}},
    },
    "claims that exist": {"outputs": {"existingClaim": "files"}, "cache": {"existingClaim": "weights"}},
    "a file of keys": {"auth": {"insecure": False}, "apiKeys": {"existingSecret": "keys"}},
    "keys in the environment": {
        "auth": {"insecure": False, "api_keys_env": "SPRAY_API_KEYS"},
        "gatewayNodes": {"env": [{"name": "SPRAY_API_KEYS", **SECRET}]},
    },
    "traces": {"tracing": {"otlp_endpoint": "http://collector.monitoring:4318", "sample_ratio": 0.25}},
    "redis": {"redis": {"address": "redis:6379", "existingSecret": "redis"}},
    "a bundled redis": {"redis": {"existingSecret": "redis", "bundled": {"enabled": True}}},
    "a bundled redis that keeps": {
        "redis": {"existingSecret": "redis", "bundled": {"enabled": True, "size": "1Gi", "storageClass": "fast"}},
        "networkPolicy": {"enabled": False},
    },
    "jobs in PostgreSQL": {"jobs": {"existingSecret": "jobs"}},
    "state on a volume": {"state": {"size": "1Gi"}, "storage": {"idempotency": {"ttl_s": 60}}},
    "both": {"state": {"existingClaim": "state"}, "jobs": {"existingSecret": "jobs", "key": "uri"}},
    "weights ahead": {
        "cache": {"size": "100Gi", "prefetch": True},
        "hubToken": {"existingSecret": "hub"},
        "models": [
            {"name": "b", "source": "org/b", "revision": "v1", "device": "cpu"},
            {"name": "c", "source": "/c", "device": "cpu"},
        ],
    },
    "an ingress": {"ingress": {"enabled": True, "host": "a.example", "grpcHost": "b.example", "tlsSecret": "tls"}},
    "an ingress in front of which something else ends TLS": {
        "ingress": {"enabled": True, "host": "a.example", "tlsSecret": "tls"},
        "gateway": {"public_url": "https://b.example"},
    },
    "an ingress of another kind": {
        "ingress": {"enabled": True, "host": "a.example", "nginx": False, "annotations": {"a/b": "c"}}
    },
    "routes": {
        "gatewayApi": {"enabled": True, "parentRefs": [{"name": "g"}], "grpcHostnames": ["b"], "hostnames": ["a"]}
    },
    "monitoring": {
        "monitoring": {
            "podMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
            "rules": {"enabled": True},
            "dashboards": {"enabled": True},
        }
    },
    "no policies": {"networkPolicy": {"enabled": False}, "podDisruptionBudget": {"enabled": False}},
    "named clients": {"networkPolicy": {"clients": [{"podSelector": {"matchLabels": {"app": "web"}}}]}},
    "larger nodes": {
        "head": {"cpus": 4, "limitCpus": True, "objectStoreMiB": 2048},
        "gatewayNodes": {"minReplicas": 3, "maxReplicas": 5, "sharedMemoryMiB": 4096, "idleTimeoutSeconds": 60},
        "gateway": {"replicas": 3},
    },
    "groups with GPUs": GPU_GROUPS,
    "gangs that span nodes": {
        "groups": [
            {
                "name": "pairs",
                "gpus": 8,
                "cpus": 64,
                "hosts": 2,
                "minReplicas": 2,
                "maxReplicas": 2,
                "extraResources": {"rdma/hca": 8},
                "env": [{"name": "NCCL_IB_HCA", "value": "mlx5"}],
            }
        ],
        "models": [
            {
                "name": "b",
                "source": "/b",
                "parallel": {"ulysses_degree": 8, "cfg_parallel_size": 2},
                "placement": {"strategy": "PACK", "network_interface": "net1"},
            }
        ],
    },
    "every key of a model": {**GPU_GROUPS, "models": [EVERY_KEY, {"name": "b", "source": "/b"}]},
    "an elastic gang": {
        **GPU_GROUPS,
        "models": [
            {"name": "b", "source": "/b", "elastic": {}, "parallel": {"ulysses_degree": 2, "tensor_parallel_size": 2}}
        ],
    },
    "accounts that exist": {"serviceAccount": {"create": False, "headName": "a", "workerName": "b"}},
    "an image by digest": {"image": {"digest": "sha256:" + "0" * 64, "pullSecrets": ["registry"]}},
    "names and labels": {
        "fullnameOverride": "pictures",
        "commonLabels": {"team": "media"},
        "rayServiceLabels": {"kueue.x-k8s.io/queue-name": "gpus"},
        "rayServiceAnnotations": {"a/b": "c"},
        "service": {"type": "LoadBalancer", "annotations": {"a/b": "c"}},
    },
    "pods in detail": {
        "nodeDefaults": {
            "env": [{"name": "NCCL_DEBUG", "value": "INFO"}],
            "podLabels": {"a": "b"},
            "podAnnotations": {"a/b": "c"},
            "nodeSelector": {"pool": "gpu"},
            "affinity": {"nodeAffinity": {}},
            "spread": False,
            "priorityClassName": "high",
            "runtimeClassName": "nvidia",
            "extraVolumes": [{"name": "loras", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "loras", "mountPath": "/loras"}],
        },
        "hubToken": {"existingSecret": "hub"},
    },
    "Ray's own": {
        "ray": {"authMode": "disabled", "idleTimeoutSeconds": 60, "existingTokenSecret": "token"},
        "upgrade": {"type": "None", "drainSeconds": 3600},
    },
    "old gangs stop first": {"upgrade": {"newGangsFirst": False}},
    "limits and folders": {
        "limits": {"max_body_bytes": 1 << 25},
        "storage": {
            "models": "/models/m",
            "compiled": "/models/c",
            "idempotency": {"ttl_s": 60},
            "outputs": {"url": "s3://bucket/prefix"},
        },
    },
    "every key of the sections": {
        "gateway": {
            "host": "0.0.0.0",
            "port": 8088,
            "grpc_port": 9090,
            "replicas": 1,
            "node_labels": {"spray-role": "gateway"},
            "cors_origins": ["https://app.example.com"],
            "log_format": "json",
            "log_prompts": True,
            "media_hosts": ["media.example.com"],
            "public_url": "https://api.example.com:8443",
            "webhook_hosts": ["hooks.example.com"],
            "webhook_key_env": "HOOKS",
        },
        "limits": {"max_body_bytes": 1 << 25},
        "metrics": {"host": "127.0.0.1", "port": 9465},
        "tracing": {"otlp_endpoint": "http://collector:4318", "sample_ratio": 0.5},
        "storage": {
            "models": "/models/m",
            "compiled": "/models/c",
            "outputs": {"folder": "/home/spray/o", "url": None, "ttl_s": 60, "max_bytes": 1 << 30},
            "idempotency": {"folder": "/keys/i", "ttl_s": 60, "max_bytes": 1 << 20},
            "jobs": "/keys/j",
            "jobs_url_env": None,
        },
        "auth": {"insecure": True, "api_keys_env": "SPRAY_API_KEYS", "api_keys_file": None},
        "gatewayNodes": {"env": [{"name": "SPRAY_API_KEYS", **SECRET}, {"name": "HOOKS", **SECRET}]},
        "head": {
            "extraVolumes": [{"name": "keys", "emptyDir": {}}],
            "extraVolumeMounts": [{"name": "keys", "mountPath": "/keys"}],
        },
    },
    "gateways anywhere": {"gateway": {"node_labels": None}, "tests": {"enabled": False}},
}
"""Each over the trial's values."""

VERSIONS = tuple(f"v1.{minor}.0" for minor in range(29, 37))


def cases() -> dict[str, Values]:
    """All profiles and variations by name."""
    varied = {name: with_values(profile("trial"), values) for name, values in VARIATIONS.items()}
    return {name: profile(name) for name in PROFILES} | varied
