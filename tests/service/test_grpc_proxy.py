"""What `service.rpc.proxy` relies on inside Serve, and where a proxy's gRPC server then listens."""

import asyncio
import inspect
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo
from google.rpc.status_pb2 import Status
from ray.serve._private import default_impl, grpc_util, http_util, proxy
from ray.serve._private.proxy_request_response import ResponseStatus
from ray.serve.config import HTTPOptions, gRPCOptions

from deploy.gateway_spec import GatewaySpec
from deploy.spec import SpecError
from service.api import job_calls
from service.api.errors import GATEWAY_GONE, GATEWAY_LOST
from service.api.origin import MOST_SECONDS
from service.app import check_ports, grpc_options
from service.rollout import local_cluster as local
from service.rpc import health
from service.rpc.proxy import MOST_CALLS, MOST_RECEIVED_BYTES, OPTIONS, SERVICES, at, prepare
from tests.service.test_ports import SPEC
from tests.support.listeners import listeners

ROOT = Path(__file__).resolve().parents[2]

RELIED_ON = [
    (default_impl, "add_grpc_address"),
    (grpc_util, "DEFAULT_GRPC_SERVER_OPTIONS"),
    (http_util, "is_ipv6"),
    (proxy, "set_grpc_code_and_details"),
]


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a test changes of Serve's modules is taken back."""
    for module, name in RELIED_ON:
        monkeypatch.setattr(module, name, getattr(module, name))


def start(port: int) -> set[str]:
    """Start the servers of a proxy for 127.0.0.1 in its order, and return where the one of gRPC listens."""

    async def story() -> set[str]:
        loop = asyncio.get_running_loop()
        where = HTTPOptions(host="127.0.0.1", port=0)
        http, _ = await http_util.start_asgi_http_server(lambda *_: None, where, event_loop=loop)  # type: ignore[arg-type, return-value]
        options = gRPCOptions(**grpc_options(port))
        task, server = await grpc_util.start_grpc_server(
            lambda service_method, streaming_type: None, options, event_loop=loop, enable_so_reuseport=True
        )
        found = {each for each in listeners([os.getpid()]) if each[1] == port}
        await server.stop(None)
        task.cancel()
        http.cancel()
        return {str(address) for address, _ in found}

    return asyncio.run(story())


@pytest.fixture
def held_port() -> Iterator[int]:
    """A port that is held as a local cluster holds it for Serve, which shares it."""
    with local._reserve_port("127.0.0.1", 0, "gateway.grpc_port") as held:
        yield held.getsockname()[1]


def test_a_proxys_grpc_listens_at_the_host_of_http(serve: None, held_port: int) -> None:
    prepare()
    assert start(held_port) == {"127.0.0.1"}
    assert at("fd00::7", "[::]:9000") == "[fd00::7]:9000"
    assert at("0.0.0.0", "[::]:9000") == "0.0.0.0:9000"


def test_without_preparation_it_listens_everywhere(held_port: int) -> None:
    """The control. If this fails, Serve has learned to bind, and `prepare` may go.

    In a process of its own: an earlier test may have prepared this one.
    """
    code = f"from tests.service.test_grpc_proxy import start; print(*start({held_port}))"
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert set(found.stdout.split()) & {"::", "0.0.0.0"}


def test_where_the_host_is_not_seen_it_listens_nowhere(serve: None) -> None:
    prepare()
    with pytest.raises(RuntimeError, match="the host of HTTP is not known"):
        asyncio.run(grpc_util.start_grpc_server(None, gRPCOptions(port=1), event_loop=None))  # type: ignore[arg-type]


def test_messages_are_bounded(serve: None) -> None:
    prepare()
    assert grpc_util.DEFAULT_GRPC_SERVER_OPTIONS == OPTIONS
    assert dict(OPTIONS)["grpc.max_receive_message_length"] == MOST_RECEIVED_BYTES
    assert "DEFAULT_GRPC_SERVER_OPTIONS +" in inspect.getsource(grpc_util.gRPCGenericServer.__init__)


