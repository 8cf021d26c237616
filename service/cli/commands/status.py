"""`spray ps` and `spray models`: what a server says of itself."""

import json

from service.cli.client import read_cluster, read_models, server_url
from service.cli.options import AsJson, Server
from service.cli.output import cluster_table, models_table, show


def ps(server: Server = None, as_json: AsJson = False) -> None:
    """Show the models, gangs and queues of a server, and the steps of what is running."""
    cluster = read_cluster(server_url(server))
    if as_json:
        print(json.dumps(cluster, indent=2), flush=True)
    else:
        show(cluster_table(cluster))


def models(server: Server = None, as_json: AsJson = False) -> None:
    """Show what each model of a server can be asked for."""
    listed = read_models(server_url(server))
    if as_json:
        print(json.dumps(listed, indent=2), flush=True)
    else:
        show(models_table(listed))
