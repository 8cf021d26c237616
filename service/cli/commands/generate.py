"""`spray generate`, `edit` and `video`: the flags of one request.

Flags come in and are checked; `service.cli.generation` makes what they ask for, and the files are saved here.
"""

import base64
import contextlib
import inspect
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from service.cli.client import ServerError, server_url, understood
from service.cli.generation import FORMATS, Files, Generation, fetching, locally, on_server, submit, wait_for
from service.cli.options import ResultAsJson, Server, UsageError
from service.cli.output import say
from service.cli.pictures import NO_PREVIEWS, shown_by_terminal
from service.cli.progress import StepProgress
from workers.errors import InvalidParameter

FOR_VIDEOS = ("num_frames", "fps", "guidance_scale_2", "last_image", "video")
FOR_PICTURES = ("n", "mask", "control_image")

Ulysses = Annotated[int | None, typer.Option(help="Ranks that share tokens, by exchanging heads; only with --local.")]
Ring = Annotated[int | None, typer.Option(help="Ranks that share tokens, by passing keys on; only with --local.")]
Tensor = Annotated[int | None, typer.Option(help="Ranks that share the weights; only with --local.")]
Guidance = Annotated[int | None, typer.Option(help="Ranks that share the branches of guidance; only with --local.")]


def generate(
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="What to draw.", show_default=False)],
    output: Annotated[Path, typer.Option(help="File to write: .png, .jpg, .webp or .mp4.")] = Path("picture.png"),
    negative_prompt: Annotated[str | None, typer.Option(help="What to avoid.")] = None,
    size: Annotated[str | None, typer.Option(metavar="WIDTHxHEIGHT", help="Pixels.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; with --height, instead of --size.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels; with --width.")] = None,
    num_inference_steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[float | None, typer.Option(help="How closely to follow the prompt.")] = None,
    guidance_scale_2: Annotated[float | None, typer.Option(help="The same, of a video's second transformer.")] = None,
    num_frames: Annotated[int | None, typer.Option(help="Frames of a video.")] = None,
    fps: Annotated[int | None, typer.Option(help="Frames of a video per second.")] = None,
    seed: Annotated[int | None, typer.Option(help="Draws the same picture again. Default: a random one.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="Pictures; saved as OUTPUT, OUTPUT-1, OUTPUT-2.")] = None,
    image: Annotated[
        list[Path],
        typer.Option(
            exists=True, dir_okay=False, metavar="FILE", help="Picture to begin with. Several for some models."
        ),
    ] = [],  # noqa: B006  # typer copies it
    last_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Picture that a video ends with.")
    ] = None,
    video: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="A clip for a video to begin with: .mp4."),
    ] = None,
    control_image: Annotated[
        Path | None, typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Picture to follow, such as edges.")
    ] = None,
    mask: Annotated[
        Path | None,
        typer.Option(exists=True, dir_okay=False, metavar="FILE", help="Where to draw on --image: what is white."),
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="Strength of the change to --image or --video, up to 1.")
    ] = None,
    lora: Annotated[
        list[str],
        typer.Option(metavar="NAME[=SCALE]", help="Adapter; a safetensors file with --local. May be repeated."),
    ] = [],  # noqa: B006  # typer copies it
    embed_metadata: Annotated[
        bool,
        typer.Option(
            "--embed-metadata/--no-embed-metadata", help="Write prompt, seed and all other parameters into the files."
        ),
    ] = True,
    as_json: ResultAsJson = False,
    previews: Annotated[
        bool, typer.Option("--previews", help="Show previews meanwhile, in a terminal that can show pictures.")
    ] = False,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it to the server as a job, and print its ID for `spray download`.")
    ] = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Make it as a job, and wait for its files. Ctrl-C does not cancel it.")
    ] = False,
    webhook: Annotated[
        str | None,
        typer.Option(metavar="URL", help="With --detach or --wait: URL that the server calls at the job's end."),
    ] = None,
    server: Server = None,
    local: Annotated[
        bool, typer.Option("--local", help="Load the model in processes of its own; needs no server.")
    ] = False,
    model: Annotated[str | None, typer.Option(help="Name in the deployment, or folder with --local.")] = None,
    device: Annotated[
        Literal["cuda", "cpu"] | None, typer.Option(help="Only with --local. Default: cuda if there is a GPU.")
    ] = None,
    ulysses_degree: Ulysses = None,
    ring_degree: Ring = None,
    tensor_parallel_size: Tensor = None,
    cfg_parallel_size: Guidance = None,
) -> None:
    """Generate pictures or a video, on a server or in processes of its own."""
    if output.suffix not in FORMATS:
        raise UsageError(f"--output must end in {', '.join(FORMATS)}, got {output.name!r}")
    if not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {str(output.parent)!r}; make it first")
    if output.is_dir() or not os.access(output.parent, os.W_OK):
        why = f"{str(output)!r} is a folder" if output.is_dir() else f"{str(output.parent)!r} is not writable"
        raise UsageError(f"--output: {why}; name a file elsewhere")
    degrees = _given(
        ulysses_degree=ulysses_degree, ring_degree=ring_degree, tensor_parallel_size=tensor_parallel_size,
        cfg_parallel_size=cfg_parallel_size,
    )  # fmt: skip
    if not local and (degrees or device):
        named = ", ".join(f"--{name}" for name in [*degrees, *(["device"] if device else [])])
        raise UsageError(f"{named}: the deployment sets the layout of a server; leave it out, or add --local")
    as_job = "--detach" if detach else "--wait" if wait else None
    for flag, present in {"--wait": detach and wait, "--local": local, "--previews": previews}.items():
        if as_job and present:
            raise UsageError(f"{as_job} and {flag} exclude each other")
    if webhook and not as_job:
        raise UsageError("--webhook needs --detach or --wait: it tells of the end of a job")
    if local and server:
        raise UsageError("--local and --server exclude each other")
    fields = _given(
        prompt=prompt, negative_prompt=negative_prompt, num_inference_steps=num_inference_steps,
        guidance_scale=guidance_scale, seed=seed, size=_size(size, width, height),
    )  # fmt: skip
    fields |= _given(embed_metadata=None if embed_metadata else False)
    own = _given(mask=_data_url(mask), last_image=_data_url(last_image))
    own |= _given(strength=None if video else strength)
    if own and not (image or (mask and control_image)):
        raise UsageError(f"--{next(iter(own)).replace('_', '-')} needs --image, the picture to begin with")
    own |= _given(image=_data_urls(image), control_image=_data_url(control_image))
    own |= _given(video=_data_url(video), strength=strength)
    own |= _given(n=n, num_frames=num_frames, fps=fps, guidance_scale_2=guidance_scale_2)
    shown = shown_by_terminal() if previews else None
    if previews and not shown:
        say(NO_PREVIEWS)
    generation = Generation(fields | _own_fields(own, output), output, model, [_lora(text) for text in lora], shown)
    _check_sendable(
        generation.fields
        | _given(model=model, webhook=webhook)
        | {f"lora {name}": scale for name, scale in generation.loras}
    )
    if as_job:
        _make_as_job(generation, server_url(server), as_json, webhook, wait)
        return
    with StepProgress() as progress, _naming_the_output(generation):
        if local:
            made = locally(generation, device, degrees, progress)
        else:
            made = on_server(generation, server_url(server), progress)
    _save(made, output, as_json)


