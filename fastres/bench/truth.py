"""The float64 answers, and the fixture file that gives every worker one batch and one model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.bench.data import load_photographs, make_batch
from fastres.bench.models import (
    CLASSES,
    build_model,
    damp_residuals,
    load_weights,
    settle_running_stats,
)
from fastres.bench.options import Options

if TYPE_CHECKING:
    from torch import Tensor, nn

VERIFY_IMAGES = 8  # of the batch are checked in float64: enough for batch statistics
VERIFY_IMAGES_QUICK = 4


def training_pass(
    model: nn.Module, out: Tensor, labels: Tensor, scale: float = 1.0
) -> dict[str, Any]:
    """Backward of the cross entropy of `out`; outputs, gradients / scale and running statistics."""
    import torch

    loss = torch.nn.functional.cross_entropy(out, labels)
    (loss * scale).backward()
    grads = {n: p.grad / scale for n, p in model.named_parameters() if p.grad is not None}
    running = {n: b for n, b in model.named_buffers() if b.is_floating_point()}
    return {"outputs": {"": out.detach()}, "gradients": grads, "running_stats": running}


def float64_truth(model: nn.Module, batch: Tensor, labels: Tensor) -> dict[str, Any]:
    """{"inference": {...}, "train": {...}}: what the model gives when computed in float64."""
    import torch

    exact = copy.deepcopy(model).double().eval()
    with torch.no_grad():
        inference = {"outputs": {"": exact(batch.double())}}
    exact.train()
    return {"inference": inference, "train": training_pass(exact, exact(batch.double()), labels)}


def make_fixture(options: Options, file: Path) -> dict[str, Any]:
    """Writes batch, labels, model state and truth to `file`; returns what the report says of them.

    Raises UsageError for images or weights that cannot be used.
    """
    import torch

    photographs = load_photographs(options.images)
    model = build_model(options.model, options.seed)
    if options.weights is not None:
        load_weights(model, options.model, options.weights)
    batch = make_batch(photographs, options.batch, options.size, options.seed)
    generator = torch.Generator().manual_seed(options.seed)
    labels = torch.randint(CLASSES, (options.batch,), generator=generator)
    if options.weights is None:
        damp_residuals(model)
        settle_running_stats(model, batch)
    count = min(options.batch, VERIFY_IMAGES_QUICK if options.quick else VERIFY_IMAGES)
    torch.save(
        {
            "state_dict": model.state_dict(),
            "batch": batch,
            "labels": labels,
            "verify_images": count,
            "truth": float64_truth(model, batch[:count], labels[:count]),
        },
        file,
    )
    return {
        "images": [name for name, _ in photographs],
        "verify_images": count,
        "weights": options.weights or f"random, seed {options.seed}",
    }
