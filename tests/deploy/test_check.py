"""Whether a deployment can work: layouts, devices, families, memory; and what the refusal says."""

import re
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from deploy.check import check_deployment
from deploy.load import load_spec
from deploy.memory import rank_memory
from deploy.model_folder import cache_root, cached_folder
from deploy.model_sections import Autoscaling, Limits, Placement
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from deploy.storage_spec import Storage
from service.cli.commands import files
from service.cli.main import main
from sp_core.degrees import ParallelDegrees
from tests.deploy.test_spec import COMPILED, a_model, write
from tests.support.model_folders import stub_model

DEVICES = {"cpu": 2.0, "cuda": 0.0}


def a_folder(tmp_path: Path, heads: int) -> Path:
    return stub_model(tmp_path / "model", num_attention_heads=heads)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            {"parallel": {"tensor_parallel_size": 5}},
            "a: tensor_parallel_size=5 does not divide the model's 12 attention heads; allowed: 1, 2, 3, 4, 6, 12",
        ),
        ({"parallel": {"ulysses_degree": 3}}, "3 CPU cores are needed (a 3), 2 are available; lower the degrees"),
        ({"device": "cuda"}, "1 GPU is needed (a 1), 0 are available"),
        ({"device": "cuda", "placement": {"cpus_per_rank": 8}}, "8 CPU cores are needed (a 8), 2 are available"),
        ({"source": "elsewhere"}, "model_index.json is missing"),
    ],
)
def test_layouts_that_cannot_work(
    tmp_path: Path,
    changes: dict[str, Any],
    says: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(files, "local_devices", lambda: dict(DEVICES))
    a_folder(tmp_path, heads=12)
    file = write(tmp_path, a_model(**changes))
    with pytest.raises(SpecError) as refused:
        check_deployment(load_spec(file), DEVICES)
    assert says in str(refused.value)
    for command in ("check", "serve"):  # the same words, before anything is started
        assert main([command, str(file)]) == 1
        assert says in capsys.readouterr().err


def test_a_pipeline_that_spray_cannot_run_is_refused_by_name(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, heads=12)
    (folder / "model_index.json").write_text('{"_class_name": "KolorsPipeline"}')
    (folder / "transformer" / "config.json").write_text("[]")
    with pytest.raises(SpecError, match="is for KolorsPipeline, which spray cannot run step by step"):
        check_deployment(load_spec(write(tmp_path, a_model())), DEVICES)


@pytest.mark.parametrize(
    ("pipeline", "config", "parallel", "says"),
    [
        (
            "FluxPipeline",
            {},
            {"cfg_parallel_size": 2},
            "a: cfg_parallel_size=2, but the model evaluates only one branch",
        ),
        (
            "WanPipeline",
            {"ffn_dim": 9},
            {"tensor_parallel_size": 2},
            "a: tensor_parallel_size=2 does not divide the 9 f",
        ),
        (
            "ZImagePipeline",
            {"_class_name": "ZImageTransformer2DModel", "dim": 12, "n_heads": 12},
            {"tensor_parallel_size": 6},
            "a: tensor_parallel_size=6 does not divide the 32 features",
        ),
    ],
)
def test_layouts_that_a_family_cannot_run(
    tmp_path: Path, pipeline: str, config: dict[str, Any], parallel: dict[str, int], says: str
) -> None:
    stub_model(tmp_path / "model", pipeline, **({"num_attention_heads": 12} | config))
    file = write(tmp_path, a_model(parallel=parallel, placement={"cpus_per_rank": 0.1}))
    with pytest.raises(SpecError, match=says):
        check_deployment(load_spec(file), DEVICES)


def test_a_model_of_one_branch_has_none_to_batch(tmp_path: Path) -> None:
    stub_model(tmp_path / "model", "FluxPipeline", num_attention_heads=12)
    file = write(tmp_path, a_model(batch_guidance=True))
    with pytest.raises(SpecError, match="a: batch_guidance is true, but the model evaluates only one branch"):
        check_deployment(load_spec(file), DEVICES)


def test_a_config_without_its_width_is_not_a_crash(tmp_path: Path) -> None:
    folder = stub_model(tmp_path / "model", "ZImagePipeline")
    (folder / "transformer" / "config.json").write_text('{"_class_name": "AModel"}')
    assert check_deployment(load_spec(write(tmp_path, a_model())), DEVICES)


def test_adapters_must_be_there(tmp_path: Path) -> None:
    a_folder(tmp_path, heads=12)
    file = write(tmp_path, a_model(loras=[{"name": "ink", "source": "ink.safetensors"}]))
    with pytest.raises(SpecError, match=f"the adapter 'ink' has no file at {tmp_path}/ink.safetensors"):
        check_deployment(load_spec(file), DEVICES)
    (tmp_path / "ink.safetensors").touch()
    with pytest.raises(
        SpecError, match=r"the adapter 'ink': .*ink\.safetensors \(0 bytes\) is not a whole safetensors"
    ):
        check_deployment(load_spec(file), DEVICES)
    save_file({"a": torch.zeros(1)}, tmp_path / "ink.safetensors")
    check_deployment(load_spec(file), DEVICES)


def test_a_pipeline_that_would_make_another_size_is_refused(tmp_path: Path) -> None:
    folder = a_folder(tmp_path, heads=12)
    (folder / "model_index.json").write_text('{"_class_name": "WanPipeline", "expand_timesteps": true}')
    with pytest.raises(SpecError, match="is a Wan TI2V model"):
        check_deployment(load_spec(write(tmp_path, a_model())), DEVICES)


def test_what_each_replica_takes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_folder(tmp_path, heads=12)
    file = write(tmp_path, a_model(parallel={"ulysses_degree": 4}, placement={"cpus_per_rank": 0.5}))
    assert main(["check", str(file), "--cpus", "2"]) == 0
    assert capsys.readouterr().out == "a: ulysses_degree=4, each replica takes 2 CPU cores (4 ranks, float32)\n"


def test_check_says_who_works_with_whom_and_what_heads_cost(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "local_devices", lambda: dict(DEVICES))
    a_folder(tmp_path, heads=12)
    layout = {"tensor_parallel_size": 2, "ulysses_degree": 4, "cfg_parallel_size": 2}
    file = write(tmp_path, a_model(parallel=layout, placement={"cpus_per_rank": 0.125}))
    assert main(["check", str(file)]) == 0
    assert capsys.readouterr().out.splitlines()[1:] == [
        "a: cfg      0 8 | 1 9 | 2 10 | 3 11 | 4 12 | 5 13 | 6 14 | 7 15",
        "a: ulysses  0 2 4 6 | 1 3 5 7 | 8 10 12 14 | 9 11 13 15",
        "a: tp       0 1 | 2 3 | 4 5 | 6 7 | 8 9 | 10 11 | 12 13 | 14 15",
        "a: ulysses_degree=4 shares 6 attention heads as 2, 2, 2, 0, so attention takes 1.33x an even share's time; "
        "ulysses_degree=2 x ring_degree=2 x tensor_parallel_size=2 x cfg_parallel_size=2 shares them evenly",
    ]


def test_check_says_when_groups_of_guidance_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "local_devices", lambda: dict(DEVICES))
    a_folder(tmp_path, heads=12)
    for groups, idle in ((2, False), (3, True)):
        file = write(tmp_path, a_model(parallel={"cfg_parallel_size": groups}, placement={"cpus_per_rank": 0.125}))
        assert main(["check", str(file)]) == 0
        assert ("guidance has 2 branches: 1 of 3 groups idle" in capsys.readouterr().out) is idle


