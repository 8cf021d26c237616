"""Outputs: files that expire, URLs that nobody makes up, and what HTTP says about both."""

import asyncio
import contextlib
import errno
import os
import shutil
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from service.api.rest import rest_app
from service.state import output_folder, outputs
from service.state.outputs import OutputStore
from service.state.stored import KEY
from tests.support.backend import FakeBackend
from workers.errors import Forbidden, OutputNotFound, OutputsFull, OutputsUnavailable

CONTENT = bytes(range(256)) * 9000


@pytest.fixture
def client(outputs_folder: Path) -> TestClient:
    backend = FakeBackend()
    backend.key = "sesame"  # a signed URL needs none
    return TestClient(rest_app(backend), base_url="http://here:8000")


@pytest.fixture
def url(outputs_folder: Path) -> str:
    return OutputStore().keep(CONTENT, "png").path


def test_what_one_gateway_keeps_the_others_find(outputs_folder: Path) -> None:
    link = OutputStore().keep(CONTENT, "webp")
    assert OutputStore().find(link.name, str(link.expires), link.signature).read_bytes() == CONTENT
    assert stat.S_IMODE(outputs_folder.stat().st_mode) == 0o700
    assert stat.S_IMODE((outputs_folder / KEY).stat().st_mode) == 0o600


def test_gateways_that_start_together_share_one_key(outputs_folder: Path) -> None:
    stores = [OutputStore() for _ in range(16)]
    with ThreadPoolExecutor(16) as pool:
        links = list(pool.map(lambda store: store.keep(b"a", "png"), stores))
    for store in stores:
        for link in links:
            assert store.find(link.name, str(link.expires), link.signature).read_bytes() == b"a"
    assert sorted(file.name for file in outputs_folder.iterdir()) == sorted([KEY, *(link.name for link in links)])


def test_a_link_cannot_be_made_up(outputs_folder: Path) -> None:
    store = OutputStore()
    link, other = store.keep(b"a", "png"), store.keep(b"b", "png")
    expires, signature = str(link.expires), link.signature
    for name, until, signed in (
        (link.name, expires, other.signature),
        (link.name, str(link.expires + 1), signature),
        (other.name, expires, signature),
        (link.name, expires, ""),
        (link.name, expires, "é\udcff"),
        (link.name, "", signature),
        (link.name, "٣", signature),
        ("../key", expires, signature),
    ):
        with pytest.raises(Forbidden):
            store.find(name, until, signed)
    for name in ("../outputs/key", KEY, "a/../key", f"{link.name}.new"):  # signed by mistake
        (outputs_folder / f"{link.name}.new").touch()
        with pytest.raises(OutputNotFound):
            store.find(name, expires, store._sign(name, link.expires))
    assert store.find(link.name, expires, signature)


