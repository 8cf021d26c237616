"""Facts about this machine that decide whether gangs can run on it, each with advice. For `spray doctor`.

A deployment comes in, or None; findings come out. It changes nothing and asks no Ray cluster. It sees the machine only
through `Machine`, so that tests can replace it.
"""

import importlib.metadata
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from deploy.api_keys import read_api_keys
from deploy.components import verify_components
from deploy.memory import GIB, format_bytes
from deploy.model_folder import cache_root, model_folder
from deploy.safetensors_headers import verify_checksums, verify_weights
from deploy.spec import DeploymentSpec, SpecError
from service.rollout.cluster_folder import place
from service.rollout.environment import has_token
from service.rollout.ports import bind_error
from workers.gang.network import interfaces
from workers.model.compile_cache import bytes_in, cache_folder

OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""The oldest NVIDIA driver that runs a CUDA release, by their major versions."""

SHM_PER_RANK = GIB
"""Bytes of shared memory: NCCL's buffers between the ranks of a node, and Ray's object store."""

ROOM_FOR_MODELS = 100 * GIB
ROOM_FOR_LOGS = 5 * GIB
FEW_FILES = 4096
"""File descriptors below which Ray itself warns."""

PORTS = {8265: "Ray's dashboard"}

TORCH_FACTS = """
import json, torch
cuda = torch.version.cuda
nccl = ".".join(map(str, torch.cuda.nccl.version())) if cuda else None
print(json.dumps({"torch": torch.__version__, "cuda": cuda, "nccl": nccl, "usable": torch.cuda.device_count()}))
"""
"""Run in a process of its own, because this layer does not import torch."""

GPU_QUERY = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]


@dataclass(frozen=True)
class Finding:
    """The result of one check.

    Attributes:
        name: its subject.
        level: `ok`; `warn`: some deployments will suffer; `fail`: gangs cannot run.
        found: what was found.
        advice: what to do; empty if all is well.
    """

    name: str
    level: Literal["ok", "warn", "fail"]
    found: str
    advice: str = ""


def _output(command: list[str]) -> str:
    """The output of a command; empty if it is missing, fails, or takes more than two minutes."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""


@dataclass(frozen=True)
class Machine:
    """The sources of facts about a machine.

    Attributes:
        dev: the folder of device files.
        shm: shared memory.
        tmp: where Ray keeps sessions, logs and spilled objects.
        home: the user's folder.
        environment: of this process.
        run: runs a command and returns what it prints; empty if it fails.
        disk: takes a folder and returns the size of its file system, with `total` and `free` in bytes.
        files: the limit of open files.
        interfaces: the addresses of each network interface.
    """

    dev: Path = Path("/dev")
    shm: Path = Path("/dev/shm")
    tmp: Path = field(default_factory=place)
    home: Path = field(default_factory=Path.home)
    environment: Mapping[str, str] = field(default_factory=lambda: os.environ)
    run: Callable[[list[str]], str] = _output
    disk: Callable[[Path], Any] = shutil.disk_usage
    files: int = field(default_factory=lambda: resource.getrlimit(resource.RLIMIT_NOFILE)[0])
    interfaces: Callable[[], Mapping[str, list[str]]] = interfaces


def diagnose(spec: DeploymentSpec | None, machine: Machine | None = None) -> list[Finding]:
    """Look at this machine, and at the weights of a deployment's models, which may take as long as reading them.

    Args:
        spec: the deployment; None looks only at the machine.
        machine: None is this one.
    """
    machine = machine or Machine()
    return [
        *_devices(machine, spec),
        _shared_memory(machine, spec),
        *_ports(spec),
        *_disks(machine, spec),
        *_compiled(spec),
        *_ray(machine),
        _open_files(machine),
        *(_keys(machine, spec) if spec else ()),
        *(_weights(spec) if spec else ()),
        *(_interfaces(machine, spec) if spec else ()),
    ]


def _devices(machine: Machine, spec: DeploymentSpec | None) -> Iterator[Finding]:
    """The GPUs, their driver, and torch and NCCL, which must suit them."""
    gpus = len([path for path in machine.dev.glob("nvidia*") if path.name[6:].isdigit()])
    asked = max((m.parallel.world_size for m in spec.models if m.device == "cuda"), default=0) if spec else 0
    if not gpus:
        advice = "run this on a node with GPUs; in a container, start it with --gpus all" if asked else ""
        yield Finding("devices", "warn" if asked else "ok", f"no GPU; the largest gang takes {asked}", advice)
    lines = machine.run(GPU_QUERY).strip().splitlines() if gpus else []
    rows = [[cell.strip() for cell in line.split(",")] for line in lines if line.count(",") == 2]
    if gpus and not rows:
        yield Finding(
            "devices", "fail", f"{gpus} device files, but nvidia-smi does not answer",
            "install the NVIDIA driver; in a container, give it NVIDIA_DRIVER_CAPABILITIES=compute,utility",
        )  # fmt: skip
    elif gpus:
        few = f"the largest gang takes {asked}: lower its degrees or add GPUs" if gpus < asked else ""
        yield Finding("devices", "warn" if few else "ok", f"{gpus} x {rows[0][0]}, {rows[0][2]} each", few)
    printed = machine.run([sys.executable, "-c", TORCH_FACTS]).strip()
    if not printed:
        yield Finding("torch", "fail", "torch cannot be imported", "install spray again with pip, and read its errors")
        return
    yield from _driver_and_nccl(gpus, rows[0][1] if rows else None, json.loads(printed.splitlines()[-1]))


