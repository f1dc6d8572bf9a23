"""`convert`, `revert`, `report`, `verify`: the contract of DESIGN.md section 2."""

from __future__ import annotations

import copy
from typing import TypeVar

import torch
from torch import Tensor, nn

from fastres import inference, memory, plan
from fastres._network import NetworkMixin, SequenceMixin
from fastres.nn import FusedMixin, Fusion, ResidualBlockMixin, Spec, fuse, unfuse
from fastres.ops import _fixed
from fastres.ops._choice import parse

from ._match import Match, find
from .report import Report, Row, report
from .verify import Verification, check_sample, compare_block, verify

__all__ = [
    "ConvertError",
    "Report",
    "Row",
    "Verification",
    "convert",
    "invalidate",
    "report",
    "revert",
    "verify",
]

M = TypeVar("M", bound=nn.Module)


class ConvertError(RuntimeError):
    """`convert(strict=True)` found something it cannot fuse; the message lists it. The model is
    unchanged."""


def _check_model(op: str, model: object) -> None:
    """model is a plain module, not a wrapper that holds one."""
    if isinstance(model, type) and issubclass(model, nn.Module):
        raise TypeError(f"{op}: model is the class {model.__name__}; pass an instance")
    if not isinstance(model, nn.Module):
        raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
    wrapper = None
    if isinstance(model, torch._dynamo.eval_frame.OptimizedModule):
        wrapper = "torch.compile", "torch.compile(fastres.convert(model))"
    elif isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        kind = type(model).__name__
        wrapper = kind, f"{kind}(fastres.convert(model))"
    elif isinstance(model, torch.jit.ScriptModule):
        wrapper = (
            "torch.jit",
            "fastres.convert on the original module; TorchScript itself cannot be converted",
        )
    if wrapper is not None:
        raise TypeError(
            f"{op}: model is already wrapped by {wrapper[0]}; convert first, then wrap: "
            f"{wrapper[1]}"
        )


def convert(
    model: M, *, verify: Tensor | None = None, strict: bool = False, fusion: str | None = None
) -> M:
    """Make a ResNet run on fused kernels, in place, and return it.

    Every block and stem of a known model family (torchvision's ResNet, ResNeXt, Wide-ResNet) gets a
    fused forward. Parameters, buffers, state_dict keys, hooks, training flags and module paths stay
    the same objects and names, so checkpoints go both ways. Converting twice is the same as once;
    `revert` undoes it exactly; `report` says what was done.

    verify: a sample batch (N, C, H, W). Each block is compared with the original on what it sees of
    the sample
        (forward, gradients, running statistics; train and eval) before it is accepted; one that
        differs is left as it was, with the numbers in the report.
    strict: raise ConvertError, changing nothing, when any known block or normalisation layer would
    be left unfused.

    fusion: the rung of the fusion ladder on which blocks and stem run (docs/fusion.md): "b" fuses
        the passes around the vendor's convs, "c1", "c2" and "d" go into the convs, which takes a
        GPU (fastres.kernels); passes of convs may stay with the vendor, as in "c2 vendor
        conv2.wgrad stem.fprop". None: "b", what was measured (fastres.tune), or what an earlier
        call chose. A forward that cannot run as asked raises fastres.BackendError: on a device
        whose backend has no such convs, of a block with a hook on an inner layer or another child.

    With a default process group of several ranks this is a collective: call it on all of them, and
    all follow rank 0's measured choices.

    On the CPU the process's malloc is told to keep large buffers (fastres.memory; FASTRES_MALLOC=0
    leaves it alone). Raises TypeError for what is not a plain module: a class, or a model wrapped
    by torch.compile, DDP or TorchScript, ValueError for an unknown rung."""
    _check_model("convert", model)
    if fusion is not None:
        try:
            parse(fusion)
        except ValueError as e:
            raise ValueError(f"convert: {e}") from None
    if verify is not None:
        check_sample("convert(verify=...)", model, verify)
    candidates = [
        (path, m, match)
        for path, m, match in find(model)
        if isinstance(match, Match) and not isinstance(m, FusedMixin)
    ]
    rejected: dict[str, str] = {}
    if verify is not None and candidates:
        rejected = _rejects(model, candidates, verify)
    if strict:
        left = [f"{row.path} ({row.type}): {row.reason}" for row in report(model).left]
        left += [f"{path or '(model)'}: {reason}" for path, reason in rejected.items()]
        if left:
            raise ConvertError("convert(strict=True): not fused: " + "; ".join(left))
    for path, m, match in candidates:
        if path in rejected:
            m.__dict__["_fastres_rejected"] = rejected[path]
            continue
        m.__dict__.pop("_fastres_rejected", None)
        fuse(m, match.mixin, match.spec, path)
    _fuse_sequences(model)
    if fusion is not None:
        for m in model.modules():
            if isinstance(m, FusedMixin):
                m._fastres.rung = fusion
    p = next(model.parameters(), None)
    if p is not None and p.device.type in ("cpu", "cuda"):
        plan.synchronise(p.device)
    if candidates and any(p.device.type == "cpu" for p in model.parameters()):
        memory.keep_buffers()
    return model


