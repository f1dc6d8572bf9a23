"""Every kernel of docs/kernels.md as a benchmark: call, bytes, and the same in eager, on the
operands of bench/operands.py.

`eager` is the plain torch that a kernel replaces; None where torch has no such part of its own
(`bn_bwd` times reduce and apply together, as torch's one kernel does). Every kernel also has the
baseline `copy`: as many bytes, copied."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres._contract import Gradient, Normalise, NormGradient, Previous, Shortcut, Sums
from fastres._tf32 import conv_tf32
from fastres.convert.verify import FLOOR, difference
from fastres.roofline import ConvShape, Traffic, traffic

from .operands import EPS, POOL, Operands, conv_operands, norm_eager, operands, pool_operands
from .session import WrongResult

TIES = 1e-3  # of the bits of a mask or index: values within rounding of a tie
aten = torch.ops.aten

Shape = Any  # (N, C, H, W) or ConvShape


@dataclass(frozen=True)
class Kernel:
    """One form of a kernel. function: its name in the contract; role: of the tensors it runs on
    (bench/shapes.py; "any": all of them, "conv": convolutions); outputs: the operands it writes;
    accepts: whether a convolution has this form."""

    name: str
    function: str
    role: str
    call: Callable[[ModuleType, Operands], None]
    outputs: tuple[str, ...]
    moved: Callable[[Shape, str], Traffic]
    eager: Callable[[Operands], Any] | None = None
    accepts: Callable[[ConvShape], bool] = lambda shape: True

    @property
    def family(self) -> str:
        return self.name.partition("[")[0]


# --- the same in eager PyTorch --------------------------------------------------------------------


def _stats_eager(o: Operands) -> Any:
    if o.x.is_cuda:
        return torch.batch_norm_stats(o.x, EPS)
    return torch.var_mean(o.x, (0, 2, 3), correction=0)


def _bwd_eager(o: Operands, g: Tensor, mask: list[bool], x: str = "x", prefix: str = "") -> Any:
    d = o.__dict__
    mean, var, rstd = d[f"{prefix}mean"], d[f"{prefix}var"], d[f"{prefix}rstd"]
    return aten.native_batch_norm_backward(
        g, d[x], d[f"{prefix}gamma"], mean, var, mean, rstd, True, EPS, mask
    )


def _gate_eager(o: Operands) -> Tensor:
    return aten.threshold_backward(o.dz, o.z, 0)


def _pool_bwd_eager(o: Operands) -> Any:
    g = aten.max_pool2d_with_indices_backward(
        o.dz, o.relu, [3, 3], [2, 2], [1, 1], [1, 1], False, o.flat
    )
    return _bwd_eager(o, aten.threshold_backward(g, o.relu, 0), [True, True, True])


def _conv_eager(o: Operands, x: Tensor) -> Tensor:
    s = o.geometry
    return F.conv2d(x, o.weight, None, s[:2], s[2:4], s[4:6], s[6])


def _conv_bwd_eager(o: Operands, dx: bool, dw: bool) -> Any:
    s = o.geometry
    return aten.convolution_backward(
        o.dy, o.x, o.weight, None, s[:2], s[2:4], s[4:6], False, [0, 0], s[6], [dx, dw, False]
    )


# --- the kernels ----------------------------------------------------------------------------------

N5 = (None,) * 5
N4 = (None,) * 4


def _norm(o: Operands) -> tuple:
    return o.mean, o.rstd, o.gamma, o.beta


def _res(o: Operands) -> tuple:
    return o.r, o.res_mean, o.res_rstd, o.res_gamma, o.res_beta


def _and(one: Traffic, **more: int) -> Traffic:
    """A kernel's traffic with tensors that it also writes."""
    return Traffic(one.reads, {**one.writes, **more}, one.flops)


def _both(*kernels: Traffic) -> Traffic:
    """The bytes of kernels that run one after the other, read and written by each."""
    reads = {f"{i} {k}": v for i, t in enumerate(kernels) for k, v in t.reads.items()}
    writes = {f"{i} {k}": v for i, t in enumerate(kernels) for k, v in t.writes.items()}
    return Traffic(reads, writes, sum(t.flops for t in kernels))


def _reduce(b: ModuleType, o: Operands, gate: str) -> None:
    b.bn_bwd_reduce(
        o.sum0, o.sum1, None, o.dz, o.mask if gate == "mask" else None, o.x, *_norm(o),
        None, None, None, gate,
    )  # fmt: skip


