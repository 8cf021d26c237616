"""A decode that fails leaves nothing in the VAE: no memory, and no frames that the next clip would go on from."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sp_core.mesh import ParallelMesh
from tests.support.deployments import model
from tests.workers.test_adapters import VIDEO
from tests.workers.test_denoising import ALONE
from workers.errors import RequestFailed
from workers.gang.elastic_rank import SECONDS, ElasticRank
from workers.gang.rank import Rank
from workers.messages import Drawn, GenerationRequest, Part, Preview, PreviewOptions
from workers.model.denoising import Denoising
from workers.model.loader import load_model


def started(folder: Path, kind: type[Rank] = Rank) -> Rank:
    spec = model(folder)
    rank = kind(0, spec)
    rank._use(load_model(spec, ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60)))
    return rank


def draw(rank: Rank, request: GenerationRequest) -> tuple[bytes, list[Any]]:
    """The file, and what was reported before."""
    if isinstance(rank, ElasticRank):
        reports = list(rank.advance(Part(request, 1, 1, rank.encode(request))))
    else:
        reports = list(rank.generate(request))
    assert isinstance(reports[-1], Drawn)
    (file,) = rank.answer(request.request_id).outputs
    return file, reports


def failing(rank: Rank, call: int) -> Any:
    """A patch of the rank's decoder, which fails once, at this call."""
    decoder, calls = rank._loaded.pipeline.vae.decoder, iter(range(1000))
    forward = decoder.forward

    def once(*args: Any, **kwargs: Any) -> torch.Tensor:
        decoded: torch.Tensor = forward(*args, **kwargs)
        if next(calls) == call:
            raise RuntimeError("no room")
        return decoded

    return mock.patch.object(decoder, "forward", once)


def kept(rank: Rank) -> list[torch.Tensor]:
    """What the convolutions of the VAE keep."""
    vae = rank._loaded.pipeline.vae
    places = [*getattr(vae, "_feat_map", []), *(getattr(part, "prev_features", None) for part in vae.modules())]
    return [each for each in places if isinstance(each, torch.Tensor)]


@pytest.mark.parametrize("kind", [Rank, ElasticRank])
@pytest.mark.parametrize("family", ["wan", "easy-animate"])
def test_the_next_clip_is_what_it_always_is(demo_models: dict[str, Path], family: str, kind: type[Rank]) -> None:
    rank, request = started(demo_models[family], kind), replace(VIDEO, n=1, request_id="a")
    expected, _ = draw(rank, request)
    with failing(rank, call=1), pytest.raises(RequestFailed, match="no room"):
        draw(rank, request)
    assert kept(rank) == []
    assert draw(rank, request)[0] == expected


def test_a_device_that_fails_while_a_prompt_is_encoded_ends_its_rank(demo_models: dict[str, Path]) -> None:
    """Else every request would fail there, and the idle gang would count as sound."""
    rank = started(demo_models["wan"], ElasticRank)
    assert isinstance(rank, ElasticRank)
    broken = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
    with mock.patch.object(Denoising, "encode", side_effect=broken), pytest.raises(torch.AcceleratorError):
        rank.encode(VIDEO)


def test_the_encoding_of_the_prompt_is_part_of_what_is_answered(demo_models: dict[str, Path]) -> None:
    rank, request = started(demo_models["wan"], ElasticRank), replace(VIDEO, n=1, request_id="a")
    assert isinstance(rank, ElasticRank)
    encoded = SECONDS.pack(1000.0) + rank.encode(request)[SECONDS.size :]
    *_, drawn = rank.advance(Part(request, 1, 1, encoded))
    assert isinstance(drawn, Drawn)
    assert 1000.0 < drawn.took.encode_seconds < 1100.0


def test_a_preview_that_fails_leaves_nothing(demo_models: dict[str, Path]) -> None:
    rank, request = started(demo_models["wan"]), replace(VIDEO, n=1, request_id="a", num_inference_steps=4)
    expected, _ = draw(rank, request)
    request, reports = replace(request, previews=PreviewOptions(count=3, decoder="vae"), report_steps=True), []
    with failing(rank, call=0):
        for report in rank.generate(request):
            reports.append(report)
            assert kept(rank) == []
    assert not any(isinstance(report, Preview) for report in reports)
    assert rank.answer("a").outputs == (expected,)
