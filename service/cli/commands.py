"""What an operator does with a deployment file and a cluster: check, serve, build, deploy, ps, models, schema, doctor.

Parsed arguments come in from `service.cli.main`; results go to standard output, all else to standard error.
"""

import argparse
import json
import math
import os
import time
from collections.abc import Sequence

from deploy.check import check_deployment
from deploy.load import LoadedSpec, load_with_origins, print_config
from deploy.memory import parse_memory
from deploy.schema import json_schema
from deploy.spec import DeploymentSpec, SpecError
from deploy.yaml_text import to_yaml
from service.app import check_ports, serve_config
from service.cli.client import read_cluster, read_models, server_url
from service.cli.doctor import diagnose
from service.cli.printing import UsageError, say
from service.cli.progress import LoadBars
from service.cli.table import cluster_table, models_table
from service.rollout.attach import attach
from service.rollout.changes import (
    TOUCHED,
    Change,
    applications,
    deploy,
    failures,
    find_changes,
    find_gateway_changes,
    pending,
    running_models,
    settled,
)
from service.rollout.local_cluster import LocalCluster, local_devices
from service.rollout.preflight import derive_tasks, misplaced, verify_on_nodes, without_room


def check(arguments: argparse.Namespace) -> None:
    """Does the deployment work here, or on the devices that are named?

    Raises:
        SpecError: it does not; one line per obstacle.
        UsageError: the memory is no size.
    """
    loaded = _load(arguments)
    if arguments.print_config:
        for line in print_config(loaded):
            print(line)
        return
    devices = local_devices()
    if arguments.gpus is not None:  # another machine than this one, with CPU cores enough unless they are counted too
        devices = {"cpu": math.inf, "cuda": float(arguments.gpus)}
    if arguments.cpus is not None:
        devices["cpu"] = float(arguments.cpus)
    try:
        memory = parse_memory(arguments.memory) if arguments.memory else None
    except ValueError as error:
        raise UsageError(f"--memory: {error}") from None
    for line in check_deployment(loaded.spec, devices, memory, arguments.gpus_per_node):
        print(line)


def serve(arguments: argparse.Namespace) -> None:
    """Serve on this machine until Ctrl-C."""
    spec = _load(arguments).spec
    if arguments.port is not None:
        spec = spec.model_copy(update={"gateway": spec.gateway.model_copy(update={"port": arguments.port})})
    check_deployment(spec, local_devices())
    with LocalCluster(spec) as cluster:
        for line in _banner(spec, cluster):
            say(line)
        with LoadBars([model.name for model in spec.models]) as bars:
            cluster.wait_ready(max(model.timeouts.startup_s for model in spec.models), bars.show)
        say(f"ready: {_curl(cluster.url, cluster.spec)}")
        try:
            while True:
                time.sleep(3600)
        except KeyboardInterrupt:
            say("stopping when the requests in flight are done; Ctrl-C again stops at once")
            cluster.drain()
            raise


def build(arguments: argparse.Namespace) -> None:
    """Print the config that Ray Serve takes."""
    spec = _load(arguments).spec
    if spec.gateway.host in ("127.0.0.1", "localhost"):
        say(f"gateway.host is {spec.gateway.host}: on a cluster only the node itself reaches it; 0.0.0.0 is all of it")
    check_ports(spec)
    print(to_yaml(serve_config(derive_tasks(spec))), end="")


def roll_out(arguments: argparse.Namespace) -> None:
    """Change a running cluster to what the file says.

    Raises:
        SpecError: something in the file cannot work there; nothing was changed then.
    """
    spec = _load(arguments).spec
    check_ports(spec)
    with attach(arguments.address or os.environ.get("SPRAY_ADDRESS")):
        present = applications()
        running = running_models(present)
        spec = settled(spec, running)
        changes = find_changes(running, spec.models, arguments.prune)
        for line in [*map(str, changes), *find_gateway_changes(spec)]:
            print(line, flush=True)
        touched = {change.model for change in changes if change.action in TOUCHED}
        spec, obstacles = verify_on_nodes(spec, touched)
        if not arguments.allow_pending:
            obstacles += [f"{reason}; --allow-pending deploys it all the same" for reason in misplaced(spec, touched)]
        added, upgraded = ({change.model for change in changes if change.action == a} for a in ("add", "upgrade"))
        starved = without_room(spec, added, upgraded)
        if not arguments.allow_downtime:
            obstacles += [f"{line}; add devices, or say --allow-downtime" for line in starved.values()]
        if obstacles:
            raise SpecError("\n".join([*obstacles, "nothing was changed"]))
        if arguments.dry_run:
            return
        deploy(spec, changes, present, tuple(starved))
        _wait(spec, changes)


