"""The `cuda` backend's convolutions as candidates of `fastres.tune`, beside those of the backend
that runs by itself: all of a block's passes, or pass by pass each tile of their list."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from fastres import _cuda_tiles
from fastres._chosen import conv_calls
from fastres.ops._choice import ALL, PASSES, Choice, parse
from fastres.ops._ladder import cuda_reason

if TYPE_CHECKING:
    from fastres.tuning import Target

# d's joint kernels are Triton's, and c1 forms dy by a pass, as c2 does at worst.
WHOLE = f"c2 cuda {ALL}"

SECONDS = 60.0  # for the check of one candidate: nothing is compiled

lost: str | None = None  # the candidate that crashed or hung: no more are tried in this run of tune


def batch(names: list[str], seconds: float) -> tuple[list[str], float]:
    """The candidates for one process, the cuda backend's by themselves; seconds for each."""
    others = [name for name in names if not parse(name).cuda]
    return (others, seconds) if others else (names, min(seconds, SECONDS))


def give_up(name: str, reason: str | None, names: list[str]) -> dict[str, str | None]:
    """The cuda backend's other candidates rejected, where one of them crashed or hung: each might
    cost the device anew."""
    global lost
    if not parse(name).cuda:
        return {}
    lost = name
    return {n: f"not tried: {name}: {reason}" for n in names if n != name and parse(n).cuda}


def tiles(target: Target) -> dict[str, list[str]]:
    """What `with_pass` may give each pass to: the launchers' own choice of a tile first; nothing
    where the kernels do not take the conv."""
    x, dtype = target.x, getattr(torch, target.key.dtype)
    if (
        lost is not None
        or target.key.layout != "channels_last"
        or cuda_reason(parse(WHOLE), x) is not None
    ):
        return {}
    found = {}
    for name, shape, conv in conv_calls(target.module, x):
        like = torch.empty(shape, dtype=dtype, device="meta")
        like = like.contiguous(memory_format=torch.channels_last)
        for which in PASSES if target.training else PASSES[:1]:
            op = which if target.training else "fprop_act"
            configs = _cuda_tiles.configs(op, like, conv.weight, conv.geometry())
            if configs:
                others = [f"cuda={c.name}" for c in configs if not c.chosen]
                found[f"{name}.{which}"] = ["cuda", *others]
    return found


def whole(target: Target, rungs: list[str]) -> list[str]:
    """The candidate whose convs are all the cuda backend's, where it takes any."""
    return [WHOLE] if "c2" in rungs and tiles(target) else []


def ways(target: Target, base: Choice, passes: list[str]) -> dict[str, list[str]]:
    """What each pass may run on instead of what `base` runs it on."""
    found = {}
    of_cuda = tiles(target)
    for name in passes:
        tile = base.tile(name)
        others = [to for to in of_cuda.get(name, []) if tile is None or to != "cuda"]
        found[name] = ["vendor", *(["own"] if tile is not None else []), *others]
    return found