def _make_as_job(generation: Generation, server: str, as_json: bool, webhook: str | None, wait: bool) -> None:
    with _naming_the_output(generation):
        job = submit(generation, server, webhook)
    job_id = job["id"]
    if not wait:
        print(json.dumps(job, indent=2) if as_json else job_id, flush=True)
        say(f"accepted; `{fetching(job_id, generation, server)}` fetches it")
        return
    say(f"accepted as {job_id}; Ctrl-C ends the waiting, not the job")
    with StepProgress() as progress:
        saved, ended = wait_for(job_id, generation, server, progress)
    with understood(server, "GET /v1/jobs/ID"):
        warnings, metrics = [str(warning) for warning in ended["warnings"]], ended["metrics"]
    _report(saved, warnings, {"metrics": metrics, "job": job_id}, as_json)


@contextlib.contextmanager
def _naming_the_output(generation: Generation) -> Iterator[None]:
    """Turn the error that a model does not make this kind of output into one that names the flag.

    Raises:
        UsageError: the model makes pictures only, and the output is a video; or the other way round.
    """
    try:
        yield
    except (ServerError, InvalidParameter) as error:
        if error.code != "wrong_task" or generation.is_edit:
            raise
        suffixes = ", ".join(suffix for suffix, kind in FORMATS.items() if (kind == "mp4") != generation.is_video)
        kind = "videos" if generation.is_video else "pictures"
        raise UsageError(
            f"{generation.model or 'the model'} makes no {kind}, which --output {generation.output.name} asks for; "
            f"name a file that ends in {suffixes}"
        ) from None


def video(**flags: Any) -> None:
    """Generate a video, on a server or in processes of its own."""
    if flags["output"].suffix != ".mp4":
        raise UsageError(f"--output of a video must end in .mp4, got {flags['output'].name!r}")
    generate(**flags)


