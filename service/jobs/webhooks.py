"""Tells callers of the end of their jobs: one POST to the URL that a job came with, signed by Standard Webhooks.

What has to be sent is in the store since its job ended, see `service.jobs.outbox`. Every gateway looks for it, takes it
by lease and sends it; what does not arrive is sent again, later and later, for a day. So a receiver hears at least
once, and knows by `webhook-id` what it has heard before. Only hosts of the deployment's list are called, never by an
address that is not public: a host is looked up once, and called at the address that was looked at. For
`service.gateway` and `service.api.job_calls`.
"""

import asyncio
import contextlib
import logging
import os
import random
import re
import time
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Literal

import httpx
from standardwebhooks import Webhook

from deploy.gateway_spec import is_loopback
from deploy.spec import SpecError
from service.authorities import authorities
from service.jobs.outbox import host_of
from service.jobs.records import Delivery
from service.jobs.store import JobStore
from service.jobs.store_actor import Jobs
from service.public_address import AddressRefused, is_public, public_address
from workers.errors import InvalidParameter, JobsUnavailable
from workers.metrics import WEBHOOKS

logger = logging.getLogger("ray.serve")

FIELD = "webhook_url"
"""Its name in both APIs."""

LONGEST = 2000
VISIBLE = re.compile(r"[!-~]+")

PERIOD_S = 1.0
"""Between two looks for what has to be sent."""

GIVE_UP_S = 60.0
"""Between two looks for what nobody has sent in time."""

LEASE_S = 60.0
"""After which another gateway sends what this one has said nothing of."""

ANSWER_S = 20.0
"""For one attempt, from looking the host up to the status of the answer."""

AT_ONCE = 32
"""Attempts of one gateway at the same time."""

AT_ONCE_PER_HOST = 8
"""Of these to one host, so that one which is slow leaves room for the others; and so that none is flooded when many
jobs end together."""

AGAIN_S = (5.0, 30.0, 120.0, 600.0, 1800.0, 3600.0, 7200.0, 14_400.0)
"""Before the second attempt, the third, and so on; the last one holds for all others. Each is up to a tenth longer."""

GONE = 410
"""The status by which a receiver says that it wants no more of it."""

Outcome = Literal["delivered", "refused", "unreachable", "given_up"]


