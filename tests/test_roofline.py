"""The traffic and FLOP model: against DESIGN.md's table, hand-computed bytes, torch's FLOP counter,
and what our own ops really allocate."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.resnet import BasicBlock, Bottleneck

import fastres
from fastres import roofline
from fastres.roofline.trace import meta_copy

BATCH = (256, 3, 224, 224)

# DESIGN.md section 4 and the last table of ANCHORS.md: MB and img/s at 4.3 TB/s and 790 TFLOP/s,
# and how far we may be from them. docs/roofline.md explains each difference beyond 1%.
DESIGN = {
    "resnet50": {
        "a": (473, 8_190), "b": (336, 11_090), "c1": (266, 13_410), "c2": (242, 15_010),
        "d": (196, 17_680),
    },
    "resnet18": {
        "a": (104, 30_800), "b": (75, 38_900), "c1": (57, 46_300), "c2": (51, 53_000),
        "d": (49, 53_900),
    },
}  # fmt: skip
BYTES_TOLERANCE, CEILING_TOLERANCE = 0.05, 0.08
# What the ladder's kernels move on sm_90 where that is beyond the tolerance (docs/roofline.md says
# by what); tests/test_traffic.py holds the model to the kernels.
LADDER = {
    "resnet50": {"d": (221.1, 16_621)},
    "resnet18": {"c2": (54.8, 52_602), "d": (54.8, 52_602)},
}


def resnet(name: str) -> nn.Module:
    return getattr(torchvision.models, name)()


def megabytes(found: roofline.Roofline) -> float:
    return found.bytes / found.batch / 1e6


@pytest.mark.parametrize("name", DESIGN)
def test_totals_and_ceilings_are_those_of_the_design(name):
    net = resnet(name)
    for rung, (expected, ceiling) in (DESIGN[name] | LADDER[name]).items():
        found = roofline.model(net, BATCH, rung=rung)
        if rung in LADDER[name]:
            assert megabytes(found) == pytest.approx(expected, abs=0.06)
            assert found.ceiling() == pytest.approx(ceiling, rel=1e-3)
            assert expected > DESIGN[name][rung][0] * (1 + BYTES_TOLERANCE)
            continue
        assert megabytes(found) == pytest.approx(expected, rel=BYTES_TOLERANCE), rung
        assert found.ceiling(4.3e12, 790e12) == pytest.approx(ceiling, rel=CEILING_TOLERANCE), rung


@pytest.mark.parametrize("name", DESIGN)
def test_ceilings_differ_from_the_design_by_what_epilogues_hide(name):
    """A conv's own bytes under its FLOPs, what its prologue or epilogue adds in a pass of its own:
    then the ceilings are DESIGN's closely, and above by what a compute-bound kernel hides."""
    for found in roofline.ladder(resnet(name), BATCH):
        seconds = 0.0
        for k in found.kernels:
            moved = (*k.reads, *k.writes) if k.shape is not None else ()
            extra = sum(a.bytes for a in moved if "BN," in a.row or "block-end" in a.row)
            seconds += max((k.bytes - extra) / 4.3e12, k.flops / 790e12) + extra / 4.3e12
        if found.rung not in LADDER[name]:
            assert found.batch / seconds == pytest.approx(DESIGN[name][found.rung][1], rel=0.04)
        assert found.ceiling() >= found.batch / seconds


def test_rows_are_those_of_the_anchors():
    """Rows in which our accounting is ANCHORS' own, to its rounding, and what the ladder adds;
    docs/roofline.md has the others (pool indices, the fused stem, recomputed activations, the
    projection's gradient)."""
    ends = 3.2  # of the last block of each layer, not of the network
    rows = {
        "conv fprop": dict.fromkeys(("a", "b", "c1", "c2", "d"), 42),
        "BN, ReLU, add, pool forward": {"a": 141 + 1.4, "c1": 36, "c2": 36},
        "block-end and shortcut backward": {"a": 34, "b": 90 + 9.6, "c1": 40 + ends},
        "other BN, ReLU, pool backward": {"a": 171 + 1.4},
        "dgrad": {"a": 42, "b": 42, "c1": 34 + 1.05, "c2": 55 + 2.1},
        "wgrad": {"a": 42, "b": 42, "c1": 42},
        "dgrad + wgrad, 1x1 stride 1": {},
        "optimiser, head, weight casts": dict.fromkeys(("a", "b", "c1", "c2", "d"), 2 + 1.2),
    }
    for found in roofline.ladder(resnet("resnet50"), BATCH):
        ours = found.rows()
        assert list(ours) == list(rows) and sum(ours.values()) == found.bytes
        for row, by_rung in rows.items():
            if found.rung in by_rung:
                expected = by_rung[found.rung]
                got = ours[row] / found.batch / 1e6
                assert got == pytest.approx(expected, abs=0.9), (found.rung, row)


