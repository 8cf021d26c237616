"""One generation that the command line asks for: made by a server at once or as a job, or made here.

A `Generation` comes in, the flags of `service.cli.commands.generate`; encoded files go out, or a job.
"""

import secrets
import shlex
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from deploy.check import check_deployment
from deploy.model_sections import LoRA, Placement
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec
from service.api.bodies import ImageEditBody, ImageGenerationBody, VideoGenerationBody, parse_body
from service.api.pictures import decode
from service.api.responses import metrics
from service.api.schemas import media_of, most_frames, to_request
from service.cli.client import EDITS, PICTURES, VIDEOS, ServerError, generate_remotely, server_url, understood
from service.cli.job_client import check_made, follow_job, save_outputs, submit_job
from service.cli.options import UsageError
from service.cli.output import say
from service.cli.pictures import Shown
from service.cli.progress import StepProgress
from service.rollout.devices import local_devices
from sp_core.degrees import ParallelDegrees
from workers.gang.local import generate_locally
from workers.messages import PreviewOptions

FORMATS = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp", ".mp4": "mp4"}
"""The format of a file by its suffix."""

PREVIEWS = 3
"""The most previews that a stream may have."""


@dataclass(frozen=True)
class Generation:
    """What the flags ask for.

    Attributes:
        fields: the fields of the REST body, only those that were given.
        output: the file to save. Its suffix names the format, and tells pictures from videos.
        model: a name in the deployment; with `--local`, a folder.
        loras: name and scale of each adapter; with `--local`, the name is a file.
        shown: turns a preview into what the terminal prints; None: no previews.
    """

    fields: dict[str, Any]
    output: Path
    model: str | None
    loras: Sequence[tuple[str, float]]
    shown: Shown | None = None

    @property
    def is_video(self) -> bool:
        """True if the output is a video."""
        return FORMATS[self.output.suffix] == "mp4"

    @property
    def is_edit(self) -> bool:
        """True if it begins with a picture or a clip."""
        return bool(self.fields.keys() & {"image", "control_image", "video"})

    @property
    def path(self) -> str:
        """The REST path that answers with the finished output."""
        return VIDEOS if self.is_video else EDITS if self.is_edit else PICTURES


@dataclass(frozen=True)
class Files:
    """Encoded files, the seed of each, the metrics that a server reports of the request, and its warnings."""

    outputs: Sequence[bytes]
    seeds: Sequence[int]
    metrics: dict[str, Any]
    warnings: Sequence[str]


def submit(generation: Generation, server: str, webhook: str | None) -> dict[str, Any]:
    """Leave the generation to a server as a job; returns the job.

    Raises:
        ServerError: the server cannot be reached, or refuses.
    """
    body = _body(generation) | ({"webhook_url": webhook} if webhook else {})
    try:
        job = submit_job(server, body, generation.path)
    except KeyboardInterrupt:
        say("the server had not answered yet: `spray jobs` shows whether it has accepted the job")
        raise
    with understood(server, "POST"):
        return job | {"id": str(job["id"])}


def fetching(job_id: str, generation: Generation, server: str, wait: bool = True) -> str:
    """The command that fetches the files of its job later."""
    words = ["spray", "download", job_id, *(["--wait"] if wait else []), "--output", str(generation.output)]
    return shlex.join([*words, *([] if server == server_url(None) else ["--server", server])])


def wait_for(
    job_id: str, generation: Generation, server: str, progress: StepProgress
) -> tuple[list[tuple[Path, int]], dict[str, Any]]:
    """Wait until the job of a generation has ended, and save its files. Whoever stops to wait cancels nothing.

    Returns:
        The path and the seed of each file, and the ended job.

    Raises:
        ServerError: the server cannot be reached, or the job has not succeeded.
        OSError: a file cannot be written.
    """
    try:
        job = follow_job(server, job_id, progress.show)
    except (KeyboardInterrupt, ServerError) as error:
        if not (isinstance(error, ServerError) and error.code == "job_not_found"):  # deleted: nothing is left of it
            fetch = fetching(job_id, generation, server)
            say(f"nothing is canceled: `{fetch}` waits for the job, `spray cancel {job_id}` ends it")
        raise
    with understood(server, "GET /v1/jobs/ID/events"):
        check_made(job)
    try:
        return list(save_outputs(server, job, generation.output)), job
    except BaseException:
        say(f"the server keeps the files: `{fetching(job_id, generation, server, wait=False)}` fetches them")
        raise


def on_server(generation: Generation, server: str, progress: StepProgress) -> Files:
    """Let a server make it at once. Ctrl-C closes the connection, which cancels the request.

    Raises:
        ServerError: the server cannot be reached, refuses, or fails.
    """
    body = _body(generation)
    body |= {"partial_images": PREVIEWS} if generation.shown else {}
    try:
        made = generate_remotely(
            server, body, progress.show, generation.path, lambda preview: _insert(generation, preview, progress)
        )
    except KeyboardInterrupt:
        say("canceled: the server stops at the next step")  # it sees that the connection is closed
        raise
    return Files([file.content for file in made], [file.seed for file in made], made[0].metrics, made[0].warnings)


def locally(generation: Generation, device: str | None, degrees: dict[str, int], progress: StepProgress) -> Files:
    """Load the model into processes of this command, and make it there.

    Raises:
        UsageError: the flags do not describe a model, or one that this machine can hold.
        InvalidParameter: the model cannot do what was asked for.
    """
    if not generation.model:
        raise UsageError("--local needs --model FOLDER, a folder in diffusers' format")
    devices = local_devices()
    files = {Path(name).stem: name for name, _ in generation.loras}  # a file is an adapter by its name
    try:
        model = ModelSpec(
            name="local",
            loras=tuple(LoRA(name=name, source=str(Path(file).resolve())) for name, file in files.items()),
            source=str(Path(generation.model).resolve()),
            device=device or ("cuda" if devices["cuda"] else "cpu"),
            parallel=ParallelDegrees(**degrees),
            placement=Placement(cpus_per_rank=devices["cpu"] / ParallelDegrees(**degrees).world_size),
        )
    except (ValidationError, ValueError) as error:
        raise UsageError(str(error)) from None
    check_deployment(DeploymentSpec(models=(model,)), devices)
    body = (
        {"seed": secrets.randbelow(2**32)}
        | generation.fields
        | _loras([(Path(n).stem, s) for n, s in generation.loras])
    )
    kind = VideoGenerationBody if generation.is_video else ImageEditBody if generation.is_edit else ImageGenerationBody
    previews = PreviewOptions(count=PREVIEWS) if generation.shown else None
    parsed = parse_body(body, kind)
    request = to_request(parsed, model, uuid.uuid4().hex, decode(media_of(parsed, model), most_frames(parsed, model)))
    request = replace(request, report_steps=True, previews=previews)
    result = generate_locally(model, request, progress.show, lambda each: _insert(generation, each.data, progress))
    return Files(result.outputs, result.seeds, metrics(result), result.warnings)


def _body(generation: Generation) -> dict[str, Any]:
    """The body of a request to a server."""
    return generation.fields | _loras(generation.loras) | ({"model": generation.model} if generation.model else {})


def _loras(loras: Sequence[tuple[str, float]]) -> dict[str, Any]:
    return {"loras": [{"name": name, "scale": scale} for name, scale in loras]} if loras else {}


def _insert(generation: Generation, preview: bytes, progress: StepProgress) -> None:
    if generation.shown:
        progress.insert(generation.shown(preview))
