"""What a tokenizer that is watched for a request counts, of which cuts it warns, and what it leaves to its pipeline."""

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import T5Tokenizer

from sp_core.mesh import ParallelMesh
from tests.support.deployments import model
from tests.workers.test_adapters import PICTURES
from tests.workers.test_denoising import ALONE, begun
from workers.demo_models import vocabulary
from workers.demo_models.pipelines import demo_of, served
from workers.demo_models.writer import write_demo_model
from workers.model.adapters.classic import MOST_TOKENS
from workers.model.loader import load_model
from workers.model.truncation import WatchedTokenizer, watch_tokenizers

LONG = "abc defgh " * 180

CASES: dict[str, tuple[dict[str, Any], list[int], int]] = {
    "FluxPipeline": ({"prompt_2": None}, [77, 512], 77 + 512),  # it makes tokens again, to log what was cut
    "PixArtAlphaPipeline": ({"do_classifier_free_guidance": False}, [120], 120),
    "Flux2Pipeline": ({}, [512], 512),  # its template makes the tokens
    "HunyuanVideo15Pipeline": ({"device": torch.device("cpu")}, [1108], 1108),
    "QwenImageImg2ImgPipeline": ({"max_sequence_length": 512}, [546], 34 + 1024),
    "Kandinsky5T2IPipeline": ({}, [552, 77], 552 + 77),  # it cuts the text first
    "Krea2Pipeline": ({}, [541], 541 + 5),  # with the end of its template
    "QwenImageEditPipeline": ({"image": [Image.new("RGB", (56, 56))]}, [], 1696),  # it cuts nothing
}
"""For each pipeline what its encoding is told, how many tokens of a long prompt its encoders read, and all of them."""


@pytest.mark.parametrize("name", CASES)
def test_what_is_cut_is_told_and_what_is_read_is_counted_once(name: str) -> None:
    told, kept, read = CASES[name]
    pipeline = demo_of(served()[name], name)

    def watched(prompt: str) -> tuple[list[str], int]:
        warnings: list[str] = []
        own = copy.copy(pipeline)
        tokenizers = watch_tokenizers(own, MOST_TOKENS.get(name, {}), warnings)
        own.encode_prompt(prompt, **told)
        return warnings, sum(each.tokens_read for each in tokenizers)

    warnings, count = watched(LONG)
    assert [int(n) for each in warnings for n in re.findall(r"^prompt: text_encoder\S* reads (\d+) of", each)] == kept
    assert count == read
    warnings, count = watched("abc")
    assert not warnings and 0 < count < read


def test_a_request_counts_what_each_encoder_reads_of_it(demo_models: dict[str, Path]) -> None:
    loaded = load_model(model(demo_models["flux"]), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    prompt, pipeline = "abc " * 30, loaded.pipeline
    expected = len(pipeline.tokenizer_2(prompt).input_ids) + 77
    assert begun(loaded, replace(PICTURES, prompt=prompt, n=1)).prompt_tokens == expected


def test_a_cut_that_no_tokenizer_sees_is_told(tmp_path: Path) -> None:
    """LongCat joins the tokens of several parts."""
    write_demo_model(tmp_path / "demo", "longcat_image")
    loaded = load_model(model(tmp_path / "demo"), ParallelMesh.create(ALONE, device_type="cpu", timeout_s=60))
    told = begun(loaded, replace(PICTURES, prompt="x" * 600 + ' "yz"', n=1)).warnings
    assert told == ("prompt: text_encoder reads 512 of 605 tokens; the rest does not reach it",)
    assert begun(loaded, replace(PICTURES, prompt="x", n=1)).warnings == ()


def test_several_texts_need_not_be_of_one_length() -> None:
    """GLM-Image reads all quoted words of a prompt at once, without padding."""
    watched = WatchedTokenizer("tokenizer", vocabulary.t5(), None, [])
    lengths = [len(each) for each in watched(["ab", "abcd"], max_length=9, truncation=True).input_ids]
    assert lengths[0] < lengths[1] and watched.tokens_read == sum(lengths)


def test_what_is_passed_on_of_pictures_and_prompt_is_limited_too() -> None:
    """JoyImage-Edit's processor cuts nothing; its pipeline keeps so many of the last tokens."""
    warnings: list[str] = []
    watched = WatchedTokenizer("processor", vocabulary.t5(), 3, warnings)
    watched("abcdef")
    watched("a")
    assert warnings == ["prompt: text_encoder reads 3 of 8 tokens; the rest does not reach it"]


def test_what_a_pipeline_sets_holds_for_its_request_alone() -> None:
    """Sana's pads on the other side than its tokenizer does."""
    shared = vocabulary.t5(padding_side="left")
    watched = WatchedTokenizer("tokenizer", shared, None, [])
    assert isinstance(watched, T5Tokenizer)
    watched.padding_side = "right"
    options = {"padding": "max_length", "max_length": 6}
    asked, unasked = watched("ab", **options)["attention_mask"], shared("ab", **options)["attention_mask"]
    assert (asked[0], asked[-1], unasked[0], unasked[-1]) == (1, 0, 0, 1)