def test_folded_inference_is_anchors_52_megabytes_and_what_it_leaves_out():
    # 52 MB, the projections' outputs that conv3 reads (3.01), the pool's int64 indices (1.61)
    found = roofline.model(resnet("resnet50"), BATCH, training=False)
    assert found.rung == "folded"
    assert megabytes(found) == pytest.approx(52 + 3.01 + 1.61, abs=0.5)


# ---------------------------------------------------------------- by hand


def pair(block: type[nn.Module], width: int, out: int) -> nn.Module:
    """A block with a projection (stride 2), then one with an identity shortcut."""
    down = nn.Sequential(nn.Conv2d(width, out, 1, 2, bias=False), nn.BatchNorm2d(out))
    return nn.Sequential(block(width, 16, 2, down), block(out, 16))  # type: ignore[call-arg]


def kernels_of(net, rung, path, training=True, shape=(2, 16, 16, 16)):
    found = roofline.model(net, shape, "bf16", rung, training)
    return [
        (
            k.op,
            k.path.removeprefix(path),
            {a.tensor: a.bytes for a in k.reads},
            {a.tensor: a.bytes for a in k.writes},
        )
        for k in found.kernels
        if k.path.startswith(path)
    ]


# Bottleneck 64 -> 16 -> 16 -> 64 at 8 x 8, batch 2, bf16: a narrow activation is 2 * 16 * 64 * 2 =
# 4096 bytes, a wide one 16384, its mask 2 * 64 pixels * 64 / 8 = 1024; weights 64 * 16 * 2 = 2048
# and 16 * 16 * 9 * 2 = 4608.
N, WIDE, MASK, W1, W3 = 4096, 16384, 1024, 2048, 4608


def test_bottleneck_rung_b_by_hand():
    assert kernels_of(pair(Bottleneck, 16, 64), "b", "1.") == [
        ("fprop", "conv1", {"w": W1, "x": WIDE}, {"y": N}),
        ("bn_stats", "conv1", {"y": N}, {}),
        ("bn_apply", "conv1", {"y": N}, {"z": N}),
        ("fprop", "conv2", {"w": W3, "x": N}, {"y": N}),
        ("bn_stats", "conv2", {"y": N}, {}),
        ("bn_apply", "conv2", {"y": N}, {"z": N}),
        ("fprop", "conv3", {"w": W1, "x": N}, {"y": WIDE}),
        ("bn_stats", "conv3", {"y": WIDE}, {}),
        ("bn_apply", "conv3", {"y": WIDE, "residual": WIDE}, {"z": WIDE, "bits": MASK}),
        ("bn_bwd_reduce", "conv3", {"dz": WIDE, "y": WIDE, "bits": MASK}, {}),
        ("bn_bwd_apply", "conv3", {"dz": WIDE, "y": WIDE, "bits": MASK}, {"dy": WIDE}),
        ("bn_apply", "conv2", {"y": N}, {"z": N}),  # z2 again, for wgrad
        ("dgrad", "conv3", {"w": W1, "dy": WIDE}, {"dx": N}),
        ("wgrad", "conv3", {"x": N, "dy": WIDE}, {"dw": W1}),
        ("bn_bwd_reduce", "conv2", {"dz": N, "y": N}, {}),
        ("bn_bwd_apply", "conv2", {"dz": N, "y": N}, {"dy": N}),
        ("bn_apply", "conv1", {"y": N}, {"z": N}),
        ("dgrad", "conv2", {"w": W3, "dy": N}, {"dx": N}),
        ("wgrad", "conv2", {"x": N, "dy": N}, {"dw": W3}),
        ("bn_bwd_reduce", "conv1", {"dz": N, "y": N}, {}),
        ("bn_bwd_apply", "conv1", {"dz": N, "y": N}, {"dy": N}),
        ("dgrad", "conv1", {"w": W1, "dy": N}, {"dx": WIDE}),
        ("wgrad", "conv1", {"x": WIDE, "dy": N}, {"dw": W1}),
        ("relu_bwd", "conv3", {"dz": WIDE, "dx": WIDE, "bits": MASK}, {"dx": WIDE}),
    ]


