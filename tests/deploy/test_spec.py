"""Deployment files: what is read, what is refused, and what the refusal says."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from deploy.load import load_spec
from deploy.model_spec import ModelSpec
from deploy.spec import DeploymentSpec, SpecError
from deploy.storage_spec import Storage
from sp_core.degrees import ParallelDegrees


def write(folder: Path, content: Any) -> Path:
    file = folder / "deployment.yaml"
    file.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return file


def a_model(**changes: Any) -> dict[str, Any]:
    return {"models": [{"name": "a", "source": "model", "device": "cpu"} | changes]}


COMPILED: dict[str, Any] = {"compile": True, "warmup_shapes": [{"width": 64, "height": 64}], "device": "cuda"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (a_model(paralel={}), "models.0.paralel: unknown key; did you mean 'parallel'?"),
        (a_model(parallel={"ulyses_degree": 2}), "did you mean 'ulysses_degree'?"),
        (a_model(parallel={"ulysses_degree": 0}), "ulysses_degree must be a whole number of at least 1, got 0"),
        (a_model(parallel={"ulysses_degree": True}), "ulysses_degree must be a whole number of at least 1, got True"),
        (a_model(limits={"max_n": 11}), "models.0.limits.max_n"),
        (a_model(device="tpu"), "models.0.device: Input should be 'cuda' or 'cpu', got 'tpu'"),
        (a_model(name="a b"), "models.0.name"),
        (a_model(max_queued=0), "models.0.max_queued"),
        (a_model() | {"gateway": {"host": "0.0.0.0"}}, "nobody needs a key; set auth.api_keys_env or"),
        (a_model() | {"gateway": {"host": "spray.example"}}, "or allow it with auth.insecure: true"),
        (a_model(timeouts={"startup_s": float("inf")}), "models.0.timeouts.startup_s: Input should be a finite number"),
        (a_model(limits={"max_width": 512}), "defaults.width is 1024, above limits.max_width, 512"),
        (a_model(defaults={"height": 100}), "defaults.height is 100, not a multiple of 16"),
        (a_model(compile=True), "compile needs warmup_shapes, or the first callers would wait"),
        (
            a_model(batch_guidance=True, parallel={"cfg_parallel_size": 2}),
            "batch_guidance is true, but parallel.cfg_parallel_size is 2, which gives each branch ranks of its own",
        ),
        (a_model(batch_guidance="always"), "batch_guidance"),
        (a_model(cuda_graphs=True, device="cuda"), "cuda_graphs is true, but compile is false; set it"),
        (a_model(cuda_graphs=True, **COMPILED | {"device": "cpu"}), "but device is cpu; leave cuda_graphs out"),
        (
            a_model(cuda_graphs=True, **COMPILED, parallel={"tensor_parallel_size": 2}),
            "but tensor_parallel_size is above 1; use ulysses_degree or ring_degree",
        ),
        (
            a_model(elastic={"min_degree": 3}, parallel={"ulysses_degree": 4}),
            "min_degree must be one of 1, 2, 4, got 3",
        ),
        (a_model(elastic={"min_degree": 4}, parallel={"ulysses_degree": 2}), "min_degree must be one of 1, 2, got 4"),
        (a_model(elastic={}, parallel={"ulysses_degree": 3}), "needs a power of two of ranks"),
        (a_model(elastic={}, vae="rank0"), "elastic needs the VAE on every rank, and vae is rank0"),
        (a_model(elastic={}, cuda_graphs=True, **COMPILED), "elastic gangs cannot record CUDA graphs yet"),
        (a_model(warmup_shapes=[{"width": 4096, "height": 64}]), "warmup_shapes.0 is 4096x64, above the limits"),
        (a_model(warmup_shapes=[{"width": 100, "height": 64}]), "warmup_shapes.0 is not a multiple of 16 pixels"),
        (a_model(warmup_shapes=[{"width": 64, "height": 64, "num_frames": 500}]), "above limits.max_num_frames"),
        (a_model(text_encoder="rank1"), "models.0.text_encoder: Input should be 'rank0' or 'replicate', got 'rank1'"),
        (a_model(loras=[{"name": "b", "source": "b"}] * 2), "two adapters for transformer are called 'b'"),
        ({"models": []}, "at least one model is needed"),
        ({"models": a_model()["models"] * 2}, "two models are called 'a'"),
        (a_model() | {"metrics": {"port": 8000}}, "yaml: metrics.port and gateway.port are both 8000"),
        (a_model() | {"gateway": {"port": 9000}}, "yaml: gateway.port and gateway.grpc_port are both 9000"),
        (a_model() | {"gateway": {"grpc_port": 9464}}, "metrics.port and gateway.grpc_port are both 9464"),
        ({"model": []}, "model: unknown key; did you mean 'models'?"),
        ([], "expected a mapping with the key 'models', got list"),
        ("{", "is not YAML"),
        ("\x00", "is not YAML"),
    ],
)
def test_refused_files(tmp_path: Path, content: Any, says: str) -> None:
    with pytest.raises(SpecError) as refused:
        load_spec(write(tmp_path, content))
    assert says in str(refused.value)


def test_a_missing_file() -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        load_spec(Path("/nowhere/x.yaml"))


def test_sources_are_relative_to_the_file(tmp_path: Path) -> None:
    spec = load_spec(write(tmp_path, a_model(source="../m")))
    assert spec.models[0].source == str(tmp_path.parent / "m")


def test_degrees_multiply() -> None:
    degrees = ParallelDegrees(ulysses_degree=2, ring_degree=3, tensor_parallel_size=4, cfg_parallel_size=2)
    assert (degrees.sequence_parallel_size, degrees.world_size) == (6, 48)
    assert str(ParallelDegrees()) == "1 rank"
    assert str(degrees).startswith("ulysses_degree=2 x ring_degree=3")
    for wrong in (0, -1, 1.0, "2", True):
        with pytest.raises(ValueError, match="ulysses_degree must be a whole number"):
            ParallelDegrees(ulysses_degree=wrong)  # type: ignore[arg-type]


def test_a_spec_survives_the_journey_to_the_gateway() -> None:
    model = ModelSpec(name="a", source="/m", device="cpu", parallel=ParallelDegrees(ulysses_degree=3))
    assert ModelSpec.model_validate(json.loads(model.model_dump_json())) == model
    assert DeploymentSpec(models=(model,)).gateway.host == "127.0.0.1"


def test_jobs_are_kept_in_one_place() -> None:
    assert Storage(jobs="/jobs").jobs_url_env is None
    assert Storage(jobs_url_env="JOBS_URL").jobs is None
    with pytest.raises(ValueError, match="jobs is /jobs and jobs_url_env is JOBS_URL; leave one of them out"):
        Storage(jobs="/jobs", jobs_url_env="JOBS_URL")
    with pytest.raises(ValueError, match="jobs"):
        Storage(jobs="relative")
