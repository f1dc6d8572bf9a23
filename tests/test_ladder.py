"""Whole stages of blocks on every rung of the fusion ladder: outputs, gradients of every parameter
and of the input, running statistics.

Truth is plain torch in float64. On the reference backend in float64 a rung must agree with it to
rounding; on Triton its error may be twice that of eager PyTorch in the same dtype, plus a floor:
the largest error in fp32, the rms in bf16 and fp16, where a ReLU gate that rounds to the other side
moves single gradients."""

from __future__ import annotations

import dataclasses
import importlib
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from common import INTERPRETED, TOLERANCES, backend
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

import fastres
from fastres.ops import BatchNorm, Block, Conv, Unit, _ladder, _ladder_bwd, residual_stage
from fastres.ops._choice import RUNGS


@dataclass
class Layer:
    """One conv and batch norm: float64 values, and what kind they are."""

    weight: Tensor
    vectors: list[Tensor]  # gamma, beta, running mean, running variance
    stride: int
    padding: int
    dilation: int
    groups: int
    training: bool
    frozen: bool  # the weight needs no gradient


@dataclass
class Stage:
    """Blocks of layers, each with its projection or None, and their input."""

    blocks: list[tuple[list[Layer], Layer | None]]
    x: Tensor
    generator: torch.Generator = field(repr=False)

    def layers(self) -> list[Layer]:
        return [
            layer
            for main, projection in self.blocks
            for layer in [*main, *([] if projection is None else [projection])]
        ]


