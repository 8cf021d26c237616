"""The call of a classic pipeline, stopped before its loop and after each step.

A pipeline and the arguments of its call come in; latents go out, and at the end the pipeline's output. Called by
`workers.model.classic_denoising`.

The call runs in a greenlet, a stack of its own on the same thread. A thread would not do, because torch keeps state by
thread: the current device and stream, whether gradients are recorded, and the pools of CUDA graphs. And only one
greenlet runs at a time, so collectives keep their order without a lock.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from workers.model.own_draws import DrawsWhereItsGeneratorIs
from workers.model.shared_encoders import METHODS, SharedEncoders, TextEncoderElsewhere

Noise = tuple[torch.Tensor, torch.Tensor]
"""The latents before a step, and the model's prediction from them, all branches combined."""


class SteppedCall:
    """One call of a pipeline on one thread. Each method continues it.

    Args:
        pipeline: a classic pipeline of diffusers that belongs to this call, since some of its methods are replaced.
        arguments: the arguments of its call.
        encoders: the pipeline's encoders, or their answers from another rank.
        refuse: called with an error of the pipeline's own check of its inputs; raises the error for the caller.
    """

    def __init__(
        self,
        pipeline: Any,
        arguments: dict[str, Any],
        encoders: SharedEncoders,
        refuse: Callable[[ValueError], None],
    ) -> None:
        self._encodes = encoders.here
        self._given = _Given()
        self._total: list[int | None] = []  # one entry for each loop that has begun
        _replace(pipeline, "check_inputs", functools.partial(_checked, refuse))
        for method in METHODS:
            _replace(pipeline, method, encoders)
        if hasattr(pipeline, "_prepare_first_frame_conditioning") and pipeline.text_encoder is None:
            pipeline.text_encoder = TextEncoderElsewhere()
        if hasattr(pipeline, "vae"):
            pipeline.vae = encoders.reading(pipeline.vae)
        _replace(pipeline, "progress_bar", functools.partial(_loop_begins, self._total))
        tells = {"callback_on_step_end": _step_ended} if _tells_steps(pipeline) else {}
        _watch(pipeline.scheduler, self._given, stops=not tells)
        run = functools.partial(pipeline, **arguments, **tells)
        self._call: Any = greenlet(run)  # nothing that it can reach knows this object, so that it ends with it

    @property
    def noise(self) -> Noise:
        """Latents and prediction of the latest step; side by side for frames that the scheduler steps one by one."""
        if len(self._given.noise) == 1:
            return self._given.noise[0]
        parts = zip(*self._given.noise, strict=True)
        sample, prediction = (torch.cat([each.flatten() for each in of_frames]) for of_frames in parts)
        return sample, prediction

    @property
    def total(self) -> int | None:
        """The number of steps that the pipeline announces, from `prepare` on; None if it does not."""
        return self._total[0]

    def encode(self) -> None:
        """Run up to the loop, if the encoders are here."""
        if self._encodes:
            self._go_on_outside_steps()

    def prepare(self) -> None:
        """Run up to the loop with the answers of another rank's encoders, if there are none here."""
        if not self._encodes:
            self._go_on_outside_steps()

    def step(self) -> torch.Tensor:
        """Run up to the end of the next step; returns its latents."""
        self._given.step_begins = True
        latents = self._go_on()
        if self._call.dead:
            raise RuntimeError("the pipeline's loop has fewer steps than its scheduler has timesteps")
        assert isinstance(latents, torch.Tensor)
        return latents

    def finish(self) -> Any:
        """Run to the end; returns the pipeline's output."""
        made = self._go_on_outside_steps()
        if not self._call.dead:
            raise RuntimeError("the pipeline's loop has more steps than its scheduler has timesteps")
        return made

    def close(self) -> None:
        """End the call at its current place, and free its memory."""
        if not self._call.dead:
            with torch.no_grad(), contextlib.suppress(GreenletExit):
                self._call.throw()

    def __del__(self) -> None:
        self.close()

    def _go_on_outside_steps(self) -> Any:
        """Where the call may draw by itself."""
        with DrawsWhereItsGeneratorIs():
            return self._go_on()

    @torch.no_grad()  # on its way out the call restores what it found when it began: that must not reach the caller
    def _go_on(self) -> Any:
        return self._call.switch()


def _replace(pipeline: Any, name: str, wrapped: Callable[..., Any]) -> None:
    """Replace a method by `wrapped(method, ...)`, without a cycle, which would keep a request's tensors alive."""
    method, owner = getattr(type(pipeline), name, None), weakref.ref(pipeline)
    if isinstance(inspect.getattr_static(type(pipeline), name, None), staticmethod):
        setattr(pipeline, name, functools.partial(wrapped, method))
    elif method is not None:
        setattr(pipeline, name, lambda *args, **kwargs: wrapped(functools.partial(method, owner()), *args, **kwargs))


def _stop(value: Any = None) -> None:
    """Switch to the caller of the stepped call."""
    getcurrent().parent.switch(value)


def _checked(refuse: Callable[[ValueError], None], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    try:
        return method(*args, **kwargs)
    except ValueError as error:
        refuse(error)
        raise


def _loop_begins(told: list[int | None], method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    told.append(kwargs.get("total"))
    if len(told) == 1:  # a call may have several loops: to the engine they are one
        _stop()
    return method(*args, **kwargs)


def _step_ended(_pipeline: Any, _step: int, _timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
    _stop(values["latents"])
    return {}


def _tells_steps(pipeline: Any) -> bool:
    return "callback_on_step_end" in inspect.signature(type(pipeline).__call__).parameters


class _Given:
    """The inputs of the scheduler in the latest step.

    Attributes:
        noise: an entry for each call of the scheduler.
        step_begins: whether the next call belongs to a new step.
    """

    def __init__(self) -> None:
        self.noise: list[Noise] = []
        self.step_begins = True

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Given":
        return self  # copies of the scheduler, which some calls make for each frame, tell the same place

    def add(self, sample: torch.Tensor, prediction: torch.Tensor) -> None:
        if self.step_begins:
            self.noise.clear()
        self.step_begins = False
        self.noise.append((sample, prediction))


def _watch(scheduler: Any, given: _Given, stops: bool) -> None:
    """Record the scheduler's inputs in a step. With `stops` the step ends there, since the call has no callback.

    It is a partial, not a closure, so that a copy of the scheduler steps itself and not its original.
    """
    step = functools.partial(_watched, scheduler.step, given, stops)
    scheduler.step = functools.update_wrapper(step, scheduler.step)  # pipelines look at its parameters


def _watched(step: Callable[..., Any], given: _Given, stops: bool, *args: Any, **kwargs: Any) -> Any:
    told = inspect.signature(step).bind_partial(*args, **kwargs).arguments
    given.add(told["sample"], told["model_output"])
    stepped = step(*args, **kwargs)
    if stops:
        _stop(stepped[0])
    return stepped