def revert(model: M) -> M:
    """Undo `convert` exactly, in place, and return the model. A model that was never converted
    stays as it is."""
    _check_model("revert", model)
    for m in model.modules():
        if isinstance(m, FusedMixin) and hasattr(type(m), "original_class"):
            unfuse(m)
        m.__dict__.pop("_fastres_rejected", None)
    return model


def invalidate(model: nn.Module) -> None:
    """Drop every folded weight and batch norm, to be made anew at the next inference.

    Needed only after a write that torch's version counters do not see: through `.data`, numpy, or a
    raw pointer."""
    inference.forget()
    for m in model.modules():
        fusion = m.__dict__.get("_fastres")
        if isinstance(fusion, Fusion):
            fusion.cache.clear()
            fusion.linear.clear()
        _fixed.forget(m.__dict__.get("_buffers", {}).get("running_var"))


def _fuse_sequences(model: nn.Module) -> None:
    """Let each Sequential that holds several fused blocks run them as a row. A known network does
    so itself."""
    known = [path for path, m in model.named_modules() if isinstance(m, NetworkMixin)]
    for path, m in list(model.named_modules()):
        if type(m) is not nn.Sequential or any(_inside(path, network) for network in known):
            continue
        if sum(isinstance(block, ResidualBlockMixin) for block in m) > 1:
            fuse(m, SequenceMixin, Spec(()), path)


def _inside(path: str, ancestor: str) -> bool:
    return ancestor == "" or path.startswith(f"{ancestor}.")


def _rejects(
    model: nn.Module, candidates: list[tuple[str, nn.Module, Match]], sample: Tensor
) -> dict[str, str]:
    """path -> why, for the candidates that do not compute what the original does on the sample."""
    scratch = copy.deepcopy(model).train()
    seen: dict[str, Tensor] = {}

    def record(path: str):
        def hook(_: nn.Module, args: tuple) -> None:
            seen.setdefault(path, args[0].detach().clone(memory_format=torch.preserve_format))

        return hook

    handles = [
        scratch.get_submodule(path).register_forward_pre_hook(record(path))
        for path, _, _ in candidates
    ]
    with torch.no_grad():
        scratch(sample)
    for handle in handles:
        handle.remove()
    rejected = {}
    for path, _, match in candidates:
        if path not in seen:
            rejected[path] = "verify: the sample never reached it"
            continue
        original = scratch.get_submodule(path)
        fused = copy.deepcopy(original)
        fuse(fused, match.mixin, match.spec)
        call = match.mixin.fused_forward  # type: ignore[attr-defined]
        result = compare_block(original, match.original, fused, call, seen[path])
        if not result.ok:
            rejected[path] = f"verify: {result.worst}"
    return rejected
