"""`/v1/videos`: OpenAI's life of a video, by its client, on a gateway without Ray."""

import io
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from service.api.rest import rest_app
from tests.support.backend import FakeBackend
from tests.support.in_process import served
from workers.messages import GenerationRequest
from workers.model.media import encode

BODY = {"model": "film", "prompt": "a cup", "seed": 7}


@pytest.fixture
def url(backend: FakeBackend) -> Iterator[str]:
    with served(rest_app(backend)) as url:
        yield f"{url}/v1/videos"


def until(url: str, *states: str) -> dict[str, Any]:
    deadline = time.monotonic() + 30
    while (video := httpx.get(url).json())["status"] not in states:
        assert time.monotonic() < deadline, video
        time.sleep(0.02)
    return dict(video)


def test_openais_client_makes_fetches_lists_and_deletes(url: str) -> None:
    client = openai.OpenAI(base_url=url.removesuffix("/videos"), api_key="none")
    video = client.videos.create(
        prompt="a cup", model="film", seconds="4", size="64x64", extra_body={"fps": 2, "seed": 7}
    )
    assert (video.status, video.seconds, video.size) == ("queued", "4.5", "64x64")
    done = client.videos.poll(video.id)
    assert (done.status, done.progress, done.error) == ("completed", 100, None)
    content = client.videos.download_content(video.id).read()
    sync = httpx.post(f"{url}/sync", json=BODY | {"size": "64x64", "seconds": 4, "fps": 2})
    assert content == sync.content
    other = client.videos.create(prompt="another", model="film")
    assert [each.id for each in client.videos.list(limit=1)] == [other.id, video.id]
    assert client.videos.delete(video.id).deleted
    with pytest.raises(openai.NotFoundError) as found:
        client.videos.retrieve(video.id)
    assert found.value.code == "job_not_found"


def test_a_video_is_told_as_it_is(url: str) -> None:
    created = httpx.post(url, json=BODY | {"priority": "batch", "deadline_s": 100})
    assert created.status_code == 200
    assert created.headers["openai-poll-after-ms"] == "1000"
    video = until(f"{url}/{created.json()['id']}", "completed")
    assert (video["seed"], video["num_frames"], video["fps"], video["priority"]) == (7, 5, 16, "batch")
    assert (video["step"], video["total_steps"], video["attempt"]) == (1, 1, 1)
    assert video["metrics"]["layout"]
    assert video["expires_at"] > video["completed_at"] >= video["created_at"]


@pytest.mark.parametrize(
    ("path", "headers"), [("videos", {}), ("images/generations", {"prefer": "respond-async"})], ids=["video", "picture"]
)
def test_who_waits_for_so_long_has_a_job_that_ends_by_then(url: str, path: str, headers: dict[str, str]) -> None:
    base = url.removesuffix("/videos")
    body = BODY if path == "videos" else BODY | {"model": "one"}

    def deadline_s(given: str, **also: Any) -> Any:
        answer = httpx.post(f"{base}/{path}", json=body | also, headers=headers | {"x-request-timeout-seconds": given})
        if answer.is_error:
            return answer.status_code, answer.json()["error"]["param"]
        job = httpx.get(f"{base}/jobs/{answer.json()['id']}").json()
        return round(job["deadline_at"] - job["created_at"])

    assert deadline_s("60") == 60
    assert deadline_s("60", deadline_s=100) == 100
    assert deadline_s("soon") == (400, "x-request-timeout-seconds")


def test_content_has_ranges_and_a_name(url: str) -> None:
    video = httpx.post(url, json=BODY).json()
    until(f"{url}/{video['id']}", "completed")
    whole = httpx.get(f"{url}/{video['id']}/content")
    part = httpx.get(f"{url}/{video['id']}/content", headers={"range": "bytes=1-2"})
    assert (part.status_code, part.content) == (206, whole.content[1:3])
    assert whole.headers["content-type"] == "video/mp4"
    assert whole.headers["content-disposition"] == f'attachment; filename="{video["id"]}.mp4"'
    assert httpx.get(f"{url}/{video['id']}/content?variant=poster").status_code == 400


def test_a_failure_is_an_answer(url: str) -> None:
    video = httpx.post(url, json=BODY | {"prompt": "failed"}).json()
    found = httpx.get(f"{url}/{video['id']}")
    failed = until(f"{url}/{video['id']}", "failed")
    assert found.status_code == 200
    assert failed["error"] == {"code": "generation_failed", "message": "rank 1: MemoryError"}
    content = httpx.get(f"{url}/{video['id']}/content")
    assert (content.status_code, content.json()["error"]["code"]) == (409, "job_not_ready")
    assert content.headers["x-should-retry"] == "false"
    assert "MemoryError" in content.json()["error"]["message"]


