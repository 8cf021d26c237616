"""Ray nodes that start as KubeRay starts them: values of the chart come in, a running cluster goes out.

Each node is a network namespace, as a pod is. Ray's start parameters, the environment, the ports and serveConfigV2 are
those that the chart renders; only folders are temporary. What KubeRay does by the dashboard's API, the test does.
"""

import contextlib
import json
import os
import secrets
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import yaml

from tests.helm.chart import CHART, Values, ray_service, render

RAY = str(Path(sys.executable).parent / "ray")
HEAD, WORKER = "10.78.0.1", "10.78.0.2"
PATIENCE_S = 600

ASK = """
import sys, urllib.error, urllib.request
method, url, token = sys.argv[1:]
headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
body = sys.stdin.buffer.read() or None
try:
    with urllib.request.urlopen(urllib.request.Request(url, body, headers, method=method), timeout=60) as answer:
        print(answer.status, answer.read().decode())
except urllib.error.HTTPError as error:
    print(error.code, error.read().decode())
except OSError as error:
    print(0, error)
"""
"""A call from inside a node: the test itself is in none of the two networks."""


class Nodes:
    """A head and a worker, each a process tree of its own.

    Args:
        values: of the chart.
        enter: what to put before a command to run it on the head, and on the worker.
        folder: for Ray's files and homes.
        flags: of a node's `ray start`, besides.
        environments: of nodes, besides.
    """

    def __init__(
        self,
        values: Values,
        enter: list[str],
        folder: Path,
        flags: Mapping[str, Sequence[str]] = MappingProxyType({}),
        environments: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        self.service = ray_service(render(values))["spec"]
        self.enter = {"head": enter[0].split(), "worker": enter[1].split()}
        self.folder = folder
        self.flags, self.environments = flags, environments
        self.token = secrets.token_hex(32)  # KubeRay makes one where values name none
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: Counter[str] = Counter()

    def environment(self, group: Any) -> dict[str, str]:
        """What the chart renders, and what KubeRay and the image add."""
        (container,) = group["template"]["spec"]["containers"]
        rendered = {variable["name"]: variable["value"] for variable in container["env"]}
        image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHART.parent), "OMP_NUM_THREADS": "1"}
        auth = {"RAY_AUTH_MODE": self.service["rayClusterConfig"]["authOptions"]["mode"], "RAY_AUTH_TOKEN": self.token}
        return image | rendered | auth | {"HOME": str(self.folder)}

    def start(self, name: str) -> None:
        """Run the line that KubeRay makes of the group."""
        cluster = self.service["rayClusterConfig"]
        group = cluster["headGroupSpec"] if name == "head" else cluster["workerGroupSpecs"][0]
        params = group["rayStartParams"] | {"dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
        if name == "head":
            flags = ["--head", "--block", f"--temp-dir={self.folder / 'r'}"]
        else:
            labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
            flags = ["--block", f"--address={HEAD}:6379", f"--labels={labels}"]
        flags += [*self.flags.get(name, ()), *(f"--{key}={value}" for key, value in params.items())]
        command = [*self.enter[name], RAY, "start", *flags]
        environment = self.environment(group) | self.environments.get(name, {})
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command, env=environment, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT
            )

    def kill(self, name: str) -> None:
        """Kill all processes of a node, as the loss of its pod does."""
        process, tree = self.running.pop(name), []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has ended by itself
            tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for each in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        process.wait(timeout=60)
        psutil.wait_procs(tree, timeout=60)
        if name == "head":  # another pod has another disk; Ray's note there would say that this one runs
            (self.folder / "r" / "ray_current_cluster").unlink(missing_ok=True)

    def ask(self, method: str, url: str, token: str = "", body: Any = None) -> tuple[int, Any]:
        """Status and content of an answer; status 0: nobody answers."""
        command = [*self.enter["worker"], sys.executable, "-S", "-c", ASK, method, url, token]
        sent = "" if body is None else json.dumps(body)
        done = subprocess.run(command, input=sent, capture_output=True, text=True, check=True)
        status, _, content = done.stdout.strip().partition(" ")
        return int(status), json.loads(content) if content.startswith("{") else content

    def serve(self, method: str, body: Any = None) -> Any:
        """Serve's state, or None while the dashboard does not tell; PUT changes it."""
        for name, process in list(self.running.items()):
            if process.poll() is not None:
                # On a busy machine Ray gives up waiting for itself; kubelet starts it again.
                self.starts[name] += 1
                assert self.starts[name] < 4, (self.folder / f"{name}.log").read_text()[-4000:]
                self.start(name)
        url = f"http://{HEAD}:8265/api/serve/applications/"
        status, content = self.ask(method, url, self.token, body)
        return (content or True) if status == 200 else None

    def apply(self, values: Values) -> None:
        """Tell Serve what the RayService says, as the operator does whenever it changes."""
        config = yaml.safe_load(ray_service(render(values))["spec"]["serveConfigV2"])
        wait(lambda: self.serve("PUT", config))

    def replicas(self) -> dict[str, list[tuple[str, str]]]:
        """Actor and address of each running replica, by application."""
        return {
            name: [
                (replica["actor_id"], replica["node_ip"])
                for deployment in application["deployments"].values()
                for replica in deployment["replicas"]
                if replica["state"] == "RUNNING"
            ]
            for name, application in self.serve("GET")["applications"].items()
        }

    def draws(self, api: str, address: str = WORKER) -> bool:
        """Whether the pod of `helm test` would succeed; it fails with an exception of its own."""
        model = next(
            each["name"].removeprefix("model-")
            for each in yaml.safe_load(self.service["serveConfigV2"])["applications"]
        )
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "PYTHONPATH": str(CHART.parent)} | {
            "SPRAY_HTTP": f"{address}:8000", "SPRAY_GRPC": f"{address}:9000", "SPRAY_MODEL": model,
            "SPRAY_FIELDS": '{"num_inference_steps": 2}', "SPRAY_TIMEOUT": str(PATIENCE_S // 2),
        }  # fmt: skip
        script = (CHART / "files" / "tests" / f"{api}.py").read_text()
        command = [*self.enter["head"], sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        return done.returncode == 0 and "a PNG of" in done.stdout


def wait(look: Any) -> Any:
    """What `look` finds as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(1)
    return found
