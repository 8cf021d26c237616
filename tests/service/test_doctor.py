"""`spray doctor`: each fact on an invented machine, good and bad, and what the advice says."""

import json
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.gateway_spec import GatewaySpec
from deploy.memory import GIB
from deploy.model_sections import Placement, WarmupShape
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, Metrics
from deploy.storage_spec import Storage
from service.cli import doctor
from service.cli.doctor import Finding, Machine, diagnose
from sp_core.degrees import ParallelDegrees
from tests.support.deployments import deployment, model
from workers.model.compile_cache import cache_folder

TORCH = {"torch": "2.13.0", "cuda": "12.8", "nccl": "2.27.3", "usable": 2}


def a_machine(
    folder: Path, gpus: int = 2, torch: dict[str, Any] | None = None, driver: str = "570.1", **changes: Any
) -> Machine:
    for path in ("dev", "home"):
        (folder / path).mkdir(exist_ok=True)
    for name in [*(f"nvidia{i}" for i in range(gpus)), "nvidiactl"]:
        (folder / "dev" / name).touch()

    def run(command: list[str]) -> str:
        if command[0] == "nvidia-smi":
            return f"NVIDIA H100, {driver}, 81559 MiB\n" * gpus if driver else ""
        return json.dumps(TORCH if torch is None else torch) if torch != {} else ""

    facts: dict[str, Any] = {
        "dev": folder / "dev", "home": folder / "home", "environment": {}, "run": run, "files": 65536,
        "disk": lambda path: SimpleNamespace(total=64 * GIB, free=500 * GIB),
    }  # fmt: skip
    return Machine(**facts | changes)


def found(machine: Machine, name: str, spec: DeploymentSpec | None = None) -> Finding:
    (finding,) = [finding for finding in diagnose(spec, machine) if finding.name == name]
    return finding


def test_interfaces_that_the_file_names_are_looked_for(tmp_path: Path) -> None:
    spec = served()
    named = spec.models[0].model_copy(update={"placement": Placement(network_interface="eth1")})
    spec = spec.model_copy(update={"models": (named,)})
    there = {"eth0": ["10.0.0.1"], "eth1": [], "lo": ["127.0.0.1"]}
    missing = found(a_machine(tmp_path, interfaces=lambda: there), "network", spec)
    assert (missing.level, missing.advice) == ("fail", "set placement.network_interface to one of eth0, lo")
    usable = found(a_machine(tmp_path, interfaces=lambda: there | {"eth1": ["10.0.1.1"]}), "network", spec)
    assert (usable.level, usable.found) == ("ok", "eth1 has 10.0.1.1")


def served(ranks: int = 2, device: str = "cuda", source: str = "/nowhere") -> DeploymentSpec:
    spec = ModelSpec.model_validate({"name": "a", "source": source, "device": device})
    spec = spec.model_copy(update={"parallel": ParallelDegrees(ulysses_degree=ranks)})
    return DeploymentSpec(models=(spec,), gateway=GatewaySpec(port=0))


def test_a_good_machine(tmp_path: Path) -> None:
    findings = [f for f in diagnose(None, a_machine(tmp_path)) if not f.name.startswith("port ")]
    assert {finding.level for finding in findings} == {"ok"}
    assert not any(finding.advice for finding in findings)
    assert found(a_machine(tmp_path), "devices").found == "2 x NVIDIA H100, 81559 MiB each"
    assert found(a_machine(tmp_path), "nccl").found == "2.27.3"


BAD: list[tuple[dict[str, Any], str, str, str]] = [
    ({"gpus": 0}, "devices", "warn", "run this on a node with GPUs"),
    ({"driver": ""}, "devices", "fail", "install the NVIDIA driver"),
    ({"gpus": 1}, "devices", "warn", "the largest gang takes 2: lower its degrees or add GPUs"),
    ({"driver": "470.57"}, "driver", "fail", "CUDA 12.8 needs driver 525 or newer"),
    ({"torch": TORCH | {"cuda": None}}, "driver", "fail", "this torch is for CPUs only"),
    ({"torch": TORCH | {"usable": 1}}, "driver", "warn", "look at CUDA_VISIBLE_DEVICES"),
    ({"torch": TORCH | {"nccl": None}}, "nccl", "fail", "install torch's Linux build"),
    ({"torch": {}}, "torch", "fail", "install spray again"),
    ({"disk": lambda path: SimpleNamespace(total=64 * 2**20, free=GIB)}, "shared memory", "fail", "--shm-size=2g"),
    ({"disk": lambda path: SimpleNamespace(total=GIB, free=GIB)}, "shared memory", "warn", "sizeLimit 2Gi"),
    ({"disk": lambda path: SimpleNamespace(total=GIB, free=GIB)}, "disk for logs", "warn", "make room"),
    ({"files": 1024}, "open files", "warn", "ulimit -n 65536"),
    ({"environment": {"RAY_ADDRESS": "10.0.0.1:6379"}}, "RAY_ADDRESS", "warn", "unset it unless you mean to"),
    ({"environment": {"RAY_AUTH_MODE": "token"}}, "RAY_AUTH_MODE", "fail", "set RAY_AUTH_TOKEN"),
]


