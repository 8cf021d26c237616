"""Every process of a served cluster is killed and stopped, in each phase: `tests/benchmarks/faults.py` as a test.

`make fault` strikes an idle cluster and one that denoises, `make fault FULL=1` all phases. Prints the table's rows.
How an idle one ends is in `test_local_cluster.py`.
"""

import os
from collections.abc import Iterator

import pytest

from tests.benchmarks.faults import ENDS, PHASES, STARTING, Bench, Cell, rows

pytestmark = pytest.mark.fault


def once(row: Cell) -> bool:
    """False for what `make fault` proves with more than this row: the ends of a cluster cost a new one each. When a
    raylet or a gcs dies is in `test_local_cluster.py`; whichever of them is stopped is ended by the same few lines.
    """
    if row.process not in ENDS:
        return True
    return row.phase != "idle" and (row.process == "serve" or (row.process, row.signal) == ("raylet", "SIGSTOP"))


ROWS = rows(PHASES) if os.environ.get("FULL") else [row for row in rows(("idle", "denoise")) if once(row)]

EXIT_CODES = {"SIGTERM": "0", "SIGINT": "130", "SIGHUP": "0", "SIGKILL": "-9"}

LOSES_ITS_CONNECTION = ("gateway", "proxy")
"""The caller's connection ends in these. What a caller of the other processes sees is the picture, if it is served."""


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    bench = Bench(tmp_path_factory.mktemp("faults"))
    yield bench
    bench.close()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.process}-{row.signal}-{row.phase}")
def test_a_struck_cluster_serves_again_or_ends(bench: Bench, row: Cell) -> None:
    bench.measure(row)
    print(row)
    if row.process in ENDS:
        code = EXIT_CODES[row.signal] if row.process == "serve" else "1"
        if row.phase not in STARTING or row.process != "serve":
            assert row.exit.startswith(f"{code} after"), row
        else:
            assert row.exit != "-", row
        assert row.left == "no process; 0 folders", row
    else:
        assert row.served.endswith(" s"), row  # seconds; else "not ..."
        assert not row.served.startswith("not"), row
    if row.phase in ("encode", "denoise", "decode") and row.process not in (*LOSES_ITS_CONNECTION, *ENDS):
        assert row.saw.startswith("the picture"), row
