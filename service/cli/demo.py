"""`make demo`: the main task on this machine, from a deployment file to a picture.

    python -m service.cli.demo

Writes the demo model if it is not there, serves `deploy/local.yaml` on a private cluster, asks for one picture over
REST, prints where it is, and stops what it started, also after Ctrl-C or a failure.
"""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from deploy.load import load_spec
from deploy.spec import Metrics
from service.cli.client import generate_remotely
from service.cli.main import run
from service.cli.progress import LoadBars, StepProgress
from service.rollout.environment import use_private_cluster

PROJECT = Path(__file__).resolve().parents[2]
DEPLOYMENT = PROJECT / "deploy" / "local.yaml"
PROMPT = "a cup of coffee on the table"
SEED = 7


def demo(
    output: Annotated[Path, typer.Option(help="Where to save the picture.")] = PROJECT / ".demo" / "picture.png",
) -> None:
    """Generate one picture through a local cluster."""
    use_private_cluster()
    from service.rollout.local_cluster import LocalCluster  # here, for it imports Ray: after the line above

    output = output.resolve()
    spec = load_spec(DEPLOYMENT)
    (model,) = spec.models
    _ensure_model(Path(model.source))
    ports = {"gateway": spec.gateway.model_copy(update={"port": 0, "grpc_port": None}), "metrics": Metrics(port=0)}
    spec = spec.model_copy(update=ports)
    began = time.monotonic()
    _say(f"starting {model.name} ({model.parallel}, {model.device}) on a local Ray cluster")
    with LocalCluster(spec) as cluster:
        with LoadBars([model.name]) as bars:
            cluster.wait_ready(timeout_s=300, on_wait=bars.show)
        _say(f"ready at {cluster.url} after {time.monotonic() - began:.1f} s")
        body = {"prompt": PROMPT, "seed": SEED}
        with StepProgress() as progress:
            (picture,) = generate_remotely(cluster.url, body, progress.show)
        output.parent.mkdir(parents=True, exist_ok=True)
        unfinished = output.with_suffix(f".{os.getpid()}")
        unfinished.write_bytes(picture.content)
        unfinished.replace(output)
        _report(output, picture.metrics, body)
    _say("stopped the cluster")


def _ensure_model(folder: Path) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another demo may be writing it right now
        if not (folder / "model_index.json").is_file():
            _say(f"writing the demo model to {folder}")
            command = [sys.executable, "-m", "workers.demo_models", str(folder), "--family", folder.name]
            written = subprocess.run(command, capture_output=True, text=True, cwd=PROJECT)
            if written.returncode:
                raise OSError(f"the demo model cannot be written: {written.stderr.strip().splitlines()[-1]}")


def _report(output: Path, metrics: dict[str, Any], body: dict[str, Any]) -> None:
    steps = metrics["step_seconds"]
    _say(f"picture:  {output}")
    _say(f"layout:   {metrics['layout']}")
    _say(
        f"seconds:  encode {metrics['encode_seconds']:.3f}, decode {metrics['decode_seconds']:.3f}, "
        f"PNG {metrics['encode_media_seconds']:.3f}"
    )
    _say("steps:    " + " ".join(f"{seconds:.3f}" for seconds in steps))
    _say("the same by hand, while `spray serve deploy/local.yaml` runs:")
    _say(
        "  curl -s http://127.0.0.1:8000/v1/images/generations -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}' | python3 -c "
        "'import base64, json, sys; "
        'open("picture.png", "wb").write(base64.b64decode(json.load(sys.stdin)["data"][0]["b64_json"]))\''
    )


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    app.command()(demo)
    sys.exit(run(app, "python -m service.cli.demo"))
