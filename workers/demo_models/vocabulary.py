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
EDIT_WORDS = (
    "system\nDescribe the key features of the input image (color, shape, size, texture, objects, background), then "
    "explain how the user's text instruction should alter or modify the image. Generate a new image that meets the "
    "user's requirements while maintaining consistency with the original input where appropriate.\nuser\n\nassistant\n"
)
CHARACTERS = string.ascii_letters + string.digits + string.punctuation


def qwen2(words: str = SYSTEM_WORDS, special: tuple[str, ...] = (), **options: Any) -> Any:
    """Byte-level BPE that knows the words of a system prompt: pipelines count on the number of their tokens.

    Args:
        words: each of them is a token; those of Qwen-Image's prompt are 34 together, those of its edits 64.
        special: further tokens that prompts are written with.
        options: further arguments of `Qwen2Tokenizer`, for instance `chat_template`.
    """
    all_special = [*SPECIAL_TOKENS, *VISION_TOKENS, *special]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.train_from_iterator(
        [words] * 2,
        trainers.BpeTrainer(
            special_tokens=all_special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    learned = json.loads(bpe.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=learned["vocab"],
        merges=[tuple(pair) for pair in learned["merges"]],
        additional_special_tokens=all_special[1:],
        model_max_length=2048,
        padding_side="right",
        **options,
    )


def t5(**options: Any) -> Any:
    """A token per character, for T5 and UMT5. What it does not know is one and the same token. Options of the tokenizer
    may be added."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *CHARACTERS]
    scores = [0.0 if len(piece) > 1 else -1.0 for piece in pieces]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=512, **options)


def clip() -> Any:
    """A token per byte. CLIP tells the last of a word from the others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(piece + "</w>" for piece in alphabet), "<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[], model_max_length=77)
