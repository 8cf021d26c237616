"""Values that cannot work are refused by `helm template`, with the reason."""

import helm_python
import pytest

from tests.helm.chart import GPU_GROUPS, Values, profile, render, with_values

GPU_MODEL = {"name": "a", "source": "org/model", "parallel": {"ulysses_degree": 4}}


HOSTS = {"name": "pairs", "gpus": 8, "cpus": 64, "hosts": 2, "labels": {"nodes": "pairs"}}
"""Two nodes that come and go together."""

SPANS = {"parallel": {"ulysses_degree": 16}, "placement": {"strategy": "PACK"}}
"""A gang that fills both."""


def models(*changes: Values) -> Values:
    return {**GPU_GROUPS, "models": [with_values(GPU_MODEL, change) for change in changes]}


HUB = {"name": "hub", "mountPath": "/hub"}
"""A volume of a group."""

REFUSED: dict[str, tuple[Values, str]] = {
    "no model": ({"models": []}, "models is empty"),
    "a degree below 1": (models({"parallel": {"ulysses_degree": 0}}), "at '/models/0/parallel/ulysses_degree'"),
    "an unknown key": ({"unheard": 1}, "additional properties 'unheard' not allowed"),
    "an unknown key of a model": (models({"paralel": {}}), "additional properties 'paralel' not allowed"),
    "an unknown key of a group": ({"groups": [{"name": "a", "gpu": 8}]}, "additional properties 'gpu' not allowed"),
    "a group without a name": ({"groups": [{"gpus": 8}]}, "missing property 'name'"),
    "a wrong type": ({"gateway": {"replicas": "two"}}, "got string, want integer"),
    "a value that is not offered": ({"upgrade": {"type": "Rolling"}}, "at '/upgrade/type'"),
    "no image": ({"image": {"repository": ""}}, "image.repository is empty"),
    "the image of the day": ({"image": {"tag": "latest"}}, "image.tag is latest"),
    "no key for anybody": ({"auth": {"insecure": False}}, "nobody needs a key: name a Secret"),
    "a file of keys without its secret": (
        {"auth": {"insecure": False, "api_keys_file": "/keys.yaml"}},
        "name the Secret that holds the file in apiKeys.existingSecret",
    ),
    "a variable that no gateway has": (
        {"auth": {"insecure": False, "api_keys_env": "KEYS"}},
        "auth.api_keys_env is KEYS, which no gateway has",
    ),
    "a token in plain": (
        {"nodeDefaults": {"env": [{"name": "HF_TOKEN", "value": "hf_a"}]}},
        "env HF_TOKEN has its value in plain",
    ),
    "a port of Ray's": ({"gateway": {"port": 8080}}, "gateway.port is 8080, which is the port of Ray's metrics"),
    "one of its workers": ({"metrics": {"port": 12000}}, "metrics.port is 12000, which is the port of Ray's workers"),
    "one port twice": (
        {"gateway": {"port": 9000, "grpc_port": 9000}},
        "gateway.grpc_port is 9000, which is the port of gateway.port",
    ),
    "a key of webhooks in plain": (
        {"gateway": {"webhook_key_env": "SIGNS"}, "gatewayNodes": {"env": [{"name": "SIGNS", "value": "whsec_a"}]}},
        "env SIGNS has its value in plain",
    ),
    "a token of one model": (
        {"models": [{"name": "a", "source": "/a", "device": "cpu", "env": {"HF_TOKEN": "hf_a"}}]},
        "models.env has HF_TOKEN",
    ),
    "memory that no node has": (
        models({"placement": {"memory": 100 << 30}}),
        "107374182400 bytes of memory each, all on one node, and the largest group's nodes hold",
    ),
    "a volume of the chart": ({"groups": [{"name": "a", "extraVolumes": [{"name": "tmp"}]}]}, "extraVolumes has tmp"),
    "a folder of the chart": (
        {"nodeDefaults": {"extraVolumeMounts": [{"name": "a", "mountPath": "/models/"}]}},
        "extraVolumeMounts has /models/",
    ),
    "gRPC that nobody serves": (
        {"gateway": {"grpc_port": None}, "ingress": {"enabled": True, "host": "a", "grpcHost": "b"}},
        "ingress.grpcHost is b, and gateway.grpc_port is null",
    ),
    "gRPC without TLS": (
        {"ingress": {"enabled": True, "host": "a", "grpcHost": "b"}},
        "name the certificate in ingress.tlsSecret",
    ),
    "routes to gRPC that nobody serves": (
        {
            "gateway": {"grpc_port": None},
            "gatewayApi": {"enabled": True, "parentRefs": [{"name": "a"}], "grpcHostnames": ["b"]},
        },
        "gatewayApi.grpcHostnames is set, and gateway.grpc_port is null",
    ),
    "a key of groups on the head": ({"head": {"minReplicas": 2}}, "additional properties 'minReplicas' not allowed"),
    "redis without its secret": ({"redis": {"address": "redis:6379"}}, "redis.existingSecret is not"),
    "a bundled redis without its secret": (
        {"redis": {"bundled": {"enabled": True}}},
        "redis.bundled.enabled is set, but redis.existingSecret is not",
    ),
    "two redis": (
        {"redis": {"address": "redis:6379", "existingSecret": "a", "bundled": {"enabled": True}}},
        "redis.address is redis:6379, and redis.bundled.enabled is true",
    ),
    "a redis of any version": (
        {"redis": {"existingSecret": "a", "bundled": {"enabled": True, "image": "registry:5000/redis"}}},
        "redis.bundled.image is registry:5000/redis; name a tag",
    ),
    "the redis of the day": (
        {"redis": {"existingSecret": "a", "bundled": {"enabled": True, "image": "redis:latest"}}},
        "redis.bundled.image is latest",
    ),
    "a bucket and a claim": (
        {"outputs": {"size": "1Gi", "s3": {"url": "s3://bucket", "existingSecret": "a"}}},
        "outputs.s3.url is s3://bucket, and outputs has a claim",
    ),
    "a bucket of another kind": (
        {"outputs": {"s3": {"url": "https://bucket", "existingSecret": "a"}}},
        "outputs.s3.url is https://bucket; it is s3://BUCKET",
    ),
    "a bucket that nobody may write": (
        {"outputs": {"s3": {"url": "s3://bucket"}}},
        "name the Secret with AWS_ACCESS_KEY_ID",
    ),
    "rights in no bucket": ({"outputs": {"s3": {"existingSecret": "a"}}}, "outputs.s3.url is empty"),
    "webhooks that nobody signs": (
        {"gateway": {"webhook_hosts": ["a.example"], "webhook_key_env": "HOOKS"}},
        "gateway.webhook_key_env is HOOKS, which no gateway has",
    ),
    "jobs at no address": ({"storage": {"jobs_url_env": "JOBS"}}, "storage.jobs_url_env is JOBS, which no gateway has"),
    "weights ahead without a claim": ({"cache": {"prefetch": True}}, "cache.prefetch is true, but there is no claim"),
    "gateways where their keys are not": (
        {**GPU_GROUPS, "gateway": {"node_labels": None}, "jobs": {"existingSecret": "jobs"}},
        "so a gateway may run on nodes of l40s, h100, which have no keys, jobs and outputs",
    ),
    "jobs in two places": ({"jobs": {"existingSecret": "a"}, "storage": {"jobs": "/a"}}, "storage.jobs is set"),
    "an ingress for no host": ({"ingress": {"enabled": True}}, "ingress.host is empty"),
    "routes without a gateway": ({"gatewayApi": {"enabled": True}}, "gatewayApi.parentRefs is empty"),
    "accounts that nobody names": ({"serviceAccount": {"create": False}}, "name the accounts"),
    "two models of one name": (models({}, {"name": "b", "aliases": ["a"]}), 'two models are called "a"'),
    "a folder beside the file": (models({"source": "../.demo/qwen-image"}), "models.a.source is"),
    "an adapter beside the file": (
        models({"loras": [{"name": "l", "source": "l.safetensors"}]}),
        "models.a.loras.l.source",
    ),
    "a gateway on loopback": ({"gateway": {"host": "127.0.0.1"}}, "gateway.host is 127.0.0.1"),
    "a port of chance": ({"gateway": {"grpc_port": 0}}, "gateway.grpc_port is 0"),
    "metrics at a port of chance": ({"metrics": {"port": 0}}, "metrics.port is 0"),
    "labels that no group has": ({"gateway": {"node_labels": {"pool": "a"}}}, "gateway.node_labels is"),
    "a longer request than a pod may take to end": (
        models({"grace_period_s": 1831}),
        "models.a.grace_period_s is 1831, but upgrade.drainSeconds is 1860",
    ),
    "more GPUs than a node has": (
        models({"parallel": {"ulysses_degree": 16}}),
        "a gang has 16 ranks of one GPU and 1 CPU cores each, all on one node, and the largest group's nodes hold 8",
    ),
    "more GPUs than all nodes have": (
        models({"parallel": {"ulysses_degree": 24}, "placement": {"strategy": "PACK"}}),
        "all nodes that the groups may have hold 20",
    ),
    "a GPU that no node has": (
        models({"placement": {"accelerator_type": "H200"}}),
        "4 ranks of one GPU and 1 CPU cores each on H200, all on one node, and the largest group's nodes hold 0",
    ),
    "too few cores for the ranks": (
        models({"placement": {"cpus_per_rank": 3, "accelerator_type": "L40S"}}),
        "the largest group's nodes hold 2",
    ),
    "labels that no node has": (
        models({"placement": {"node_labels": {"zone": "b"}}}),
        'with the labels {"zone":"b"}, all on one node',
    ),
    "a gang that leaves a node of a set idle": (
        models({}) | {"groups": [HOSTS]},
        "models.a: a gang has 4 ranks, and the 2 nodes of group pairs, which come and go together, hold 16",
    ),
    "a gang that leaves places of a set idle": (
        models(with_values(SPANS, {"parallel": {"ulysses_degree": 12}})) | {"groups": [HOSTS]},
        "models.a: a gang has 12 ranks, and the 2 nodes of group pairs",
    ),
    "a gang on CPU on nodes of a set": (
        {"groups": [HOSTS]},
        "models.demo: a gang has 2 ranks, and the 2 nodes of group pairs, which come and go together, hold 256",
    ),
    "ranks in a set and elsewhere": (
        models(SPANS) | {"groups": [*GPU_GROUPS["groups"], HOSTS]},
        "models.a: its ranks may be on nodes of several groups, and those of pairs come and go by 2",
    ),
    "sets that come one after the other": (
        models(SPANS) | {"groups": [HOSTS | {"maxReplicas": 2, "minReplicas": 1}]},
        "groups.pairs: its nodes come and go by 2, and a gang on nodes of two such sets would end",
    ),
    "gateways by twos": ({"gatewayNodes": {"hosts": 2}}, "gatewayNodes.hosts is 2"),
    "more at least than at most": (
        {"groups": [{"name": "a", "minReplicas": 2}]},
        "groups.a.minReplicas is 2, above maxReplicas, 1",
    ),
    "jobs that the head cannot write": (
        {"storage": {"jobs": "/jobs"}},
        "storage.jobs is /jobs, which the head cannot write: the root is read-only; leave it out and set state.size, "
        "or mount a volume there by head.extraVolumeMounts",
    ),
    "jobs where only other nodes have a volume": (
        {"storage": {"jobs": "/jobs"}, "gatewayNodes": {"extraVolumeMounts": [{"name": "a", "mountPath": "/jobs"}]}},
        "storage.jobs is /jobs",
    ),
    "answers that the head cannot write": (
        {"storage": {"idempotency": {"folder": "/var/lib/spray"}}},
        "storage.idempotency.folder is /var/lib/spray, which the head cannot write",
    ),
    "outputs that gateways cannot write": (
        {"storage": {"outputs": {"folder": "/shared/outputs"}}},
        "storage.outputs.folder is /shared/outputs, which the nodes of gateways cannot write: the root is read-only; "
        "leave it out and set outputs.size, or mount a volume there by gatewayNodes.extraVolumeMounts",
    ),
    "outputs beside a volume": (
        {"storage": {"outputs": {"folder": "/tmpfiles"}}},
        "storage.outputs.folder is /tmpfiles",
    ),
    "outputs on a volume to read": (
        {
            "storage": {"outputs": {"folder": "/shared/outputs"}},
            "nodeDefaults": {"extraVolumeMounts": [{"name": "a", "mountPath": "/shared", "readOnly": True}]},
        },
        "storage.outputs.folder is /shared/outputs",
    ),
    "weights that gangs cannot write": (
        models({}) | {"storage": {"models": "/hub"}, "cache": {"size": "1Gi"}},
        "storage.models is /hub, which the nodes of l40s cannot write: the root is read-only; leave it out and set "
        "cache.size, or mount a volume there by extraVolumeMounts of groups.l40s",
    ),
    "weights ahead beside their claim": (
        models({}) | {"storage": {"models": "/tmp/hub"}, "cache": {"size": "1Gi", "prefetch": True}},
        "storage.models is /tmp/hub, and cache.prefetch fills the claim at /models",
    ),
    "compiled blocks that gangs cannot write": (
        models({"compile": True, "warmup_shapes": [{"width": 64, "height": 64}]}) | {"storage": {"compiled": "/code"}},
        "storage.compiled is /code, which the nodes of l40s cannot write",
    ),
    "two groups of one name": ({"groups": [{"name": "gateways"}]}, 'groups: two are called "gateways"'),
}
"""What is wrong over the trial's values, and what is said of it."""


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_the_reason(name: str) -> None:
    values, said = REFUSED[name]
    with pytest.raises(helm_python.HelmError) as refused:
        render(with_values(profile("trial"), values))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    "values",
    [
        models({}),
        models({"parallel": {"ulysses_degree": 8}}),
        models({"parallel": {"ulysses_degree": 16}, "placement": {"strategy": "PACK"}}),
        models({"placement": {"accelerator_type": "L40S", "cpus_per_rank": 2}}),
        models({"placement": {"node_labels": {"zone": "a"}}, "grace_period_s": 1830}),
        {
            "storage": {
                "jobs": "/tmp/jobs",
                "outputs": {"folder": "/dev/shm/o"},
                "idempotency": {"folder": "/home/spray"},
            }
        },
        {"storage": {"jobs": "/jobs", "models": "/hub"}, "securityContext": {"readOnlyRootFilesystem": False}},
        {"storage": {"jobs": "/a/jobs"}, "head": {"extraVolumeMounts": [{"name": "a", "mountPath": "/a/"}]}},
        {  # only the second group has gangs with weights from the hub, and none compiles
            **models(
                {"placement": {"node_labels": {"zone": "a"}}},
                {"name": "b", "source": "/b", "placement": {"accelerator_type": "L40S"}},
            ),
            "groups": [GPU_GROUPS["groups"][0], GPU_GROUPS["groups"][1] | {"extraVolumeMounts": [HUB]}],
            "storage": {"models": "/hub", "compiled": "/code"},
        },
        {  # weights that were fetched before, on a volume to read
            **models({}),
            "nodeDefaults": {"extraVolumeMounts": [HUB | {"readOnly": True}]},
            "storage": {"models": "/hub"},
        },
        models(SPANS) | {"groups": [HOSTS]},
        models(SPANS) | {"groups": [HOSTS | {"maxReplicas": 2, "minReplicas": 2}]},
        models(with_values(SPANS, {"parallel": {"ulysses_degree": 32}}))
        | {"groups": [HOSTS | {"maxReplicas": 2, "minReplicas": 2}]},
        models(
            with_values(SPANS, {"placement": {"node_labels": {"nodes": "pairs"}}}),
            {
                "name": "b",
                "device": "cpu",
                "placement": {"node_labels": {"spray-role": "gateway"}, "cpus_per_rank": 0.5},
            },
        )
        | {"groups": [*GPU_GROUPS["groups"], HOSTS]},
    ],
)
def test_what_fits_is_not_refused(values: Values) -> None:
    assert render(with_values(profile("trial"), values))
