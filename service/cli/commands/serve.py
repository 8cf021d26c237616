"""`spray serve`: one deployment on a Ray cluster of its own, on this machine."""

import time
from typing import TYPE_CHECKING, Annotated

import typer

from deploy.check import check_deployment
from deploy.model_spec import Task
from deploy.spec import DeploymentSpec
from deploy.tasks import makes_video
from service.api.schemas import PATHS
from service.cli.options import File, Overrides, Terminated, load
from service.cli.output import say
from service.cli.progress import LoadBars
from service.rollout.devices import local_devices
from service.rollout.environment import use_private_cluster
from service.rollout.ports import open_to_all
from workers.errors import GangLost

if TYPE_CHECKING:
    from service.rollout.local_cluster import LocalCluster

LOOK_S = 1.0


def serve(
    file: File,
    overrides: Overrides = [],  # noqa: B006  # typer copies it
    port: Annotated[
        int | None,
        typer.Option(
            help="HTTP port instead of the file's. 0 takes free ones, also for gRPC and metrics.", show_default=False
        ),
    ] = None,
) -> None:
    """Serve a deployment file on this machine until Ctrl-C or SIGTERM."""
    spec = load(file, overrides).spec
    if port is not None:
        spec = _at(spec, port)
    check_deployment(spec, local_devices())
    use_private_cluster()
    from service.rollout.local_cluster import LocalCluster  # here, for it imports Ray: after the line above

    try:
        with LocalCluster(spec) as cluster:
            for line in filter(None, [open_to_all(spec), *_banner(spec, cluster)]):
                say(line)
            try:
                with LoadBars([model.name for model in spec.models]) as bars:
                    cluster.wait_ready(max(model.timeouts.startup_s for model in spec.models), bars.show)
                say(f"ready: {_curl(cluster.url, cluster.spec)}")
                _watch()
            except KeyboardInterrupt:
                if cluster.answers():
                    say("stopping when the requests in flight are done; Ctrl-C again stops at once")
                    cluster.drain()
                raise
    except Terminated:
        say("stopped")  # as it was asked to, so this is a success


def _at(spec: DeploymentSpec, port: int) -> DeploymentSpec:
    """The deployment at another HTTP port. With 0 all ports are free ones, so that two servers never share one."""
    gateway, metrics = {"port": port}, {}
    if port == 0 and spec.gateway.grpc_port is not None:
        gateway["grpc_port"] = 0
    if port == 0 and spec.metrics.port is not None:
        metrics["port"] = 0
    changes = {"gateway": spec.gateway.model_copy(update=gateway), "metrics": spec.metrics.model_copy(update=metrics)}
    return spec.model_copy(update=changes)


def _watch() -> None:
    """Return never.

    Raises:
        GangLost: the core of the cluster is gone.
    """
    from service.rollout.core_watch import CoreWatch  # here, for it imports Ray

    with CoreWatch() as core:
        while not (reason := core.failure()):
            time.sleep(LOOK_S)
    raise GangLost(f"the cluster is gone: {reason}")


def _banner(spec: DeploymentSpec, cluster: "LocalCluster") -> list[str]:
    devices = local_devices()
    models = spec.models[:2] if len(spec.models) > 3 else spec.models
    several = f", {spec.gateway.replicas} gateways" if spec.gateway.replicas > 1 else ""
    lines = [f"spray on {devices['cpu']:g} CPU cores and {devices['cuda']:g} GPUs{several}"]
    lines += [f"  {model.name}: {model.parallel} on {model.device}" for model in models]
    if len(models) < len(spec.models):
        lines.append(f"  and {len(spec.models) - len(models)} more models")
    also = [f"gRPC: {cluster.grpc_target}"] if cluster.grpc_target else []
    also += [f"metrics for Prometheus: {cluster.metrics_url}"] if cluster.metrics_url else []
    if also:
        lines.append("; ".join(also))
    token = f"RAY_AUTH_TOKEN_PATH={cluster.token_file} " if cluster.token_file else ""
    return [*lines, f"change it while it runs: {token}spray deploy FILE --address {cluster.address}"]


def _curl(url: str, spec: DeploymentSpec) -> str:
    """A command that asks the first model for something, ready to paste."""
    model = spec.models[0]
    task: Task = model.tasks[0] if model.tasks else "text-to-image"
    output = " -o video.mp4" if makes_video(task) else ""
    key = " -H 'authorization: Bearer KEY'" if spec.auth.needs_key else ""
    said = f"""-H 'content-type: application/json' -d '{{"model": "{model.name}", "prompt": "a cup of coffee"}}'"""
    if not task.startswith("text-"):
        files = {"control": "-F control_image=@edges.png", "inpaint": "-F image=@photo.png -F mask=@mask.png"}
        said = f"-F model={model.name} -F prompt='a cup of coffee' {files.get(task, '-F image=@photo.png')}"
    return f"curl {url}{PATHS[task]}{key} {said}{output}"
