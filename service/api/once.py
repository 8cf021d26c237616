"""Does a request with an `Idempotency-Key` once: sending it again gives the same answer. For both APIs.

A request and its key come in; its reports go out, as the backend yields them. Of several calls with one key the first
does the work, and the others wait for its answer. If the work ends without an answer, one of them does it again, with
the same seed. A key belongs to the API key that sent it and to the content of the request; the form of the answer (a
stream, a URL) may differ.
"""

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field, replace

from service.api.backend import Backend, Report, Waiting
from service.api.observed import key_name
from service.api.shares import Places
from service.deadline import within
from service.state.kept_answers import Claim
from service.state.quarantine import fingerprint
from workers.errors import GangLost, IdempotencyKeyReused, InvalidParameter, KeysUnavailable, RequestFailed
from workers.messages import GenerationRequest, GenerationResult

KEY_HEADER = "idempotency-key"
"""The header of REST's requests, and the metadata of gRPC's."""

REPLAYED_HEADER = "idempotency-replayed"
"""The header of an answer to a key that was known before."""

LONGEST = 255

BEAT_S = 15.0
"""Seconds between two renewals of a claim by the gateway that works for it."""

PATIENCE_S = 5.0
"""Seconds between two reports to a caller that waits for another call's answer."""

MOST_WAITING, MOST_OF_ONE = 200, 50
"""The most calls of one gateway that wait for the answers of others, so that slots remain for requests: of all callers,
and of one key."""

KEPT = (RequestFailed, GangLost)
"""Errors that end the work for a key. After any other error the next call with the key does it again."""

_waiting = Places()


@dataclass
class Attempt:
    """A request that is about to run, or whose answer is known.

    Attributes:
        reports: the reports of the request.
        headers: headers of the answer.
    """

    reports: AsyncGenerator[Report]
    headers: dict[str, str] = field(default_factory=dict)


async def begin(backend: Backend, request: GenerationRequest, key: str | None) -> Attempt:
    """The reports of a request; if its key is known, those of the earlier request. Iterate them at once.

    Args:
        backend: runs the request.
        request: what is asked for.
        key: the caller's key; None: there is none.

    Raises:
        InvalidParameter: the key is malformed.
        IdempotencyKeyReused: it belongs to another request.
        KeysUnavailable: keys cannot be looked up.
    """
    if key is None:
        return Attempt(backend.generate(request))
    check_key(key)
    once = _Once(backend, request, key)
    claim = await once.claim(0.0)
    if claim.state == "mine":
        return Attempt(once.work(claim.seed))
    return Attempt(within(request.deadline_at, once.wait()), {REPLAYED_HEADER: "true"})


def check_key(key: str) -> None:
    """Refuse a malformed key.

    Raises:
        InvalidParameter: the key is malformed.
    """
    if not (0 < len(key) <= LONGEST and key.isascii() and key.isprintable()):
        raise InvalidParameter(KEY_HEADER, f"{KEY_HEADER} must be 1 to {LONGEST} printable characters of ASCII")


class _Once:
    """One request with a key."""

    def __init__(self, backend: Backend, request: GenerationRequest, key: str) -> None:
        self._backend, self._request = backend, request
        self._keys = backend.idempotency
        caller = backend.caller()
        self._scope, self._fingerprint = self._keys.scope(caller, key), fingerprint(caller, request)
        self._token = uuid.uuid4().hex

    async def claim(self, patience_s: float) -> Claim:
        """See `KeptAnswers.claim`.

        Raises:
            IdempotencyKeyReused: the key belongs to another request.
        """
        claim = await self._keys.claim(self._scope, self._fingerprint, self._request.seed, self._token, patience_s)
        if claim.state == "reused":
            raise IdempotencyKeyReused(
                f"this {KEY_HEADER} was sent with another request; send the same again, or take a new key"
            )
        return claim

    async def work(self, seed: int) -> AsyncGenerator[Report]:
        """The reports of the work, whose answer is kept before it is yielded."""
        renewing, ended = asyncio.create_task(self._renew()), False
        try:
            async with contextlib.aclosing(self._backend.generate(replace(self._request, seed=seed))) as reports:
                async for report in reports:
                    if isinstance(report, GenerationResult):
                        report = replace(report, created_at=time.time())
                        kind = str(self._request.output_format)
                        ended = await self._keys.finish(self._scope, self._token, report, kind)
                        if not ended:  # another was thought to be the one, and its answer counts
                            break
                    yield report
        except KEPT as error:
            ended = await self._keys.fail(self._scope, self._token, error)
            raise
        finally:
            renewing.cancel()
            if not ended:
                self._keys.let_go(self._scope, self._token)
        if not ended:
            async with contextlib.aclosing(self.wait()) as others:
                async for report in others:
                    yield report

    async def wait(self) -> AsyncGenerator[Report]:
        """Wait for the answer of another call, or do the work here if that call gives it up."""
        what = f"wait for the answers of others with the same {KEY_HEADER}; try again later"
        with _waiting.taken(key_name.get(), MOST_WAITING, MOST_OF_ONE, what):
            while (claim := await self.claim(PATIENCE_S)).state == "running":
                state = self._backend.states().get(self._request.model)
                if state is not None:
                    yield Waiting(state)
        if claim.error is not None:
            raise claim.error
        if claim.result is not None:
            yield claim.result
            return
        async with contextlib.aclosing(self.work(claim.seed)) as reports:
            async for report in reports:
                yield report

    async def _renew(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            with contextlib.suppress(KeysUnavailable):
                await self._keys.renew(self._scope, self._token)