def test_a_video_is_cancelled_and_its_gang_freed(url: str, backend: FakeBackend) -> None:
    video = httpx.post(url, json=BODY | {"prompt": "never"}).json()
    until(f"{url}/{video['id']}", "in_progress")
    waiting = httpx.post(url, json=BODY).json()
    assert httpx.get(f"{url}/{waiting['id']}").json()["position"] == 1
    cancelled = httpx.post(f"{url}/{video['id']}/cancel").json()
    assert (cancelled["status"], cancelled["error"]["code"]) == ("failed", "cancelled")
    assert httpx.post(f"{url}/{video['id']}/cancel").json() == cancelled
    until(f"{url}/{waiting['id']}", "completed")
    assert backend.closed


def test_others_see_nothing(url: str, backend: FakeBackend) -> None:
    backend.key = "ann"
    ann, bob = {"authorization": "Bearer ann"}, {"authorization": "Bearer bob"}
    video = httpx.post(url, json=BODY, headers=ann).json()
    backend.key = "bob"
    for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/content"), ("POST", "/cancel")):
        answer = httpx.request(method, f"{url}/{video['id']}{path}", headers=bob)
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "job_not_found")
    assert httpx.get(url, headers=bob).json()["data"] == []
    backend.key = "ann"
    assert len(httpx.get(url, headers=ann).json()["data"]) == 1


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"stream": True}, "stream"),
        ({"response_format": "url"}, "response_format"),
        ({"priority": "urgent"}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"model": "paint"}, "model"),
    ],
)
def test_what_a_job_cannot_be_is_refused(url: str, wrong: dict[str, Any], param: str) -> None:
    answer = httpx.post(url, json=BODY | wrong)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert httpx.get(url).json()["data"] == []


def test_a_form_may_have_fields_only(url: str) -> None:
    fields = {name: str(value) for name, value in BODY.items()} | {
        "seconds": "4",
        "fps": "2",
        "priority": "interactive",
    }
    assert httpx.post(url, files={name: (None, value) for name, value in fields.items()}).status_code == 200
    answer = httpx.post(url, data=fields, files={"input_reference": io.BytesIO(b"x")})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")


def test_pages_follow_each_other(url: str) -> None:
    ids = [httpx.post(url, json=BODY).json()["id"] for _ in range(3)]
    first = httpx.get(url, params={"limit": 2}).json()
    assert ([each["id"] for each in first["data"]], first["has_more"]) == (ids[:0:-1], True)
    rest = httpx.get(url, params={"limit": 2, "after": first["last_id"]}).json()
    assert ([each["id"] for each in rest["data"]], rest["has_more"]) == (ids[:1], False)
    assert [each["id"] for each in httpx.get(url, params={"order": "asc"}).json()["data"]] == ids
    assert httpx.get(url, params={"limit": 0}).status_code == 400


def test_the_same_key_is_the_same_video(url: str) -> None:
    key = {"idempotency-key": "k"}
    body = {"model": "film", "prompt": "a cup"}  # its seed is drawn
    first, again = (httpx.post(url, json=body, headers=key) for _ in range(2))
    assert first.json()["id"] == again.json()["id"]
    assert [each.headers.get("idempotency-replayed") for each in (first, again)] == [None, "true"]
    other = httpx.post(url, json=body | {"prompt": "another"}, headers=key)
    assert (other.status_code, other.json()["error"]["code"]) == (422, "idempotency_key_reuse")
    assert httpx.post(url, json=body, headers={"idempotency-key": "k" * 256}).status_code == 400
    assert len(httpx.get(url).json()["data"]) == 1


def test_what_is_no_id_does_not_reach_the_database(url: str) -> None:
    missing, wrong = httpx.get(f"{url}/%00"), httpx.get(f"{url}?after=%00")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "job_not_found")
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "after")


def test_a_video_has_pictures_of_itself(url: str, backend: FakeBackend, tmp_path: Path) -> None:
    video = until(f"{url}/{httpx.post(url, json=BODY).json()['id']}", "completed")
    (file,) = (tmp_path / "outputs").glob("*.mp4")
    request = GenerationRequest("a", "film", "a", 64, 32, 1, seed=7, num_frames=5, output_format="mp4")
    file.write_bytes(encode([Image.new("RGB", (64, 32))] * 5, request))
    for variant, kind, size in (("thumbnail", "webp", (64, 32)), ("spritesheet", "jpeg", (192, 64))):
        answer = httpx.get(f"{url}/{video['id']}/content", params={"variant": variant})
        assert (answer.status_code, answer.headers["content-type"]) == (200, f"image/{kind}")
        assert Image.open(io.BytesIO(answer.content)).size == size
        named = f'attachment; filename="{video["id"]}-{variant}.{kind}"'
        assert answer.headers["content-disposition"] == named
        tag = {"if-none-match": answer.headers["etag"]}
        assert httpx.get(f"{url}/{video['id']}/content", params={"variant": variant}, headers=tag).status_code == 304
    waits = httpx.post(url, json=BODY | {"prompt": "never"}).json()["id"]
    refused = httpx.get(f"{url}/{waits}/content", params={"variant": "thumbnail"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_ready")
    assert httpx.post(f"{url}/{waits}/cancel").status_code == 200
