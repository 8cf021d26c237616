"""Models of different families and degrees on one cluster: each is changed, upgraded, woken and removed alone."""

import base64
import io
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import av
import httpx
import pytest
import yaml
from PIL import Image
from safetensors.torch import load_file, save_file

from deploy.model_sections import Autoscaling, LoRA
from deploy.spec import DeploymentSpec
from service.cli.client import read_cluster, read_models
from service.rollout.local_cluster import LocalCluster
from tests.support.deployments import deployment, model, ready, wait_for

CUP = {"prompt": "a cup of coffee", "seed": 7}


@pytest.fixture(scope="module")
def spec(demo_models: dict[str, Path]) -> DeploymentSpec:
    sleepy = Autoscaling(
        min_replicas=0,
        upscale_delay_s=0,
        downscale_delay_s=3,
        downscale_to_zero_delay_s=3,
    )
    wan = model(demo_models["wan"], "wan", tensor_parallel_size=2)
    return deployment(
        model(demo_models["qwen-image"], "qwen", ulysses_degree=2).model_copy(update={"aliases": ("cups",)}),
        wan.model_copy(update={"defaults": wan.defaults.model_copy(update={"num_frames": 9})}),
        model(demo_models["z-image"], "z").model_copy(update={"autoscaling": sleepy}),
    )


@pytest.fixture(scope="module")
def cluster(spec: DeploymentSpec) -> Iterator[LocalCluster]:
    with LocalCluster(spec) as cluster:
        ready(cluster)
        yield cluster


def ask(cluster: LocalCluster, name: str, **body: Any) -> httpx.Response:
    path = "videos/sync" if name == "wan" else "images/generations"
    body = CUP | {"model": name} | body
    return httpx.post(f"{cluster.url}/v1/{path}", json=body, timeout=300, trust_env=False)


def picture(answer: httpx.Response) -> Image.Image:
    assert answer.status_code == 200, answer.text
    return Image.open(io.BytesIO(base64.b64decode(answer.json()["data"][0]["b64_json"])))


def seen(cluster: LocalCluster) -> dict[str, dict[str, Any]]:
    """`GET /v1/cluster` by model, once every running gang has reported. As of a moment ago."""
    return wait_for(
        lambda: {each["id"]: each for each in read_cluster(cluster.url)["models"]},
        lambda models: all(each["replicas"].get("RUNNING", 0) <= len(each["gangs"]) for each in models.values()),
    )


def pids(cluster: LocalCluster) -> dict[str, list[int]]:
    """The ranks' processes by model."""
    return {name: [p for gang in each["gangs"] for p in gang["now"]["pids"]] for name, each in seen(cluster).items()}


def spray(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "service.cli.main", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=500)


def deploy(cluster: LocalCluster, spec: DeploymentSpec, folder: Path, *flags: str, **changes: dict[str, Any]) -> Any:
    """Write the deployment with changes by model (None leaves one out), and run `spray deploy`."""
    models = [each.model_dump(mode="json") | changes.get(each.name, {}) for each in spec.models]
    file = folder / "deployment.yaml"
    file.write_text(yaml.safe_dump({"models": [each for each in models if each["source"]]}))
    return spray("deploy", file, "--address", cluster.address, *flags)


def test_each_answers_with_its_degrees(cluster: LocalCluster) -> None:
    assert picture(ask(cluster, "qwen")).size == (64, 48)
    assert picture(ask(cluster, "cups")).tobytes() == picture(ask(cluster, "qwen")).tobytes()
    video = ask(cluster, "wan")
    assert video.headers["content-type"] == "video/mp4"
    with av.open(io.BytesIO(video.content)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 9
    models = seen(cluster)
    assert {name: (each["layout"], each["ranks"]) for name, each in models.items()} == {
        "qwen": ("ulysses_degree=2", 2),
        "wan": ("tensor_parallel_size=2", 2),
        "z": ("1 rank", 1),
    }
    assert {name: len(found) for name, found in pids(cluster).items() if name != "z"} == {"qwen": 2, "wan": 2}
    tasks = {each["id"]: each["tasks"] for each in read_models(cluster.url)["data"]}
    assert tasks == {
        "qwen": ["text-to-image", "image-to-image", "inpaint"],
        "wan": ["text-to-video"],
        "z": ["text-to-image", "image-to-image"],
    }
    url = f"{cluster.url}/v1/images/generations"
    refused = httpx.post(url, json=CUP | {"model": "wan"}, timeout=60, trust_env=False)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "wrong_task")


