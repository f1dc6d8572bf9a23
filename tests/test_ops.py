"""Every public op x dtype x layout x mode x backend against float64, and the promises of a torch
op."""

from __future__ import annotations

import copy

import common
import cuda_host
import pytest
import torch
from cases import LAYOUTS, MODES, OPS, Case, make

import fastres
from fastres import backends, ops
from fastres.convert.verify import Difference, difference
from fastres.ops import BatchNorm, Conv, Unit

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The interpreter runs a program at a time: one small odd shape; the C++ kernels also see vector
# widths and tails. A value within rounding of 0 may pass one ReLU and not the other (both are
# right): up to ATTEMPTS seeds, one must pass.
ATTEMPTS = 3
SHAPES = {"cpu": [(2, 35, 7, 9), (3, 64, 8, 8)], "triton": [(2, 12, 5, 7)], "cuda": [(2, 16, 5, 7)]}


def run(call, case: Case, dtype, layout, mode: str, values_of=None):
    """Output, input gradients and running statistics of one call."""
    p, b = case.copy(dtype, LAYOUTS[layout], values_of)
    g = torch.Generator().manual_seed(7)
    training = mode == "train"
    with torch.set_grad_enabled(mode != "nograd"):
        z = call(p, b, training)
    found = {"z": z.detach()}
    if mode != "nograd":
        dz = torch.randn(z.shape, generator=g, dtype=torch.float64)
        dz = dz.to(values_of or dtype).to(dtype)
        z.backward(dz.contiguous(memory_format=LAYOUTS[layout]))
        found |= {f"d{k}": t.grad for k, t in p.items()}
    return found | b


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_op_matches_float64(backend: str, op: str, dtype: str, layout: str, mode: str) -> None:
    if backend == "triton" and dtype == "fp16" and layout == "nchw":
        pytest.skip("thinned: the interpreter covers fp16 in NHWC and NCHW in fp32 and bf16")
    reason = backends.unavailable(backend)
    if reason is not None:
        pytest.skip(reason)
    check(backend, op, dtype, layout, mode)


if cuda_host.wanted():

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype, layout", [("bf16", "nhwc"), ("fp32", "nchw")])
    @pytest.mark.parametrize("op", OPS)
    def test_op_matches_float64_on_cuda_kernels(op: str, dtype: str, layout: str, mode: str):
        """The ops take the CUDA C++ backend as it is. Thin: the kernels have their own tests."""
        common.backend("cuda")
        before = cuda_host.module().launches()
        check("cuda", op, dtype, layout, mode)
        assert cuda_host.module().launches() > before


def check(backend: str, op: str, dtype: str, layout: str, mode: str) -> None:
    for shape in SHAPES[backend]:
        for seed in range(ATTEMPTS):
            wrong = compare(op, shape, seed, backend, DTYPES[dtype], layout, mode)
            if not wrong:
                break
        assert not wrong, f"{op} {shape}: {wrong[0]}"


def compare(op, shape, seed, backend, dtype, layout, mode) -> list[Difference]:
    """The tensors that are off by more than 2x eager's own error plus the floor."""
    case = make(op, shape, seed)
    truth = run(case.plain, case, torch.float64, layout, mode, dtype)
    theirs = run(case.plain, case, dtype, layout, mode)
    with fastres.use_backend(backend):
        ours = run(case.fused, case, dtype, layout, mode)
    assert ours.keys() == truth.keys()
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert ours["z"].is_contiguous(memory_format=LAYOUTS[layout])
    diffs = [difference(name, ours[name], theirs[name], truth[name]) for name in truth]
    return [d for d in diffs if not d.ok]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("op", OPS)
def test_gradcheck(op: str, training: bool) -> None:
    case = make(op, (2, 3, 5, 4), seed=3)
    p, b = case.copy(torch.float64, torch.channels_last)
    names = list(p)

    def call(*leaves):
        fresh = {k: v.clone() for k, v in b.items()}
        return case.fused(dict(zip(names, leaves, strict=True)), fresh, training)

    assert torch.autograd.gradcheck(call, list(p.values()))


