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

import torch
from torch import Tensor

from fastres import _reference_backend as reference
from fastres import backends, plan
from fastres._contract import Gradient, Normalise, NormGradient, Previous, Sums
from fastres._layout import mask_shape

log = logging.getLogger("fastres")

# fp32, TF32 allowed in dots (10 bits of mantissa); a wrong kernel is off by far more
TOLERANCE = {"passes": 1e-4, "pool": 1e-4, "convs": 5e-3}
# a few units in the last place of what is stored
ROUNDING = {torch.float32: 0.0, torch.bfloat16: 3e-2, torch.float16: 4e-3}
SHAPE = (2, 72, 9, 7)  # more than one step of a conv's sum
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
Case = tuple[str, list[Tensor], list[Tensor], Call]  # name, outputs, inputs, call


def _passes() -> list[Case]:
    """(name, outputs, inputs, call) of the passes around the convs."""
    x, res, dz = _act(*SHAPE), _act(*SHAPE).flip(0), _act(*SHAPE).flip(2)
    x, res, dz = (t.contiguous(memory_format=torch.channels_last) for t in (x, res, dz))
    c = SHAPE[1]
    v = _vectors(c, 6)
    mask = torch.full(mask_shape(x), 0b10110101, dtype=torch.uint8, device="cpu")

    def stats(m, out, args):
        m.bn_stats(*out, args[0], 1e-5)

    def apply(m, out, args):
        x, res, mean, rstd, gamma, beta = args
        bits = torch.zeros(mask_shape(x), dtype=torch.uint8, device=x.device)
        m.bn_apply(out[0], bits, x, mean, rstd, gamma, beta, res, None, None, None, None, True)
        out[1].copy_(bits)

    def reduce(m, out, args):
        dz, mask, x, mean, rstd, gamma, beta = args
        none = (None,) * 3
        m.bn_bwd_reduce(*out, None, dz, mask, x, mean, rstd, gamma, beta, *none, "mask")

    def backward(m, out, args):
        dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta = args
        m.bn_bwd_apply(
            *out, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta, *(None,) * 5, "mask", True,
            False,
        )  # fmt: skip

    def add(m, out, args):
        m.add_relu(out[0], None, *args)

    def relu_bwd(m, out, args):
        m.relu_bwd(out[0], *args)

    like, vector = torch.empty_like(x), _vector(c)
    return [
        ("bn_stats", [vector] * 3, [x], stats),
        ("bn_apply", [like, _vector(*mask_shape(x))], [x, res, *v[:4]], apply),
        ("bn_bwd_reduce", [vector] * 2, [dz, mask, x, *v[:4]], reduce),
        ("bn_bwd_apply", [like, like], [dz, mask, x, *v], backward),
        ("add_relu", [like], [x, res], add),
        ("relu_bwd", [like], [x, dz, mask], relu_bwd),
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
        ("bn_relu_maxpool", [torch.empty_like(pooled)], [x, *v], forward),
        ("bn_relu_maxpool_bwd", outputs, [pooled, x, *v], backward),
    ]


def _convs() -> list[Case]:
    found: list[Case] = []
    for r, stride in ((1, 1), (3, 2)):
        n, c, h, w = SHAPE
        k = 136
        geometry = [stride, stride, r // 2, r // 2, 1, 1, 1]
        x, weight = _act(*SHAPE), _random(k, c, r, r) * (c * r * r) ** -0.5
        y = _act(n, k, (h - 1) // stride + 1, (w - 1) // stride + 1)

        def forward(m, out, args, geometry=geometry):
            x, weight, *v = args
            stats = torch.empty(3, out[1].shape[0], dtype=v[0].dtype, device=x.device)
            m.conv_fprop(out[0], stats, None, None, x, weight, geometry, Normalise(*v), None, 1e-5)
            out[1].copy_(stats[0])
            out[2].copy_(stats[1])

        def backward(m, out, args, geometry=geometry, pointwise=r == 1):
            dz, y, x, weight, *v = args
            bn = NormGradient(y, Normalise(*v[:4]), v[4], v[5], True)
            norm = Normalise(*v[6:])
            dx, dw, dgamma, dbeta = out
            sums, g, prev = Sums(dgamma, dbeta), Gradient(dz), Previous(x, norm)
            if pointwise and m.conv_bwd_pointwise_why_not(x, weight, geometry) is None:
                m.conv_bwd_pointwise(dx, sums, dw, g, x, weight, geometry, bn, norm, None, prev)
            else:
                m.conv_dgrad(dx, sums, g, weight, geometry, bn, None, prev)
                m.conv_wgrad(dw, g, x, geometry, bn, norm)

        vectors = _vector(k), _vector(k)
        found.append((f"conv_fprop {r}x{r}", [torch.empty_like(y), *vectors],
                      [x, weight, *_vectors(c, 4)], forward))  # fmt: skip
        outputs = [torch.empty_like(x), torch.empty_like(weight), _vector(c), _vector(c)]
        inputs = [y, y.flip(0).contiguous(memory_format=torch.channels_last), x, weight]
        found.append((f"conv backward {r}x{r}", outputs,
                      [*inputs, *_vectors(k, 6), *_vectors(c, 4)], backward))  # fmt: skip
    return found


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

    for name, outputs, inputs, call in FAMILIES[family]():
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
        partial.write_text(json.dumps({"identity": who, "passed": sorted(passed)}, indent=1) + "\n")
        partial.replace(path)


def obstacle(x: Tensor, family: str) -> str | None:
    """Why the kernels of a family must not run on x's device; None once they were checked there."""
    if x.dtype == torch.float64 or not ENABLED:
        return None
    try:
        name, _ = backends.choose(x.device, x.dtype)
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
    label = f"{name} {family} {str(dtype).removeprefix('torch.')}"
    if family == "convs" and dtype == torch.float32 and torch.backends.cudnn.allow_tf32:
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
