"""How long jobs wait for a model that cannot be started. For `service.jobs.runner`, which asks after each try.

The time runs for each job, which may lack an adapter that others of its model do without. It also runs for each model:
only a few jobs are tried at a time, and those behind them should not begin to wait when the first have given up.
"""

import time

from service.jobs.records import Job

UNSERVED_S = 900.0
"""How long jobs wait for a model that the deployment does not have, or that cannot be started. Not at once: an operator
who has left a model out by mistake, or has broken it, puts it right within minutes, and wants what was accepted to be
drawn then. Not for ever: whoever polls a job, or waits for its webhook, has to hear that nobody will draw it."""


class Patience:
    """What could not be begun lately: jobs by id, and models by name, each since when and until when."""

    def __init__(self) -> None:
        self._jobs: dict[str, tuple[float, float]] = {}
        self._models: dict[str, tuple[float, float]] = {}

    def waits_on(self, job: Job) -> bool:
        """Whether a job whose model is not there is to be tried again."""
        now = time.monotonic()
        self._jobs, own = _noted(self._jobs, job.id, now)
        self._models, models = _noted(self._models, job.model, now)
        waited_s = (job.started_at or job.created_at) - job.created_at
        return own < UNSERVED_S and min(models, waited_s) < UNSERVED_S

    def begun(self, job: Job) -> None:
        """A job has taken a step, so its model is there."""
        self._jobs.pop(job.id, None)
        self._models.pop(job.model, None)


def _noted(
    known: dict[str, tuple[float, float]], name: str, now: float
) -> tuple[dict[str, tuple[float, float]], float]:
    """What is known with one more try, without what was not tried lately; and the seconds since the first try."""
    lately = {each: times for each, times in known.items() if now - times[1] < UNSERVED_S}
    since = lately.get(name, (now, now))[0]
    return lately | {name: (since, now)}, now - since
