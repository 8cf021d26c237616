"""Checks the vocabulary of a tokenizer by its files. Without one, transformers loads a tokenizer that knows no words.

A component's folder comes in; a `ValueError` that names the file comes out. Called by `deploy.components`.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from deploy.model_folder import read_config

SENTENCEPIECE = ("spiece.model", "tokenizer.model", "sentencepiece.bpe.model")

FETCH_AGAIN = "fetch or copy the tokenizer again"


def verify_tokenizer(folder: Path, embedded: int | None) -> None:
    """Reject a tokenizer without a vocabulary, or with tokens that its text encoder has no embedding for.

    Args:
        folder: its files: `tokenizer.json`; or `vocab.json` and `merges.txt`; or a sentencepiece model.
        embedded: tokens that the text encoder knows; None if that is not known.

    Raises:
        ValueError: the vocabulary is missing, empty, or too large.
    """
    file, highest = _highest_id(folder)
    if highest is not None and embedded is not None and highest >= embedded:
        raise ValueError(
            f"{file} has a token {highest}, but the text encoder has embeddings for {embedded} tokens: they belong to "
            "different models"
        )


def verify_chat_template(folder: Path) -> None:
    """Reject a tokenizer without a template for prompts.

    Raises:
        ValueError: neither a file of its own nor the tokenizer's config has one.
    """
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if not file.is_file() and not (config.exists() and read_config(config).get("chat_template")):
        raise ValueError(
            f"{folder} has no chat template: neither {file.name} nor a key of {config.name}; {FETCH_AGAIN}"
        )


def _highest_id(folder: Path) -> tuple[Path, int | None]:
    """The file of the vocabulary, and the highest id in it; None where only the library can read it."""
    whole, words, merges = (folder / name for name in ("tokenizer.json", "vocab.json", "merges.txt"))
    if whole.exists():
        content = read_config(whole)
        model = content.get("model")
        vocabulary = model.get("vocab") if isinstance(model, dict) else None
        ids = range(len(vocabulary)) if isinstance(vocabulary, list) else _ids(vocabulary)
        added = content.get("added_tokens")
        tokens = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
        return whole, _highest(whole, ids, (token.get("id") for token in tokens))
    if words.exists():
        if not merges.is_file() or not merges.stat().st_size:
            raise ValueError(f"{merges} is missing or empty, without which {words.name} is of no use; {FETCH_AGAIN}")
        extra = folder / "added_tokens.json"
        return words, _highest(words, _ids(read_config(words)), _ids(read_config(extra)) if extra.exists() else ())
    pieces = next((folder / name for name in SENTENCEPIECE if (folder / name).is_file()), None)
    if pieces is None or not pieces.stat().st_size:
        raise ValueError(
            f"{folder} has no vocabulary: neither {whole.name}, {words.name} with {merges.name}, nor {SENTENCEPIECE[0]}"
            f"; {FETCH_AGAIN}"
        )
    return pieces, None


def _ids(vocabulary: Any) -> Iterable[Any]:
    return vocabulary.values() if isinstance(vocabulary, dict) else ()


def _highest(file: Path, ids: Iterable[Any], added: Iterable[Any]) -> int:
    of_words = [each for each in ids if isinstance(each, int)]
    if not of_words:
        raise ValueError(f"{file} has an empty vocabulary; {FETCH_AGAIN}")
    return max([*of_words, *(each for each in added if isinstance(each, int))])
