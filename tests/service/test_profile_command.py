"""`POST /v1/profiles` and `spray profile`, on a gateway without Ray."""

import gzip
import io
import json
import zipfile
from collections.abc import AsyncGenerator, Iterator
from pathlib import Path

import httpx
import pytest

from service.api.backend import Report, Restarted
from service.api.rest import rest_app
from service.cli.main import main
from tests.support.backend import FakeBackend
from tests.support.in_process import served
from workers.errors import AdminOnly
from workers.messages import GenerationRequest, Operator, Profiled

OPERATORS = (Operator("aten::addmm", 12, 0.25, 0.0), Operator("aten::mul", 3, 0.125, 0.0))


class ProfiledBackend(FakeBackend):
    """Two ranks; a caller without the scope `admin`, if a test says so."""

    is_admin = True
    loses_ranks = False

    def admit(self, authorization: str | None, admin: bool = False) -> None:
        if admin and not self.is_admin:
            raise AdminOnly("this needs 'admin'")

    async def _generate(self, request: GenerationRequest) -> AsyncGenerator[Report]:
        for rank in (1, 0):
            trace = gzip.compress(json.dumps({"traceEvents": [{"name": f"of rank {rank}"}]}).encode())
            yield Profiled(rank, trace, OPERATORS, request.num_inference_steps, 2.0, 0.5, 0.125)
            if rank == 1 and self.loses_ranks:
                yield Restarted(2, "rank 0 died")
        async for report in super()._generate(request):
            yield report


@pytest.fixture
def backend() -> ProfiledBackend:
    return ProfiledBackend()


@pytest.fixture
def server(backend: ProfiledBackend, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    monkeypatch.delenv("SPRAY_API_KEY", raising=False)
    monkeypatch.chdir(tmp_path)
    with served(rest_app(backend)) as url:
        monkeypatch.setenv("SPRAY_SERVER", url)
        yield url


def test_the_command_saves_a_trace_of_each_rank_and_says_what_takes_long(
    server: str, backend: ProfiledBackend, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["profile", "one", "--steps", "4", "--width", "64", "--height", "96"]) == 0
    out, err = capsys.readouterr()
    (asked,) = backend.requests
    assert (asked.profile, asked.num_inference_steps, asked.width, asked.height) == (True, 4, 64, 96)
    first, second, *_ = out.splitlines()
    for rank, file in enumerate((first, second)):
        assert file == f"profile-one/rank-{rank}.json"
        assert json.loads(Path(file).read_text())["traceEvents"] == [{"name": f"of rank {rank}"}]
    rows = [line.split() for line in out.splitlines()]
    assert ["0", "500.0", "25%", "25%"] in rows and ["1", "500.0", "25%", "25%"] in rows
    assert ["aten::addmm", "12", "250.00", "0.00"] in rows
    assert "ui.perfetto.dev" in err
    assert json.loads(Path("profile-one/summary.json").read_text())["ranks"][1]["operators"][1]["name"] == "aten::mul"


def test_over_rest(server: str, backend: ProfiledBackend) -> None:
    answer = httpx.post(f"{server}/v1/profiles", params={"model": "film", "num_frames": 5}, trust_env=False)
    assert (answer.status_code, answer.headers["content-type"]) == (200, "application/zip")
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["rank-0.json.gz", "rank-1.json.gz", "summary.json"]
        assert json.loads(archive.read("summary.json"))["num_frames"] == 5
    assert (backend.requests[0].output_format, backend.requests[0].num_inference_steps) == ("mp4", 3)


def test_what_lost_ranks_have_told_is_left_out(server: str, backend: ProfiledBackend) -> None:
    backend.loses_ranks = True
    answer = httpx.post(f"{server}/v1/profiles", params={"model": "one"}, trust_env=False)
    with zipfile.ZipFile(io.BytesIO(answer.content)) as archive:
        assert sorted(archive.namelist()) == ["rank-0.json.gz", "summary.json"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["nope"], "the model 'nope' does not exist"),
        (["paint", "--num-frames", "5"], "'paint'"),
        (["one", "--width", "65536", "--height", "64"], "size 65536x64 is not allowed"),
        (["full"], "does not exist"),
    ],
)
def test_what_cannot_be_profiled(server: str, capsys: pytest.CaptureFixture[str], flags: list[str], said: str) -> None:
    assert main(["profile", *flags]) == 1
    assert said in capsys.readouterr().err
    assert not list(Path().glob("profile-*"))


def test_only_administrators_profile(server: str, backend: ProfiledBackend, capsys: pytest.CaptureFixture[str]) -> None:
    backend.is_admin = False
    assert main(["profile", "one"]) == 1
    assert capsys.readouterr().err == "error: this needs 'admin'\n"
    assert backend.requests == []
    answer = httpx.post(f"{server}/v1/profiles", params={"model": "one"}, trust_env=False)
    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "admin_only")
