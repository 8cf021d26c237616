"""Idempotency keys, as a gateway uses them: starts the actor that keeps their answers, and asks it.

Each method is one of `service.state.kept_answers.KeptAnswers`, which runs once in the cluster, on the head's node. In a
process without a cluster it is an object of this process. For `service.gateway` and `service.api.once`.
"""

import asyncio
import hashlib
import inspect
import json
import logging
import sqlite3
from collections.abc import Mapping
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from deploy.storage_spec import Idempotency as Settings
from service.state import kept_answers
from service.state.kept_answers import Claim, KeptAnswers
from service.state.shared_turns import HEAD, NAMESPACE
from workers import messages
from workers.errors import KeysUnavailable, OutputsFull, OutputsUnavailable, SprayError
from workers.messages import GenerationResult

logger = logging.getLogger("ray.serve")

ANSWERS_S = 20.0
"""Seconds for one call of the actor, beyond the time that it is told to wait; it may have to start first."""

TRIES = 3
"""Attempts of one call: the actor may have been killed, or have ended because nobody asked for long."""

WAITING = 10_000
"""Calls that may wait in the actor at once."""

NOT_KEPT = (RayError, ValueError, TimeoutError, OSError, sqlite3.Error, OutputsFull, OutputsUnavailable)
"""What the keeper may raise that cannot keep a key."""


class IdempotencyKeys:
    """The keys of all gateways.

    Args:
        owner: the name of this gateway's actor, by which others see that it lives; empty outside Serve.
    """

    def __init__(self, owner: str) -> None:
        self._owner = owner
        self._settings = Settings()
        self._keeper: Any = None
        self._letting_go: set[asyncio.Task[None]] = set()

    def follow(self, settings: Mapping[str, Any]) -> None:
        """Keep answers by these settings from now on.

        Args:
            settings: `storage.idempotency` of the deployment.
        """
        wanted = Settings.model_validate(settings)
        if wanted != self._settings:
            self._settings, self._keeper = wanted, None

    def scope(self, caller: str, key: str) -> str:
        """A key together with its caller: equal keys of two callers are different keys."""
        return hashlib.sha256(json.dumps([caller, key]).encode()).hexdigest()

    async def claim(self, scope: str, fingerprint: str, seed: int, token: str, patience_s: float) -> Claim:
        """See `KeptAnswers.claim`.

        Raises:
            KeysUnavailable: the actor cannot be asked, or cannot write its file.
        """
        try:
            claim: Claim = await self._ask(
                "claim", scope, fingerprint, seed, self._owner, token, patience_s, patience_s=patience_s
            )
        except asyncio.CancelledError:  # the actor may have heard the question
            self.let_go(scope, token)
            raise
        return claim

    async def renew(self, scope: str, token: str) -> None:
        """See `KeptAnswers.renew`."""
        await self._ask("renew", scope, token)

    async def finish(self, scope: str, token: str, result: GenerationResult, kind: str) -> bool:
        """See `KeptAnswers.finish`.

        Raises:
            KeysUnavailable: the answer is not kept.
        """
        return bool(await self._ask("finish", scope, token, result, kind))

    async def fail(self, scope: str, token: str, error: SprayError) -> bool:
        """See `KeptAnswers.fail`.

        Raises:
            KeysUnavailable: it is not kept.
        """
        return bool(await self._ask("fail", scope, token, error))

    def let_go(self, scope: str, token: str) -> None:
        """See `KeptAnswers.release`. Returns at once, because a caller that leaves cannot wait."""
        task = asyncio.get_running_loop().create_task(self._release(scope, token))
        self._letting_go.add(task)
        task.add_done_callback(self._letting_go.discard)

    async def _release(self, scope: str, token: str) -> None:
        try:
            await self._ask("release", scope, token)
        except KeysUnavailable as error:
            logger.warning("a claim was not released, and ends by itself: %s", error)

    async def _ask(self, method: str, *args: Any, patience_s: float = 0.0) -> Any:
        error: Exception | None = None
        for _ in range(TRIES):
            try:
                keeper = self._keeper = self._keeper or await asyncio.to_thread(self._start)
                asked = getattr(keeper, method)
                if isinstance(keeper, KeptAnswers):
                    return await asked(*args)
                return await asyncio.wait_for(_result(asked.remote(*args)), ANSWERS_S + patience_s)
            except RayActorError as ended:
                error, self._keeper = ended, None
            except NOT_KEPT as failed:
                error = failed
                break
        self._keeper = None
        logger.error("idempotency keys cannot be kept: %s", error)
        raise KeysUnavailable("idempotency keys cannot be kept now; try again later, or send none") from None

    def _start(self) -> Any:
        """The actor, started if necessary. Blocks. Gateways with another version or other settings have an actor of
        their own, which reads the same file."""
        settings = self._settings.model_dump()
        if not ray.is_initialized():
            return KeptAnswers(**settings, lives=lambda gateway: True)
        source = "".join(inspect.getsource(part) for part in (kept_answers, messages)) + json.dumps(settings)
        heads = [node["NodeID"] for node in ray.nodes() if node["Alive"] and HEAD in node["Resources"]]  # type: ignore[no-untyped-call]
        head = heads[0] if heads else ray.get_runtime_context().get_node_id()
        made = ray.remote(KeptAnswers).options(
            name=f"answers-{hashlib.sha256(source.encode()).hexdigest()[:12]}",
            namespace=NAMESPACE,
            get_if_exists=True,
            lifetime="detached",  # else it would end with the gateway that started it
            max_restarts=-1,
            max_task_retries=TRIES,  # asking again changes nothing
            num_cpus=0,
            max_concurrency=WAITING,
            scheduling_strategy=NodeAffinitySchedulingStrategy(head, soft=False),  # where its file is
        )
        return made.remote(**settings, is_actor=True)


async def _result(reference: Any) -> Any:
    return await reference
