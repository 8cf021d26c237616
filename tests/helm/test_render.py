"""What the chart renders is what Kubernetes takes, of all its versions from 1.29 on, and keeps our own rules."""

import functools
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import helm_python
import kubernetes_validate
import pytest
import yaml
from grafana_foundation_sdk.models.dashboard import Dashboard
from kubernetes_validate import utils

from tests.helm.chart import (
    CHART,
    PROFILES,
    VERSIONS,
    Values,
    cases,
    containers,
    of_kind,
    pod_templates,
    profile,
    ray_service,
    render,
    texts,
    with_values,
)
from tests.helm.crds import CUSTOM, FILES, FOLDER, mistakes
from tests.support.prometheus import promtool

CASES = cases()
KUBERNETES = dict(zip(CASES, itertools.cycle(VERSIONS), strict=False))
"""One version for each case, in turn; the production profile is rendered for all."""

OTHERS = ("gateway.networking.k8s.io",)
"""Groups of kinds that no schema is at hand for."""


@pytest.fixture(scope="module", autouse=True)
def schemas_are_read_once() -> Iterator[None]:
    """They are megabytes of JSON, which the package reads again for each object."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils, "schema_contents", functools.cache(utils.schema_contents))
        yield


def pods_of(objects: list[Any]) -> list[Any]:
    """The pods that the templates of the Ray cluster become."""
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, **made["metadata"]}, "spec": made["spec"]}
        for name, made in pod_templates(objects).items()
    ]


def check(objects: list[Any], version: str) -> None:
    """Every object is what its schema says."""
    for each in objects:
        group = each["apiVersion"].partition("/")[0]
        if group in CUSTOM:
            assert mistakes(each) == []
        elif group not in OTHERS:
            kubernetes_validate.validate(each, version.removeprefix("v").removesuffix(".0"), strict=True)


@pytest.mark.parametrize("name", CASES)
def test_lint_finds_nothing(name: str) -> None:
    report = helm_python.lint(CHART, CASES[name], strict=True, kube_version=KUBERNETES[name])
    assert report["errors"] == []
    assert [message for message in report["messages"] if message["severity"] > 1] == []


def test_the_chart_alone_is_linted_too() -> None:
    report = helm_python.lint(CHART, strict=True)
    assert [message for message in report["messages"] if message["severity"] > 1] == []


@pytest.mark.parametrize("name", CASES)
def test_every_object_passes_the_schemas(name: str) -> None:
    objects = render(CASES[name], KUBERNETES[name])
    check([*objects, *pods_of(objects)], KUBERNETES[name])


@pytest.mark.parametrize("version", VERSIONS)
def test_production_passes_the_schemas_of_every_version(version: str) -> None:
    objects = render(profile("production"), version, ("monitoring.coreos.com/v1",))
    check([*objects, *pods_of(objects)], version)


@pytest.mark.skipif(not FOLDER.is_dir(), reason=f"RayService, PodMonitor and PrometheusRule are unchecked: no {FOLDER}")
def test_the_schemas_of_other_projects_are_at_hand() -> None:
    assert all((FOLDER / f"{name}.yaml").is_file() for name in FILES.values())


@pytest.mark.parametrize("kind", ["RayService", "PodMonitor", "NetworkPolicy"])
def test_schemas_find_an_unknown_key(kind: str) -> None:
    """The control of the tests above."""
    if kind in FILES and not FOLDER.is_dir():
        pytest.skip(f"the CRDs are not in {FOLDER}")
    objects = render(profile("production"))
    of_kind(objects, kind)[0]["spec"]["unheardOf"] = 1
    with pytest.raises((AssertionError, kubernetes_validate.ValidationError)):
        check(objects, VERSIONS[-1])


def test_schemas_find_an_unknown_key_of_a_pod() -> None:
    objects = render(profile("production"))
    pod_templates(objects)["h100-4x"]["spec"]["containers"][0]["imagePullPolice"] = "Never"
    with pytest.raises(kubernetes_validate.ValidationError):
        check(pods_of(objects), VERSIONS[-1])


def test_an_environment_is_that_of_the_nearest() -> None:
    """A name twice is refused by the API server."""
    values = {
        "nodeDefaults": {"env": [{"name": "NCCL_DEBUG", "value": "WARN"}, {"name": "MALLOC_ARENA_MAX", "value": "4"}]},
        "groups": [{"name": "a", "env": [{"name": "NCCL_DEBUG", "value": "INFO"}]}],
    }
    templates = pod_templates(render(with_values(profile("trial"), values)))
    found = {
        name: [(each["name"], each.get("value")) for each in templates[name]["spec"]["containers"][0]["env"]]
        for name in ("gateways", "a")
    }
    for name, said in (("gateways", "WARN"), ("a", "INFO")):
        assert len(dict(found[name])) == len(found[name])
        assert (dict(found[name])["NCCL_DEBUG"], dict(found[name])["MALLOC_ARENA_MAX"]) == (said, "4")


def test_what_fetches_weights_runs_where_gateways_do_and_reaches_the_hub_as_gangs_do() -> None:
    proxy, hub = {"name": "HTTPS_PROXY", "value": "http://proxy:3128"}, {"name": "HOME", "value": "/elsewhere"}
    taints = [{"key": "team", "operator": "Exists"}]
    values = {
        "nodeDefaults": {"env": [proxy, hub], "tolerations": taints},
        "gatewayNodes": {"nodeSelector": {"pool": "cpu"}, "priorityClassName": "high"},
        "models": [{"name": "a", "source": "acme/a", "device": "cpu"}],
        "cache": {"size": "1Ti", "prefetch": True},
    }
    (job,) = of_kind(render(with_values(profile("trial"), values)), "Job")
    spec = job["spec"]["template"]["spec"]
    assert (spec["nodeSelector"], spec["tolerations"], spec["priorityClassName"]) == ({"pool": "cpu"}, taints, "high")
    env = spec["containers"][0]["env"]
    assert proxy in env and [each["value"] for each in env if each["name"] == "HOME"] == ["/home/spray"]


@pytest.mark.parametrize("name", CASES)
def test_every_container_is_bounded_and_unprivileged(name: str) -> None:
    objects = render(CASES[name], KUBERNETES[name])
    for container in containers(objects):
        resources = container["resources"]
        assert {"cpu", "memory"} <= set(resources["requests"])
        assert resources["limits"]["memory"]
        assert resources["limits"].items() <= (resources["requests"] | resources["limits"]).items()
        assert re.search(r"^registry.example/spray(:0\.1\.0|@sha256:0{64})$|/redis:7\.4\.1$", container["image"])
        context = container["securityContext"]
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert context["readOnlyRootFilesystem"] and not context["allowPrivilegeEscalation"]
    for spec in (template["spec"] for template in pod_templates(objects).values()):
        assert spec["securityContext"]["runAsNonRoot"]
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        writable = {mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
        assert writable >= {"/tmp", "/home/spray", "/dev/shm"}  # where Ray, torch and the hub write
        mounted = {mount["name"] for each in spec["containers"] for mount in each["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}


@pytest.mark.parametrize("name", CASES)
def test_the_head_takes_no_ranks_and_no_requests(name: str) -> None:
    spec = ray_service(render(CASES[name], KUBERNETES[name]))["spec"]
    assert spec["excludeHeadPodFromServeSvc"]
    assert spec["rayClusterConfig"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    for group in spec["rayClusterConfig"]["workerGroupSpecs"]:
        container = group["template"]["spec"]["containers"][0]
        assert group["rayStartParams"]["num-cpus"] == str(container["resources"]["requests"]["cpu"])
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        assert {port["name"]: port["port"] for port in spec["serveService"]["spec"]["ports"]}.items() <= ports.items()


def test_shared_memory_holds_the_object_store_and_nccl() -> None:
    cluster = ray_service(render(profile("production")))["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        volumes = {volume["name"]: volume for volume in group["template"]["spec"]["volumes"]}
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        size = int(volumes["shm"]["emptyDir"]["sizeLimit"].removesuffix("Mi"))
        store = int(group["rayStartParams"]["object-store-memory"]) >> 20
        assert size >= store + 1024 * limits.get("nvidia.com/gpu", 0)


def test_a_node_that_is_not_there_yet_tells_the_autoscaler_its_gpu() -> None:
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    cluster = ray_service(render(profile("production")))["spec"]["rayClusterConfig"]
    types = _generate_available_node_types_from_ray_cr_spec(cluster)
    assert types["headgroup"]["resources"]["CPU"] == 0
    gpus = types["h100-4x"]
    assert gpus["resources"].items() >= {"CPU": 32, "GPU": 4, "accelerator_type:H100": 1}.items()
    assert (gpus["min_workers"], gpus["max_workers"]) == (2, 5)
    assert types["gateways"]["labels"] == {"spray-role": "gateway"}


def test_a_part_of_a_gpu_is_a_gpu_to_the_autoscaler() -> None:
    """MIG's resources end in what the autoscaler does not know."""
    from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec

    group = {"name": "parts", "gpus": 2, "gpuResource": "nvidia.com/mig-3g.40gb"}
    cluster = ray_service(render(with_values(profile("trial"), {"groups": [group]})))["spec"]["rayClusterConfig"]
    types = _generate_available_node_types_from_ray_cr_spec(cluster)
    assert types["parts"]["resources"]["GPU"] == 2
    assert "GPU" not in types["gateways"]["resources"]


