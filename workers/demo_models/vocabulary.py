"""Tokenizers for the demo models, made on the spot: no files, no network, the same at every call.

Nothing goes in but what a family's pipeline counts on; out come the tokenizers of transformers that the real models
use. Called by the families beside this file.
"""

import json
import string
from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer, Qwen2Tokenizer, T5Tokenizer

SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
SYSTEM_WORDS = (
    "system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:\nuser\n\nassistant\n"
)
CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def qwen2(**options: Any) -> Any:
    """Byte-level BPE that knows the words of Qwen-Image's system prompt: its pipeline counts on their 34 tokens.

    Args:
        options: further arguments of `Qwen2Tokenizer`, for instance `chat_template`.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        [SYSTEM_WORDS] * 2,
        trainers.BpeTrainer(
            special_tokens=SPECIAL_TOKENS + VISION_TOKENS,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        additional_special_tokens=SPECIAL_TOKENS[1:] + VISION_TOKENS,
        model_max_length=2048,
        padding_side="right",
        **options,
    )


def t5() -> Any:
    """A token per character, for T5 and UMT5. What it does not know is one and the same token."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS]
    scores = [0.0 if len(piece) > 1 else -1.0 for piece in pieces]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=512)


def clip() -> Any:
    """A token per byte. CLIP tells the last of a word from the others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(piece + "</w>" for piece in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
