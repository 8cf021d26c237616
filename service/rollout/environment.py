"""What Ray reads from the environment of this process, set by an explicit call before Ray is imported.

Ray reads these variables once, while it is imported, and processes that this one starts inherit them. So an entry point
calls one of the functions here first: `use_private_cluster` for clusters of our own (`spray serve`, the demo, tests),
`use_running_cluster` for one that somebody else has started (`spray deploy`). Importing a module changes nothing.
"""

import os
import secrets
from collections.abc import Mapping
from pathlib import Path

LOOPBACK_SWITCH = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}
"""Lets Ray use loopback, on any system. Without it, Ray replaces a loopback address by another of the machine."""

TOKENS = ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")

PRIVATE_CLUSTER = LOOPBACK_SWITCH | {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_SERVE_FORCE_STOP_UNHEALTHY_REPLICAS": "1",  # else a hung gang is waited for, for its whole grace period
    "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": "60",  # a busy laptop takes longer than Serve's 5 s
    "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",  # else 10: nobody answers for so long after a proxy has died
    "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "service.edge:middlewares",
}
"""What a cluster of our own needs, whatever the environment says."""

PRIVATE_CLUSTER_DEFAULTS = {
    "RAY_AUTH_MODE": "token",  # other users of this machine reach loopback as well
    "RAY_SERVE_REPLICA_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",  # else 10: too slow for backlogs in seconds
    "RAY_SERVE_HANDLE_AUTOSCALING_METRIC_PUSH_INTERVAL_S": "1",
    "MALLOC_ARENA_MAX": "2",  # glibc's: else proxies and gateways grow by a tenth over some thousand requests
}
"""What a cluster of our own gets unless the environment says otherwise."""


def use_private_cluster() -> None:
    """Prepare this process for a `LocalCluster`. Call it before Ray is imported; `LocalCluster` refuses otherwise."""
    os.environ.update(PRIVATE_CLUSTER)
    for variable, value in PRIVATE_CLUSTER_DEFAULTS.items():
        os.environ.setdefault(variable, value)
    if os.environ["RAY_AUTH_MODE"] == "token" and not any(os.environ.get(name) for name in TOKENS):
        os.environ["RAY_AUTH_TOKEN"] = secrets.token_hex(32)  # else Ray would write one to the user's home


def use_running_cluster() -> None:
    """Prepare this process to connect to a cluster that runs. Call it before Ray is imported.

    It authenticates with the operator's token if there is one and `RAY_AUTH_MODE` is not set. Ray does so by itself
    only for a cluster that it finds on this machine, not for an address that it is given.
    """
    os.environ.update(LOOPBACK_SWITCH)  # `spray serve` and its like listen there
    if "RAY_AUTH_MODE" not in os.environ and has_token(os.environ, Path.home()):
        os.environ["RAY_AUTH_MODE"] = "token"


def has_token(environment: Mapping[str, str], home: Path) -> bool:
    """True if Ray finds a token of the user: in the environment, or in its default file."""
    named = any(environment.get(name) for name in TOKENS)
    return named or (home / ".ray" / "auth_token").exists()
