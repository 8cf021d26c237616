"""The benchmark of the API still measures: a small run of it, whose times mean nothing here."""

import re

import pytest

from tests.benchmarks import api


@pytest.mark.soak
def test_a_small_run_fills_all_tables(capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--requests 3 --callers 2 --step-ms 0 20 --steps 2 --cancellations 1 --overload-s 1"
    code = api.main(flags.split())
    said = capsys.readouterr().out.splitlines()  # Ray may say something in between
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in said if line.startswith("| ")]
    (_, bare), rest, (_, canceled), (_, overload) = rows[:2], rows[2:8], rows[8:10], rows[10:12]
    assert bare[:3] == ["2", "bare Serve", "-"]
    assert [row[:3] for row in rest] == [
        ["2", p, ms] for p in ("REST, JSON", "REST, stream", "gRPC") for ms in ("0", "20")
    ]
    for row in [bare, *rest]:
        assert float(row[3]) > 0
        assert float(row[4]) > -45  # of 3 requests, one runs alone, and is ahead by the two steps of another caller
    assert canceled[0] == "1"
    assert 0 < float(canceled[1]) < 2500  # 50 steps of 100 ms are five seconds
    sent, answered, _, refused, *_, others, _ = overload
    assert others == "none"
    assert int(sent) == int(answered) + int(refused) > 50
    assert int(refused) > int(answered) > 0
    bar = r"2 callers, steps of 0 ms, JSON: (\S+) ms above bare Serve, (at most|more than) 10 ms"
    held = next(found for line in said if (found := re.fullmatch(bar, line)))
    assert code == (0 if held[2] == "at most" else 1)
