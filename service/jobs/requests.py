"""The request of a job: `GenerationRequest` -> JSON that outlives versions -> `GenerationRequest`.

For the APIs, which submit it, and `service.jobs.runner`, which runs it.
"""

import base64
import dataclasses
from collections.abc import Mapping
from typing import Any

from service.jobs.records import Job, NewJob
from workers.messages import GenerationRequest, MediaInput, Priority

NOT_KEPT = ("request_id", "priority", "deadline_at", "report_steps")
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
    webhook_url: str | None = None,
) -> NewJob:
    """A request as a job of an owner; the arguments are those of `NewJob`, and the id of the job that it varies."""
    fields = dataclasses.asdict(request.without_data())
    kept: dict[str, Any] = {name: value for name, value in fields.items() if name not in NOT_KEPT}
    kept["inputs"] = [{"role": each.role, "data": base64.b64encode(each.data).decode()} for each in request.inputs]
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
        webhook_url=webhook_url,
    )


def request_of(job: Job) -> GenerationRequest:
    """The request of a job's attempt. Fields that this version does not know are left out: an older one runs on the
    same store while a newer one is rolled out."""
    known = {field.name for field in dataclasses.fields(GenerationRequest)} - set(NOT_KEPT)
    kept: Mapping[str, Any] = {name: value for name, value in job.request.items() if name in known}
    tuples = {"loras": tuple((name, scale) for name, scale in kept["loras"]), "seeds": tuple(kept["seeds"])}
    tuples["inputs"] = tuple(
        MediaInput(each["role"], base64.b64decode(each["data"])) for each in kept.get("inputs", ())
    )
    own: dict[str, Any] = {"request_id": f"{job.id}-{job.fence}", "priority": job.priority}
    own |= {"deadline_at": job.deadline_at, "report_steps": True}
    return GenerationRequest(**{**kept, **tuples, **own})
