"""The operands of the benchmarked kernels (bench/kernels.py): random, off the ties of a ReLU, the
statistics their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastres._layout import outer_inner
from fastres.reference import pack_mask
from fastres.roofline import ConvShape

EPS = 1e-5
POOL = (3, 2, 1)


class Operands:
    """The tensors of one call, by name."""

    def __init__(self, **tensors: Any) -> None:
        self.__dict__.update(tensors)

    def __getattr__(self, name: str) -> Any:  # for type checkers: the names are the kernels' own
        raise AttributeError(name)

    def map(self, change: Callable[[Tensor], Tensor]) -> Operands:
        return Operands(
            **{k: change(v) if isinstance(v, Tensor) else v for k, v in self.__dict__.items()}
        )

    def copy(self) -> Operands:
        return self.map(lambda t: t.clone(memory_format=torch.preserve_format))

    def double(self) -> Operands:
        return self.map(
            lambda t: t.double() if t.is_floating_point() else t.clone()
        )  # keeps the memory format

    def bytes(self) -> int:
        return sum(
            t.numel() * t.element_size() for t in self.__dict__.values() if isinstance(t, Tensor)
        )


def norm_eager(o: Operands, x: str = "x", prefix: str = "") -> Tensor:
    g = o.__dict__
    return F.batch_norm(
        g[x], g[f"{prefix}mean"], g[f"{prefix}var"], g[f"{prefix}gamma"], g[f"{prefix}beta"],
        False, 0.0, EPS,
    )  # fmt: skip


def _vectors(c: int, new: Callable[..., Tensor], prefix: str = "") -> dict[str, Tensor]:
    return {
        f"{prefix}gamma": 1 + 0.3 * new(c),
        f"{prefix}beta": 0.3 * new(c),
        f"{prefix}dgamma": new(c),
        f"{prefix}dbeta": new(c),
    }


def _statistics(x: Tensor, prefix: str = "") -> dict[str, Tensor]:
    wide = x.float()
    var, mean = torch.var_mean(wide, (0, 2, 3), correction=0)
    return {f"{prefix}mean": mean, f"{prefix}var": var, f"{prefix}rstd": (var + EPS).rsqrt()}


def _away_from_ties(x: Tensor, v: dict[str, Tensor], prefix: str = "") -> Tensor:
    """x with what lies within rounding of normalise(x) == 0 moved off it."""
    mean, scale, beta = (
        t.view(1, -1, 1, 1)
        for t in (
            v[f"{prefix}mean"],
            v[f"{prefix}gamma"] * v[f"{prefix}rstd"],
            v[f"{prefix}beta"],
        )
    )
    tie = ((x.float() - mean) * scale + beta).abs() < 1e-4
    return torch.where(tie, x + (0.02 + 0.02 * x.abs()), x).contiguous(
        memory_format=torch.channels_last
    )


def _generator(device: str) -> tuple[torch.Generator, Callable[..., Tensor]]:
    generator = torch.Generator(device=device).manual_seed(0)

    def new(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    return generator, new


def operands(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Operands:
    """For the batch norm kernels on x of `shape`, stem's pool included where it is one."""
    generator, new = _generator(device)

    def activation(*size: int) -> Tensor:
        return (1.5 * new(*size) + 0.3).to(dtype).contiguous(memory_format=torch.channels_last)

    n, c, h, w = shape
    x, r = activation(*shape), activation(*shape)
    v = {**_vectors(c, new), **_vectors(c, new, "res_")}
    v |= {**_statistics(x), **_statistics(r, "res_")}
    x = _away_from_ties(x, v)
    dz = activation(*shape)
    z = F.relu(activation(*shape))
    count = n * h * w
    for name in ("dgamma", "dbeta", "res_dgamma", "res_dbeta"):
        v[name] = v[name] * (0.3 * count)
    mask = pack_mask(
        torch.rand(outer_inner(x), generator=generator, device=device) < 0.5, outer_inner(x)[1]
    )
    return Operands(
        x=x, r=r, dz=dz, z=z, mask=mask, **v,
        out=torch.empty_like(x), out2=torch.empty_like(x), new_mask=torch.empty_like(mask),
        **{f"sum{i}": torch.empty(c, device=device) for i in range(3)},
    )  # fmt: skip


def pool_operands(shape: tuple[int, int, int, int], dtype: torch.dtype, device: str) -> Operands:
    """For the stem: x, and the pooled tensor's gradient and index."""
    from fastres import _reference_backend as reference

    _, new = _generator(device)

    def activation(*size: int) -> Tensor:
        return (1.5 * new(*size) + 0.3).to(dtype).contiguous(memory_format=torch.channels_last)

    n, c, h, w = shape
    pooled = (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
    x = activation(*shape)
    v = {**_vectors(c, new), **_statistics(x)}
    x = _away_from_ties(x, v)
    count = n * h * w
    v["dgamma"], v["dbeta"] = v["dgamma"] * (0.3 * count), v["dbeta"] * (0.3 * count)
    z = torch.empty(pooled, dtype=dtype, device=device, memory_format=torch.channels_last)
    index = torch.empty_like(z, dtype=torch.uint8)
    reference.bn_relu_maxpool(z, index, x, v["mean"], v["rstd"], v["gamma"], v["beta"], *POOL)
    pre = F.relu(norm_eager(Operands(x=x, **v)))
    _, flat = F.max_pool2d(pre, *POOL, return_indices=True)
    return Operands(
        x=x, dz=activation(*pooled), index=index, relu=pre, flat=flat, **v,
        out=torch.empty_like(x), out_z=torch.empty_like(z), new_index=torch.empty_like(index),
        **{f"sum{i}": torch.empty(c, device=device) for i in range(2)},
    )  # fmt: skip


def conv_operands(shape: ConvShape, dtype: torch.dtype, device: str) -> Operands:
    """For the convolutions: x (or the raw y_in it comes from), weight, y and its gradient."""
    generator, new = _generator(device)

    def activation(size: tuple[int, ...], scale: float = 1.0) -> Tensor:
        return (scale * new(*size)).to(dtype).contiguous(memory_format=torch.channels_last)

    s = shape
    fan = (s.C // s.groups) * s.R * s.S
    x, y, r = activation(s.x), activation(s.y), activation(s.x)
    v = {**_vectors(s.C, new, "in_"), **_vectors(s.K, new, "out_")}
    v |= {**_statistics(x, "in_"), **_statistics(y, "out_")}
    x = _away_from_ties(x, v, "in_")
    count = s.N * s.P * s.Q
    for name in ("out_dgamma", "out_dbeta"):
        v[name] = v[name] * (0.1 * count)
    weight = activation((s.K, s.C // s.groups, s.R, s.S), fan**-0.5)
    rows, inner = outer_inner(x)
    bits = pack_mask(torch.rand((rows, inner), generator=generator, device=device) < 0.5, inner)
    return Operands(
        x=x, y=y, r=r, dy=activation(s.y), weight=weight, mask=bits, **v,
        geometry=[*s.stride, *s.padding, *s.dilation, s.groups],
        out_y=torch.empty_like(y), out_x=torch.empty_like(x), out_w=torch.empty_like(weight),
        out_z=torch.empty_like(x), out_mask=torch.empty_like(bits),
        stats=torch.empty((3, s.K), device=device),
        sum0=torch.empty(s.C, device=device), sum1=torch.empty(s.C, device=device),
    )  # fmt: skip
