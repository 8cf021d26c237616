"""`spray deploy`: change a running cluster to what a deployment file says."""

import os
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.spec import DeploymentSpec, SpecError
from service.cli.options import File, Overrides, load
from service.cli.output import say
from service.rollout.environment import use_running_cluster
from service.rollout.ports import open_to_all

if TYPE_CHECKING:
    from service.rollout.changes import Change

SILENT_S = 30.0
"""Seconds without an answer after which the cluster counts as gone. Serve's controller may be replaced meanwhile."""


def deploy(
    file: File,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="The Ray head, or ray://HOST:PORT. Default: SPRAY_ADDRESS, or auto."),
    ] = None,
    prune: Annotated[bool, typer.Option("--prune", help="Remove models that are not in the file.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print and verify the changes, but make none.")] = False,
    allow_downtime: Annotated[
        bool,
        typer.Option("--allow-downtime", help="Stop old gangs before new ones start, if devices do not suffice."),
    ] = False,
    allow_pending: Annotated[
        bool, typer.Option("--allow-pending", help="Accept models that fit on no node yet; nodes may be added.")
    ] = False,
) -> None:
    """Change a running cluster to what a deployment file says."""
    spec = load(file, overrides).spec
    use_running_cluster()
    # Here, because they import Ray, after the line above has set its environment.
    from service.app import check_ports
    from service.rollout.apply import apply_changes
    from service.rollout.attach import attach
    from service.rollout.changes import find_changes, find_gateway_changes, keep_derived, running_models
    from service.rollout.preflight import settle_running
    from service.rollout.serve_client import applications

    check_ports(spec)
    if warning := open_to_all(spec):
        say(warning)
    with attach(address or os.environ.get("SPRAY_ADDRESS")):
        present = applications()
        running = running_models(present)
        spec = settle_running(keep_derived(spec, running), running)
        changes = find_changes(running, spec.models, prune)
        for line in [*map(str, changes), *find_gateway_changes(spec, present)]:
            print(line, flush=True)
        spec, without_surge = _preflight(spec, changes, allow_downtime, allow_pending)
        if not dry_run:
            apply_changes(spec, changes, present, without_surge)
            _wait(spec, changes)


def _preflight(
    spec: DeploymentSpec, changes: "Sequence[Change]", allow_downtime: bool, allow_pending: bool
) -> tuple[DeploymentSpec, tuple[str, ...]]:
    """Check on the cluster's nodes that the changes can work.

    Returns:
        The spec with the tasks of the changed models filled in, and the models whose old gangs must stop first.

    Raises:
        SpecError: something cannot work; a line for each problem.
    """
    from service.rollout.changes import DEPLOYING  # here, for it imports Ray
    from service.rollout.preflight import (  # here, for it imports Ray
        homeless_gateway,
        missing_surge_room,
        taken_route,
        unschedulable_models,
        verify_on_nodes,
    )

    changed = {change.model for change in changes if change.action in DEPLOYING}
    added, upgraded = ({change.model for change in changes if change.action == a} for a in ("add", "upgrade"))
    spec, problems = verify_on_nodes(spec, changed)
    problems += taken_route()
    if not allow_pending:
        reasons = homeless_gateway(spec) + unschedulable_models(spec, changed)
        problems += [f"{reason}; --allow-pending deploys it nevertheless" for reason in reasons]
    without_surge = missing_surge_room(spec, added, upgraded)
    if not allow_downtime:
        problems += [f"{line}; add devices, or give --allow-downtime" for line in without_surge.values()]
    if problems:
        raise SpecError("\n".join([*problems, "nothing was changed"]))
    return spec, tuple(without_surge)


def _wait(spec: DeploymentSpec, changes: "Sequence[Change]") -> None:
    """Return when everything that was changed serves, or waits for nodes that do not exist yet.

    Raises:
        SpecError: a model cannot be started; what ran before goes on.
        TimeoutError: it takes longer than all gangs of a model may take, one after the other.
    """
    from ray.exceptions import RayError  # here, as below

    from service.rollout.apply import failures, unfinished  # here, for it imports Ray
    from service.rollout.preflight import unschedulable_models  # here, for it imports Ray

    limits = [(m.timeouts.startup_s + m.grace_period_s) * m.autoscaling.max_replicas for m in spec.models]
    deadline = time.monotonic() + max(limits)
    answered = time.monotonic()
    while time.monotonic() < deadline:
        try:
            failed = list(failures(changes))  # first: a failed model stays unfinished, and would be waited for
            left = unfinished(changes)
            waiting = unschedulable_models(spec, left)
        except RayError:
            if time.monotonic() > answered + SILENT_S:
                raise
            time.sleep(0.5)
            continue
        answered = time.monotonic()
        if failed:
            raise SpecError("\n".join(failed))
        if len(waiting) >= len(left):
            for line in waiting:
                say(f"waiting: {line}")
            say("done")
            return
        time.sleep(0.5)
    raise TimeoutError(f"not finished after {max(limits):g} s: {', '.join(left)}")
