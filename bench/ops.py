"""Every public op as a module in two forms, fused and plain, with the same parameters, so that the
library's own verify can compare them."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastres import ops, roofline
from fastres.ops import BatchNorm, Block, Conv, Unit
from fastres.roofline import ConvShape, Traffic, traffic

OPS = (
    "add_relu",
    "bn_relu",
    "bn_add_relu",
    "bn_add_relu_dual",
    "bn_relu_maxpool",
    "conv_bn",
    "conv_bn_relu",
    "conv_bn_add_relu",
    "conv_bn_add_relu_dual",
    "residual_block",
    "residual_stage",
)
POOL = (3, 2, 1)
RESIDUALS = ("add_relu", "bn_add_relu", "bn_add_relu_dual")


class Op(nn.Module):
    """One op on x (N, C, H, W). `fused` chooses between fastres.ops and plain torch; the other
    operand of a sum is a parameter, so that its gradient is compared too."""

    def __init__(self, name: str, shape: tuple[int, int, int, int], dtype: torch.dtype) -> None:
        super().__init__()
        if name not in OPS:
            raise ValueError(f"unknown op {name!r}; known: {', '.join(OPS)}")
        self.name, self.fused = name, False
        n, c, h, w = shape
        generator = torch.Generator().manual_seed(1)

        def activation(*size: int) -> nn.Parameter:
            t = torch.randn(size, generator=generator).to(dtype)
            return nn.Parameter(t.contiguous(memory_format=torch.channels_last))

        def norm() -> nn.BatchNorm2d:
            bn = nn.BatchNorm2d(c)
            for t, mid in ((bn.weight, 1.0), (bn.bias, 0.0), (bn.running_var, 1.0)):
                assert t is not None
                t.data.copy_(mid + 0.3 * (torch.rand(c, generator=generator) - 0.5))
            return bn

        if name.startswith("residual"):
            from torchvision.models.resnet import BasicBlock

            count = 1 if name == "residual_block" else 2
            self.blocks = nn.Sequential(*(BasicBlock(c, c) for _ in range(count))).to(dtype)
            for m in self.blocks.modules():  # batch norms stay fp32, as users keep them
                if isinstance(m, nn.BatchNorm2d):
                    m.float()
            return
        if name.startswith("conv"):
            self.weight = nn.Parameter((activation(c, c, 3, 3) / (3 * c**0.5)).data)
        if name != "add_relu":
            self.bn = norm()
        if name.endswith("_dual"):
            self.rbn = norm()
        if "add" in name:
            self.residual = activation(*shape)

    def forward(self, x: Tensor) -> Tensor:
        return self.run_fused(x) if self.fused else self.run_plain(x)

    def run_fused(self, x: Tensor) -> Tensor:
        name = self.name
        if name == "add_relu":
            return ops.add_relu(x, self.residual)
        if name.startswith("residual"):
            blocks = [_block(b) for b in self.blocks]
            if name == "residual_block":
                return ops.residual_block(x, *blocks[0])
            return ops.residual_stage(x, blocks)
        bn = BatchNorm.of(self.bn)
        rest: tuple[Any, ...] = (self.residual,) if "add" in name else ()
        if name.endswith("_dual"):
            rest = (*rest, BatchNorm.of(self.rbn))
        if name.startswith("conv"):
            call = getattr(ops, name.removesuffix("_dual"))
            return call(x, Conv(self.weight, padding=(1, 1)), bn, *rest)
        if name == "bn_relu_maxpool":
            return ops.bn_relu_maxpool(x, bn, *POOL)
        return ops.bn_relu(x, bn) if name == "bn_relu" else ops.bn_add_relu(x, bn, *rest)

    def run_plain(self, x: Tensor) -> Tensor:
        name = self.name
        if name == "add_relu":
            return F.relu(x + self.residual)
        if name.startswith("residual"):
            return self.blocks(x)
        if name.startswith("conv"):
            x = F.conv2d(x, self.weight, None, 1, 1)
        x = self.bn(x)
        if "add" in name:
            x = x + (self.rbn(self.residual) if name.endswith("_dual") else self.residual)
        if name == "conv_bn":
            return x
        x = F.relu(x)
        return F.max_pool2d(x, *POOL) if name == "bn_relu_maxpool" else x


def _block(b: Any) -> Block:
    return Block(
        [
            Unit(Conv.of(b.conv1), BatchNorm.of(b.bn1)),
            Unit(Conv.of(b.conv2), BatchNorm.of(b.bn2)),
        ]
    )


def pair(
    name: str, shape: tuple[int, int, int, int], dtype: torch.dtype, device: str
) -> tuple[Op, Op, Tensor]:
    """(plain, fused, x), all in channels_last."""
    plain = Op(name, shape, dtype).to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    fused = copy.deepcopy(plain)
    fused.fused = True
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(shape, generator=generator).to(dtype)
    return plain, fused, x.contiguous(memory_format=torch.channels_last).to(device)


def work(
    name: str, shape: tuple[int, int, int, int], dtype: str, mode: str
) -> list[tuple[int, int]]:
    """(bytes, FLOPs) of each kernel of one call: mode "inference", "forward" (training, without
    the backward) or "train" (both)."""
    if name.startswith("residual"):
        return _stage_work(name, shape, dtype, mode)
    train, dual, add = mode != "inference", name.endswith("_dual"), "add" in name
    t = traffic.size(shape, dtype)
    found: list[Traffic] = []
    n, c, h, w = shape
    conv = ConvShape(n, c, h, w, c, 3, 3, (1, 1), (1, 1))
    if name.startswith("conv"):
        found.append(traffic.fprop(conv, dtype))
    if name != "add_relu" and train:
        found += [traffic.bn_stats(shape, dtype)] * (1 + dual)
    if name == "bn_relu_maxpool":
        z = (n, c, (h - 1) // 2 + 1, (w - 1) // 2 + 1)
        found.append(traffic.bn_relu_maxpool(shape, z, dtype))
        if mode == "train":
            found.append(traffic.bn_relu_maxpool_bwd_reduce(shape, z, dtype))
            found.append(traffic.bn_relu_maxpool_bwd_apply(shape, z, dtype))
        return [(k.bytes, k.flops) for k in found]
    relu = name != "conv_bn"
    found.append(traffic.bn_apply(shape, dtype, residual=add, mask=train and relu))
    if mode == "train":
        if name == "add_relu":
            mask = traffic.bits(shape)
            found.append(Traffic({"dz": t, "bits": mask}, {"dx": t}))
        else:
            found.append(traffic.bn_bwd_reduce(shape, dtype, mask=relu, dual=dual))
            one = traffic.bn_bwd_apply(shape, dtype, mask=relu, dual=dual)
            more = {"dres": t} if add and not dual else {}
            found.append(Traffic(one.reads, {**one.writes, **more}))
        if name.startswith("conv"):
            found += [traffic.dgrad(conv, dtype), traffic.wgrad(conv, dtype)]
    return [(k.bytes, k.flops) for k in found]


def _stage_work(
    name: str, shape: tuple[int, int, int, int], dtype: str, mode: str
) -> list[tuple[int, int]]:
    from torchvision.models.resnet import BasicBlock

    n, c, h, w = shape
    count = 1 if name == "residual_block" else 2
    net = nn.Sequential(nn.Conv2d(3, c, 1), *(BasicBlock(c, c) for _ in range(count)))
    found = roofline.model(net, (n, 3, h, w), dtype, "b", mode != "inference")
    kernels = [k for k in found.kernels if k.path.partition(".")[0] not in ("", "0")]
    if mode == "forward":
        kernels = [k for k in kernels if k.phase == "forward"]
    return [(k.bytes, k.flops) for k in kernels if k.phase != "optimiser"]
