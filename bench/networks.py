"""The networks of the benchmark: torchvision's, and the CIFAR ResNets of the paper.

A CIFAR ResNet of depth 6n + 2 (He et al. 2015, section 4.2) has n basic blocks of each of the
widths 16, 32 and 64, and shortcuts without parameters (option A): every other pixel, zeros for the
new channels. convert fuses the blocks, of the two with such a shortcut the main branch; it leaves
the stem as it is, and the record says so (`unfused`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from .shapes import MODELS

CIFAR_DEPTHS = (20, 32, 44, 56, 110)
CIFAR = tuple(f"cifar_resnet{depth}" for depth in CIFAR_DEPTHS)
NETWORKS = (*MODELS, *CIFAR)
RESIDUAL_BATCH = 8  # images on which running statistics settle


class SubsampledIdentity(nn.Module):
    """Option A: x[:, :, ::stride, ::stride], zeros in the channels that x has not."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, :: self.stride, :: self.stride]
        more = self.channels - x.shape[1]
        return F.pad(x, (0, 0, 0, 0, more // 2, more - more // 2)).contiguous(
            memory_format=torch.channels_last
        )


class CifarResNet(nn.Module):
    """conv 3x3, three stages of n basic blocks, average pool, a linear layer of 10 classes."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        if (depth - 2) % 6:
            raise ValueError(f"CifarResNet: depth must be 6n + 2, got {depth}")
        n = (depth - 2) // 6
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.relu = nn.ReLU(inplace=True)
        width = 16
        for i, planes in enumerate((16, 32, 64), start=1):
            stride = 1 if planes == width else 2
            blocks = []
            for j in range(n):
                short = SubsampledIdentity(planes, stride) if j == 0 and stride == 2 else None
                blocks.append(BasicBlock(width, planes, stride if j == 0 else 1, short))
                width = planes
            setattr(self, f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(64, 10)
        for m in self.modules():
            if isinstance(m, nn.Conv2d):
                nn.init.kaiming_normal_(m.weight, mode="fan_out")

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


def size_of(name: str) -> int:
    """Pixels of the side of an image."""
    return 32 if name in CIFAR else 224


def classes_of(name: str) -> int:
    return 10 if name in CIFAR else 1000


def build(name: str, seed: int = 0) -> nn.Module:
    """The network with random weights; nothing is downloaded."""
    import torchvision

    torch.manual_seed(seed)
    if name in CIFAR:
        return CifarResNet(int(name.removeprefix("cifar_resnet")))
    return getattr(torchvision.models, name)()


def prepared(name: str, size: int, device: str) -> tuple[nn.Module, Tensor]:
    """The network with residuals damped and running statistics settled (fastres.bench.models), and
    the photographs it was settled on."""
    from fastres.bench.models import damp_residuals, settle_running_stats

    model = build(name)
    x = photographs(RESIDUAL_BATCH, size)
    damp_residuals(model)
    settle_running_stats(model, x, forwards=1)
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, x.to(device)


def photographs(batch: int, size: int) -> Tensor:
    """Crops of scikit-learn's two photographs, normalised, channels_last; repeated beyond 8."""
    from fastres.bench.data import load_photographs, make_batch

    few = make_batch(load_photographs(None), min(batch, RESIDUAL_BATCH), size, 0)
    copies = -(-batch // len(few))
    x = few.repeat(copies, 1, 1, 1)[:batch]
    return x.contiguous(memory_format=torch.channels_last)


def unfused(model: nn.Module) -> list[str]:
    """What convert left, with the reasons."""
    import fastres

    return [f"{row.path} ({row.type}): {row.reason}" for row in fastres.report(model).left]


def training_step(
    call: Callable[[Tensor], Tensor],
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    autocast: Callable[[], Any],
    scaled: bool,
) -> Callable[[], None]:
    """Forward, cross entropy, backward, SGD with momentum, zero_grad: what is timed."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)
    scaler = torch.amp.GradScaler(x.device.type, enabled=scaled)

    def step() -> None:
        with autocast():
            loss = F.cross_entropy(call(x), labels)
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)

    return step