class Webhooks:
    """The webhooks of a deployment, as one gateway checks and sends them.

    Args:
        jobs: the store.
    """

    def __init__(self, jobs: Jobs) -> None:
        self._jobs = jobs
        self._hosts: frozenset[str] = frozenset()
        self._keys: tuple[Webhook, ...] = ()
        self._sending: dict[str, tuple[Delivery, asyncio.Task[None]]] = {}
        self._following: asyncio.Task[None] | None = None
        self._gave_up_at = -GIVE_UP_S

    def follow(self, hosts: Sequence[str], key_env: str | None) -> None:
        """Allow and call these hosts from now on.

        Args:
            hosts: `gateway.webhook_hosts`.
            key_env: `gateway.webhook_key_env`.

        Raises:
            SpecError: the variable holds no keys.
        """
        keys = _read_keys(key_env) if key_env is not None and hosts else ()
        self._hosts, self._keys = frozenset(hosts), keys
        self._following = self._following or asyncio.get_running_loop().create_task(self._follow())

    def check(self, url: str) -> None:
        """Refuse a URL that will not be called.

        Raises:
            InvalidParameter: it is malformed, or its host is not one of the deployment's.
        """
        try:
            _parsed(url, self._hosts)
        except ValueError as error:
            raise InvalidParameter(FIELD, f"{FIELD} {error}") from None

    async def _follow(self) -> None:
        while True:
            try:
                gives_up = time.monotonic() - self._gave_up_at >= GIVE_UP_S
                if gives_up:
                    self._gave_up_at = time.monotonic()
                if (self._hosts or gives_up) and await self._jobs.in_use():
                    await self._send_due()
                    if gives_up:
                        await self._give_up()
            except JobsUnavailable:  # the log has why
                pass
            except Exception:  # whatever it is, the next ones must be sent
                logger.exception("webhooks cannot be sent")
            await asyncio.sleep(PERIOD_S)

    async def _give_up(self) -> None:
        if count := await self._jobs.ask(JobStore.give_up_webhooks, self._hosts):
            WEBHOOKS.labels("given_up").inc(count)
            said = "%d webhooks are given up after a day: no gateway.webhook_hosts has their hosts"
            logger.warning(said, count)

    async def _send_due(self) -> None:
        most, room = AT_ONCE - len(self._sending), self._room()
        for delivery in await self._jobs.ask(JobStore.due_webhooks, most, LEASE_S, room) if most and room else ():
            task = asyncio.get_running_loop().create_task(self._send(delivery))
            self._sending[delivery.id] = delivery, task
            task.add_done_callback(lambda _, sent=delivery.id: self._sending.pop(sent, None))  # type: ignore[misc]

    def _room(self) -> dict[str, int]:
        """By host, how many more may be called now; in another order each time, so that no host is always the last."""
        busy = Counter(host_of(delivery.url) for delivery, _ in self._sending.values())
        hosts = random.sample(sorted(self._hosts), len(self._hosts))
        return {host: max(0, AT_ONCE_PER_HOST - busy[host]) for host in hosts}

    async def _send(self, delivery: Delivery) -> None:
        """One attempt. If the store is away afterwards, the lease ends, and the receiver hears once more."""
        outcome: Outcome = "unreachable"
        said = ""
        try:
            async with asyncio.timeout(ANSWER_S):
                status = await self._post(delivery)
            outcome = "delivered" if 200 <= status < 300 else "given_up" if status == GONE else "refused"
            said = f"it answers with status {status}"
        except (httpx.HTTPError, OSError, TimeoutError, AddressRefused) as error:
            said = str(error) or type(error).__name__
        except ValueError as error:  # its host is not allowed here anymore, but may be in another cluster
            outcome, said = "refused", f"its URL {error}"
        except Exception as error:  # whatever it is, it counts as an attempt: else it would come again for ever
            logger.exception("webhook of %s cannot be sent", delivery.job_id)
            said = type(error).__name__
        with contextlib.suppress(JobsUnavailable):
            if outcome in ("delivered", "given_up"):
                await self._jobs.ask(JobStore.webhook_sent, delivery.id)
            elif not await self._jobs.ask(JobStore.webhook_not_sent, delivery, _pause_s(delivery.attempt)):
                outcome = "given_up"
        WEBHOOKS.labels(outcome).inc()
        if outcome != "delivered":
            then = "it is given up" if outcome == "given_up" else "it is sent again later"
            logger.warning("webhook of %s, attempt %d: %s; %s", delivery.job_id, delivery.attempt, said, then)

    async def _post(self, delivery: Delivery) -> int:
        """The status of the answer.

        Raises:
            ValueError: the URL is not allowed anymore.
            AddressRefused: the host has an address that must not be called.
            httpx.HTTPError: the host cannot be reached.
        """
        url = _parsed(delivery.url, self._hosts)
        port = url.port or {"https": 443, "http": 80}[url.scheme]
        address = await public_address(url.host, port, is_loopback if is_loopback(url.host) else is_public)
        now = int(time.time())
        at = datetime.fromtimestamp(now, UTC)
        signatures = [key.sign(delivery.id, at, delivery.body) for key in self._keys]
        headers = {
            "host": url.netloc.decode(),
            "content-type": "application/json",
            "user-agent": "spray",
            "webhook-id": delivery.id,
            "webhook-timestamp": str(now),
            "webhook-signature": " ".join(signatures),
        }
        named = {"sni_hostname": url.raw_host.decode()}  # by which the certificate is checked
        trusted = await asyncio.to_thread(authorities)
        async with (
            httpx.AsyncClient(verify=trusted, trust_env=False, follow_redirects=False, timeout=ANSWER_S) as client,
            client.stream(
                "POST", url.copy_with(host=address), content=delivery.body, headers=headers, extensions=named
            ) as answer,
        ):
            return answer.status_code  # its body is not read


def _parsed(url: str, hosts: frozenset[str]) -> httpx.URL:
    """A URL that may be called.

    Raises:
        ValueError: it may not; why, behind its name.
    """
    if not hosts:
        raise ValueError("is not supported by this deployment: gateway.webhook_hosts names no host")
    if len(url) > LONGEST or not VISIBLE.fullmatch(url):
        raise ValueError(f"must have at most {LONGEST} characters, all of them visible ASCII")
    try:
        parsed = httpx.URL(url)
    except httpx.InvalidURL as error:
        raise ValueError(f"is no URL: {error}") from None
    if (host := parsed.raw_host.decode()) not in hosts:
        raise ValueError(f"names the host {host!r}; this deployment calls {', '.join(sorted(hosts))}")
    if parsed.scheme != "https" and not (parsed.scheme == "http" and is_loopback(host)):
        raise ValueError(f"must begin with https://, got {parsed.scheme}://")
    if parsed.port is not None and not 0 < parsed.port < 2**16:
        raise ValueError(f"must have a port from 1 to 65535, got {parsed.port}")
    if parsed.userinfo or parsed.fragment:
        raise ValueError("must have no user, password or fragment")
    return parsed


def _read_keys(variable: str) -> tuple[Webhook, ...]:
    given = os.environ.get(variable, "").split()
    if not given:
        raise SpecError(
            f"gateway.webhook_key_env is {variable}, but the gateway's environment holds nothing in it; set it to "
            "whsec_ and the base64 of 24 to 64 random bytes, or to several such keys with spaces between them"
        )
    keys = []
    for key in given:
        try:
            keys.append(Webhook(key))
        except Exception:  # it may repeat the key
            raise SpecError(
                f"gateway.webhook_key_env: {variable} holds what is no key; whsec_ and the base64 of some bytes is one"
            ) from None
    return tuple(keys)


def _pause_s(attempt: int) -> float:
    return AGAIN_S[min(attempt, len(AGAIN_S)) - 1] * random.uniform(1.0, 1.1)