@pytest.mark.parametrize("name", CASES)
def test_no_secret_is_in_plain(name: str) -> None:
    """Neither an object of kind Secret nor a value of a variable that sounds like one."""
    objects = render(CASES[name], KUBERNETES[name])
    assert not of_kind(objects, "Secret")
    assert {
        path for each in of_kind(objects, "ConfigMap") for path in each["data"] if not path.endswith(".json")
    } == set()
    for variable in (variable for container in containers(objects) for variable in container.get("env", [])):
        if re.search("TOKEN|KEY|PASSWORD|SECRET", variable["name"]):
            assert "value" not in variable


def test_only_the_gateways_ports_are_open() -> None:
    (policy,) = of_kind(render(profile("production")), "NetworkPolicy")
    open_to_all = [rule for rule in policy["spec"]["ingress"] if "from" not in rule]
    assert [[port["port"] for port in rule["ports"]] for rule in open_to_all] == [[8000, 9000]]
    named = with_values(profile("production"), {"networkPolicy": {"clients": [{"podSelector": {}}]}})
    (policy,) = of_kind(render(named), "NetworkPolicy")
    assert all("from" in rule for rule in policy["spec"]["ingress"])


def test_an_empty_list_of_peers_lets_in_nobody() -> None:
    closed = {"networkPolicy": {"operator": [], "monitoring": [], "clients": [{"podSelector": {}}]}}
    (policy,) = of_kind(render(with_values(profile("production"), closed)), "NetworkPolicy")
    among, clients = policy["spec"]["ingress"]
    assert among["from"] and [port["port"] for port in clients["ports"]] == [8000, 9000]
    (policy,) = of_kind(render(profile("production")), "NetworkPolicy")
    _, *ours = policy["spec"]["ingress"]
    ports = [[each["port"] for each in rule["ports"]] for rule in ours]
    assert ports == [[8000, 9000], [8265, 8000], [8080, 9464, 44217, 44227]]  # the control


