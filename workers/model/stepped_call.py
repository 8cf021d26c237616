"""The call of a classic pipeline, stopped where the engine takes its turn: before the loop, and after each step.

A pipeline and the arguments of its call come in; latents, and at the end what it has made, go out. Called by
`workers.model.classic_denoising`.

The call runs in a greenlet: a stack of its own on the same thread. A thread would not do: torch keeps by thread what
the call depends on, such as the current device and stream, whether gradients are recorded, and the pools of CUDA
graphs. And with a greenlet nothing runs at once, so collectives keep their order without a lock.
"""

import contextlib
import functools
import inspect
import weakref
from collections.abc import Callable
from typing import Any

import torch
from greenlet import GreenletExit, getcurrent, greenlet

from workers.model.shared_encoders import METHODS, SharedEncoders, TextEncoderElsewhere

Noise = tuple[torch.Tensor, torch.Tensor]
"""The latents before a step, and what the model has predicted of them: of all branches, combined."""


class SteppedCall:
    """One call of a pipeline, which goes on with each method, on one thread.

    Args:
        pipeline: a classic pipeline of diffusers that belongs to the call, for some of its methods are replaced.
        arguments: of its call.
        encoders: those of the pipeline, or their answers on another rank.
        refuse: called with what the pipeline's own check of its inputs has raised; raises what the caller should see.
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
        """Of the latest step; of several frames side by side where the scheduler steps each on its own."""
        if len(self._given.noise) == 1:
            return self._given.noise[0]
        parts = zip(*self._given.noise, strict=True)
        sample, prediction = (torch.cat([each.flatten() for each in of_frames]) for of_frames in parts)
        return sample, prediction

    @property
    def total(self) -> int | None:
        """Steps that the pipeline says it will do, from `prepare` on; None: it does not say."""
        return self._total[0]

    def encode(self) -> None:
        """Go on to the loop, if the encoders are here."""
        if self._encodes:
            self._go_on()

    def prepare(self) -> None:
        """Go on to the loop, if the encoders are elsewhere, by their answers."""
        if not self._encodes:
            self._go_on()

    def step(self) -> torch.Tensor:
        """Go on to the end of the next step; return the latents then."""
        self._given.step_begins = True
        latents = self._go_on()
        if self._call.dead:
            raise RuntimeError("the pipeline's loop has fewer steps than its scheduler has timesteps")
        assert isinstance(latents, torch.Tensor)
        return latents

    def finish(self) -> Any:
        """Go on to the end; return what the pipeline has made."""
        made = self._go_on()
        if not self._call.dead:
            raise RuntimeError("the pipeline's loop has more steps than its scheduler has timesteps")
        return made

    def close(self) -> None:
        """End the call where it stands, and free what it holds."""
        if not self._call.dead:
            with torch.no_grad(), contextlib.suppress(GreenletExit):
                self._call.throw()

    def __del__(self) -> None:
        self.close()

    @torch.no_grad()  # on its way out the call restores what it found when it began: that must not reach the caller
    def _go_on(self) -> Any:
        return self._call.switch()


def _replace(pipeline: Any, name: str, wrapped: Callable[..., Any]) -> None:
    """Call `wrapped(method, ...)` instead of a method. Without a cycle, which would keep a request's tensors alive."""
    method, owner = getattr(type(pipeline), name, None), weakref.ref(pipeline)
    if isinstance(inspect.getattr_static(type(pipeline), name, None), staticmethod):
        setattr(pipeline, name, functools.partial(wrapped, method))
    elif method is not None:
        setattr(pipeline, name, lambda *args, **kwargs: wrapped(functools.partial(method, owner()), *args, **kwargs))


def _stop(value: Any = None) -> None:
    """Give the engine its turn."""
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
    """What the scheduler was given in the latest step.

    Attributes:
        noise: an entry for each time that it was asked.
        step_begins: what it is given next is of a new step.
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
    """Remember what the scheduler is given in a step; with `stops` the step ends there, for the call does not tell.

    A partial, and no closure: a copy of the scheduler then steps itself, and not the one that it was copied from.
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
