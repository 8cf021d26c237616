"""Writes what a job has made, and tells the store of it. For `service.jobs.runner`.

What was drawn is worth some patience: neither a full disk nor a store that is away throws it away at once.
"""

import asyncio
import contextlib
import hashlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any, TypeVar

from service.api.responses import metrics
from service.jobs.records import Job, JobOutput, LeaseLost
from service.jobs.requests import asked_of
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.outputs import OutputStore, new_output_name
from workers.errors import JobsUnavailable, OutputsFull, OutputsUnavailable
from workers.messages import GenerationResult

logger = logging.getLogger("ray.serve")

AWAY_S = 1.0
"""Between two tries to publish while the store is away, or the outputs cannot be written."""

WRITES = 5
"""Tries to write a file, before its job is drawn again."""

SILENT_S = 300.0
"""For which a folder or bucket may say nothing to one call. Beyond it the call is given up, though its thread cannot be
stopped: another gateway may reach the place."""

FRESH_S = 60.0
"""After which files are written again before they are published. They expire by the time of their writing, and the
store may have been away for longer than they are kept."""

DISCARD_S = 5.0
"""For the removal of files that nobody wants. What is left then expires."""

NOT_NOW = (OSError, OutputsFull, OutputsUnavailable)
"""What may pass."""

Result = TypeVar("Result")


class NotWritten(Exception):
    """The outputs of a job cannot be written."""


class Silent(OSError):
    """A folder or bucket has said nothing for `SILENT_S`."""


async def in_time(work: Awaitable[Result]) -> Result:
    """What `work` returns, which asks a folder or bucket.

    Raises:
        Silent: it has said nothing in time.
        Exception: what `work` raises.
    """
    try:
        async with asyncio.timeout(SILENT_S) as limit:
            return await work
    except TimeoutError:
        if limit.expired():
            raise Silent(f"no answer in {SILENT_S:g} s") from None
        raise


class Results:
    """Publishes the results of one gateway's jobs.

    Args:
        jobs: the store.
        outputs: where finished files go.
    """

    def __init__(self, jobs: Jobs, outputs: OutputStore) -> None:
        self._jobs, self._outputs = jobs, outputs
        self._telling: set[tuple[str, int]] = set()

    def tells(self, job: Job) -> bool:
        """Whether the store is being told of this attempt's result. It may have it, so only the store knows whether the
        files are wanted."""
        return (job.id, job.fence) in self._telling

    async def publish(
        self,
        job: Job,
        result: GenerationResult,
        holding: Callable[[Coroutine[Any, Any, None]], Awaitable[None]],
    ) -> None:
        """Write the outputs, then tell the store, however long it is away.

        Args:
            job: of the runner.
            result: what its attempt has made.
            holding: keeps the lease while something is awaited, and raises `LeaseLost` once it is lost.

        Raises:
            LeaseLost: the job is not this runner's anymore. Its outputs are removed.
            NotWritten: they cannot be written.
        """
        kind = str(asked_of(job).output_format)
        files = {new_output_name(kind): content for content in result.outputs}
        try:
            await holding(self._write(job, files, kind))
            made = []
            for (name, content), seed in zip(files.items(), result.seeds, strict=True):
                digest = await asyncio.to_thread(hashlib.sha256, content)
                made.append(JobOutput(name, kind, len(content), digest.hexdigest(), seed))
        except BaseException:  # cancelled by its caller, for one
            await self._discard(files)
            raise
        self._telling.add((job.id, job.fence))
        try:
            await self._tell(job, result, made, files, kind)
        except LeaseLost:
            await self._discard(files)
            raise
        finally:
            self._telling.discard((job.id, job.fence))

    async def _tell(
        self, job: Job, result: GenerationResult, made: list[JobOutput], files: dict[str, bytes], kind: str
    ) -> None:
        said = (metrics(result), result.warnings, len(result.step_seconds))
        kept_s = self._outputs.ttl_s / 2
        written_at = tried_at = time.monotonic()
        while True:
            try:
                await self._jobs.ask(JobStore.publish, job.id, job.fence, made, *said)
                return
            except JobsUnavailable:
                await asyncio.sleep(AWAY_S)
            if time.monotonic() - tried_at >= min(FRESH_S, kept_s):
                tried_at = time.monotonic()
                try:  # under the same names: the store may have them already, and its answer was lost
                    await self._write(job, files, kind, tries=1)
                    written_at = tried_at
                except NotWritten:  # those of before are there still
                    if tried_at - written_at >= kept_s:
                        raise

    async def _write(self, job: Job, files: dict[str, bytes], kind: str, tries: int = WRITES) -> None:
        """Write files under their names.

        Raises:
            NotWritten: one cannot be written.
        """
        for name, content in files.items():
            for left in reversed(range(tries)):
                try:
                    await in_time(asyncio.to_thread(self._outputs.keep, content, kind, name))
                    break
                except NOT_NOW as error:
                    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
                    if not left or isinstance(error, Silent):
                        raise NotWritten(said) from error
                    logger.warning("an output of job %s cannot be written, and is tried again: %s", job.id, said)
                await asyncio.sleep(AWAY_S)

    async def _discard(self, names: Iterable[str]) -> None:
        with contextlib.suppress(*NOT_NOW):
            async with asyncio.timeout(DISCARD_S):
                for name in names:
                    await asyncio.to_thread(self._outputs.discard, name)