def test_bottleneck_rung_c1_by_hand():
    """The last block: its end is a pass forward, and its sums a pass backward; conv1's dgrad does
    the sums of the block before, which has a projection."""
    ends = {"dres": WIDE, "dres bits": MASK, "y_end": WIDE, "bits": MASK, "y_short": WIDE}
    assert kernels_of(pair(Bottleneck, 16, 64), "c1", "1.") == [
        ("fprop", "conv1", {"w": W1, "x": WIDE}, {"y": N}),
        ("fprop", "conv2", {"w": W3, "y_in": N}, {"y": N}),
        ("fprop", "conv3", {"w": W1, "y_in": N}, {"y": WIDE}),
        ("bn_apply", "conv3", {"y": WIDE, "residual": WIDE}, {"z": WIDE, "bits": MASK}),
        ("bn_bwd_reduce", "conv3", {"dz": WIDE, "y": WIDE, "bits": MASK}, {}),
        ("bn_bwd_apply", "conv3", {"dz": WIDE, "y": WIDE, "bits": MASK}, {"dy": WIDE}),
        ("dgrad", "conv3", {"w": W1, "dy": WIDE, "y_in": N}, {"g_in": N}),
        ("wgrad", "conv3", {"y_in": N, "dy": WIDE}, {"dw": W1}),
        ("bn_bwd_apply", "conv2", {"dz": N, "y": N}, {"dy": N}),
        ("dgrad", "conv2", {"w": W3, "dy": N, "y_in": N}, {"g_in": N}),
        ("wgrad", "conv2", {"y_in": N, "dy": N}, {"dw": W3}),
        ("bn_bwd_apply", "conv1", {"dz": N, "y": N}, {"dy": N}),
        ("dgrad", "conv1", {"w": W1, "dy": N, **ends}, {"g_in": WIDE}),
        ("wgrad", "conv1", {"x": WIDE, "dy": N}, {"dw": W1}),
    ]


def test_bottleneck_rungs_c2_and_d_by_hand():
    net = pair(Bottleneck, 16, 64)
    ends = {"dres": WIDE, "dres bits": MASK, "y_end": WIDE, "bits": MASK, "y_short": WIDE}
    last = {"dz": WIDE, "y": WIDE, "bits": MASK}
    g = {"g": WIDE, "y": WIDE, "g bits": MASK}
    c2, d = (kernels_of(net, rung, "1.") for rung in ("c2", "d"))
    assert c2[4:] == [
        ("bn_bwd_reduce", "conv3", last, {}),
        ("dgrad", "conv3", {"w": W1, **g, "y_in": N}, {"g_in": N}),
        ("wgrad", "conv3", {"y_in": N, **g}, {"dw": W1}),
        ("dgrad", "conv2", {"w": W3, "g": N, "y": N, "y_in": N}, {"g_in": N}),
        ("wgrad", "conv2", {"y_in": N, "g": N, "y": N}, {"dw": W3}),
        ("dgrad", "conv1", {"w": W1, "g": N, "y": N, **ends}, {"g_in": WIDE}),
        ("wgrad", "conv1", {"x": WIDE, "g": N, "y": N}, {"dw": W1}),
    ]
    side = {"y": N, "side z": WIDE, "side bits": MASK}
    assert d == [
        ("fprop", "conv1", {"w": W1, "y_in": WIDE, "shortcut": WIDE}, side),
        *c2[1:5],
        (
            "dgrad_wgrad",
            "conv3",
            {"w": W1, **g, "y_in": N},
            {"g_in": N, "dw": W1},
        ),
        *c2[7:9],
        (
            "dgrad_wgrad",
            "conv1",
            {"w": W1, "g": N, "y": N, **ends, "x": WIDE},
            {"g_in": WIDE, "dw": W1},
        ),
    ]
    # the first block leaves its end to the second
    assert "bn_apply" in [k[0] for k in kernels_of(net, "c2", "0.")]
    assert "bn_apply" not in [k[0] for k in kernels_of(net, "d", "0.")]


