"""The store of jobs as a gateway reaches it: one actor of the cluster that owns a file of SQLite, or PostgreSQL.

`await jobs.ask(JobStore.get, job_id, owner)` is the same call on either. The file belongs to one process, on the node
where it lies, because SQLite locks files on shared disks badly; the actor is on the head's node, whose loss ends the
cluster anyway. PostgreSQL takes any number of callers, so gateways call it themselves, in threads.

Each call ends in time, whatever hangs: the actor, its start, PostgreSQL or the way to it. Then nobody knows whether it
was carried out. So nothing is acknowledged; what is told twice changes nothing, and what was claimed lapses.

For `service.gateway`, `service.jobs.runner` and the APIs.
"""

import asyncio
import hashlib
import inspect
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, ParamSpec, TypeVar

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.spec import SpecError
from service.jobs import (
    bounded,
    database,
    engines,
    input_notes,
    leases,
    outbox,
    queries,
    records,
    store,
    tables,
    transitions,
)
from service.jobs.engines import CONNECTIONS, open_postgres, open_sqlite
from service.jobs.observed import begin_at_zero, observing_store
from service.jobs.store import JobStore
from service.state.output_folder import own_folder
from service.state.shared_turns import HEAD, NAMESPACE
from workers.errors import JobsUnavailable
from workers.private_folder import make_private

logger = logging.getLogger("ray.serve")

ANSWER_S = 20.0
"""For one call of the actor. It may have to start first, also again: then it is told once more."""

GRACE_S = 1.0
"""Beyond `bounded.CALL_S`, for the answer of a call of PostgreSQL that has just been in time."""

LOOK_S = 5.0
"""Between two looks for an actor that another gateway may have started: each asks Ray's control store. That gateway
runs the first jobs meanwhile."""

PAUSE_S = 0.3
"""Between two tries while the actor starts again."""

