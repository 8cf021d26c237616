"""Which GPU each rank takes, on which thread, in which order: on declared GPUs, for Ray counts without looking."""

import contextlib
import shutil
import tempfile
import threading
from collections.abc import Iterator, Mapping
from typing import Any, NoReturn

import pytest
import ray
import torch
from ray.util.placement_group import placement_group, remove_placement_group

from deploy.model_sections import Placement
from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from service.rollout.cluster_folder import place
from sp_core.degrees import ParallelDegrees
from workers.gang import local, rank_processes
from workers.gang.device import CUDA_ENVIRONMENT, Place, _visible_index, by_device, environment
from workers.gang.placement import bundle
from workers.gang.rank import Rank
from workers.gang.rank_actor import RankActor
from workers.gang.rank_processes import create
from workers.messages import GenerationRequest


@pytest.mark.parametrize(
    ("places", "order"),
    [
        ([("a", ""), ("a", "")], [0, 1]),
        ([("a", "1"), ("a", "0")], [1, 0]),
        ([("a", "10"), ("a", "9"), ("a", "2")], [2, 1, 0]),  # numbers, not words
        ([("z", "3"), ("a", "0"), ("z", "1"), ("a", "1")], [2, 0, 1, 3]),  # the first's node, not the first by name
        ([("a", ""), ("b", ""), ("a", ""), ("b", "")], [0, 2, 1, 3]),
        ([("a", "GPU-f"), ("a", "GPU-0")], [1, 0]),
        ([], []),
    ],
)
def test_ranks_are_in_the_order_of_nodes_and_gpus(places: list[tuple[str, str]], order: list[int]) -> None:
    assert by_device([Place(node, 1, gpu) for node, gpu in places]) == order


@pytest.mark.parametrize(
    ("gpu", "visible", "index"),
    [("3", None, 3), ("3", "3", 0), ("5", "7,5", 1), ("GPU-b", "GPU-a,GPU-b", 1), ("5", "7, 5", 1)],
)
def test_a_gpu_is_counted_among_those_that_cuda_shows(gpu: str, visible: str | None, index: int) -> None:
    assert _visible_index(gpu, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}) == index


@pytest.mark.parametrize(("gpu", "visible"), [("3", ""), ("3", "0,1"), ("GPU-a", None)])
def test_a_gpu_that_cuda_does_not_show_is_refused(gpu: str, visible: str | None) -> None:
    with pytest.raises(ValueError, match=f"GPU {gpu}"):
        _visible_index(gpu, {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})


def a_model(**fields: Any) -> ModelSpec:
    return ModelSpec(name="a", source="/a", parallel=ParallelDegrees(ulysses_degree=2), **fields)


def test_a_models_own_environment_wins() -> None:
    assert environment(a_model(device="cpu")) == {}
    own = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:64"}
    assert environment(a_model(env=own)) == CUDA_ENVIRONMENT | own


def test_every_method_that_computes_uses_the_ranks_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray calls them on other threads than the constructor, and torch's current device belongs to a thread."""
    used: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: used.append((device.index, threading.get_ident())))
    rank = Rank(0, a_model(), device_index=3)
    assert not used

    def compute(method: str, *args: Any) -> None:
        with contextlib.suppress(Exception):  # it has neither peers nor a model
            list(getattr(rank, method)(*args) or ())

    for call in (("join", "nowhere", 0), ("generate", None), ("set_loras", ())):
        thread = threading.Thread(target=compute, args=call)
        thread.start()
        thread.join()
        assert used.pop() == (3, thread.ident), call


def test_ranks_without_ray_have_the_environment_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Mapping[str, str]] = []

    def note(variables: Mapping[str, str]) -> NoReturn:
        given.append(variables)
        raise KeyboardInterrupt

    monkeypatch.setattr(local, "_environment", note)
    spec = a_model(env={"NCCL_DEBUG": "INFO"})
    with pytest.raises(KeyboardInterrupt):
        local.generate_locally(spec, GenerationRequest("a", "a", "a cup", 64, 64, 2, seed=7), print)
    assert given == [environment(spec)]
    assert given[0].keys() > CUDA_ENVIRONMENT.keys()


@pytest.fixture(scope="module")
def gpus() -> Iterator[None]:
    folder = tempfile.mkdtemp(prefix="ray-", dir=place())
    ray.init(address="local", num_cpus=4, num_gpus=4, include_dashboard=False, _temp_dir=folder, log_to_driver=False)
    yield
    ray.shutdown()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.processes
def test_each_rank_is_given_one_gpu_and_sees_all(gpus: None) -> None:
    model = a_model()
    options = {"num_cpus": 0.1, "num_gpus": 1, "runtime_env": {"env_vars": environment(model)}}
    actors = [RankActor.options(**options).remote(model, Storage()) for _ in range(4)]  # type: ignore[attr-defined]
    places = ray.get([actor.place.remote() for actor in actors], timeout=120)
    assert sorted(place.gpu for place in places) == ["0", "1", "2", "3"]
    ordered = [actors[i] for i in by_device(places)]
    assert [place.gpu for place in ray.get([actor.place.remote() for actor in ordered])] == ["0", "1", "2", "3"]
    seen = [actor.__ray_call__.remote(lambda actor: actor._place.cuda_index) for actor in ordered]
    assert ray.get(seen, timeout=120) == [0, 1, 2, 3]
    statuses = ray.get([actor.take_number.remote(i, model, "0") for i, actor in enumerate(ordered)])
    assert [status.rank for status in statuses] == [0, 1, 2, 3]
    for actor in actors:
        ray.kill(actor)


@pytest.mark.processes
def test_a_spare_process_has_the_gpu_of_its_rank(gpus: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = a_model(spare_ranks=True, placement=Placement(cpus_per_rank=0.1))
    group = placement_group([bundle(model)] * 2)
    assert group.wait(60)
    monkeypatch.setattr(rank_processes, "get_current_placement_group", lambda: group)

    def given(processes: list[Any]) -> list[str]:
        return [place.gpu for place in ray.get([process.place.remote() for process in processes], timeout=120)]

    ranks = create(model, Storage(), "a-1")
    own = given(ranks)
    assert len(set(own)) == 2
    waiting = create(model, Storage(), "a-1", spare=True)
    assert given(waiting) == own
    for rank in ranks:
        ray.kill(rank)
    assert given(create(model, Storage(), "a-2", spare=True)) == own  # beside those that are ranks now
    remove_placement_group(group)
