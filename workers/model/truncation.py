"""Notices prompts that are longer than a text encoder reads. Pipelines cut them silently.

`workers.model.denoising` replaces each tokenizer of a request's pipeline by a `WatchedTokenizer`, and reads the
warnings once the prompts are encoded.
"""

import copy
from typing import Any

import torch

from sp_core.stand_in import StandIn

PROMPTS = ("prompt", "negative_prompt")
"""The prompts, in the order in which every pipeline encodes them."""

PICTURES = ("images", "videos")
"""Inputs of a processor besides the text, which marks their places."""


def watch_tokenizers(pipeline: Any, unread: int, warnings: list[str], read: list[int]) -> None:
    """Replace each tokenizer of a request's pipeline by a `WatchedTokenizer` with these arguments."""
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            setattr(pipeline, name, WatchedTokenizer(name, tokenizer, unread, warnings, read))


class WatchedTokenizer(StandIn):
    """A tokenizer that remembers which texts it has cut. For one request: what a pipeline sets stays with it.

    Args:
        name: the name of the component.
        tokenizer: the model's tokenizer, or a processor, whose first argument is pictures instead of text.
        unread: how many of the tokens that it keeps the pipeline drops afterwards.
        warnings: collects warnings for the caller.
        read: collects the number of tokens of each call, without padding.
    """

    def __init__(self, name: str, tokenizer: Any, unread: int, warnings: list[str], read: list[int]) -> None:
        super().__init__(copy.copy(tokenizer))
        self._name = name
        self._unread = unread
        self._warnings = warnings
        self._read = read
        self._encoded = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            super().__setattr__(name, value)
        else:  # such as the side of the padding, which pipelines set before they use it
            setattr(self._original, name, value)

    def __call__(self, text: Any, *, truncation: bool = False, max_length: int | None = None, **options: Any) -> Any:
        """The tokenizer's own result. Records its length, and a warning if the text was cut."""
        made = self._original(text=text, truncation=truncation, max_length=max_length, **options)
        if "attention_mask" in made:
            self._read.append(int(torch.as_tensor(made["attention_mask"]).sum()))
        if truncation and max_length is not None:
            pictures = {name: options[name] for name in PICTURES if name in options}
            self._compare(text, pictures, max_length - self._unread)
        return made

    def _compare(self, text: Any, pictures: dict[str, Any], kept: int) -> None:
        prompt = PROMPTS[min(self._encoded, len(PROMPTS) - 1)]
        self._encoded += 1
        texts = [text] if isinstance(text, str) else text
        whole = max(len(ids) for ids in self._original(text=texts, verbose=False, **pictures).input_ids)
        if whole > kept:
            encoder = self._name.replace("tokenizer", "text_encoder")
            self._warnings.append(f"{prompt}: {encoder} reads {kept} of {whole} tokens; the rest does not reach it")
