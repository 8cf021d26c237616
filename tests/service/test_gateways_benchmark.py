"""What the benchmark of gateways makes of when requests were sent and answered."""

from tests.benchmarks.gateways import Asked, idle_s, overtaken


def asked(sent_s: float, answered_s: float, worked_s: float) -> Asked:
    return Asked(sent_s, answered_s, worked_s, 200)


def test_a_gang_idles_only_while_work_waits() -> None:
    one = [asked(0.0, 1.0, 1.0), asked(0.0, 2.0, 1.0), asked(0.0, 3.5, 1.0)]
    assert idle_s(one, 1) == 0.5  # from 2.0 to 2.5, with the third waiting
    assert idle_s([asked(0.0, 1.0, 1.0), asked(9.0, 10.0, 1.0)], 1) == 0.0  # nothing waited
    assert idle_s([asked(0.0, 4.0, 4.0), asked(1.0, 4.0, 1.0)], 2) == 2.0  # one of two gangs idled


def test_overtaken_counts_what_was_sent_later() -> None:
    late = [asked(0.0, 9.0, 1.0), *(asked(1.0 + at, 2.0 + at, 1.0) for at in range(4))]
    assert overtaken(late, gangs=1) == 4
    assert overtaken(late, gangs=3) == 2