def _driver_and_nccl(gpus: int, driver: str | None, torch: Mapping[str, Any]) -> Iterator[Finding]:
    """Whether the driver suits torch's CUDA, and whether ranks can communicate."""
    found = f"torch {torch['torch']}, CUDA {torch['cuda'] or 'none'}, driver {driver or 'none'}"
    oldest = OLDEST_DRIVER.get(int(torch["cuda"].split(".")[0]), 0) if torch["cuda"] else 0
    if gpus and not torch["cuda"]:
        yield Finding("driver", "fail", found, "this torch is for CPUs only: install a build for CUDA (pytorch.org)")
    elif driver and int(driver.split(".")[0]) < oldest:
        advice = f"CUDA {torch['cuda']} needs driver {oldest} or newer: update it, or install torch for an older CUDA"
        yield Finding("driver", "fail", found, advice)
    elif torch["usable"] < gpus:
        advice = "look at CUDA_VISIBLE_DEVICES, and at dmesg for driver errors"
        yield Finding("driver", "warn", f"{found}; torch sees {torch['usable']} of {gpus} GPUs", advice)
    else:
        yield Finding("driver", "ok", found)
    if gpus and torch["cuda"] and not torch["nccl"]:
        yield Finding("nccl", "fail", "torch has no NCCL", "install torch's Linux build, which brings NCCL")
    else:
        yield Finding("nccl", "ok", torch["nccl"] or "none; ranks on CPUs use gloo")


def _interfaces(machine: Machine, spec: DeploymentSpec) -> Iterator[Finding]:
    """Whether this machine has the network interfaces that the file names."""
    there = machine.interfaces()
    usable = ", ".join(sorted(name for name, addresses in there.items() if addresses))
    for name in sorted({each.placement.network_interface or "" for each in spec.models} - {""}):
        addresses = there.get(name, [])
        advice = "" if addresses else f"set placement.network_interface to one of {usable}"
        found = f"{name} has {addresses[0]}" if addresses else f"{name} is not here, or has no address"
        yield Finding("network", "fail" if advice else "ok", found, advice)


