"""Outputs in a bucket: all that is promised of a folder holds there, too."""

import asyncio
import io
import random
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import obstore
import pytest
from fastapi.testclient import TestClient
from PIL import Image

from deploy.storage_spec import Outputs
from service.api.rest import rest_app
from service.state import output_bucket
from service.state.output_bucket import Bucket
from service.state.outputs import OutputStore, new_input_name
from service.state.stored import KEY, NAME
from tests.support.backend import FakeBackend
from tests.support.s3 import S3, running_s3
from workers.errors import Forbidden, OutputNotFound, OutputsFull, OutputsUnavailable
from workers.model.media import _video
from workers.model.stills import spritesheet, thumbnail

CONTENT = bytes(range(256)) * 40_000
"""Ten megabytes, which are read by several requests."""

PREFIX = "a/prefix"


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    with running_s3() as server:
        yield server


@pytest.fixture
def url(s3: S3, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A bucket of its own."""
    for name, value in s3.variables.items():
        monkeypatch.setenv(name, value)
    bucket = f"bucket-{abs(hash(request.node.name))}"
    s3.make_bucket(bucket)
    return f"s3://{bucket}/{PREFIX}"


def opened(url: str, **given: Any) -> OutputStore:
    """A store, as a gateway has one."""

    async def run() -> OutputStore:
        store = OutputStore()
        store.follow(**(Outputs(url=url).model_dump() | given))
        assert store._sweeping is not None
        store._sweeping.cancel()
        return store

    return asyncio.run(run())


def names(url: str) -> list[str]:
    return sorted(found["path"] for some in obstore.list(Bucket(url)._store) for found in some)


def test_what_one_gateway_keeps_the_others_find(url: str) -> None:
    first, second = opened(url), opened(url)
    first.prepare()
    link = first.keep(CONTENT, "mp4")
    found = second.find(link.name, str(link.expires), link.signature)
    assert (found.name, found.kind, found.size) == (link.name, "mp4", len(CONTENT))
    assert found.read_bytes() == CONTENT
    assert names(url) == sorted([KEY, link.name])
    assert names(url.removesuffix(f"/{PREFIX}")) == sorted([f"{PREFIX}/{KEY}", f"{PREFIX}/{link.name}"])
    for name, signature in ((link.name, ""), ("x" * 32 + ".mp4", link.signature)):
        with pytest.raises(Forbidden):
            second.find(name, str(link.expires), signature)
    for name in (KEY, f"../{KEY}", "x" * 32 + ".mp4"):
        with pytest.raises(OutputNotFound):
            second.file(name)
    second.discard(link.name)
    second.discard(link.name)
    with pytest.raises(OutputNotFound):
        first.file(link.name)
    with pytest.raises(OutputNotFound):
        found.open().read(1)


def test_gateways_that_start_together_share_one_key(url: str) -> None:
    stores = [opened(url) for _ in range(8)]
    with ThreadPoolExecutor(8) as pool:
        links = list(pool.map(lambda store: store.keep(b"a", "png"), stores))
    assert len({store._key for store in stores}) == 1
    for link in links:
        assert stores[0].find(link.name, str(link.expires), link.signature).read_bytes() == b"a"


def test_files_expire_by_when_they_were_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(url, ttl_s=50.0, max_bytes=1 << 20)
    link = store.keep(b"a" * (1 << 20), "png")
    obstore.put(Bucket(url)._store, "thesis.txt", b"of whoever owns the bucket")
    store.sweep()
    store.prepare()
    store.keep(b"b", "png")
    with pytest.raises(OutputsFull):
        store.prepare()
    now = time.time()
    monkeypatch.setattr(output_bucket.time, "time", lambda: now + 100)
    with pytest.raises(Forbidden, match="has expired"):
        store.find(link.name, str(link.expires), link.signature)
    store.sweep()
    assert [name for name in names(url) if NAME.fullmatch(name)] == []
    assert "thesis.txt" in names(url)
    store.prepare()


def test_what_is_written_again_or_discarded_is_counted_once_or_not_at_all(url: str) -> None:
    store = opened(url, max_bytes=5)
    store.prepare()
    for _ in range(3):
        store.keep_once("a", b"1234", "png")
    store.prepare()
    link = store.keep(b"1234", "png")
    with pytest.raises(OutputsFull):
        store.prepare()
    store.discard(link.name)
    store.prepare()


def test_a_bucket_that_is_away_says_so(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output_bucket, "RETRY_S", 0)
    for missing in ("s3://there-is-no-such-bucket", "s3://there-is-no-such-bucket/a"):
        for call in (OutputStore.prepare, lambda store: store.keep(b"a", "png")):
            with pytest.raises(OutputsUnavailable) as away:
                call(opened(missing))
            assert "no-such-bucket" not in str(away.value)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(OutputsUnavailable):
        opened(url).prepare()


def test_http_is_the_same(url: str) -> None:
    backend = FakeBackend()
    backend.outputs = opened(url)
    client = TestClient(rest_app(backend), base_url="http://here:8000")
    path = backend.outputs.keep(CONTENT, "png").path
    whole = client.get(path)
    assert (whole.content, whole.headers["content-type"]) == (CONTENT, "image/png")
    assert client.get(path, headers={"if-none-match": whole.headers["etag"]}).status_code == 304
    size = len(CONTENT)
    for asked, first, end in (("bytes=0-9", 0, 10), ("bytes=-7", size - 7, size), ("bytes=9999999-", 9_999_999, size)):
        part = client.get(path, headers={"range": asked})
        assert (part.status_code, part.content) == (206, CONTENT[first:end])
        assert part.headers["content-range"] == f"bytes {first}-{end - 1}/{size}"
    assert client.get(path, headers={"range": f"bytes={size}-"}).status_code == 416
    assert client.head(path).headers["content-length"] == str(size)
    assert client.get(path + "0").status_code == 403
    made = client.post(
        "/v1/images/generations", json={"model": "one", "prompt": "a", "seed": 7, "response_format": "url"}
    )
    assert client.get(made.json()["data"][0]["url"]).content == b"picture 7"


def test_stills_of_a_video_are_made_from_there(url: str) -> None:
    """Its index is at its end, and the reader goes back from there."""
    noise = random.Random(1)
    frames = [Image.frombytes("RGB", (160, 160), noise.randbytes(3 * 160 * 160)) for _ in range(25)]
    video = _video(frames, 8)
    assert len(video) > 100_000
    store = opened(url)
    kept = store.file(store.keep(video, "mp4").name)
    for still in (thumbnail, spritesheet):
        with kept.open() as file:
            assert Image.open(io.BytesIO(still(file))).width >= 160


def test_one_place_is_enough() -> None:
    with pytest.raises(ValueError, match="leave one of them out"):
        Outputs(folder="/a", url="s3://bucket")
    for wrong in (
        "s3://",
        "gs://bucket",
        "s3://Bucket",
        "s3://bucket/",
        "s3://bucket/../a b",
        "s3://key:secret@bucket",
    ):
        with pytest.raises(ValueError, match="url"):
            Outputs(url=wrong)


def test_what_jobs_begin_with_is_kept_until_it_is_discarded(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    store = opened(url, ttl_s=50.0, max_bytes=1 << 20)
    assert store.named
    store.prepare()
    store.keep_input(name := new_input_name(), CONTENT)
    assert opened(url).input(name).read_bytes() == CONTENT
    with pytest.raises(OutputsFull):
        store.prepare()
    with pytest.raises(OutputNotFound):
        store.file(name)
    now = time.time()
    monkeypatch.setattr(output_bucket.time, "time", lambda: now + 1e6)
    store.sweep()
    with pytest.raises(OutputsFull):
        store.prepare()
    store.discard(name)
    with pytest.raises(OutputNotFound):
        store.input(name)
    assert names(url) == [KEY]
