"""Keyring: the API keys of a gateway, and what is left of the allowance of each. For `service.access`.

Keys come from an environment variable, from a file, or from both. The file is read again when it changes, so that keys
can be added and withdrawn without a restart. While it cannot be read, the former keys remain valid.
"""

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from deploy.api_keys import ApiKey, digest, find_key, read_api_keys
from deploy.spec import Auth, SpecError
from service.state.key_use import Use
from workers.errors import InvalidParameter, RateLimited

logger = logging.getLogger("ray.serve")

PERIOD_S = 2.0

MINUTE_S = 60.0

DRAWN_AND_REFUSED = "content_policy_violation"
"""The code of the one refusal that may come after the work: of what a guardrail has seen in the pictures."""


class Allowance:
    """The remaining allowance of one key.

    Work is a bucket that holds a minute's worth and fills up steadily. A request takes its work at once, and may
    overdraw a full bucket, so that no request is too large forever. All gateways share one bucket: each knows what its
    own requests have taken, and what the others reported a moment ago.

    Attributes:
        elsewhere: what requests at other gateways use.
    """

    def __init__(self) -> None:
        self.elsewhere = Use()
        self._running = 0
        self._spent = 0.0
        self._at = time.monotonic()
        self._per_minute = 0.0

    @property
    def used(self) -> Use:
        """What requests of this gateway use."""
        self._fill_up()
        return Use(self._running, self._spent)

    def _fill_up(self) -> None:
        now = time.monotonic()
        own, theirs = self._spent, self.elsewhere.spent
        if filled := self._per_minute * (now - self._at) / MINUTE_S:
            share = own / (own + theirs) if own + theirs else 0.0
            self._spent = max(0.0, own - filled * share)
            self.elsewhere = self.elsewhere._replace(spent=max(0.0, theirs - filled * (1 - share)))
        self._at = now

    @contextlib.contextmanager
    def take(self, key: ApiKey, work: float, begun: Callable[[], bool] | None = lambda: True) -> Iterator[None]:
        """Take the allowance of one request, while it waits and runs. Its work is given back if nothing was computed.

        Args:
            key: with its limits, which may have changed.
            work: pixels x frames x steps x pictures.
            begun: whether a gang has begun with it; None: it is submitted as a job, which does not run meanwhile.

        Raises:
            RateLimited: the allowance is used up.
        """
        running = self._running + self.elsewhere.running
        if key.max_concurrent is not None and running >= key.max_concurrent:
            raise RateLimited(
                f"the key {key.name!r} has {running} requests that wait or run, at most {key.max_concurrent} are "
                "allowed; wait for one of them"
            )
        if key.max_work_per_minute is not None:
            self._per_minute = key.max_work_per_minute
            self._fill_up()
            spent = self._spent + self.elsewhere.spent
            over = spent + min(work, key.max_work_per_minute) - key.max_work_per_minute
            if over > 0:
                raise RateLimited(
                    f"the key {key.name!r} has used its work of this minute, {key.max_work_per_minute:g} pixels x "
                    "frames x steps; try again later",
                    over / key.max_work_per_minute * MINUTE_S,
                )
            self._spent += work
        taken_at = time.monotonic()
        runs = begun is not None
        self._running += runs
        try:
            yield
        except BaseException as error:  # also a caller who leaves
            if key.max_work_per_minute is not None and (begun is None or not begun() or _refused(error)):
                filled = key.max_work_per_minute * (time.monotonic() - taken_at) / MINUTE_S
                self._spent = max(0.0, self._spent - max(0.0, work - filled))  # not what has filled up since
            raise
        finally:
            self._running -= runs


