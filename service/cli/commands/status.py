"""`spray ps` and `spray models`: what a server says of itself."""

import json

from service.cli.client import read_cluster, read_models, server_url, understood
from service.cli.options import AsJson, Server
from service.cli.output import cluster_table, models_table, show


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
