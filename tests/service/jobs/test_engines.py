"""The two databases: their tables, what they write through, and what becomes of calls while they are away."""

from pathlib import Path

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from service.jobs import engines
from service.jobs.engines import open_postgres, open_sqlite
from service.jobs.store import JobStore
from service.jobs.tables import metadata
from tests.service.jobs.stores import BACKENDS, BROKEN, new_job, open_engine, take
from tests.support.postgres import Postgres
from workers.errors import JobsUnavailable


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_migrations_make_the_tables_that_the_code_uses(
    backend: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    url = request.getfixturevalue("postgres").url if backend == "postgres" else ""
    engine = open_engine(backend, tmp_path, url)
    with engine.begin() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
        engines._migrate(connection)  # once more changes nothing
        assert connection.execute(sa.text("SELECT version_num FROM alembic_version")).scalars().all() == ["0006"]
    engine.dispose()


def test_jobs_that_had_ended_before_they_were_counted_are_counted(store: JobStore) -> None:
    store.submit(new_job())
    (job,) = take(store)
    store.fail(job.id, job.fence, BROKEN)
    store.submit(new_job())
    with store._database._engine.begin() as connection:
        connection.exec_driver_sql("DROP TABLE job_ends")
        connection.exec_driver_sql("DROP TABLE job_inputs")
        connection.exec_driver_sql("DROP TABLE job_input_data")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0003'")
    with store._database._engine.begin() as connection:
        engines._migrate(connection)
    assert store.ended() == {("film", "failed"): 1}


def test_sqlite_writes_through_and_its_file_is_private(tmp_path: Path) -> None:
    engine = open_sqlite(tmp_path / "folder" / "jobs.db")
    with engine.begin() as connection:
        found = {
            name: connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")
        }
    engine.dispose()
    assert found == {"journal_mode": "wal", "synchronous": 2}
    assert (tmp_path / "folder" / "jobs.db").stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize(("url", "said"), [("mysql://a:secret@b/c", "'mysql'"), ("secret", "cannot be read")])
def test_other_urls_are_refused_without_their_secrets(url: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as found:
        open_postgres(url)
    assert "secret" not in str(found.value)


def test_a_store_that_is_away_says_so_and_comes_back(postgres: Postgres, tmp_path: Path) -> None:
    store = JobStore(open_engine("postgres", tmp_path, postgres.url), 60.0)
    job, _ = store.submit(new_job())
    postgres.stop()
    try:
        with pytest.raises(JobsUnavailable):
            store.submit(new_job())
    finally:
        postgres.start()
    assert store.page(None).jobs == (job,)
    assert store.submit(new_job())[1]
    store.close()


def test_a_full_disk_is_no_acknowledgement(tmp_path: Path) -> None:
    engine = open_sqlite(tmp_path / "jobs.db")
    store = JobStore(engine, 60.0)
    job, _ = store.submit(new_job())
    with engine.connect() as connection:
        pages = connection.exec_driver_sql("PRAGMA page_count").scalar_one()
        connection.exec_driver_sql(f"PRAGMA max_page_count={pages}")
    with pytest.raises(JobsUnavailable):
        for _ in range(50):
            store.submit(new_job(request={"prompt": "x" * 32_000}))
    with engine.connect() as connection:
        connection.exec_driver_sql("PRAGMA max_page_count=100000")
    assert job in store.page(None, limit=100).jobs
    assert store.submit(new_job())[1]
    store.close()


def test_no_statement_is_prepared_in_a_session(postgres: Postgres) -> None:
    """A pooler may give the next transaction another session, which does not know it."""
    engine = open_postgres(postgres.url)
    try:
        for _ in range(8):
            with engine.begin() as connection:
                connection.execute(sa.text("SELECT 1")).scalar_one()
                assert connection.execute(sa.text("SELECT count(*) FROM pg_prepared_statements")).scalar_one() == 0
    finally:
        engine.dispose()