FILE = "jobs.db"

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class StoreActor:
    """The actor. Its calls are served one after the other.

    Args:
        folder: `storage.jobs`; None: with the outputs of this node and cluster.
    """

    def __init__(self, folder: str | None) -> None:
        self._folder = folder
        self._store: JobStore | None = None  # since the first call that could open it

    def call(self, method: str, keep_s: float, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call a method of `JobStore`, whose ended jobs are kept for `keep_s` seconds."""
        self._store = self._store or _open_file(self._folder, keep_s)
        self._store.keep_s = keep_s
        return getattr(self._store, method)(*args, **kwargs)


class Jobs:
    """All jobs of the deployment, as one gateway asks for them."""

    def __init__(self) -> None:
        self._folder: str | None = None
        self._url_env: str | None = None
        self._keep_s = 3600.0
        self._actor: Any = None
        self._looked_at = -LOOK_S
        self._own: JobStore | None = None  # PostgreSQL; without a cluster, SQLite too
        self._opening = threading.Lock()
        # Threads of its own: while they wait for a database, files are written by others.
        self._threads = ThreadPoolExecutor(CONNECTIONS, "jobs")
        begin_at_zero()

    def follow(self, folder: str | None, url_env: str | None, keep_s: float) -> None:
        """Keep jobs so from now on.

        Args:
            folder: `storage.jobs`.
            url_env: `storage.jobs_url_env`.
            keep_s: how long ended jobs are kept, in seconds.

        Raises:
            SpecError: the variable holds no URL of PostgreSQL.
        """
        if url_env is not None and not os.environ.get(url_env):
            raise SpecError(
                f"storage.jobs_url_env is {url_env}, but the gateway's environment holds nothing in it; set it to "
                "postgresql://user:password@host/database"
            )
        if (folder, url_env) != (self._folder, self._url_env):
            self._actor = self._own = None
        self._folder, self._url_env, self._keep_s = folder, url_env, keep_s

    async def ask(
        self,
        call: Callable[Concatenate[JobStore, Parameters], Result],
        *args: Parameters.args,
        **kwargs: Parameters.kwargs,
    ) -> Result:
        """The answer of a method of `JobStore`.

        Raises:
            JobsUnavailable: the store cannot be reached, or has not answered in time; it may have done what was asked.
            Exception: what the method raises.
        """
        with observing_store(call.__name__):
            if self._url_env is not None or not ray.is_initialized():
                return await self._ask_own(call, args, kwargs)
            found: Result = await self._ask_actor(call.__name__, args, kwargs)
            return found

    @property
    def shared(self) -> bool:
        """Whether other clusters may have the same store."""
        return self._url_env is not None

    async def in_use(self) -> bool:
        """Whether there may be jobs. Where they end with the cluster, nothing is started before the first one."""
        if self._folder is not None or self._url_env is not None or self._actor is not None:
            return True
        if not ray.is_initialized():
            return self._own is not None
        if time.monotonic() - self._looked_at < LOOK_S:
            return False
        self._looked_at = time.monotonic()
        try:  # one of an older version may have left jobs in the file
            there = await asyncio.to_thread(ray.util.list_named_actors, all_namespaces=True)
        except RayError:
            return False
        return any(each["namespace"] == NAMESPACE and each["name"].startswith(self._place_name) for each in there)

    async def _ask_own(self, call: Callable[..., Result], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Result:
        longest = ANSWER_S if self._url_env is None else bounded.CALL_S
        until = time.monotonic() + longest

        def answer() -> Result:
            own = self._open(until)
            with bounded.until(until):  # nothing begins after that
                return call(own, *args, **kwargs)

        try:
            async with asyncio.timeout(longest + GRACE_S):
                return await asyncio.get_running_loop().run_in_executor(self._threads, answer)
        except TimeoutError:
            raise _away("it has not answered in time") from None

    async def _ask_actor(self, method: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        error = "it has not answered in time"
        try:
            async with asyncio.timeout(ANSWER_S):
                while True:
                    try:
                        actor = self._actor = self._actor or await self._started()
                        return await actor.call.remote(method, self._keep_s, args, kwargs)
                    except RayActorError as ended:  # Ray starts it again on the same node, with the same file
                        error, self._actor = str(ended), None
                        await asyncio.sleep(PAUSE_S)
        except RayTaskError as failed:
            raise failed.cause from None
        except (RayError, ValueError, TimeoutError) as failed:
            self._actor = None
            raise _away(str(failed) or error) from None

    async def _started(self) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._start)

    def _start(self) -> Any:
        """The actor, started if it is not there. Blocks. Gateways of another version have one of their own, which reads
        the same file."""
        heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]  # type: ignore[no-untyped-call]
        head = heads[0] if heads else ray.get_runtime_context().get_node_id()
        made = ray.remote(StoreActor).options(
            name=self._actor_name(),
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",  # else it would end with the gateway that started it
            max_restarts=-1,
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False),  # where its file is
        )
        return made.remote(self._folder)

    @property
    def _place_name(self) -> str:
        """How the names of the actors begin that have this file, whatever their version."""
        return f"jobs-{_digest(json.dumps(self._folder))}-"

    def _actor_name(self) -> str:
        # Whole modules: to find a class in one, inspect parses it, which fails now and then in a thread of Python 3.11.
        parts = (bounded, database, engines, input_notes, leases, outbox, queries, records, store, tables, transitions)
        return self._place_name + _digest("".join(map(inspect.getsource, (*parts, sys.modules[__name__]))))

    def _open(self, until: float) -> JobStore:
        """The store, opened by the first call, whose tables may take longer than a call."""
        if not self._opening.acquire(timeout=max(0.0, until - time.monotonic())):
            raise _away("it is not open yet")
        try:
            if self._own is None:
                if self._url_env is None:
                    self._own = _open_file(self._folder, self._keep_s)
                else:
                    with database.answering():
                        self._own = JobStore(open_postgres(os.environ[self._url_env]), self._keep_s)
            self._own.keep_s = self._keep_s
            return self._own
        finally:
            self._opening.release()


def _open_file(folder: str | None, keep_s: float) -> JobStore:
    try:
        place = make_private(Path(own_folder())) if folder is None else Path(folder)
        with database.answering():
            return JobStore(open_sqlite(place / FILE), keep_s)
    except OSError as error:  # the folder cannot be made or written
        raise _away(str(error)) from None


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _away(error: str) -> JobsUnavailable:
    logger.error("the store of jobs cannot be reached: %s", error)
    return JobsUnavailable("the store of jobs cannot be reached now; try again later")
