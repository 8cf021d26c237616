"""The command `spray`.

    spray check FILE      validate a deployment file, and say what each replica takes
    spray serve FILE      serve it on this machine until Ctrl-C
    spray build FILE      print the config that Ray Serve takes: the serveConfigV2 of KubeRay
    spray deploy FILE     change a running cluster to what the file says
    spray ps              show the models, gangs and queues of a server
    spray top             watch the gangs: steps, where their time goes, queues, autoscaling
    spray models          show what each model of a server can be asked for
    spray requests        show what waits and runs on a server
    spray cancel ID       end a request that waits or runs, or a job
    spray jobs            show the jobs of a server
    spray job ID          show a job, or with --wait wait until it has ended
    spray download ID     save the files of a job
    spray doctor [FILE]   look for common problems of this machine
    spray schema [MODEL]  print the JSON schema of deployment files, or of requests of a server's model
    spray generate "..."  run one request: on a server, or with --local in processes of its own
    spray edit "..."      the same with a picture to begin with
    spray video "..."     the same for a video
    spray key NAME        make an API key
    spray bench           load a server, and measure it
    spray profile MODEL   profile some steps of a gang, for Perfetto
    spray verify CLASS    prove that a model class gives the same answer on every layout
    spray plan CLASS      find where the sequence of a model class is split, and prove it

Results go to standard output, everything else to standard error. Exit codes: 0 done (`spray serve`: SIGTERM), 1 failed,
2 wrong usage, 130 Ctrl-C. Flags may be written with `_` or `-`.
"""

import re
import signal
import sys
from collections.abc import Sequence

import typer

from deploy.spec import SpecError
from service.cli.client import ServerError
from service.cli.commands import bench, deploy, doctor, files, generate, jobs, key, plan, profile, serve, status, verify
from service.cli.options import Terminated, UsageError
from service.cli.output import say
from sp_core.torchvision_operators import declare_missing_operators
from workers.errors import SprayError

app = typer.Typer(
    help="Sequence parallelism on Ray: serve diffusion transformers.",
    rich_markup_mode=None,  # plain help and errors, the same in a terminal and in a pipe
    pretty_exceptions_enable=False,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),  # --ring_degree is --ring-degree
    },
)
for command in (
    files.check, serve.serve, files.build, deploy.deploy, status.ps, status.top, status.models, status.requests,
    status.cancel, jobs.jobs, jobs.job, jobs.download, doctor.doctor, files.schema, generate.generate,
    generate.edit, generate.video, bench.bench, profile.profile, key.key, verify.verify, plan.plan,
):  # fmt: skip
    app.command()(command)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return its exit code."""
    return run(app, "spray", arguments)


def run(application: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> int:
    """Run a command line, say its error in one line, and return its exit code.

    Args:
        name: of the program, for its help and its completion.
        arguments: None takes those of this process.
    """
    declare_missing_operators()
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that they stop what was started, as Ctrl-C does
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
            signal.signal(number, _terminate)
    try:
        given = _texts_last(sys.argv[1:] if arguments is None else arguments)
        code = typer.main.get_command(application).main(given, prog_name=name, standalone_mode=False)
    except typer.TyperException as error:
        say(f"error: {error.format_message()}")
        return 2
    except UsageError as error:
        say(f"error: {error}")
        return 2
    except (SpecError, SprayError, ServerError, verify.NotTheSame, TimeoutError, OSError) as error:
        say(f"error: {error}")
        return 1
    if code == 130:  # typer makes this of KeyboardInterrupt
        say("stopped")
    return code or 0


def _texts_last(arguments: Sequence[str]) -> list[str]:
    """Allow prompts that begin with a dash: a text with spaces that follows no flag is moved behind `--`."""
    texts: list[str] = []
    others: list[str] = []
    before = ""
    for at, argument in enumerate(arguments):
        if argument == "--":
            return [*others, "--", *texts, *arguments[at + 1 :]]
        is_text = re.match(r"-[^=]*\s", argument) and not before.startswith("-")
        (texts if is_text else others).append(argument)
        before = argument
    return [*others, "--", *texts] if texts else others


def _terminate(number: int, frame: object) -> None:
    raise Terminated(signal.Signals(number).name)


if __name__ == "__main__":
    sys.exit(main())
