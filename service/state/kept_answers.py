"""The answers of requests with an idempotency key: one SQLite file and the files of the answers beside it.

The gateway that does the work of a key claims it, with a seed that the work keeps, whoever does it later. When the work
has ended its answer is kept, so that the key always gets the same bytes. One actor of the cluster runs `KeptAnswers`,
on the node of its file; `service.state.idempotency` starts and asks it.
"""

import asyncio
import contextlib
import dataclasses
import json
import logging
import sqlite3
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ray

from service.state.output_folder import ANSWERS, own_folder
from service.state.outputs import OutputStore
from sp_core.degrees import ParallelDegrees
from workers import errors
from workers.errors import Forbidden, OutputNotFound, OutputsUnavailable, SprayError
from workers.gang.caller import is_alive
from workers.messages import GenerationResult
from workers.private_folder import make_private

logger = logging.getLogger("ray.serve")

LOOK_S = 1.0
"""Seconds between two looks of a waiting caller whether the gateway that works for the key still lives."""

LEASE_S = 60.0
"""Seconds without renewal after which a gateway loses its claim, even if it lives."""

MOST_KEYS = 100_000

PERIOD_S = 60.0
"""Seconds between two sweeps of expired answers."""

UNUSED_S = 600.0
"""Seconds without a question after which the actor ends: nothing else would end it. Its file stays."""

TABLE = """
CREATE TABLE IF NOT EXISTS answers_1 (
    scope TEXT PRIMARY KEY,
    fingerprint TEXT NOT NULL,
    seed INTEGER NOT NULL,
    state TEXT NOT NULL,
    token TEXT NOT NULL,
    owner TEXT NOT NULL,
    beat REAL NOT NULL,
    created REAL NOT NULL,
    answer TEXT NOT NULL,
    bytes INTEGER NOT NULL
) WITHOUT ROWID
"""
"""`state`: running; done and failed, with an answer; free, of which only the seed is settled."""

State = Literal["mine", "running", "done", "failed", "reused"]


@dataclass(frozen=True)
class Claim:
    """The state of a request with a key.

    Attributes:
        state: mine: the asking gateway does the work now; running: another gateway does; done, failed: the work has
            ended; reused: the key belongs to another request.
        seed: the seed that the work must use.
        result: the result of work that is done.
        error: the error of work that has failed.
    """

    state: State
    seed: int = 0
    result: GenerationResult | None = None
    error: SprayError | None = None


