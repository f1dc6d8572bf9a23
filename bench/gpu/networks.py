"""The networks of the run-book; in a dry run tiny ones of the same types."""

from __future__ import annotations

import torch
from torch import nn

SIZE, DRY_SIZE = 224, 13


def network(name: str, dry: bool, seed: int = 0) -> nn.Module:
    """torchvision's `name` with random weights, the last batch norm of each block damped (see
    fastres.bench.models); dry: two and one blocks with few channels."""
    import torchvision
    from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

    from fastres.bench.models import damp_residuals

    torch.manual_seed(seed)
    if not dry:
        net = getattr(torchvision.models, name)()
    else:
        kind = Bottleneck if name == "resnet50" else BasicBlock
        net = ResNet(kind, [1, 1, 1, 1], num_classes=8)
        c, out = 8, 4 * kind.expansion
        net.conv1, net.bn1 = nn.Conv2d(3, c, 7, 2, 3, bias=False), nn.BatchNorm2d(c)

        def projected(c: int, stride: int) -> nn.Module:
            short = nn.Sequential(nn.Conv2d(c, out, 1, stride, bias=False), nn.BatchNorm2d(out))
            return kind(c, 4, stride, short)

        net.layer1 = nn.Sequential(projected(c, 1), kind(out, 4))
        net.layer2 = nn.Sequential(projected(out, 2))
        net.layer3 = net.layer4 = nn.Sequential()
        net.fc = nn.Linear(out, 8)
    damp_residuals(net)
    return net
