"""Callers that submit jobs with idempotency keys, retry as OpenAI's client does, follow each job and download it.

OpenAI's client gives up after `max_retries`; these have set it so high that only time ends their patience.
"""

import base64
import contextlib
import hashlib
import itertools
import random
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx

from tests.benchmarks.job_faults.ledger import Accepted, Ledger

RETRIED = frozenset({408, 409, 429})
"""Statuses that OpenAI's client retries besides those of 500 and more."""

FIRST_S, LONGEST_S, LONGEST_ASKED_S = 0.5, 8.0, 60.0
"""Its pauses: the first one, each later one twice as long up to the longest; what a server asks for, up to a minute."""

TIMEOUT_S = 40.0
"""Of one call: longer than a gateway waits for its store."""

LOOK_S, PROBE_S = 1.0, 0.3
"""Between two looks at a job: as OpenAI's client polls, and where the seconds until its end are measured."""


class Callers:
    """Some callers, each of whom submits a job, follows it to its end, and submits the next.

    Args:
        url: of the server now.
        ledger: where accepted jobs are written.
        models: that they ask for, in turn.
        patience_s: after which a caller gives a job up, or a submission that nobody answers.
        steps: denoising steps of each job.
    """

    def __init__(
        self, url: Callable[[], str], ledger: Ledger, models: Iterable[str], patience_s: float, steps: int = 20
    ) -> None:
        self._url, self.ledger, self.patience_s, self._steps = url, ledger, patience_s, steps
        self._models, self._numbers = itertools.cycle(models), itertools.count()
        self._name = uuid.uuid4().hex[:6]
        self._stopping, self._abandoned = threading.Event(), threading.Event()
        self._pool = ThreadPoolExecutor(64)
        # One client: each new one reads the certificates again. No kept connections: a killed proxy leaves dead ones.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
        self._client = httpx.Client(timeout=TIMEOUT_S, trust_env=False, limits=limits)
        self._steady: list[Future[None]] = []
        self.refused: list[str] = []

    def begin(self, callers: int) -> None:
        """Submit steadily from now on, and follow what an interrupted run has left."""
        self._steady += [self._pool.submit(self.follow, job) for job in self.ledger.open_jobs()]
        self._steady += [self._pool.submit(self._call) for _ in range(callers)]

    def end(self) -> None:
        """Submit nothing more, and wait until every caller knows how its job has ended, or has lost its patience."""
        self._stopping.set()
        self._pool.shutdown(wait=True)
        for caller in self._steady:
            caller.result()

    def abandon(self) -> None:
        """Let every caller leave at once, without a word of its job: a later run follows it."""
        self._stopping.set()
        self._abandoned.set()

    def burst(self, count: int, accepted: Callable[[Accepted], None] = lambda job: None) -> list[Future[None]]:
        """Submit many jobs at once; tell each as soon as it is accepted. Each is followed by a caller of its own."""

        def call() -> None:
            if job := self.submit():
                accepted(job)
                self.follow(job)

        self._steady += (calls := [self._pool.submit(call) for _ in range(count)])
        return calls

    def probe(self, model: str | None = None) -> "Future[float]":
        """Submit one job now that overtakes the others; the seconds until it has ended.

        Of a job that does not succeed they are infinite.
        """

        def call() -> float:
            began = time.monotonic()
            job = self.submit(model, priority="interactive")
            if job:
                self.follow(job, PROBE_S)
            return time.monotonic() - began if job and job.state == "succeeded" else float("inf")

        return self._pool.submit(call)

    def submit(self, model: str | None = None, priority: str = "standard", poisoned_steps: int = 0) -> Accepted | None:
        """Submit a job until somebody accepts it; None: it was refused for good, or nobody answered.

        Args:
            model: that it asks for; None: the next one.
            priority: of the job.
            poisoned_steps: of a job that the caller will not let end; 0: it is one as all others.
        """
        seed = random.randrange(1 << 31)
        body: dict[str, Any] = {
            "model": model or next(self._models), "prompt": f"cup {next(self._numbers)} of {self._name}",
            "seed": seed, "num_inference_steps": poisoned_steps or self._steps, "priority": priority,
        }  # fmt: skip
        key = uuid.uuid4().hex
        deadline = time.monotonic() + self.patience_s
        for attempt in itertools.count():
            answer = self.post(body, key)
            if answer is not None and answer.status_code == 202:
                job = Accepted(answer.json()["id"], key, body["model"], body["prompt"], seed)
                job.poisoned = poisoned_steps > 0
                self.ledger.write(job)
                return job
            if answer is not None and not _retried(answer):
                self.refused.append(f"{answer.status_code} {answer.text[:200]}")
                return None
            if self._abandoned.is_set():
                return None
            if time.monotonic() > deadline:
                self.refused.append(f"nobody answered for {self.patience_s:g} s, the last one: {answer}")
                return None
            time.sleep(_pause_s(attempt, answer))
        raise AssertionError

    def once(self, model: str, follow: bool = True) -> "Future[httpx.Response | None]":
        """The answer to one submission without any retry. Should it be accepted, its job is followed: before the answer
        is told, or beside."""
        body = {"model": model, "prompt": f"one of {uuid.uuid4().hex}", "seed": 1, "num_inference_steps": self._steps}

        def call() -> httpx.Response | None:
            answer = self.post(body, key := uuid.uuid4().hex)
            if answer is not None and answer.status_code == 202:
                job = Accepted(answer.json()["id"], key, model, str(body["prompt"]), 1)
                self.ledger.write(job)
                if follow:
                    self.follow(job)
                else:
                    self.follow_beside(job)
            return answer

        return self._pool.submit(call)

    def post(self, body: dict[str, Any], key: str) -> httpx.Response | None:
        """One call that submits a job, without any retry; None: the connection did not hold."""
        headers = {"prefer": "respond-async", "idempotency-key": key}
        return self._ask("POST", "/v1/images/generations", json=body, headers=headers)

    def look(self, job: Accepted) -> dict[str, Any]:
        """What the cluster tells of a job now; nothing if it does not answer."""
        answer = self._ask("GET", f"/v1/jobs/{job.id}")
        return dict(answer.json()) if answer is not None and answer.status_code == 200 else {}

    def follow(self, job: Accepted, pause_s: float = LOOK_S) -> None:
        """Look at a job again and again until it has ended, and download its picture."""
        until = time.monotonic() + self.patience_s  # of an inherited job: since this run
        while job.open:
            if self._abandoned.is_set():
                return
            answer = self._ask("GET", f"/v1/jobs/{job.id}")
            if answer is not None and answer.status_code == 404:
                job.trouble = f"lost: nobody knows it ({answer.text[:100]})"
            elif answer is not None and answer.status_code == 200:
                self._take(job, answer.json())
            if job.open and time.monotonic() > until:
                job.trouble = f"lost: {job.state} {self.patience_s:g} s after it was accepted"
            if job.open:
                time.sleep(pause_s)
        job.until = time.monotonic()
        self.ledger.write(job)

    def follow_beside(self, job: Accepted) -> "Future[None]":
        """The same by a caller of its own."""
        self._steady.append(following := self._pool.submit(self.follow, job))
        return following

    def draw(self, job: Accepted) -> bytes | None:
        """The picture that the same request draws when its caller waits for it; None if there is none."""
        body = {"model": job.model, "prompt": job.prompt, "seed": job.seed, "num_inference_steps": self._steps}
        answer = self._ask("POST", "/v1/images/generations", json=body | {"response_format": "b64_json"})
        if answer is None or answer.status_code != 200:
            return None
        return base64.b64decode(answer.json()["data"][0]["b64_json"])

    def _call(self) -> None:
        while not self._stopping.is_set():
            if job := self.submit():
                self.follow(job)

    def _take(self, job: Accepted, told: dict[str, Any]) -> None:
        job.attempt = told["attempt"]
        if told["state"] == "succeeded":
            self._download(job, told)
        job.code = (told["error"] or {}).get("code")
        job.state = told["state"]

    def _download(self, job: Accepted, told: dict[str, Any]) -> None:
        """Fetch the picture, and see that it is the one that the job tells of."""
        if job.inherited:
            return  # its picture may have been on a disk that ended with the interrupted run
        until = time.monotonic() + self.patience_s
        while time.monotonic() < until and not self._abandoned.is_set():
            answer = self._ask("GET", f"/v1/jobs/{job.id}/content")
            if answer is not None and answer.status_code == 200:
                job.sha256 = hashlib.sha256(answer.content).hexdigest()
                if [job.sha256] != [each["sha256"] for each in told["outputs"]]:
                    job.trouble = "its picture is not the one that it tells of"
                return
            if answer is not None and not _retried(answer):
                break
            time.sleep(LOOK_S)
        if self._abandoned.is_set():
            return
        job.trouble = f"it succeeded, but has no picture: {answer and answer.text[:100]}"

    def _ask(self, method: str, path: str, **given: Any) -> httpx.Response | None:
        with contextlib.suppress(httpx.TransportError):
            return self._client.request(method, f"{self._url()}{path}", **given)
        return None


def _retried(answer: httpx.Response) -> bool:
    """Whether OpenAI's client would try again."""
    should = answer.headers.get("x-should-retry")
    if should in ("true", "false"):
        return should == "true"
    return answer.status_code in RETRIED or answer.status_code >= 500


def _pause_s(attempt: int, answer: httpx.Response | None) -> float:
    """How long OpenAI's client waits before it tries again."""
    with contextlib.suppress(ValueError):
        asked = float(answer.headers.get("retry-after", "")) if answer is not None else 0.0
        if 0 < asked <= LONGEST_ASKED_S:
            return asked
    pause: float = min(FIRST_S * 2**attempt, LONGEST_S)
    return pause * random.uniform(0.75, 1.0)
