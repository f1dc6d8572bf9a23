"""What a block runs on where nobody measured (see plan): rung b, or on a CPU the original forward
where the block is too small for it.

Rung b spares passes over the outputs of the convs, and its autograd node costs host time: some
0.25 ms a training step and block more than the original's, most of it the interpreter's. On 2 cores
that is what sparing passes over 0.7 million outputs brings, in bf16 and in fp32
(bench/results/cpu-small-blocks.json, by `python -m bench.small_blocks`). Convs that run by
Winograd's algorithm, 1x1 convs of many weights that run as matrix products, and weight gradients
of many weights on our own kernel (fastres/_wgrad.py) gain more than either."""

from __future__ import annotations

import functools
import os

import torch

from . import _pointwise, _wgrad, _winograd, plan


def _small() -> int:
    text = os.environ.get("FASTRES_SMALL_BLOCK", "700000")
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"FASTRES_SMALL_BLOCK must be a number of values, got {text!r}") from None


SMALL = _small()  # values that the convs of a block put out
LARGE_WEIGHT = 1 << 18  # of a conv, where a matrix product or our wgrad spares milliseconds
WHY = "heuristic: {:.2f} million conv outputs; fusing saves less than its host time below {:.2f}"

Shape = tuple[int, ...]
# input shape, K, filter's size, geometry (stride, padding, dilation, groups) of a conv
ConvCall = tuple[Shape, int, Shape, tuple[int, ...]]


@functools.lru_cache(1024)
def of_block(
    convs: tuple[ConvCall, ...], dtype: torch.dtype, nhwc: bool, winograd: bool, small: int
) -> tuple[str, str]:
    """(choice, why) for training a block of these convs on a CPU. nhwc: the layout that all of the
    faster kernels need; winograd: whether it is switched on; small: outputs, usually SMALL."""
    total = 0
    for shape, k, (r, s), geometry in convs:
        faster = [_winograd] if winograd else []
        if shape[1] * k >= LARGE_WEIGHT:
            faster.append(_pointwise)
        if nhwc and any(
            where.why_not(what, shape, dtype, k, geometry, (r, s)) is None
            for where in faster
            for what in ("fprop", "dgrad", "wgrad")
        ):
            return plan.HEURISTIC
        if (
            nhwc
            and shape[1] * k * r * s >= LARGE_WEIGHT
            and _wgrad.why_not(shape, dtype, k, geometry, (r, s)) is None
        ):
            return plan.HEURISTIC
        sh, sw, ph, pw, dh, dw, _ = geometry
        n, _, h, w = shape
        total += n * k * ((h + 2 * ph - dh * (r - 1) - 1) // sh + 1) * (
            (w + 2 * pw - dw * (s - 1) - 1) // sw + 1
        )  # fmt: skip
    if total >= small:
        return plan.HEURISTIC
    return plan.EAGER, WHY.format(total / 1e6, small / 1e6)
