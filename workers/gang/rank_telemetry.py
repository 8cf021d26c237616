"""RankTelemetry: what a rank tells of its work: its status, its metrics, and the marks of a traced request.

`workers.gang.rank` writes it as it computes. `now` and `renumber` may be called from other threads meanwhile. Metrics
begin with the first `renumber`, so what is done before counts nowhere.
"""

from typing import Any, Literal

import torch

from deploy.model_spec import ModelSpec
from sp_core.traffic import Traffic
from workers.gang.memory_use import memory_use
from workers.gang.rank_trace import RankTrace
from workers.messages import GenerationRequest, Phase
from workers.model.denoising import Denoising
from workers.model.step_ends import StepEnd
from workers.observing import RankMetrics
from workers.shapes import Shapes


class RankTelemetry:
    """What one rank tells.

    Args:
        rank: its number.
        model: what it loads.
        device: whose memory it uses.

    Attributes:
        phase: what it does.
        step: steps of the latest request, or part of one, that are done; 0 before the first.
        total_steps: of that request.
        loaded: the share of the weights that is read.
        latest_step: of the latest step whose collectives were timed: seconds in all, in collectives, and waiting for
            slower ranks; empty: there is none.
        guidance: how the latest request has evaluated its branches.
        trace: of the latest request.
        metrics: those of the gang's number; None before the first `renumber`.
    """

    def __init__(self, rank: int, model: ModelSpec, device: torch.device) -> None:
        self.phase: Phase = "starting"
        self.step = self.total_steps = 0
        self.loaded = 0.0
        self.latest_step: tuple[float, ...] = ()
        self.guidance = ""
        self.trace = RankTrace(None)
        self.metrics: RankMetrics | None = None
        self._rank, self._model, self._device = rank, model, device
        self._replica = ""
        self._shapes = Shapes(model)
        self._by_layout: dict[tuple[str, bool], RankMetrics] = {}

    @property
    def now(self) -> dict[str, Any]:
        """Fields of `RankStatus`."""
        return {
            "phase": self.phase,
            "model": self._model.name,
            "loaded": self.loaded,
            "step": self.step,
            "total_steps": self.total_steps,
            "latest_step": self.latest_step,
            "guidance": self.guidance,
        }

    def begin(self, request: GenerationRequest) -> None:
        """A request comes, or a part of one."""
        self.trace = RankTrace(request)

    def enter(self, stage: Literal["encode", "denoise", "decode"]) -> None:
        """The request comes to this stage."""
        self.phase = stage
        self.trace.stage(stage)

    def crossed(self, end: StepEnd, spent: float, waited: float, guidance: str) -> None:
        """All ranks have passed the boundary after a step.

        Args:
            end: of the step.
            spent: seconds of it in collectives.
            waited: seconds of those for slower ranks.
            guidance: how branches were evaluated; empty: that is not known yet.
        """
        self.step = end.step
        if end.in_collectives:
            self.latest_step = end.seconds, spent, waited
        self.guidance = guidance or self.guidance

    def observe_step(self, denoising: Denoising, end: StepEnd, waited: float, traffic: Traffic) -> None:
        """Count a step of a caller's request. Those of the warm-up count nowhere."""
        self.trace.step(end, denoising.total_steps, waited)
        if self.metrics:
            self.metrics.step(end.seconds, self._shapes.label(denoising.request))
            self.metrics.in_collectives(end.in_collectives, waited)
            self.metrics.traffic(traffic)

    def observe_stages(self, **seconds: float) -> None:
        """Count stages by name."""
        for stage, spent in seconds.items():
            if self.metrics:
                self.metrics.stage(stage, spent)  # type: ignore[arg-type]  # their names are those of stages

    def observe_drawn(self, denoising: Denoising, traffic: Traffic) -> None:
        """Count a request that is drawn."""
        request = denoising.request
        if self.metrics:
            self.metrics.memory(**memory_use(self._device))
            self.metrics.drew(request.work // request.num_inference_steps, denoising.prompt_tokens)
            self.metrics.traffic(traffic)

    def renumber(self, replica: str) -> None:
        """Observe under this number of the gang from now on."""
        self._by_layout = {}
        if self.metrics:
            self.metrics.end()
        self._replica = replica
        self.metrics = RankMetrics(self._model.name, replica, self._rank, str(self._model.parallel))

    def use_layout(self, layout: str, leads: bool) -> None:
        """Observe under the layout of a request of an elastic gang.

        Args:
            layout: as the API says it.
            leads: whether this rank counts what all ranks of the request do alike.
        """
        if self.metrics:
            key = layout, leads
            known = self._by_layout  # another thread may renumber
            if key not in known:
                known[key] = RankMetrics(self._model.name, self._replica, self._rank, *key)
            self.metrics = known[key]
