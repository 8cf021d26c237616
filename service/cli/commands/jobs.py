"""`spray jobs`, `job`, `download`: jobs of a server. `spray cancel` ends one."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from service.cli.client import server_url, understood
from service.cli.job_client import check_made, follow_job, read_job, read_jobs, save_outputs
from service.cli.options import AsJson, Server, UsageError
from service.cli.output import job_table, jobs_table, say, show
from service.cli.progress import StepProgress
from service.jobs.records import ENDED, ID

JobId = Annotated[str, typer.Argument(metavar="ID", help="ID of a job, as `spray jobs` shows it.", show_default=False)]
Wait = Annotated[bool, typer.Option("--wait", help="Wait until the job has ended. Ctrl-C does not cancel it.")]


def jobs(
    limit: Annotated[int, typer.Option(min=1, max=100, help="Maximum number of jobs to show, the newest first.")] = 20,
    server: Server = None,
    as_json: AsJson = False,
) -> None:
    """Show jobs: those of the key, or all if it has the scope admin."""
    at = server_url(server)
    listed = read_jobs(at, limit)
    if as_json:
        print(json.dumps(listed, indent=2), flush=True)
        return
    with understood(at, "GET /v1/jobs"):
        table = jobs_table(listed)
    show(table)


def job(job_id: JobId, wait: Wait = False, server: Server = None, as_json: AsJson = False) -> None:
    """Show a job. With --wait, the exit code is 1 if it does not succeed."""
    at = server_url(server)
    found = _read(at, job_id, wait)
    if as_json:
        print(json.dumps(found, indent=2), flush=True)
    else:
        with understood(at, "GET /v1/jobs/ID"):
            table = job_table(found)
        show(table)
    if wait:
        check_made(found)


def download(
    job_id: JobId,
    output: Annotated[
        Path | None, typer.Option(help="File to write; of several, OUTPUT, OUTPUT-1, OUTPUT-2. Default: the ID.")
    ] = None,
    wait: Wait = False,
    server: Server = None,
) -> None:
    """Save the files of a job."""
    at = server_url(server)
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"--output: there is no folder {str(output.parent)!r}; make it first")
    found = _read(at, job_id, wait)
    with understood(at, "GET /v1/jobs/ID"):
        check_made(found, "" if found["state"] in ENDED else "; --wait waits for it")
        first = output or Path(f"{job_id}.{found['outputs'][0]['output_format']}")
        say("seeds: " + ", ".join(str(each["seed"]) for each in found["outputs"]))
    for file, _ in save_outputs(at, found, first):
        print(file, flush=True)


def _read(at: str, job_id: str, wait: bool) -> dict[str, Any]:
    if not ID.fullmatch(job_id):
        raise UsageError(f"{job_id!r} is no id of a job; `spray jobs` lists them")
    if not wait:
        return read_job(at, job_id)
    with StepProgress() as progress:
        return follow_job(at, job_id, progress.show)
