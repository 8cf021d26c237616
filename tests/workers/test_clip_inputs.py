"""The frames of a clip as classic pipelines take them, and clips after which there is nothing to make."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from tests.workers.test_classic_clips import REQUEST, adapter, call_of, clip
from workers.errors import InvalidParameter


def test_a_clip_that_controls_each_frame_gets_their_size() -> None:
    request = replace(REQUEST, width=96, height=64, inputs=(clip(12),))
    frames = adapter("WanVACEPipeline").pictures(request, here=True)["video"]
    assert [each.size for each in frames] == [(96, 64)] * 9
    assert adapter("LucyEditPipeline").pictures(request, here=True)["video"][0].size == (64, 48)  # it scales by itself
    assert not call_of("LucyEditPipeline").sized_by_clip


def test_a_call_that_takes_several_clips_gets_one() -> None:
    (frames,) = adapter("LTXConditionPipeline").pictures(replace(REQUEST, inputs=(clip(5),)), here=True)["video"]
    assert len(frames) == 5 and not call_of("AnyFlowPipeline").takes_clips


KEPT = {"AnyFlowPipeline": 4, "LTXConditionPipeline": 8}


@pytest.mark.parametrize(
    ("pipeline", "frames", "least"),
    [
        ("AnyFlowPipeline", 9, 13),
        ("AnyFlowPipeline", 12, 13),
        ("AnyFlowPipeline", 5, 9),
        ("LTXConditionPipeline", 9, 17),
    ],
)
def test_after_a_clip_that_is_kept_something_must_come(pipeline: str, frames: int, least: int) -> None:
    attributes = SimpleNamespace(
        transformer=SimpleNamespace(config={}), vae_temporal_compression_ratio=KEPT[pipeline], vae=SimpleNamespace()
    )
    request = replace(REQUEST, num_frames=least, inputs=(clip(frames),))
    adapter(pipeline).check_pictures(attributes, request)
    for chosen, said in ((False, f"got {least - 1}, and the clip"), (True, "none was given, and the clip")):
        short = replace(request, num_frames=least - 1, frames_chosen=chosen)
        with pytest.raises(InvalidParameter, match=f"must be at least {least}; {said} has {frames} frames") as refused:
            adapter(pipeline).check_pictures(attributes, short)
        assert refused.value.param == "num_frames"
    adapter(pipeline).check_pictures(attributes, short.without_data())  # as other ranks have it
    later = replace(short, extra_params={"frame_index": 8})
    if pipeline == "LTXConditionPipeline":
        adapter(pipeline).check_pictures(attributes, later)  # something comes before it
