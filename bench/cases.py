"""Every case there is, and the thin set that runs without --full.

A case is data; what it means is in the suite's test file. The default set takes about 10 minutes
(an estimate) on 2 idle cores: every family of kernels on a large and a small shape, every op once,
blocks of both kinds, every depth of network, with more baselines for ResNet-18 and ResNet-50. The
rest is `--full`."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from fastres.roofline import ConvShape

from . import shapes

SUITES = ("kernel", "op", "block", "network")
BATCHES = (1, 8, 32, 128, 256)
LAYER_BATCHES = (1, 8, 64, 256)  # of everything below a network
RUNGS = ("b", "c1", "c2", "d")
OP_CHW = ((256, 56, 56), (512, 28, 28), (512, 7, 7))
TINY = 8  # pixels and channels at least
TINY_BATCH = 2


@dataclass(frozen=True)
class Case:
    """suite, family: what --family takes; name: kernel, op, block or model; shape: (C, H, W), a
    convolution of batch 1, or None; mode: "kernel", "inference", "forward" or "train"; compile:
    torch.compile is a baseline without --compile; default: part of the thin set."""

    suite: str
    family: str
    name: str
    shape: Any
    dtype: str
    mode: str
    batch: int
    rung: str | None = None
    compile: bool = False
    default: bool = False

    @property
    def label(self) -> str:
        """Of the tensor or convolution."""
        s = self.shape
        if s is None:
            return ""
        if isinstance(s, ConvShape):
            groups = f"g{s.groups}" if s.groups > 1 else ""
            return f"{s.C}x{s.H}x{s.W}-{s.K}k{s.R}x{s.S}s{s.stride[0]}{groups}"
        return "x".join(map(str, s))

    @property
    def id(self) -> str:
        name = self.name.replace("[", ".").replace("]", "").replace(",", "+")
        mode = "" if self.mode == "kernel" else self.mode
        rung = "" if self.rung is None else f"rung_{self.rung}"
        return "-".join(
            p for p in (name, self.label, rung, mode, self.dtype, f"n{self.batch}") if p
        )


def _dtypes(device: str) -> tuple[str, ...]:
    return ("bf16", "fp16", "fp32") if device == "cuda" else ("fp32", "bf16")


def kernel_cases(device: str) -> Iterator[Case]:
    from .kernels import CONV_KERNELS, NORM_KERNELS, STEM_KERNELS

    batch = 64 if device == "cuda" else 8
    large, small = (256, 56, 56), (512, 7, 7)
    tensors: dict[str, list] = {role: [] for role in shapes.ROLES}
    for norm in shapes.norms():
        tensors[norm.role].append(norm.chw)
    everything = list(dict.fromkeys(n.chw for n in shapes.norms()))
    # fp16 too, as these kernels only move it; one dtype of each width by default on a CPU
    dtypes = ("fp32", "bf16", "fp16")
    for kernel in (*NORM_KERNELS, *STEM_KERNELS):
        found = everything if kernel.role == "any" else tensors[kernel.role]
        thin = {"relu": {(256, 28, 28), small}, "stem": set(found)}.get(kernel.role, {large, small})
        for chw, dtype, n in itertools.product(found, dtypes, LAYER_BATCHES):
            default = n == batch and chw in thin and dtype in _dtypes(device)[:2]
            default = default and (dtype != "fp32" or chw != small)
            yield Case("kernel", kernel.family, kernel.name, chw, dtype, "kernel", n,
                       default=default)  # fmt: skip
    chosen = _typical_convs()
    for kernel in CONV_KERNELS:
        accepted = [conv for conv in shapes.convs() if kernel.accepts(conv.shape)]
        if device == "cpu":  # which has no such kernels: one case, that says so
            accepted, dtypes, batches = accepted[:1], ("bf16",), (batch,)
        else:
            batches = LAYER_BATCHES
        for conv, dtype, n in itertools.product(accepted, dtypes, batches):
            default = n == batch and dtype == "bf16"
            default = default and (device == "cpu" or conv.shape in chosen)
            yield Case("kernel", kernel.family, kernel.name, conv.shape, dtype, "kernel", n,
                       default=default)  # fmt: skip


def _typical_convs() -> set[ConvShape]:
    """Of ResNet-50: a 1x1, a 3x3 and a strided 3x3 of its second and last stage."""
    found = set()
    for conv in shapes.convs():
        s = conv.shape
        if any(model == "resnet50" for model, _ in conv.users) and s.H in (28, 7, 14):
            found.add(s)
    return found


def op_cases(device: str) -> Iterator[Case]:
    from .ops import OPS

    batch = 64 if device == "cuda" else 8
    for name, chw in itertools.product(OPS, OP_CHW):
        for dtype, mode, n in itertools.product(
            _dtypes(device), ("train", "forward", "inference"), LAYER_BATCHES
        ):
            thin = chw == (512, 7, 7) if "conv" in name or "residual" in name else chw[0] == 512
            default = (
                n == batch
                and thin
                and (chw == (512, 28, 28)) == (not ("conv" in name or "residual" in name))
                and (mode == "train" or (mode == "inference" and dtype == _dtypes(device)[1]))
            )
            yield Case("op", name, name, chw, dtype, mode, n, default=default)


def block_cases(device: str) -> Iterator[Case]:
    batch = 64 if device == "cuda" else 8
    thin = ("resnet18.layer2.1", "resnet18.layer3.0", "resnet50.layer2.1", "resnet50.layer3.0")
    for block in shapes.blocks():
        for dtype, mode, rung, n in itertools.product(
            _dtypes(device), ("train", "forward", "inference"), RUNGS, LAYER_BATCHES
        ):
            if mode == "inference" and rung != "b":
                continue  # rungs are of training
            if rung != "b" and device == "cpu":
                continue  # no convolutions of its own: fastres.ops.residual_stage.check_fusion
            default = n == batch and block.label in thin and mode != "forward"
            default = default and dtype in _dtypes(device)[:2]
            compiled = block.label == thin[0] and dtype == "bf16"
            yield Case("block", block.kind, block.label, block.x, dtype, mode, n, rung,
                       default=default, compile=compiled)  # fmt: skip


# name -> (batches of inference, batches of training), bf16, and whether fp32 too: the thin set
_THIN_CPU: dict[str, tuple[tuple[int, ...], tuple[int, ...], bool]] = {
    "resnet18": ((1, 8, 32), (8,), True),
    "resnet34": ((8,), (8,), False),
    "resnet50": ((1, 8), (8,), True),
    "resnet101": ((4,), (4,), False),
    "resnet152": ((4,), (4,), False),
    "resnext50_32x4d": ((4,), (4,), False),
    "cifar_resnet20": ((32, 256), (32,), True),
    "cifar_resnet32": ((32,), (32,), False),
    "cifar_resnet44": ((32,), (32,), False),
    "cifar_resnet56": ((32,), (32,), False),
    "cifar_resnet110": ((32,), (32,), False),
}


def network_cases(device: str) -> Iterator[Case]:
    from .networks import NETWORKS

    for name, dtype, mode in itertools.product(NETWORKS, _dtypes(device), ("inference", "train")):
        inference, train, fp32 = _THIN_CPU[name]
        batches = inference if mode == "inference" else train
        if device == "cuda":
            batches = (1, 32, 256) if name in ("resnet18", "resnet50") else (64,)
        chosen = dtype in ("bf16", "fp16") or (fp32 and device == "cpu")
        for n in sorted({*BATCHES, 4, 64, *batches}):
            thin_batch = n in batches and (dtype != "fp32" or n == 8 or name not in ("resnet18",))
            compiled = name == "resnet18" and n == 8 and (dtype, mode) in (
                ("fp32", "inference"), ("bf16", "train"),
            )  # fmt: skip
            yield Case("network", name, name, None, dtype, mode, n, default=chosen and thin_batch,
                       compile=compiled or device == "cuda")  # fmt: skip


_MAKERS = {
    "kernel": kernel_cases,
    "op": op_cases,
    "block": block_cases,
    "network": network_cases,
}


def families(device: str = "cpu") -> list[str]:
    """What --family takes: suites, and the families of each."""
    found = dict.fromkeys(SUITES)
    for make in _MAKERS.values():
        found |= dict.fromkeys(case.family for case in make(device))
    return list(found)


def check_families(names: Iterable[str]) -> list[str]:
    """The names, or a ValueError with the nearest known one."""
    names = list(names)
    known = families() if names else []
    for name in names:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else "."
            raise ValueError(f"unknown benchmark '{name}'{hint} Known: {', '.join(known)}")
    return names


def tiny(case: Case) -> Case:
    """The case with a shape that runs in milliseconds."""
    s = case.shape
    if isinstance(s, ConvShape):
        c, k = (min(n, 16 * s.groups) for n in (s.C, s.K))
        s = replace(s, C=c, K=k, H=TINY, W=TINY)
    elif s is not None and case.suite != "block":
        s = (min(s[0], 16), min(s[1], TINY), min(s[2], TINY))
    elif s is not None:
        s = (s[0], TINY, TINY)
    return replace(case, shape=s, batch=TINY_BATCH)


def chosen(suite: str, device: str, full: bool, is_tiny: bool, only: Iterable[str]) -> list[Case]:
    """The cases of a suite to run, in a fixed order. Tiny: one of each name (block: of
    each kind), mode and rung."""
    wanted = set(only)
    found = [
        case
        for case in _MAKERS[suite](device)
        if not wanted or case.family in wanted or suite in wanted
    ]
    if is_tiny:
        what = "family" if suite == "block" else "name"
        first = {(getattr(case, what), case.mode, case.rung): case for case in reversed(found)}
        return [tiny(case) for case in reversed(first.values())]
    return found if full else [case for case in found if case.default]


def count(suite: str, device: str) -> int:
    return sum(1 for _ in _MAKERS[suite](device))