def test_metrics_are_asked_for_where_something_exports() -> None:
    """Gateways and gangs do; a port of the head would be a target that is always down."""
    templates = pod_templates(render(profile("production")))
    named = {
        name: {port["name"] for port in template["spec"]["containers"][0]["ports"]}
        for name, template in templates.items()
    }
    assert {name for name, ports in named.items() if "spray-metrics" in ports} == {"gateways", "h100-4x"}
    assert all("metrics" in ports for ports in named.values())


def test_a_budget_keeps_all_gateway_nodes_but_one() -> None:
    (budget,) = of_kind(render(profile("production")), "PodDisruptionBudget")
    assert budget["spec"]["minAvailable"] == 1
    assert not of_kind(render(profile("trial")), "PodDisruptionBudget")


@pytest.mark.parametrize("name", PROFILES)
def test_selectors_find_the_pods(name: str) -> None:
    """KubeRay adds the labels ray.io/...; all others that something selects are in the pods' templates."""
    objects = render(profile(name))
    for template in pod_templates(objects).values():
        labels = template["metadata"]["labels"]
        for kind, path in (
            ("PodMonitor", "selector"),
            ("NetworkPolicy", "podSelector"),
            ("PodDisruptionBudget", "selector"),
        ):
            for each in of_kind(objects, kind):
                wanted = {k: v for k, v in each["spec"][path]["matchLabels"].items() if not k.startswith("ray.io/")}
                assert wanted.items() <= labels.items()