def _unit(k: int, c: int, r: int, g: torch.Generator) -> Unit:
    def vec() -> torch.Tensor:
        return torch.rand(k, generator=g).add_(0.5)

    w = torch.randn(k, c, r, r, generator=g).requires_grad_()
    bn = BatchNorm(vec().requires_grad_(), vec().requires_grad_(), vec(), vec(), True)
    return Unit(Conv(w, None, (1, 1), (r // 2, r // 2)), bn)


def test_opcheck() -> None:
    """Schema, fake, autograd registration and AOT dispatch of each registered op."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, 6, generator=g).to(memory_format=torch.channels_last).requires_grad_()
    r = torch.randn(2, 8, 6, 6, generator=g).to(memory_format=torch.channels_last).requires_grad_()
    u, v = _unit(8, 8, 3, g), _unit(8, 8, 1, g)
    bn, rbn = u.bn, v.bn
    o = torch.ops.fastres
    vectors = (bn.weight, bn.bias, bn.running_mean, bn.running_var)
    res = (rbn.weight, rbn.bias, rbn.running_mean, rbn.running_var)
    none = (None, None, None, None)
    columns = [list(c) for c in zip(vectors, res, strict=True)]
    geometry = u.conv.geometry() + v.conv.geometry()
    calls = {
        o.add_relu: (x, r, True),
        o.bn_act: (x, *vectors, True, 1e-5, r, *res, False, 1e-5, True, True),
        o.bn_relu_maxpool: (x, *vectors, True, 1e-5, 3, 2, 1),
        o.conv_bn_act: (
            x, u.conv.weight, None, u.conv.geometry(), *vectors, True, 1e-5, r, *none, False, 0.0,
            True, True, "b",
        ),
        o.conv_bn_relu_maxpool: (
            x, u.conv.weight, None, u.conv.geometry(), *vectors, True, 1e-5, 3, 2, 1, "b",
        ),
        o.residual_stage: (
            x, [u.conv.weight, v.conv.weight], *columns, [1, 1], [False, False], geometry,
            [True, False], [1e-5] * 2, "b", True,
        ),
        o.update_running_stats: (
            [bn.running_mean], [bn.running_var], [torch.rand(3, 8, generator=g)], [0.1], [72],
        ),
    }  # fmt: skip
    for op, args in calls.items():
        result = torch.library.opcheck(op.default, args)
        assert set(result.values()) == {"SUCCESS"}, (op, result)


@pytest.mark.parametrize("op", OPS)
def test_same_bits_twice(op: str) -> None:
    case = make(op, (3, 24, 9, 7))
    first = run(case.fused, case, torch.float32, "nhwc", "train")
    again = run(case.fused, case, torch.float32, "nhwc", "train")
    for name, value in first.items():
        assert torch.equal(value, again[name]), name
    if "conv" in op or "block" in op:
        return  # the vendor's convolutions may split their sums by thread count
    threads = torch.get_num_threads()
    torch.set_num_threads(1 if threads > 1 else 2)
    try:
        other = run(case.fused, case, torch.float32, "nhwc", "train")
    finally:
        torch.set_num_threads(threads)
    for name, value in first.items():
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_not_mutated(op: str) -> None:
    case = make(op, (2, 16, 6, 6))
    p, b = case.copy(torch.float32, torch.channels_last)
    before = {k: v.detach().clone() for k, v in p.items()}
    z = case.fused(p, b, True)
    dz = torch.ones_like(z)
    z.backward(dz)
    assert torch.equal(dz, torch.ones_like(z))
    for name, value in before.items():
        assert torch.equal(p[name].detach(), value), name


@pytest.mark.parametrize("op", [o for o in OPS if o != "conv_bn"])
def test_nan_and_inf_propagate_as_in_torch(op: str) -> None:
    case = make(op, (2, 16, 6, 6))
    for value in (float("nan"), float("inf"), -float("inf")):
        outs = []
        for call in (case.fused, case.plain):
            p, b = case.copy(torch.float32, torch.channels_last)
            with torch.no_grad():
                p["x"][1, 3, 2, 4] = value
                outs.append(call(p, b, False))
        assert torch.equal(outs[0].isnan(), outs[1].isnan()), value
        assert torch.equal(outs[0].isinf(), outs[1].isinf()), value


def test_large_mean_small_std() -> None:
    g = torch.Generator().manual_seed(0)
    x = (1e4 + torch.randn(8, 16, 14, 14, generator=g)).to(memory_format=torch.channels_last)
    z = ops.bn_relu(x, BatchNorm(None, None, training=True), relu=False)
    exact = x.double()
    exact = (exact - exact.mean((0, 2, 3), keepdim=True)) / exact.std(
        (0, 2, 3), correction=0, keepdim=True
    )
    assert (z - exact).abs().max() < 2e-3  # 1e4 in fp32 has steps of 1e-3


def test_running_statistics_match_torch_bit_by_bit_up_to_rounding() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(4, 8, 5, 5, generator=g)
    for momentum in (0.1, 1.0, 0.0):
        mean, var = torch.randn(8, generator=g), torch.rand(8, generator=g)
        ours = mean.clone(), var.clone()
        ops.bn_relu(x, BatchNorm(None, None, *ours, True, momentum))
        torch.nn.functional.batch_norm(x, mean, var, training=True, momentum=momentum)
        torch.testing.assert_close(ours[0], mean, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(ours[1], var, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("twice", [False, True], ids=["each once", "one twice"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_running_statistics_of_many_batch_norms_are_those_of_each(dtype, twice) -> None:
    """In groups of equal scales, as on a GPU: other momenta, counts and sizes beside each other;
    a batch norm that a block uses twice is updated twice."""
    g = torch.Generator().manual_seed(0)
    sizes, momenta, counts = [8, 24, 8, 16, 1], [0.1, 0.1, 0.3, 0.1, 0.0], [72, 18, 72, 1, 72]
    order = [0, 1, 2, 3, 4, *([0] if twice else [])]
    stats = [torch.rand(3, c, generator=g) for c in sizes]
    means, variances = ([torch.rand(c, generator=g).to(dtype) for c in sizes] for _ in range(2))
    want = [[t.double() for t in means], [t.double() for t in variances]]
    for i in order:
        m, n = momenta[i], counts[i]
        batch = stats[i][0], stats[i][1] * (n / (n - 1) if n > 1 else 1.0)
        for tensors, new in zip(want, batch, strict=True):
            tensors[i] = ((1 - m) * tensors[i] + m * new.double()).to(dtype).double()
    columns = [[column[i] for i in order] for column in (means, variances, stats, momenta, counts)]
    torch.ops.fastres.update_running_stats(*columns)
    rtol = 1e-6 if dtype == torch.float32 else 8e-3
    for got, true in zip(means + variances, want[0] + want[1], strict=True):
        torch.testing.assert_close(got.double(), true, rtol=rtol, atol=1e-7)


@pytest.mark.parametrize("tracked", ["fp32", "fp64", "strided", "inference", "average", "no count"])
def test_running_statistics_of_every_kind_of_tensor(tracked: str) -> None:
    """In one call of C++ where that takes them, by single ops elsewhere: the same values, and the
    same in-place change for those who watch version counters."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(4, 6, 5, 5, generator=g)
    with torch.inference_mode(tracked == "inference"):
        mean, var = torch.randn(12, generator=g), torch.rand(12, generator=g)
        mean, var = (t[::2] if tracked == "strided" else t[:6].clone() for t in (mean, var))
        count = None if tracked == "no count" else torch.tensor(3)
    if tracked == "fp64":
        mean, var = mean.double(), var.double()
    momentum = None if tracked == "average" else 0.3
    m = 1 / 4 if momentum is None else momentum
    batch_var, batch_mean = torch.var_mean(x.double(), (0, 2, 3), correction=1)
    expected = (1 - m) * mean.double() + m * batch_mean, (1 - m) * var.double() + m * batch_var
    before = [t._version for t in (mean, var) if not t.is_inference()]
    with torch.inference_mode(tracked == "inference"):
        ops.bn_relu(x, BatchNorm(None, None, mean, var, True, momentum, batches=count))
    torch.testing.assert_close(mean.double(), expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(var.double(), expected[1], rtol=1e-6, atol=1e-7)
    assert count is None or count == 4
    assert tracked == "inference" or all(
        t._version > v for t, v in zip((mean, var), before, strict=True)
    )


def test_another_layout_is_copied_and_counted() -> None:
    from fastres import counters

    a = torch.randn(2, 4, 5, 5).to(memory_format=torch.channels_last)
    b = torch.randn(2, 4, 5, 5)
    counters.reset()
    assert torch.equal(ops.add_relu(a, b), torch.relu(a + b))
    assert counters.events() == {"add_relu: a tensor copied to NHWC": 1}
    strided = torch.randn(2, 4, 5, 10)[..., ::2]
    assert torch.equal(ops.add_relu(strided, b), torch.relu(strided + b))
    assert sum(counters.events().values()) == 2


@pytest.mark.parametrize("op", OPS)
def test_double_backward_is_refused(op: str) -> None:
    case = make(op, (2, 4, 6, 6))
    p, b = case.copy(torch.float32, torch.channels_last)
    z = case.fused(p, b, True)
    (dx,) = torch.autograd.grad(z.square().sum(), p["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        dx.sum().backward()


X = torch.randn(2, 4, 5, 5)
BN = BatchNorm(torch.ones(4), torch.zeros(4), torch.zeros(4), torch.ones(4), True)
CONV = Conv(torch.randn(4, 4, 3, 3), None, (1, 1), (1, 1))
BAD = {
    "int dtype": (
        lambda: ops.bn_relu(X.int(), BN),
        TypeError,
        "x has dtype torch.int32; accepted: float32",
    ),
    "not a tensor": (lambda: ops.add_relu([1.0], X), TypeError, "a must be a Tensor, got list"),
    "rank": (
        lambda: ops.add_relu(X[0], X[0]),
        ValueError,
        r"a must be 4-d \(N, C, H, W\), got 3-d",
    ),
    "empty": (lambda: ops.bn_relu(X[:0], BN), ValueError, r"x is empty \(0, 4, 5, 5\)"),
    "channels": (
        lambda: ops.bn_relu(X, BN._replace(weight=torch.ones(5))),
        ValueError,
        r"bn.weight must have shape \(4,\)",
    ),
    "one value": (
        lambda: ops.bn_relu(X[:1, :, :1, :1], BN),
        ValueError,
        "Expected more than 1 value per channel when training",
    ),
    "no statistics": (
        lambda: ops.bn_relu(X, BatchNorm(None, None)),
        ValueError,
        "running_mean and running_var are needed",
    ),
    "half the statistics": (
        lambda: ops.bn_relu(X, BN._replace(running_var=None)),
        ValueError,
        "bn has only one of running_mean and running_var",
    ),
    "residual shape": (
        lambda: ops.bn_add_relu(X, BN, X[:, :, :3]),
        ValueError,
        r"residual must have shape \(2, 4, 5, 5\), got \(2, 4, 3, 5\)",
    ),
    "residual dtype": (
        lambda: ops.add_relu(X, X.double()),
        TypeError,
        "b has dtype torch.float64, but x has",
    ),
    "device": (lambda: ops.add_relu(X, X.to("meta")), ValueError, "b is on meta, but x is on cpu"),
    "bn device": (
        lambda: ops.bn_relu(X, BN._replace(bias=torch.zeros(4, device="meta"))),
        ValueError,
        "bn.bias is on meta",
    ),
    "conv channels": (
        lambda: ops.conv_bn_relu(X[:, :3], CONV, BN),
        ValueError,
        r"x has 3 channels, but the conv weight \(4, 4, 3, 3\) with groups=1 takes 4",
    ),
    "too small": (
        lambda: ops.conv_bn(X, CONV._replace(padding=(0, 0), dilation=(3, 3)), BN),
        ValueError,
        "input 5x5 is too small for a 3x3 conv",
    ),
    "identity shape": (
        lambda: ops.residual_block(X, [Unit(CONV._replace(stride=(2, 2)), BN)]),
        ValueError,
        "an identity shortcut needs the block to keep x's shape",
    ),
    "no units": (lambda: ops.residual_block(X, []), ValueError, "units is empty"),
    "pool": (
        lambda: ops.bn_relu_maxpool(X, BN, 3, 2, 2),
        ValueError,
        "0 <= padding <= kernel // 2",
    ),
    "backend": (
        lambda: fastres.use_backend("cudnn").__enter__(),
        fastres.BackendError,
        "unknown backend 'cudnn'; known: cpu, triton, cuda, reference",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_rejects(what: str) -> None:
    call, error, message = BAD[what]
    running = BN.running_mean.clone()
    with pytest.raises(error, match=message):
        call()
    assert torch.equal(BN.running_mean, running)


def _raw_cases() -> dict:
    """torch.ops.fastres called by hand: (op, good arguments, {position: bad values}).

    (A tensor on meta sends the call to the fake implementation, which reads nothing.)"""
    o = torch.ops.fastres
    c = 16
    x = torch.randn(2, c, 6, 6).to(memory_format=torch.channels_last)
    v, st = torch.ones(c), torch.ones(3, c)
    bits = torch.zeros(72, 2, dtype=torch.uint8)
    w = torch.randn(c, c, 3, 3)
    geometry = [1, 1, 1, 1, 1, 1, 1]
    index = torch.zeros(2, c, 3, 3, dtype=torch.uint8).to(memory_format=torch.channels_last)
    pooled = torch.randn(2, c, 3, 3)
    none = [None] * 4
    small = torch.randn(1, c, 2, 2)
    acts = [small, x.bfloat16(), x[0]]
    vecs = [torch.ones(1), torch.ones(c, 2)]
    stats = [torch.ones(3, 1), torch.ones(c), st.double()]
    masks = [bits[:1], bits.int(), bits[:1].expand(72, 2)]
    stage = (x, [w], [v], [v], [v], [v], [1], [False], geometry, [False], [1e-5], "b", True)
    stage_bwd = (
        x, x, [], [bits], [w], [v], [v], [x], [st], [1], [False], geometry, [False], "b", True,
        [True],
    )  # fmt: skip
    return {
        "add_relu": (o.add_relu, (x, x, True), {0: [x.int(), x[0]], 1: acts}),
        "relu_bwd": (o.relu_bwd, (x, bits, True), {0: [small, x[0]], 1: masks}),
        "bn_act": (
            o.bn_act, (x, v, v, v, v, False, 1e-5, x, v, v, v, v, False, 1e-5, True, True),
            {1: vecs, 2: vecs, 3: vecs, 4: vecs, 7: acts, 8: vecs, 9: vecs, 10: vecs, 11: vecs},
        ),
        "bn_act_bwd": (
            o.bn_act_bwd, (x, bits, x, st, v, v, True, x, st, v, True, True, True),
            {0: acts, 1: masks, 2: [x[0], small], 3: stats, 4: vecs, 5: vecs, 7: acts, 8: stats},
        ),
        "bn_relu_maxpool": (
            o.bn_relu_maxpool, (x, v, v, v, v, False, 1e-5, 3, 2, 1),
            {0: [x[0]], 1: vecs, 2: vecs, 3: vecs, 4: vecs, 7: [0, 17, 9], 8: [0], 9: [-1, 2]},
        ),
        "bn_relu_maxpool_bwd": (
            o.bn_relu_maxpool_bwd, (pooled, index, x, st, v, True, 3, 2, 1),
            {0: acts, 1: [index[:1], index.int(), index.contiguous()], 3: stats, 4: vecs, 7: [17]},
        ),
        "conv_bn_act": (
            o.conv_bn_act,
            (x, w, None, geometry, v, v, v, v, False, 1e-5, x, *none, False, 0.0, True, True, "b"),
            {1: [w[:, :3], w[0]], 3: [geometry[:5], [0] * 7], 4: vecs, 6: vecs, 10: acts,
             19: ["e"]},
        ),
        "conv_bn_act_bwd": (
            o.conv_bn_act_bwd,
            (x, bits, x, w, geometry, x, st, v, v, True, None, None, None, False, True, False,
             True, True, False, "b"),
            {0: acts, 1: masks, 4: [geometry[:5]], 5: acts, 6: stats, 7: vecs, 19: ["e"]},
        ),
        "conv_bn_relu_maxpool": (
            o.conv_bn_relu_maxpool,
            (x, w, None, geometry, v, v, v, v, False, 1e-5, 3, 2, 1, "b"),
            {1: [w[:, :3], w[0]], 3: [geometry[:5], [0] * 7], 4: vecs, 6: vecs, 10: [0, 17],
             13: ["e"]},
        ),
        "conv_bn_relu_maxpool_bwd": (
            o.conv_bn_relu_maxpool_bwd,
            (pooled, index, x, w, geometry, x, st, v, True, 3, 2, 1, "b", True, True, False),
            {0: acts, 1: [index[:1], index.int(), index.contiguous()], 3: [w[:, :3]],
             5: acts, 6: stats, 7: vecs, 9: [17], 12: ["e"]},
        ),
        "residual_stage": (
            o.residual_stage, stage,
            {1: [[w, w], [w[:, :3]]], 2: [[t] for t in vecs], 4: [[t] for t in vecs], 6: [[2], [0]],
             7: [[True], []], 8: [geometry[:5], []], 11: ["e"]},
        ),
        "residual_stage_bwd": (
            o.residual_stage_bwd, stage_bwd,
            {0: acts, 2: [[x]], 3: [[t] for t in masks] + [[]], 5: [[t] for t in vecs],
             7: [[t] for t in acts] + [[x[:1].expand(2, c, 6, 6)]], 8: [[t] for t in stats]},
        ),
    }  # fmt: skip


@pytest.mark.parametrize("name", _raw_cases())
def test_ops_called_by_hand_reject_what_the_kernels_would_misread(name: str) -> None:
    op, good, bad = _raw_cases()[name]
    op(*good)
    for position, values in bad.items():
        for value in values:
            args = list(good)
            args[position] = value
            with pytest.raises((ValueError, TypeError), match=f"{name}|bn_act|kernel"):
                op(*args)


def test_a_cumulative_average_counts_as_torch_does() -> None:
    bn = torch.nn.BatchNorm2d(4, momentum=None)
    twin = torch.nn.BatchNorm2d(4, momentum=None)
    for seed in range(4):
        x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(seed))
        ops.bn_relu(x, BatchNorm.of(bn))
        twin(x)
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            torch.testing.assert_close(getattr(bn, name), getattr(twin, name))
    before = copy.deepcopy(bn.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value"):
        ops.bn_relu(X[:1, :, :1, :1], BatchNorm.of(bn))
    assert all(torch.equal(v, before[k]) for k, v in bn.state_dict().items())


def test_a_backend_inside_another_ends_alone() -> None:
    with fastres.use_backend("reference"):
        with fastres.use_backend("cpu"):
            with fastres.use_backend("reference"):
                assert backends.forced() == "reference"
            assert backends.forced() == "cpu"
        assert backends.forced() == "reference"
    outer, inner = fastres.use_backend("reference"), fastres.use_backend("cpu")
    outer.__enter__(), inner.__enter__()
    outer.__exit__(None, None, None)
    assert backends.forced() == "cpu"
    inner.__exit__(None, None, None)
    assert backends.forced() is None


def test_explicit_backend_never_falls_back() -> None:
    with fastres.use_backend("cpu"), pytest.raises(fastres.BackendError, match="not torch.float64"):
        ops.add_relu(X.double(), X.double())
