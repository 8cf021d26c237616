"""Commands that ask a server: what they print, and that an odd answer, or none, is one line and exit code 1."""

import json
import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import httpx
import pytest

from deploy.support import supported
from service.api.responses import model_object
from service.cli import client
from service.cli.output import cluster_table, models_table, plain, requests_table
from service.state.model_states import ModelState, cluster_object
from tests.support.backend import FakeBackend
from tests.support.command_line import run
from workers.gang.placement import Node


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the variables that name a server or a key."""
    for variable in ("SPRAY_SERVER", "SPRAY_ADDRESS", "SPRAY_API_KEY"):
        monkeypatch.delenv(variable, raising=False)


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