def make(
    kind: str, blocks: int = 2, width: int = 16, size: int = 9, stride: int = 2, groups: int = 1,
    dilation: int = 1, training: str = "all", frozen: bool = False, seed: int = 0,
) -> Stage:  # fmt: skip
    """training: "all", "none", or "mixed" batch norms on batch statistics."""
    g = torch.Generator().manual_seed(seed)
    count = 0

    def normal(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    def layer(c, k, r, s=1, grouped=1, dil=1):
        nonlocal count
        count += 1
        w = normal(k, c // grouped, r, r) * (2 / (c // grouped * r * r)) ** 0.5
        vectors = [1 + 0.3 * normal(k), 0.5 * normal(k), normal(k), 0.5 + normal(k).abs()]
        trains = {"all": True, "none": False, "mixed": count % 2 == 1}[training]
        return Layer(w, vectors, s, dil * (r // 2), dil, grouped, trains, frozen and count % 3 == 0)

    out, c = [], width
    for b in range(blocks):
        s = stride if b == 0 else 1
        if kind == "bottleneck":
            k = 4 * width
            main = [
                layer(c, width, 1), layer(width, width, 3, s, groups, dilation), layer(width, k, 1)
            ]  # fmt: skip
        else:
            k = width
            main = [layer(c, k, 3, s), layer(k, k, 3, 1, groups, dilation)]
        out.append((main, layer(c, k, 1, s) if c != k or s != 1 else None))
        c = k
    return Stage(out, normal(2, width, size, size), g)


Made = list[list[Tensor]]  # [weight, gamma, beta, running mean, running variance] of each layer


def leaves(stage: Stage, dtype: torch.dtype) -> Made:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    made = []
    for layer in stage.layers():
        w = layer.weight.to(dtype, copy=True).contiguous(memory_format=torch.channels_last)
        vectors = [v.to(wide, copy=True) for v in layer.vectors]
        w.requires_grad_(not layer.frozen)
        made.append([w, *(v.requires_grad_() for v in vectors[:2]), *vectors[2:]])
    return made


def plain(x: Tensor, stage: Stage, made: Made, fusion: str) -> Tensor:
    rest = iter(made)

    def unit(h, layer):
        w, gamma, beta, mean, var = next(rest)
        y = F.conv2d(h, w, None, layer.stride, layer.padding, layer.dilation, layer.groups)
        return F.batch_norm(y, mean, var, gamma, beta, layer.training, 0.1, 1e-5)

    for main, projection in stage.blocks:
        h = x
        for i, layer in enumerate(main):
            h = unit(h, layer)
            h = h.relu() if i < len(main) - 1 else h
        x = (h + (x if projection is None else unit(x, projection))).relu()
    return x


def fused(x: Tensor, stage: Stage, made: Made, fusion: str) -> Tensor:
    rest = iter(made)

    def unit(layer):
        w, *vectors = next(rest)
        pairs = [(v, v) for v in (layer.stride, layer.padding, layer.dilation)]
        return Unit(Conv(w, None, *pairs, layer.groups), BatchNorm(*vectors, layer.training))

    blocks = []
    for main, projection in stage.blocks:
        units = [unit(layer) for layer in main]
        blocks.append(Block(units, None if projection is None else unit(projection)))
    return residual_stage(x, blocks, fusion)


def step(
    run, stage: Stage, dtype, fusion="b", layout=torch.channels_last, values_of=None, need_x=True
) -> dict[str, Tensor]:
    """Every result of a forward and a backward, by name."""
    values_of = dtype if values_of is None else values_of
    rounded = Stage(stage.blocks, stage.x.to(values_of), stage.generator)
    made = leaves(rounded, values_of)
    if values_of != dtype:
        made = [[t.detach().to(dtype).requires_grad_(t.requires_grad) for t in row] for row in made]
    x = rounded.x.to(dtype, copy=True).contiguous(memory_format=layout).requires_grad_(need_x)
    before = x.detach().clone()
    z = run(x, stage, made, fusion)
    dz = torch.randn(z.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    z.backward(dz.to(values_of).to(dtype))
    assert torch.equal(x.detach(), before)
    out = {"z": z.detach()} | ({"x": x.grad} if need_x else {})
    for i, row in enumerate(made):
        for name, t in zip(("weight", "gamma", "beta"), row[:3], strict=True):
            if t.requires_grad:
                out[f"{i}.{name}"] = t.grad
            else:
                assert t.grad is None
        out |= {f"{i}.mean": row[3], f"{i}.var": row[4]}
    return out


def error(v: Tensor, want: Tensor, rms: bool) -> float:
    d = v.double() - want
    if rms:
        return float(d.pow(2).mean().sqrt() / want.pow(2).mean().sqrt())
    return float(d.abs().max() / want.abs().max())


GROUPS = 2 if INTERPRETED else 4  # a program each, one after the other
STAGES = {
    "bottleneck": lambda: make("bottleneck"),
    "bottleneck, one block": lambda: make("bottleneck", blocks=1),
    "bottleneck, identity first": lambda: make("bottleneck", width=8, stride=1),
    "bottleneck, large": lambda: make("bottleneck", size=23),
    "basic, large": lambda: make("basic", size=23),
    "bottleneck, C 35": lambda: make("bottleneck", width=35, size=7),
    "basic": lambda: make("basic"),
    "basic, three": lambda: make("basic", blocks=3, width=24, size=7, stride=1),
    "grouped": lambda: make("bottleneck", groups=GROUPS),
    "grouped, uneven": lambda: make("bottleneck", width=24, groups=2, blocks=1, size=7),
    "basic, grouped": lambda: make("basic", groups=GROUPS),
    "dilated": lambda: make("basic", dilation=2, stride=1),
    "frozen BN": lambda: make("bottleneck", training="none"),
    "some BN frozen": lambda: make("bottleneck", training="mixed", blocks=3),
    "some weights frozen": lambda: make("basic", frozen=True, blocks=3),
}


@pytest.mark.parametrize(
    "rung, layout", [*((rung, "nhwc") for rung in RUNGS), ("b", "nchw")], ids="-".join
)
@pytest.mark.parametrize("name", STAGES)
def test_every_rung_is_exact_in_float64(name, layout, rung):
    stage = STAGES[name]()
    fmt = torch.channels_last if layout == "nhwc" else torch.contiguous_format
    truth = step(plain, stage, torch.float64)
    with fastres.use_backend("reference"):
        got = step(fused, stage, torch.float64, rung, fmt)
    assert got.keys() == truth.keys()
    for key, want in truth.items():
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-11)


def test_a_backend_may_join_behind_batch_statistics_alone(monkeypatch):
    """Rung d asks for each conv whether the batch norm that it folds is a frozen one."""
    module = importlib.import_module("fastres._reference_backend")
    joint, why_not = module.conv_bwd_pointwise, module.conv_bwd_pointwise_why_not
    joined: list[bool] = []

    def recorded(*args):
        joined.append(args[7] is not None and not args[7].training)
        joint(*args)

    monkeypatch.setattr(module, "conv_bwd_pointwise", recorded)
    stage = STAGES["some BN frozen"]()
    truth = step(plain, stage, torch.float64)
    with fastres.use_backend("reference"):
        step(fused, stage, torch.float64, "d")
        every = joined[:]
        assert 0 < sum(every) < len(every)
        joined.clear()
        monkeypatch.setattr(
            module,
            "conv_bwd_pointwise_why_not",
            lambda *args: "a frozen batch norm" if args[-1] else why_not(*args),
        )
        got = step(fused, stage, torch.float64, "d")
    assert joined == [False] * every.count(False)
    for key, want in truth.items():
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rung", RUNGS)
def test_an_input_that_needs_no_gradient(rung):
    stage = STAGES["bottleneck"]()
    truth = step(plain, stage, torch.float64, need_x=False)
    with fastres.use_backend("reference"):
        got = step(fused, stage, torch.float64, rung, need_x=False)
    for key, want in truth.items():
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-11)


# bf16 and fp16 on larger maps, where the gates that flip are many enough to average out. c1, whose
# forms c2 has but for the backward's, on half of the stages where the interpreter runs them.
C1 = ("bottleneck", "bottleneck, large", "basic, large", "bottleneck, C 35", "grouped", "frozen BN")
TRITON = [
    pytest.param(name, rung, dtype, id=f"{name}-{rung}-{dtype}")
    for name in STAGES
    for rung in RUNGS
    for dtype in (("bf16", "fp16") if name.endswith("large") else ("fp32",))
    if rung != "c1" or name in C1 or not INTERPRETED
    if dtype != "fp16"  # each rung once
    or (rung in ("c2", "d")) == name.startswith("bottleneck")
    or not INTERPRETED
]


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("name, rung, dtype", TRITON)
def test_every_rung_on_triton(name, rung, dtype):
    backend("triton")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    stage = STAGES[name]()
    truth = step(plain, stage, torch.float64, values_of=dtype)
    eager = step(plain, stage, dtype)
    with fastres.use_backend("triton"):
        got = step(fused, stage, dtype, rung)
    assert got.keys() == truth.keys()
    for key, want in truth.items():
        rms = dtype != torch.float32
        ours, theirs = error(got[key], want, rms), error(eager[key], want, rms)
        assert ours <= 2 * theirs + 4 * TOLERANCES[dtype], f"{key}: {ours:.1e}, eager {theirs:.1e}"


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize("rung", ("b", "d") if INTERPRETED else RUNGS)
def test_two_runs_agree_bit_for_bit(rung):
    backend("triton")
    stage = STAGES["bottleneck"]()
    with fastres.use_backend("triton"):
        first, second = (step(fused, stage, torch.bfloat16, rung) for _ in range(2))
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("training", ["all", "none", "mixed"])
@pytest.mark.parametrize("kind, groups", [("bottleneck", 1), ("bottleneck", 4), ("basic", 1)])
def test_without_a_backward(kind, groups, training, rung):
    """no_grad: nothing is saved, tensors are written over, inference folds into the convs."""
    stage = make(kind, training=training, groups=groups)
    made, want_made = leaves(stage, torch.float64), leaves(stage, torch.float64)
    x = stage.x.contiguous(memory_format=torch.channels_last)
    before = x.clone()
    with torch.no_grad(), fastres.use_backend("reference"):
        z = fused(x, stage, made, rung)
        want = plain(x, stage, want_made, rung)
    torch.testing.assert_close(z, want, rtol=1e-9, atol=1e-11)
    assert torch.equal(x, before)
    for row, want_row in zip(made, want_made, strict=True):
        torch.testing.assert_close(row[3:], want_row[3:], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rung", RUNGS)
@pytest.mark.parametrize("name", ["grouped", "bottleneck, all grouped"])
def test_a_vendor_that_answers_in_nchw(name, rung, monkeypatch):
    """Some vendor kernels give NCHW for an NHWC input; the fused convs take NHWC alone."""
    conv_fwd, conv_bwd = _ladder.conv_fwd, _ladder_bwd.conv_bwd

    def nchw_bwd(*args):
        dx, dw = conv_bwd(*args)
        return None if dx is None else dx.contiguous(), dw

    def no_groups(backend, x, weight, geometry):
        return f"groups={geometry[-1]}" if geometry[-1] > 1 else None

    monkeypatch.setattr(_ladder, "vendor_reason", no_groups)
    monkeypatch.setattr(_ladder, "conv_fwd", lambda *args: conv_fwd(*args).contiguous())
    monkeypatch.setattr(_ladder_bwd, "conv_bwd", nchw_bwd)
    stage = make("bottleneck", groups=4, blocks=2, stride=1 if "all" in name else 2)
    if "all" in name:  # the last conv of each block on the vendor's, too
        for main, _ in stage.blocks:
            main[-1] = dataclasses.replace(main[-1], weight=main[-1].weight[:, :8], groups=2)
    truth = step(plain, stage, torch.float64)
    with fastres.use_backend("reference"):
        got = step(fused, stage, torch.float64, rung)
    for key, want in truth.items():
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("rung", ["c2", "d"])
def test_saves_no_normalised_copy(rung):
    """What a stage keeps: its input, blocks' outputs, raw conv outputs, statistics, bits."""
    stage = make("bottleneck", blocks=3)
    made = leaves(stage, torch.float64)
    x = stage.x.contiguous(memory_format=torch.channels_last).requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        fastres.use_backend("reference"),
    ):
        fused(x, stage, made, rung)
    n, width, pixels = 2, 16, 25
    block = n * (width * pixels + 4 * width * pixels)  # y2, y3; y1 differs with the stride
    ys = 3 * block + n * width * (81 + 2 * pixels) + n * 4 * width * pixels  # + the projection's
    zs = 2 * n * 4 * width * pixels
    elements = x.numel() + ys + zs
    vectors = sum(t.numel() for row in made for t in row[:3]) + sum(3 * r[1].numel() for r in made)
    bits = 3 * n * pixels * 4 * width // 8
    assert sum(kept.values()) == 8 * (elements + vectors) + bits


class Alive:
    """Watches the storages that a stage saves, by block: the bytes still there."""

    def __init__(self, monkeypatch) -> None:
        self.blocks: list[list[tuple[StorageWeakRef, int]]] = []
        self.seen: list[list[int]] = []
        module = importlib.import_module("fastres.ops.residual_stage")
        forward, block = module.forward, _ladder_bwd.Backward.block

        def watched(x, *args):
            out = forward(x, *args)
            stage = args[5]
            z, zs, masks, ys, _ = out
            for b, first in enumerate(stage.first_units()):
                count = stage.main[b] + stage.projection[b]
                tensors = [*ys[first : first + count], masks[b], *([zs[b - 1]] if b else [])]
                storages = [t.untyped_storage() for t in tensors]
                self.blocks.append([(StorageWeakRef(s), s.nbytes()) for s in storages])
            return out

        def counted(run, *args):
            self.seen.append(self.bytes())
            return block(run, *args)

        monkeypatch.setattr(module, "forward", watched)
        monkeypatch.setattr(_ladder_bwd.Backward, "block", counted)

    def bytes(self) -> list[int]:
        return [sum(n for ref, n in refs if not ref.expired()) for refs in self.blocks]


@pytest.mark.parametrize("rung", RUNGS)
def test_the_backward_frees_each_block_when_it_is_done(rung, monkeypatch):
    """While a block is at work nothing of the blocks behind it is left, and nothing at the end."""
    stage = make("bottleneck", blocks=4)
    truth = step(plain, stage, torch.float64)
    alive = Alive(monkeypatch)
    with fastres.use_backend("reference"):
        got = step(fused, stage, torch.float64, rung)
    for key, want in truth.items():
        torch.testing.assert_close(got[key], want, rtol=1e-9, atol=1e-11)
    first, *later = alive.seen
    assert len(first) == 4 and all(first)
    for done, now in enumerate(later, start=1):
        assert now == first[:-done] + [0] * done
    assert alive.bytes() == [0] * 4


def test_retain_graph_keeps_what_a_second_backward_needs(monkeypatch):
    stage = make("bottleneck", blocks=3)
    made = leaves(stage, torch.float64)
    x = stage.x.contiguous(memory_format=torch.channels_last).requires_grad_()
    alive = Alive(monkeypatch)
    with fastres.use_backend("reference"):
        z = fused(x, stage, made, "d")
        z.sum().backward(retain_graph=True)
        assert all(alive.bytes()) and alive.seen[0] == alive.seen[-1]
        once = [t.grad.clone() for t in (x, *(row[0] for row in made))]
        z.sum().backward()
        assert not any(alive.bytes())
        twice = [t.grad for t in (x, *(row[0] for row in made))]
        for a, b in zip(twice, once, strict=True):
            torch.testing.assert_close(a, 2 * b)
        with pytest.raises(RuntimeError, match="backward through the graph a second time|freed"):
            z.sum().backward()


def test_rungs_go_through_the_registered_op():
    """opcheck: schema, fake implementation, autograd registration, on the deepest rung."""
    stage = make("bottleneck", width=4, size=5)
    layers = stage.layers()
    made = leaves(stage, torch.float64)
    columns = [[row[i] for row in made] for i in range(5)]
    geometry = [
        v for a in layers for v in [*[a.stride] * 2, *[a.padding] * 2, *[a.dilation] * 2, a.groups]
    ]
    args = (
        stage.x.contiguous(memory_format=torch.channels_last).requires_grad_(), *columns, [3, 3],
        [True, False], geometry, [True] * 7, [1e-5] * 7, "d", True,
    )  # fmt: skip
    with fastres.use_backend("reference"):
        result = torch.library.opcheck(torch.ops.fastres.residual_stage.default, args)
    assert set(result.values()) == {"SUCCESS"}


@pytest.mark.parametrize("rung", list(RUNGS)[1:])
@pytest.mark.parametrize("view", ["NCHW", "not dense"])
def test_a_rung_on_another_layout_is_an_error(rung, view):
    """Never the vendor's convs without a word."""
    stage = make("basic", blocks=1)
    made = leaves(stage, torch.float64)
    x = (
        stage.x.contiguous(memory_format=torch.channels_last)[:, :, 1:]
        if "not" in view
        else stage.x
    )
    with fastres.use_backend("reference"):
        with pytest.raises(
            fastres.BackendError, match=r"x\.to\(memory_format=torch\.channels_last"
        ):
            fused(x, stage, made, rung)
        fused(x, stage, made, "b")
        z = fused(x.contiguous(memory_format=torch.channels_last), stage, made, rung)
    torch.testing.assert_close(z, plain(x, stage, leaves(stage, torch.float64), rung))


def test_a_weight_that_is_copied_to_channels_last_is_counted():
    stage = make("basic", blocks=1, stride=1)
    made = leaves(stage, torch.float64)
    truth = step(plain, stage, torch.float64)
    with fastres.use_backend("reference"):
        x = stage.x.contiguous(memory_format=torch.channels_last)
        fastres.counters.reset()
        fused(x, stage, made, "c2")
        assert not fastres.counters.events()
        for row in made:
            row[0] = row[0].detach().contiguous().requires_grad_()
        z = fused(x, stage, made, "c2")
        ((event, count),) = fastres.counters.events().items()
        assert "weight of a fused conv" in event and "NHWC" in event and count == 2
        z.sum().backward()
    assert all(row[0].grad.is_contiguous() for row in made)
    torch.testing.assert_close(z, truth["z"])


def test_an_unknown_rung_is_named():
    stage = make("basic", blocks=1)
    with pytest.raises(ValueError, match=r"unknown fusion 'e'; known: b, c1, c2, d"):
        fused(stage.x.float(), stage, leaves(stage, torch.float32), "e")


def test_a_rung_that_the_backend_cannot_run_is_an_error():
    stage = make("basic", blocks=1)
    with (
        fastres.use_backend("cpu"),
        pytest.raises(fastres.BackendError, match=r'fusion="c1" needs .* the cpu backend does not'),
    ):
        fused(stage.x.float(), stage, leaves(stage, torch.float32), "c1")
