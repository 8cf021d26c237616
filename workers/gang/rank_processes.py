"""The processes of a gang's ranks: made in the placement group, numbered, brought together; and killed.

Called by `workers.gang.supervisor` and `workers.gang.rank_group`.
"""

import asyncio
import logging
import os
import signal
from collections.abc import Coroutine, Sequence
from typing import Any, Never, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from deploy.model_spec import ModelSpec
from deploy.storage_spec import Storage
from workers.errors import GangLost
from workers.gang.device import by_device, environment
from workers.gang.placement import bundle
from workers.gang.rank_actor import RankActor
from workers.gang.ray_internals import process_of
from workers.gang.watch import watch_creation, watch_start
from workers.messages import RankStatus

logger = logging.getLogger("ray.serve")

Done = TypeVar("Done")

FIRST_WORD_S = 60.0
"""A process that has said nothing for so long hangs. It takes a second on a quiet machine, tens of seconds on a
very busy one."""

SPARE_GPU = 0.1
"""What a spare process holds of its rank's GPU in Ray's books. It does not touch the device."""


def create(model: ModelSpec, storage: Storage, name: str, spare: bool = False) -> list[Any]:
    """Create one actor in each bundle of this replica's placement group, in the order of the bundles.

    Args:
        model: what they will load.
        storage: where each node keeps files.
        name: prefix of their names, unique in the cluster.
        spare: they take the places of the bundles' ranks when those are lost. They hold no CPU cores, and of the same
            GPU only a share, so that Ray tells them which one it is.
    """
    group = get_current_placement_group()
    assert group is not None, "a gang runs in the placement group of its Serve replica"
    resources, variables = bundle(model), environment(model)
    shares = model.spare_ranks or model.elastic is not None  # an elastic gang makes some once ranks are lost
    gpus = resources.get("GPU", 0) * ((SPARE_GPU if spare else 1 - SPARE_GPU) if shares else 1)
    return [
        RankActor.options(  # type: ignore[attr-defined]
            name=f"{name}-{'spare' if spare else 'bundle'}{index}",
            num_cpus=0 if spare else resources["CPU"],
            num_gpus=gpus,
            runtime_env={"env_vars": variables} if variables else None,
            scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=index),
        ).remote(model, storage)
        for index in range(model.parallel.world_size)
    ]


async def assemble(processes: Sequence[Any], model: ModelSpec, replica: str) -> tuple[list[Any], list[RankStatus]]:
    """Number the processes and bring them together; if one of them hangs, kill all. Returns them in rank order.

    Args:
        processes: from `create`.
        model: what they load.
        replica: the gang's number among those of its model, for metrics.

    Raises:
        GangLost: a rank was stopped, died or hung, could not load the model, or was not ready in time.
    """
    limit = model.timeouts.startup_s
    try:
        return await asyncio.wait_for(_assemble(processes, model, replica), limit)
    except TimeoutError:
        raise GangLost(f"{model.name}: the ranks were not ready within {limit:g} s") from None
    except RayTaskError as error:
        kind = "" if isinstance(error.cause, ValueError | OSError) else f"{type(error.cause).__name__}: "
        raise GangLost(f"{model.name}: {kind}{error.cause}") from None  # some errors of libraries have no text
    except RayError as error:  # not only RayActorError: Ray says of its own what a node lacked, such as memory
        raise GangLost(f"{model.name}: a rank died while it started: {error}") from None
    except GangLost as error:
        raise GangLost(f"{model.name}: {error}") from None


async def _assemble(processes: Sequence[Any], model: ModelSpec, replica: str) -> tuple[list[Any], list[RankStatus]]:
    """`assemble`, however long it takes. What a rank raises goes on to the caller."""
    try:
        async with asyncio.timeout(FIRST_WORD_S):
            ranks, statuses = await _watched(_number(processes, model, replica), watch_creation(processes))
    except BaseException as error:
        _end(processes)
        if isinstance(error, TimeoutError):
            raise GangLost(f"a rank's process has said nothing for {FIRST_WORD_S:g} s since it was made") from None
        raise
    try:
        return ranks, await _watched(_bring_together(ranks), watch_start(ranks, statuses, model.timeouts))
    except BaseException:
        kill_all(ranks, statuses)
        raise


async def _watched(work: Coroutine[Any, Any, Done], watch: Coroutine[Any, Any, Never]) -> Done:
    """Do the work until it is done, or the watch raises."""
    working, watching = asyncio.ensure_future(work), asyncio.ensure_future(watch)
    try:
        await asyncio.wait([working, watching], return_when=asyncio.FIRST_COMPLETED)
        if watching.done():
            watching.result()
        return await working
    finally:
        working.cancel()
        watching.cancel()


async def _number(processes: Sequence[Any], model: ModelSpec, replica: str) -> tuple[list[Any], list[RankStatus]]:
    """The processes in rank order, and what each says first."""
    places = await asyncio.gather(*(process.place.remote() for process in processes))
    ranks = [processes[index] for index in by_device(places)]
    told = (rank.take_number.remote(number, model, replica) for number, rank in enumerate(ranks))
    return ranks, list(await asyncio.gather(*told))


async def _bring_together(ranks: Sequence[Any]) -> list[RankStatus]:
    await asyncio.gather(*(rank.prepare.remote() for rank in ranks))
    host, port = await ranks[0].open_rendezvous.remote()
    return list(await asyncio.gather(*(rank.join.remote(host, port) for rank in ranks)))


def _end(processes: Sequence[Any]) -> None:
    """End processes that have said nothing of themselves."""
    here = ray.get_runtime_context().get_node_id()
    for process in processes:
        node, pid = process_of(process) or ("", 0)
        if node == here:
            _kill(pid)  # as in `kill_all`
        else:
            ray.kill(process)


def kill_all(ranks: Sequence[Any], statuses: Sequence[RankStatus]) -> None:
    """End all ranks at once: by pid on this node, by Ray on others."""
    here = ray.get_runtime_context().get_node_id()
    for status, rank in zip(statuses, ranks, strict=True):
        try:
            if status.node_id == here:
                _kill(status.pid)  # ends a stopped process at once, where ray.kill waits five seconds
            else:
                ray.kill(rank)
        except Exception:  # the others must end all the same, and new ranks must start
            logger.exception("rank %d cannot be killed", status.rank)


def _kill(pid: int) -> None:
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        logger.info("rank process %d had already ended", pid)