def test_files_expire_and_are_swept(outputs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        store = OutputStore()
        store.follow(None, 50)
        link = store.keep(b"a", "png")
        store.follow(None, 500)
        later = store.keep(b"b", "png")
        unfinished = f"{'x' * 32}.png.new"
        (outputs_folder / unfinished).touch()  # as older versions named them
        (outputs_folder / (ours := output_folder._new_unfinished(outputs_folder).name)).touch()
        (outputs_folder / "thesis.txt").touch()  # of whoever owns the folder
        now = time.time()
        monkeypatch.setattr(outputs.time, "time", lambda: now + 100)
        with pytest.raises(Forbidden, match="has expired"):
            store.find(link.name, str(link.expires), link.signature)
        store.sweep()
        assert {file.name for file in outputs_folder.iterdir()} == {KEY, later.name, unfinished, ours, "thesis.txt"}
        assert store.find(later.name, str(later.expires), later.signature)
        monkeypatch.setattr(outputs.time, "time", lambda: now + 4000)
        store.sweep()
        assert {file.name for file in outputs_folder.iterdir()} == {KEY, "thesis.txt"}

    asyncio.run(story())


def test_the_sweeper_runs_by_itself(outputs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        monkeypatch.setattr(outputs, "PERIOD_S", 0.01)
        store = OutputStore()
        file = outputs_folder / store.keep(b"a", "png").name
        os.utime(file, (1, 1))
        store.follow(None, 60)
        async with asyncio.timeout(10):
            while file.exists():
                await asyncio.sleep(0.01)

    asyncio.run(story())


def test_what_ended_clusters_have_left_is_swept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPRAY_OUTPUTS_DIR", raising=False)
    monkeypatch.setattr(output_folder.tempfile, "gettempdir", lambda: str(tmp_path))
    monkeypatch.setenv("RAY_RAYLET_PID", "1")
    old = tmp_path / "spray-outputs-1" / OutputStore().keep(b"a", "png").name
    os.utime(old, (1, 1))
    monkeypatch.setenv("RAY_RAYLET_PID", "2")
    (others := tmp_path / "others").mkdir()
    (kept := others / old.name).touch()
    os.utime(kept, (1, 1))
    (tmp_path / "spray-outputs-evil").symlink_to(others)
    OutputStore().sweep()
    assert not old.exists()
    assert kept.exists(), "anybody may put a link there"
    assert (tmp_path / "spray-outputs-1" / KEY).exists()


def test_a_folder_that_was_removed_comes_back(outputs_folder: Path) -> None:
    store = OutputStore()
    store.keep(b"a", "png")
    shutil.rmtree(outputs_folder)
    store.prepare()
    link = store.keep(b"b", "png")
    assert store.find(link.name, str(link.expires), link.signature).read_bytes() == b"b"


def test_a_folder_that_is_given_may_change(tmp_path: Path, outputs_folder: Path) -> None:
    async def story() -> None:
        store = OutputStore()
        store.follow(str(tmp_path / "shared"), 60)
        link = store.keep(b"a", "png")
        assert (tmp_path / "shared" / link.name).exists()
        store.follow(None, 60)
        with pytest.raises(Forbidden):  # another folder has another key
            store.find(link.name, str(link.expires), link.signature)

    asyncio.run(story())


def test_a_file_that_cannot_be_written_leaves_nothing(
    outputs_folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    store = OutputStore()
    store.keep(b"a", "png")

    def full(_: int) -> None:
        raise OSError("no space")

    monkeypatch.setattr(output_folder.os, "fsync", full)
    before = sorted(outputs_folder.iterdir())
    with pytest.raises(OutputsUnavailable, match="cannot be used now"):
        store.keep(b"b", "png")
    assert "no space" in caplog.text
    assert sorted(outputs_folder.iterdir()) == before


@pytest.mark.parametrize("why", [errno.ENOSPC, errno.EROFS], ids=["full", "read-only"])
def test_what_is_kept_is_read_where_nothing_can_be_written_and_removed_if_it_can(
    outputs_folder: Path, monkeypatch: pytest.MonkeyPatch, why: int
) -> None:
    kept, swept = (OutputStore().keep(content, "png") for content in (b"a", b"b"))

    def refuse(*_: Any) -> int:
        raise OSError(why, "not here")

    monkeypatch.setattr(output_folder.os, "open", refuse)
    begun_anew = OutputStore()
    assert begun_anew.find(kept.name, str(kept.expires), kept.signature).read_bytes() == b"a"
    if why == errno.EROFS:
        return
    begun_anew.discard(swept.name)
    os.utime(outputs_folder / kept.name, (1, 1))
    begun_anew.sweep()
    assert [file.name for file in outputs_folder.iterdir()] == [KEY]


def test_a_url_answers_with_the_file(client: TestClient, url: str) -> None:
    for method in ("GET", "HEAD"):
        answer = client.request(method, url)
        assert answer.status_code == 200
        assert answer.content == (CONTENT if method == "GET" else b"")
        assert answer.headers["content-type"] == "image/png"
        assert answer.headers["content-length"] == str(len(CONTENT))
        assert answer.headers["content-disposition"].startswith("inline; filename=")
        assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("tags", "has"),
    [
        ('{}', True),
        ('"x", {}', True),
        ('W/"x",W/{}', True),
        ("W/{}", True),
        ("*", True),
        (" * ", True),
        ('"x"', False),
        ('"x", *', False),
        ("w/{}", False),
        ("", False),
    ],
)  # fmt: skip
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_who_has_the_file_does_not_get_it_again(
    client: TestClient, url: str, tags: str, has: bool, method: str
) -> None:
    etag = client.head(url).headers["etag"]
    answer = client.request(method, url, headers={"if-none-match": tags.format(etag)})
    assert (answer.status_code, answer.headers["etag"]) == (304 if has else 200, etag)
    assert answer.content == (CONTENT if method == "GET" and not has else b"")


def test_tags_may_come_in_several_headers(client: TestClient, url: str) -> None:
    etag = client.head(url).headers["etag"]
    assert client.get(url, headers=[("if-none-match", '"x"'), ("if-none-match", etag)]).status_code == 304


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_url_is_of_the_host_that_the_server_has(outputs_folder: Path, url: str, method: str) -> None:
    """A page whose name was made to point at this machine gets nothing, though it has the URL."""
    backend = FakeBackend()
    backend.local_only = True
    client = TestClient(rest_app(backend))
    assert client.request(method, url, headers={"host": "localhost:8000"}).status_code == 200
    answer = client.request(method, url, headers={"host": "evil.example:8000"})
    assert answer.status_code == 403 and CONTENT not in answer.content
    if method == "GET":
        assert answer.json()["error"]["code"] == "forbidden"
        assert "'evil.example:8000'" in answer.json()["error"]["message"]
    backend.local_only = False
    assert client.request(method, url, headers={"host": "models.example"}).status_code == 200


SIZE = len(CONTENT)
RANGES = [
    ("bytes=0-9", 0, 10),
    ("bytes=5-", 5, SIZE),
    ("bytes=-7", SIZE - 7, SIZE),
    (f"bytes=10-{SIZE * 2}", 10, SIZE),
    (f"bytes=-{SIZE * 2}", 0, SIZE),
    ("bytes=9-5", 0, SIZE),
    ("bytes=-", 0, SIZE),
    ("bytes=0-1,4-5", 0, SIZE),
    ("lines=0-1", 0, SIZE),
    ("bytes=x-1", 0, SIZE),
]


@pytest.mark.parametrize(("asked", "first", "end"), RANGES)
def test_a_range_of_bytes(client: TestClient, url: str, asked: str, first: int, end: int) -> None:
    answer = client.get(url, headers={"range": asked})
    assert answer.content == CONTENT[first:end]
    assert answer.headers["content-length"] == str(end - first)
    assert answer.status_code == (200 if (first, end) == (0, SIZE) else 206)
    assert answer.headers.get("content-range", "") == (
        f"bytes {first}-{end - 1}/{SIZE}" if answer.status_code == 206 else ""
    )


def test_a_range_of_another_file_is_the_whole(client: TestClient, url: str) -> None:
    assert client.get(url, headers={"range": "bytes=0-9", "if-range": '"old"'}).content == CONTENT


@pytest.mark.parametrize("asked", [f"bytes={SIZE}-", "bytes=-0"])
def test_a_range_outside_of_the_file(client: TestClient, url: str, asked: str) -> None:
    answer = client.get(url, headers={"range": asked})
    assert (answer.status_code, answer.headers["content-range"]) == (416, f"bytes */{SIZE}")
    assert answer.json()["error"]["code"] == "range_not_satisfiable"


def test_wrong_and_old_urls_have_the_envelope(client: TestClient, url: str, outputs_folder: Path) -> None:
    path, _, query = url.partition("?")
    for wrong in (
        path,
        f"{path}?expires=1&signature=2",
        f"{path}?{query}0",
        url.replace("/v1/outputs/", "/v1/outputs/a"),
    ):
        answer = client.get(wrong)
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
    for file in outputs_folder.glob("*.png"):
        file.unlink()
    answer = client.get(url)
    assert (answer.status_code, answer.json()["error"]["code"]) == (404, "output_not_found")


def made(client: TestClient, path: str = "/v1/images/generations", **body: Any) -> Any:
    body = {"model": "one", "prompt": "a", "seed": 7} | body
    answer = client.post(path, json=body, headers={"authorization": "Bearer sesame"})
    assert answer.status_code == 200, answer.text
    return answer


def answers_that_keep_files(client: TestClient) -> Iterator[httpx.Response]:
    """To the calls whose pictures are kept: a job, an answer with URLs, and a stream of them."""
    bodies = ({"response_format": "url"}, {"response_format": "url", "stream": True})
    for headers, body in (({"prefer": "respond-async"}, {}), *(({}, body) for body in bodies)):
        yield client.post("/v1/images/generations", json={"model": "one", "prompt": "a"} | body, headers=headers)


def test_nothing_is_computed_for_a_url_that_cannot_be_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path / "file"))
    backend = FakeBackend()
    backend.jobs.follow(str(tmp_path / "jobs"), None, 60.0)
    with TestClient(rest_app(backend)) as client:
        for answer in answers_that_keep_files(client):
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "outputs_unavailable")
            assert answer.headers["retry-after"] == "5"
            assert str(tmp_path) not in answer.text
        assert client.get("/v1/jobs").json()["data"] == []
    assert backend.requests == []


