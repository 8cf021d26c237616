"""Jobs that begin with pictures, as their callers see them, where the deployment names a folder of outputs."""

import base64
import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from service.api.rest import rest_app
from service.jobs.store import JobStore
from tests.support.backend import FakeBackend
from tests.support.hostile import colored, file
from tests.support.in_process import served
from workers.errors import JobsUnavailable

FIRST, LAST = file(colored(120, 80)), file(colored(80, 120))


class SharedBackend(FakeBackend):
    """Its jobs and outputs are in folders that the deployment names, once it serves."""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.folder = folder
        self.jobs.follow(str(folder / "jobs"), None, 1000.0)

    @contextlib.contextmanager
    def charge(self, request: Any) -> Iterator[None]:
        """Called in the loop, before anything is kept."""
        self.outputs.follow(str(self.folder / "outputs"), 1000.0)
        yield

    @property
    def files(self) -> list[Path]:
        """What jobs begin with."""
        return sorted((self.folder / "outputs").glob("*.input*"))


@pytest.fixture
def shared(tmp_path: Path) -> SharedBackend:
    return SharedBackend(tmp_path)


@pytest.fixture
def client(shared: SharedBackend) -> Iterator[httpx.Client]:
    with served(rest_app(shared)) as url, httpx.Client(base_url=f"{url}/v1", trust_env=False, timeout=60) as client:
        yield client


def submit(client: httpx.Client, picture: bytes = FIRST, key: str | None = None, **body: Any) -> httpx.Response:
    image = "data:image/png;base64," + base64.b64encode(picture).decode()
    sent = {"model": "one", "prompt": "a cup", "seed": 7, "size": "64x64", "num_frames": 5, "image": image} | body
    return client.post("/videos", json=sent, headers={"idempotency-key": key} if key else {})


def ended(client: httpx.Client, video_id: str) -> dict[str, Any]:
    until = time.monotonic() + 30
    while (video := client.get(f"/videos/{video_id}").json())["status"] not in ("completed", "failed"):
        assert time.monotonic() < until, video
        time.sleep(0.02)
    return dict(video)


def test_a_key_that_comes_again_leaves_no_files(client: httpx.Client, shared: SharedBackend) -> None:
    sent = [submit(client, each, "one") for each in (FIRST, FIRST, LAST)]
    assert [each.status_code for each in sent] == [200, 200, 422]
    assert sent[0].json()["id"] == sent[1].json()["id"]
    assert len(shared.files) == 1
    assert ended(client, sent[0].json()["id"])["status"] == "completed"


def test_a_remix_has_the_pictures_for_itself(client: httpx.Client, shared: SharedBackend) -> None:
    first = submit(client).json()["id"]
    assert ended(client, first)["status"] == "completed"
    other = client.post(f"/videos/{first}/remix", json={"prompt": "a fox"}, headers={"idempotency-key": "two"})
    again = client.post(f"/videos/{first}/remix", json={"prompt": "a fox"}, headers={"idempotency-key": "two"})
    assert (other.status_code, again.json()["id"]) == (200, other.json()["id"])
    assert ended(client, other.json()["id"])["status"] == "completed"
    one, two = shared.requests
    assert (one.inputs, one.prompt, two.prompt) == (two.inputs, "a cup", "a fox")
    assert len(shared.files) == 2
    assert client.delete(f"/videos/{first}").status_code == 200
    assert len(shared.files) == 1
    third = client.post(f"/videos/{other.json()['id']}/remix", json={"prompt": "a jug"}).json()["id"]
    assert ended(client, third)["status"] == "completed"
    assert shared.requests[-1].inputs == one.inputs
    for each in shared.files:
        each.write_bytes(LAST)
    refused = client.post(f"/videos/{third}/remix", json={"prompt": "a jar"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (404, "input_not_found")


def test_a_full_disk_is_507_and_no_job(
    client: httpx.Client, shared: SharedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ended(client, submit(client).json()["id"])["status"] == "completed"
    before = shared.files

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk:
        disk.setattr("service.state.output_folder.os.fsync", full)
        refused = submit(client, LAST)
    assert (refused.status_code, refused.json()["error"]["code"]) == (507, "outputs_full")
    assert shared.files == before
    assert len(client.get("/videos").json()["data"]) == 1
    assert submit(client, LAST).status_code == 200


def test_what_a_store_that_does_not_answer_may_have_taken_stays(
    client: httpx.Client, shared: SharedBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its answer is lost, its job is there: the caller asks again with its key, and gets it."""
    ask, lost = shared.jobs.ask, []

    async def sometimes(call: Any, *args: Any, **kwargs: Any) -> Any:
        answer = await ask(call, *args, **kwargs)
        if call is JobStore.submit and not lost:
            lost.append(answer)
            raise JobsUnavailable("the answer is lost")
        return answer

    monkeypatch.setattr(shared.jobs, "ask", sometimes)
    assert submit(client, key="one").status_code == 503
    assert len(shared.files) == 1
    video = submit(client, key="one").json()
    assert video["id"] == lost[0][0].id
    assert ended(client, video["id"])["status"] == "completed"
    assert len(shared.files) == 1
