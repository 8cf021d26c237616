"""What a tokenizer that is watched for a request leaves to its pipeline."""

from transformers import T5Tokenizer

from workers.demo_models import vocabulary
from workers.model.truncation import WatchedTokenizer


def test_what_a_pipeline_sets_holds_for_its_request_alone() -> None:
    """Sana's pads on the other side than its tokenizer does."""
    shared = vocabulary.t5(padding_side="left")
    watched = WatchedTokenizer("tokenizer", shared, 0, [], [])
    assert isinstance(watched, T5Tokenizer)
    watched.padding_side = "right"
    options = {"padding": "max_length", "max_length": 6}
    asked, unasked = watched("ab", **options)["attention_mask"], shared("ab", **options)["attention_mask"]
    assert (asked[0], asked[-1], unasked[0], unasked[-1]) == (1, 0, 0, 1)
