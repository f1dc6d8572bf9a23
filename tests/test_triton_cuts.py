"""Reductions whose chunks take several steps: what a ResNet at batch 256 runs.

The shapes of the shared tests are small, so that their chunks are one step and the loops, Chan's
running merge and the ragged tail after full steps run once or never. Here the number of chunks is
held to 1 or 3, so that small shapes take many steps. Thin: two shapes for each layout.
"""

from __future__ import annotations

import pytest
import torch
from common import LAYOUTS, backend, bits, mask_shape, poison_vector

from fastres import reference as ref

# NHWC: odd and aligned. NCHW: many small images, and planes longer than a tile.
SHAPES = [
    ("nhwc", (9, 35, 12, 11)),
    ("nhwc", (12, 64, 8, 8)),
    ("nchw", (100, 3, 7, 7)),
    ("nchw", (7, 2, 70, 70)),
]
EPS = 1e-5


@pytest.fixture(params=[1, 3])
def chunks(request, monkeypatch, gpu):
    kernels = backend("triton")
    from fastres.kernels import _launch

    monkeypatch.setattr(_launch, "_MAX_CHUNKS", request.param)
    return kernels, _launch


def _close(what, got, truth, tolerance=3e-6, scale=None):
    error = (got.double() - truth).abs() / (truth.abs() if scale is None else scale)
    assert error.max() <= tolerance, f"{what}: relative error {error.max():.3g} > {tolerance}"


def _random(shape, seed, layout, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    return x.to(dtype).contiguous(memory_format=LAYOUTS[layout])


@pytest.mark.parametrize("layout, shape", SHAPES)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_bn_stats_fwd_merges_many_steps(chunks, shape, layout, mean):
    kernels, launch = chunks
    x = _random(shape, 1, layout)
    x += torch.linspace(0, 2, shape[0]).view(-1, 1, 1, 1)  # steps differ: Chan's delta matters
    x += mean
    cut = launch.reduction(launch.layout(x), 4, tensors=1)
    assert cut.chunk >= 2 * cut.step, cut
    got = [poison_vector(shape[1]) for _ in range(3)]
    kernels.bn_stats(*got, x, EPS)
    for name, g, t in zip(("mean", "var", "rstd"), got, ref.bn_stats(x.double(), EPS), strict=True):
        _close(name, g, t, scale=t.abs() + 1.0 if name == "mean" else None)


@pytest.mark.parametrize("layout, shape", SHAPES)
def test_bn_bwd_reduce_adds_many_steps(chunks, shape, layout):
    kernels, launch = chunks
    x, r, dz = (_random(shape, seed, layout) for seed in (2, 3, 4))
    cut = launch.reduction(launch.layout(x), 4, tensors=3)
    assert cut.chunk >= 2 * cut.step, cut
    mean, _, rstd = (v.float() for v in ref.bn_stats(x.double(), EPS))
    res_mean, _, res_rstd = (v.float() for v in ref.bn_stats(r.double(), EPS))
    mask = bits(x, 5)
    assert mask.shape == mask_shape(x)
    from fastres import _reference_backend

    results = []
    for run in (kernels, _reference_backend):
        out = [poison_vector(shape[1]) for _ in range(3)]
        run.bn_bwd_reduce(*out, dz, mask, x, mean, rstd, None, None, r, res_mean, res_rstd, "mask")
        results.append(out)
    scale = x.numel() / shape[1]  # magnitudes sum to about the count
    for name, g, t in zip(("dgamma", "dbeta", "res_dgamma"), *results, strict=True):
        _close(name, g, t.double(), tolerance=1e-6, scale=scale)


@pytest.mark.parametrize("layout, shape", SHAPES)
def test_bn_relu_maxpool_bwd_reduce_adds_many_steps(chunks, layout, shape):
    kernels, launch = chunks
    x = _random(shape, 6, layout)
    cut = launch.reduction(launch.layout(x), 4, tensors=2)
    assert cut.chunk >= 2 * cut.step, cut
    mean, _, rstd = (v.float() for v in ref.bn_stats(x.double(), EPS))
    pooled, index = ref.maxpool_index(x, 3, 2, 1)
    index = index.contiguous(memory_format=LAYOUTS[layout])
    dz = _random(pooled.shape, 7, layout)
    from fastres import _reference_backend

    results = []
    for run in (kernels, _reference_backend):
        out = [poison_vector(shape[1]) for _ in range(2)]
        run.bn_relu_maxpool_bwd_reduce(*out, dz, index, x, mean, rstd, 3, 2, 1)
        results.append(out)
    for name, g, t in zip(("dgamma", "dbeta"), *results, strict=True):
        _close(name, g, t.double(), tolerance=2e-6, scale=x.numel() / shape[1])