class KeptAnswers:
    """The actor. All its methods run on one event loop.

    Args:
        folder: `storage.idempotency.folder`; None: with the outputs of this node and cluster.
        ttl_s: how long a key is kept, in seconds.
        max_bytes: bytes of all files. Beyond, the oldest go, and their keys are drawn again with the same seed.
        lives: whether a gateway lives, by its name; blocks.
        is_actor: whether the process exists only for this, and ends when nobody asks.
    """

    def __init__(
        self,
        folder: str | None,
        ttl_s: float,
        max_bytes: int,
        lives: Callable[[str], bool] = is_alive,
        is_actor: bool = False,
    ) -> None:
        self._folder, self._ttl_s, self._max_bytes = folder, ttl_s, max_bytes
        self._lives, self._is_actor = lives, is_actor
        self._files = OutputStore()
        self._opened: sqlite3.Connection | None = None  # since the first call
        self._keys, self._bytes = 0, 0
        self._changed: dict[str, asyncio.Event] = {}  # by scope, for those who wait
        self._seen_alive: dict[str, float] = {}  # gateways: when
        self._used_at = 0.0
        self._sweeping: asyncio.Task[None] | None = None

    async def claim(self, scope: str, fingerprint: str, seed: int, owner: str, token: str, patience_s: float) -> Claim:
        """Claim the work for a key, or learn its state. Asking again with the same token changes nothing.

        Args:
            scope: the key together with its caller.
            fingerprint: of the request.
            seed: the seed of the work, if it is the first for the key.
            owner: the gateway that asks, by its actor's name.
            token: identifies this claim.
            patience_s: seconds to wait while another gateway does the work.

        Raises:
            OutputsFull: nobody does the work, and there is no room for its answer.
            OutputsUnavailable: likewise, and the folder cannot be used.
        """
        self._use()
        until = time.monotonic() + patience_s
        while True:
            found = await self._look(scope, fingerprint, seed, owner, token)
            if found is not None and (found.state != "running" or time.monotonic() >= until):
                return found
            if found is not None:
                changed = self._changed.setdefault(scope, asyncio.Event())
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(changed.wait(), min(LOOK_S, max(0.0, until - time.monotonic())))

    async def renew(self, scope: str, token: str) -> bool:
        """Note that the work of a claim goes on; False: another gateway has taken it over."""
        self._use()
        return self._set("beat = ?", (time.time(),), scope, token)

    async def finish(self, scope: str, token: str, result: GenerationResult, kind: str) -> bool:
        """Keep the answer of a claim; False: another gateway has taken the work over, and its answer counts.

        Args:
            scope: the key together with its caller.
            token: of the claim.
            result: with its files.
            kind: the suffix of the files, such as png.
        """
        self._use()
        kept = [await asyncio.to_thread(self._files.keep, output, kind) for output in result.outputs]
        links = [dataclasses.astuple(link) for link in kept]
        size = sum(map(len, result.outputs))
        answer = json.dumps({"links": links, "result": dataclasses.asdict(dataclasses.replace(result, outputs=()))})
        if self._set("state = 'done', answer = ?, bytes = ?", (answer, size), scope, token):
            self._bytes += size
            self._bound(scope)
            return True
        self._remove(answer)
        row = self._table.execute("SELECT token, state FROM answers_1 WHERE scope = ?", (scope,)).fetchone()
        return bool(row == (token, "done"))  # this call came twice

    async def fail(self, scope: str, token: str, error: SprayError) -> bool:
        """Keep the error of a claim's work; False: another gateway has taken it over."""
        self._use()
        answer = json.dumps({"links": [], "error": [type(error).__name__, error.args]})
        return self._set("state = 'failed', answer = ?", (answer,), scope, token)

    async def release(self, scope: str, token: str) -> None:
        """Give a claim up, so that another gateway may do its work with the same seed."""
        self._use()
        self._set("state = 'free'", (), scope, token)

    async def _look(self, scope: str, fingerprint: str, seed: int, owner: str, token: str) -> Claim | None:
        """The state of a key, which is claimed if nobody works for it. None: it has just changed."""
        now = time.time()
        row = self._table.execute(
            "SELECT fingerprint, seed, state, token, owner, beat, created, answer, bytes"
            " FROM answers_1 WHERE scope = ?",
            (scope,),
        ).fetchone()
        if row is None:
            await asyncio.to_thread(self._files.prepare)  # nothing is drawn whose answer cannot be kept
            values = (scope, fingerprint, seed, "running", token, owner, now, now, "", 0)
            order = "INSERT OR IGNORE INTO answers_1 VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)"
            if not self._table.execute(order, values).rowcount:
                return None
            self._keys += 1
            return Claim("mine", seed)
        known_as, settled, state, holder, holding, beat, created, answer, size = row
        if created + self._ttl_s < now and (state != "running" or beat + LEASE_S < now):
            self._forget(scope, holder)
            return None
        if known_as != fingerprint:
            return Claim("reused")
        if state == "failed":
            return Claim("failed", settled, error=_error(answer))
        if state == "done" and (result := await self._read(answer)):
            return Claim("done", settled, result)
        if holder == token and state == "running":
            return Claim("mine", settled)
        if state == "running" and beat + LEASE_S > now and await self._is_alive(holding):
            return Claim("running", settled)
        await asyncio.to_thread(self._files.prepare)
        taken = self._table.execute(
            "UPDATE answers_1 SET state = 'running', token = ?, owner = ?, beat = ?, answer = '', bytes = 0"
            " WHERE scope = ? AND token = ? AND state = ?",
            (token, owner, now, scope, holder, state),
        )
        if not taken.rowcount:
            return None
        self._bytes -= size
        return Claim("mine", settled)

    def _set(self, what: str, values: tuple[Any, ...], scope: str, token: str) -> bool:
        """Change a claim that still holds, and wake those that wait for it."""
        order = f"UPDATE answers_1 SET {what} WHERE scope = ? AND token = ? AND state = 'running'"
        done = bool(self._table.execute(order, (*values, scope, token)).rowcount)
        if (changed := self._changed.pop(scope, None)) is not None:
            changed.set()
        return done

    async def _read(self, answer: str) -> GenerationResult | None:
        """A kept answer; None if its files are gone.

        Raises:
            OSError, OutputsFull, OutputsUnavailable: they cannot be read now.
        """
        kept = json.loads(answer)
        try:
            files = [await asyncio.to_thread(self._files.find, *_named(link)) for link in kept["links"]]
            outputs = tuple([await asyncio.to_thread(file.read_bytes) for file in files])
        except (Forbidden, OutputNotFound):
            return None
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in kept["result"].items()
        }
        fields |= {"outputs": outputs, "degrees": ParallelDegrees(**fields["degrees"])}
        return GenerationResult(**fields)

    async def _is_alive(self, gateway: str) -> bool:
        if time.monotonic() - self._seen_alive.get(gateway, -LOOK_S) < LOOK_S:
            return True
        alive = await asyncio.to_thread(self._lives, gateway)
        if alive:
            self._seen_alive[gateway] = time.monotonic()
        return alive

    def _bound(self, scope: str) -> None:
        """Remove the oldest answers above `max_bytes`, but not this one."""
        while self._bytes > self._max_bytes or self._keys > MOST_KEYS:
            whole = self._keys > MOST_KEYS
            row = self._table.execute(
                "SELECT scope, token, answer, bytes FROM answers_1 WHERE state != 'running' AND scope != ?"
                f"{'' if whole else ' AND bytes > 0'} ORDER BY created LIMIT 1",
                (scope,),
            ).fetchone()
            if row is None:
                return
            oldest, token, answer, size = row
            if whole:
                self._forget(oldest, token)
                continue
            self._remove(answer)
            self._table.execute("UPDATE answers_1 SET state = 'free', answer = '', bytes = 0 WHERE scope = ?", [oldest])
            self._bytes -= size

    def _forget(self, scope: str, token: str) -> None:
        """Remove a key that nobody works for, with its files."""
        row = self._table.execute(
            "SELECT answer, bytes FROM answers_1 WHERE scope = ? AND token = ? AND (state != 'running' OR beat < ?)",
            (scope, token, time.time() - LEASE_S),
        ).fetchone()
        if row is not None:
            self._remove(row[0])
            self._table.execute("DELETE FROM answers_1 WHERE scope = ?", (scope,))
            self._keys, self._bytes = self._keys - 1, self._bytes - row[1]

    def _remove(self, answer: str) -> None:
        for link in json.loads(answer or '{"links": []}')["links"]:
            with contextlib.suppress(Forbidden, OutputNotFound, OutputsUnavailable):
                self._files.discard(_named(link)[0])

    def _use(self) -> None:
        """Open the file at the first call."""
        self._used_at = time.monotonic()
        if self._opened is not None:
            return
        folder = Path(self._folder) if self._folder else make_private(Path(own_folder()))
        # Beside the outputs, whose bytes have a limit of their own.
        self._files.follow(str(folder / ANSWERS), self._ttl_s)
        self._files.prepare()
        path = folder / "idempotency.sqlite"
        opened = sqlite3.connect(path, isolation_level=None, timeout=5.0, check_same_thread=False)
        for order in ("PRAGMA journal_mode=WAL", "PRAGMA synchronous=FULL", TABLE):
            opened.execute(order)
        self._keys, self._bytes = opened.execute("SELECT count(*), sum(bytes) FROM answers_1").fetchone()
        self._bytes = self._bytes or 0
        self._opened = opened
        self._sweeping = asyncio.create_task(self._sweep_forever())
        ends = (
            "" if self._folder else "; they end with the cluster: storage.idempotency.folder names a place that stays"
        )
        logger.warning("idempotency keys are kept in %s%s", path, ends)

    @property
    def _table(self) -> sqlite3.Connection:
        assert self._opened is not None, "every method of the actor calls _use first"
        return self._opened

    async def _sweep_forever(self) -> None:
        """Remove expired answers, and end when nobody asks anymore."""
        while True:
            await asyncio.sleep(PERIOD_S)
            late = time.time() - self._ttl_s
            try:
                rows = self._table.execute("SELECT scope, token FROM answers_1 WHERE created < ?", (late,)).fetchall()
                for scope, token in rows:
                    self._forget(scope, token)
            except sqlite3.Error as error:
                logger.warning("idempotency keys cannot be swept: %s", error)
            if self._is_actor and time.monotonic() - self._used_at > UNUSED_S:
                ray.actor.exit_actor()  # type: ignore[no-untyped-call]


def _named(link: list[Any]) -> tuple[str, str, str]:
    """The arguments of `OutputStore.find`, from a link in JSON."""
    name, expires, signature = link
    return name, str(expires), signature


def _error(answer: str) -> SprayError:
    """The error that was kept."""
    name, given = json.loads(answer)["error"]
    error: SprayError = getattr(errors, name)(*given)
    return error