def test_calls_end_and_a_connection_has_only_so_many() -> None:
    """No call that a deployment allows is cut. One call more than a connection may have waits for another to end."""
    given = dict(OPTIONS)
    assert given["grpc.max_connection_age_grace_ms"] >= 1000 * max(MOST_SECONDS, job_calls.LONGEST_S, health.LONGEST_S)
    began, ended = threading.Semaphore(0), threading.Event()

    def never(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        began.release()
        yield b"begun"
        ended.wait(60)

    server = grpc.server(ThreadPoolExecutor(MOST_CALLS + 2), options=[*OPTIONS])
    handler = grpc.unary_stream_rpc_method_handler(never)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.A", {"Never": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        calls = [channel.unary_stream("/a.A/Never")(b"") for _ in range(MOST_CALLS + 1)]
        for _ in range(MOST_CALLS):
            assert began.acquire(timeout=30)
        assert not began.acquire(timeout=0.2)
        ended.set()
        assert [list(call) for call in calls] == [[b"begun"]] * (MOST_CALLS + 1)
    server.stop(None)


def test_a_client_makes_a_new_connection_from_time_to_time_and_loses_no_call() -> None:
    """Each answer tells the connection that it comes by; a call goes on for longer than a connection's age."""
    age_s = 0.2

    def tell_twice(_: bytes, context: grpc.ServicerContext) -> Iterator[bytes]:
        yield context.peer().encode()
        threading.Event().wait(5 * age_s)
        yield context.peer().encode()

    options = dict(OPTIONS) | {"grpc.max_connection_age_ms": int(age_s * 1000)}
    assert set(options) == set(dict(OPTIONS))
    server = grpc.server(ThreadPoolExecutor(1), options=[*options.items()])
    handler = grpc.unary_stream_rpc_method_handler(tell_twice)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("a.A", {"Tell": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        first, again, later, _ = (answer for _ in range(2) for answer in channel.unary_stream("/a.A/Tell")(b""))
    server.stop(None)
    assert first == again != later


class Ended:
    """The context of a call in a proxy."""

    def __init__(self, code: grpc.StatusCode | None = None, **given: str) -> None:
        self.given = given
        self.found: dict[str, Any] = {"code": code, "details": "" if code is None else "ours", "trailing": ()}

    def invocation_metadata(self) -> Any:
        return self.given.items()

    def code(self) -> Any:
        return self.found["code"]

    def details(self) -> Any:
        return self.found["details"]

    def trailing_metadata(self) -> Any:
        return self.found["trailing"]

    def set_code(self, code: Any) -> None:
        self.found["code"] = code

    def set_details(self, details: str) -> None:
        self.found["details"] = details

    def set_trailing_metadata(self, trailing: Any) -> None:
        self.found["trailing"] = trailing


@pytest.mark.parametrize(
    ("own", "code", "told"),
    [
        (None, "INTERNAL", "UNAVAILABLE"),
        (None, "UNAVAILABLE", "UNAVAILABLE"),
        (None, "NOT_FOUND", "UNAVAILABLE"),
        (None, "CANCELLED", None),
        (None, "DEADLINE_EXCEEDED", None),
        (None, "OK", None),
        ("INVALID_ARGUMENT", "OK", None),
        ("INTERNAL", "INTERNAL", None),
    ],
)
def test_what_serve_says_of_a_lost_gateway_is_said_in_our_words(
    serve: None, own: str | None, code: str, told: str | None
) -> None:
    prepare()
    ended = Ended(own and grpc.StatusCode[own])
    proxy.set_grpc_code_and_details(ended, ResponseStatus(grpc.StatusCode[code], message="ray.exceptions: at 10.0.0.1"))
    assert ended.code() == grpc.StatusCode[told or own or code]
    assert ended.details() == (GATEWAY_GONE if told else "ours" if own else "ray.exceptions: at 10.0.0.1")
    rich = dict(ended.trailing_metadata()).get("grpc-status-details-bin", b"")
    assert (GATEWAY_LOST.encode() in rich) == bool(told)


@pytest.mark.parametrize(
    ("named", "code", "told"),
    [
        ("gateway", "NOT_FOUND", "UNAVAILABLE"),  # it is not deployed yet
        ("default", "NOT_FOUND", "NOT_FOUND"),
        ("default", "UNAVAILABLE", "UNAVAILABLE"),  # where there is one application, Serve takes any name for it
    ],
)
def test_an_application_that_is_not_there_is_said_and_not_asked_for_again(
    serve: None, named: str, code: str, told: str
) -> None:
    prepare()
    ended = Ended(application=named)
    proxy.set_grpc_code_and_details(ended, ResponseStatus(grpc.StatusCode[code], message="Application not found."))
    assert ended.code() == grpc.StatusCode[told]
    rich = Status.FromString(dict(ended.trailing_metadata())["grpc-status-details-bin"])
    retries = any(detail.Is(RetryInfo.DESCRIPTOR) for detail in rich.details)
    assert retries == (told == "UNAVAILABLE")
    assert (repr(named) in ended.details()) == (told == "NOT_FOUND")


def test_what_is_relied_on_is_there() -> None:
    assert not hasattr(proxy.gRPCProxy, "__ray_metadata__")  # comes by reference, and finds what is replaced
    assert inspect.getsource(proxy.gRPCProxy).count("set_grpc_code_and_details(context, status)") == 4
    assert "import add_grpc_address" in inspect.getsource(grpc_util.start_grpc_server)  # looked up when it starts
    assert "is_ipv6(http_options.host)" in inspect.getsource(http_util.start_asgi_http_server)
    assert "await" not in inspect.getsource(http_util.start_asgi_http_server)  # its task ends before that of gRPC runs
    starts = inspect.getsource(proxy.ProxyActor.__ray_metadata__.modified_class.__init__)
    order = [starts.index(f"{name}(") for name in ("configure_http_middlewares", "start_asgi_http_server")]
    assert [*order, starts.index("start_grpc_server(")] == sorted([*order, starts.index("start_grpc_server(")])


@pytest.mark.parametrize(("module", "name"), RELIED_ON)
def test_a_proxy_that_cannot_be_prepared_does_not_start(
    monkeypatch: pytest.MonkeyPatch, module: Any, name: str
) -> None:
    monkeypatch.delattr(module, name)
    with pytest.raises(RuntimeError, match="opens the gRPC port of a proxy in another way"):
        prepare()


def test_serve_finds_the_services() -> None:
    assert len(gRPCOptions(**grpc_options(9000)).grpc_servicer_func_callable) == len(SERVICES)
    assert not grpc_options(None)["grpc_servicer_functions"]


def test_a_free_port_is_for_local_clusters_only() -> None:
    with pytest.raises(SpecError, match=r"gateway\.grpc_port: 0 takes a free port for `spray serve`"):
        check_ports(SPEC.model_copy(update={"metrics": SPEC.metrics.model_copy(update={"port": None})}))
    named = SPEC.model_copy(update={"gateway": GatewaySpec(), "metrics": SPEC.metrics.model_copy(update={"port": 1})})
    check_ports(named)


def test_a_grpc_port_that_is_taken_is_said() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(SpecError, match=rf"gateway\.grpc_port: 127\.0\.0\.1:{port} cannot be bound .*--set"):
            local._reserve_port("127.0.0.1", port, "gateway.grpc_port")
