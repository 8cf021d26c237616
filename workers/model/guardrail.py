"""The guardrail of Cosmos: the checker of prompts and pictures that its license requires.

The class of a pipeline comes in; the checker for its constructor goes out. Called by `workers.model.loader`. On ranks
that read prompts or decode, it is the checker of the package `cosmos_guardrail`. Its refusals become errors for the
caller.
"""

import sys
from typing import Any

from workers.errors import InvalidParameter

REFUSED = "content_policy_violation"
"""The code of the error, which is OpenAI's own."""


def make_guardrail(kind: type, checks_here: bool) -> Any:
    """The checker of a pipeline; None if it takes no checker of Cosmos.

    Args:
        kind: the class of the pipeline.
        checks_here: whether this rank reads prompts or makes pictures.

    Raises:
        ValueError: the package is not installed, or cannot make its checker.
    """
    checker = getattr(sys.modules[kind.__module__], "CosmosSafetyChecker", None)
    if checker is None:
        return None
    if not checks_here:
        return CheckedElsewhere()
    try:
        return _telling(checker())
    except ImportError as error:
        raise ValueError(
            f"the license of {kind.__name__} asks for its guardrail: pip install cosmos_guardrail ({error})"
        ) from error
    except Exception as error:  # it fetches models of its own, and raises anything
        raise ValueError(
            f"the guardrail of {kind.__name__} cannot be made: {type(error).__name__}: {error}; install what "
            "cosmos_guardrail asks for on each node"
        ) from error


class CheckedElsewhere:
    """Replaces the checker on ranks that neither read prompts nor make pictures: rank 0 checks for all."""

    def to(self, _device: Any) -> "CheckedElsewhere":
        """Nothing to move."""
        return self

    def check_text_safety(self, _prompt: str) -> bool:
        """Rank 0 has checked it, or does, and its refusal ends the request on all ranks."""
        return True

    def check_video_safety(self, _frames: Any) -> Any:
        """No picture leaves this rank.

        Raises:
            RuntimeError: always, so that none ever leaves it unchecked.
        """
        raise RuntimeError("this rank has no guardrail, so it must not make pictures; rank 0 makes and checks them")


def _telling(checker: Any) -> Any:
    """A checker whose refusals are errors of the request. The class stays its own: pipelines ask for that."""
    reads, looks = checker.check_text_safety, checker.check_video_safety

    def check_text_safety(prompt: str) -> bool:
        if not reads(prompt):
            checker.to("cpu")  # as the pipeline does when it goes on
            raise InvalidParameter("prompt", "the model's guardrail refuses this prompt; change it", REFUSED)
        return True

    def check_video_safety(frames: Any) -> Any:
        checked = looks(frames)
        if checked is None:
            checker.to("cpu")
            raise InvalidParameter(
                "prompt", "the model's guardrail refuses what was made of this prompt; change it", REFUSED
            )
        return checked

    checker.check_text_safety, checker.check_video_safety = check_text_safety, check_video_safety
    return checker
