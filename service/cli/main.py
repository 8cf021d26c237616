"""The command `spray`.

    spray check FILE      does this deployment work here? what does each replica take?
    spray serve FILE      serve it on this machine until Ctrl-C
    spray build FILE      print what Ray Serve is told: the serveConfigV2 of KubeRay
    spray deploy FILE     change a running cluster to what the file says
    spray ps              models, gangs, queues, and the steps of what is running
    spray models          the models of a server
    spray doctor [FILE]   what commonly goes wrong on a machine
    spray schema          the JSON schema of deployment files
    spray generate "..."  one request: to a server, or with --local in processes of its own
    spray verify CLASS    does a model class give the same answer on every layout?

Results go to standard output, all else to standard error. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 Ctrl-C.
Flags may be written with `_` or `-`. What a deployment file says is overruled by the environment (SPRAY_GATEWAY__PORT),
and that by `--set PATH=VALUE`.
"""

import argparse
import importlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from deploy.spec import SpecError
from service.cli import commands, generate
from service.cli.client import DEFAULT_SERVER, ServerError
from service.cli.printing import UsageError, say
from workers.errors import SprayError


class NotTheSame(Exception):
    """A model failed its proof."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; its exit code."""
    parsed = _parser().parse_args(_with_underscores(sys.argv[1:] if arguments is None else arguments))
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        parsed.run(parsed)
    except KeyboardInterrupt:
        say("stopped")
        return 130
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except (SpecError, SprayError, ServerError, NotTheSame, TimeoutError, OSError) as error:
        say(f"error: {error}")
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="spray", description="Sequence parallelism on Ray: serve diffusion transformers."
    )
    subparsers = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_operating(subparsers)
    _add_looking(subparsers)
    _add_generate(subparsers)
    verify = subparsers.add_parser("verify", help="prove that a model class gives the same answer on every layout")
    verify.add_argument("target", metavar="package.module:Class")
    verify.add_argument("--config", type=Path, help='JSON: {"init": {...}, "inputs": {...}}, or a diffusers config')
    verify.add_argument("--world", type=_worlds, default=(2, 3, 4), help="numbers of ranks, by comma; default 2,3,4")
    verify.set_defaults(run=_verify)
    return parser


