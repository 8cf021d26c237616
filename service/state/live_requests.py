"""The requests that wait or run in this gateway: for `/v1/requests`, and for canceling them.

`service.gateway` passes the reports of every request through `watched`. `service.state.exchange` asks all gateways.
"""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from service.deadline import within
from service.names import app_name
from service.state import router_registry
from service.state.tickets import Prospect
from workers.messages import GenerationRequest, GenerationResult, StepEvent

Report = TypeVar("Report")

PLACE_S = 0.5
"""Seconds for asking for the place of a request. Afterwards it is listed without its place."""


@dataclass
class Live:
    """A request that waits or runs.

    Attributes:
        request: what was asked for.
        key: the name of the API key that asked; empty: none was needed.
        since: when it was admitted, in seconds since the epoch.
        canceled: a future that is done when the request is canceled.
        running: whether a gang has it. A request whose gang lost its ranks waits again.
        step: denoising steps done, as far as they were reported here.
    """

    request: GenerationRequest
    key: str
    since: float = field(default_factory=time.time)
    canceled: "asyncio.Future[None]" = field(default_factory=lambda: asyncio.get_running_loop().create_future())
    running: bool = False
    step: int = 0


class LiveRequests:
    """The live requests of one gateway.

    Args:
        gateway: its name.
    """

    def __init__(self, gateway: str) -> None:
        self._gateway = gateway
        self._live: dict[str, Live] = {}

    async def watched(
        self, request: GenerationRequest, key: str, reports: AsyncGenerator[Report]
    ) -> AsyncGenerator[Report]:
        """Pass the reports on. Until they end, the request is listed, can be canceled, and must meet its deadline.

        Args:
            request: the request.
            key: the name of the API key that asked; empty: none was needed.
            reports: the reports of the request; closed at the end.

        Raises:
            RequestCancelled: it was canceled.
            DeadlineExceeded: its deadline has passed.
        """
        live = self._live[request.request_id] = Live(request, key)
        try:
            held = within(request.deadline_at, reports, live.canceled)
            try:
                async for report in held:
                    if isinstance(report, StepEvent):
                        live.step = report.step
                    if isinstance(report, GenerationResult):  # from now on nobody can cancel it
                        self._live.pop(request.request_id, None)
                    yield report
            finally:
                await held.aclose()
        finally:
            self._live.pop(request.request_id, None)

    def begun(self, request_id: str) -> None:
        """Note that a gang has the request."""
        if request_id in self._live:
            self._live[request_id].running = True

    def lost(self, request_id: str) -> None:
        """Note that its gang has lost its ranks, and that it waits again."""
        if request_id in self._live:
            live = self._live[request_id]
            live.running, live.step = False, 0

    def cancel(self, request_id: str, key: str | None) -> bool:
        """End a request; return whether it was here.

        Args:
            request_id: of the request.
            key: the name of the API key that asks, which may end only its own requests. None: any request.
        """
        live = self._live.get(request_id)
        if live is None or not _may_see(key, live):
            return False
        if not live.canceled.done():
            live.canceled.set_result(None)
        return True

    async def told(self, key: str | None) -> list[dict[str, Any]]:
        """The `service.api.answers.RequestObject` of each, the oldest first.

        Args:
            key: the name of the API key that asks, which sees only its own requests. None: all requests.
        """
        seen = [live for live in self._live.values() if _may_see(key, live)]
        running = {
            name: report
            for model in {live.request.model for live in seen}
            for report in router_registry.lookup(app_name(model))[1]
            for name in _running(report)
        }
        told = await asyncio.gather(*(self._tell(live, running.get(live.request.request_id)) for live in seen))
        return sorted(told, key=lambda one: one["since"])

    async def _tell(self, live: Live, report: Mapping[str, Any] | None) -> dict[str, Any]:
        """One request, with its gang's report if it runs and its place if it waits."""
        request, position, eta_s = live.request, None, None
        step, total_steps = live.step, request.num_inference_steps
        if live.running and report is not None:
            told, left_s = _running(report)[request.request_id]
            step, total_steps = max(step, told["step"]), told["total_steps"] or total_steps
            if left_s:
                eta_s = max(0.0, left_s - (time.time() - report["reported_at"]))
        if not live.running:
            ahead = await self._standing(request)
            if ahead is not None:
                position = ahead.ahead + 1
                eta_s = ahead.wait_s + request_s if (request_s := _typical_s(request.model)) else None
        return {
            "id": request.request_id,
            "object": "request",
            "model": request.model,
            "state": "running" if live.running else "queued",
            "position": position,
            "eta_seconds": None if eta_s is None else round(eta_s, 1),
            "step": step,
            "total_steps": total_steps,
            "since": round(live.since, 3),
            "key": live.key or None,
            "gateway": self._gateway,
        }

    async def _standing(self, request: GenerationRequest) -> Prospect | None:
        try:
            asked = router_registry.standing(app_name(request.model), request.request_id)
            return await asyncio.wait_for(asked, PLACE_S)
        except TimeoutError:
            return None


def _may_see(key: str | None, live: Live) -> bool:
    return key is None or key == live.key


def _running(report: Mapping[str, Any]) -> dict[str, tuple[Mapping[str, Any], float | None]]:
    """The requests that a gang runs, each with its steps and the seconds left. An elastic gang runs several."""
    now = report.get("now", {})
    if now.get("requests"):
        return {each["request_id"]: (each, each.get("eta_s")) for each in now["requests"]}
    return {now["request_id"]: (now, report.get("backlog_s"))} if now.get("request_id") else {}


def _typical_s(model: str) -> float:
    """Seconds that a typical request of a model takes; 0: not known."""
    reports = router_registry.lookup(app_name(model))[1]
    learned = [takes_s for each in reports if (takes_s := each.get("takes_s") or each.get("request_s"))]
    return sum(learned) / len(learned) if learned else 0.0
