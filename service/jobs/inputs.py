"""Pictures and clips that jobs begin with: files beside the outputs, of which a job's row has name, SHA-256 and size.

For `service.api.job_calls`, which keeps them before it submits their job, and `service.jobs.runner`, which reads them
and sweeps those that no job has. They are kept as long as their job, since it may be remixed. A place that the
deployment does not name may end with the cluster, or be one node's, which no accepted job may depend on: there they lie
in a table of the store. Rows of older versions have them in base64.
"""

import asyncio
import base64
import contextlib
import hashlib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from service.jobs.records import Job, NewJob
from service.jobs.requests import asked_of
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.state.outputs import OutputStore, new_input_name
from workers.errors import InputNotFound, JobsUnavailable, OutputNotFound, OutputsUnavailable
from workers.messages import GenerationRequest, MediaInput

logger = logging.getLogger("ray.serve")

STRAY_S = 3600.0
"""Within which a job follows its files. A file without a job that is older is removed."""

SWEPT_AT_ONCE = 100


async def keep(jobs: Jobs, outputs: OutputStore, new: NewJob, inputs: Sequence[MediaInput]) -> NewJob:
    """Keep what a job begins with, before it is submitted.

    Args:
        jobs: the store, which is told of the files first.
        outputs: where they go.
        new: the job.
        inputs: of its request.

    Returns:
        The job that says where they are.

    Raises:
        OutputsFull: there is no room; nothing of them is left.
        OutputsUnavailable: the folder or the bucket cannot be used.
        JobsUnavailable: the store does not.
    """
    if not inputs:
        return new
    if outputs.named:
        names = [new_input_name() for _ in inputs]
        await jobs.ask(JobStore.note_inputs, new.id, names)
        await asyncio.to_thread(_write, outputs, names, inputs)
        rows = [row | {"name": name} for row, name in zip(new.request["inputs"], names, strict=True)]
        return replace(new, request={**new.request, "inputs": rows})
    return replace(new, input_data=tuple(each.data for each in inputs))


async def request_of(jobs: Jobs, outputs: OutputStore, job: Job) -> GenerationRequest:
    """The request of a job's attempt, with what it begins with: to the bit what was accepted.

    Raises:
        InputNotFound: a file is not kept here anymore, or is another one by now.
        OSError: the folder cannot be read.
        OutputsUnavailable: the folder or the bucket cannot be used.
        JobsUnavailable: the store does not answer, which has what it begins with.
    """
    rows = job.request.get("inputs", ())
    in_store = any("name" not in row and "data" not in row for row in rows)
    data = await jobs.ask(JobStore.input_data, job.id) if in_store else {}
    return await asyncio.to_thread(_with_inputs, outputs, job, data)


def discard(outputs: OutputStore, request: Mapping[str, Any]) -> None:
    """Remove what a job begins with; what cannot be removed now is swept later. Blocks."""
    for row in request.get("inputs", ()):
        with contextlib.suppress(OutputsUnavailable):
            outputs.discard(row.get("name", ""))


async def sweep(jobs: Jobs, outputs: OutputStore) -> None:
    """Remove the files of jobs that are not there anymore, or were never submitted."""
    try:
        while outputs.named and (names := await jobs.ask(JobStore.stray_inputs, STRAY_S, SWEPT_AT_ONCE)):
            for name in names:
                await asyncio.to_thread(outputs.discard, name)
            await jobs.ask(JobStore.forget_inputs, names)
    except (JobsUnavailable, OutputsUnavailable) as error:
        logger.warning("what jobs began with cannot be swept, and is tried again: %s", error)


def _write(outputs: OutputStore, names: Sequence[str], inputs: Sequence[MediaInput]) -> None:
    """Write all of them, or none."""
    try:
        for name, each in zip(names, inputs, strict=True):
            outputs.keep_input(name, each.data)
    except BaseException:
        for name in names:
            with contextlib.suppress(OutputsUnavailable):
                outputs.discard(name)
        raise


def _with_inputs(outputs: OutputStore, job: Job, data: Mapping[int, bytes]) -> GenerationRequest:
    rows = enumerate(job.request.get("inputs", ()))
    found = (MediaInput(row["role"], _read(outputs, row, data.get(number))) for number, row in rows)
    return replace(asked_of(job), inputs=tuple(found))


def _read(outputs: OutputStore, row: Mapping[str, Any], data: bytes | None) -> bytes:
    if "data" in row:
        data = base64.b64decode(row["data"])
    elif data is None:
        try:
            data = outputs.input(row.get("name", "")).read_bytes()
        except OutputNotFound:
            raise InputNotFound(
                f"the {row['role']} that the job begins with is not kept here, or not anymore; send it again in a new "
                "request. (Gateways on several nodes need a shared folder: storage.outputs.folder.)"
            ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != row.get("sha256", digest):  # an older version has noted none
        raise InputNotFound(
            f"the {row['role']} that the job begins with was changed where it is kept: its SHA-256 was "
            f"{row['sha256']}, and is {digest}; send it again in a new request"
        )
    return data