def _apply(b: ModuleType, o: Operands, gate: str, dres: bool) -> None:
    b.bn_bwd_apply(
        o.out, o.out2 if dres else None, o.dz, o.mask if gate == "mask" else None, o.x, *_norm(o),
        o.dgamma, o.dbeta, *N5, gate, True, False,
    )  # fmt: skip


def _bn_bwd(b: ModuleType, o: Operands) -> None:
    _reduce(b, o, "mask")
    b.bn_bwd_apply(
        o.out, None, o.dz, o.mask, o.x, *_norm(o), o.sum0, o.sum1, *N5, "mask", True, False
    )


NORM_KERNELS = (
    Kernel(
        "bn_stats", "bn_stats", "any",
        lambda b, o: b.bn_stats(o.sum0, o.sum1, o.sum2, o.x, EPS),
        ("sum0", "sum1", "sum2"), traffic.bn_stats, _stats_eager,
    ),
    Kernel(
        "bn_apply[relu]", "bn_apply", "relu",
        lambda b, o: b.bn_apply(o.out, None, o.x, *_norm(o), *N5, True),
        ("out",), traffic.bn_apply, lambda o: F.relu(norm_eager(o), inplace=True),
    ),
    Kernel(
        "bn_apply[add_relu]", "bn_apply", "add",
        lambda b, o: b.bn_apply(o.out, o.new_mask, o.x, *_norm(o), o.r, *N4, True),
        ("out", "new_mask"), lambda s, d: traffic.bn_apply(s, d, residual=True, mask=True),
        lambda o: norm_eager(o).add_(o.r).relu_(),
    ),
    Kernel(
        "bn_apply[dual_add_relu]", "bn_apply", "dual",
        lambda b, o: b.bn_apply(o.out, o.new_mask, o.x, *_norm(o), *_res(o), True),
        ("out", "new_mask"), lambda s, d: traffic.bn_apply(s, d, residual=True, mask=True),
        lambda o: norm_eager(o).add_(norm_eager(o, "r", "res_")).relu_(),
    ),
    Kernel(
        "bn_bwd_reduce[recompute]", "bn_bwd_reduce", "relu",
        lambda b, o: _reduce(b, o, "recompute"), ("sum0", "sum1"), traffic.bn_bwd_reduce,
        lambda o: _bwd_eager(o, _gate_eager(o), [False, True, True]),
    ),
    Kernel(
        "bn_bwd_reduce[mask]", "bn_bwd_reduce", "add",
        lambda b, o: _reduce(b, o, "mask"), ("sum0", "sum1"),
        lambda s, d: traffic.bn_bwd_reduce(s, d, mask=True),
        lambda o: _bwd_eager(o, _gate_eager(o), [False, True, True]),
    ),
    Kernel(
        "bn_bwd_reduce[mask_dual]", "bn_bwd_reduce", "dual",
        lambda b, o: b.bn_bwd_reduce(
            o.sum0, o.sum1, o.sum2, o.dz, o.mask, o.x, *_norm(o), o.r, o.res_mean, o.res_rstd,
            "mask"),
        ("sum0", "sum1", "sum2"), lambda s, d: traffic.bn_bwd_reduce(s, d, mask=True, dual=True),
    ),
    Kernel(
        "bn_bwd_apply[recompute]", "bn_bwd_apply", "relu",
        lambda b, o: _apply(b, o, "recompute", False), ("out",), traffic.bn_bwd_apply,
    ),
    Kernel(
        "bn_bwd_apply[mask]", "bn_bwd_apply", "add",
        lambda b, o: _apply(b, o, "mask", False), ("out",),
        lambda s, d: traffic.bn_bwd_apply(s, d, mask=True),
    ),
    Kernel(
        "bn_bwd_apply[mask_dres]", "bn_bwd_apply", "add",
        lambda b, o: _apply(b, o, "mask", True), ("out", "out2"),
        lambda s, d: _and(traffic.bn_bwd_apply(s, d, mask=True), dres=traffic.size(s, d)),
    ),
    Kernel(
        "bn_bwd_apply[mask_dual]", "bn_bwd_apply", "dual",
        lambda b, o: b.bn_bwd_apply(
            o.out, o.out2, o.dz, o.mask, o.x, *_norm(o), o.dgamma, o.dbeta, o.r, o.res_mean,
            o.res_rstd, o.res_gamma, o.res_dgamma, "mask", True, True),
        ("out", "out2"), lambda s, d: traffic.bn_bwd_apply(s, d, mask=True, dual=True),
    ),
    Kernel(
        "bn_bwd[mask]", "bn_bwd_apply", "add", _bn_bwd, ("out", "sum0", "sum1"),
        lambda s, d: _both(
            traffic.bn_bwd_reduce(s, d, mask=True), traffic.bn_bwd_apply(s, d, mask=True)),
        lambda o: _bwd_eager(o, _gate_eager(o), [True, True, True]),
    ),
    Kernel(
        "add_relu", "add_relu", "add",
        lambda b, o: b.add_relu(o.out, o.new_mask, o.x, o.r), ("out", "new_mask"),
        lambda s, d: traffic.bn_apply(s, d, residual=True, mask=True),
        lambda o: torch.add(o.x, o.r).relu_(),
    ),
    Kernel(
        "relu_bwd[plain]", "relu_bwd", "add",
        lambda b, o: b.relu_bwd(o.out, None, o.dz, o.mask), ("out",),
        lambda s, d: Traffic(
            {"dz": traffic.size(s, d), "bits": traffic.bits(s)}, {"dx": traffic.size(s, d)}),
        _gate_eager,
    ),
    Kernel(
        "relu_bwd[add]", "relu_bwd", "add",
        lambda b, o: b.relu_bwd(o.out, o.r, o.dz, o.mask), ("out",), traffic.relu_bwd,
        lambda o: _gate_eager(o).add_(o.r),
    ),
)  # fmt: skip


