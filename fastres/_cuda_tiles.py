"""The tiles of the `cuda` backend's convolutions: which an op has, why, and their names in a plan.

The lists are the launchers' own (conv_plan.cu, pointwise.cu); a name begins with the kernels that
it is of, "cutlass-128x128-pair", "pointwise-128x64": rows by columns, a pair being a cluster of two
blocks."""

from __future__ import annotations

import functools
from types import ModuleType
from typing import NamedTuple

from torch import Tensor

from . import counters

OPS = ("fprop", "fprop_act", "dgrad", "wgrad")
_CUTLASS_PASS = {"fprop": 0, "fprop_act": 0, "dgrad": 1, "wgrad": 2}


class Tile(NamedTuple):
    name: str
    rows: int
    columns: int
    cluster: int
    why: str


class Config(NamedTuple):
    """A candidate for a conv. chosen: the launchers take it by themselves."""

    name: str
    why: str
    chosen: bool


def _native():
    from . import _cuda

    return _cuda._module()


def tiles(op: str, family: str) -> list[Tile]:
    """This build's tiles of "fprop", "fprop_act", "dgrad" or "wgrad", in the launchers' order."""
    return _tiles(_native(), op, family)


@functools.lru_cache(maxsize=64)  # every pass on a tile asks: a build's lists do not change
def _tiles(native: ModuleType, op: str, family: str) -> list[Tile]:
    if family == "pointwise":
        return [Tile(*t) for t in native.pointwise_tiles(OPS.index(op))]
    return [Tile(*t) for t in native.conv_tiles(_CUTLASS_PASS[op])]


def unknown(op: str, name: str) -> str | None:
    """Why this build has no such tile; None when it has, and for "", the launchers' own choice."""
    if name == "":
        return None
    known = [t.name for family in ("pointwise", "cutlass") for t in tiles(op, family)]
    if name in known:
        return None
    return f"this build has no tile {name!r} of conv_{op}; it has {', '.join(known)}"


def place(op: str, name: str, pointwise: bool) -> tuple[str, int]:
    """(kernels, place of the tile in their list); place 0: by shape. pointwise: those kernels take
    the call. A tile that does not take it is counted, and another chosen by shape."""
    if not name:
        return "pointwise" if pointwise else "cutlass", 0
    family, number, said = _place(_native(), op, name, pointwise)
    if said is not None:
        counters.count(said)
    return family, number


@functools.lru_cache(maxsize=256)
def _place(native: ModuleType, op: str, name: str, pointwise: bool) -> tuple[str, int, str | None]:
    """place() on a tile by name, and what is counted."""
    family = name.partition("-")[0]
    names = [tile.name for tile in tiles(op, family)]
    if family == "pointwise" and not pointwise:
        family, names = "cutlass", []
    elif name not in names and (op != "fprop_act" or unknown("fprop", name)):
        raise ValueError(f"fastres cuda: {unknown(op, name)}")
    if name not in names:  # the tensors' alignment, or inference on a tile of training
        return family, 0, f"cuda convolution: {name} does not take a conv_{op}; by shape instead"
    return family, names.index(name) + 1, None


def configs(op: str, x: Tensor, weight: Tensor, geometry: list[int]) -> list[Config]:
    """The candidates for an op on a conv of x, any device (of x only shape, strides and dtype
    count), each with its reason; empty where the kernels do not take the conv. Raises BackendError
    where the build has none."""
    from . import _cuda, _cuda_cutlass, _cuda_pointwise
    from .backends import BackendError

    if op not in OPS:
        raise ValueError(f"configs: op must be one of {', '.join(OPS)}, got {op!r}")
    missing = _cuda_cutlass.built()
    if missing is not None:
        raise BackendError(f"configs: {missing}")
    if _cuda.conv_why_not(x, weight, geometry) is not None:
        return []
    native, found = _native(), []
    n, c, h, w = x.shape
    k = weight.shape[0]
    pointwise = _cuda_pointwise.why_not(x, weight, geometry) is None
    width = k if op.startswith("fprop") else c
    if pointwise:
        shape_of = getattr(native, f"pointwise_{op.removesuffix('_act')}_shape")
        form = {"fprop": (0,), "fprop_act": (2,)}.get(op, ())
        shape = shape_of(*form, n * h * w, c, k)
        for tile in tiles(op, "pointwise"):
            # a wider one would multiply zeros in its whole second half
            if tile.columns == 64 or tile.columns < 2 * width:
                found.append(Config(tile.name, tile.why, tile.columns == shape["columns"]))
    chosen = native.conv_schedule(_CUTLASS_PASS[op], 1, width, 1, 1, 0)["tile"]
    for tile in tiles(op, "cutlass"):
        own = not pointwise and (tile.rows, tile.columns, tile.cluster) == chosen
        found.append(Config(tile.name, tile.why, own))
    return found