def edit(**flags: Any) -> None:
    """Draw a picture that begins with --image, or what is white on --mask anew."""
    if not (flags["image"] or flags["control_image"]):
        raise UsageError("--image is missing, the picture to begin with")
    generate(**flags)


def _as_generate_but(command: Callable[..., None], output: str, without: Sequence[str]) -> None:
    """Give a command the flags of `generate`, except some, and another default for the output."""
    flags = inspect.signature(generate).parameters
    own = [flag.replace(default=Path(output)) if name == "output" else flag for name, flag in flags.items()]
    own = [flag for flag in own if flag.name not in without]
    command.__signature__ = inspect.Signature(own)  # type: ignore[attr-defined]
    command.__annotations__ = {flag.name: flag.annotation for flag in own}


_as_generate_but(video, "video.mp4", without=FOR_PICTURES)
_as_generate_but(edit, "picture.png", without=FOR_VIDEOS)


def _save(made: Files, output: Path, as_json: bool) -> None:
    files = [output.with_stem(f"{output.stem}-{number}") if number else output for number in range(len(made.outputs))]
    try:
        for file, content in zip(files, made.outputs, strict=True):
            _write(file, content)
    except BaseException:  # with its seed it can be drawn again
        _say_seeds(made.seeds)
        raise
    _report(list(zip(files, made.seeds, strict=True)), made.warnings, {"metrics": made.metrics}, as_json)


def _report(saved: Sequence[tuple[Path, int]], warnings: Sequence[str], more: dict[str, Any], as_json: bool) -> None:
    """Say which files there are now, with the seed of each; JSON has more besides."""
    for warning in warnings:
        say(f"warning: {warning}")
    if as_json:
        files = [{"path": str(file), "seed": seed} for file, seed in saved]
        print(json.dumps({"files": files} | more, indent=2))
        return
    _say_seeds([seed for _, seed in saved])
    for file, _ in saved:
        print(file)


def _write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all: the former one stays until then."""
    part = file.with_name(f"{file.name}.part")
    try:
        part.write_bytes(content)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def _say_seeds(seeds: Sequence[int]) -> None:
    say("seeds: " + ", ".join(str(seed) for seed in seeds))


def _check_sendable(fields: dict[str, Any]) -> None:
    """Reject values that JSON cannot carry, so that no request could hold them.

    Raises:
        UsageError: a number is not finite, or a text is not Unicode.
    """
    for name, value in fields.items():
        flag = "PROMPT" if name == "prompt" else f"--{name.replace('_', '-')}"
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{flag}: {value} is no number that a request may have")
        try:
            str(value).encode()
        except UnicodeEncodeError:
            raise UsageError(f"{flag}: the text is not encoded in UTF-8") from None


def _data_url(file: Path | None) -> str | None:
    data = base64.b64encode(file.read_bytes()).decode() if file else ""
    return f"data:application/octet-stream;base64,{data}" if file else None


def _data_urls(files: Sequence[Path]) -> str | list[str | None] | None:
    """One data URL, a list of several, or None without files."""
    return [_data_url(file) for file in files] if len(files) > 1 else _data_url(next(iter(files), None))


def _given(**flags: Any) -> dict[str, Any]:
    return {name: value for name, value in flags.items() if value is not None}


def _size(size: str | None, width: int | None, height: int | None) -> str | None:
    if (width is None) != (height is None):
        raise UsageError("--width and --height go together")
    if width is not None and size is not None:
        raise UsageError("--size says what --width and --height say; leave one out")
    return size if width is None else f"{width}x{height}"


def _lora(text: str) -> tuple[str, float]:
    """The value of `--lora`: NAME or NAME=SCALE."""
    name, equals, scale = text.rpartition("=")
    if not equals:
        return text, 1.0
    try:
        return name, float(scale)
    except ValueError:
        raise UsageError(f"--lora: expected NAME or NAME=SCALE with a number, got {text!r}") from None


def _own_fields(given: dict[str, Any], output: Path) -> dict[str, Any]:
    """The fields that only pictures have, or only videos; `output` tells which are meant."""
    is_video = FORMATS[output.suffix] == "mp4"
    for name in given:
        if name in (FOR_PICTURES if is_video else FOR_VIDEOS):
            kind = "a video" if is_video else "pictures"
            raise UsageError(f"--{name.replace('_', '-')} is not for {kind}, which --output {output.name} asks for")
    return given if is_video else given | {"output_format": FORMATS[output.suffix]}
