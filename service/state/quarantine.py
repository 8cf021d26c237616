"""Quarantine: remembers which requests have cost gangs, so that none costs more than `LOSSES`. For `service.dispatch`.

A request is identified by its caller and its body, since a client that retries sends the same body. Each loss is a key
in the key-value store of Ray's head, which all gateways of the cluster read every two seconds, also after a restart.
"""

import asyncio
import dataclasses
import hashlib
import json
import logging
import re
import time
import uuid
from collections.abc import Callable, Iterable
from typing import TypeVar

from service.state.head_store import HeadStore
from workers.errors import RequestQuarantined
from workers.messages import GenerationRequest

logger = logging.getLogger("ray.serve")

Answer = TypeVar("Answer")

LOSSES = 2
"""How many gangs the same request may cost."""

KEPT_S = 600.0
PERIOD_S = 2.0
KEY = re.compile(r"[0-9a-z]+/[0-9.]+/[0-9a-f]+")
"""A key of the store: fingerprint, time, and a unique number."""

NOT_THE_BODY = (
    *("request_id", "report_steps", "seed_drawn", "frames_chosen", "deadline_at", "previews", "traceparent", "profile"),
    "embed_metadata",
)

NOT_IN_ALL = ("inputs", "strength", "extra_params")
"""Fields that count only if they are set, so that older gateways compute the same fingerprint without them."""


def fingerprint(caller: str, request: GenerationRequest, of_job: bool = False) -> str:
    """A digest that is the same for the same request of the same caller, or for the attempts of one job.

    Jobs count alone: many may have one body, and what one of them has lost must not end the others, which are accepted.
    """
    if of_job:
        job_id, _, _fence = request.request_id.rpartition("-")
        return hashlib.sha256(json.dumps([caller, job_id]).encode()).hexdigest()
    body = dataclasses.asdict(request.without_data())
    for name in (*NOT_THE_BODY, *(["seed"] if request.seed_drawn else [])):
        del body[name]
    body["inputs"] = [[each.role, each.digest] for each in request.inputs]
    for name in NOT_IN_ALL:
        if not body[name]:
            del body[name]
    return hashlib.sha256(json.dumps([caller, body], sort_keys=True).encode()).hexdigest()


class Quarantine:
    """The losses of the last `KEPT_S` seconds, by fingerprint."""

    def __init__(self) -> None:
        self._losses: dict[str, dict[str, float]] = {}  # fingerprint -> key -> when
        self._untold: set[str] = set()  # keys of which it is not known that the store has them
        self._shared = HeadStore("spray-losses")
        self._following: asyncio.Task[None] | None = None
        self._clearing: set[asyncio.Task[object]] = set()  # so that they are not collected

    def follow(self) -> None:
        """Read what other gateways count, from now on."""
        self._following = self._following or asyncio.create_task(self._follow())

    def check(self, fingerprint: str) -> None:
        """Refuse a request that has cost too many gangs.

        Raises:
            RequestQuarantined: it has cost too many.
        """
        if self.losses(fingerprint) >= LOSSES:
            raise RequestQuarantined(
                f"this request has cost {LOSSES} gangs within {KEPT_S / 60:g} minutes; it is not tried again so soon"
            )

    def losses(self, fingerprint: str) -> int:
        """How many gangs the request has cost lately."""
        return sum(time.time() - at < KEPT_S for at in self._losses.get(fingerprint, {}).values())

    async def count(self, fingerprint: str) -> int:
        """Add a loss; return how many there are now."""
        at = time.time()
        key = f"{fingerprint}/{at:.3f}/{uuid.uuid4().hex}"
        self._losses.setdefault(fingerprint, {})[key] = at
        self._untold.add(key)
        if await self._tell(self._shared.add, key):
            self._untold.discard(key)
        return self.losses(fingerprint)

    def clear(self, fingerprint: str) -> None:
        """Forget the losses of a request that was answered: they had other causes. The answer waits for no store."""
        for key in self._losses.pop(fingerprint, {}):
            self._untold.discard(key)
            task = asyncio.get_running_loop().create_task(self._tell(self._shared.remove, key))
            self._clearing.add(task)
            task.add_done_callback(self._clearing.discard)

    async def _follow(self) -> None:
        while True:
            await asyncio.sleep(PERIOD_S)
            keys = await self._tell(self._shared.keys)
            if keys is not None:
                await self._take(key for key in keys if KEY.fullmatch(key))

    async def _take(self, keys: Iterable[str]) -> None:
        """Replace the known losses by these keys, and delete keys that are too old."""
        found: dict[str, dict[str, float]] = {}
        for key in keys:
            fingerprint, at, _ = key.split("/")
            if time.time() - float(at) < KEPT_S:
                found.setdefault(fingerprint, {})[key] = float(at)
            else:
                await self._tell(self._shared.remove, key)
        for key in self._untold:  # counted while the store was read, or while the head is away
            fingerprint, at, _ = key.split("/")
            found.setdefault(fingerprint, {})[key] = float(at)
        self._losses = found

    async def _tell(self, call: Callable[..., Answer], *args: str) -> Answer | None:
        """Call the store in a thread, since it blocks. While the head is away, each gateway counts for itself."""
        if not self._shared.connected():
            return None
        try:
            return await asyncio.to_thread(call, *args)
        except Exception as error:
            logger.warning("the losses of requests cannot be shared: %s", error)
            return None
