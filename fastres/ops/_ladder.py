"""A stage of residual blocks on each rung of the fusion ladder: the rungs, and the forward; the
backward is _ladder_bwd.

    b    vendor convs; one pass for the statistics, one for normalise (+ shortcut) + ReLU; the two
         passes of each batch norm's backward, with 1-bit masks and the residual gradient folded in
    c1   + statistics in the conv's epilogue, normalise + ReLU in the next conv's prologue; the ReLU
         gate, the residual gradient and the sums of the batch norm before in dgrad's epilogue
    c2   + the batch norm's backward in the prologues of dgrad and wgrad
    d    + dgrad and wgrad of a 1x1 in one kernel; a block's output written on the way by the next
         block's first conv

A conv that the backend's kernels do not take runs on the vendor's with the passes of rung b around
it, whatever the rung: `vendor_reason` says why. So does one that the choice leaves to it, pass by
pass: "c2 vendor conv2.wgrad shortcut.fprop" (`parse`). A choice may also give passes to the `cuda`
backend's convs, all or some, on a tile of their list: "c2 cuda all conv2.fprop=cutlass-256x64".
Between the blocks of a stage the fusions of c1 and d reach across; the batch norm sums of a stage's
last block, and its output, take their own pass."""

from __future__ import annotations

import functools
import importlib
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastres import _cuda, backends
from fastres._contract import Normalise
from fastres._contract import Shortcut as ShortcutArgument
from fastres._layout import is_dense, is_nhwc

from ._choice import Choice, parse, unbuilt
from ._units import (
    GEOMETRY,
    Norm,
    Shortcut,
    alloc_mask,
    alloc_stats,
    bn_statistics,
    cast,
    conv_fwd,
    conv_weight,
    dense,
    in_format,
    normalise,
    running_statistics,
    vector,
)

# Backends whose `use_backend` is a request for every conv, too: those with kernels of their own.
# (The reference's are torch's.) c2: d's joint kernels are worth it where measured.
OWN_CONVS = {"triton": "c2", "cuda": "c2"}


def own_missing() -> str | None:
    """Why a `use_backend` leaves all convs to the vendor; None where it does not. The C++ convs are
    Hopper's alone, the passes run on any GPU."""
    if backends.forced() != "cuda":
        return None
    if torch.compiler.is_compiling():  # which of them the kernels take is not asked there
        return "compiled"
    return importlib.import_module(backends.MODULES["cuda"]).conv_missing(torch.device("cuda"))


def own_rung() -> str | None:
    """The rung that a `use_backend` asks for; None where it leaves the convs to the vendor."""
    return OWN_CONVS.get(backends.forced() or "") if own_missing() is None else None


def check_fusion(op: str, fusion: str | None, x: Tensor) -> str:
    """The rung's name; an error where it does not exist, or x's backend cannot run it."""
    asked = f'fusion="{fusion}"'
    if fusion is None:
        fusion = own_rung()
        if fusion is None:
            return "b"
        asked = f'use_backend("{backends.forced()}"), which runs every conv on its own kernels,'
    try:
        choice = parse(fusion)
    except ValueError as e:
        raise ValueError(f"{op}: {e}") from None
    if choice.rung.conv and not torch.compiler.is_compiling():  # the op itself checks when it runs
        backend = backends.select(x)
        if not hasattr(backend, "conv_fprop"):
            raise backends.BackendError(
                f"{op}: {asked} needs fused convolutions, which the {backend.NAME} "
                f'backend does not have; use fusion="b" on {x.device.type} tensors'
            )
        reason = backend.conv_missing(x.device) or cuda_reason(choice, x)
        if reason is not None:
            raise backends.BackendError(f"{op}: {asked} cannot run: {reason}")
        if not is_nhwc(x):
            raise backends.BackendError(
                f"{op}: {asked} takes channels_last activations, but x has strides "
                f"{tuple(x.stride())}; use x.to(memory_format=torch.channels_last), and the same "
                'on the model, or fusion="b"'
            )
    return fusion


def cuda_reason(choice: Choice, x: Tensor) -> str | None:
    """Why the passes that a choice gives to the cuda backend's convs cannot run there; None when
    they can, or there are none."""
    if not choice.cuda:
        return None
    return _cuda_reason(choice, x.device, x.dtype, _cuda._host, _cuda.built())