def _pool_bwd(b: ModuleType, o: Operands) -> None:
    b.bn_relu_maxpool_bwd_reduce(o.sum0, o.sum1, o.dz, o.index, o.x, o.mean, o.rstd, *POOL)
    b.bn_relu_maxpool_bwd_apply(
        o.out, o.dz, o.index, o.x, o.mean, o.rstd, o.gamma, o.sum0, o.sum1, *POOL, True
    )


def pooled(shape: tuple[int, ...]) -> tuple[int, ...]:
    n, c, h, w = shape
    return n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1


STEM_KERNELS = (
    Kernel(
        "stem[forward]", "bn_relu_maxpool", "stem",
        lambda b, o: b.bn_relu_maxpool(o.out_z, o.new_index, o.x, *_norm(o), *POOL),
        ("out_z", "new_index"), lambda s, d: traffic.bn_relu_maxpool(s, pooled(s), d),
        lambda o: F.max_pool2d(F.relu(norm_eager(o), inplace=True), *POOL, return_indices=True),
    ),
    Kernel(
        "stem[bwd_reduce]", "bn_relu_maxpool_bwd_reduce", "stem",
        lambda b, o: b.bn_relu_maxpool_bwd_reduce(
            o.sum0, o.sum1, o.dz, o.index, o.x, o.mean, o.rstd, *POOL),
        ("sum0", "sum1"), lambda s, d: traffic.bn_relu_maxpool_bwd_reduce(s, pooled(s), d),
    ),
    Kernel(
        "stem[bwd_apply]", "bn_relu_maxpool_bwd_apply", "stem",
        lambda b, o: b.bn_relu_maxpool_bwd_apply(
            o.out, o.dz, o.index, o.x, o.mean, o.rstd, o.gamma, o.dgamma, o.dbeta, *POOL, True),
        ("out",), lambda s, d: traffic.bn_relu_maxpool_bwd_apply(s, pooled(s), d),
    ),
    Kernel(
        "stem[backward]", "bn_relu_maxpool_bwd_apply", "stem",
        _pool_bwd,
        ("out", "sum0", "sum1"),
        lambda s, d: _both(
            traffic.bn_relu_maxpool_bwd_reduce(s, pooled(s), d),
            traffic.bn_relu_maxpool_bwd_apply(s, pooled(s), d)),
        _pool_bwd_eager,
    ),
)  # fmt: skip


def _in(o: Operands) -> Normalise:
    return Normalise(o.in_mean, o.in_rstd, o.in_gamma, o.in_beta)


def _out(o: Operands) -> Normalise:
    return Normalise(o.out_mean, o.out_rstd, o.out_gamma, o.out_beta)


def _norm_gradient(o: Operands) -> NormGradient:
    return NormGradient(o.y, _out(o), o.out_dgamma, o.out_dbeta, True)


