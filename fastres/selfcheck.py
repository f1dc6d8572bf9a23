"""A short check of a backend's kernels on the device in front of us, at their first use.

A kernel that was never proven on a device is not trusted there: each family (the passes around the
convs, the stem's pool, the convs) is run once on tiny random tensors and compared with the
reference in float64. What passed is remembered in the plan's folder for this device, driver and
set of versions (fastres.plan.identity), so that the next process does not check again. A family
that fails is not used: modules run their original forward, and the report says why.
FASTRES_SELFCHECK=0 in the environment leaves the check out."""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
from collections.abc import Callable
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from fastres import _reference_backend as reference
from fastres import backends, plan
from fastres._contract import Gradient, Normalise, NormGradient, Previous, Shortcut, Sums
from fastres._layout import mask_shape
from fastres._tf32 import conv_tf32

log = logging.getLogger("fastres")

# fp32, TF32 allowed in dots (10 bits of mantissa); a wrong kernel is off by far more
TOLERANCE = {"passes": 1e-4, "pool": 1e-4, "convs": 5e-3}
# a few units in the last place of what is stored
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPE = (2, 72, 9, 7)  # more than one step of a conv's sum
VERSION = 5  # of the checks: what passed others is checked again
ENABLED = os.environ.get("FASTRES_SELFCHECK", "1") != "0"

_verdicts: dict[tuple[str, torch.device, str, torch.dtype], str | None] = {}


def _random(*shape: int) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")


def _vector(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.float32, device="cpu")


def _act(*shape: int) -> Tensor:
    return _random(*shape).contiguous(memory_format=torch.channels_last)


def _vectors(c: int, n: int) -> list[Tensor]:
    v = [_random(c + i)[:c].clone() for i in range(n)]
    v[1] = v[1].abs() + 0.5  # rstd
    return v


Call = Callable[[ModuleType, list[Tensor], list[Tensor]], None]


class Case(NamedTuple):
    name: str
    outputs: list[Tensor]
    inputs: list[Tensor]
    call: Call
    conv: tuple[Tensor, Tensor, list[int]] | None = None  # x, weight, geometry that it is about


def _passes() -> list[Case]:
    """(name, outputs, inputs, call) of the passes around the convs, in the forms of the ladder."""
    x, res, dz = _act(*SHAPE), _act(*SHAPE).flip(0), _act(*SHAPE).flip(2)
    x, res, dz = (t.contiguous(memory_format=torch.channels_last) for t in (x, res, dz))
    c = SHAPE[1]
    v, r = _vectors(c, 6), _vectors(c + 8, 6)
    r = [t[:c].clone() for t in r]
    mask = torch.full(mask_shape(x), 0b10110101, dtype=torch.uint8, device="cpu")
    none = (None,) * 5

    def stats(m, out, args):
        m.bn_stats(*out, args[0], 1e-5)

    def apply(m, out, args):  # an inner batch norm, over its own input
        x, mean, rstd, gamma, beta = args
        out[0].copy_(x)
        m.bn_apply(out[0], None, out[0], mean, rstd, gamma, beta, *none, True)

    def apply_block(m, out, args):  # a block's end: identity, or its projection
        x, res, mean, rstd, gamma, beta, *dual = args
        bits = torch.zeros(mask_shape(x), dtype=torch.uint8, device=x.device)
        vectors = dual or none[:4]
        m.bn_apply(out[0], bits, x, mean, rstd, gamma, beta, res, *vectors, True)
        out[1].copy_(bits)

    def reduce(m, out, args):
        dz, x, mean, rstd, gamma, beta = args
        m.bn_bwd_reduce(*out, None, dz, None, x, mean, rstd, gamma, beta, *none[:3], "recompute")

    def reduce_block(m, out, args):
        dz, mask, x, mean, rstd, gamma, beta, *dual = args
        last = [*out, None][:3]
        vectors = dual or none[:3]
        m.bn_bwd_reduce(*last, dz, mask, x, mean, rstd, gamma, beta, *vectors, "mask")

    def backward(m, out, args):  # over the gradient
        dz, x, *v = args
        out[0].copy_(dz)
        form = "recompute", True, False
        m.bn_bwd_apply(out[0], None, out[0], None, x, *v, *none, *form)

    def backward_block(m, out, args):
        dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta, *dual = args
        v = mean, rstd, gamma, beta, dgamma, dbeta
        form = "mask", True, bool(dual)
        m.bn_bwd_apply(*out, dz, mask, x, *v, *(dual or none), *form)

    def frozen(m, out, args):
        dz, mask, x, *v = args
        m.bn_bwd_apply(out[0], None, dz, mask, x, *v, *none, "mask", False, False)

    def add(m, out, args):
        bits = torch.zeros(mask_shape(args[0]), dtype=torch.uint8, device=args[0].device)
        m.add_relu(out[0], bits, *args)
        out[1].copy_(bits)

    def relu_bwd(m, out, args):  # onto the gradient that is there
        dy, dz, mask = args
        out[0].copy_(dy)
        m.relu_bwd(out[0], out[0], dz, mask)

    like, vector, bits = torch.empty_like(x), _vector(c), _vector(*mask_shape(x))
    block = [dz, mask, x]
    return [
        Case("bn_stats", [vector] * 3, [x], stats),
        Case("bn_apply", [like], [x, *v[:4]], apply),
        Case("bn_apply + x", [like, bits], [x, res, *v[:4]], apply_block),
        Case("bn_apply + bn", [like, bits], [x, res, *v[:4], *r[:4]], apply_block),
        Case("bn_bwd_reduce", [vector] * 2, [dz, x, *v[:4]], reduce),
        Case("bn_bwd_reduce + x", [vector] * 2, [*block, *v[:4]], reduce_block),
        Case("bn_bwd_reduce + bn", [vector] * 3, [*block, *v[:4], res, *r[:2]], reduce_block),
        Case("bn_bwd_apply", [like], [dz, x, *v], backward),
        Case("bn_bwd_apply + x", [like] * 2, [*block, *v], backward_block),
        Case("bn_bwd_apply + bn", [like] * 2, [*block, *v, res, *r[:3], r[4]], backward_block),
        Case("bn_bwd_apply frozen", [like], [*block, *v], frozen),
        Case("add_relu", [like, bits], [x, res], add),
        Case("relu_bwd", [like], [x, dz, mask], relu_bwd),
    ]


