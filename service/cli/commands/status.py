"""`spray ps`, `top`, `models`, `requests`: what a server says of itself. `spray cancel` ends a request, or a job."""

import json
import sys
import time
from collections.abc import Callable
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live

from deploy import support
from service.cli.client import cancel_request, read_cluster, read_models, read_requests, server_url, understood
from service.cli.job_client import cancel_job
from service.cli.options import AsJson, Server
from service.cli.output import cluster_table, models_table, requests_table, say, show, support_table
from service.cli.top import top_table
from service.jobs.records import ID


def ps(server: Server = None, as_json: AsJson = False) -> None:
    """Show the models, gangs and queues of a server, and the steps of what is running.

    Needs a key with the scope admin.
    """
    _show("/v1/cluster", read_cluster, cluster_table, server, as_json)


def top(
    server: Server = None,
    seconds: Annotated[float, typer.Option(min=0.2, help="Seconds between refreshes.")] = 1.0,
) -> None:
    """Watch the gangs of a server until Ctrl-C: steps, where their time goes, queues, what the autoscaler wants.

    A pipe or a file gets one table. Needs a key with the scope admin.
    """
    at = server_url(server)
    if not sys.stdout.isatty():
        show(_top(at))
        return
    with Live(_top(at), auto_refresh=False) as live:
        while True:
            time.sleep(seconds)
            live.update(_top(at), refresh=True)


def _top(at: str) -> Group:
    cluster = read_cluster(at)
    with understood(at, "GET /v1/cluster"):
        return top_table(cluster)


def models(
    server: Server = None,
    supported: Annotated[
        bool,
        typer.Option("--supported", help="Instead, the pipelines of diffusers that spray serves, and why not others."),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show what each model of a server can be asked for."""
    if supported:
        rows = support.supported()
        if as_json:
            print(json.dumps({"pipelines": rows}, indent=2), flush=True)
        else:
            show(support_table(rows))
        return
    _show("/v1/models", read_models, models_table, server, as_json)


def requests(server: Server = None, as_json: AsJson = False) -> None:
    """Show the requests that wait or run: those of the key, or all if it has the scope admin."""
    _show("/v1/requests", read_requests, requests_table, server, as_json)


def cancel(
    request_id: Annotated[
        str,
        typer.Argument(
            metavar="ID", help="ID in `spray requests` or `spray jobs`, or the x-request-id.", show_default=False
        ),
    ],
    server: Server = None,
) -> None:
    """End a request that waits or runs, or a job."""
    at = server_url(server)
    is_job = ID.fullmatch(request_id) is not None
    answer = cancel_job(at, request_id) if is_job else cancel_request(at, request_id)
    with understood(at, "POST /v1/jobs" if is_job else "DELETE /v1/requests"):
        ended, state = str(answer["id"]), str(answer["state"]) if is_job else "cancelled"
    print(ended, flush=True)
    say("canceled; its gang is free within a step" if state == "cancelled" else f"it has ended before: {state}")


def _show(
    path: str,
    read: Callable[[str], dict[str, Any]],
    tabulate: Callable[[dict[str, Any]], Group],
    server: str | None,
    as_json: bool,
) -> None:
    at = server_url(server)
    body = read(at)
    if as_json:
        print(json.dumps(body, indent=2), flush=True)
        return
    with understood(at, f"GET {path}"):
        table = tabulate(body)
    show(table)