# BasicBlock 16 -> 16 with a projection of stride 2, 16 x 16 to 8 x 8: x is 2 * 16 * 256 * 2 = 16384
# bytes, everything behind 4096, its mask 2 * 64 * 16 / 8 = 256; weights 16 * 16 * 9 * 2 = 4608 and
# 16 * 16 * 2 = 512. A leading conv, so that x needs a gradient.
X, HALF, BITS, WS = 16384, 4096, 256, 512


def test_basic_block_with_projection_by_hand():
    net = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), pair(BasicBlock, 16, 16)[0])
    assert kernels_of(net, "b", "1.") == [
        ("fprop", "conv1", {"w": W3, "x": X}, {"y": HALF}),
        ("bn_stats", "conv1", {"y": HALF}, {}),
        ("bn_apply", "conv1", {"y": HALF}, {"z": HALF}),
        ("fprop", "conv2", {"w": W3, "x": HALF}, {"y": HALF}),
        ("bn_stats", "conv2", {"y": HALF}, {}),
        ("fprop", "downsample.0", {"w": WS, "x": X // 4}, {"y": HALF}),  # reads a quarter
        ("bn_stats", "downsample.0", {"y": HALF}, {}),
        ("bn_apply", "conv2", {"y": HALF, "residual": HALF}, {"z": HALF, "bits": BITS}),
        ("bn_bwd_reduce", "conv2", {"dz": HALF, "y": HALF, "y_short": HALF, "bits": BITS}, {}),
        (
            "bn_bwd_apply",
            "conv2",
            {"dz": HALF, "y": HALF, "y_short": HALF, "bits": BITS},
            {"dy": HALF, "dy_short": HALF},
        ),
        ("bn_apply", "conv1", {"y": HALF}, {"z": HALF}),
        ("dgrad", "conv2", {"w": W3, "dy": HALF}, {"dx": HALF}),
        ("wgrad", "conv2", {"x": HALF, "dy": HALF}, {"dw": W3}),
        ("bn_bwd_reduce", "conv1", {"dz": HALF, "y": HALF}, {}),
        ("bn_bwd_apply", "conv1", {"dz": HALF, "y": HALF}, {"dy": HALF}),
        ("dgrad", "conv1", {"w": W3, "dy": HALF}, {"dx": X}),
        ("wgrad", "conv1", {"x": X, "dy": HALF}, {"dw": W3}),
        ("dgrad", "downsample.0", {"w": WS, "dy": HALF}, {"dx": X}),
        ("wgrad", "downsample.0", {"x": X // 4, "dy": HALF}, {"dw": WS}),
        ("grad_add", "conv1", {"dx": X, "dx2": X}, {"dx": X}),
    ]
    assert kernels_of(net, "folded", "1.", training=False) == [
        ("fprop", "conv1", {"w": W3, "x": X}, {"z": HALF}),
        ("fprop", "downsample.0", {"w": WS, "x": X // 4}, {"z": HALF}),
        ("fprop", "conv2", {"w": W3, "x": HALF, "residual": HALF}, {"z": HALF}),
    ]


def test_basic_block_eager_by_hand():
    net = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), BasicBlock(16, 16))
    found = kernels_of(net, "a", "1", shape=(2, 16, 8, 8))
    total = [(op, sum(reads.values()), sum(writes.values())) for op, _, reads, writes in found]
    conv, norm = [("fprop", N + W3, N)], [("bn_stats", N, 0), ("bn_apply", N, N)]
    back = [("dgrad", N + W3, N), ("wgrad", 2 * N, W3)]
    norm_back = [("bn_bwd_reduce", 2 * N, 0), ("bn_bwd_apply", 2 * N, N)]
    assert total == [
        *conv, *norm, ("relu", N, N), *conv, *norm, ("add", 2 * N, N), ("relu", N, N),
        ("relu_backward", 2 * N, N), *norm_back, *back,
        ("relu_backward", 2 * N, N), *norm_back, *back,
    ]  # fmt: skip
    grads = [k for k in roofline.model(net, (2, 16, 8, 8), rung="a").kernels if k.op == "grad_add"]
    assert [(k.path, k.read_bytes, k.write_bytes) for k in grads] == [("0", 2 * N, N)]


def test_odd_channels_round_the_mask_up_and_groups_divide_the_weights():
    assert roofline.bn_apply((2, 35, 7, 7), "fp32", mask=True).writes == {
        "z": 2 * 35 * 49 * 4, "bits": 2 * 49 * 5,
    }  # fmt: skip
    shape = roofline.ConvShape(2, 32, 7, 7, 64, 3, 3, padding=(1, 1), groups=4)
    moved = roofline.fprop(shape, "fp16")
    assert moved.reads == {"w": 64 * 8 * 9 * 2, "x": 2 * 32 * 49 * 2}
    assert moved.writes == {"y": 2 * 64 * 49 * 2} and moved.flops == 2 * 2 * 64 * 49 * 8 * 9


@pytest.mark.parametrize(
    "dtype, width, joint",
    [
        ("fp32", 32, ["1.conv1", "1.conv3"]),  # 128 to 32 channels, and back
        ("fp32", 35, []),
        ("bf16", 36, ["1.conv1"]),  # 144 to 36; 36 to 144 are too many for odd ones
        ("bf16", 40, ["1.conv1", "1.conv3"]),
    ],
)
def test_odd_channels_join_the_backward_as_on_sm_90(dtype, width, joint):
    c = 4 * width
    net = nn.Sequential(nn.Conv2d(c, c, 1, bias=False), Bottleneck(c, width))
    kernels = roofline.model(net, (2, c, 8, 8), dtype, "d").kernels
    assert sorted(k.path for k in kernels if k.op == "dgrad_wgrad") == joint


def test_strided_convs_read_the_pixels_they_touch():
    even = roofline.ConvShape(1, 1, 8, 8, 1, 1, 1, (2, 2))
    odd = roofline.ConvShape(1, 1, 7, 9, 1, 1, 1, (2, 2))
    three = roofline.ConvShape(1, 1, 8, 8, 1, 3, 3, (2, 2), (1, 1))
    gaps = roofline.ConvShape(1, 1, 9, 9, 1, 2, 2, (4, 4))  # of each 4 rows the first 2
    read = [shape.x_read[2:] for shape in (even, odd, three, gaps)]
    assert read == [(4, 4), (4, 5), (8, 8), (4, 4)]
    with pytest.raises(ValueError, match="writes all of its input"):
        roofline.fprop(even, "bf16", "norm_add_relu")
    with pytest.raises(ValueError, match="1x1 convs of stride 1, got 1x1 stride"):
        roofline.dgrad_wgrad(even, "bf16")


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_rung_b_calls_what_the_op_calls(block, monkeypatch):
    """The functions of docs/kernels.md in the order residual_block calls them, and every
    activation or mask that is passed to them: counted from a real step on the CPU."""
    from fastres import backends

    calls: list[tuple[str, int]] = []
    real = backends.select(torch.zeros(1, 1, 1, 1))

    class Spy:
        def __getattr__(self, name):
            def call(*args):
                fn = getattr(real, name)
                tensors = [t for t in args if isinstance(t, torch.Tensor)]
                moved = [t for t in tensors if t.dim() == 4 or t.dtype == torch.uint8]
                calls.append((name, sum(t.numel() * t.element_size() for t in moved)))
                return fn(*args)

            return call

    net = fastres.convert(
        nn.Sequential(nn.Conv2d(16, 16, 1), pair(block, 16, 16 * block.expansion))
    )
    x = torch.randn(2, 16, 16, 16).contiguous(memory_format=torch.channels_last)
    monkeypatch.setattr(backends, "select", lambda like: Spy())
    net(x).sum().backward()
    ours = ("bn_stats", "bn_apply", "bn_bwd_reduce", "bn_bwd_apply", "relu_bwd")
    found = roofline.model(net, x, "fp32", "b").kernels
    expected = [(k.op, k.bytes) for k in found if k.op in ours]
    # written over their input, a tensor passed twice: bn_bwd_apply of the inner norms, relu_bwd
    assert [name for name, _ in calls] == [name for name, _ in expected]
    assert calls == expected


# ---------------------------------------------------------------- FLOPs


def counted(net: nn.Module, shape: tuple[int, ...], training: bool) -> int:
    """FLOPs by torch's own counter."""
    twin = meta_copy(net, "bf16").train(training)
    with FlopCounterMode(display=False) as counter:
        out = twin(torch.empty(shape, dtype=torch.bfloat16, device="meta"))
        if training:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "name", ["resnet18", "resnet50", "wide_resnet50_2", "vgg11_bn", "densenet121", "vit_b_16"]
)
def test_flops_are_those_of_torchs_counter(name):
    net, shape = resnet(name), (2, 3, 224, 224)
    for training in (True, False):
        expected = counted(net, shape, training)
        for found in roofline.ladder(net, shape, training=training):
            assert found.flops == expected, found.rung


def test_flops_of_grouped_convs():
    """torch's counter takes a grouped wgrad for `groups` times its FLOPs, so: by definition, fprop
    and twice that again, less the first conv's dgrad."""
    net, shape = resnet("resnext50_32x4d"), (2, 3, 64, 64)
    forward = counted(net, shape, training=False)
    assert roofline.model(net, shape, training=False).flops == forward
    stem = 2 * 2 * 64 * 32 * 32 * 3 * 49
    assert roofline.model(net, shape, rung="d").flops == 3 * forward - stem


# ---------------------------------------------------------------- what must hold for any model


@pytest.mark.parametrize(
    "name, size", [("resnet34", 224), ("resnext50_32x4d", 97), ("wide_resnet101_2", 128)]
)
def test_each_rung_moves_less_and_is_faster(name, size):
    net = resnet(name)
    for dtype, batch, training in itertools.product(("bf16", "fp32"), (1, 32), (True, False)):
        found = roofline.ladder(net, (batch, 3, size, size), dtype, training)
        for below, above in itertools.pairwise(found):
            # d's fusions are of 1x1 convs: basic blocks have none
            same = name == "resnet34" and above.rung == "d"
            assert above.flops == below.flops
            assert (above.bytes == below.bytes) if same else (above.bytes < below.bytes)
            assert same or above.ceiling() > below.ceiling()


def test_it_describes_what_convert_does():
    """Fusing is read off convert's matchers: a block that convert leaves stays eager, and a
    converted model counts as the original one. Neither is changed."""
    net = resnet("resnet18")
    shape = (4, 3, 64, 64)
    plain = roofline.model(net, shape, rung="b")
    events = fastres.report(net).counters
    fastres.convert(net)
    state = {k: v.clone() for k, v in net.state_dict().items()}
    assert roofline.model(net, shape, rung="b").kernels == plain.kernels
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert fastres.report(net).counters == events and fastres.report(net).fused == 9
    net.layer2[0].relu = nn.SiLU()  # not fused any more
    found = roofline.model(net, shape, rung="b")
    left = {row.path for row in fastres.report(net).left}
    eager = {k.path.rpartition(".")[0] for k in found.kernels if k.op == "silu"}
    assert left == eager == {"layer2.0"}
    assert found.bytes > plain.bytes
    assert roofline.model(net, shape, rung="a").flops == plain.flops


def test_fastres_modules_are_fused_by_their_own_spec():
    blocks = nn.Sequential(
        fastres.nn.ConvBNReLU(3, 16, 3, padding=1), fastres.nn.FastBasicBlock(16, 16)
    )
    twin = nn.Sequential(nn.Identity(), BasicBlock(16, 16))
    shape = (2, 3, 8, 8)
    before = fastres.report(blocks).counters
    assert [k[0] for k in kernels_of(blocks, "c2", "0", shape=shape)] == [
        "fprop", "bn_apply", "bn_bwd_reduce", "wgrad",
    ]  # fmt: skip
    ours = kernels_of(blocks, "b", "1.", shape=shape)
    theirs = kernels_of(twin, "b", "1.", shape=(2, 16, 8, 8))
    assert [k for k in ours if k[1] != "conv1"][:6] == [k for k in theirs if k[1] != "conv1"][:6]
    assert fastres.report(blocks).counters == before


def test_frozen_parameters_have_no_gradient_kernels():
    net = resnet("resnet18")
    for p in net.parameters():
        p.requires_grad_(False)
    net.fc.weight.requires_grad_(True)
    for rung in roofline.TRAINING_RUNGS:
        found = roofline.model(net, (2, 3, 64, 64), rung=rung)
        backward = [(k.op, k.path) for k in found.kernels if k.phase == "backward"]
        assert backward == [("addmm_backward", "fc"), ("cast_weights", "")], rung
        (step,) = [k for k in found.kernels if k.phase == "optimiser"]
        assert step.bytes == 5 * 4 * 512 * 1000


def test_an_output_that_others_read_keeps_its_own_passes():
    class Features(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = pair(BasicBlock, 16, 16)

        def forward(self, x):
            first = self.blocks[0](x)
            return self.blocks[1](first).mean() + first.mean()

    assert "bn_apply" in [k[0] for k in kernels_of(Features(), "d", "blocks.0.")]
    found = roofline.model(Features(), (2, 16, 16, 16), rung="d").kernels
    assert sum(k.op == "grad_add" for k in found) == 1


def test_model_is_not_run_and_data_is_not_copied():
    class Spy(nn.Module):
        def forward(self, x):
            assert x.device.type == "meta"
            return x

    net = nn.Sequential(Spy(), nn.Conv2d(3, 8, 1))
    called = []
    net.register_forward_hook(lambda *_: called.append(1))
    found = roofline.model(net, torch.randn(2, 3, 8, 8), "fp32", "a", training=False)
    assert found.bytes == 4 * (2 * 3 * 64 + 3 * 8 + 2 * 8 * 64) and called == []


# ---------------------------------------------------------------- ceilings


def test_seconds_are_the_sum_of_each_kernels_worst():
    moved = (
        roofline.Kernel("x", "forward", "", (roofline.Access("x", 100, "row"),), (), flops=10),
        roofline.Kernel("y", "forward", "", (), (roofline.Access("y", 30, "row"),), flops=600),
    )
    found = roofline.Roofline("m", "a", "bf16", (4, 1, 1, 1), True, moved)
    assert found.seconds(10.0, 100.0) == 10.0 + 6.0
    assert found.ceiling(10.0, 100.0) == 4 / 16
    for bandwidth, rate in ((0.0, 1.0), (1.0, -1.0), (float("inf"), 1.0), (1.0, float("nan"))):
        with pytest.raises(ValueError, match="must be positive and finite"):
            found.seconds(bandwidth, rate)


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "change, words",
    [
        ({"rung": "e"}, "unknown rung 'e' for training; accepted: a, b, c1, c2, d"),
        ({"rung": "d", "training": False}, "for inference; accepted: a, b, folded"),
        ({"dtype": "fp8"}, "unknown dtype 'fp8'; accepted: fp32, bf16, fp16"),
        ({"sample": (0, 3, 64, 64)}, r"at least 1, got \(0, 3, 64, 64\)"),
        ({"sample": (3, 64, 64)}, r"a shape \(N, C, H, W\)"),
        ({"sample": (1.5, 3, 64, 64)}, "whole numbers"),
        ({"sample": (2, 4, 64, 64)}, "ResNet does not run on an input of shape .2, 4, 64, 64."),
    ],
)
def test_bad_input_is_named(change, words):
    arguments = {"sample": (2, 3, 64, 64), **change}
    with pytest.raises(ValueError, match=words):
        roofline.model(resnet("resnet18"), **arguments)


def test_other_bad_input():
    with pytest.raises(TypeError, match="net must be a torch.nn.Module, got str"):
        roofline.model("resnet18", (1, 3, 64, 64))
    shape = roofline.ConvShape(1, 1, 8, 8, 1, 1, 1)
    with pytest.raises(ValueError, match="unknown fprop prologue 'relu'; accepted: none, norm_re"):
        roofline.fprop(shape, "bf16", "relu")
    with pytest.raises(ValueError, match="unknown dgrad epilogue 'gate'"):
        roofline.dgrad(shape, "bf16", epilogue="gate")


def test_import_fastres_leaves_the_model_out():
    code = (
        "import sys, fastres; assert 'fastres.roofline' not in sys.modules;"
        "fastres.roofline.model; assert 'fastres.roofline' in sys.modules"
    )
    root = Path(fastres.__file__).resolve().parents[1]
    subprocess.run([sys.executable, "-c", code], check=True, cwd=root, timeout=120)
