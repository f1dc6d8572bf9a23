"""Batch norms on running statistics, ready for the kernels: made once, not in every forward.

(mean, var, rstd) and the affine in the statistics' dtype cost half a dozen launches on vectors for
each conv. They are kept for a batch norm until any tensor they came from changes: another object,
version counter, storage or strides; or eps, dtype, stream. A write through `.data` bypasses torch's
version counter; call `fastres.invalidate(model)` after one. Nothing is kept that nobody can watch:
under CUDA graph capture (a replay reads the statistics anew), of tensors made under inference_mode,
of FSDP's parameters."""

from __future__ import annotations

import threading
import weakref
from typing import NamedTuple

import torch
from torch import Tensor

from fastres.inference import sharded

from ._args import BatchNorm
from ._units import Norm, alloc_stats, running_statistics, stats_dtype, vector


class _Source(NamedTuple):
    """A tensor as it was; `alias` keeps its storage from being reused."""

    tensor: weakref.ref
    alias: Tensor
    version: int

    def holds(self, t: Tensor) -> bool:
        same = self.tensor() is t and t._version == self.version
        return same and t.device == self.alias.device and t.is_set_to(self.alias)


class _Entry(NamedTuple):
    sources: list[_Source | None]
    settings: tuple
    norm: Norm


_lock = threading.Lock()
_entries: dict[int, _Entry] = {}  # by id of running_var


def _settings(bn: BatchNorm, x: Tensor) -> tuple:
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    return bn.eps, stats_dtype(x), x.device, stream


def fixed_norm(bn: BatchNorm, x: Tensor) -> Norm:
    """The batch norm of a conv output on x's device, by its running statistics."""
    assert bn.running_mean is not None and bn.running_var is not None
    tensors = bn.running_var, bn.running_mean, bn.weight, bn.bias
    if (
        any(t is not None and t.is_inference() for t in tensors)
        or (x.is_cuda and torch.cuda.is_current_stream_capturing())
        or sharded()
    ):
        return _make(bn, x)
    settings = _settings(bn, x)
    key = id(bn.running_var)
    entry = _entries.get(key)
    if (
        entry is not None
        and entry.settings == settings
        and all(
            t is None if s is None else t is not None and s.holds(t)
            for s, t in zip(entry.sources, tensors, strict=True)
        )
    ):
        return entry.norm
    with torch.inference_mode(False):  # an inference tensor would be of no use to other callers
        norm = _make(bn, x)
    sources = [
        None if t is None else _Source(weakref.ref(t), t.detach(), t._version) for t in tensors
    ]
    with _lock:
        if entry is None:
            weakref.finalize(bn.running_var, _entries.pop, key, None).atexit = False
        _entries[key] = _Entry(sources, settings, norm)
    return norm


@torch.no_grad()
def _make(bn: BatchNorm, x: Tensor) -> Norm:
    assert bn.running_mean is not None and bn.running_var is not None
    channels = bn.running_var.shape[0]
    like = x.new_empty((1, channels, 1, 1))
    stats = alloc_stats(like)
    running_statistics(stats, bn.running_mean, bn.running_var, bn.eps)
    gamma, beta = bn.affine(channels, x)
    return Norm(stats, vector(gamma.detach(), like), vector(beta.detach(), like))


def forget(running_var: Tensor | None) -> None:
    """Make a batch norm's anew at the next call."""
    with _lock:
        _entries.pop(id(running_var), None)
