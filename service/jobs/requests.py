"""The request of a job: `GenerationRequest` -> JSON that outlives versions -> `GenerationRequest`.

For the APIs, which submit and tell it. The bytes of pictures are not here but in `service.jobs.inputs`, which adds them
for `service.jobs.runner`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

from service.jobs.records import Job, NewJob
from workers.messages import GenerationRequest, Priority

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
    """A request as a job of an owner; the arguments are those of `NewJob`, and the id of the job that it varies.

    One with pictures cannot be run before `service.jobs.inputs.keep` has said where they are.
    """
    fields = dataclasses.asdict(request.without_data())
    kept: dict[str, Any] = {name: value for name, value in fields.items() if name not in NOT_KEPT}
    kept["inputs"] = [{"role": each.role, "sha256": each.digest, "size": len(each.data)} for each in request.inputs]
    if remixed_from is not None:
        kept[REMIXED_FROM] = remixed_from
    return NewJob(
        kind="video" if request.output_format == "mp4" else "image",
        model=request.model,
        owner=owner,
        request=kept,
        work=round(request.work * request.steps_asked / request.num_inference_steps),
        priority=priority,
        deadline_s=deadline_s,
        idempotency_key=idempotency_key,
        fingerprint=fingerprint,
        webhook_url=webhook_url,
    )


def asked_of(job: Job) -> GenerationRequest:
    """The request of a job's attempt, to tell of it: without its pictures, so `service.jobs.inputs` has the one to run.

    Fields that this version does not know are left out: an older one runs on the same store while a newer one is rolled
    out.
    """
    known = {field.name for field in dataclasses.fields(GenerationRequest)} - set(NOT_KEPT) - {"inputs"}
    kept: Mapping[str, Any] = {name: value for name, value in job.request.items() if name in known}
    tuples = {"loras": tuple((name, scale) for name, scale in kept["loras"]), "seeds": tuple(kept["seeds"])}
    own: dict[str, Any] = {"request_id": f"{job.id}-{job.fence}", "priority": job.priority}
    own |= {"deadline_at": job.deadline_at, "report_steps": True}
    return GenerationRequest(**{**kept, **tuples, **own})
