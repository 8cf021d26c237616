"""API keys while a gateway runs: what each may do, and how they change."""

import asyncio
from pathlib import Path

import pytest

from deploy.api_keys import ApiKey, digest
from deploy.spec import SpecError
from service.state import keyring
from service.state.keyring import Allowance, Keyring
from workers.errors import RateLimited


def write(file: Path, *names: str) -> None:
    file.write_text("keys:\n" + "".join(f"- {{name: {name}, sha256: {digest(name)}}}\n" for name in names))


def test_without_keys_anybody_may_call() -> None:
    ring = Keyring()
    assert not ring.open, "not before it is configured"
    ring.configure(None, None)
    assert ring.open


def test_keys_of_a_variable_and_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEYS", "k1, k2,k1")
    write(file := tmp_path / "keys.yaml", "web")

    async def story() -> None:
        ring = Keyring()
        ring.configure("KEYS", str(file))
        assert not ring.open
        found = {given: ring.find(given) for given in ("k1", "k2", "web", "k3", "")}
        assert [key and (key.name, key.scope) for key in found.values()] == [
            ("KEYS.1", "admin"), ("KEYS.2", "admin"), ("web", "generate"), None, None,
        ]  # fmt: skip
        ring.configure("KEYS", None)
        assert ring.find("web") is None

    asyncio.run(story())


def test_the_file_is_read_again_when_it_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keyring, "PERIOD_S", 0.01)
    write(file := tmp_path / "keys.yaml", "old", "kept")

    async def until(ring: Keyring, given: str, there: bool) -> None:
        async with asyncio.timeout(30):
            while (ring.find(given) is not None) != there:
                await asyncio.sleep(0.01)

    async def story() -> None:
        ring = Keyring()
        ring.configure(None, str(file))
        write(other := tmp_path / "next.yaml", "kept", "new")
        other.replace(file)
        await until(ring, "new", True)
        assert ring.find("old") is None
        for broken in ("keys: [", "keys: [{name: 2025-02-30}]"):
            file.write_text(broken)
            await asyncio.sleep(0.2)
        assert ring.find("new") and ring.find("kept"), "what cannot be read changes nothing"
        file.unlink()
        await asyncio.sleep(0.2)
        assert ring.find("new")
        write(file, "kept")
        await until(ring, "new", False)

    asyncio.run(story())


def test_a_configuration_without_usable_keys_leaves_the_former(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(file := tmp_path / "keys.yaml", "web")

    async def story() -> None:
        ring = Keyring()
        with pytest.raises(SpecError, match="NONE"):
            ring.configure("NONE", None)
        assert not ring.open and not ring.configured
        ring.configure(None, str(file))
        for variable, path in (("NONE", None), ("NONE", str(file)), (None, str(tmp_path / "none"))):
            with pytest.raises(SpecError):
                ring.configure(variable, path)
            assert ring.find("web") and not ring.open

    asyncio.run(story())


def test_so_many_at_once_and_no_more() -> None:
    key, allowance = ApiKey(name="a", sha256=digest("a"), max_concurrent=2), Allowance()
    with allowance.take(key, 1), allowance.take(key, 1):
        with pytest.raises(RateLimited, match="'a' has 2 requests that wait or run, at most 2") as found:
            allowance.take(key, 1).__enter__()
        assert found.value.retry_after_s is None
    with allowance.take(key, 1):
        pass


def test_jobs_may_be_submitted_at_once() -> None:
    """They run later, on no caller's time."""
    key, allowance = ApiKey(name="a", sha256=digest("a"), max_concurrent=1), Allowance()
    with allowance.take(key, 1, begun=None), allowance.take(key, 1, begun=None):
        assert allowance.used.running == 0
    with allowance.take(key, 1), pytest.raises(RateLimited), allowance.take(key, 1, begun=None):
        raise AssertionError("the key has a request that runs")


def test_a_caller_who_leaves_the_queue_does_not_pay() -> None:
    key, allowance = ApiKey(name="a", sha256=digest("a"), max_work_per_minute=60.0), Allowance()
    for begun in (False, True):
        with pytest.raises(GeneratorExit), allowance.take(key, 60, lambda begun=begun: begun):
            raise GeneratorExit
        assert bool(allowance.used.spent) == begun


def test_work_is_a_bucket_that_fills_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]  # whole seconds: of others, sums are rounded
    monkeypatch.setattr("service.state.keyring.time.monotonic", lambda: now[0])
    key, allowance = ApiKey(name="a", sha256=digest("a"), max_work_per_minute=60.0), Allowance()
    with allowance.take(key, 40):
        pass
    with pytest.raises(RateLimited, match="60 pixels") as found:
        allowance.take(key, 30).__enter__()
    assert found.value.retry_after_s == pytest.approx(10)
    now[0] += 10
    with allowance.take(key, 30):
        pass
    now[0] += 60
    with allowance.take(key, 600):  # larger than the bucket: allowed when it is full, and paid for afterwards
        pass
    now[0] += 530
    with pytest.raises(RateLimited):
        allowance.take(key, 60).__enter__()
    now[0] += 70
    with allowance.take(key, 60):
        pass
