"""Numbers of frames that a gateway chose without knowing the model, which the ranks lower to what it makes."""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from service.api.made import frames_again, made_size
from sp_core.degrees import ParallelDegrees
from sp_core.mesh import ParallelMesh
from tests.support.deployments import model
from tests.workers.test_classic_clips import REQUEST, adapter
from tests.workers.test_denoising import begun
from workers.errors import InvalidParameter
from workers.model.loader import load_model


@pytest.mark.parametrize(
    ("pipeline", "attributes", "chosen", "made"),
    [
        ("LTXPipeline", {"vae_temporal_compression_ratio": 8}, 101, 97),
        ("LTXPipeline", {"vae_temporal_compression_ratio": 8}, 97, 97),
        ("LTXPipeline", {"vae_temporal_compression_ratio": 8}, 5, 1),
        ("MochiPipeline", {"vae_temporal_scale_factor": 6}, 81, 79),
        ("LattePipeline", {"transformer": SimpleNamespace(config=SimpleNamespace(video_length=16))}, 81, 16),
        ("AllegroPipeline", {"vae": SimpleNamespace(kernel=(24, 320, 320), stride=(16, 200, 240))}, 101, 88),
        ("WanVideoToVideoPipeline", {"vae_scale_factor_temporal": 4}, 101, 101),
    ],
)
def test_a_number_of_frames_that_nobody_gave_is_lowered_to_what_the_model_makes(
    pipeline: str, attributes: dict[str, Any], chosen: int, made: int
) -> None:
    parts = SimpleNamespace(**{"vae": SimpleNamespace()} | attributes)
    request = replace(REQUEST, width=320, height=320, num_frames=chosen)
    settled = adapter(pipeline).settled(parts, replace(request, frames_chosen=True))
    assert settled == replace(request, num_frames=made, frames_chosen=True)
    adapter(pipeline).check_frames(parts, settled)
    assert adapter(pipeline).settled(parts, request) == request
    with pytest.raises(InvalidParameter) if made != chosen else nullcontext():
        adapter(pipeline).check_frames(parts, request)


def test_what_was_made_of_a_lowered_number_of_frames_is_told(demo_models: dict[str, Path]) -> None:
    request = replace(REQUEST, prompt="a cup", width=64, height=64, num_frames=13, frames_chosen=True)
    mesh = ParallelMesh.create(ParallelDegrees(), device_type="cpu", timeout_s=60)
    denoising = begun(load_model(model(demo_models["ltx"]), mesh), request)
    while not denoising.done:
        denoising.step()
    assert [len(frames) for frames in denoising.finish()] == [9]
    assert denoising.warnings == ("num_frames: the model made 9, not 13",)
    assert made_size(64, 64, 13, denoising.warnings).num_frames == 9


def test_a_job_tells_a_number_of_frames_that_asks_for_the_same_again() -> None:
    told = ("num_frames: the model made 9, not 13",)
    chosen = replace(REQUEST, num_frames=13, frames_chosen=True)
    assert [frames_again(chosen, told), frames_again(chosen, ())] == [9, 13]
    assert frames_again(replace(chosen, frames_chosen=False), told) == 13  # named by the caller, who named it again
