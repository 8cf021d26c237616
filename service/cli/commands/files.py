"""`spray check`, `build` and `schema`: what a deployment file says, or may say; and a request of a model."""

import json
import math
from typing import Annotated

import typer

from deploy.check import check_deployment
from deploy.load import print_config as print_values
from deploy.memory import parse_memory
from deploy.schema import json_schema
from deploy.yaml_text import to_yaml
from service.cli.client import read_description, read_model, server_url, understood
from service.cli.options import File, Overrides, Server, UsageError, load
from service.cli.output import say
from service.cli.request_schema import request_schemas
from service.rollout.devices import local_devices


def check(
    file: File,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    gpus: Annotated[int | None, typer.Option(help="GPUs to check against. Default: this machine's.")] = None,
    gpus_per_node: Annotated[
        int | None, typer.Option(help="GPUs of the largest node. Default: one node has all GPUs.")
    ] = None,
    cpus: Annotated[int | None, typer.Option(help="CPU cores to check against. Default: this machine's.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="Memory of a GPU, in GiB or like 80G. Default: memory is not checked.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print each value with its origin instead of checking.")
    ] = False,
) -> None:
    """Validate a deployment file, and print what each replica takes."""
    loaded = load(file, overrides)
    if print_config:
        for line in print_values(loaded):
            print(line)
        return
    devices = local_devices()
    if gpus is not None:  # another machine than this one: it has enough CPU cores unless they are given too
        devices = {"cpu": math.inf, "cuda": float(gpus)}
    if cpus is not None:
        devices["cpu"] = float(cpus)
    try:
        memory_bytes = parse_memory(memory) if memory else None
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None
    for line in check_deployment(loaded.spec, devices, memory_bytes, gpus_per_node):
        print(line)


def build(file: File, overrides: Overrides = []) -> None:  # noqa: B006  # typer copies it
    """Print the config that Ray Serve takes, which is KubeRay's serveConfigV2."""
    from service.app import check_ports, serve_config  # here, for it imports Ray
    from service.rollout.preflight import derive_tasks  # here, for it imports Ray

    spec = load(file, overrides).spec
    if spec.gateway.host in ("127.0.0.1", "localhost"):
        say(f"gateway.host is {spec.gateway.host}: only the node itself can reach it; 0.0.0.0 listens on all addresses")
    check_ports(spec)
    print(to_yaml(serve_config(derive_tasks(spec))), end="")


def schema(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="A model of a server.", show_default=False)
    ] = None,
    server: Server = None,
) -> None:
    """Print the JSON schema of deployment files; with MODEL, of what a request of that model may say."""
    if model is None:
        if server is not None:
            raise UsageError("--server needs MODEL: deployment files have one schema everywhere")
        print(json.dumps(json_schema(), indent=2))
        return
    at = server_url(server)
    described, found = read_description(at), read_model(at, model)
    with understood(at, "GET /openapi.json"):
        schemas = request_schemas(described, found)
    print(json.dumps(schemas, indent=2))
