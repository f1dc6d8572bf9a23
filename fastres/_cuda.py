"""The `cuda` backend: the functions of docs/kernels.md on the CUDA C++ kernels of fastres._C.cuda.

Addresses, sizes, device and stream only. Nothing is checked here (fastres/ops does; the launchers
check alignment, size and arch), nothing waits, and nothing is allocated but the workspace of a
reduction. The kernels run on the current stream, so that CUDA graphs capture them."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from . import _native
from ._arguments import GATE, pool_sizes, ptr, sizes

NAME = "cuda"


_host: ModuleType | None = None


def use_host(module: ModuleType | None) -> None:
    """For tests: run the kernels on CPU tensors, in tests/cuda_host's build of the same sources."""
    global _host
    _host = module


def on_host() -> bool:
    """Whether the tests' build on the CPU stands in for the GPU."""
    return _host is not None


def built() -> str | None:
    """None when fastres._C has the CUDA kernels, otherwise the reason."""
    missing = _native.why_missing()
    if missing is not None:
        return missing
    if hasattr(_native.module(), "cuda"):
        return None
    reasons = (_native.build_info() or {}).get("not_built", {})
    return f"fastres._C was built without them: {reasons.get('CUDA kernels', 'unknown')}"


def why_missing() -> str | None:
    """None when these kernels can run in this process, otherwise the reason."""
    if on_host():
        return None
    missing = built()
    if missing is not None:
        return missing
    if torch.version.hip:
        return "the CUDA C++ kernels need an NVIDIA GPU, this torch is built for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return _driver_too_old(torch.cuda.current_device())


@functools.cache
def _driver_too_old(device: int) -> str | None:
    native = _module()
    driver, toolkit = native.versions()
    capability = torch.cuda.get_device_capability(device)
    return driver_obstacle(driver, toolkit, capability, native.archs())


def driver_obstacle(
    driver: int, toolkit: int, capability: tuple[int, int], archs: str
) -> str | None:
    """Why the driver does not run this build; None when it does. driver, toolkit: CUDA's versions,
    13000 for 13.0; archs: what the build has code for, "80 90a ptx80".

    A driver runs the machine code of any toolkit of its own major version, but compiles the PTX of
    none that is newer."""
    if driver >= toolkit:
        return None
    old, new = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, toolkit))
    if driver // 1000 < toolkit // 1000:
        return (
            f"the driver is for CUDA {old}, the kernels were built with CUDA {new}: update the "
            f"driver, or install again with a CUDA {driver // 1000} toolkit"
        )
    here = 10 * capability[0] + capability[1]
    for arch in (a for a in archs.split() if not a.startswith("ptx")):
        built = int(arch.rstrip("af"))
        family = not arch.endswith("a") and here // 10 == built // 10  # 100 and 100f run on 103
        if here == built or (family and here > built):
            return None
    return (
        f"the build has PTX only for sm_{here}, of CUDA {new}, which the driver, for CUDA {old}, "
        f"cannot compile: update the driver, or install again with FASTRES_CUDA_ARCHS={here}"
    )


def _module() -> ModuleType:
    return _native.module().cuda if _host is None else _host


def _place(x: Tensor) -> tuple[int, int]:
    """Device index and stream."""
    if x.is_cuda:
        index = x.device.index
        return index, torch._C._cuda_getCurrentRawStream(index)
    if on_host() and x.device.type == "cpu":
        return 0, 0
    raise RuntimeError(f"fastres cuda: the kernels need CUDA tensors, got one on {x.device}")


def _workspace(parts: int, x: Tensor) -> Tensor:
    """fp32, every element is written before it is read."""
    floats = _module().workspace_floats(parts, *sizes(x))
    return torch.empty(floats, dtype=torch.float32, device=x.device)


def bn_stats(mean, var, rstd, x, eps):
    """mean[c], biased var[c] of x over (N, H, W); rstd = 1 / sqrt(var + eps)."""
    work = _workspace(2, x)  # a name: it must outlive the call
    _module().bn_stats(
        mean.data_ptr(), var.data_ptr(), rstd.data_ptr(), x.data_ptr(), float(eps),
        work.data_ptr(), *sizes(x), *_place(x),
    )  # fmt: skip


def bn_apply(
    z, mask, x, mean, rstd, gamma, beta, residual, res_mean, res_rstd, res_gamma, res_beta, relu
):
    """z = act(normalise(x) + r), and the bits of the ReLU's gate."""
    _module().bn_apply(
        z.data_ptr(), ptr(mask), x.data_ptr(), ptr(mean), ptr(rstd), ptr(gamma), ptr(beta),
        ptr(residual), ptr(res_mean), ptr(res_rstd), ptr(res_gamma), ptr(res_beta),
        res_mean is not None, bool(relu), *sizes(x), *_place(x),
    )  # fmt: skip