def notes(values: Values) -> str:
    return texts(values)["spray/templates/NOTES.txt"]


def test_the_notes_say_how_to_go_on() -> None:
    trial, production = notes(profile("trial")), notes(profile("production"))
    for text in (trial, production):
        assert "port-forward service/rel-spray-serve-svc 8000 9000" in text
        assert "helm test rel --namespace pictures" in text
    assert '"model": "demo"' in trial and "Nobody needs a key" in trial
    assert "https://spray.example.com" in production and "Bearer $SPRAY_API_KEY" in production
    assert "admin key" in production and "admin key" not in trial


def test_the_notes_say_where_urls_of_files_would_be_plain() -> None:
    routes: Values = {"gatewayApi": {"enabled": True, "parentRefs": [{"name": "g"}], "hostnames": ["a"]}}
    named: Values = {"gateway": {"public_url": "https://a"}}
    trial = profile("trial")
    cases = ((trial, False), (with_values(trial, routes), True), (with_values(trial, routes, named), False))
    for values, told in cases:
        assert ("set gateway.public_url" in notes(values)) == told


@pytest.mark.parametrize("name", CASES)
def test_what_goes_on_running_is_probed(name: str) -> None:
    """Pods of `helm test`, of Jobs and before others end by themselves."""
    objects = render(CASES[name], KUBERNETES[name])
    templates = [*pod_templates(objects).values()]
    templates += [each["spec"]["template"] for each in of_kind(objects, "StatefulSet")]
    for container in (each for template in templates for each in template["spec"]["containers"]):
        assert container["livenessProbe"] and container["readinessProbe"]
        ports = {port["name"]: port["containerPort"] for port in container["ports"]}
        named = container["readinessProbe"].get("httpGet", {}).get("port")
        assert named is None or named in ports


def test_a_pod_hands_over_before_it_ends() -> None:
    """All but the head, which serves nothing; in less time than Kubernetes gives it."""
    for group, template in pod_templates(render(profile("production"))).items():
        (container,) = template["spec"]["containers"]
        if group == "head":
            assert "lifecycle" not in container
            continue
        *command, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
        assert command == ["python", "-m", "service.rollout.drain"]
        assert int(seconds) == template["spec"]["terminationGracePeriodSeconds"] - 30


def test_jobs_and_keys_are_on_the_heads_claim_where_their_actors_are() -> None:
    templates = pod_templates(render(CASES["state on a volume"]))
    mounts = {
        name: [mount["mountPath"] for mount in template["spec"]["containers"][0]["volumeMounts"]]
        for name, template in templates.items()
    }
    assert "/var/lib/spray" in mounts["head"] and "/var/lib/spray" not in mounts["gateways"]
    (claim,) = of_kind(render(CASES["state on a volume"]), "PersistentVolumeClaim")
    assert claim["metadata"]["name"] == "rel-spray-state" and claim["spec"]["accessModes"] == ["ReadWriteOnce"]


def test_only_gateways_know_where_jobs_are() -> None:
    for group, template in pod_templates(render(CASES["both"])).items():
        found = [each for each in template["spec"]["containers"][0]["env"] if each["name"] == "SPRAY_JOBS_URL"]
        secret = {"name": "SPRAY_JOBS_URL", "valueFrom": {"secretKeyRef": {"name": "jobs", "key": "uri"}}}
        assert found == ([secret] if group == "gateways" else [])


def test_only_gateways_may_write_to_the_bucket() -> None:
    for group, template in pod_templates(render(CASES["outputs in a bucket"])).items():
        (container,) = template["spec"]["containers"]
        assert container.get("envFrom") == ([{"secretRef": {"name": "s3"}}] if group == "gateways" else None)


