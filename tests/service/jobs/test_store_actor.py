"""The store's actor on a real Ray, which is killed while gateways submit; and PostgreSQL, which has none."""

import asyncio
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray

from deploy.spec import SpecError
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs, StoreActor
from service.rollout.cluster_folder import place
from service.state.shared_turns import NAMESPACE
from tests.service.jobs.stores import FILM, LEASE_S, new_job
from tests.support.postgres import Postgres
from workers.errors import JobNotFound, JobsUnavailable

KILLS = 2


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ray-", dir=place())
    ray.init(address="local", num_cpus=1, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


def gateway(folder: Path | None) -> Jobs:
    jobs = Jobs()
    jobs.follow(str(folder) if folder else None, None, 60.0)
    return jobs


class Tells(StoreActor):
    """Says in which process it is."""

    def pid(self) -> int:
        return os.getpid()


def test_a_folder_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "jobs"):
        with pytest.raises(JobsUnavailable, match="cannot be reached now"):
            StoreActor(str(folder)).call("page", 60.0, (None,), {})


@pytest.mark.processes
def test_every_gateway_reaches_the_same_jobs(cluster: None, tmp_path: Path) -> None:
    async def story() -> None:
        one, two = gateway(tmp_path), gateway(tmp_path)
        job, _ = await one.ask(JobStore.submit, new_job())
        (held,) = await two.ask(JobStore.claim, {"film": 1}, "two", LEASE_S)
        done = await two.ask(JobStore.publish, job.id, held.fence, [FILM], {})
        assert await one.ask(JobStore.get, job.id, "ann") == done
        with pytest.raises(JobNotFound, match="of yours"):
            await one.ask(JobStore.get, job.id, "bob")

    asyncio.run(story())


@pytest.mark.processes
def test_jobs_that_an_older_version_has_left_are_looked_for(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path / "outputs"))
    monkeypatch.setattr("service.jobs.store_actor.LOOK_S", 0.0)

    async def story() -> None:
        new, other = gateway(None), gateway(tmp_path / "elsewhere")
        assert not await new.in_use()
        old = ray.remote(StoreActor).options(  # type: ignore[call-overload]
            name=f"{new._place_name}of-old", namespace=NAMESPACE, lifetime="detached", num_cpus=0
        )
        kept = old.remote(None)
        await kept.call.remote("page", 60.0, (None,), {})
        assert await new.in_use() and other._place_name != new._place_name
        ray.kill(kept)
        while await new.in_use():
            await asyncio.sleep(0.1)

    asyncio.run(asyncio.wait_for(story(), 60))


@pytest.mark.processes
def test_nothing_starts_before_the_first_job_unless_there_may_be_old_ones(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPRAY_OUTPUTS_DIR", str(tmp_path / "outputs"))
    monkeypatch.setattr("service.jobs.store_actor.LOOK_S", 600.0)  # an actor may take longer to start than real looks

    async def story() -> None:
        first, second = gateway(None), gateway(None)
        assert not await first.in_use() and not await second.in_use()
        await first.ask(JobStore.submit, new_job())
        assert await first.in_use()
        assert not await second.in_use()  # it has just looked
        monkeypatch.setattr("service.jobs.store_actor.LOOK_S", 0.0)
        assert await second.in_use()  # hears of it
        assert await gateway(tmp_path / "of last week").in_use()

    asyncio.run(story())


@pytest.mark.processes
def test_what_was_acknowledged_outlives_the_actor(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.store_actor.StoreActor", Tells)
    monkeypatch.setattr("service.jobs.store_actor.PAUSE_S", 0.05)
    acknowledged: list[str] = []

    async def submit(jobs: Jobs, stop: asyncio.Event) -> None:
        while not stop.is_set():
            acknowledged.append((await jobs.ask(JobStore.submit, new_job()))[0].id)

    async def story() -> None:
        jobs, stop = [gateway(tmp_path), gateway(tmp_path)], asyncio.Event()
        await jobs[0].ask(JobStore.counts)
        actor = jobs[0]._actor
        async with asyncio.timeout(100), asyncio.TaskGroup() as group:
            for each in jobs:
                group.create_task(submit(each, stop))
            for _ in range(KILLS):
                so_far = len(acknowledged)
                pid = await asyncio.to_thread(ray.get, actor.pid.options(max_task_retries=-1).remote())
                while len(acknowledged) < so_far + 5:
                    await asyncio.sleep(0.01)
                os.kill(pid, signal.SIGKILL)
            so_far = len(acknowledged)
            while len(acknowledged) < so_far + 5:
                await asyncio.sleep(0.01)
            stop.set()
        page = await jobs[0].ask(JobStore.page, None, limit=100_000)
        found = [job.id for job in page.jobs]
        assert len(acknowledged) >= 5 * KILLS
        assert sorted(found) == sorted(acknowledged)  # none is missing, and none is there twice
        ray.kill(actor)

    asyncio.run(story())


@pytest.mark.processes
def test_an_actor_that_hangs_or_does_not_start_is_told_in_time(
    cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.jobs.store_actor.StoreActor", Tells)

    async def in_time(jobs: Jobs) -> None:
        async with asyncio.timeout(30):
            with pytest.raises(JobsUnavailable):
                await jobs.ask(JobStore.submit, new_job())

    async def story() -> None:
        jobs = gateway(tmp_path)
        job, _ = await jobs.ask(JobStore.submit, new_job())
        actor = jobs._actor
        pid = await asyncio.to_thread(ray.get, actor.pid.remote())
        monkeypatch.setattr("service.jobs.store_actor.ANSWER_S", 1.0)
        os.kill(pid, signal.SIGSTOP)
        try:
            await in_time(jobs)
        finally:
            os.kill(pid, signal.SIGCONT)
        starts = threading.Event()
        monkeypatch.setattr(Jobs, "_start", lambda _: starts.wait(60) and actor)
        await in_time(jobs)  # it has forgotten the actor, and looks for it
        monkeypatch.setattr("service.jobs.store_actor.ANSWER_S", 60.0)
        starts.set()
        assert (await jobs.ask(JobStore.get, job.id, "ann")) == job
        ray.kill(actor)

    asyncio.run(story())


def test_gateways_ask_postgres_themselves(postgres: Postgres, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JOBS_URL", postgres.url)

    async def story() -> None:
        jobs = Jobs()
        jobs.follow(None, "JOBS_URL", 60.0)
        job, _ = await jobs.ask(JobStore.submit, new_job())
        assert (await jobs.ask(JobStore.get, job.id, "ann")) == job
        assert jobs._own is not None
        jobs._own.close()

    asyncio.run(story())


def test_a_variable_without_a_url_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JOBS_URL", raising=False)
    with pytest.raises(SpecError, match="JOBS_URL"):
        Jobs().follow(None, "JOBS_URL", 60.0)