def _shared_memory(machine: Machine, spec: DeploymentSpec | None) -> Finding:
    ranks = 1
    if spec:
        ranks = sum(model.parallel.world_size * max(1, model.autoscaling.min_replicas) for model in spec.models)
    total, wanted = machine.disk(machine.shm).total, SHM_PER_RANK * ranks
    found = f"{machine.shm} has {format_bytes(total)}; {ranks} ranks need {format_bytes(wanted)}"
    if total >= wanted:
        return Finding("shared memory", "ok", found)
    size = -(-wanted // GIB)
    advice = (
        f"start the container with --shm-size={size}g (docker), or mount an emptyDir of medium Memory and sizeLimit "
        f"{size}Gi at /dev/shm (Kubernetes)"
    )
    return Finding("shared memory", "fail" if total < SHM_PER_RANK else "warn", found, advice)


def _ports(spec: DeploymentSpec | None) -> Iterator[Finding]:
    named: dict[str, tuple[str, str, int | None]] = {}
    if spec:
        named["gateway port"] = ("gateway.port", spec.gateway.host, spec.gateway.port)
        named["gRPC port"] = ("gateway.grpc_port", spec.gateway.host, spec.gateway.grpc_port)
        named["metrics port"] = ("metrics.port", spec.metrics_at["host"], spec.metrics_at["port"])
    for part, (key, host, port) in named.items():
        if not port:
            continue
        reason = bind_error(host, port)
        advice = f"stop what listens there (ss -ltnp), or set {key}; 0 takes a free one for spray serve"
        level: Literal["ok", "fail"] = "fail" if reason else "ok"
        said = f"{host}:{port} is {f'taken ({reason})' if reason else 'free'}"
        yield Finding(part, level, said, advice if reason else "")
    for port, use in PORTS.items():
        reason = bind_error("127.0.0.1", port)
        advice = f"another program has it, perhaps a Ray cluster; {use} will not be reachable there" if reason else ""
        said = f"for {use}, is {f'taken ({reason})' if reason else 'free'}"
        yield Finding(f"port {port}", "warn" if reason else "ok", said, advice)


def _keys(machine: Machine, spec: DeploymentSpec) -> Iterator[Finding]:
    if file := spec.auth.api_keys_file:
        try:
            yield Finding("API keys", "ok", f"{file} has {len(read_api_keys(Path(file)))}", "")
        except SpecError as error:
            yield Finding("API keys", "warn", str(error), "the gateway needs the file on each node where it runs")
    variable = spec.auth.api_keys_env
    if variable and not machine.environment.get(variable):
        advice = (
            "set it to comma-separated keys where the gateway runs; or remove auth.api_keys_env, and anybody may call"
        )
        yield Finding("API keys", "warn", f"{variable} is not set here", advice)
    elif variable:
        yield Finding("API keys", "ok", f"{variable} is set", "")


def _disks(machine: Machine, spec: DeploymentSpec | None) -> Iterator[Finding]:
    absent = [model.source for model in spec.models if model_folder(spec, model) is None] if spec else []
    root = cache_root(spec.storage.models if spec else None)
    there = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = machine.disk(there).free
    found = f"{format_bytes(free)} free for models at {root}"
    if absent and free < ROOM_FOR_MODELS:
        advice = f"{', '.join(absent)} are yet to be fetched: set storage.models to a folder with more room"
        yield Finding("disk for models", "warn", found, advice)
    else:
        yield Finding("disk for models", "ok", found)
    free = machine.disk(machine.tmp).free
    found = f"{format_bytes(free)} free at {machine.tmp}"
    advice = "Ray keeps logs and spilled objects there: make room, or mount a larger volume"
    few = free < ROOM_FOR_LOGS
    yield Finding("disk for logs", "warn" if few else "ok", found, advice if few else "")


def _compiled(spec: DeploymentSpec | None) -> Iterator[Finding]:
    """The folder of compiled blocks. Ranks run this code, so nobody else may write it."""
    if spec and not any(model.compile for model in spec.models):
        return
    folder = cache_folder(spec.storage.compiled if spec else None)
    others = [path for path in (folder.parent, folder) if path.exists() and path.stat().st_uid != os.getuid()]
    if others:
        advice = "set storage.compiled to a folder where only the user of the ranks may write"
        yield Finding("compiled blocks", "warn", f"not kept: {others[0]} belongs to somebody else", advice)
    else:
        yield Finding("compiled blocks", "ok", f"{format_bytes(bytes_in(folder))} at {folder}")


def _ray(machine: Machine) -> Iterator[Finding]:
    environment = machine.environment
    yield Finding("ray", "ok", f"Ray {importlib.metadata.version('ray')}")
    address = environment.get("RAY_ADDRESS")
    if address:
        advice = "Ray's own commands go to that cluster: unset it unless you mean to (spray serve ignores it)"
        yield Finding("RAY_ADDRESS", "warn", address, advice)
    mode = environment.get("RAY_AUTH_MODE")
    token = has_token(environment, machine.home)
    if mode == "token" and not token:
        advice = f"set RAY_AUTH_TOKEN, or write the cluster's token to {machine.home / '.ray' / 'auth_token'}"
        yield Finding("RAY_AUTH_MODE", "fail", "token, but there is no token", advice)
    elif mode is None and token:
        advice = "Ray uses a token on some nodes and not on others: set RAY_AUTH_MODE to token or to disabled on all"
        yield Finding("RAY_AUTH_MODE", "warn", "not set, but there is a token", advice)
    else:
        yield Finding("RAY_AUTH_MODE", "ok", mode or "not set, and there is no token")


def _open_files(machine: Machine) -> Finding:
    if 0 <= machine.files < FEW_FILES:
        advice = "raise it with ulimit -n 65536, or --ulimit nofile=65536 (docker)"
        return Finding("open files", "warn", f"at most {machine.files}", advice)
    return Finding("open files", "ok", f"at most {machine.files}" if machine.files >= 0 else "no limit")


def _weights(spec: DeploymentSpec) -> Iterator[Finding]:
    for model in spec.models:
        name, folder = f"weights of {model.name}", model_folder(spec, model)
        if folder is None:
            advice = "they are fetched when the model is deployed; this needs the network and room on the disk"
            yield Finding(name, "warn", f"{model.source} is not on this machine", advice)
            continue
        try:
            verify_components(folder)
            verify_weights(folder)
            compared = verify_checksums(folder)
        except ValueError as error:
            yield Finding(name, "fail", str(error), f"fetch {model.source} again, or correct source")
        else:
            sums = f", {compared} checksums agree" if compared else ", by headers and sizes; it has no SHA256SUMS"
            yield Finding(name, "ok", f"{folder} is whole{sums}")