@pytest.mark.parametrize(("changes", "name", "level", "advice"), BAD)
def test_bad_machines(tmp_path: Path, changes: dict[str, Any], name: str, level: str, advice: str) -> None:
    finding = found(a_machine(tmp_path, **changes), name, served())
    assert finding.level == level
    assert advice in finding.advice


def test_a_token_that_turns_authentication_on(tmp_path: Path) -> None:
    machine = a_machine(tmp_path)
    (machine.home / ".ray").mkdir()
    (machine.home / ".ray" / "auth_token").touch()
    assert found(machine, "RAY_AUTH_MODE").level == "warn"
    machine = a_machine(tmp_path, environment={"RAY_AUTH_MODE": "token"})
    assert found(machine, "RAY_AUTH_MODE").level == "ok"


def test_ports(tmp_path: Path) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        port = listener.getsockname()[1]
        spec = served().model_copy(
            update={"gateway": GatewaySpec(port=port, grpc_port=port), "metrics": Metrics(port=port)}
        )
        for name, key in (("gateway", "gateway.port"), ("gRPC", "gateway.grpc_port"), ("metrics", "metrics.port")):
            taken = found(a_machine(tmp_path), f"{name} port", spec)
            assert taken.level == "fail"
            assert f"set {key};" in taken.advice
    assert found(a_machine(tmp_path), "gateway port", spec).level == "ok"


def test_weights(tmp_path: Path, demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    machine, folder = a_machine(tmp_path), tmp_path / "demo"
    shutil.copytree(demo_model, folder)
    spec = deployment(model(folder, name="a"))
    assert found(machine, "weights of a", spec).found.endswith("it has no SHA256SUMS")
    (folder / "SHA256SUMS").write_text("0" * 64 + "  model_index.json\n")
    assert "has the checksum" in found(machine, "weights of a", spec).found
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])
    damaged = found(machine, "weights of a", spec)
    assert (damaged.level, "is not a whole safetensors file" in damaged.found) == ("fail", True)
    assert found(machine, "weights of a", served(source="org/name")).level == "warn"
    small = a_machine(tmp_path, disk=lambda path: SimpleNamespace(total=64 * GIB, free=GIB))
    assert "org/name are yet to be fetched" in found(small, "disk for models", served(source="org/name")).advice


def test_this_machine() -> None:
    """Whatever it is: the facts can be looked up, and torch's are those of this process."""
    import torch

    names = {finding.name: finding for finding in diagnose(None)}
    assert f"torch {torch.__version__}" in names["driver"].found
    assert {"devices", "nccl", "shared memory", "disk for models", "ray", "open files"} <= set(names)


def test_commands_that_fail_print_nothing() -> None:
    run: Callable[[list[str]], str] = doctor._output
    assert run(["/nowhere/nothing"]) == run(["false"]) == ""


def test_where_compiled_blocks_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = served()
    assert not [finding for finding in diagnose(spec, a_machine(tmp_path)) if finding.name == "compiled blocks"]
    compiling = {"compile": True, "warmup_shapes": (WarmupShape(width=64, height=64),)}
    models = tuple(model.model_copy(update=compiling) for model in spec.models)
    spec = spec.model_copy(update={"models": models, "storage": Storage(compiled=str(tmp_path / "kept"))})
    folder = cache_folder(spec.storage.compiled)
    assert found(a_machine(tmp_path), "compiled blocks", spec).found == f"0.0 MiB at {folder}"
    folder.mkdir(parents=True)
    (folder / "code").write_bytes(bytes(2**20))
    assert found(a_machine(tmp_path), "compiled blocks", spec).found == f"1.0 MiB at {folder}"
    monkeypatch.setattr(doctor, "cache_folder", lambda _: folder)
    monkeypatch.setattr("os.getuid", lambda: folder.stat().st_uid + 1)
    theirs = found(a_machine(tmp_path), "compiled blocks", spec)
    assert (theirs.level, theirs.found) == ("warn", f"not kept: {folder.parent} belongs to somebody else")