def test_a_sleeping_model_wakes_for_its_first_caller(cluster: LocalCluster) -> None:
    others = {name: found for name, found in pids(cluster).items() if name != "z"}
    assert seen(cluster)["z"]["state"] == "asleep"
    with ThreadPoolExecutor(3) as callers:
        answers = list(callers.map(lambda _: picture(ask(cluster, "z", guidance_scale=0)), range(3)))
    assert len({answer.tobytes() for answer in answers}) == 1
    assert "z " in spray("ps", "--server", cluster.url).stdout
    wait_for(lambda: seen(cluster)["z"]["state"], lambda state: state == "asleep")
    assert {name: found for name, found in pids(cluster).items() if name != "z"} == others


def test_what_is_live_restarts_nothing(cluster: LocalCluster, spec: DeploymentSpec, ink: LoRA, tmp_path: Path) -> None:
    before = pids(cluster)
    plain = picture(ask(cluster, "qwen"))
    assert ask(cluster, "qwen", loras=[{"name": "ink"}]).status_code == 400
    limits = spec.models[0].limits.model_dump() | {"max_num_inference_steps": 6}
    done = deploy(
        cluster,
        spec,
        tmp_path,
        qwen={"limits": limits, "loras": [ink.model_dump()], "aliases": ["mugs"], "tasks": None},
    )
    assert done.returncode == 0, done.stderr
    assert "adjust  qwen: its gangs go on (" in done.stdout
    assert "keep    wan: unchanged" in done.stdout
    assert pids(cluster) == before
    assert picture(ask(cluster, "mugs")).tobytes() == plain.tobytes()
    assert picture(ask(cluster, "qwen", loras=[{"name": "ink"}])).tobytes() != plain.tobytes()
    assert ask(cluster, "qwen", num_inference_steps=7).json()["error"]["param"] == "num_inference_steps"
    assert ask(cluster, "cups").status_code == 404


