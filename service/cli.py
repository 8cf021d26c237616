"""The command `spray`.

    spray check FILE      does this deployment work here? what does each replica take?
    spray serve FILE      serve it on this machine until Ctrl-C
    spray generate "..."  one request: to a server, or with --local in processes of its own
    spray verify CLASS    does a model class give the same answer on every layout?

Results go to standard output, all else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
Flags may be written with `_` or `-`.
"""

import argparse
import importlib
import secrets
import signal
import sys
import time
import uuid
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploy.check import check_deployment
from deploy.load import load_spec
from deploy.spec import DeploymentSpec, LoRA, ModelSpec, Placement, SpecError
from service.client import ServerError, generate_remotely
from service.local import LocalCluster, local_devices
from service.progress import StepProgress
from service.schemas import parse_body, to_request
from sp_core.degrees import ParallelDegrees
from workers.errors import SprayError

DEGREES = [field.name for field in fields(ParallelDegrees)]
DEFAULT_SERVER = "http://127.0.0.1:8000"
FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


class UsageError(Exception):
    """The command line contradicts itself."""


class NotTheSame(Exception):
    """A model failed its proof."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parsed = _parser().parse_args(_with_underscores(sys.argv[1:] if arguments is None else arguments))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        _say("stopped")
        return 130
    except UsageError as error:
        _say(f"error: {error}")
        return 2
    except (SpecError, SprayError, ServerError, NotTheSame, TimeoutError, OSError) as error:
        _say(f"error: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spray", description="Sequence parallelism on Ray: serve diffusion transformers."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("check", help="validate a deployment file and print what each replica takes")
    check.add_argument("file", type=Path)
    check.add_argument("--gpus", type=int, help="GPUs to check against; default: this machine's")
    check.add_argument("--cpus", type=int, help="CPU cores to check against; default: this machine's")
    check.set_defaults(run=_check)

    serve = commands.add_parser("serve", help="serve a deployment file on this machine until Ctrl-C")
    serve.add_argument("file", type=Path)
    serve.add_argument("--port", type=int, help="HTTP port instead of the file's; 0 takes a free one")
    serve.set_defaults(run=_serve)

    generate = commands.add_parser("generate", help="generate pictures, on a server or in this process")
    generate.add_argument("prompt")
    generate.add_argument("--output", type=Path, default=Path("picture.png"), help=".png, .jpg or .webp")
    generate.add_argument("--negative_prompt")
    generate.add_argument("--width", type=int, help="pixels")
    generate.add_argument("--height", type=int, help="pixels")
    generate.add_argument("--num_inference_steps", type=int)
    generate.add_argument("--guidance_scale", type=float)
    generate.add_argument("--seed", type=int)
    generate.add_argument("--n", type=int, default=1, help="pictures; further ones are saved as OUTPUT-1, OUTPUT-2")
    generate.add_argument(
        "--lora", action="append", type=_lora, default=[], metavar="NAME[=SCALE]",
        help="an adapter of the deployment; with --local a safetensors file; may be repeated",
    )  # fmt: skip
    generate.add_argument("--server", help=f"base URL of a server; default {DEFAULT_SERVER}")
    generate.add_argument("--local", action="store_true", help="without a server: load the model in own processes")
    generate.add_argument("--model", help="with --local its folder, else its name in the deployment")
    generate.add_argument("--device", choices=["cuda", "cpu"], help="with --local; default: cuda where there is one")
    for name in DEGREES:
        generate.add_argument(f"--{name}", type=int, help="with --local")
    generate.set_defaults(run=_generate)

    verify = commands.add_parser("verify", help="prove that a model class gives the same answer on every layout")
    verify.add_argument("target", metavar="package.module:Class")
    verify.add_argument("--config", type=Path, help='JSON: {"init": {...}, "inputs": {...}}, or a diffusers config')
    verify.add_argument("--world", type=_worlds, default=(2, 3, 4), help="numbers of ranks, by comma; default 2,3,4")
    verify.set_defaults(run=_verify)
    return parser


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--ring-degree=2` as `--ring_degree=2`; values stay as they are."""
    spelt = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        spelt.append(
            (flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag) + equals + value
        )
    return spelt


def _check(arguments: argparse.Namespace) -> None:
    devices = local_devices()
    if arguments.gpus is not None:
        devices["cuda"] = float(arguments.gpus)
    if arguments.cpus is not None:
        devices["cpu"] = float(arguments.cpus)
    for line in check_deployment(load_spec(arguments.file), devices):
        print(line)


def _serve(arguments: argparse.Namespace) -> None:
    spec = load_spec(arguments.file)
    if arguments.port is not None:
        spec = spec.model_copy(update={"gateway": spec.gateway.model_copy(update={"port": arguments.port})})
    for line in check_deployment(spec, local_devices()):
        _say(line)
    with LocalCluster(spec) as cluster:
        cluster.wait_ready(max(model.timeouts.startup_s for model in spec.models), on_wait=_say)
        _say(f"ready: {_curl(cluster.url, spec)}")
        while True:
            time.sleep(3600)