def test_rays_state_is_in_the_redis_that_only_its_pods_reach() -> None:
    objects = render(CASES["a bundled redis"])
    (service,) = of_kind(objects, "Service")
    (redis,) = of_kind(objects, "StatefulSet")
    told = ray_service(objects)["spec"]["rayClusterConfig"]["gcsFaultToleranceOptions"]
    assert told["redisAddress"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert (
        told["redisPassword"]["valueFrom"] == redis["spec"]["template"]["spec"]["containers"][0]["env"][0]["valueFrom"]
    )
    labels = redis["spec"]["template"]["metadata"]["labels"]
    assert service["spec"]["selector"] == labels == redis["spec"]["selector"]["matchLabels"]
    (policy,) = (
        each for each in of_kind(objects, "NetworkPolicy") if each["spec"]["podSelector"]["matchLabels"] == labels
    )
    (rule,) = policy["spec"]["ingress"]
    (peer,) = rule["from"]
    for template in pod_templates(objects).values():
        wanted = {k: v for k, v in peer["podSelector"]["matchLabels"].items() if not k.startswith("ray.io/")}
        assert wanted.items() <= template["metadata"]["labels"].items()
    assert not wanted.items() <= {}.items()


def test_a_job_fetches_what_comes_from_the_hub() -> None:
    (job,) = of_kind(render(CASES["weights ahead"]), "Job")
    (container,) = job["spec"]["template"]["spec"]["containers"]
    told = {each["name"]: each.get("value") for each in container["env"]}
    assert json.loads(told["SPRAY_MODELS"]) == [{"name": "b", "source": "org/b", "revision": "v1"}]
    assert told["SPRAY_FOLDER"] == "/models/hub"


@pytest.mark.parametrize(
    "change",
    [
        {"image": {"tag": "0.2.0"}},
        {"image": {"pullPolicy": "Always"}},
        {"image": {"pullSecrets": ["registry"]}},
        {"hubToken": {"existingSecret": "other"}},
        {"cache": {"existingClaim": "weights"}},
        {"podSecurityContext": {"runAsUser": 2000}},
        {"storage": {"models": "/models/other"}},
        {"models": [{"name": "d", "source": "org/d", "device": "cpu"}]},
    ],
    ids=str,
)
def test_a_job_whose_pod_changes_is_another_job(change: Values) -> None:
    """Kubernetes refuses to change the pod of a Job."""
    before, after = (
        of_kind(render(values), "Job")[0]
        for values in (CASES["weights ahead"], with_values(CASES["weights ahead"], change))
    )
    assert before["spec"]["template"] != after["spec"]["template"]
    assert before["metadata"]["name"] != after["metadata"]["name"]


def test_a_job_is_the_same_while_its_pod_is() -> None:
    """Else each upgrade would run it again, and a new version of the chart too."""
    values = with_values(CASES["weights ahead"], {"commonLabels": {"a": "b"}, "gateway": {"replicas": 2}})
    jobs = [of_kind(render(each), "Job")[0] for each in (CASES["weights ahead"], values)]
    assert jobs[0]["metadata"]["name"] == jobs[1]["metadata"]["name"]


@pytest.mark.parametrize("name", CASES)
def test_names_that_become_labels_or_hosts_have_63_characters_at_most(name: str) -> None:
    """With the longest name of a release, which the chart cuts to 47."""
    objects = render(with_values(CASES[name], {"fullnameOverride": "a" * 60}), KUBERNETES[name])
    names = [
        each["metadata"]["name"]
        for each in objects
        if each["kind"] in ("RayService", "Job", "Pod", "Service", "StatefulSet", "ServiceAccount")
    ]
    names.append(ray_service(objects)["spec"]["serveService"]["metadata"]["name"])
    assert len(names) >= 2 and max(map(len, names)) <= 63, names


def test_rules_and_dashboards_arrive_as_they_are() -> None:
    objects = render(CASES["monitoring"])
    (rules,) = of_kind(objects, "PrometheusRule")
    assert rules["spec"] == yaml.safe_load((CHART / "files" / "prometheus" / "rules.yml").read_text())
    boards = {name: text for each in of_kind(objects, "ConfigMap") for name, text in each["data"].items()}
    assert boards == {file.name: file.read_text() for file in (CHART / "files" / "grafana").glob("*.json")}
    for text in boards.values():
        assert len(text.encode()) < 1 << 20  # of a ConfigMap
        assert Dashboard.from_json(json.loads(text)).panels


def test_promtool_takes_the_rules_as_rendered(tmp_path: Path) -> None:
    (rules,) = of_kind(render(CASES["monitoring"]), "PrometheusRule")
    (tmp_path / "rules.yml").write_text(yaml.safe_dump(rules["spec"]))
    assert "SUCCESS" in promtool("check", "rules", str(tmp_path / "rules.yml"), said=True)