class Keyring:
    """The keys of one gateway. Without any, anybody may call.

    Attributes:
        open: nobody needs a key.
        configured: who may call is known: anybody, or the holders of the keys.
    """

    def __init__(self) -> None:
        self.open = False
        self.configured = False
        self._from_variable: tuple[ApiKey, ...] = ()
        self._from_file: tuple[ApiKey, ...] = ()
        self._file: Path | None = None
        self._read: object = None  # what the file was like when it was read
        self._allowances: dict[str, Allowance] = {}
        self._following: asyncio.Task[None] | None = None

    def configure(self, variable: str | None, file: str | None) -> None:
        """Use the keys of this variable and file from now on.

        Raises:
            SpecError: one of them holds no usable keys. The former keys remain valid; if there were none, nobody may
                call anymore.
        """
        path = Path(file) if file else None
        read = _stamp(path) if path else None
        try:
            from_variable = variable_keys(variable)
            from_file = read_api_keys(path) if path else ()
        except SpecError:
            if self.open:  # keys are asked for: nobody may call without one
                self.open = self.configured = False
            raise
        self.open, self.configured = variable is None and file is None, True
        self._from_variable, self._from_file, self._file, self._read = from_variable, from_file, path, read
        if path is not None and self._following is None:
            self._following = asyncio.get_running_loop().create_task(self._follow())

    def find(self, given: str) -> ApiKey | None:
        """The key that was sent in a header.

        Servers decode headers as latin-1. A client may have meant UTF-8, or latin-1 itself.
        """
        sent = (given.encode("utf-8", "surrogateescape"), given.encode("latin-1", "replace"))
        return find_key((*self._from_variable, *self._from_file), sent)

    def allowance(self, key: ApiKey) -> Allowance:
        """The remaining allowance of the key."""
        return self._allowances.setdefault(key.name, Allowance())

    @property
    def limited(self) -> bool:
        """Whether any key has a limit."""
        return any(key.max_concurrent or key.max_work_per_minute for key in self._from_file)

    def used(self) -> dict[str, Use]:
        """What requests of this gateway use, by key."""
        found = {name: allowance.used for name, allowance in self._allowances.items()}
        return {name: use for name, use in found.items() if any(use)}

    def hear(self, others: Mapping[str, Use]) -> None:
        """Record what requests of other gateways use, by key."""
        for name in {*self._allowances, *others}:
            allowance = self._allowances.setdefault(name, Allowance())
            allowance.elsewhere = others.get(name, Use())

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            if self._file is not None:
                try:
                    await self._read_again(self._file)
                except Exception as error:  # whatever it is, the next change must be read
                    logger.error("%s; the former keys remain valid", error)

    async def _read_again(self, file: Path) -> None:
        """Use the keys of a file that has changed, unless another file was configured meanwhile."""
        stamp = await asyncio.to_thread(_stamp, file)
        if stamp == self._read:
            return
        try:
            keys = await asyncio.to_thread(read_api_keys, file)
        except Exception:
            if file == self._file:
                self._read = stamp  # it is said once
            raise
        if file == self._file:
            self._read, self._from_file = stamp, keys
            logger.info("%s: %d API keys", file, len(keys))


def _refused(error: BaseException) -> bool:
    """Whether the ranks have refused a request before they computed anything."""
    return isinstance(error, InvalidParameter) and error.code != DRAWN_AND_REFUSED


def check_keys(auth: Auth) -> None:
    """Check that a gateway with this environment and these files can read its keys.

    Raises:
        SpecError: it cannot.
    """
    variable_keys(auth.api_keys_env)
    if auth.api_keys_file:
        read_api_keys(Path(auth.api_keys_file))


def variable_keys(variable: str | None) -> tuple[ApiKey, ...]:
    """The comma-separated keys in an environment variable. They may do everything.

    Raises:
        SpecError: the variable holds no key.
    """
    if variable is None:
        return ()
    keys = list(dict.fromkeys(key.strip() for key in os.environ.get(variable, "").split(",") if key.strip()))
    if not keys:
        raise SpecError(
            f"auth.api_keys_env is {variable}, but the gateway's environment holds no keys in it; set it to "
            "comma-separated keys"
        )
    return tuple(
        ApiKey(name=f"{variable}.{number}", sha256=digest(key), scope="admin") for number, key in enumerate(keys, 1)
    )


def _stamp(file: Path) -> object:
    """A value that changes with the file. Kubernetes replaces a mounted secret by another inode."""
    try:
        found = file.stat()
    except OSError as error:
        return error.errno
    return found.st_ino, found.st_size, found.st_mtime_ns
