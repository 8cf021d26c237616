"""The request of a job: `GenerationRequest` -> JSON that outlives versions -> `GenerationRequest`.

For the APIs, which submit it, and `service.jobs.runner`, which runs it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from service.jobs.records import Job, NewJob, Priority
from workers.messages import GenerationRequest

NOT_KEPT = ("request_id", "deadline_at", "report_steps")
"""What each attempt has of its own."""

REMIXED_FROM = "remixed_from"
"""Beside the fields of a request: the job that it varies."""


def new_job(
    request: GenerationRequest,
    owner: str,
    priority: Priority = "standard",
    deadline_s: float | None = None,
    idempotency_key: str | None = None,
    fingerprint: str = "",
    remixed_from: str | None = None,
) -> NewJob:
    """A request as a job of an owner; the arguments are those of `NewJob`, and the id of the job that it varies."""
    kept: dict[str, Any] = {name: value for name, value in dataclasses.asdict(request).items() if name not in NOT_KEPT}
    if remixed_from is not None:
        kept[REMIXED_FROM] = remixed_from
    return NewJob(
        kind="video" if request.output_format == "mp4" else "image",
        model=request.model,
        owner=owner,
        request=kept,
        work=request.work,
        priority=priority,
        deadline_s=deadline_s,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
    )


def request_of(job: Job) -> GenerationRequest:
    """The request of a job's attempt. Fields that this version does not know are left out: an older one runs on the
    same store while a newer one is rolled out."""
    known = {field.name for field in dataclasses.fields(GenerationRequest)} - set(NOT_KEPT)
    kept: Mapping[str, Any] = {name: value for name, value in job.request.items() if name in known}
    tuples = {"loras": tuple((name, scale) for name, scale in kept["loras"]), "seeds": tuple(kept["seeds"])}
    own = {"request_id": f"{job.id}-{job.fence}", "deadline_at": job.deadline_at, "report_steps": True}
    return GenerationRequest(**{**kept, **tuples, **own})