def test_an_adapter_that_is_overwritten_is_loaded_again(
    cluster: LocalCluster, spec: DeploymentSpec, ink: LoRA, tmp_path: Path
) -> None:
    mine = ink.model_copy(update={"source": str(shutil.copy(ink.source, tmp_path / "ink.safetensors"))})
    changes = {"qwen": {"loras": [mine.model_dump()]}}
    assert deploy(cluster, spec, tmp_path, **changes).returncode == 0
    before = pids(cluster)
    drawn = picture(ask(cluster, "qwen", loras=[{"name": "ink"}])).tobytes()
    again = deploy(cluster, spec, tmp_path, **changes)
    assert "keep    qwen: unchanged" in again.stdout, again.stdout + again.stderr
    save_file({name: tensor * 2 for name, tensor in load_file(mine.source).items()}, mine.source)
    changed = deploy(cluster, spec, tmp_path, **changes)
    assert "adjust  qwen: its gangs go on (loras)" in changed.stdout, changed.stdout + changed.stderr
    assert picture(ask(cluster, "qwen", loras=[{"name": "ink"}])).tobytes() != drawn
    assert pids(cluster) == before


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"placement": {"cpus_per_rank": 999}}, "qwen: needs 1998 CPU cores on one node, the largest node has "),
        pytest.param({"source": "/nowhere"}, "qwen: no model at /nowhere", marks=pytest.mark.soak),
        pytest.param(
            {"parallel": {"tensor_parallel_size": 7}},
            "qwen: tensor_parallel_size=7 does not divide",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_a_broken_model_is_refused(
    cluster: LocalCluster, spec: DeploymentSpec, tmp_path: Path, change: dict[str, Any], says: str
) -> None:
    before = pids(cluster)
    refused = deploy(cluster, spec, tmp_path, qwen=change, z={"max_queued": 9})
    assert refused.returncode == 1
    assert says in refused.stderr and "nothing was changed" in refused.stderr
    assert "Traceback" not in refused.stderr
    assert pids(cluster) == before
    assert ask(cluster, "qwen").status_code == 200


def test_an_upgrade_serves_throughout(cluster: LocalCluster, spec: DeploymentSpec, tmp_path: Path) -> None:
    before, codes, over = pids(cluster), [], []

    def keep_asking() -> None:
        while not over:
            codes.append(ask(cluster, "qwen").status_code)

    with ThreadPoolExecutor(1) as caller:
        asking = caller.submit(keep_asking)
        try:
            done = deploy(cluster, spec, tmp_path, qwen={"parallel": {"ring_degree": 2}})
        finally:
            over.append(True)
        asking.result()
    assert done.returncode == 0, done.stderr
    assert "upgrade qwen: " in done.stdout and "parallel.ring_degree 1 -> 2" in done.stdout
    assert set(codes) == {200} and len(codes) > 3
    assert seen(cluster)["qwen"]["layout"] == "ring_degree=2"
    after = wait_for(lambda: pids(cluster), lambda now: len(now["qwen"]) == 2 and now["qwen"] != before["qwen"])
    assert set(after["qwen"]).isdisjoint(before["qwen"])
    assert after["wan"] == before["wan"]


def test_models_are_added_and_removed_alone(cluster: LocalCluster, spec: DeploymentSpec, tmp_path: Path) -> None:
    only = {"qwen": {"parallel": {"ring_degree": 2}}, "wan": {"source": ""}}
    planned = deploy(cluster, spec, tmp_path, "--dry-run", "--prune", **only)
    assert "remove  wan: its gangs finish" in planned.stdout
    assert "leave   wan" in deploy(cluster, spec, tmp_path, **only).stdout
    assert ask(cluster, "wan").status_code == 200
    before = pids(cluster)
    done = deploy(cluster, spec, tmp_path, "--prune", **only)
    assert done.returncode == 0, done.stderr
    assert ask(cluster, "wan").status_code == 404
    assert pids(cluster)["qwen"] == before["qwen"]
    again = deploy(cluster, spec, tmp_path, qwen={"parallel": {"ring_degree": 2}})
    assert "add     wan: new" in again.stdout and again.returncode == 0, again.stderr
    assert ask(cluster, "wan").status_code == 200
    assert pids(cluster)["qwen"] == before["qwen"]


def test_a_gang_that_fits_nowhere_says_why(cluster: LocalCluster, spec: DeploymentSpec, tmp_path: Path) -> None:
    big = {"parallel": {"ring_degree": 2}}
    spray_deploy = [sys.executable, "-m", "service.cli.main", "deploy", "--address", cluster.address, "--allow-pending"]
    models = [each.model_dump(mode="json") for each in spec.models]
    models[0] |= big
    models.append(
        models[2] | {"name": "huge", "placement": {"cpus_per_rank": 9999}, "autoscaling": {"min_replicas": 1}}
    )
    file = tmp_path / "deployment.yaml"
    file.write_text(yaml.safe_dump({"models": models}))
    waiting = subprocess.Popen([*spray_deploy, str(file)], stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    try:
        found = wait_for(lambda: seen(cluster).get("huge", {}), lambda huge: huge.get("state") == "waiting")
        assert found["reason"].startswith("needs 9999 CPU cores on one node, the largest node has ")
        listed = {each["id"]: each for each in read_models(cluster.url)["data"]}
        assert (listed["huge"]["state"], listed["huge"]["reason"]) == ("waiting", found["reason"])
        assert f"huge: {found['reason']}" in spray("ps", "--server", cluster.url).stdout
        assert httpx.get(f"{cluster.url}/readyz", timeout=60, trust_env=False).status_code == 200
    finally:
        waiting.terminate()
        waiting.wait()
