"""Notices prompts that are longer than a text encoder reads, which pipelines cut silently, and counts what it reads.

`workers.model.denoising` replaces each tokenizer of a request's pipeline by a `WatchedTokenizer`, and reads the
warnings and the counts once the prompts are encoded.
"""

import copy
import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch

from sp_core.stand_in import StandIn

PROMPTS = ("prompt", "negative_prompt")
"""The prompts, in the order in which every pipeline encodes them."""

TOKENIZERS = ("tokenizer", "processor")
"""How the names begin of components that make tokens of prompts. A processor takes pictures as well."""

SHAPES = ("truncation", "max_length", "padding", "pad_to_multiple_of", "return_tensors")
"""Options without which a tokenizer makes all tokens of each text, and no more."""


def watch_tokenizers(pipeline: Any, most: Mapping[str, int], warnings: list[str]) -> list["WatchedTokenizer"]:
    """Replace each tokenizer of a request's pipeline by a `WatchedTokenizer`, and return these.

    Args:
        pipeline: the request's own.
        most: by component, how many tokens of a prompt the pipeline passes on where it cuts them itself.
        warnings: collects warnings for the caller.
    """
    found = {
        name: part for name, part in pipeline.components.items() if part is not None and name.startswith(TOKENIZERS)
    }
    watched = [WatchedTokenizer(name, part, most.get(name), warnings) for name, part in found.items()]
    for name, part in zip(found, watched, strict=True):
        setattr(pipeline, name, part)
    return watched


class WatchedTokenizer(StandIn):
    """A tokenizer that remembers which texts it has cut. For one request: what a pipeline sets stays with it.

    Args:
        name: the name of the component.
        tokenizer: the model's tokenizer, or a processor, whose first argument is pictures instead of text.
        most: how many tokens of a prompt the pipeline passes on; None: all that it gets.
        warnings: collects warnings for the caller.
    """

    def __init__(self, name: str, tokenizer: Any, most: int | None, warnings: list[str]) -> None:
        super().__init__(copy.copy(tokenizer))
        self._name = name
        self._most = most
        self._warnings = warnings
        self._read = 0
        self._encoded = 0
        self._cut: list[str] = []  # the latest texts that were to be cut
        self._whole: tuple[list[str], int, int] | None = None  # those before that were not; the longest and all tokens

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:  # such as the side of the padding, which pipelines set before they use it
            setattr(self._original, name, value)

    @property
    def tokens_read(self) -> int:
        """Tokens that it has made for the text encoder, without padding."""
        return self._read

    def __call__(self, text: Any, **options: Any) -> Any:
        """The tokenizer's own result. Counts its tokens, and warns if the text was cut."""
        made = self._original(text=text, **options)
        texts = [text] if isinstance(text, str) else list(text)
        self._watch(texts, made, options, functools.partial(self._original, text=texts, verbose=False))
        return made

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any:
        """The tokenizer's own result, watched like that of `__call__` if it is tokens."""
        made = self._original.apply_chat_template(conversation, **options)
        if options.get("tokenize"):
            again = functools.partial(self._original.apply_chat_template, conversation)
            self._watch([str(conversation)], made, options, again)
        return made

    def _watch(self, texts: list[str], made: Any, options: dict[str, Any], again: Callable[..., Any]) -> None:
        lengths, cuts = _lengths(made), bool(options.get("truncation"))
        if not cuts and texts == self._cut:
            return  # the pipeline only logs what was cut
        self._read += sum(lengths)
        whole = longest = max(lengths, default=0)
        if not cuts:
            self._whole = texts, longest, sum(lengths)
        elif self._whole and all(a.startswith(b) for a, b in zip(self._whole[0], texts, strict=False)):
            _, whole, counted = self._whole  # the pipeline has looked at the length first, and maybe cut the text
            self._read -= counted
        else:
            bare = {name: value for name, value in options.items() if name not in SHAPES}
            whole = max(_lengths(again(**bare)), default=0)
        if cuts:
            self._cut, self._whole = texts, None
        if cuts or self._most:
            self._compare(whole, min(longest, self._most or longest))

    def _compare(self, whole: int, kept: int) -> None:
        prompt = PROMPTS[min(self._encoded, len(PROMPTS) - 1)]
        self._encoded += 1
        if whole > kept:
            encoder = "text_encoder" + self._name.removeprefix("tokenizer").removeprefix("processor")
            self._warnings.append(cut(prompt, encoder, kept, whole))


def cut(prompt: str, encoder: str, kept: int, whole: int) -> str:
    """The warning that of a prompt only so many tokens are read."""
    return f"{prompt}: {encoder} reads {kept} of {whole} tokens; the rest does not reach it"


def _lengths(made: Any) -> list[int]:
    """The tokens of each text, without padding."""
    mask = made.get("attention_mask", [])
    rows = [mask] if len(mask) and isinstance(mask[0], int) else mask
    return [int(torch.as_tensor(row).sum()) for row in rows]
