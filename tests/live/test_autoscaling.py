"""On a real cluster: load on one model brings gangs of it and no other, and no request fails while they come and go."""

from pathlib import Path

from service.rollout.local_cluster import LocalCluster
from tests.benchmarks.autoscale import SCALING, measure, models, plot
from tests.support.deployments import deployment, ready


def test_gangs_come_and_go_with_the_load(demo_models: dict[str, Path], tmp_path: Path) -> None:
    scaling = SCALING.model_copy(
        update={"max_replicas": 2, "downscale_delay_s": 3, "downscale_to_zero_delay_s": 6}  # fewer and sooner: quicker
    )
    with LocalCluster(deployment(*models(demo_models["z-image"], scaling))) as cluster:
        ready(cluster)
        run = measure(cluster.url, seconds=0, most=scaling.max_replicas)
    assert set(run.answers) == {200}
    counts = run.gangs("busy")
    assert counts[0] == 0 and max(counts) == scaling.max_replicas
    peak = counts.index(scaling.max_replicas)
    assert 0 not in counts[1:peak]  # how it climbs is the policy's; it does not sleep under load
    assert counts[-3:] == [1, 0, 1]  # down to one, to sleep, and woken by the last request
    assert run.gangs("still") == [1]
    assert run.pids[0] == run.pids[1]
    plot(run, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