@functools.lru_cache(maxsize=1024)  # asked three times a call; only tests change the last two
def _cuda_reason(
    choice: Choice,
    device: torch.device,
    dtype: torch.dtype,
    host: ModuleType | None,
    built: str | None,
) -> str | None:
    reason = backends.supports("cuda", device, dtype) or _cuda.conv_missing(device)
    return reason or unbuilt(choice)


class Stage(NamedTuple):
    """The shape of a stage. Units (a conv and its batch norm) are numbered block by block, a
    block's projection after its main branch."""

    main: list[int]  # units of each block's main branch
    projection: list[bool]
    geometry: list[int]  # GEOMETRY ints a unit
    training: list[bool]  # of each batch norm
    eps: list[float]
    fusion: str

    def of_unit(self, i: int) -> list[int]:
        return self.geometry[GEOMETRY * i : GEOMETRY * (i + 1)]

    def name(self, i: int, which: str) -> str:
        """What `parse` calls a pass of unit i."""
        for main, projection in zip(self.main, self.projection, strict=True):
            if i < main:
                return f"conv{i + 1}.{which}"
            i -= main + projection
            if i < 0:
                break
        return f"shortcut.{which}"

    def first_units(self) -> list[int]:
        """The number of each block's first unit."""
        first, out = 0, []
        for main, projection in zip(self.main, self.projection, strict=True):
            out.append(first)
            first += main + projection
        return out


def fuses(backend: Any, stage: Stage, x: Tensor, weight: Tensor, i: int, which: str) -> bool:
    """Whether a pass of unit i runs on a fused kernel."""
    choice = parse(stage.fusion)
    if not choice.rung.conv:
        return False
    if choice.vendor or choice.cuda:
        name = stage.name(i, which)
        if name in choice.vendor:
            return False
        backend = convs_named(backend, choice, name)
    return vendor_reason(backend, x, weight, stage.of_unit(i)) is None


def convs_of(backend: Any, stage: Stage, i: int, which: str) -> Any:
    """Whose fused convs run a pass of unit i: the backend's, or the cuda backend's on a tile."""
    choice = parse(stage.fusion)
    return convs_named(backend, choice, stage.name(i, which)) if choice.cuda else backend


def convs_named(backend: Any, choice: Choice, name: str) -> Any:
    """The same for a pass by its name."""
    tile = choice.tile(name)
    return backend if tile is None else _cuda_convs(tile)


_cuda_convs = functools.cache(_cuda.Convs)


def vendor_reason(backend: Any, x: Tensor, weight: Tensor, geometry: list[int]) -> str | None:
    """Why a conv runs on the vendor's kernels on rungs c1 and up whatever the choice; None when it
    can run fused."""
    if not hasattr(backend, "conv_why_not"):
        return f"the {backend.NAME} backend has no fused convolutions"
    return backend.conv_why_not(x, weight, geometry)


class Pending(NamedTuple):
    """relu(normalise(y) + shortcut), not computed yet."""

    y: Tensor
    norm: Norm
    shortcut: Shortcut | None = None


def as_normalise(norm: Norm) -> Normalise:
    return Normalise(norm.mean, norm.rstd, norm.gamma, norm.beta)


def _argument(shortcut: Shortcut | None) -> ShortcutArgument | None:
    if shortcut is None:
        return None
    norm = None if shortcut.norm is None else as_normalise(shortcut.norm)
    return ShortcutArgument(shortcut.x, norm)