def _previous(o: Operands) -> tuple[Sums, Previous]:
    return Sums(o.sum0, o.sum1), Previous(o.x, _in(o))


def _fprop(b: ModuleType, o: Operands, stats: bool, norm: bool) -> None:
    b.conv_fprop(
        o.out_y, o.stats if stats else None, None, None, o.x, o.weight, o.geometry,
        _in(o) if norm else None, None, EPS,
    )  # fmt: skip


def _any(shape: ConvShape) -> bool:
    return shape.groups == 1


def _pointwise(shape: ConvShape) -> bool:
    return shape.groups == 1 and shape.pointwise


CONV_KERNELS = (
    Kernel(
        "conv_fprop[stats]", "conv_fprop", "conv", lambda b, o: _fprop(b, o, True, False),
        ("out_y", "stats"), lambda s, d: traffic.fprop(s, d, "none", "stats"),
        lambda o: torch.var_mean(_conv_eager(o, o.x), (0, 2, 3), correction=0), _any,
    ),
    Kernel(
        "conv_fprop[norm_relu,stats]", "conv_fprop", "conv", lambda b, o: _fprop(b, o, True, True),
        ("out_y", "stats"), lambda s, d: traffic.fprop(s, d, "norm_relu", "stats"),
        lambda o: torch.var_mean(
            _conv_eager(o, F.relu(norm_eager(o, "x", "in_"), inplace=True)), (0, 2, 3),
            correction=0),
        _any,
    ),
    Kernel(
        "conv_fprop[norm_add_relu,stats]", "conv_fprop", "conv",
        lambda b, o: b.conv_fprop(
            o.out_y, o.stats, o.out_z, o.out_mask, o.x, o.weight, o.geometry, _in(o),
            Shortcut(o.r), EPS),
        ("out_y", "stats", "out_z"), lambda s, d: traffic.fprop(s, d, "norm_add_relu", "stats"),
        lambda o: torch.var_mean(
            _conv_eager(o, norm_eager(o, "x", "in_").add_(o.r).relu_()), (0, 2, 3), correction=0),
        _pointwise,
    ),
    Kernel(
        "conv_fprop_act[relu]", "conv_fprop_act", "conv",
        lambda b, o: b.conv_fprop_act(o.out_y, o.x, o.weight, o.geometry, _out(o), None, True),
        ("out_y",), lambda s, d: traffic.fprop(s, d, "none", "affine_relu"),
        lambda o: F.relu(
            F.batch_norm(_conv_eager(o, o.x), o.out_mean, o.out_var, o.out_gamma, o.out_beta,
                         False, 0.0, EPS), inplace=True),
        _any,
    ),
    Kernel(
        "conv_fprop_act[add_relu]", "conv_fprop_act", "conv",
        lambda b, o: b.conv_fprop_act(o.out_y, o.x, o.weight, o.geometry, _out(o), o.y, True),
        ("out_y",), lambda s, d: traffic.fprop(s, d, "none", "affine_add_relu"),
        lambda o: F.batch_norm(
            _conv_eager(o, o.x), o.out_mean, o.out_var, o.out_gamma, o.out_beta,
            False, 0.0, EPS).add_(o.y).relu_(),
        _any,
    ),
    Kernel(
        "conv_dgrad[plain]", "conv_dgrad", "conv",
        lambda b, o: b.conv_dgrad(
            o.out_x, None, Gradient(o.dy), o.weight, o.geometry, None, None, None),
        ("out_x",), lambda s, d: traffic.dgrad(s, d), lambda o: _conv_bwd_eager(o, True, False),
        _any,
    ),
    Kernel(
        "conv_dgrad[dbn,gate_sums]", "conv_dgrad", "conv",
        lambda b, o: b.conv_dgrad(
            o.out_x, _previous(o)[0], Gradient(o.dy), o.weight, o.geometry, _norm_gradient(o), None,
            _previous(o)[1]),
        ("out_x", "sum0", "sum1"), lambda s, d: traffic.dgrad(s, d, "dbn", "gate_sums"), None, _any,
    ),
    Kernel(
        "conv_wgrad[plain]", "conv_wgrad", "conv",
        lambda b, o: b.conv_wgrad(o.out_w, Gradient(o.dy), o.x, o.geometry, None, None),
        ("out_w",), lambda s, d: traffic.wgrad(s, d), lambda o: _conv_bwd_eager(o, False, True),
        _any,
    ),
    Kernel(
        "conv_wgrad[dbn,norm_relu]", "conv_wgrad", "conv",
        lambda b, o: b.conv_wgrad(
            o.out_w, Gradient(o.dy), o.x, o.geometry, _norm_gradient(o), _in(o)),
        ("out_w",), lambda s, d: traffic.wgrad(s, d, "dbn", "norm_relu"), None, _any,
    ),
    Kernel(
        "conv_bwd_pointwise[dbn,norm_relu,gate_sums]", "conv_bwd_pointwise", "conv",
        lambda b, o: b.conv_bwd_pointwise(
            o.out_x, _previous(o)[0], o.out_w, Gradient(o.dy), o.x, o.weight, o.geometry,
            _norm_gradient(o), _in(o), None, _previous(o)[1]),
        ("out_x", "sum0", "sum1", "out_w"),
        lambda s, d: traffic.dgrad_wgrad(s, d, "dbn", "norm_relu", "gate_sums"),
        lambda o: _conv_bwd_eager(o, True, True), _pointwise,
    ),
)  # fmt: skip