def test_another_machine_has_cpu_cores_enough(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "local_devices", lambda: {"cpu": 1.0, "cuda": 0.0})
    a_folder(tmp_path, heads=12)
    file = write(tmp_path, a_model(device="cuda", parallel={"ulysses_degree": 4}))
    assert main(["check", str(file), "--gpus", "4"]) == 0
    assert main(["check", str(file), "--gpus", "4", "--cpus", "3"]) == 1
    assert "4 CPU cores are needed (a 4), 3 are available" in capsys.readouterr().err


def test_a_folder_has_no_revision(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a_folder(tmp_path, heads=12)
    assert main(["check", str(write(tmp_path, a_model(revision="main"))), "--cpus", "1"]) == 1
    assert "a: revision belongs to a hub id, but source is the folder" in capsys.readouterr().err


GANGS = [
    ("min 1, two models", [{}, {}], 2.0, None),
    ("two sleepers take turns", [{"min": 0}, {"min": 0}], 1.0, None),
    ("one beside a sleeper", [{}, {"min": 0}], 2.0, None),
    (
        "a sleeper could not wake",
        [{}, {"min": 0}],
        1.0,
        r"2 GPUs are needed \(m0 1, m1 1 when it wakes\), 1 is available",
    ),
    ("several replicas", [{"min": 3}], 2.0, r"3 GPUs are needed \(m0 1 x 3\), 2 .* autoscaling.min_replicas"),
]


@pytest.mark.parametrize(("models", "gpus", "says"), [gangs[1:] for gangs in GANGS], ids=[gangs[0] for gangs in GANGS])
def test_gangs_that_always_run_must_fit(
    tmp_path: Path, models: list[dict[str, int]], gpus: float, says: str | None
) -> None:
    folder = str(a_folder(tmp_path, heads=12))
    specs = tuple(
        ModelSpec(
            name=f"m{i}", source=folder, autoscaling=Autoscaling(min_replicas=model.get("min", 1), max_replicas=4)
        )
        for i, model in enumerate(models)
    )
    devices = {"cpu": 8.0, "cuda": gpus}
    if says is None:
        assert len(check_deployment(DeploymentSpec(models=specs), devices)) == len(models)
    else:
        with pytest.raises(SpecError, match=says):
            check_deployment(DeploymentSpec(models=specs), devices)


def test_gangs_that_must_not_be_torn(tmp_path: Path) -> None:
    model = ModelSpec(name="a", source=str(a_folder(tmp_path, heads=12)), parallel=ParallelDegrees(ulysses_degree=4))
    devices = {"cpu": 8.0, "cuda": 4.0}
    with pytest.raises(SpecError, match=r"a: its 4 ranks must be on one node .* has 2 GPUs; .* to PACK"):
        check_deployment(DeploymentSpec(models=(model,)), devices, gpus_per_node=2)
    packed = model.model_copy(update={"placement": Placement(strategy="PACK")})
    assert check_deployment(DeploymentSpec(models=(packed,)), devices, gpus_per_node=2)


def test_hub_models_that_are_not_here_are_no_obstacle(tmp_path: Path) -> None:
    model = ModelSpec(name="a", source="org/name", device="cpu", revision="v1")
    spec = DeploymentSpec(models=(model,), storage=Storage(models=str(tmp_path)))
    assert "the config of org/name at v1 is not on this machine" in check_deployment(spec, DEVICES, 2**30)[1]
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    stub_model(snapshot, num_attention_heads=5)
    (tmp_path / "models--org--name" / "refs").mkdir()
    (tmp_path / "models--org--name" / "refs" / "v1").write_text("0123")
    assert cached_folder("org/name", "v1", tmp_path) == cached_folder("org/name", "0123", tmp_path) == snapshot
    assert cached_folder("org/name", None, tmp_path) is None
    assert cached_folder("org/name--x", None, tmp_path) is None  # not a hub id
    assert len(check_deployment(spec, DEVICES)) == 1
    (snapshot / "vae" / "config.json").rename(snapshot / "vae.json")  # the download was interrupted
    assert "is not on this machine" in check_deployment(spec, DEVICES)[1]
    (snapshot / "vae.json").rename(snapshot / "vae" / "config.json")
    shared = model.model_copy(update={"parallel": ParallelDegrees(tensor_parallel_size=2)})
    with pytest.raises(SpecError, match="does not divide the model's 5 attention heads"):
        check_deployment(spec.model_copy(update={"models": (shared,)}), DEVICES)


def test_where_the_hubs_cache_is() -> None:
    assert cache_root(None) == Path(huggingface_hub.constants.HF_HUB_CACHE)
    assert cache_root("/m") == Path("/m")


def test_graphs_of_sequence_ranks_are_allowed_and_not_counted(tmp_path: Path, demo_model: Path) -> None:
    content = a_model(cuda_graphs=True, **COMPILED, parallel={"ulysses_degree": 2, "ring_degree": 2})
    (model,) = load_spec(write(tmp_path, content)).models
    assert model.cuda_graphs
    assert " for CUDA + unknown CUDA graphs = " in str(rank_memory(model, demo_model))
    assert "graphs" not in str(rank_memory(model.model_copy(update={"cuda_graphs": False}), demo_model))


def test_memory_of_the_largest_rank(tmp_path: Path, demo_model: Path) -> None:
    model = ModelSpec(name="a", source=str(demo_model), limits=Limits(max_n=2))
    devices = {"cpu": 8.0, "cuda": 8.0}
    line = check_deployment(DeploymentSpec(models=(model,)), devices, 80 * 2**30)[-1]
    assert re.fullmatch(
        r"a: largest rank: [\d.]+ MiB of weights \+ [\d.]+ GiB of activations at 2048x2048, n=2 \+ 1.5 GiB for CUDA = "
        r"[\d.]+ GiB of 80.0 GiB", line,
    )  # fmt: skip
    needed = rank_memory(model, demo_model).total
    with pytest.raises(
        SpecError, match=r"a: largest rank: .*; what fits: .*limits.max_width 1840, limits.max_height 1840 \("
    ):
        check_deployment(DeploymentSpec(models=(model,)), devices, needed - 1)
    with pytest.raises(SpecError, match=r"a: largest rank: .*; take GPUs with more memory"):
        check_deployment(DeploymentSpec(models=(model,)), devices, 1)
    damaged = tmp_path / "damaged"
    shutil.copytree(demo_model, damaged)
    (damaged / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    with pytest.raises(SpecError, match=r"a: .*/vae/.*safetensors \(0 bytes\) is not a whole safetensors file"):
        check_deployment(DeploymentSpec(models=(model.model_copy(update={"source": str(damaged)}),)), devices, 2**40)