def ps(arguments: argparse.Namespace) -> None:
    """Models, gangs, queues and what is running."""
    cluster = read_cluster(server_url(arguments.server))
    print(json.dumps(cluster, indent=2) if arguments.json else cluster_table(cluster), flush=True)


def models(arguments: argparse.Namespace) -> None:
    """The models of a server, with what may be asked of each."""
    listed = read_models(server_url(arguments.server))
    print(json.dumps(listed, indent=2) if arguments.json else models_table(listed), flush=True)


def schema(arguments: argparse.Namespace) -> None:
    """The JSON schema of a deployment file."""
    print(json.dumps(json_schema(), indent=2))


def doctor(arguments: argparse.Namespace) -> None:
    """Look for what commonly goes wrong on a machine.

    Raises:
        SpecError: something is wrong; what to do stands beside it.
    """
    findings = diagnose(_load(arguments).spec if arguments.file else None)
    width = max(len(finding.name) for finding in findings)
    for finding in findings:
        print(f"{finding.level:<4}  {finding.name:<{width}}  {finding.found}")
        if finding.advice:
            print(f"{'':<4}  {'':<{width}}  -> {finding.advice}")
    failed = [finding.name for finding in findings if finding.level == "fail"]
    if failed:
        raise SpecError(f"not in order: {', '.join(failed)}")


def _load(arguments: argparse.Namespace) -> LoadedSpec:
    return load_with_origins(arguments.file, os.environ, arguments.set)


def _banner(spec: DeploymentSpec, cluster: LocalCluster) -> list[str]:
    devices = local_devices()
    models = spec.models[:2] if len(spec.models) > 3 else spec.models
    lines = [f"spray on {devices['cpu']:g} CPU cores and {devices['cuda']:g} GPUs"]
    lines += [f"  {model.name}: {model.parallel} on {model.device}" for model in models]
    if len(models) < len(spec.models):
        lines.append(f"  and {len(spec.models) - len(models)} models more")
    if cluster.metrics_url:
        lines.append(f"metrics for Prometheus: {cluster.metrics_url}")
    return [*lines, f"change it while it runs: spray deploy FILE --address {cluster.address}"]


def _curl(url: str, spec: DeploymentSpec) -> str:
    model = spec.models[0]
    video = model.tasks is not None and "text-to-image" not in model.tasks
    body = f'{{"model": "{model.name}", "prompt": "a cup of coffee"}}'
    path, output = ("videos/sync", " -o video.mp4") if video else ("images/generations", "")
    key = " -H 'authorization: Bearer KEY'" if spec.auth.api_keys_env else ""
    return f"curl {url}/v1/{path}{key} -H 'content-type: application/json' -d '{body}'{output}"


def _wait(spec: DeploymentSpec, changes: Sequence[Change]) -> None:
    """Until everything that was changed serves, or waits for nodes that are not there.

    Raises:
        SpecError: a model cannot be started; what ran before goes on.
        TimeoutError: it takes longer than all its gangs may take, one after the other.
    """
    limits = [(m.timeouts.startup_s + m.grace_period_s) * m.autoscaling.max_replicas for m in spec.models]
    deadline = time.monotonic() + max(limits)
    while time.monotonic() < deadline:
        failed = list(failures(changes))
        if failed:
            raise SpecError("\n".join(failed))
        unfinished = pending(changes)
        waiting = misplaced(spec, unfinished)
        if len(waiting) >= len(unfinished):
            for line in waiting:
                say(f"waiting: {line}")
            say("done")
            return
        time.sleep(0.5)
    raise TimeoutError(f"not finished after {max(limits):g} s: {', '.join(unfinished)}")