def test_a_folder_that_is_away_for_a_while_is_said(outputs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a network's is: the system cannot even tell whether it is there."""
    store = OutputStore()
    name = store.keep(b"a", "png").name

    def stale(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ESTALE, "Stale file handle")

    calls: list[Callable[[], object]] = [
        store.prepare,
        lambda: store.keep(b"b", "png"),
        lambda: store.file(name),
        lambda: store.discard(name),
    ]
    with monkeypatch.context() as patch:
        for method in ("stat", "mkdir", "is_dir", "open", "unlink"):
            patch.setattr(Path, method, stale)
        for call in calls:
            with pytest.raises(OutputsUnavailable):
                call()
    assert store.file(name).read_bytes() == b"a"


def test_an_answer_may_hold_urls(client: TestClient) -> None:
    answer = made(client, n=2, response_format="url", output_format="webp").json()
    assert [picture["seed"] for picture in answer["data"]] == [7, 8]
    assert all("b64_json" not in picture for picture in answer["data"])
    assert all(abs(picture["expires_at"] - time.time() - 3600) < 60 for picture in answer["data"])
    urls = [picture["url"] for picture in answer["data"]]
    assert all(url.startswith("http://here:8000/v1/outputs/") for url in urls)
    assert [client.get(url).content for url in urls] == [b"picture 7", b"picture 8"]
    assert client.get(urls[0]).headers["content-type"] == "image/webp"


def test_an_answer_that_is_sent_again_takes_no_more_room(client: TestClient, outputs_folder: Path) -> None:
    first, again = (made(client, response_format="url").json()["data"][0]["url"] for _ in range(2))
    assert first.partition("?")[0] == again.partition("?")[0] and client.get(again).content == b"picture 7"
    assert len(list(outputs_folder.glob("*.png"))) == 1
    store = OutputStore()
    names = {store.keep_once(owner, content, "png").name for owner in ("a", "b") for content in (b"1", b"2", b"1")}
    assert len(names) == 4


def test_an_answer_may_be_written_by_two_at_once(
    client: TestClient, outputs_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made(client, response_format="url", seed=1)  # so the key is there
    met = threading.Barrier(2)

    def fsync(_: int) -> None:
        with contextlib.suppress(threading.BrokenBarrierError):
            met.wait(5)

    monkeypatch.setattr(output_folder.os, "fsync", fsync)
    with ThreadPoolExecutor(2) as pool:
        answers = list(pool.map(lambda _: made(client, response_format="url"), range(2)))
    first, second = (answer.json()["data"][0]["url"] for answer in answers)
    assert first.partition("?")[0] == second.partition("?")[0] and not met.broken
    assert client.get(first).content == client.get(second).content == b"picture 7"
    assert not list(outputs_folder.glob("*.new"))


def test_a_full_disk_is_said_and_nothing_is_left(outputs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = OutputStore()
    store.keep(b"a", "png")
    before = sorted(outputs_folder.iterdir())

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(output_folder.os, "fsync", full)
    with pytest.raises(OutputsFull, match="disk"):
        store.keep(b"b", "png")
    assert sorted(outputs_folder.iterdir()) == before
    store.prepare()
    monkeypatch.setattr(output_folder, "LEAST_FREE_BYTES", 1 << 62)
    backend = FakeBackend()
    with TestClient(rest_app(backend)) as client:
        for answer in answers_that_keep_files(client):
            assert (answer.status_code, answer.json()["error"]["code"]) == (507, "outputs_full")
            assert answer.headers["retry-after"] == "5"
        assert client.get("/v1/jobs").json()["data"] == []
    assert backend.requests == []


def test_no_more_is_begun_than_may_be_kept(outputs_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def story() -> None:
        store = OutputStore()
        store.follow(None, 50, max_bytes=1 << 20)
        (outputs_folder.parent / "outputs").mkdir(exist_ok=True)
        (outputs_folder / "thesis.txt").write_bytes(b"a" * (2 << 20))  # of whoever owns the folder
        store.prepare()
        store.keep(b"a" * (1 << 20), "png")
        store.prepare()
        store.keep(b"a", "png")
        with pytest.raises(OutputsFull, match="1048576 bytes"):
            store.prepare()
        now = time.time()
        monkeypatch.setattr(outputs.time, "time", lambda: now + 100)
        store.sweep()
        store.prepare()

    asyncio.run(story())


def test_what_is_written_again_or_discarded_is_counted_once_or_not_at_all(outputs_folder: Path) -> None:
    async def story() -> None:
        store = OutputStore()
        store.follow(None, 50, max_bytes=5)
        store.prepare()
        for _ in range(9):
            store.keep_once("a", b"1234", "png")
        store.prepare()
        links = [store.keep(b"1234", "png") for _ in range(9)]
        with pytest.raises(OutputsFull):
            store.prepare()
        for link in links:
            store.discard(link.name)
            store.discard(link.name)
        store.prepare()
        store.keep(b"12", "png")
        with pytest.raises(OutputsFull):
            store.prepare()

    asyncio.run(story())
