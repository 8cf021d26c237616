"""What the store of jobs takes, on SQLite and PostgreSQL, both with every commit on disk.

    python -m tests.benchmarks.jobs [--submissions 2000] [--jobs 100000] [--looks 200]

Submissions come one after the other from one caller, as the store's actor serves them, and on PostgreSQL also from four
threads, as its gateways do; a commit's milliseconds are those of one submission. Then the table is filled up, and an
owner's page of 20 is read at random places of it, and the counts that every runner asks for once a second.
"""

import argparse
import dataclasses
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sqlalchemy as sa

from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.records import Job, NewJob
from service.jobs.requests import new_job
from service.jobs.store import JobStore
from service.jobs.tables import jobs, to_row
from tests.support.postgres import running_postgres
from workers.messages import GenerationRequest

REQUEST = GenerationRequest(
    "a", "film", "a cup of coffee " * 20, 832, 480, 50, seed=7, num_frames=81, output_format="mp4"
)
OWNERS = 10
COLUMNS = ("store", "callers", "submissions/s", "commit p50 ms", "p99 ms", "page p50 ms", "p99 ms", "counts p50 ms")


def main() -> None:
    """Measure both and print a table."""
    parser = argparse.ArgumentParser(description="Submissions, pages and counts of the store of jobs.")
    parser.add_argument("--submissions", type=int, default=2000)
    parser.add_argument("--jobs", type=int, default=100_000, help="in the table when pages are read")
    parser.add_argument("--looks", type=int, default=200, help="pages and counts read")
    given = parser.parse_args()
    print(f"| {' | '.join(COLUMNS)} |")
    print("|---" * len(COLUMNS) + "|")
    with tempfile.TemporaryDirectory() as folder, running_postgres(durable=True) as server:
        engines = {"SQLite": open_sqlite(Path(folder) / "jobs.db"), "PostgreSQL": open_postgres(server.url)}
        for name, engine in engines.items():
            measure(name, engine, given.submissions, given.jobs, given.looks)


def measure(name: str, engine: sa.Engine, submissions: int, filled: int, looks: int) -> None:
    """One database: a row for each number of callers, the last one with pages and counts."""
    store = JobStore(engine, keep_s=3600.0)
    rows = []
    for callers in (1, 4) if name == "PostgreSQL" else (1,):
        began = time.perf_counter()
        with ThreadPoolExecutor(callers) as pool:
            took = list(pool.map(lambda _: timed(lambda: store.submit(a_job())), range(submissions)))
        rows.append([name, str(callers), f"{submissions / (time.perf_counter() - began):.0f}", *ms(took)])
    fill(engine, filled - submissions * len(rows))
    ids: list[str] = []
    while found := store.page(None, after=ids[-1] if ids else None, limit=1000).jobs:  # no call may take long
        ids += [job.id for job in found]
    pages = [
        timed(lambda: store.page(f"key-{random.randrange(OWNERS)}", after=random.choice(ids))) for _ in range(looks)
    ]
    counts = [timed(store.counts) for _ in range(looks)]
    rows[-1] += [*ms(pages), ms(counts)[0]]
    for row in rows:
        print(f"| {' | '.join([*row, *[''] * (len(COLUMNS) - len(row))])} |", flush=True)
    store.close()


def a_job() -> NewJob:
    """A video of some owner."""
    return new_job(REQUEST, f"key-{random.randrange(OWNERS)}")


def fill(engine: sa.Engine, count: int) -> None:
    """Add jobs that wait, many in a transaction."""
    fields = {field.name for field in dataclasses.fields(Job)} & {field.name for field in dataclasses.fields(NewJob)}
    for first in range(0, max(0, count), 1000):
        now = time.time()
        made = [a_job() for _ in range(min(1000, count - first))]
        rows = [
            to_row(Job(**{name: getattr(new, name) for name in fields}, state="queued", created_at=now), now)
            for new in made
        ]
        with engine.begin() as connection:
            connection.execute(sa.insert(jobs), rows)
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("ANALYZE jobs")  # as its own daemon does after a while


def timed(call: Callable[[], object]) -> float:
    """Seconds that a call takes."""
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def ms(seconds: list[float]) -> list[str]:
    """Median and 99th percentile, in milliseconds."""
    return [f"{1000 * statistics.median(seconds):.2f}", f"{1000 * statistics.quantiles(seconds, n=100)[98]:.2f}"]


if __name__ == "__main__":
    main()
