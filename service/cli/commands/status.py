"""`spray ps`, `spray models`, `spray requests`: what a server says of itself. `spray cancel` ends a request."""

import json
from typing import Annotated

import typer

from service.cli.client import cancel_request, read_cluster, read_models, read_requests, server_url, understood
from service.cli.options import AsJson, Server
from service.cli.output import cluster_table, models_table, requests_table, say, show


def ps(server: Server = None, as_json: AsJson = False) -> None:
    """Show the models, gangs and queues of a server, and the steps of what is running."""
    at = server_url(server)
    cluster = read_cluster(at)
    if as_json:
        print(json.dumps(cluster, indent=2), flush=True)
        return
    with understood(at, "GET /v1/cluster"):
        table = cluster_table(cluster)
    show(table)


def models(server: Server = None, as_json: AsJson = False) -> None:
    """Show what each model of a server can be asked for."""
    at = server_url(server)
    listed = read_models(at)
    if as_json:
        print(json.dumps(listed, indent=2), flush=True)
        return
    with understood(at, "GET /v1/models"):
        table = models_table(listed)
    show(table)


def requests(server: Server = None, as_json: AsJson = False) -> None:
    """Show the requests that wait or run: those of the key, or all if it has the scope admin."""
    at = server_url(server)
    listed = read_requests(at)
    if as_json:
        print(json.dumps(listed, indent=2), flush=True)
        return
    with understood(at, "GET /v1/requests"):
        table = requests_table(listed)
    show(table)


def cancel(
    request_id: Annotated[
        str, typer.Argument(metavar="ID", help="Of `spray requests`, or the x-request-id.", show_default=False)
    ],
    server: Server = None,
) -> None:
    """End a request that waits or runs."""
    at = server_url(server)
    answer = cancel_request(at, request_id)
    with understood(at, "DELETE /v1/requests"):
        ended = str(answer["id"])
    print(ended, flush=True)
    say("canceled; its gang is free within a step")
