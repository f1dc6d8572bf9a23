"""Matchers for torchvision.models.resnet: ResNet, ResNeXt and Wide-ResNet share three classes."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from torch import Tensor, nn

from fastres import plan
from fastres._network import NetworkMixin, run_blocks
from fastres.nn import OpenBlockMixin, ResidualBlockMixin, Spec, choice_of

from ._match import Match, Matcher

MODULE = "torchvision.models.resnet"
PROJECTION = [nn.Conv2d, nn.BatchNorm2d]


class TorchvisionResNetMixin(NetworkMixin):
    """torchvision's ResNet._forward_impl with conv1, bn1, relu and maxpool as one fused step."""

    replaces = ("forward", "_forward_impl")

    def _forward_impl(self, x: Tensor) -> Tensor:
        out = self.routed(x)
        if out is not None:
            return out
        reason = self._obstacle(x)
        if reason is not None:
            self._leave(reason, x)
            return super()._forward_impl(x)  # type: ignore[misc]
        m: Any = self
        layers = [m.layer1, m.layer2, m.layer3, m.layer4]
        if choice_of(self, x)[0] == plan.EAGER:
            x = run_blocks(layers, plain_stem(self, x), own_input=True)
            return self.last(x)
        return self.fused_network(x, layers)


def plain_stem(m: Any, x: Tensor) -> Tensor:
    return m.maxpool(m.relu(m.bn1(m.conv1(x))))


def _block(convs: int) -> Matcher:
    def match(m: nn.Module) -> Match | str:
        short: Any = m.downsample
        units = tuple((f"conv{i}", f"bn{i}") for i in range(1, convs + 1))
        mixin, plain = ResidualBlockMixin, (("relu", nn.ReLU),)
        if short is None:
            spec = Spec(units, None, plain)
        elif type(short) is nn.Sequential and [type(c) for c in short] == PROJECTION:
            spec = Spec(units, ("downsample.0", "downsample.1"), plain)
        else:
            mixin, spec = OpenBlockMixin, Spec(units, None, plain, "downsample")
        return Match("block", mixin, spec, type(m).forward)

    return match


def _resnet(m: nn.Module) -> Match | str:
    plain = (("relu", nn.ReLU), ("maxpool", nn.MaxPool2d))
    return Match("stem", TorchvisionResNetMixin, Spec((("conv1", "bn1"),), None, plain), plain_stem)


def matchers(module: ModuleType) -> dict[type, Matcher]:
    """Exact class -> matcher, given the imported torchvision module."""
    return {
        module.BasicBlock: _block(2),
        module.Bottleneck: _block(3),
        module.ResNet: _resnet,
    }
