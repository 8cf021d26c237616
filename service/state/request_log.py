"""Logs one line for each request of a gateway when it ends: its caller, what it took, how it ended.

Called by `service.gateway`. The lines go to the standard error of the gateway's process; nothing else there has their
form: `key=value` with JSON's quotes where needed, or one JSON object per line.
"""

import json
import logging
import re
import sys
from typing import Any, Literal

from workers.messages import GenerationRequest, GenerationResult

logger = logging.getLogger("spray.requests")

PLAIN = re.compile(r"[\w.,:/#+-]+")
"""Values that need no quotes. All others are quoted, so that a caller's line breaks are escaped."""


class RequestLog:
    """The log of one gateway. Nothing is written before `follow`."""

    def __init__(self) -> None:
        self._format: Literal["text", "json"] = "text"
        self._prompts = False

    def follow(self, log_format: Literal["text", "json"], prompts: bool) -> None:
        """Write lines in this format from now on, with prompts or without."""
        self._format, self._prompts = log_format, prompts
        if not any(isinstance(handler.formatter, _Lines) for handler in logger.handlers):  # once a process
            handler = logging.StreamHandler(sys.stderr)
            handler.setFormatter(_Lines())
            logger.addHandler(handler)
            logger.setLevel(logging.INFO)
            logger.propagate = False

    def ended(
        self,
        request: GenerationRequest,
        key: str,
        outcome: str,
        seconds: float,
        attempts: int,
        result: GenerationResult | None,
        trace_id: str = "",
    ) -> None:
        """Write the line of one request.

        Args:
            request: what was asked for.
            key: the name of the caller's API key; empty: none is needed.
            outcome: `ok`, `cancelled`, or the code of the error.
            seconds: the time since it was admitted.
            attempts: the number of gangs that ran it; all but the last lost their ranks.
            result: the answer, if there is one.
            trace_id: the id of its trace; empty: it is not traced.
        """
        fields: dict[str, Any] = {
            "request_id": request.request_id,
            "key": key,
            "model": request.model,
            "outcome": outcome,
            "shape": _shape(request),
            "n": request.n,
            "steps": request.num_inference_steps,
            "attempts": attempts,
            "seconds": round(seconds, 3),
        }
        if result is not None:
            stages = {
                "queue": max(0.0, seconds - result.seconds),
                "encode": result.encode_seconds,
                "denoise": sum(result.step_seconds),
                "decode": result.decode_seconds,
                "encode_media": result.encode_media_seconds,
            }
            fields["layout"] = str(result.degrees)
            fields |= {f"{stage}_seconds": round(took, 3) for stage, took in stages.items()}
        if trace_id:
            fields["trace_id"] = trace_id
        if self._prompts:
            fields["prompt"] = request.prompt
            if request.negative_prompt is not None:
                fields["negative_prompt"] = request.negative_prompt
        logger.info("request ended", extra={"spray_fields": fields, "spray_format": self._format})


def _shape(request: GenerationRequest) -> str:
    frames = f"x{request.num_frames}" if request.num_frames > 1 else ""
    return f"{request.width}x{request.height}{frames}"


class _Lines(logging.Formatter):
    """The fields of a record as one line, with its time."""

    default_time_format = "%Y-%m-%dT%H:%M:%S"
    default_msec_format = "%s.%03d"

    def format(self, record: logging.LogRecord) -> str:
        fields = {"time": self.formatTime(record), **record.spray_fields}  # type: ignore[attr-defined]
        if record.spray_format == "json":  # type: ignore[attr-defined]
            return json.dumps(fields, ensure_ascii=True)
        return " ".join(f"{name}={_quoted(value)}" for name, value in fields.items())


def _quoted(value: Any) -> str:
    text = str(value)
    return text if PLAIN.fullmatch(text) else json.dumps(text)
