"""Strike a cluster at work again and again, and see that every accepted job ends once.

    python -m tests.benchmarks.job_faults [--faults 100] [--seed 0] [--store sqlite] [--kinds store rank ...]

Four callers submit jobs all the time, with idempotency keys and retries. In each round every kind of fault comes once,
in an order that the seed decides. The cluster serves again when a job that was submitted after the fault has ended;
then the next fault strikes, though jobs that the first one has met may still be under way. The seconds are counted from
the fault, or from the end of what holds for a while. The seed also decides which faults come in pairs, `--together` how
many: the second one meanwhile, or at once; in their lines `beside` is the kind of the other.

`faults.jsonl` in the folder gets a line for each fault and each run, `jobs.jsonl` one for each job that is accepted or
ends. SIGTERM ends a run in order: nothing more is struck, and the verdict is on what there was; a second one stops it
at once. The same arguments go on with the faults that are left. After a crash SQLite still has the jobs, PostgreSQL
does not.

The exit code is 1 if a job was lost, published twice or failed for another reason than two faults of its own or more,
if a picture differs from the one that is drawn at leisure, or if a fault was not noticed.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import random
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.store import JobStore
from service.jobs.store_actor import FILE
from tests.benchmarks.job_faults.callers import Callers
from tests.benchmarks.job_faults.cluster import ROOT, Cluster, wait
from tests.benchmarks.job_faults.disk import Disk, KeptDisk, enter_namespace
from tests.benchmarks.job_faults.ledger import Ledger, read_lines
from tests.benchmarks.job_faults.link import Link
from tests.benchmarks.job_faults.report import report
from tests.benchmarks.job_faults.scene import NotNoticed, Scene
from tests.benchmarks.job_faults.strikes import STRIKES, plan
from tests.benchmarks.job_faults.together import SHARE, groups, meanwhile, remaining
from tests.benchmarks.job_faults.verdict import Verdict, compare_pictures, judge
from tests.support.postgres import Postgres, running_postgres

CALLERS = 4
ONLY_SQLITE = ("store", "store stopped", "store full")
ONLY_POSTGRES = ("database", "partition")
OWN_DISK = ("outputs full", "store full")

MOST_OPEN = 24
"""Jobs that may be under way when a fault strikes."""


def main() -> None:
    """Strike as often as asked for, less what earlier runs have done, and print the report of all runs."""
    given = _arguments()
    enough = _told_to_end()
    folder = given.folder.resolve() if given.folder else ROOT / ".soak" / f"{given.store}-{given.seed}"
    folder.mkdir(parents=True, exist_ok=True)
    own_disk = enter_namespace()
    kinds = _kinds(given, own_disk)
    lines = folder / "faults.jsonl"
    before = read_lines(lines)
    planned, done = plan(given.seed, kinds, given.faults), {line["fault"] for line in before if "kind" in line}
    left = remaining(groups(given.seed, planned, given.together), done)
    if left or "accepted" not in before[-1]:
        with _postgres(given.store) as postgres:
            run = Run(folder, lines, postgres, own_disk, 60 * given.patience, enough)
            run.strike(given.seed, [[(number, planned[number]) for number in group] for group in left])
    after = read_lines(lines)
    print(report(after, kinds))
    unsound = [line for line in after if "accepted" in line and not Verdict(**line).sound]
    sys.exit(bool(unsound) or any(line.get("trouble") for line in after))


class Run:
    """One run of the command on its folder.

    Args:
        folder: of the cluster, with what earlier runs have left.
        lines: the file of JSON lines.
        postgres: that keeps jobs; None: SQLite does.
        own_disk: outputs get a disk of their own.
        patience_s: for every job, and for what follows a fault.
        enough: set: no more strikes.
    """

    def __init__(
        self,
        folder: Path,
        lines: Path,
        postgres: Postgres | None,
        own_disk: bool,
        patience_s: float,
        enough: threading.Event,
    ) -> None:
        self._enough = enough
        self._store_disk = KeptDisk(folder / "store") if own_disk and postgres is None else None
        forgotten = self._store_disk is not None and self._store_disk.forgotten
        if postgres is not None or forgotten:  # the store is empty
            (folder / "jobs.jsonl").unlink(missing_ok=True)
        self._patience_s, self._postgres = patience_s, postgres
        self._lines = lines.open("a")
        self._link = Link(postgres) if postgres else None
        self._cluster = Cluster(folder, two_nodes=True, jobs_url=self._link.url if self._link else None)
        self._disk = Disk(self._cluster.outputs) if own_disk else None
        self._ledger = Ledger(folder / "jobs.jsonl")
        self._callers = Callers(lambda: self._cluster.url, self._ledger, self._cluster.models, patience_s)
        self._unsettled: list[tuple[Scene, dict[str, Any]]] = []

    def strike(self, seed: int, planned: list[list[tuple[int, str]]]) -> None:
        """Strike by plan, what comes together at once, then judge."""
        try:
            self._cluster.start()
            self._callers.begin(CALLERS)
            for group in planned:
                if self._enough.is_set():
                    break
                self._cluster.check()
                wait(self._patience_s, lambda: len(self._ledger.open_jobs()) <= MOST_OPEN)
                self._strike(seed, group)
                self._write_settled()
            self._callers.end()
            self._write_settled()
            compared = compare_pictures(self._ledger, self._callers)
        finally:
            self._callers.abandon()
            self._cluster.stop()
            if self._store_disk is not None:
                self._store_disk.close()
            if self._link is not None:
                self._link.close()
        store = JobStore(
            open_postgres(self._postgres.url) if self._postgres else open_sqlite(self._cluster.store / FILE), 3600.0
        )
        verdict = judge(self._ledger, store, self._callers.refused, compared)
        store.close()
        self._write(dataclasses.asdict(verdict))

    def _strike(self, seed: int, group: list[tuple[int, str]]) -> None:
        """Strike once, or twice together, and wait until the cluster serves again."""
        scenes = {number: self._scene(random.Random(f"{seed}/{number}")) for number, _ in group}
        seen: dict[int, dict[str, Any]] = {}

        def once(number: int, kind: str) -> None:
            seen[number] = {"fault": number, "kind": kind, "at": time.time()}
            try:
                seen[number] |= STRIKES[kind](scenes[number])
            except NotNoticed as error:
                seen[number]["trouble"] = f"not noticed: {error}"

        (first, kind), (last, other) = group[0], group[-1]
        if meanwhile(kind, other):
            scenes[first].meanwhile = functools.partial(once, last, other)
        for number, each in group:
            if number not in seen:
                once(number, each)
        for number, _ in group:
            self._wait_served(scenes[number], seen[number])
            seen[number] |= {"beside": other if number == first else kind} if len(group) > 1 else {}
            self._unsettled.append((scenes[number], seen[number]))

    def _scene(self, rng: random.Random) -> Scene:
        return Scene(self._cluster, self._callers, rng, self._disk, self._store_disk, self._postgres, self._link)

    def _wait_served(self, scene: Scene, facts: dict[str, Any]) -> None:
        """Wait for the end of the job that was submitted after a fault; add how long that took."""
        if scene.probe is None:
            return
        facts["served_s"] = round(scene.probe.result(), 1)
        if facts["served_s"] > self._patience_s:
            facts["trouble"] = facts.get("trouble", "") + "nothing was served again"

    def _write_settled(self) -> None:
        """Write what was seen of each fault all of whose jobs have ended, and how long that took."""
        open_still = []
        for scene, facts in self._unsettled:
            if scene.settled:
                self._write(facts | ({"settled_s": scene.settled_s} if scene.probe else {}))
            else:
                open_still.append((scene, facts))
        self._unsettled = open_still

    def _write(self, line: dict[str, Any]) -> None:
        self._lines.write(json.dumps(line) + "\n")
        self._lines.flush()
        print(json.dumps(line), flush=True)


def _told_to_end() -> threading.Event:
    """Set by the first SIGTERM; the next one raises `SystemExit`, so that the cluster is stopped."""
    told = threading.Event()

    def tell(*_: object) -> None:
        if told.is_set():
            sys.exit(1)
        told.set()

    signal.signal(signal.SIGTERM, tell)
    return told


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Strike a cluster again and again: no accepted job may be lost.")
    parser.add_argument("--faults", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--store", choices=("sqlite", "postgres"), default="sqlite")
    parser.add_argument("--kinds", nargs="+", choices=STRIKES, default=list(STRIKES))
    parser.add_argument("--together", type=float, default=SHARE, help="share of the faults that the next one joins")
    parser.add_argument("--patience", type=float, default=5.0, help="minutes within which every job must end")
    parser.add_argument("--folder", type=Path, help="of what is kept between runs; default: .soak/STORE-SEED")
    return parser.parse_args()


def _kinds(given: argparse.Namespace, own_disk: bool) -> list[str]:
    """The kinds of faults that there can be here."""
    without = set(ONLY_POSTGRES if given.store == "sqlite" else ONLY_SQLITE)
    if not own_disk:
        without.update(OWN_DISK)
        print(f"{', '.join(OWN_DISK)} are left out: this user may not mount a disk in a namespace", flush=True)
    kinds = [kind for kind in given.kinds if kind not in without]
    if not kinds:
        raise SystemExit(f"none of {', '.join(given.kinds)} can happen here; leave --kinds out")
    return kinds


@contextlib.contextmanager
def _postgres(store: str) -> Iterator[Postgres | None]:
    if store == "sqlite":
        yield None
        return
    with running_postgres(durable=True) as server:
        yield server


if __name__ == "__main__":
    main()
