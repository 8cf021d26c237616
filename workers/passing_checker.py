"""In the place of Cosmos' guardrail in proofs and demo models: a checker that lets everything pass.

The class name of a pipeline comes in. What the guardrail answers does not depend on layouts, which is what a proof is
about, and it needs models of its own. Used by `workers.pipeline_proof` and `workers.demo_models`; nothing that serves
requests uses it.
"""

import sys
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from unittest import mock

import diffusers


class PassingChecker:
    """Has the methods of `CosmosSafetyChecker` that pipelines call."""

    def to(self, _device: Any) -> "PassingChecker":
        """Nothing to move."""
        return self

    def check_text_safety(self, _prompt: str) -> bool:
        """Every prompt is good."""
        return True

    def check_video_safety(self, frames: Any) -> Any:
        """Every frame is good, and stays as it is."""
        return frames


def everything_passes(pipeline: str) -> AbstractContextManager[Any]:
    """Within it, this pipeline's guardrail is a `PassingChecker`; nothing changes for one that has none."""
    module = sys.modules[getattr(diffusers, pipeline).__module__]
    if not hasattr(module, "CosmosSafetyChecker"):
        return nullcontext()
    return mock.patch.object(module, "CosmosSafetyChecker", PassingChecker)
