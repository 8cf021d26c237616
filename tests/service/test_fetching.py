"""Pictures by URL: from the operator's hosts alone, over https, at addresses that were checked, within limits."""

import asyncio
import datetime
import functools
import http.server
import socket
import ssl
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from fastapi.testclient import TestClient

from deploy.gateway_spec import GatewaySpec
from service.api import fetching
from service.api.fetching import with_fetched
from service.authorities import authorities
from service.public_address import is_public, public_address
from tests.support.backend import FakeBackend
from tests.support.hostile import colored, file
from workers.errors import InvalidParameter

PICTURE = file(colored(64, 48))
FIELDS = frozenset({"image", "mask"})
HOST = "images.example.com"


class Handler(http.server.BaseHTTPRequestHandler):
    encodings: list[str | None] = []  # noqa: RUF012
    seen: list[tuple[str, str]] = []  # noqa: RUF012  # of the one server of these tests

    def do_GET(self) -> None:  # http.server's name
        Handler.seen.append((self.path, self.headers["host"]))
        Handler.encodings.append(self.headers["accept-encoding"])
        if self.path == "/elsewhere":
            self.send_response(302)
            self.send_header("location", "https://169.254.169.254/")
            self.end_headers()
            return
        self.send_response(404 if self.path == "/absent" else 200)
        self.end_headers()
        self.wfile.write(PICTURE * (100 if self.path == "/long" else 1))

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def port(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    """Of a server at loopback, with a certificate for the host that only these tests trust."""
    folder = tmp_path_factory.mktemp("tls")
    key, name = ec.generate_private_key(ec.SECP256R1()), x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, HOST)])
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(HOST)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    chain, secret = folder / "cert.pem", folder / "key.pem"
    chain.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    secret.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(chain, secret)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(chain))
        trusted = ssl.create_default_context(cafile=str(chain))
        patch.setattr(fetching, "authorities", lambda: trusted)
        yield server.server_address[1]
    server.shutdown()
    server.server_close()


