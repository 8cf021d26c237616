"""The operator's commands without a cluster: what they print, and that a mistake is one line and exit code 1."""

import json
import os
import shlex
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from urllib.parse import quote, unquote

import httpx
import jsonschema
import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from deploy.gateway_spec import GatewaySpec
from deploy.load import load_spec
from deploy.spec import Auth, Metrics
from deploy.support import supported
from service.api.responses import model_object
from service.app import serve_config
from service.cli import client
from service.cli.commands import doctor as doctor_command
from service.cli.commands import files, serve
from service.cli.doctor import Finding
from service.cli.main import _texts_last, main
from service.cli.output import cluster_table, models_table, plain, requests_table
from service.state.model_states import ModelState, cluster_object
from tests.support.backend import FakeBackend
from workers.gang.placement import Node

SHIPPED = Path(__file__).resolve().parents[2] / "deploy"

TWO = """
models:
  - {name: a, source: org/a, parallel: {ulysses_degree: 4}}
  - {name: b.c, source: org/b, device: cpu, max_queued: 7}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    written = tmp_path / "two.yaml"
    written.write_text(TWO)
    return written


@pytest.fixture(autouse=True)
def devices(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine of its own for every test, whatever this one has and is told."""
    for module in (files, serve):
        monkeypatch.setattr(module, "local_devices", lambda: {"cpu": 16.0, "cuda": 4.0})
    for variable in ("SPRAY_SERVER", "SPRAY_ADDRESS", "SPRAY_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    return (code, *capsys.readouterr())


def test_build_prints_what_serve_takes(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "build", str(file))
    assert code == 0 and "gateway.host is 127.0.0.1" in err
    config = yaml.safe_load(out)
    assert config == serve_config(load_spec(file))
    assert [application["name"] for application in config["applications"]] == ["model-a", "model-b.c", "gateway"]
    assert "&id" not in out  # four equal bundles are written four times; not all readers of YAML know shorthands
    ServeDeploySchema.model_validate(config)


@pytest.mark.parametrize("shipped", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.name)
def test_build_takes_every_shipped_file(shipped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "build", str(shipped))
    assert code == 0
    assert len(ServeDeploySchema.model_validate(yaml.safe_load(out)).applications) > 1


def test_schema_is_a_schema_that_knows_the_files(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "schema")
    assert code == 0
    schema = json.loads(out)
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"models": [{"nam": "a"}]}, schema)


def test_each_value_with_where_it_comes_from(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_GATEWAY__PORT", "9001")
    monkeypatch.setenv("SPRAY_MODELS__A__MAX_QUEUED", "5")
    arguments = [
        "check",
        str(file),
        "--print-config",
        "--set",
        "models.a.max_queued=6",
        "--set=models.b.c.dtype=float16",
    ]
    code, out, err = run(capsys, *arguments)
    assert (code, err) == (0, "")
    lines = dict(line.rsplit("  # ", 1) for line in out.splitlines())
    origins = {value.strip(): origin for value, origin in lines.items()}
    assert origins["models.a.max_queued = 6"] == "--set"
    assert origins['models.b.c.dtype = "float16"'] == "--set"
    assert origins["gateway.port = 9001"] == "SPRAY_GATEWAY__PORT"
    assert origins["models.b.c.max_queued = 7"] == f"file {file}:4"
    assert origins["models.a.grace_period_s = 900.0"] == "default"


@pytest.mark.parametrize("command", ["check", "build"])
def test_set_overrules_the_file(file: Path, capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, out, _ = run(capsys, command, str(file), "--set", "models.a.parallel.ulysses_degree=3")
    assert code == 0
    if command == "check":
        assert out.startswith("a: ulysses_degree=3, each replica takes 3 GPUs")
    else:
        assert yaml.safe_load(out)["applications"][0]["args"]["parallel"]["ulysses_degree"] == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--gpus", "3"], "4 GPUs are needed (a 4), 3 are available"),
        (["--gpus", "4"], None),
        (["--gpus", "7", "--set", "models.a.parallel.ring_degree=2"], "8 GPUs are needed (a 8), 7 are available"),
        (["--cpus", "4"], "5 CPU cores are needed (a 4, b.c 1), 4 are available"),
        (["--set", "models.nobody.max_queued=3"], "nobody"),
        (["--set", "models.a.max_queud=3"], "did you mean"),
        (["--set", "models.a.max_queued=0"], "--set"),
        (["--set", "max_queued"], "max_queued"),
    ],
)
def test_check_against_other_devices_and_values(
    file: Path, capsys: pytest.CaptureFixture[str], flags: list[str], says: str | None
) -> None:
    code, out, err = run(capsys, "check", str(file), *flags)
    assert code == (0 if says is None else 1)
    if says is None:
        assert "ulysses_degree=4" in out
    else:
        assert says in err
        assert err.startswith("error: ")
        assert "Traceback" not in out + err