def _pool() -> list[Case]:
    n, c, h, w = SHAPE
    x, v = _act(*SHAPE), _vectors(c, 4)
    pooled = _act(n, c, (h + 1) // 2, (w + 1) // 2)

    def forward(m, out, args):
        m.bn_relu_maxpool(out[0], None, *args, 3, 2, 1)

    def backward(m, out, args):
        dz, x, mean, rstd, gamma, beta = args
        z, index = torch.empty_like(dz), torch.empty_like(dz, dtype=torch.uint8)
        m.bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, 3, 2, 1)
        dgamma, dbeta, dx = out
        m.bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, 3, 2, 1)
        m.bn_relu_maxpool_bwd_apply(
            dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, 3, 2, 1, True
        )

    outputs = [_vector(c), _vector(c), torch.empty_like(x)]
    return [
        Case("bn_relu_maxpool", [torch.empty_like(pooled)], [x, *v], forward),
        Case("bn_relu_maxpool_bwd", outputs, [pooled, x, *v], backward),
    ]


def _convs() -> list[Case]:
    """Every prologue and epilogue of the ladder, several in one kernel: each form is compiled."""
    n, c, h, w = SHAPE
    k = 136
    small = n, k, (h + 1) // 2, (w + 1) // 2  # of the 3x3, stride 2
    x, res = _act(*SHAPE), _act(*SHAPE).flip(0).contiguous(memory_format=torch.channels_last)
    w1, w3 = (_random(k, c, r, r) * (c * r * r) ** -0.5 for r in (1, 3))
    one, three = [1, 1, 0, 0, 1, 1, 1], [2, 2, 1, 1, 1, 1, 1]
    y1, y3 = _act(n, k, h, w), _act(*small)
    dz1, dz3 = (t.flip(0).contiguous(memory_format=torch.channels_last) for t in (y1, y3))
    bits = torch.full(mask_shape(x), 0b10110101, dtype=torch.uint8, device="cpu")
    bits1 = torch.full(mask_shape(y1), 0b01101101, dtype=torch.uint8, device="cpu")
    norm, dual, behind = _vectors(c, 4), _vectors(c + 8, 4), _vectors(k, 6)
    dual = [t[:c].clone() for t in dual]

    def fprop(m, out, args):
        x, weight, *v = args
        stats = torch.empty(3, out[1].shape[0], dtype=v[0].dtype, device=x.device)
        m.conv_fprop(out[0], stats, None, None, x, weight, three, Normalise(*v), None, 1e-5)
        out[1].copy_(stats[0])
        out[2].copy_(stats[1])

    def fprop_block(m, out, args):  # writes the block before on the way
        x, res, weight, *v = args
        y, mean, var, z, mask = out
        stats = torch.empty(3, mean.shape[0], dtype=mean.dtype, device=x.device)
        bits = torch.zeros(mask_shape(x), dtype=torch.uint8, device=x.device)
        shortcut = Shortcut(res, Normalise(*v[4:]))
        m.conv_fprop(y, stats, z, bits, x, weight, one, Normalise(*v[:4]), shortcut, 1e-5)
        mean.copy_(stats[0])
        var.copy_(stats[1])
        mask.copy_(bits)

    def act(m, out, args):
        x, weight, residual, *v = args
        m.conv_fprop_act(out[0], x, weight, one, Normalise(*v), residual, True)

    def inner(m, out, args):
        dz, y, x, weight, *v = args
        bn = NormGradient(y, Normalise(*v[:4]), v[4], v[5], True)
        norm = Normalise(*v[6:])
        dx, dw, *sums = out
        prev = Previous(x, norm)
        m.conv_dgrad(dx, Sums(*sums), Gradient(dz), weight, three, bn, None, prev)
        m.conv_wgrad(dw, Gradient(dz), x, three, bn, norm)

    def first(m, out, args, training=True):  # a block's first conv, behind another block's end
        dz, y, x, weight, gate, dres, mask, raw, res, *v = args
        bn = NormGradient(y, Normalise(*v[:4]), v[4], v[5], training)
        norms = Normalise(*v[6:10]), Normalise(*v[10:])
        prev = Previous(raw, norms[0], mask, Shortcut(res, norms[1]))
        dx, dw, *sums = out
        g, residual = Gradient(dz, gate), Gradient(dres, mask)
        args = dx, Sums(*sums), dw, g, x, weight, one, bn, None, residual, prev
        if training and m.conv_bwd_pointwise_why_not(x, weight, one, False) is None:
            m.conv_bwd_pointwise(*args)
        else:
            m.conv_dgrad(dx, Sums(*sums), g, weight, one, bn, residual, prev)
            m.conv_wgrad(dw, g, x, one, bn, None)

    def frozen(m, out, args):
        first(m, out, args, training=False)

    images, w_images = x[:, :3].contiguous(memory_format=torch.channels_last), _random(k, 3, 3, 3)

    def stem(m, out, args):
        dz, images, weight = args
        y, mean, var, dw = out
        stats = torch.empty(3, mean.shape[0], dtype=mean.dtype, device=images.device)
        m.conv_fprop(y, stats, None, None, images, weight, three, None, None, 1e-5)
        mean.copy_(stats[0])
        var.copy_(stats[1])
        m.conv_wgrad(dw, Gradient(dz), images, three, None, None)

    # groups of 12 and 8 channels: tiles that end in a group, bits that begin inside a byte
    gk, six = 48, [2, 2, 1, 1, 1, 1, 6]
    wg, yg, behind_g = _random(gk, c // 6, 3, 3) / 10, _act(n, gk, *small[2:]), _vectors(gk, 6)
    dzg = yg.flip(0).contiguous(memory_format=torch.channels_last)
    bits_g = torch.full(mask_shape(yg), 0b10011101, dtype=torch.uint8, device="cpu")

    def grouped(m, out, args):
        dz, y, x, res, weight, gate, mask, *v = args
        y_out, mean, var, dx, dw, *sums = out
        stats = torch.empty(3, mean.shape[0], dtype=mean.dtype, device=x.device)
        norm = Normalise(*v[6:])
        m.conv_fprop(y_out, stats, None, None, x, weight, six, norm, None, 1e-5)
        mean.copy_(stats[0])
        var.copy_(stats[1])
        bn, g = NormGradient(y, Normalise(*v[:4]), v[4], v[5], True), Gradient(dz, gate)
        prev = Previous(res, norm, mask, Shortcut(x))
        m.conv_dgrad(dx, Sums(*sums), g, weight, six, bn, None, prev)
        m.conv_wgrad(dw, g, x, six, bn, norm)

    like, vector, of_k = torch.empty_like(x), _vector(c), _vector(k)
    mask = _vector(*mask_shape(x))
    before = [dz1, y1, x, w1, bits1, res, bits, res, x, *behind, *norm, *dual]
    return [
        Case("conv_fprop 3x3", [torch.empty_like(y3), of_k, of_k], [x, w3, *norm], fprop,
             (x, w3, three)),
        Case("conv_fprop 1x1 + block", [torch.empty_like(y1), of_k, of_k, like, mask],
             [x, res, w1, *norm, *dual], fprop_block, (x, w1, one)),
        Case("conv of images", [torch.empty_like(y3), of_k, of_k, w_images],
             [dz3, images, w_images], stem, (images, w_images, three)),
        Case("conv of groups",
             [torch.empty_like(yg), *[_vector(gk)] * 2, like, torch.empty_like(wg), *[vector] * 2],
             [dzg, yg, x, res, wg, bits_g, bits, *behind_g, *norm], grouped, (x, wg, six)),
        Case("conv_fprop_act", [torch.empty_like(y1)], [x, w1, y1, *behind[:4]], act, (x, w1, one)),
        Case("conv backward 3x3", [like, torch.empty_like(w3), vector, vector],
             [dz3, y3, x, w3, *behind, *norm], inner, (x, w3, three)),
        Case("conv backward 1x1", [like, torch.empty_like(w1), *[vector] * 3], before, first,
             (x, w1, one)),
        Case("conv backward 1x1 frozen", [like, torch.empty_like(w1), *[vector] * 3], before,
             frozen, (x, w1, one)),
    ]  # fmt: skip


FAMILIES = {"passes": _passes, "pool": _pool, "convs": _convs}


def run(
    module: ModuleType, device: torch.device, family: str, dtype: torch.dtype = torch.float32
) -> str | None:
    """None when every kernel of the family is right on this device in this dtype, otherwise which
    is not."""
    tolerance = max(TOLERANCE[family], ROUNDING[dtype])

    def stored(t: Tensor) -> Tensor:
        """Activations and weights have the dtype, per-channel vectors fp32."""
        return t.to(dtype) if t.dim() == 4 else t

    def taken(x: Tensor, weight: Tensor, geometry: list[int]) -> bool:
        """Whether the backend has such a conv; where not, the vendor's runs in its place."""
        x, weight = (stored(t).to(device) for t in (x, weight))
        return module.conv_why_not(x, weight, geometry) is None

    for name, outputs, inputs, call, conv in FAMILIES[family]():
        if conv is not None and not taken(*conv):
            continue
        inputs = [stored(t) for t in inputs]
        try:
            got = [torch.full_like(stored(t), torch.nan, device=device) for t in outputs]
            call(module, got, [t.to(device) for t in inputs])
            got = [t.double().cpu() for t in got]
        except Exception as e:
            return f"{name} failed: {type(e).__name__}: {e}".splitlines()[0]
        # float64, but for the pool: which of two values that round alike is the maximum
        true = (lambda t: t) if family == "pool" else (lambda t: t.double())
        want = [torch.full_like(true(stored(t)), torch.nan, device="cpu") for t in outputs]
        call(reference, want, [true(t) if t.is_floating_point() else t for t in inputs])
        want = [t.double() for t in want]
        for i, (a, b) in enumerate(zip(got, want, strict=True)):
            error = ((a - b).abs().max() / b.abs().max().clamp_min(1e-30)).item()
            if not error <= tolerance:
                return f"{name}: output {i} is off by {error:.1e} of its largest value"
    return None


def _file(who: dict[str, str]):
    path = plan.cache_file(who)
    return path.with_name(path.name.replace("plan-", "checked-", 1))


def _remembered(who: dict[str, str]) -> set[str]:
    try:
        content = json.loads(_file(who).read_text())
        return set(content["passed"]) if content.get("identity") == who else set()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return set()


def _remember(who: dict[str, str], passed: set[str]) -> None:
    path = _file(who)
    partial = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"identity": who, "passed": sorted(passed)}, indent=1) + "\n"
        try:
            partial.write_text(text)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def obstacle(x: Tensor, family: str, backend: str | None = None) -> str | None:
    """Why the kernels of a family (of x's backend, or of that one) must not run on x's device; None
    once they were checked there."""
    if x.dtype == torch.float64 or not ENABLED:
        return None
    try:
        name: str = backend or backends.select(x).NAME
    except backends.BackendError:
        return None  # the op says so itself
    key = (name, x.device, family, x.dtype)
    if key not in _verdicts:
        _verdicts[key] = _verdict(*key)
    return _verdicts[key]


def _verdict(name: str, device: torch.device, family: str, dtype: torch.dtype) -> str | None:
    if name == "reference":
        return None
    who = plan.identity(device.type, device.index)
    label = f"{name} {family} {str(dtype).removeprefix('torch.')} v{VERSION}"
    if family == "convs" and dtype == torch.float32 and conv_tf32():
        label += " tf32"
    passed = _remembered(who)
    if label in passed:
        return None
    with torch.no_grad():
        reason = run(importlib.import_module(backends.MODULES[name]), device, family, dtype)
    if reason is None:
        _remember(who, passed | {label})
        return None
    reason = f"the {name} kernels failed their self-check on {who['device']}: {reason}"
    log.warning("fastres: %s; the original modules run instead", reason)
    return reason


def forget() -> None:
    """Check anew at the next use, unless remembered on disk."""
    _verdicts.clear()
