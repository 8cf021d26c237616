"""The requests that wait or run: `GET /v1/requests` and `/v1/requests/{id}`; `DELETE` ends a request from elsewhere.

Any gateway answers for all gateways. A caller sees its own requests; with the scope `admin`, or if no key is needed,
all.
"""

import re
from typing import Any

from fastapi import APIRouter

from service.api.answers import CanceledRequest, RequestList, RequestObject
from service.api.backend import Backend, Served
from service.api.openapi import ERRORS, READING_ERRORS
from workers.errors import GatewaySilent, InvalidParameter, RequestNotFound

router = APIRouter(prefix="/requests")

ONE = READING_ERRORS | {400: ERRORS[400]}


@router.get("", response_model=RequestList, responses=READING_ERRORS)
async def list_requests(backend: Served) -> dict[str, Any]:
    """All requests that wait or run."""
    found = await backend.find_requests()
    return {"object": "list", "data": found.requests, "silent_gateways": found.silent}


@router.get("/{id}", response_model=RequestObject, responses=ONE)
async def retrieve_request(id: str, backend: Served) -> dict[str, Any]:
    """One request, by its id or by the x-request-id that it came with."""
    return await _find(backend, id)


@router.delete("/{id}", response_model=CanceledRequest, responses=ONE)
async def cancel_request(id: str, backend: Served) -> dict[str, Any]:
    """End a request. Whoever waits for it gets 499, and its gang is free within a step."""
    found = await _find(backend, id)
    if not await backend.cancel(found["id"]):
        raise RequestNotFound(f"the request {found['id']!r} has just ended")
    return {"id": found["id"], "object": "request.canceled", "canceled": True}


async def _find(backend: Backend, given: str) -> dict[str, Any]:
    """The request of this id, or the only one that came with it as x-request-id.

    Raises:
        RequestNotFound: there is none.
        GatewaySilent: a gateway that may have it did not answer.
        InvalidParameter: several requests came with it.
    """
    found = await backend.find_requests()
    named = [each for each in found.requests if each["id"] == given]
    named = named or [each for each in found.requests if re.fullmatch(re.escape(given) + "-[0-9a-f]{8}", each["id"])]
    if len(named) > 1:
        ids = ", ".join(each["id"] for each in named[:10])
        raise InvalidParameter("id", f"{len(named)} requests came as {given!r}: {ids}; name one of them")
    if named:
        return named[0]
    if found.silent:
        raise GatewaySilent(f"no request {given!r} is known, but {', '.join(found.silent)} did not answer; ask again")
    raise RequestNotFound(f"no request {given!r} waits or runs; see /v1/requests")