def _curl(url: str, spec: DeploymentSpec) -> str:
    body = f'{{"model": "{spec.models[0].name}", "prompt": "a cup of coffee"}}'
    return f"curl {url}/v1/images/generations -H 'content-type: application/json' -d '{body}'"


def _generate(arguments: argparse.Namespace) -> None:
    if arguments.output.suffix not in FORMATS:
        raise UsageError(f"--output must end in {', '.join(FORMATS)}, got {arguments.output.name!r}")
    degrees = {name: getattr(arguments, name) for name in DEGREES if getattr(arguments, name) is not None}
    if not arguments.local and (degrees or arguments.device):
        given = ", ".join(f"--{name}" for name in [*degrees, *(["device"] if arguments.device else [])])
        raise UsageError(f"{given}: the deployment sets the layout of a server; leave it out, or add --local")
    if arguments.local and arguments.server:
        raise UsageError("--local and --server exclude each other")
    with StepProgress() as progress:
        if arguments.local:
            images = _generate_locally(arguments, degrees, progress)
        else:
            images = _generate_on_server(arguments, progress)
    for number, image in enumerate(images):
        output = arguments.output
        if number:
            output = output.with_stem(f"{output.stem}-{number}")
        output.write_bytes(image)
        print(output)


def _body(arguments: argparse.Namespace) -> dict[str, Any]:
    """The REST body that says what the flags say; flags that were not given are not in it."""
    names = ("prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "n")
    body = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if (arguments.width is None) != (arguments.height is None):
        raise UsageError("--width and --height go together")
    if arguments.width is not None:
        body["size"] = f"{arguments.width}x{arguments.height}"
    if arguments.lora:
        body["loras"] = [{"name": name, "scale": scale} for name, scale in arguments.lora]
    return body | {"output_format": FORMATS[arguments.output.suffix]}


def _generate_on_server(arguments: argparse.Namespace, progress: StepProgress) -> tuple[bytes, ...]:
    model = {"model": arguments.model} if arguments.model else {}
    pictures = generate_remotely(arguments.server or DEFAULT_SERVER, _body(arguments) | model, progress.show)
    _say("seeds: " + ", ".join(str(picture.seed) for picture in pictures))
    return tuple(picture.image for picture in pictures)


def _generate_locally(
    arguments: argparse.Namespace, degrees: dict[str, int], progress: StepProgress
) -> tuple[bytes, ...]:
    if not arguments.model:
        raise UsageError("--local needs --model FOLDER, a folder in diffusers' format")
    devices = local_devices()
    files = {Path(name).stem: name for name, _ in arguments.lora}
    arguments.lora = [(Path(name).stem, scale) for name, scale in arguments.lora]
    try:
        model = ModelSpec(
            name="local",
            loras=tuple(LoRA(name=name, source=str(Path(file).resolve())) for name, file in files.items()),
            source=str(Path(arguments.model).resolve()),
            device=arguments.device or ("cuda" if devices["cuda"] else "cpu"),
            parallel=ParallelDegrees(**degrees),
            placement=Placement(cpus_per_rank=devices["cpu"] / ParallelDegrees(**degrees).world_size),
        )
    except (ValidationError, ValueError) as error:
        raise UsageError(str(error)) from None
    check_deployment(DeploymentSpec(models=(model,)), devices)
    body = _body(arguments) | {"seed": secrets.randbelow(2**32) if arguments.seed is None else arguments.seed}
    request = to_request(parse_body(body | {"stream": True}), model, uuid.uuid4().hex)
    # Loaded by name, because it brings torch, which no other command of this program needs.
    result = importlib.import_module("workers.local").generate_locally(model, request, progress.show)
    _say("seeds: " + ", ".join(str(seed) for seed in result.seeds))
    images: tuple[bytes, ...] = result.outputs
    return images


def _lora(text: str) -> tuple[str, float]:
    name, equals, scale = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME or NAME=SCALE with a number, got {text!r}") from None


def _worlds(text: str) -> tuple[int, ...]:
    worlds = tuple(int(part) for part in text.split(",") if part.isdecimal())
    if not worlds or len(worlds) != text.count(",") + 1 or min(worlds) < 2:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 2 by comma (2,3,4), got {text!r}")
    return worlds


def _verify(arguments: argparse.Namespace) -> None:
    # Loaded by name, because it brings torch, which no other command of this program needs.
    core = importlib.import_module("sp_core.verify")
    try:
        good = True
        for is_good, line in core.verify(arguments.target, arguments.config, arguments.world):
            print(line if is_good else f"{line}  <--", flush=True)
            good = good and is_good
    except core.Unverifiable as error:
        raise UsageError(str(error)) from None
    if not good:
        raise NotTheSame("not every layout gives the answer of one process")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
