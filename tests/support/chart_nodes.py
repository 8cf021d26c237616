"""Ray nodes that start as KubeRay starts them: values of the chart come in, a running cluster goes out.

Each node is a network namespace, as a pod is. Ray's start parameters, the environment, the ports and serveConfigV2 are
those that the chart renders; only folders are temporary. What KubeRay does by the dashboard's API, kubelet by probes
and `helm test` by its pods, the test does.
"""

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import yaml

from service.rollout.cluster_folder import place
from tests.helm.chart import CHART, Values, of_kind, ray_service, render
from tests.support.namespaces import joined_namespaces

RAY = str(Path(sys.executable).parent / "ray")
HEAD, WORKER = "10.78.0.1", "10.78.0.2"
ADDRESSES = {"head": HEAD, "worker": WORKER}
PATIENCE_S = 600

ASK = """
import sys, urllib.error, urllib.request
method, url, token, seconds = sys.argv[1:]
headers = {"content-type": "application/json"} | ({"authorization": f"Bearer {token}"} if token else {})
call = urllib.request.Request(url, sys.stdin.buffer.read() or None, headers, method=method)
try:
    with urllib.request.urlopen(call, timeout=float(seconds)) as answer:
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

    Attributes:
        flags: of a node's `ray start`, besides, by the node's name.
        environments: of nodes, besides.
    """

    def __init__(self, values: Values, enter: list[str], folder: Path) -> None:
        objects = render(values)
        self.service = ray_service(objects)["spec"]
        self.tests = {pod["metadata"]["name"].rpartition("-")[2]: pod for pod in of_kind(objects, "Pod")}
        self.enter = {"head": enter[0].split(), "worker": enter[1].split()}
        self.folder = folder
        self.flags: dict[str, Sequence[str]] = {}
        self.environments: dict[str, dict[str, str]] = {}
        self.token = secrets.token_hex(32)  # KubeRay makes one where values name none
        self.running: dict[str, subprocess.Popen[bytes]] = {}
        self.starts: Counter[str] = Counter()

    def group(self, name: str) -> Any:
        """What the RayCluster says of a node."""
        cluster = self.service["rayClusterConfig"]
        return cluster["headGroupSpec"] if name == "head" else cluster["workerGroupSpecs"][0]

    def environment(self, name: str) -> dict[str, str]:
        """What the chart renders, and what KubeRay and the image add."""
        (container,) = self.group(name)["template"]["spec"]["containers"]
        rendered = {variable["name"]: variable["value"] for variable in container["env"]}
        image = {"PATH": os.environ["PATH"], "PYTHONPATH": str(CHART.parent), "OMP_NUM_THREADS": "1"}
        auth = {"RAY_AUTH_MODE": self.service["rayClusterConfig"]["authOptions"]["mode"], "RAY_AUTH_TOKEN": self.token}
        return image | rendered | auth | {"HOME": str(self.folder)}

    def start(self, name: str) -> None:
        """Run the line that KubeRay makes of the group."""
        group = self.group(name)
        params = group["rayStartParams"] | {"dashboard-agent-listen-port": "52365", "metrics-export-port": "8080"}
        if name == "head":
            flags = ["--head", "--block", f"--temp-dir={self.folder / 'r'}"]
        else:
            labels = ",".join(f"{key}={value}" for key, value in group["labels"].items())
            flags = ["--block", f"--address={HEAD}:6379", f"--labels={labels}"]
        flags += [*self.flags.get(name, ()), *(f"--{key}={value}" for key, value in params.items())]
        command = [*self.enter[name], RAY, "start", *flags]
        environment = self.environment(name) | self.environments.get(name, {})
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

    def ask(self, method: str, url: str, token: str = "", body: Any = None, seconds: float = 60) -> tuple[int, Any]:
        """Status and content of an answer; status 0: nobody answers in time."""
        command = [*self.enter["worker"], sys.executable, "-S", "-c", ASK, method, url, token, str(seconds)]
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

    def all_run(self) -> bool:
        """Whether KubeRay would call the cluster ready, and send callers there."""
        told = self.serve("GET")
        applications = told["applications"] if told else {}
        return bool(applications) and all(each["status"] == "RUNNING" for each in applications.values())

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

    def probe(self, name: str, kind: str) -> bool:
        """Whether a probe of a node's container succeeds now, tried at the pod's address as kubelet does.

        Args:
            name: of the node.
            kind: liveness or readiness.
        """
        (container,) = self.group(name)["template"]["spec"]["containers"]
        probe, ports = container[f"{kind}Probe"], {each["name"]: each["containerPort"] for each in container["ports"]}
        path, port = probe["httpGet"]["path"], probe["httpGet"]["port"]
        url = f"http://{ADDRESSES[name]}:{ports.get(port, port)}{path}"
        return 200 <= self.ask("GET", url, seconds=probe["timeoutSeconds"])[0] < 400

    def draws(self, api: str, address: str = WORKER, model: str = "") -> bool:
        """Whether the pod of `helm test` succeeds: its command in its environment, the service's name resolved.

        Args:
            api: rest or grpc.
            address: of the service.
            model: another than the one that the pod asks.
        """
        (container,) = self.tests[api]["spec"]["containers"]
        service = self.service["serveService"]["metadata"]["name"]
        rendered = {each["name"]: each["value"].replace(f"{service}:", f"{address}:") for each in container["env"]}
        image = {"PATH": f"{Path(RAY).parent}:{os.environ['PATH']}", "HOME": str(self.folder)}
        told = {"SPRAY_TIMEOUT": str(PATIENCE_S // 2)} | ({"SPRAY_MODEL": model} if model else {})
        environment = image | {"PYTHONPATH": str(CHART.parent)} | rendered | told
        command = [*self.enter["head"], *container["command"]]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE_S)
        return done.returncode == 0 and "a PNG of" in done.stdout


@contextlib.contextmanager
def empty_cluster(values: Values) -> Iterator[Nodes]:
    """A network for a head and a worker, of which none runs yet; what is started there is killed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="k-", dir=place()))
    with joined_namespaces(tuple(ADDRESSES.values()), routed=True) as enter:
        nodes = Nodes(values, enter, folder)
        try:
            yield nodes
        finally:
            for name in list(nodes.running):
                nodes.kill(name)
            shutil.rmtree(folder, ignore_errors=True)


def wait(look: Any) -> Any:
    """What `look` finds as soon as it finds something."""
    deadline = time.monotonic() + PATIENCE_S
    while not (found := look()):
        assert time.monotonic() < deadline, "nothing came of it"
        time.sleep(1)
    return found
