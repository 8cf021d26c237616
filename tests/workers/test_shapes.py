"""Labels of sizes: few, and the same in every process."""

from dataclasses import replace
from itertools import product

from deploy.model_sections import Defaults, WarmupShape
from deploy.model_spec import ModelSpec
from workers.messages import GenerationRequest
from workers.shapes import Shapes

REQUEST = GenerationRequest("a", "m", "a fox", width=1024, height=1024, num_inference_steps=4, seed=1)


def test_named_sizes_and_others() -> None:
    shapes = Shapes(
        ModelSpec(
            name="m",
            source="/nowhere",
            warmup_shapes=(WarmupShape(width=1328, height=1328), WarmupShape(width=832, height=480, num_frames=81)),
            defaults=Defaults(width=1024, height=1024),
        )
    )
    for size, label in (
        ((1328, 1328, 1), "1328x1328"),
        ((832, 480, 81), "832x480x81"),
        ((1024, 1024, 1), "1024x1024"),
        ((1024, 1008, 1), "1M"),
        ((512, 512, 1), "256K"),
        ((2048, 2048, 1), "4M"),
        ((1280, 720, 81), "256M"),
        ((4096, 4096, 81), "other"),
    ):
        request = replace(REQUEST, width=size[0], height=size[1], num_frames=size[2])
        assert shapes.label(request) == label


def test_no_caller_makes_more_than_sixteen() -> None:
    warm = tuple(WarmupShape(width=64 * i, height=64) for i in range(1, 30))
    shapes = Shapes(ModelSpec(name="m", source="/nowhere", warmup_shapes=warm))
    sizes = product(range(16, 4097, 48), (64, 512, 4096), (1, 17, 400))
    labels = {shapes.label(replace(REQUEST, width=w, height=h, num_frames=f)) for w, h, f in sizes}
    labels |= {shapes.label(replace(REQUEST, width=shape.width, height=shape.height)) for shape in warm}
    assert len(labels - {"other"}) <= 16
