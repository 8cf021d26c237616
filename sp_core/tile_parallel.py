"""Tile parallelism: a large picture or video is decoded in tiles, and the ranks of a gang share the tiles.

diffusers' VAEs cut large latents into overlapping tiles, decode each tile and blend the seams. Their code still cuts
and blends; we replace the calls of the decoder in between. A first pass only records the calls. Every rank makes its
share of them, rank 0 collects the results, and a second pass of the same code gets each call answered. So the picture
is the same as that of the VAE's own tiled decode on one process. Called by `workers.model.denoising`.

Calls of a decoder that keeps something from one to the next cannot be made on several ranks, so only the classes of
`sp_core.models.vaes.SHARED` are decoded like this.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sp_core import collectives
from sp_core.mesh import ParallelMesh
from sp_core.models.vaes import SHARED, WRONG_TILES
from sp_core.stand_in import StandIn


class HandOverFailed(Exception):
    """What was decoded did not reach rank 0. Other ranks may wait for this one, so all ranks are lost."""


class TilesHandedOver(Exception):
    """This rank has decoded its tiles and sent them to rank 0, which makes the picture."""


class PeerTileFailed(RuntimeError):
    """Another rank could not decode its tiles. That rank raises the reason."""


def can_tile(vae: Any) -> bool:
    """Whether this VAE, or a pipeline's lack of one, can decode in tiles on one rank."""
    return hasattr(vae, "use_tiling") and vae.__class__.__name__ not in WRONG_TILES


def can_share(vae: Any) -> bool:
    """Whether ranks can divide the tiles of this VAE."""
    return vae.__class__.__name__ in SHARED


class TileParallelVAE(StandIn):
    """A VAE that divides the tiles of a decode among all ranks. Everything else is the VAE's own.

    For one call of a pipeline. Some decode in several parts; the other ranks end their call at the first, so rank 0
    decodes the following ones alone.

    Args:
        vae: a VAE of diffusers that can tile.
        mesh: the ranks, each of which has the VAE, of a class of `SHARED`. None: this rank decodes all tiles.

    Attributes:
        handed_over: on rank 0, whether it has the tiles of the others, who wait for it no more in this call.
    """

    def __init__(self, vae: Any, mesh: ParallelMesh | None) -> None:
        assert mesh is None or can_share(vae)
        super().__init__(vae)
        self._vae, self._mesh, self.handed_over = vae, mesh, False

    def for_another_call(self) -> "TileParallelVAE":
        """The same VAE for another call of a pipeline."""
        return TileParallelVAE(self._vae, self._mesh)

    def decode(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own `decode` with tiling enabled. A collective of all ranks.

        Raises:
            TilesHandedOver: on all ranks but the first.
            PeerTileFailed: another rank failed.
            HandOverFailed: the tiles of this rank, or of others, did not reach rank 0.
        """
        with _tiling(self._vae):
            if self._mesh is None or self._mesh.degrees.world_size == 1 or self.handed_over:
                return self._vae.decode(latents, *args, **kwargs)
            return self._decode(self._mesh, latents, *args, **kwargs)

    def encode(self, *args: Any, **kwargs: Any) -> Any:
        """The VAE's own `encode` with tiling enabled, on this rank alone."""
        with _tiling(self._vae):
            return self._vae.encode(*args, **kwargs)

    def _decode(self, mesh: ParallelMesh, latents: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        axis = mesh.axis("gang")
        failure: Exception | None = None
        try:
            record = _Record()
            with _answered(self._vae.decoder, record):
                self._vae.decode(latents, *args, **kwargs)
            tiles = record.tiles
            del record
            counts, shares = [len(tile) for tile in tiles], _shares(tiles, axis.size)
            mine: list[torch.Tensor] = []
            for i in shares[axis.rank]:
                mine += _run(self._vae.decoder, tiles[i])
                tiles[i] = []  # frees its cache, which holds frames of all layers
        except Exception as error:
            failure = error
        (failed,) = mesh.agree(failure is not None)
        if failure is not None:
            raise failure
        if failed:
            raise PeerTileFailed("another rank could not decode its tiles")
        del tiles
        try:
            gathered = collectives.gather(mine, axis)
        except Exception as error:
            raise HandOverFailed(f"rank {axis.rank}: {type(error).__name__}: {error}") from error
        if axis.rank != 0:
            raise TilesHandedOver
        self.handed_over = True
        outputs: list[list[torch.Tensor]] = [[]] * len(counts)
        for share, theirs in zip(shares, gathered, strict=True):
            following = iter(theirs)
            for i in share:
                outputs[i] = [next(following) for _ in range(counts[i])]
        in_order = (output for tile in outputs for output in tile)
        with _answered(self._vae.decoder, lambda *_args, **_kwargs: next(in_order)):
            return self._vae.decode(latents, *args, **kwargs)


_Call = tuple[tuple[Any, ...], dict[str, Any]]
_Tile = list[_Call]
"""The calls of the decoder for one tile, in order. Video VAEs decode a tile in several calls, which share a cache."""


class _Record:
    """Stands in for the decoder and records its calls."""

    def __init__(self) -> None:
        self.tiles: list[_Tile] = []
        self._cache: object = None

    def __call__(self, latents: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        cache = kwargs.get("feat_cache")  # a new list for each tile
        if cache is None or cache is not self._cache:
            self.tiles.append([])
        self._cache = cache
        self.tiles[-1].append(((latents, *args), kwargs))
        return torch.empty_like(latents)  # never looked at, but the VAE blends it in place like an output


def _run(decoder: nn.Module, tile: _Tile) -> list[torch.Tensor]:
    return [decoder(*args, **kwargs) for args, kwargs in tile]


def _shares(tiles: list[_Tile], size: int) -> list[list[int]]:
    """The tiles of each rank: the largest first, each to the rank with the least work so far."""
    work = [sum(args[0].numel() for args, _ in tile) for tile in tiles]
    shares: list[list[int]] = [[] for _ in range(size)]
    loads = [0] * size
    for tile in sorted(range(len(tiles)), key=lambda tile: -work[tile]):
        rank = loads.index(min(loads))
        shares[rank].append(tile)
        loads[rank] += work[tile]
    return shares


@contextmanager
def _answered(decoder: nn.Module, answer: Callable[..., torch.Tensor]) -> Iterator[None]:
    """Inside, calls of the decoder go to `answer`. The module itself stays, because VAEs count its layers."""
    decoder.forward = answer
    try:
        yield
    finally:
        del decoder.forward


@contextmanager
def _tiling(vae: Any) -> Iterator[None]:
    before = vae.use_tiling
    vae.use_tiling = True
    try:
        yield
    finally:
        vae.use_tiling = before
