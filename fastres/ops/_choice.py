"""The name of a choice: a rung of the fusion ladder (see _ladder), and whose kernels run single
passes of the convs, as `fastres.tune` measures it and a plan keeps it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable
from typing import NamedTuple

import torch


class Rung(NamedTuple):
    """Which fusions a rung has on top of b's."""

    conv: bool = False  # statistics, normalise, gate and sums in the convs
    fold: bool = False  # the batch norm's backward in dgrad's and wgrad's prologue
    joint: bool = False  # dgrad and wgrad in one kernel, the block's output as a side output


RUNGS = {
    "b": Rung(),
    "c1": Rung(conv=True),
    "c2": Rung(conv=True, fold=True),
    "d": Rung(conv=True, fold=True, joint=True),
}

PASSES = ("fprop", "dgrad", "wgrad")
_NAMED = re.compile(r"(conv[1-9]\d*|shortcut|stem)\.(" + "|".join(PASSES) + ")")
_TILE = re.compile(r"[a-z]+-\d+x\d+(-[a-z]+)?")
_CHOICE = re.compile(r"(\S+)(?: vendor((?: (?!cuda )\S+)+))?(?: cuda((?: \S+)+))?")
ALL = "all"


class Choice(NamedTuple):
    """A rung; the passes ("conv2.wgrad") of a block's convs that the vendor's kernels run; those
    that the `cuda` backend's run, with the tile's name, "" for the launchers' own choice. ALL:
    every pass not named."""

    rung: Rung
    vendor: frozenset[str] = frozenset()
    cuda: tuple[tuple[str, str], ...] = ()

    def tile(self, name: str) -> str | None:
        """The tile of a pass on the cuda backend's convs; None where others run it."""
        if not self.cuda or name in self.vendor:
            return None
        tiles = dict(self.cuda)
        return tiles.get(name, tiles.get(ALL))

    def named(self) -> set[str]:
        """Every pass that the choice names."""
        return {*self.vendor, *(name for name, _ in self.cuda if name != ALL)}


def parse(fusion: str) -> Choice:
    """What a fusion's name stands for: a rung; or a rung above b, the word "vendor" and some
    passes, conv1 being a block's first conv, shortcut its projection, and stem the conv of a
    network's stem; or the word "cuda" and some passes, or "all", a pass with "=" and a tile where
    one was chosen; or both, vendor first, no pass in both. ValueError otherwise."""
    if torch.compiler.is_compiling():  # which traces through a cache, and warns of it
        return _parse(fusion)
    return _kept(fusion)


def _parse(fusion: str) -> Choice:
    if fusion in RUNGS:
        return Choice(RUNGS[fusion])
    found = _CHOICE.fullmatch(fusion)
    if found is None or found[1] not in RUNGS:
        raise ValueError(f"unknown fusion {fusion!r}; known: {', '.join(RUNGS)}")
    name, words = found[1], (found[2] or "").split()
    if not RUNGS[name].conv:
        raise ValueError(f"fusion {fusion!r}: on rung {name} all convs are the vendor's")
    tiles = {}
    for word in (found[3] or "").split():
        which, given, tile = word.partition("=")
        if given and (which == ALL or not _TILE.fullmatch(tile)):
            raise ValueError(
                f"fusion {fusion!r}: {word!r} is no pass and its tile, as "
                "conv1.fprop=cutlass-256x64"
            )
        tiles[which] = tile
    twice = sorted(tiles.keys() & set(words))
    if twice:
        raise ValueError(f"fusion {fusion!r}: {twice[0]} is given to vendor and to cuda")
    for word in (*words, *(w for w in tiles if w != ALL)):
        if not _NAMED.fullmatch(word):
            raise ValueError(
                f"fusion {fusion!r}: {word!r} is not a pass of a conv, as conv1.fprop, "
                "conv2.dgrad or shortcut.wgrad"
            )
    return Choice(RUNGS[name], frozenset(words), tuple(sorted(tiles.items())))


_kept = functools.lru_cache(maxsize=1024)(_parse)  # every pass of every conv asks


def with_pass(fusion: str, name: str, to: str, passes: Iterable[str] = ()) -> str:
    """The fusion with a pass of a conv given to "vendor", to "cuda" or "cuda=TILE", or to "own",
    the backend's own kernels; sorted, so that equal choices have one name. passes: all of the
    block's, to take one out of "cuda all"."""
    choice = parse(fusion)
    vendor, cuda = set(choice.vendor) - {name}, dict(choice.cuda)
    if to == "vendor":
        vendor.add(name)
    if to == "own" and ALL in cuda:
        every = cuda.pop(ALL)
        cuda = {n: every for n in passes if n not in vendor} | cuda
    cuda.pop(name, None)
    if to.startswith("cuda") and (to != "cuda" or ALL not in cuda):
        cuda[name] = to.partition("=")[2]
    words = [fusion.partition(" ")[0]]
    if vendor:
        words += ["vendor", *sorted(vendor)]
    if cuda:
        words += ["cuda", *(f"{n}={t}" if t else n for n, t in sorted(cuda.items()))]
    return " ".join(words)


def unbuilt(choice: Choice) -> str | None:
    """Why this build does not have the cuda backend's convs, or the tiles, of the choice; None when
    it has, or there are none."""
    if not choice.cuda:
        return None
    from fastres import _cuda_cutlass, _cuda_tiles

    reason = _cuda_cutlass.built()
    for name, tile in choice.cuda:
        reason = reason or _cuda_tiles.unknown(name.partition(".")[2], tile)
    return reason
