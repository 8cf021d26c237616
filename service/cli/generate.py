"""`spray generate`: one request from the command line, to a server or with `--local` in processes of its own.

Parsed arguments come in from `service.cli.main`; files come out.
"""

import argparse
import importlib
import secrets
import uuid
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploy.check import check_deployment
from deploy.spec import DeploymentSpec, LoRA, ModelSpec, Placement
from service.api.schemas import ImageGenerationBody, VideoGenerationBody, parse_body, to_request
from service.cli.client import generate_remotely, generate_video_remotely, server_url
from service.cli.printing import UsageError, say
from service.cli.progress import StepProgress
from service.rollout.local_cluster import local_devices
from sp_core.degrees import ParallelDegrees

DEGREES = [field.name for field in fields(ParallelDegrees)]

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}
OF_VIDEOS = ("num_frames", "fps", "guidance_scale_2")


def generate(arguments: argparse.Namespace) -> None:
    """Generate and save; prints the files.

    Raises:
        UsageError: the flags contradict each other.
        ServerError: the server cannot be reached, refuses, or fails.
        SprayError: with `--local`, the request cannot be run.
        SpecError: with `--local`, the model or the layout cannot work here.
    """
    if arguments.output.suffix not in FORMATS:
        raise UsageError(f"--output must end in {', '.join(FORMATS)}, got {arguments.output.name!r}")
    degrees = {name: getattr(arguments, name) for name in DEGREES if getattr(arguments, name) is not None}
    if not arguments.local and (degrees or arguments.device):
        given = ", ".join(f"--{name}" for name in [*degrees, *(["device"] if arguments.device else [])])
        raise UsageError(f"{given}: the deployment sets the layout of a server; leave it out, or add --local")
    if arguments.local and arguments.server:
        raise UsageError("--local and --server exclude each other")
    with StepProgress() as progress:
        made = _locally(arguments, degrees, progress) if arguments.local else _on_server(arguments, progress)
    say("seeds: " + ", ".join(str(seed) for seed in made.seeds))
    for number, content in enumerate(made.outputs):
        output = arguments.output
        if number:
            output = output.with_stem(f"{output.stem}-{number}")
        output.write_bytes(content)
        print(output)


def lora(text: str) -> tuple[str, float]:
    """The value of `--lora`: NAME or NAME=SCALE.

    Raises:
        argparse.ArgumentTypeError: the scale is no number.
    """
    name, equals, scale = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME or NAME=SCALE with a number, got {text!r}") from None


@dataclass(frozen=True)
class _Made:
    outputs: tuple[bytes, ...]
    seeds: tuple[int, ...]


def _makes_video(arguments: argparse.Namespace) -> bool:
    return FORMATS[arguments.output.suffix] == "mp4"


def _body(arguments: argparse.Namespace) -> dict[str, Any]:
    """The REST body that says what the flags say; flags that were not given are not in it."""
    names = ["prompt", "negative_prompt", "num_inference_steps", "guidance_scale", "seed"]
    names += OF_VIDEOS if _makes_video(arguments) else ["n"]
    surplus = ["n"] if _makes_video(arguments) else OF_VIDEOS
    for name in surplus:
        if getattr(arguments, name) is not None:
            kind = "a video" if _makes_video(arguments) else "pictures"
            raise UsageError(f"--{name} is not for {kind}, which --output {arguments.output.name} asks for")
    body = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    if (arguments.width is None) != (arguments.height is None):
        raise UsageError("--width and --height go together")
    if arguments.width is not None:
        body["size"] = f"{arguments.width}x{arguments.height}"
    if arguments.lora:
        body["loras"] = [{"name": name, "scale": scale} for name, scale in arguments.lora]
    return body if _makes_video(arguments) else body | {"output_format": FORMATS[arguments.output.suffix]}


def _on_server(arguments: argparse.Namespace, progress: StepProgress) -> _Made:
    body = _body(arguments) | ({"model": arguments.model} if arguments.model else {})
    server = server_url(arguments.server)
    if _makes_video(arguments):
        video = generate_video_remotely(server, body)
        return _Made((video.content,), (video.seed,))
    pictures = generate_remotely(server, body, progress.show)
    return _Made(tuple(picture.content for picture in pictures), tuple(picture.seed for picture in pictures))


def _locally(arguments: argparse.Namespace, degrees: dict[str, int], progress: StepProgress) -> _Made:
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
    kind = VideoGenerationBody if _makes_video(arguments) else ImageGenerationBody
    request = replace(to_request(parse_body(body, kind), model, uuid.uuid4().hex), report_steps=True)
    # Loaded by name, because it brings torch, which no other command of this program needs.
    result = importlib.import_module("workers.gang.local").generate_locally(model, request, progress.show)
    return _Made(result.outputs, result.seeds)