KERNELS = (*NORM_KERNELS, *STEM_KERNELS, *CONV_KERNELS)


def make_operands(kernel: Kernel, shape: Shape, dtype: torch.dtype, device: str) -> Operands:
    if kernel.role == "conv":
        return conv_operands(shape, dtype, device)
    make = pool_operands if kernel.role == "stem" else operands
    return make(shape, dtype, device)


def why_not(kernel: Kernel, backend: ModuleType, o: Operands) -> str | None:
    """Why a backend does not run the kernel on these operands; None when it does."""
    if not hasattr(backend, kernel.function):
        return f"the {backend.NAME} backend has no {kernel.function}"
    if kernel.role != "conv":
        return None
    reason = backend.conv_missing(o.x.device) or backend.conv_why_not(o.x, o.weight, o.geometry)
    if reason is None and kernel.function == "conv_bwd_pointwise":
        reason = backend.conv_bwd_pointwise_why_not(o.x, o.weight, o.geometry, False)
    return reason


# --- the check ------------------------------------------------------------------------------------


def check(kernel: Kernel, backend: ModuleType, o: Operands) -> dict[str, Any]:
    """Runs the kernel once, over outputs full of NaN, and judges it by the reference in float64.

    The rule is the library's own (fastres.convert.verify): the error may be twice that of the
    truth rounded once, plus the dtype's floor. Masks and indices are compared with the reference
    in the same dtype. Raises WrongResult."""
    from fastres import _reference_backend as reference

    mine = o.copy()
    for name in kernel.outputs:
        t = getattr(mine, name)
        t.fill_(0xA5 if t.dtype == torch.uint8 else float("nan"))
    kernel.call(backend, mine)
    truth, same = o.double(), None
    kernel.call(reference, truth)
    found = []
    for name in kernel.outputs:
        got, exact = getattr(mine, name), getattr(truth, name)
        if got.dtype == torch.uint8:
            if same is None:
                same = o.copy()
                kernel.call(reference, same)
            wrong = _differing(got, getattr(same, name), "mask" in name)
            if wrong > TIES:
                raise WrongResult(
                    f"{kernel.name}: {wrong:.2%} of {name} differ from the reference's"
                )
            continue
        one = difference(f"{kernel.name} {name}", got, exact.to(got.dtype), exact)
        found.append(replace(one, floor=max(one.floor, _floor(kernel, o))))
    worst = max(found, key=lambda d: d.excess)
    if not worst.ok:
        raise WrongResult(f"wrong result: {worst}")
    return {
        "against": "fastres.reference in float64",
        "tensors": len(found),
        "worst": str(worst),
        "excess": worst.excess,
    }


def _floor(kernel: Kernel, o: Operands) -> float:
    """Sums in a conv's epilogue are fp32 sums of what it stored, rounded. An fp32 conv on a GPU
    may multiply in TF32, which has fp16's mantissa."""
    if kernel.role != "conv":
        return 0.0
    tf32 = o.x.is_cuda and o.x.dtype == torch.float32 and conv_tf32()
    return FLOOR[torch.float16 if tf32 else o.x.dtype]


def _differing(got: Tensor, expected: Tensor, packed: bool) -> float:
    if not packed:
        return float((got != expected).double().mean())
    bits = torch.zeros_like(got, dtype=torch.int32)
    for i in range(8):
        bits += ((got ^ expected) >> i) & 1
    return float(bits.double().mean()) / 8