@pytest.mark.parametrize("size", ["plenty", "0", "-3G"])
def test_a_memory_that_is_no_size_is_wrong_usage(file: Path, capsys: pytest.CaptureFixture[str], size: str) -> None:
    code, out, err = run(capsys, "check", str(file), f"--memory={size}")
    assert (code, out) == (2, "")
    assert err.startswith("error: --memory: expected a size")


BODIES: dict[str, Any] = {
    "/v1/cluster": cluster_object(
        [(FakeBackend().models()["one"], ModelState("waiting", "needs 4 GPUs on one node, the largest node has 2"))],
        [Node({"CPU": 2}, {})],
        [Node({"CPU": 2}, {})],
    ),
    "/v1/requests": {
        "object": "list",
        "data": [
            {
                "id": "mine-0123abcd",
                "object": "request",
                "model": "a",
                "state": "running",
                "position": None,
                "eta_seconds": 3.4,
                "step": 10,
                "total_steps": 20,
                "since": 0.0,
                "key": "web",
                "gateway": "g",
            },
            {
                "id": "b",
                "object": "request",
                "model": "a",
                "state": "queued",
                "position": 1,
                "eta_seconds": None,
                "step": 0,
                "total_steps": 20,
                "since": 0.0,
                "key": None,
                "gateway": "g",
            },
        ],
        "silent_gateways": ["h"],
    },
    "/v1/models": {"object": "list", "data": [model_object(FakeBackend().models()["film"], ModelState("asleep"))]},
}
REFUSAL = {"error": {"message": "a valid API key is required", "type": "", "param": None, "code": "invalid_api_key"}}


class Answers(BaseHTTPRequestHandler):
    """What a server with the key `sesame` says."""

    def do_GET(self) -> None:
        allowed = self.headers.get("authorization") == "Bearer sesame"
        self.send_response(200 if allowed else 401)
        self.end_headers()
        self.wfile.write(json.dumps(BODIES[self.path] if allowed else REFUSAL).encode())

    def do_DELETE(self) -> None:
        known = self.path == "/v1/requests/a%2Fb" and self.headers.get("authorization") == "Bearer sesame"
        self.send_response(200 if known else 404)
        self.end_headers()
        refusal = {"error": {"message": "no request 'c' waits or runs", "type": "", "param": None, "code": ""}}
        self.wfile.write(json.dumps({"id": "a/b", "canceled": True} if known else refusal).encode())

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture
def server() -> Iterator[str]:
    with HTTPServer(("127.0.0.1", 0), Answers) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("command", "path", "table"),
    [("ps", "/v1/cluster", cluster_table), ("models", "/v1/models", models_table),
     ("requests", "/v1/requests", requests_table)],
)  # fmt: skip
@pytest.mark.parametrize("by", ["flag", "variable"])
def test_looking_at_a_server(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str, path: str,
    table: Any, by: str,
) -> None:  # fmt: skip
    monkeypatch.setenv("SPRAY_API_KEY", "sesame")
    if by == "variable":
        monkeypatch.setenv("SPRAY_SERVER", server)
    at = ["--server", server + "/"] if by == "flag" else []
    assert run(capsys, command, *at) == (0, plain(table(BODIES[path])) + "\n", "")
    code, out, _ = run(capsys, command, *at, "--json")
    assert (code, json.loads(out)) == (0, BODIES[path])


def test_what_can_be_served_is_told_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "models", "--supported", "--json")
    assert (code, json.loads(out)["pipelines"]) == (0, supported())
    code, out, _ = run(capsys, "models", "--supported")
    lines = out.splitlines()
    assert code == 0 and len(lines) == len(supported()) + 2
    assert lines[0].split() == ["PIPELINE", "STATUS", "TASKS", "LAYOUTS", "REASON"]
    told = {line.split()[0]: line for line in lines[1:-1]}
    assert told["FluxPipeline"].split()[1] == "served" and "1, u2, r2, t2" in told["FluxPipeline"]
    assert told["LTX2Pipeline"].split()[1] == "refused" and "it makes sound" in told["LTX2Pipeline"]