@pytest.fixture
def at_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names are at loopback, and that counts as public."""
    resolve(monkeypatch, "127.0.0.1")
    looked_up = functools.partial(public_address, allowed=lambda address: address == "127.0.0.1")
    monkeypatch.setattr(fetching, "public_address", looked_up)


def resolve(monkeypatch: pytest.MonkeyPatch, *addresses: str) -> list[str]:
    asked: list[str] = []

    async def getaddrinfo(_loop: Any, host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", getaddrinfo)
    return asked


def fetch(raw: Any, *hosts: str, most: int = 1 << 20) -> Any:
    return asyncio.run(with_fetched(raw, FIELDS, hosts, most))


def test_urls_of_named_hosts_become_bytes(port: int, at_loopback: None) -> None:
    host, url = f"{HOST}:{port}", f"https://{HOST}:{port}/cup.png?a=b"
    assert fetch({"image": url, "prompt": "https://a"}, host) == {"image": PICTURE, "prompt": "https://a"}
    assert Handler.seen[-1] == ("/cup.png?a=b", host)
    assert Handler.encodings[-1] == "identity"
    several = {"image": [{"image_url": url}, "data:,"], "mask": {"image_url": url.replace("images", "IMAGES")}}
    assert fetch(several, host) == {"image": [PICTURE, "data:,"], "mask": PICTURE}


@pytest.mark.parametrize(
    ("path", "said"),
    [("/absent", "answered 404"), ("/elsewhere", "answered 302"), ("/long", "larger than 9000 bytes")],
)
def test_what_is_no_picture_is_not_taken(port: int, at_loopback: None, path: str, said: str) -> None:
    with pytest.raises(InvalidParameter, match=said) as refused:
        fetch({"image": f"https://{HOST}:{port}{path}"}, f"{HOST}:{port}", most=9000)
    assert refused.value.param == "image"


def test_the_server_must_have_the_certificate_of_the_host(port: int, at_loopback: None) -> None:
    other = f"other.example.com:{port}"
    with pytest.raises(InvalidParameter, match="could not be asked for the URL: ConnectError"):
        fetch({"image": f"https://{other}/"}, other)


URLS = [
    "http://images.example.com/a.png",
    "https://example.com/a.png",
    "https://images.example.com.evil.org/",
    "https://images.example.com@evil.org/",
    "https://user@images.example.com/",
    "https://images.example.com:8443/",
    "https://127.0.0.1/",
    "https://[::1]/",
    "https://images.example.com:x/",
    "file:///etc/passwd",
    "//images.example.com/",
    "images.example.com",
    "https://images.example.com/a b",
    "https://images.example.com/\r\nhost:a",
    "",
]


@pytest.mark.parametrize("url", URLS, ids=repr)
def test_other_urls_are_not_asked(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    asked = resolve(monkeypatch, "127.0.0.1")
    with pytest.raises(InvalidParameter) as refused:
        fetch({"image": url}, HOST)
    assert refused.value.param == "image" and asked == []


def test_a_url_that_nobody_can_send_is_the_callers_mistake(at_loopback: None) -> None:
    with pytest.raises(InvalidParameter, match="could not be asked for the URL") as refused:
        fetch({"image": f"https://{HOST}/{'a' * 70_000}"}, HOST)
    assert refused.value.param == "image"


PRIVATE = ["127.0.0.1", "10.1.2.3", "172.16.0.1", "192.168.1.1", "169.254.169.254", "100.64.0.1", "0.0.0.0", "::1",
           "fe80::1",
           "fd00::1", "::ffff:10.0.0.1", "64:ff9b::a00:1", "2002:a00:1::", "224.0.0.1", "ff02::1"]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_no_address_of_a_network_of_ones_own_is_asked(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    asked = resolve(monkeypatch, "93.184.215.14", address)
    with pytest.raises(InvalidParameter, match="not of the public internet"):
        fetch({"image": f"https://{HOST}/"}, HOST)
    assert asked == [HOST]
    assert is_public("93.184.215.14")


def test_a_name_is_resolved_once(monkeypatch: pytest.MonkeyPatch, port: int, at_loopback: None) -> None:
    """What was checked is what is connected to: a second answer of the name counts for nothing."""
    asked = resolve(monkeypatch, "127.0.0.1")
    fetch({"image": f"https://{HOST}:{port}/"}, f"{HOST}:{port}")
    assert asked == [HOST]


def test_all_of_it_has_a_limit_of_time(monkeypatch: pytest.MonkeyPatch) -> None:
    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.sleep(60)

    monkeypatch.setattr(fetching, "SECONDS", 0.01)
    monkeypatch.setattr(asyncio.BaseEventLoop, "getaddrinfo", never)
    with pytest.raises(InvalidParameter, match=r"within 0\.01 s"):
        fetch({"image": f"https://{HOST}/"}, HOST)


def test_without_hosts_nothing_is_fetched(client: TestClient, backend: FakeBackend) -> None:
    body = {"prompt": "a", "model": "one", "image": f"https://{HOST}/"}
    answer = client.post("/v1/images/edits", json=body)
    assert "no URL is fetched" in answer.json()["error"]["message"]


def test_a_body_without_urls_costs_no_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(httpx, "AsyncClient", None)
    monkeypatch.setattr(fetching, "authorities", None)
    for raw in ({"prompt": "a"}, {"image": "data:,"}, {"image": [b"a", "data:,"], "mask": None}):
        assert fetch(raw, HOST) == raw


def test_certificates_are_read_once_and_not_on_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[threading.Thread] = []
    monkeypatch.setattr(httpx, "create_ssl_context", lambda **_: read.append(threading.current_thread()))
    monkeypatch.setattr(fetching, "authorities", trusted := functools.cache(authorities.__wrapped__))
    for _ in range(2):
        with pytest.raises(InvalidParameter):
            fetch({"image": "https://elsewhere.example/"}, HOST)
    assert trusted.cache_info().misses == len(read) == 1 and read[0] is not threading.main_thread()


def test_a_route_fetches(port: int, at_loopback: None, client: TestClient, backend: FakeBackend) -> None:
    backend.media_hosts = (f"{HOST}:{port}",)
    body = {"prompt": "a", "model": "one", "image": {"image_url": f"https://{HOST}:{port}/"}}
    assert client.post("/v1/images/edits", json=body).status_code == 200
    assert [each.role for each in backend.requests[-1].inputs] == ["image"]
    other = client.post("/v1/images/edits", json=body | {"image": "https://example.com/"})
    assert (other.status_code, other.json()["error"]["param"]) == (400, "image")


@pytest.mark.parametrize(
    "host", ["https://example.com", "example.com:443", "10.0.0.1", "localhost", "Example.com", "a b.c"]
)
def test_hosts_are_names(host: str) -> None:
    with pytest.raises(ValueError, match="is no name of a host"):
        GatewaySpec(media_hosts=(host,))
    assert GatewaySpec(media_hosts=("images.example.com:8443",)).media_hosts