def conv_output(x: Tensor, weight: Tensor, geometry: list[int]) -> Tensor:
    """Uninitialised y of the fused convs: channels_last."""
    sh, sw, ph, pw, dh, dw, _ = geometry
    n, _, h, w = x.shape
    k, _, r, s = weight.shape
    p = (h + 2 * ph - dh * (r - 1) - 1) // sh + 1
    q = (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
    return torch.empty(
        (n, k, p, q), dtype=x.dtype, device=x.device, memory_format=torch.channels_last
    )


def vendor_output(y: Tensor, x: Tensor, like_x: bool) -> Tensor:
    """y dense; in x's layout where fused convs, which take channels_last alone, are its neighbours:
    some vendor kernels answer an NHWC input in NCHW."""
    where = "residual_block conv output"
    return in_format(y, is_nhwc(x), where) if like_x else dense(y, where)


def kernel_weight(weight: Tensor, x: Tensor) -> Tensor:
    """A weight as the fused convs take it: x's dtype, channels_last; a copy is counted."""
    return in_format(cast(weight, x), True, "residual_block: the weight of a fused conv")


def weight_like(weight: Tensor) -> Tensor:
    """Uninitialised gradient of a weight: its strides, where it is dense in one of the layouts."""
    if is_dense(weight):
        return torch.empty_like(weight)
    return torch.empty_like(weight, memory_format=torch.contiguous_format)


class Forward:
    """One forward pass; ys, stats, zs and masks fill up as it goes, and `used` with the weights in
    the dtype they ran in. fixed: the norms on running statistics, where they are known
    beforehand."""

    def __init__(
        self, x, weights, gammas, betas, running_means, running_vars, stage, save, fixed=None
    ):
        self.backend = backends.select(x)
        self.rung = parse(stage.fusion).rung
        self.weights, self.gammas, self.betas = weights, gammas, betas
        self.running_means, self.running_vars = running_means, running_vars
        self.stage, self.save = stage, save
        self.fixed: list[Norm | None] = [None] * len(weights) if fixed is None else fixed
        count = len(weights)
        self.used: list[Tensor] = list(weights)
        self.ys: list[Tensor] = [x] * count
        self.stats: list[Tensor] = [x] * count
        self.zs: list[Tensor] = []
        self.masks: list[Tensor] = []

    def fused(self, x: Tensor, i: int) -> bool:
        """Whether unit i runs on the backend's own conv."""
        return fuses(self.backend, self.stage, x, self.weights[i], i, "fprop")

    def norm(self, i: int, y: Tensor, stats: Tensor | None) -> Norm:
        """Keep what a backward needs of unit i (without one, y is not kept alive), and its norm.
        stats None: by the running ones."""
        norm = self.fixed[i]
        if norm is None:
            if stats is None:
                stats = alloc_stats(y)
                running = self.running_means[i], self.running_vars[i]
                running_statistics(stats, *running, self.stage.eps[i])
            norm = Norm(stats, vector(self.gammas[i], y), vector(self.betas[i], y))
        self.stats[i] = norm.stats
        if self.save:
            self.ys[i] = y
        return norm

    def finish(self, pending: Pending) -> Tensor:
        """The tensor itself; kept, with its mask, where it is a block's output. Without a backward
        to come it is written over y."""
        y, norm, shortcut = pending
        out = None if self.save else y
        z, mask = normalise(y, norm, True, self.save and shortcut is not None, shortcut, out)
        if self.save and shortcut is not None:
            self.zs.append(z)
            self.masks.append(mask)
        return z

    def unit(self, i: int, source: Tensor | Pending) -> tuple[Pending, Tensor]:
        """Conv i on `source`, and y's statistics; returns what follows and the conv's input where
        that was computed, otherwise the raw tensor it is a function of."""
        stage = self.stage
        geometry, training, eps = stage.of_unit(i), stage.training[i], stage.eps[i]
        raw = source.y if isinstance(source, Pending) else source
        fused = self.fused(raw, i)
        crosses = isinstance(source, Pending) and source.shortcut is not None
        if crosses and not (fused and self.rung.joint and _pointwise(self.weights[i], geometry)):
            fused_source: Tensor | Pending = self.finish(source)  # type: ignore[arg-type]
        elif isinstance(source, Pending) and not fused:
            fused_source = self.finish(source)
        else:
            fused_source = source
        running = self.running_means[i], self.running_vars[i]
        if not fused:
            h = fused_source
            assert isinstance(h, Tensor)
            weight = self.used[i] = conv_weight(h, self.weights[i], geometry, training)
            y = conv_fwd(h, weight, None, geometry, training)
            y = vendor_output(y, h, self.rung.conv)
            stats = bn_statistics(y, True, *running, eps) if training else None
            return Pending(y, self.norm(i, y, stats)), h
        self.used[i] = cast(self.weights[i], raw)
        weight = kernel_weight(self.used[i], raw)
        y = conv_output(raw, weight, geometry)
        stats = alloc_stats(y) if training else None
        h, norm, shortcut, z, mask = raw, None, None, None, None
        if isinstance(fused_source, Tensor):
            h = fused_source
        else:
            norm, shortcut = as_normalise(fused_source.norm), _argument(fused_source.shortcut)
            if shortcut is not None:
                z = torch.empty_like(raw)
                if self.save:
                    mask = alloc_mask(raw, True)
                    self.zs.append(z)
                    self.masks.append(mask)
        convs = convs_of(self.backend, stage, i, "fprop")
        convs.conv_fprop(y, stats, z, mask, h, weight, geometry, norm, shortcut, eps)
        return Pending(y, self.norm(i, y, stats)), h if z is None else z

    def run(self, x: Tensor) -> Tensor:
        source: Tensor | Pending = x
        stage = self.stage
        for first, main, projection in zip(
            stage.first_units(), stage.main, stage.projection, strict=True
        ):
            # 1. main branch; its first conv may compute the block's input on the way
            pending, x = self.unit(first, source)
            for i in range(first + 1, first + main):
                pending, _ = self.unit(i, pending)
            # 2. shortcut
            y = pending.y
            if projection:
                other, _ = self.unit(first + main, x)
                y_s = in_format(other.y, is_nhwc(y), "residual_block shortcut")
                shortcut = Shortcut(y_s, other.norm)
            else:
                shortcut = Shortcut(in_format(x, is_nhwc(y), "residual_block shortcut"))
            # 3. normalise, add, ReLU: now, or in the next block's first conv
            source = pending._replace(shortcut=shortcut)
        assert isinstance(source, Pending)
        return self.finish(source)

    def infer(self, x: Tensor) -> Tensor:
        """Fixed statistics and no backward: normalise, add and ReLU in the convs' epilogue."""
        stage = self.stage
        for first, main, projection in zip(
            stage.first_units(), stage.main, stage.projection, strict=True
        ):
            residual = self.act_unit(first + main, x, None, False) if projection else x
            for i in range(first, first + main - 1):
                x = self.act_unit(i, x, None, True)
            x = self.act_unit(first + main - 1, x, residual, True)
        return x

    def act_unit(self, i: int, x: Tensor, residual: Tensor | None, relu: bool) -> Tensor:
        """act(normalise(conv i of x) + residual) with the running statistics."""
        geometry = self.stage.of_unit(i)
        weight = self.weights[i]
        fused = self.fused(x, i)
        if fused:
            weight = kernel_weight(weight, x)
            y = conv_output(x, weight, geometry)
        else:
            y = vendor_output(conv_fwd(x, weight, None, geometry), x, True)
        norm = self.norm(i, y, None)
        if residual is not None:
            residual = in_format(residual, is_nhwc(y), "residual_block shortcut")
        if fused:
            convs = convs_of(self.backend, self.stage, i, "fprop")
            convs.conv_fprop_act(y, x, weight, geometry, as_normalise(norm), residual, relu)
            return y
        shortcut = None if residual is None else Shortcut(residual)
        return normalise(y, norm, relu, False, shortcut, out=y)[0]


def _pointwise(weight: Tensor, geometry: list[int]) -> bool:
    return tuple(weight.shape[2:]) == (1, 1) and geometry[:4] == [1, 1, 0, 0] and geometry[-1] == 1


def forward(
    x,
    weights,
    gammas,
    betas,
    running_means,
    running_vars,
    stage: Stage,
    save: bool,
    fixed=None,
    used: list[Tensor] | None = None,
) -> tuple[Tensor, list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
    """(z, the outputs of all blocks but the last, masks, ys, stats); what a backward needs only
    when `save`. fixed: a norm for each unit on running statistics, or None (see ._fixed). used:
    takes up the weights in the dtype they ran in, which a backward can do with as well."""
    x = dense(x, "residual_block")
    run = Forward(x, weights, gammas, betas, running_means, running_vars, stage, save, fixed)
    if run.rung.conv and not save and not any(stage.training):
        return run.infer(x), [], [], [], run.stats
    z = run.run(x)
    if used is not None:
        used += run.used
    if save:
        return z, run.zs[:-1], run.masks, run.ys, run.stats
    return z, [], [], [], run.stats
