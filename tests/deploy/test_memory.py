"""What a rank needs: weight bytes are those of a real load, exactly; activations follow the layout and the request."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from deploy.activations import (
    BATCHED_TOKENS,
    Request,
    _decode_bytes,
    activation_bytes,
    largest_fitting,
    largest_request,
    why_two_forwards,
)
from deploy.families.family import DecodeBytes, ForwardBytes
from deploy.families.lookup import decode_bytes, families, forward_bytes
from deploy.memory import GIB, format_bytes, parse_memory, rank_memory, weight_bytes, what_fits
from deploy.model_sections import Limits
from deploy.model_spec import ModelSpec
from sp_core.mesh import ParallelMesh
from sp_core.models.lookup import find_family
from sp_core.verify import examples
from sp_core.verify.rank_pool import RankPool
from tests.support.deployments import model
from workers.model.loader import load_model
from workers.model.weights import load_transformer

FAMILIES = ["qwen-image", "z-image", "wan", "flux"]
SERVED = ["qwen-image", "flux", "wan", "wan image", "z-image"]


def held(mesh: ParallelMesh, spec: ModelSpec) -> int:
    """Bytes of all weights that a rank holds after loading."""
    parts = load_model(spec, mesh).pipeline.components.values()
    return sum(p.nbytes for part in parts if isinstance(part, torch.nn.Module) for p in part.parameters())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_weights_are_those_of_a_load(ranks: RankPool, demo_models: dict[str, Path], family: str, dtype: str) -> None:
    folder = demo_models[family]
    for size in (1, 2):
        spec = model(folder, tensor_parallel_size=size).model_copy(update={"dtype": dtype})
        found = ranks.run(spec.parallel, held, spec)
        assert weight_bytes(spec, folder) == found[0] == max(found)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_parts_of_a_text_encoder_that_stay_in_fp32_count_as_such(demo_models: dict[str, Path], dtype: str) -> None:
    spec = model(demo_models["bria"]).model_copy(update={"dtype": dtype})
    mesh = ParallelMesh.create(spec.parallel, device_type="cpu", timeout_s=60)
    assert weight_bytes(spec, demo_models["bria"]) == held(mesh, spec)


def held_of_transformer(mesh: ParallelMesh, folder: Path) -> int:
    return sum(p.nbytes for p in load_transformer(folder, mesh, torch.bfloat16).parameters())


@pytest.mark.parametrize("name", SERVED)
def test_shares_are_those_of_the_tensor_plans(ranks: RankPool, tmp_path: Path, name: str) -> None:
    """Every kind of transformer, with image prompts too, of which the demo models have none."""
    examples.TINY[name].model.save_pretrained(tmp_path / "transformer")  # type: ignore[operator]
    (tmp_path / "model_index.json").write_text(json.dumps({"transformer": ["diffusers", "X"]}))
    for size in (1, 2, 3):
        spec = model(tmp_path, tensor_parallel_size=size).model_copy(update={"dtype": "bfloat16"})
        if name.startswith("wan") and size == 3:
            continue  # its 64 hidden features
        if name == "z-image" and size == 3:
            continue  # its 256
        found = ranks.run(spec.parallel, held_of_transformer, tmp_path / "transformer")
        assert {weight_bytes(spec, tmp_path)} == set(found)


def test_every_served_family_is_known() -> None:
    for family in families().values():
        assert family.forward_bytes and family.decode_bytes
        assert all(find_family([kind]).tp_plan for kind in family.forward_bytes)  # type: ignore[union-attr]


def test_a_class_that_is_not_known_cannot_be_shared(tmp_path: Path) -> None:
    folder = a_model(tmp_path, "HunyuanVideoTransformer3DModel")
    examples.TINY["hunyuan-video"].model.save_pretrained(folder / "transformer")  # type: ignore[operator]
    assert rank_memory(model(folder), folder).activations is None
    assert "unknown activations" in str(rank_memory(model(folder), folder))
    with pytest.raises(ValueError, match="a HunyuanVideoTransformer3DModel has no tensor plan"):
        weight_bytes(model(folder, tensor_parallel_size=2), folder)


def a_model(folder: Path, kind: str = "QwenImageTransformer2DModel", **config: Any) -> Path:
    """A model of real width, by its configs."""
    pipeline = "WanPipeline" if kind.startswith("Wan") else "QwenImagePipeline"
    vae = "AutoencoderKLWan" if kind.startswith("Wan") else "AutoencoderKLQwenImage"
    measured = forward_bytes(kind)
    heads = {"num_attention_heads": measured.width // 128 if measured else 1, "attention_head_dim": 128}
    for part, content in {
        "transformer": {"_class_name": kind, **heads, **config},
        "vae": {"_class_name": vae, "base_dim": 96},
    }.items():
        (folder / part).mkdir(parents=True)
        (folder / part / "config.json").write_text(json.dumps(content))
    (folder / "model_index.json").write_text(json.dumps({"_class_name": pipeline, "transformer": ["diffusers", kind]}))
    return folder


def spec_of(folder: Path, tiling_above: int = 2**40, **degrees: int) -> ModelSpec:
    return model(folder, **degrees).model_copy(update={"dtype": "bfloat16", "vae_tiling_above": tiling_above})


def measured_forward(kind: str) -> ForwardBytes:
    found = forward_bytes(kind)
    assert found is not None
    return found


def measured_decode(kind: str) -> DecodeBytes:
    found = decode_bytes(kind)
    assert found is not None
    return found


LARGE = Request(2048, 2048, 1, 4)


def forward_alone(folder: Path, monkeypatch: pytest.MonkeyPatch, request: Request = LARGE, **degrees: int) -> int:
    """Bytes of the forward, with a decode that takes nothing."""
    monkeypatch.setattr("deploy.activations.decode_bytes", lambda kind: DecodeBytes(96, 0, 0, 0, 0))
    found = activation_bytes(spec_of(folder, **degrees), folder, request)
    assert found is not None
    return found


def test_a_forward_follows_the_layout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, measured = a_model(tmp_path), measured_forward("QwenImageTransformer2DModel")
    tokens = 4 * (128 * 128 + 512)
    assert forward_alone(folder, monkeypatch) == tokens * measured.alone
    assert forward_alone(folder, monkeypatch, ulysses_degree=4) == tokens // 4 * measured.ulysses
    assert forward_alone(folder, monkeypatch, ring_degree=4) == tokens // 4 * measured.ring
    assert forward_alone(folder, monkeypatch, ulysses_degree=2, ring_degree=2) == tokens // 4 * measured.ring
    shared = tokens * (measured.alone - measured.shared // 2)
    assert forward_alone(folder, monkeypatch, tensor_parallel_size=2) == shared
    assert forward_alone(folder, monkeypatch, cfg_parallel_size=2) == forward_alone(folder, monkeypatch)


def test_a_forward_of_a_video_counts_latent_frames(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model(tmp_path, "WanTransformer3DModel")
    found = forward_alone(folder, monkeypatch, Request(832, 480, 81, 1))
    assert found == 52 * 30 * 21 * measured_forward("WanTransformer3DModel").alone


def test_both_branches_in_one_forward_need_twice_as_much(demo_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.activations.decode_bytes", lambda kind: DecodeBytes(96, 0, 0, 0, 0))
    needed = {}
    for batched in (True, False, "auto"):
        spec = model(demo_model).model_copy(update={"batch_guidance": batched})
        found = rank_memory(spec, demo_model)
        assert ("both branches" in str(found)) == (batched is True)
        needed[batched] = found.activations or 0
    assert needed[True] == 2 * needed[False] > 0
    assert needed["auto"] == needed[False]
    together = model(demo_model).model_copy(update={"batch_guidance": True})
    memory = rank_memory(together, demo_model).total - 1
    assert what_fits(together, demo_model, memory, 12, None)[0].startswith("batch_guidance auto (")


def test_auto_takes_no_memory_that_the_limits_did_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = a_model(tmp_path)
    few = Request(256, 256, 1, 1)
    assert why_two_forwards(spec_of(folder), folder, few) == ""
    limits = Limits(max_width=256, max_height=256, max_n=1)
    tight = spec_of(folder).model_copy(update={"limits": limits})
    with_decode = activation_bytes(tight, folder, few)
    assert with_decode == activation_bytes(tight.model_copy(update={"batch_guidance": False}), folder, few)
    monkeypatch.setattr("deploy.activations.decode_bytes", lambda kind: DecodeBytes(96, 0, 0, 0, 0))
    assert "more memory than the largest request" in why_two_forwards(tight, folder, few)
    assert activation_bytes(tight, folder, few) == 768 * measured_forward("QwenImageTransformer2DModel").alone


def test_auto_is_for_few_tokens_of_a_rank(tmp_path: Path) -> None:
    folder = a_model(tmp_path)
    assert BATCHED_TOKENS == 512
    assert why_two_forwards(spec_of(folder), folder, Request(512, 272, 1, 1)) == "a rank has 544 tokens, above 512"
    assert why_two_forwards(spec_of(folder), folder, Request(256, 256, 1, 3)) == "a rank has 768 tokens, above 512"
    assert why_two_forwards(spec_of(folder, ulysses_degree=2), folder, Request(512, 512, 1, 1)) == ""
    assert "of its own" in why_two_forwards(spec_of(folder, cfg_parallel_size=2), folder, Request(64, 64, 1, 1))
    unknown = a_model(tmp_path / "unknown", "ATransformerThatNobodyMeasured")
    assert "nobody has measured" in why_two_forwards(spec_of(unknown), unknown, Request(64, 64, 1, 1))


def test_a_decode_in_tiles_needs_less(tmp_path: Path) -> None:
    folder, decode = a_model(tmp_path), measured_decode("AutoencoderKLQwenImage")
    request = Request(4096, 4096, 1, 1)
    whole = activation_bytes(spec_of(folder), folder, request)
    assert whole == 4096 * 4096 * decode.picture
    tiled = activation_bytes(spec_of(folder, 1024 * 1024), folder, request)
    assert tiled is not None
    assert tiled < whole / 4
    below = activation_bytes(spec_of(folder, 2048 * 2048), folder, request)
    assert below == 2048 * 2048 * decode.picture  # a picture of that size is not tiled, and allowed as well


def test_pictures_of_a_request_decode_one_after_the_other_unless_in_tiles(tmp_path: Path) -> None:
    folder = a_model(tmp_path)
    whole, tiled = spec_of(folder), spec_of(folder, 256 * 256)
    one, four = Request(1024, 1024, 1, 1), Request(1024, 1024, 1, 4)
    decode = measured_decode("AutoencoderKLQwenImage")
    assert activation_bytes(whole, folder, one) == activation_bytes(whole, folder, four) == 1024**2 * decode.picture
    in_tiles = 256**2 * decode.picture + 1024**2 * decode.tiles
    assert _decode_bytes(decode, tiled, {"sample_size": 256}, four) == 4 * in_tiles


def test_wider_types_and_wider_models_need_more(tmp_path: Path) -> None:
    folder = a_model(tmp_path)
    narrow = activation_bytes(spec_of(folder), folder, LARGE)
    assert narrow is not None
    wide = spec_of(folder).model_copy(update={"dtype": "float32"})
    assert activation_bytes(wide, folder, LARGE) == 2 * narrow


def test_the_largest_request_that_fits(tmp_path: Path) -> None:
    folder = a_model(tmp_path)
    model, tiled = spec_of(folder), spec_of(folder, 1024 * 1024)
    whole, in_tiles = activation_bytes(model, folder, LARGE), activation_bytes(tiled, folder, LARGE)
    assert whole is not None and in_tiles is not None
    assert largest_fitting(tiled, folder, LARGE, in_tiles * 4 // 5) == Request(2048, 2048, 1, 3)  # fewer pictures first
    assert largest_fitting(tiled, folder, LARGE, 10 * in_tiles) == Request(
        2048, 2048, 1, 3
    )  # it did not fit, after all
    assert largest_fitting(model, folder, LARGE, whole // 2) == Request(1432, 1432, 1, 4)  # fewer would need as much
    one = Request(2048, 2048, 1, 1)
    smaller = largest_fitting(model, folder, one, whole // 2)
    assert smaller == Request(1432, 1432, 1, 1)
    assert largest_fitting(model, folder, one, 0) is None
    unknown = a_model(tmp_path / "unknown", "ATransformerThatNobodyMeasured")
    assert largest_fitting(spec_of(unknown), unknown, one, whole) is None


def test_a_video_that_fits_is_shorter(tmp_path: Path) -> None:
    folder = a_model(tmp_path, "WanTransformer3DModel")
    model, video = spec_of(folder), Request(832, 480, 81, 1)
    needed = activation_bytes(model, folder, video)
    assert needed is not None
    shorter = largest_fitting(model, folder, video, needed * 3 // 4)
    assert shorter is not None
    assert (shorter.width, shorter.frames % 4) == (832, 1)
    assert needed // 2 < (activation_bytes(model, folder, shorter) or 0) <= needed * 3 // 4
    assert largest_fitting(model, folder, video, 10 * needed) == Request(
        832, 480, 57, 1
    )  # clearly less, whatever is free
    smaller = largest_fitting(model, folder, video, needed // 2)  # as short as it may get, it needs more than that
    assert smaller is not None
    assert (smaller.width < 832, smaller.frames) == (True, 81)


def test_the_largest_request(tmp_path: Path) -> None:
    picture = a_model(tmp_path / "a")
    video = a_model(tmp_path / "b", "WanTransformer3DModel")
    limits = Limits(max_width=832, max_height=480, max_num_frames=81, max_n=2)
    spec = model(picture).model_copy(update={"limits": limits})
    assert str(largest_request(spec, picture)) == "832x480, n=2"
    assert str(largest_request(spec, video)) == "832x480x81 frames, n=2"
    work = limits.model_copy(update={"max_work": 832 * 480 * 100})
    assert str(largest_request(spec.model_copy(update={"limits": work}), video)) == "832x480x81 frames"
    work = limits.model_copy(update={"max_work": 832 * 480 * 5})
    assert str(largest_request(spec.model_copy(update={"limits": work}), video)) == "832x480x5 frames"


def test_what_would_fit(demo_model: Path) -> None:
    spec = model(demo_model)
    needed = rank_memory(spec, demo_model)
    assert what_fits(spec, demo_model, 1, 12, None) == []
    by_layout, by_limits = what_fits(spec, demo_model, needed.total - 1, 12, None)
    assert by_layout.startswith("parallel ulysses_degree=2 (2 ranks: ") or "tensor_parallel_size=2" in by_layout
    assert by_limits.startswith("limits.max_width 224, limits.max_height 224 (")  # what decodes is one picture
    shared = rank_memory(model(demo_model, tensor_parallel_size=2), demo_model)
    assert shared.total < needed.total


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("80", 80 * GIB), ("80G", 80 * GIB), ("80GiB", 80 * GIB), ("80 gib", 80 * GIB), ("1.5G", 3 * GIB // 2),
        ("80GB", 80 * 10**9), ("80000MB", 80 * 10**9), ("1024MiB", GIB), ("1T", 1024 * GIB),
    ],
)  # fmt: skip
def test_sizes(text: str, size: int) -> None:
    assert parse_memory(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1", "0", "80X", "1e3", "80 G B"])
def test_no_sizes(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected a size such as 80, 80G"):
        parse_memory(text)


def test_sizes_in_words() -> None:
    assert (format_bytes(80 * GIB), format_bytes(GIB // 2)) == ("80.0 GiB", "512.0 MiB")
