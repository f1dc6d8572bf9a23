"""The one list of ResNet layer shapes, read off torchvision's models on the meta device.

For an image of 224 px. A convolution is a `roofline.ConvShape` of batch 1 (`of_batch` gives another
batch); a batch norm's tensor is (C, H, W) with the role it plays, which says which kernels run
there. Nothing is computed: tracing all models takes a second."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, replace

import torch

from fastres.roofline import ConvShape, trace
from fastres.roofline.trace import Node, Region

MODELS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "resnext50_32x4d")
SIZE = 224
ROLES = {
    "relu": "normalise + ReLU: inside a block",
    "add": "normalise + identity shortcut + ReLU: a block's end",
    "dual": "normalise + normalised projection + ReLU: a block's end",
    "stem": "normalise + ReLU + 3x3 max-pool of stride 2",
}

CHW = tuple[int, int, int]


@dataclass(frozen=True)
class Conv:
    """A convolution of batch 1; `users`: how often each model runs it."""

    shape: ConvShape
    users: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Norm:
    """The tensor of a batch norm, and its role (ROLES)."""

    chw: CHW
    role: str
    users: tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Block:
    """A residual block as it stands at `path` of `model`, the first of its kind there."""

    model: str
    path: str
    kind: str  # "BasicBlock" or "Bottleneck"
    x: CHW
    z: CHW
    convs: tuple[ConvShape, ...]
    projection: bool
    users: tuple[tuple[str, int], ...]

    @property
    def label(self) -> str:
        return f"{self.model}.{self.path}"


def of_batch(shape: ConvShape, batch: int) -> ConvShape:
    """The convolution with another number of images."""
    return replace(shape, N=batch)


@functools.cache
def nodes(model: str) -> tuple[Node, ...]:
    """What `model` runs on one image, blocks and stem as regions."""
    import torchvision

    with torch.device("meta"):
        net = getattr(torchvision.models, model)()
    return tuple(trace.nodes(net, trace.trace(net, (1, 3, SIZE, SIZE), "fp32", True)))


def _regions(model: str) -> list[Region]:
    return [node for node in nodes(model) if isinstance(node, Region)]


def _users(counts: Counter) -> dict:
    """key -> ((model, times), ...) from a count of (key, model)."""
    found: dict = {}
    for (key, model), times in counts.items():
        found.setdefault(key, []).append((model, times))
    return {key: tuple(users) for key, users in found.items()}


@functools.cache
def convs() -> tuple[Conv, ...]:
    """Every convolution of MODELS once, in the order of first use."""
    counts: Counter = Counter()
    for model in MODELS:
        for region in _regions(model):
            for op in (*region.convs, *(() if region.shortcut is None else (region.shortcut,))):
                counts[op.conv, model] += 1
    return tuple(Conv(shape, users) for shape, users in _users(counts).items())


@functools.cache
def norms() -> tuple[Norm, ...]:
    """Every (tensor, role) of a batch norm of MODELS once, in the order of first use."""
    counts: Counter = Counter()
    for model in MODELS:
        for region in _regions(model):
            if region.kind == "stem":
                roles = ["stem"]
            else:
                end = "add" if region.shortcut is None else "dual"
                roles = ["relu"] * (len(region.convs) - 1) + [end]
            for op, role in zip(region.convs, roles, strict=True):
                assert op.conv is not None
                _, c, h, w = op.conv.y
                counts[((c, h, w), role), model] += 1
    return tuple(Norm(chw, role, users) for (chw, role), users in _users(counts).items())


@functools.cache
def blocks() -> tuple[Block, ...]:
    """Every block of MODELS once, blocks of equal convolutions taken together."""
    first: dict[tuple, Region] = {}
    at: dict[tuple, str] = {}
    counts: Counter = Counter()
    for model in MODELS:
        for region in _regions(model):
            if region.kind != "block":
                continue
            key = (tuple(op.conv for op in region.convs), region.shortcut is not None)
            counts[key, model] += 1
            if key not in first:
                first[key], at[key] = region, model
    found = []
    for key, users in _users(counts).items():
        shapes, projection = key
        kind = {2: "BasicBlock", 3: "Bottleneck"}[len(shapes)]
        x, z = shapes[0].x[1:], shapes[-1].y[1:]
        found.append(Block(at[key], first[key].path, kind, x, z, shapes, projection, users))
    return tuple(found)