def bn_bwd_reduce(
    dgamma, dbeta, res_dgamma, dz, mask, x, mean, rstd, gamma, beta,
    residual, res_mean, res_rstd, gate,
):  # fmt: skip
    """dbeta = sum g, dgamma = sum g * xhat, res_dgamma = sum g * res_xhat."""
    work = _workspace(2 if res_dgamma is None else 3, x)
    _module().bn_bwd_reduce(
        dgamma.data_ptr(), dbeta.data_ptr(), ptr(res_dgamma), dz.data_ptr(), ptr(mask),
        x.data_ptr(), ptr(mean), ptr(rstd), ptr(gamma), ptr(beta),
        ptr(residual), ptr(res_mean), ptr(res_rstd), GATE[gate], work.data_ptr(),
        *sizes(x), *_place(x),
    )  # fmt: skip


def bn_bwd_apply(
    dx, dres, dz, mask, x, mean, rstd, gamma, beta, dgamma, dbeta,
    residual, res_mean, res_rstd, res_gamma, res_dgamma, gate, training, res_training,
):  # fmt: skip
    """dx = gamma * rstd * (g - dbeta / M - xhat * dgamma / M), or gamma * rstd * g; dres alike."""
    _module().bn_bwd_apply(
        dx.data_ptr(), ptr(dres), dz.data_ptr(), ptr(mask), x.data_ptr(), ptr(mean), ptr(rstd),
        ptr(gamma), ptr(beta), ptr(dgamma), ptr(dbeta), ptr(residual), ptr(res_mean),
        ptr(res_rstd), ptr(res_gamma), ptr(res_dgamma), GATE[gate], bool(training),
        res_mean is not None, bool(res_training), *sizes(x), *_place(x),
    )  # fmt: skip


def add_relu(z, mask, a, b):
    """z = relu(a + b), and the bits of the ReLU's gate."""
    _module().add_relu(z.data_ptr(), ptr(mask), a.data_ptr(), b.data_ptr(), *sizes(a), *_place(a))


def relu_bwd(dx, dy, dz, mask):
    """dx = gate(dz) + dy."""
    _module().relu_bwd(
        dx.data_ptr(), ptr(dy), dz.data_ptr(), mask.data_ptr(), *sizes(dz), *_place(dz)
    )


def bn_relu_maxpool(z, index, x, mean, rstd, gamma, beta, kernel, stride, padding):
    """z = maxpool(relu(normalise(x))), and the window offset of each maximum."""
    _module().bn_relu_maxpool(
        z.data_ptr(), ptr(index), x.data_ptr(), ptr(mean), ptr(rstd), ptr(gamma), ptr(beta),
        kernel, stride, padding, *pool_sizes(x, z), *_place(x),
    )  # fmt: skip


def bn_relu_maxpool_bwd_reduce(dgamma, dbeta, dz, index, x, mean, rstd, kernel, stride, padding):
    """bn_bwd_reduce with g gathered from the windows that chose each pixel."""
    work = _workspace(2, x)
    _module().bn_relu_maxpool_bwd_reduce(
        dgamma.data_ptr(), dbeta.data_ptr(), dz.data_ptr(), index.data_ptr(), x.data_ptr(),
        ptr(mean), ptr(rstd), kernel, stride, padding, work.data_ptr(),
        *pool_sizes(x, dz), *_place(x),
    )  # fmt: skip


def bn_relu_maxpool_bwd_apply(
    dx, dz, index, x, mean, rstd, gamma, dgamma, dbeta, kernel, stride, padding, training
):
    """bn_bwd_apply with g gathered from the windows that chose each pixel."""
    _module().bn_relu_maxpool_bwd_apply(
        dx.data_ptr(), dz.data_ptr(), index.data_ptr(), x.data_ptr(), ptr(mean), ptr(rstd),
        ptr(gamma), ptr(dgamma), ptr(dbeta), kernel, stride, padding, bool(training),
        *pool_sizes(x, dz), *_place(x),
    )  # fmt: skip


# --- convolutions: the pointwise kernels where they take the form, CUTLASS for the rest -----------

from . import _cuda_cutlass, _cuda_pointwise, _cuda_tiles  # noqa: E402 (they call the functions above)
from ._cuda_cutlass import (  # noqa: E402
    conv_bwd_pointwise,
    conv_bwd_pointwise_why_not,
    conv_missing,
    conv_why_not,
)


