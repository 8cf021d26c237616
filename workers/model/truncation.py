"""Notices prompts that are longer than what a text encoder reads, which pipelines cut without a word to the caller.

`workers.model.denoising` puts a `WatchedTokenizer` in the place of each tokenizer of a request's pipeline, and reads
the warnings once the prompts are encoded.
"""

from typing import Any

import torch

PROMPTS = ("prompt", "negative_prompt")
"""In the order in which every pipeline encodes them."""

PICTURES = ("images", "videos")
"""What a processor is given beside the text, which marks their places."""


def watch_tokenizers(pipeline: Any, unread: int, warnings: list[str], read: list[int]) -> None:
    """Replace each tokenizer of a request's pipeline by a `WatchedTokenizer`, whose arguments these are."""
    for name, tokenizer in pipeline.components.items():
        if name.startswith("tokenizer") and tokenizer is not None:
            setattr(pipeline, name, WatchedTokenizer(name, tokenizer, unread, warnings, read))


class WatchedTokenizer:
    """A tokenizer that remembers which texts it has cut.

    Args:
        name: of the component.
        tokenizer: the model's, or a processor, whose first argument is not the text but pictures.
        unread: tokens that the pipeline drops afterwards, of as many as it asks the tokenizer to keep.
        warnings: where to put what the caller should know.
        read: where to put how many tokens each call has made, padding left out.
    """

    def __init__(self, name: str, tokenizer: Any, unread: int, warnings: list[str], read: list[int]) -> None:
        self._name = name
        self._tokenizer = tokenizer
        self._unread = unread
        self._warnings = warnings
        self._read = read
        self._encoded = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, *, truncation: bool = False, max_length: int | None = None, **options: Any) -> Any:
        """What the tokenizer makes of a text."""
        made = self._tokenizer(text=text, truncation=truncation, max_length=max_length, **options)
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
        whole = max(len(ids) for ids in self._tokenizer(text=texts, verbose=False, **pictures).input_ids)
        if whole > kept:
            encoder = self._name.replace("tokenizer", "text_encoder")
            self._warnings.append(f"{prompt}: {encoder} reads {kept} of {whole} tokens; the rest does not reach it")
