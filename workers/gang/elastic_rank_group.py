"""ElasticRankGroup: the ranks of an elastic gang. Parts of requests run on some of them, beside one another.

Called by `workers.gang.elastic`, which chooses the ranks; `workers.gang.elastic_rank` is the other end.
"""

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import ray

from workers.gang.rank_group import OnSpans, RankGroup, outcome
from workers.gang.rank_run import Call, Report
from workers.messages import GenerationRequest, Kept, Part


class ElasticRankGroup(RankGroup):
    """The ranks of an elastic gang. Made by `start`; arguments are those of `RankGroup`."""

    _encoding = 0  # prompts that rank 0 encodes, or has before it

    async def advance(
        self, part: Part, first: int, encoded: Any, progress: bytes, on_spans: OnSpans = lambda spans: None
    ) -> AsyncGenerator[Report | Kept]:
        """Run a part of a request on some ranks; see `ElasticRank.advance` and `run`.

        Args:
            part: without what is large.
            first: the number of the first rank.
            encoded: a reference to `part.encoded`.
            progress: `part.progress`.
            on_spans: as in `run`.
        """
        kept = ray.put(progress)  # once, however many ranks read it
        numbers = range(first, first + part.ranks)
        calls = [Call(i, self._ranks[i], "advance", (part, encoded, kept)) for i in numbers]
        async with contextlib.aclosing(self._run(calls, part.request, on_spans)) as reports:
            async for report in reports:
                yield report

    async def encode(self, request: GenerationRequest) -> Any:
        """A reference to the encoded prompts of a request; see `ElasticRank.encode`.

        Raises:
            As `run`.
        """
        self._encoding += 1
        try:
            with self._watch.working():
                # Some kilobytes to megabytes; who needs them asks the store.
                call = asyncio.create_task(outcome(self._ranks[0].encode, request), context=self._context)
                call.add_done_callback(self._encoded)  # not when its caller leaves: rank 0 still has it before it
                limit_s = self._model.timeouts.phase_s * self._encoding  # those before it come first
                reference, error = await asyncio.wait_for(asyncio.shield(call), limit_s)
        except TimeoutError:
            self._lose("stuck", f"rank 0 has not encoded a prompt within {limit_s:g} s", 0)
            raise self._gang_lost() from None
        if error is not None:
            raise self._require_agreed(error, 0)
        return reference

    def _encoded(self, _call: object) -> None:
        self._encoding -= 1

    def pause(self, request_id: str, part: int, ranks: range) -> None:
        """Let these ranks leave this part of a request at their next boundary."""
        for rank in ranks:  # in the ranks' own context: whoever asks is another request
            self._context.run(self._ranks[rank].pause.remote, request_id, part)