def _add_operating(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    of_file = argparse.ArgumentParser(add_help=False)
    of_file.add_argument(
        "--set", action="append", default=[], metavar="PATH=VALUE",
        help="a value instead of the file's, such as models.NAME.parallel.ulysses_degree=2; may be repeated",
    )  # fmt: skip

    check = subparsers.add_parser("check", parents=[of_file], help="validate a deployment file; what a replica takes")
    check.add_argument("file", type=Path)
    check.add_argument("--gpus", type=int, help="GPUs to check against; default: this machine's")
    check.add_argument("--gpus_per_node", type=int, help="of the largest node; default: all GPUs are of one node")
    check.add_argument("--cpus", type=int, help="CPU cores to check against; default: this machine's")
    check.add_argument("--memory", help="memory of a GPU to check against, in GiB or as 80G; default: not checked")
    check.add_argument("--print_config", action="store_true", help="each value with where it comes from, and no check")
    check.set_defaults(run=commands.check)

    serve = subparsers.add_parser("serve", parents=[of_file], help="serve a deployment file here until Ctrl-C")
    serve.add_argument("file", type=Path)
    serve.add_argument("--port", type=int, help="HTTP port instead of the file's; 0 takes a free one")
    serve.set_defaults(run=commands.serve)

    build = subparsers.add_parser("build", parents=[of_file], help="print the config that Ray Serve takes")
    build.add_argument("file", type=Path)
    build.set_defaults(run=commands.build)

    deploy = subparsers.add_parser("deploy", parents=[of_file], help="change a running cluster to what the file says")
    deploy.add_argument("file", type=Path)
    deploy.add_argument("--address", help="HOST:PORT of the Ray head, or ray://...; default: SPRAY_ADDRESS, or auto")
    deploy.add_argument("--prune", action="store_true", help="remove models that are not in the file")
    deploy.add_argument("--dry_run", action="store_true", help="print and verify the changes, make none")
    deploy.add_argument(
        "--allow_downtime", action="store_true",
        help="where devices do not suffice for both, stop old gangs before the new ones start",
    )  # fmt: skip
    deploy.add_argument(
        "--allow_pending", action="store_true", help="also models that fit on no node now; nodes may be added"
    )
    deploy.set_defaults(run=commands.roll_out)

    doctor = subparsers.add_parser("doctor", parents=[of_file], help="what commonly goes wrong on a machine")
    doctor.add_argument("file", type=Path, nargs="?", help="look at its weights and ports as well")
    doctor.set_defaults(run=commands.doctor)

    schema = subparsers.add_parser("schema", help="the JSON schema of deployment files")
    schema.set_defaults(run=commands.schema)


def _add_looking(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    for name, run, text in (
        ("ps", commands.ps, "models, gangs, queues, and the steps of what is running"),
        ("models", commands.models, "the models of a server, and what may be asked of them"),
    ):
        command = subparsers.add_parser(name, help=text)
        command.add_argument("--server", help=f"base URL; default: SPRAY_SERVER, or {DEFAULT_SERVER}")
        command.add_argument("--json", action="store_true", help="the server's answer as it is")
        command.set_defaults(run=run)


def _add_generate(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    command = subparsers.add_parser("generate", help="generate pictures or a video, on a server or in this process")
    command.add_argument("prompt")
    command.add_argument("--output", type=Path, default=Path("picture.png"), help=".png, .jpg, .webp, or .mp4")
    command.add_argument("--negative_prompt")
    command.add_argument("--width", type=int, help="pixels")
    command.add_argument("--height", type=int, help="pixels")
    command.add_argument("--num_inference_steps", type=int)
    command.add_argument("--guidance_scale", type=float)
    command.add_argument("--guidance_scale_2", type=float, help="of a video model's second transformer")
    command.add_argument("--num_frames", type=int, help="frames of a video")
    command.add_argument("--fps", type=int, help="frames of a video per second")
    command.add_argument("--seed", type=int)
    command.add_argument("--n", type=int, help="pictures; further ones are saved as OUTPUT-1, OUTPUT-2")
    command.add_argument(
        "--lora", action="append", type=generate.lora, default=[], metavar="NAME[=SCALE]",
        help="an adapter of the deployment; with --local a safetensors file; may be repeated",
    )  # fmt: skip
    command.add_argument("--server", help=f"base URL of a server; default: SPRAY_SERVER, or {DEFAULT_SERVER}")
    command.add_argument("--local", action="store_true", help="without a server: load the model in own processes")
    command.add_argument("--model", help="with --local its folder, else its name in the deployment")
    command.add_argument("--device", choices=["cuda", "cpu"], help="with --local; default: cuda where there is one")
    for name in generate.DEGREES:
        command.add_argument(f"--{name}", type=int, help="with --local")
    command.set_defaults(run=generate.generate)


def _with_underscores(arguments: Sequence[str]) -> list[str]:
    """`--ring-degree=2` as `--ring_degree=2`; values stay as they are."""
    spelt = []
    for argument in arguments:
        flag, equals, value = argument.partition("=")
        spelt.append(
            (flag.replace("-", "_").replace("__", "--", 1) if flag.startswith("--") else flag) + equals + value
        )
    return spelt


def _worlds(text: str) -> tuple[int, ...]:
    worlds = tuple(int(part) for part in text.split(",") if part.isdecimal())
    if not worlds or len(worlds) != text.count(",") + 1 or min(worlds) < 2:
        raise argparse.ArgumentTypeError(f"expected numbers of at least 2 by comma (2,3,4), got {text!r}")
    return worlds


def _verify(arguments: argparse.Namespace) -> None:
    # Loaded by name, because it brings torch, which no other command of this program needs.
    core = importlib.import_module("sp_core.verify.verify")
    try:
        good = True
        for is_good, line in core.verify(arguments.target, arguments.config, arguments.world):
            print(line if is_good else f"{line}  <--", flush=True)
            good = good and is_good
    except core.Unverifiable as error:
        raise UsageError(str(error)) from None
    if not good:
        raise NotTheSame("not every layout gives the answer of one process")


if __name__ == "__main__":
    sys.exit(main())