def _pointwise(x: Tensor, weight: Tensor, geometry, *others: Tensor | None) -> bool:
    """Whether the pointwise kernels take the conv, and all tensors lie as they want them."""
    return _cuda_pointwise.why_not(x, weight, geometry) is None and _cuda_pointwise.aligned(
        x, weight, *others
    )


def conv_kernels(x: Tensor, weight: Tensor, geometry: list[int]) -> str:
    """Which kernels run a conv that `conv_why_not` takes, and why, for `fastres.report`."""
    reason = _cuda_pointwise.why_not(x, weight, geometry)
    return "the pointwise kernels" if reason is None else f"CUTLASS's kernels ({reason})"


def _run(op: str, tile: str, taken: bool, *args) -> None:
    """`op` on one of the two families, on the tile of that name ("": each family's own choice).
    taken: by the pointwise kernels."""
    try:
        family, place = _cuda_tiles.place(op, tile, taken)
    except ValueError as e:
        shapes = (tuple(a.shape) for a in args if isinstance(a, Tensor) and a.dim() == 4)
        raise ValueError(f"{e}; the tensors are {', '.join(map(str, shapes))}") from None
    module = _cuda_pointwise if family == "pointwise" else _cuda_cutlass
    getattr(module, f"conv_{op}")(*args, place)


def conv_fprop(y, stats, z, mask, x, weight, geometry, norm, shortcut, eps):
    """y = conv(h) and its statistics, h = x or relu(normalise(x) + shortcut)."""
    _fprop("", y, stats, z, mask, x, weight, geometry, norm, shortcut, eps)


def _fprop(tile, y, stats, z, mask, x, weight, geometry, norm, shortcut, eps):
    other = None if shortcut is None else shortcut.x
    taken = _pointwise(x, weight, geometry, y, z, other)
    _run("fprop", tile, taken, y, stats, z, mask, x, weight, geometry, norm, shortcut, eps)


def conv_fprop_act(z, x, weight, geometry, norm, residual, relu):
    """z = act(normalise(conv(x)) + residual)."""
    _fprop_act("", z, x, weight, geometry, norm, residual, relu)


def _fprop_act(tile, z, x, weight, geometry, norm, residual, relu):
    taken = _pointwise(x, weight, geometry, z, residual)
    _run("fprop_act", tile, taken, z, x, weight, geometry, norm, residual, relu)


def conv_dgrad(dx, sums, g, weight, geometry, bn, dres, prev):
    """dx = gate(dgrad(dy) + dres), and the sums of the batch norm before the conv."""
    _dgrad("", dx, sums, g, weight, geometry, bn, dres, prev)


def _dgrad(tile, dx, sums, g, weight, geometry, bn, dres, prev):
    others = [g.dz]
    others += [t.dz for t in (dres,) if t is not None] + [t.y for t in (bn, prev) if t is not None]
    if prev is not None and prev.shortcut is not None:
        others.append(prev.shortcut.x)
    taken = _pointwise(dx, weight, geometry, *others)
    _run("dgrad", tile, taken, dx, sums, g, weight, geometry, bn, dres, prev)


def conv_wgrad(dw, g, x, geometry, bn, norm):
    """dw = wgrad(dy, h), h = x or relu(normalise(x))."""
    _wgrad("", dw, g, x, geometry, bn, norm)


def _wgrad(tile, dw, g, x, geometry, bn, norm):
    taken = _pointwise(x, dw, geometry, g.dz, None if bn is None else bn.y)
    _run("wgrad", tile, taken, dw, g, x, geometry, bn, norm)


@dataclass(frozen=True)
class Convs:
    """The convolutions on the tile of a name, in the place of a backend's module."""

    tile: str

    def conv_fprop(self, *args) -> None:
        _fprop(self.tile, *args)

    def conv_fprop_act(self, *args) -> None:
        _fprop_act(self.tile, *args)

    def conv_dgrad(self, *args) -> None:
        _dgrad(self.tile, *args)

    def conv_wgrad(self, *args) -> None:
        _wgrad(self.tile, *args)

    def conv_why_not(self, x: Tensor, weight: Tensor, geometry: list[int]) -> str | None:
        return conv_why_not(x, weight, geometry)


__all__ = [
    "Convs",
    "conv_bwd_pointwise",
    "conv_bwd_pointwise_why_not",
    "conv_dgrad",
    "conv_fprop",
    "conv_fprop_act",
    "conv_kernels",
    "conv_missing",
    "conv_wgrad",
    "conv_why_not",
]