def test_a_request_is_canceled(
    server: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_API_KEY", "sesame")
    said = "canceled; its gang is free within a step\n"
    assert run(capsys, "cancel", "a/b", "--server", server) == (0, "a/b\n", said)
    assert run(capsys, "cancel", "c", "--server", server) == (1, "", "error: no request 'c' waits or runs\n")


def test_requests_as_a_table() -> None:
    head, running, queued, silent = plain(requests_table(BODIES["/v1/requests"])).splitlines()
    assert head.split() == ["ID", "MODEL", "STATE", "PLACE", "ETA", "KEY", "SINCE", "STEPS"]
    assert running.split()[:7] == ["mine-0123abcd", "a", "running", "-", "3", "s", "web"]
    assert running.split()[-2:] == ["[##########..........]", "10/20"]
    assert queued.split()[:6] == ["b", "a", "queued", "1", "-", "-"]
    assert silent == "no answer from h; requests there are missing"


@pytest.mark.parametrize("command", ["ps", "models", "requests"])
def test_a_server_that_refuses_or_does_not_answer(
    server: str, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    assert run(capsys, command, "--server", server) == (1, "", "error: a valid API key is required\n")
    code, out, err = run(capsys, command, "--server", "http://127.0.0.1:1")
    assert (code, out) == (1, "")
    assert err.startswith("error: no answer from http://127.0.0.1:1")
    assert err.count("\n") == 1


@pytest.mark.parametrize("key", ["ключ", "sésame", "\udcff"])
def test_a_key_may_have_any_letters(monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.setenv("SPRAY_API_KEY", key)
    sent = httpx.Headers(client.authorization())
    assert sent.raw == [(b"authorization", b"Bearer " + os.fsencode(key))]


@pytest.mark.parametrize("key", ["se\nsame", "se\x7fsame"])
def test_a_key_that_no_header_takes_is_said_and_not_shown(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    monkeypatch.setenv("SPRAY_API_KEY", key)
    for command in (["ps"], ["generate", "a", "--output", os.devnull + ".png"]):
        code, out, err = run(capsys, *command)
        assert (code, out) == (1, "")
        assert err.startswith("error: SPRAY_API_KEY has a control character") and "same" not in err


ODD: dict[str, tuple[int, str, bytes, str]] = {
    "a page": (200, "text/html", b"<html>\n<h1>Welcome</h1>", "not as spray does: Expecting value"),
    "nothing": (200, "application/json", b"", "not as spray does: Expecting value"),
    "bytes": (200, "application/json", b"\xff\xfe\xff", "not as spray does: "),
    "a list": (200, "application/json", b"[1, 2]", "expected an object, got [1, 2]"),
    "another object": (200, "application/json", b'{"object": "list"}', " is missing"),
    "other types": (200, "application/json", b'{"devices": 3, "data": 3}', "not as spray does: "),
    "a refusal in HTML": (502, "text/html", b"<html>\n<h1>Bad gateway</h1>", "HTTP 502: <html> <h1>Bad gateway</h1>"),
    "half an envelope": (400, "application/json", b'{"error": {}}', 'HTTP 400: {"error": {}}'),
}


class OddAnswers(BaseHTTPRequestHandler):
    """What servers say that are none of spray, by the first part of the path."""

    def do_GET(self) -> None:
        status, kind, body, _ = ODD[unquote(self.path.split("/")[1])]
        self.rfile.read(int(self.headers.get("content-length", 0)))
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def odd() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), OddAnswers) as listening:
        thread = threading.Thread(target=listening.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}"
        listening.shutdown()
        thread.join()


@pytest.mark.parametrize("case", ODD)
@pytest.mark.parametrize("command", ["ps", "models", "schema one", "generate a --output x.png"])
def test_a_server_of_something_else_is_one_line(
    odd: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, case: str,
    command: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *command.split(), "--server", f"{odd}/{quote(case)}")
    assert (code, out) == (1, ""), err
    status, kind, _, said = ODD[case]
    streams = command.startswith("generate") and status == 200
    assert (f"with {kind}, not with a stream" if streams else said) in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("data: {", "Expecting property name"),
        ("data: 3", "not iterable"),
        ('data: {"type": "a.progress", "step": 1}', "'total_steps' is missing"),
        ('data: {"type": "a.completed", "seed": 1, "metrics": {}}', "'b64_json' is missing"),
        ('data: {"error": {}}', "'message' is missing"),
        ('data: {"step": 1}', "'type' is missing"),
        (": step 1/2", "ended the stream without a result"),
    ],
)
def test_a_stream_of_something_else_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, line: str, said: str
) -> None:
    monkeypatch.setitem(ODD, "stream", (200, "text/event-stream", f"{line}\n\n".encode(), ""))
    with ThreadingHTTPServer(("127.0.0.1", 0), OddAnswers) as listening:
        threading.Thread(target=listening.handle_request).start()
        at = f"http://127.0.0.1:{listening.server_port}/stream"
        code, out, err = run(capsys, "generate", "a", "--output", str(tmp_path / "x.png"), "--server", at)
    assert (code, out) == (1, "")
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(
    "server", ["http://[::1", "http://h\x00", "http://" + "a" * 300, "http://127.0.0.1:x", "here", "ftp://here"]
)
def test_a_server_that_is_no_url_is_one_line(capsys: pytest.CaptureFixture[str], server: str, tmp_path: Path) -> None:
    for command in (["ps"], ["generate", "a", "--output", str(tmp_path / "x.png")]):
        code, out, err = run(capsys, *command, "--server", server)
        assert (code, out) == (1, "")
        assert err.startswith("error: no answer from ") and err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--guidance-scale", "nan"], "--guidance-scale: nan is no number that a request may have"),
        (["--guidance-scale", "inf"], "--guidance-scale: inf"),
        (["--lora", "ink=nan"], "--lora ink: nan"),
        (["--negative-prompt", "a\udcff"], "--negative-prompt: the text is not encoded in UTF-8"),
        (["--model", "a\udcff"], "--model: the text"),
        (["--output", "nowhere/x.png"], "--output: there is no folder 'nowhere'; make it first"),
        (["--output", "x.gif"], "--output must end in "),
        (["--num-frames", "3"], "--num-frames is not for pictures"),
    ],
)
def test_what_no_server_could_be_asked_is_wrong_usage(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: list[str], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, "generate", "a", *flags)
    assert (code, out) == (2, "")
    assert said in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["build", "/nowhere.yaml"],
        ["check", "/nowhere.yaml"],
        ["check", "/nowhere.yaml", "--print-config"],
        ["serve", "/nowhere.yaml"],
        ["deploy", "/nowhere.yaml"],
        ["doctor", "/nowhere.yaml"],
    ],
    ids=" ".join,
)
def test_a_file_that_is_not_there(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (1, "")
    assert err == "error: /nowhere.yaml: cannot be read: No such file or directory\n"


@pytest.mark.parametrize("arguments", [["ps", "--address", "x"], ["deploy"], ["build"], ["no_such_command"], []])
def test_wrong_usage_has_its_own_exit_code(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and err.count("\n") == 1


@pytest.mark.parametrize(("seen", "code"), [((), 0), (("warn",), 0), (("ok", "fail"), 1)])
def test_the_doctor_fails_only_for_what_keeps_gangs_from_running(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, seen: tuple[Any, ...], code: int
) -> None:
    findings = [Finding(f"thing {i}", level, "found", "do this") for i, level in enumerate(seen)]
    monkeypatch.setattr(doctor_command, "diagnose", lambda spec: [Finding("room", "ok", "plenty", ""), *findings])
    found, out, err = run(capsys, "doctor")
    assert found == code
    assert out.splitlines()[0].split() == ["ok", "room", "plenty"]
    assert out.count("-> do this") == len(seen)
    assert err == ("error: not in order: thing 1\n" if code else "")


def test_what_a_person_sees_when_a_server_starts(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec(file)
    cluster = SimpleNamespace(
        address="10.0.0.1:6379",
        metrics_url="http://127.0.0.1:9464/metrics",
        grpc_target="127.0.0.1:9000",
        token_file=None,
    )
    assert serve._banner(spec, cluster) == [  # type: ignore[arg-type]
        "spray on 16 CPU cores and 4 GPUs",
        "  a: ulysses_degree=4 on cuda",
        "  b.c: 1 rank on cpu",
        "gRPC: 127.0.0.1:9000; metrics for Prometheus: http://127.0.0.1:9464/metrics",
        "change it while it runs: spray deploy FILE --address 10.0.0.1:6379",
    ]
    cluster.token_file = "/tmp/spray-x/auth_token"
    (_, command) = serve._banner(spec, cluster)[-1].split(": ")  # type: ignore[arg-type]
    assert command == "RAY_AUTH_TOKEN_PATH=/tmp/spray-x/auth_token spray deploy FILE --address 10.0.0.1:6379"
    several = spec.model_copy(update={"gateway": GatewaySpec(replicas=2)})
    assert serve._banner(several, cluster)[0] == "spray on 16 CPU cores and 4 GPUs, 2 gateways"  # type: ignore[arg-type]
    many = spec.model_copy(update={"models": spec.models * 25})
    assert len(serve._banner(many, cluster)) <= 6  # type: ignore[arg-type]
    assert "  and 48 more models" in serve._banner(many, cluster)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("tasks", "path", "end"),
    [
        (None, "/v1/images/generations", "'"),
        (("text-to-image",), "/v1/images/generations", "'"),
        (("text-to-video",), "/v1/videos/sync", " -o video.mp4"),
    ],
)
def test_the_ready_line_can_be_pasted(file: Path, tasks: Any, path: str, end: str) -> None:
    spec = load_spec(file)
    spec = spec.model_copy(update={"models": (spec.models[0].model_copy(update={"tasks": tasks}),)})
    words = shlex.split(serve._curl("http://127.0.0.1:8000", spec))
    assert words[:2] == ["curl", f"http://127.0.0.1:8000{path}"]
    assert json.loads(words[words.index("-d") + 1]) == {"model": "a", "prompt": "a cup of coffee"}
    assert serve._curl("http://127.0.0.1:8000", spec).endswith(end)
    for auth in (Auth(api_keys_env="KEYS"), Auth(api_keys_file="/keys.yaml")):
        with_keys = spec.model_copy(update={"auth": auth})
        assert "authorization: Bearer KEY" in shlex.split(serve._curl("http://127.0.0.1:8000", with_keys))


def test_port_0_leaves_no_port_to_a_second_server(file: Path) -> None:
    spec = load_spec(file)
    assert (spec.gateway.port, spec.gateway.grpc_port, spec.metrics.port) == (8000, 9000, 9464)
    free = serve._at(spec, 0)
    assert (free.gateway.port, free.gateway.grpc_port, free.metrics.port) == (0, 0, 0)
    other = serve._at(spec, 8001)
    assert (other.gateway.port, other.gateway.grpc_port, other.metrics.port) == (8001, 9000, 9464)
    none = spec.model_copy(
        update={"gateway": spec.gateway.model_copy(update={"grpc_port": None}), "metrics": Metrics(port=None)}
    )
    assert (serve._at(none, 0).gateway.grpc_port, serve._at(none, 0).metrics.port) == (None, None)


@pytest.mark.parametrize("flag", ["--gpus-per-node", "--gpus_per_node"])
def test_flags_are_written_with_either_line(file: Path, capsys: pytest.CaptureFixture[str], flag: str) -> None:
    code, out, err = run(capsys, "check", str(file), "--gpus=8", f"{flag}=2")
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert run(capsys, "check", str(file), "--gpus=8", f"{flag}=4")[0] == 0


@pytest.mark.parametrize(
    ("given", "parsed"),
    [
        (["generate", "-a cup of tea", "--seed", "7"], ["generate", "--seed", "7", "--", "-a cup of tea"]),
        (["generate", "tea", "--negative-prompt", "-no cup"], ["generate", "tea", "--negative-prompt", "-no cup"]),
        (["check", "a.yaml", "--set=models.a.source=/x y"], ["check", "a.yaml", "--set=models.a.source=/x y"]),
        (["generate", "--seed", "7", "--", "-a cup"], ["generate", "--seed", "7", "--", "-a cup"]),
    ],
)
def test_a_prompt_may_begin_with_a_dash(given: list[str], parsed: list[str]) -> None:
    assert _texts_last(given) == parsed


def test_usage_errors_name_the_flag(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "a.yaml", "--gpus", "x"]) == 2
    assert "--gpus" in capsys.readouterr().err


def test_the_shell_completes_commands_and_flags() -> None:
    def completed(words: str) -> list[str]:
        variables = {"_SPRAY_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        command = [sys.executable, "-m", "service.cli.main"]
        return subprocess.run(command, env=os.environ | variables, capture_output=True, text=True).stdout.split()

    assert completed("spray che") == ["check"]
    assert completed("spray deploy --allow") == ["--allow-downtime", "--allow-pending"]


@pytest.mark.parametrize(
    ("raised", "code"), [(KeyboardInterrupt, 130), (TimeoutError("late"), 1), (OSError("disk"), 1)]
)
def test_exit_codes(
    raised: Any, code: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> None:
        raise raised

    monkeypatch.setattr(files, "json_schema", fail)
    found, out, err = run(capsys, "schema")
    assert (found, out) == (code, "")
    assert err == ("stopped\n" if code == 130 else f"error: {raised}\n")
