"""Routes of CPU inference: they give what block by block gives, and end with whatever changes."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from test_convert import batch, small
from test_inference import pair
from torch import nn
from torch.nn import functional as F
from torchvision.models import resnet

import fastres
from fastres import _network, _watch, counters, inference
from fastres._network import SequenceMixin
from fastres._watch import Routes, Watch
from fastres.convert.verify import difference
from fastres.nn import ResidualBlockMixin


class Own(nn.Module):
    """A network that no family knows; one block's shortcut is a module of its own."""

    class Halved(nn.Module):
        def __init__(self, channels: int = 32) -> None:
            super().__init__()
            self.channels = channels

        def forward(self, x):
            more = (self.channels - x.shape[1]) // 2
            return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, more, more))

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        block = resnet.BasicBlock
        self.conv, self.bn = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        self.first = nn.Sequential(*[block(16, 16) for _ in range(3)])
        self.second = nn.Sequential(block(16, 32, 2, self.Halved()), block(32, 32), block(32, 32))
        self.fc = nn.Linear(32, 10)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm2d):
                nn.init.uniform_(m.weight, 0.5, 1.5)
                m.running_mean.normal_(0, 0.2)
                m.running_var.uniform_(0.5, 1.5)
        self.to(memory_format=torch.channels_last)

    def forward(self, x):
        x = F.relu(self.bn(self.conv(x)))
        return self.fc(self.second(self.first(x)).mean((2, 3)))


MODELS = {
    "basic": lambda: small(block=resnet.BasicBlock), "bottleneck": small,
    "groups": lambda: small(groups=4), "own": Own,
}  # fmt: skip


def only_routes(monkeypatch) -> None:
    """From here on, a block that is asked whether it may run fused fails the test."""

    def asked(self, x):
        raise AssertionError("not by its route")

    monkeypatch.setattr(ResidualBlockMixin, "_obstacle", asked)


@pytest.mark.parametrize(
    "name, dtype",
    [(name, torch.float32) for name in MODELS]
    + [(name, torch.bfloat16) for name in ("bottleneck", "own")],
)
def test_a_route_gives_what_block_by_block_gives(name: str, dtype, monkeypatch) -> None:
    plain = MODELS[name]().eval()
    fused = fastres.convert(copy.deepcopy(plain)).eval()
    x, other = batch(3), batch(3, seed=2)
    with torch.inference_mode():
        truth = copy.deepcopy(plain).double()(other.double())
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            theirs, by_block = plain(other), fused(other)
            monkeypatch.setattr(Routes, "find", lambda self, key, owner: None)
            fastres.invalidate(fused)
            again = fused(other)
            monkeypatch.undo()
            fused(x)
            only_routes(monkeypatch)
            routed = fused(other)
    assert torch.equal(routed, by_block) and torch.equal(routed, again)
    assert routed.dtype == theirs.dtype == dtype
    assert difference("logits", routed, theirs, truth).ok


def test_a_shortcut_of_its_own_is_called_in_a_route(monkeypatch) -> None:
    fused = fastres.convert(Own()).eval()
    x = batch(2)
    with torch.inference_mode():
        fused(x)
        called = []
        fused.second[0].downsample.register_forward_hook(lambda *_: called.append(1))
        expected = fused(x)
        only_routes(monkeypatch)
        again = fused(x)
    assert called == [1, 1] and torch.equal(again, expected) and torch.isfinite(expected).all()


def _hook(m):
    m.layer1[1].bn2.register_forward_hook(lambda m, args, out: out * 2)


def _hook_before_a_layer(m):
    m.layer2.register_forward_pre_hook(lambda m, args: (args[0] * 2,))


def _hook_after_the_block(m):
    m.layer1[0].register_forward_hook(lambda m, args, out: out * 2)


def _own_forward(m):
    conv = m.layer2[0].conv1
    conv.forward = lambda x: nn.Conv2d.forward(conv, x) * 2


def _batch_statistics(m):
    m.layer3[0].bn1.train()


def _another_class(m):
    class Doubled(nn.BatchNorm2d):
        def forward(self, x):
            return super().forward(x) * 2

    m.layer1[0].bn1.__class__ = Doubled


MORE = {
    "a hook inside a block": _hook, "a hook before a layer": _hook_before_a_layer,
    "a hook after a block": _hook_after_the_block, "a forward of its own": _own_forward,
    "batch statistics in one layer": _batch_statistics, "another class": _another_class,
    "a child replaced": lambda m: setattr(m.layer1[0], "bn2", nn.BatchNorm2d(16).eval()),
    "a block replaced": lambda m: m.layer1.__setitem__(1, nn.Identity()),
    "a block taken out": lambda m: m.layer1.__delitem__(1),
    "in-place on the last weight": lambda m: m.fc.weight.mul_(2),
    "the last layer replaced": lambda m: setattr(m, "fc", nn.Linear(2048, 10)),
    "a hook on the last layer": lambda m: m.fc.register_forward_hook(lambda m, a, out: out * 2),
    "the last layer by another": lambda m: setattr(
        m, "fc", nn.Sequential(nn.Flatten(), m.fc, nn.Tanh())
    ),
    "a batch norm taken out": lambda m: setattr(m.layer1[0], "bn1", nn.Identity()),
    "another pool": lambda m: setattr(m.maxpool, "kernel_size", 2),
    "another average": lambda m: setattr(m, "avgpool", nn.AdaptiveMaxPool2d(1)),
    "the forward of a class": None,
    "a global hook": None,
}  # fmt: skip


@pytest.mark.parametrize("change", MORE)  # and test_inference's, each after a route was made
def test_a_route_ends_with(change: str, monkeypatch) -> None:
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        before = fused(x)
        assert len(fused._fastres.routes) == 1
        handle = None
        if change == "the forward of a class":
            forward = nn.BatchNorm2d.forward
            monkeypatch.setattr(nn.BatchNorm2d, "forward", lambda m, x: forward(m, x) * 1.5)
        elif change == "a global hook":
            hook = nn.modules.module.register_module_forward_hook
            handle = hook(lambda m, a, out: out * 2 if isinstance(m, nn.BatchNorm2d) else None)
        else:
            for m in (plain, fused):
                torch.manual_seed(9)
                MORE[change](m)
        try:
            out, expected = fused(x), plain(x)
        finally:
            if handle is not None:
                handle.remove()
        torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-4)
        assert not torch.allclose(out, before, rtol=1e-3)


def test_what_a_call_depends_on_beside_the_model(monkeypatch) -> None:
    _, fused = pair()
    x = batch()
    with torch.no_grad():
        fused(x)
        with fastres.use_backend("reference"), monkeypatch.context() as m:
            m.setattr(_network.Route, "run", None)
            fused(x)
        with fastres.use_backend("cpu"), monkeypatch.context() as m:
            fused(x)
            only_routes(m)
            fused(x)
        with torch.autocast("cpu", torch.bfloat16):
            assert fused(x).dtype == torch.bfloat16
        assert fused(x).dtype == torch.float32 and len(fused._fastres.routes) == 3
    assert fused(x).requires_grad
    fastres.convert(fused, fusion="c1")
    with torch.no_grad(), pytest.raises(fastres.BackendError, match="c1"):
        fused(x)


@pytest.mark.parametrize("value", [float("nan"), 3e38])
@pytest.mark.parametrize("name", ["basic", "own"])
def test_bad_values_spread_as_in_eager(name: str, value: float) -> None:
    plain = MODELS[name]().eval()
    fused = fastres.convert(copy.deepcopy(plain)).eval()
    x = batch(3)
    with torch.inference_mode():
        fused(x)
        good = fused(x)
        x[1, 2, 30, 31] = value
        out, expected = fused(x), plain(x)
        assert torch.equal(out.isnan(), expected.isnan())
        assert torch.equal(out.isinf(), expected.isinf())
        torch.testing.assert_close(out[0], expected[0], rtol=1e-3, atol=1e-3)
        x = batch(3)
        assert torch.equal(fused(x), good)


def test_a_route_leaves_off_where_a_value_might_overflow() -> None:
    """The stem's input is harmless, the values between the blocks are not."""
    plain, fused = pair()
    with torch.no_grad():
        for m in (plain, fused):
            for block in (m.layer1[0], m.layer1[1]):
                block.bn2.weight.fill_(1e15)
                block.bn3.weight.fill_(1e10)
        x = batch()
        for scale in (1e-30, 1e-12, 1.0, 1e6):
            for _ in range(2):
                ours, theirs = fused(x * scale), plain(x * scale)
                assert torch.equal(ours.isnan(), theirs.isnan()), scale
                assert torch.equal(ours.isinf(), theirs.isinf()), scale


@pytest.mark.parametrize("path", ["layer1.0", "layer1.1"])
def test_no_route_is_made_of_a_part_of_the_network(path: str) -> None:
    """One block may overflow inside and runs unfolded, those behind it do not."""
    plain, fused = pair()
    x = batch()
    with torch.no_grad():
        for m in (plain, fused):
            block = m.get_submodule(path)
            block.conv2.weight.mul_(1e38)
            block.bn2.running_var.mul_(1e38)
            block.bn2.weight.mul_(1e-19)
        for _ in range(2):
            expected = plain(x * 1e-3)
            assert expected.isfinite().all()
            torch.testing.assert_close(fused(x * 1e-3), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("optimiser", ["SGD", "Adam", "AdamW", "Adagrad"])
def test_a_fused_optimisers_step_is_seen(optimiser: str) -> None:
    """It writes without moving version counters, and batch statistics may have stayed."""
    for model in (pair()[1], fastres.convert(Own()).eval()):
        x = batch(2)
        with torch.no_grad():
            before = model(x)
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        getattr(torch.optim, optimiser)(model.parameters(), lr=0.05, fused=True).step()
        with torch.no_grad():
            out = model(x)
            fastres.invalidate(model)
            assert torch.equal(out, model(x)) and not torch.allclose(out, before, rtol=1e-2)


def test_a_call_that_was_overtaken_leaves_no_route() -> None:
    """While it runs the weights change, and a call of another shape begins and ends."""
    _, fused = pair()
    x, once = batch(2), []

    def overtake(m, args, out):
        if not once:
            once.append(1)
            fused.layer1[0].conv1.weight.mul_(3)
            fused(batch(3))

    fused.avgpool.register_forward_hook(overtake)
    with torch.no_grad():
        fused(x)
        out = fused(x)
        fastres.invalidate(fused)
        torch.testing.assert_close(out, fused(x), rtol=1e-4, atol=1e-5)

    fused.layer1[0].conv1.weight.detach().div_(3)
    watch, other = fused._fastres.routes, Routes()
    first = other.prepare((1,), fused, _network._watch)
    fused.fc.weight.detach().add_(1)
    second = other.prepare((2,), fused, _network._watch)
    other.add((1,), "stale", first)
    assert len(other) == 0 and second is not first and watch is not other
    other.add((2,), "fresh", second)
    assert other.find((2,), fused) == "fresh"


def test_children_that_pass_on_something_else() -> None:
    class Split(nn.Module):
        def forward(self, x):
            return x, x

    class Merge(nn.Module):
        def forward(self, pair):
            return pair[0] + pair[1]

    block = resnet.BasicBlock
    plain = nn.Sequential(block(16, 16), block(16, 16), Split(), Merge(), block(16, 16)).eval()
    fused = fastres.convert(copy.deepcopy(plain))
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(2):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-4, atol=1e-4)


def test_pruned_channels_and_an_empty_head() -> None:
    plain = small(block=resnet.BasicBlock).eval()
    fused = fastres.convert(copy.deepcopy(plain))
    x = batch()
    with torch.no_grad():
        for m in (plain, fused):
            block, keep = m.layer1[0], 48  # of 64, as tools do it: out_channels stays 64
            bn = block.bn1
            block.conv1.weight = nn.Parameter(block.conv1.weight[:keep].clone())
            bn.weight, bn.bias = (nn.Parameter(t[:keep].clone()) for t in (bn.weight, bn.bias))
            bn.running_mean, bn.running_var = bn.running_mean[:keep], bn.running_var[:keep]
            block.conv2.weight = nn.Parameter(block.conv2.weight[:, :keep].clone())
        for _ in range(2):
            torch.testing.assert_close(fused(x), plain(x), rtol=1e-3, atol=1e-4)
        fused.fc.weight = nn.Parameter(torch.empty(0, 512))
        fused.fc.bias = None
        assert fused(x).shape == (4, 0)
        fused.fc = nn.Linear(100, 10)
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            fused(x)


def test_images_in_nchw_take_a_route_too(monkeypatch) -> None:
    _, fused = pair()
    x = batch()
    with torch.no_grad():
        expected = fused(x)
        fused(x.contiguous())
        only_routes(monkeypatch)
        counters.reset()
        assert torch.equal(fused(x.contiguous()), expected)
        assert not x.contiguous().is_contiguous(memory_format=torch.channels_last)
    assert list(counters.events()) == ["inference: a batch of images copied to channels_last"]


def test_no_input_is_written_over() -> None:
    fused = fastres.convert(Own()).eval()
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    before = x.clone()
    with torch.inference_mode():
        for _ in range(3):
            fused.first(x)
    assert torch.equal(x, before)


def test_routes_are_few_and_not_copied() -> None:
    _, fused = pair()
    with torch.no_grad():
        for n in range(1, 12):
            fused(batch(n, 32))
        assert len(fused._fastres.routes) == _watch.KEPT
        for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
            assert len(other._fastres.routes) == 0
            torch.testing.assert_close(other(batch()), fused(batch()), rtol=1e-4, atol=1e-5)
        fastres.invalidate(fused.layer1[0])
        fused.layer1[0].conv1.weight.data.mul_(2)  # what no version counter sees
        fastres.invalidate(fused.layer1[0])
        fresh = copy.deepcopy(fused)(batch())
        torch.testing.assert_close(fused(batch()), fresh, rtol=1e-4, atol=1e-5)


def test_a_shallow_copy_does_not_run_by_the_originals_routes() -> None:
    models = pair()
    x = batch()
    with torch.no_grad():
        before = [m(x) for m in models]
        copies = [copy.copy(m) for m in models]
        for c in copies:
            c._modules = c._modules.copy()
            torch.manual_seed(9)
            c.fc = nn.Linear(c.fc.in_features, 10)
        for _ in range(2):
            plain, fused = (c(x) for c in copies)
            torch.testing.assert_close(fused, plain, rtol=1e-3, atol=1e-4)
            torch.testing.assert_close(models[1](x), before[0], rtol=1e-3, atol=1e-4)


def test_a_model_that_changes_in_every_call_makes_few_routes(monkeypatch) -> None:
    _, fused = pair()
    made = []
    watch = _network._watch
    monkeypatch.setattr(_network, "_watch", lambda m: made.append(m) or watch(m))
    with torch.no_grad():
        for i in range(_watch.WASTED + 20):
            fused.calls = i
            fused(batch(1, 32))
        assert len(made) <= _watch.WASTED + 1
        for _ in range(_watch.RETRY + 1):  # it has settled
            fused(batch(1, 32))
        assert len(fused._fastres.routes) == 1


def test_convert_and_revert_of_sequences() -> None:
    own = Own()
    before = [(path, type(m)) for path, m in own.named_modules()]
    fused = fastres.convert(own)
    assert type(fused.first).__name__ == type(fused.second).__name__ == "FastSequential"
    x = torch.randn(2, 16, 8, 8)
    with torch.no_grad():
        part = fused.eval().first[:2]
        assert part(x).shape == x.shape and fused.first[0](x).shape == x.shape
        assert repr(fastres.report(fused)).count("FastSequential") == 0
    assert type(part) is nn.Sequential
    fused.second = fused.second[:2]
    fastres.convert(fused, fusion="b")
    with torch.no_grad():
        assert fused(batch(2)).shape == (2, 10)
    fastres.revert(fused)
    assert {type(m) for m in own.modules()} == {kind for _, kind in before}


def test_a_sequence_trains_and_traces_as_its_blocks() -> None:
    plain = Own()
    fused = fastres.convert(copy.deepcopy(plain))
    x = batch(2, 16)
    for m in (plain, fused):
        m(x).square().mean().backward()
    for (name, p), q in zip(plain.named_parameters(), fused.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad, rtol=1e-3, atol=1e-4, msg=name)
    plain.eval(), fused.eval()
    with torch.no_grad():
        expected = plain(x)
        for traced in (torch.fx.symbolic_trace(fused), torch.jit.trace(fused, x)):
            torch.testing.assert_close(traced(x), expected, rtol=1e-3, atol=1e-4)


# --- blocks with a shortcut of their own ----------------------------------------------------------


class Shortcut(nn.Module):
    def __init__(self, how) -> None:
        super().__init__()
        self.how = how

    def forward(self, x):
        return self.how(x)


def _pool_in_front() -> nn.Module:  # ResNet-D
    return nn.Sequential(nn.AvgPool2d(2), nn.Conv2d(16, 24, 1, bias=False), nn.BatchNorm2d(24))


SHORTCUTS = {
    "option A": (24, 2, lambda: Own.Halved(24)),
    "ResNet-D": (24, 2, _pool_in_front),
    "a view of x": (16, 1, lambda: Shortcut(lambda x: x.view_as(x))),
    "x": (16, 1, nn.Identity),
    "broadcast": (16, 1, lambda: Shortcut(lambda x: x.mean((2, 3), keepdim=True))),
    "another layout": (16, 1, lambda: Shortcut(lambda x: x.contiguous() * 2)),
    "another dtype": (16, 1, lambda: Shortcut(lambda x: x.double() / 3)),
    "in place": (16, 1, lambda: nn.ReLU(inplace=True)),
    "not finite": (16, 1, lambda: Shortcut(lambda x: 1 / x.relu())),
}


def _open_block(name: str) -> nn.Module:
    torch.manual_seed(4)
    planes, stride, shortcut = SHORTCUTS[name]
    block = resnet.BasicBlock(16, planes, stride, shortcut())
    for m in block.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 1.5)
            m.running_mean.normal_(0, 0.2)
            m.running_var.uniform_(0.5, 1.5)
    return block.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", SHORTCUTS)
def test_a_block_with_a_shortcut_of_its_own(name: str) -> None:
    plain = _open_block(name)
    fused = fastres.convert(copy.deepcopy(plain))
    assert fastres.report(fused).fused == 1 and "is called" in str(fastres.report(fused))
    g = torch.Generator().manual_seed(6)
    x = torch.randn(2, 16, 8, 8, generator=g).to(memory_format=torch.channels_last)
    close = functools.partial(torch.testing.assert_close, rtol=1e-4, atol=1e-4, equal_nan=True)
    found = []
    for m in (plain, fused):
        inputs = x.clone().requires_grad_()
        if name == "in place":  # an error in the backward, of both
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                m(inputs * 1).sum().backward()
            continue
        z = m(inputs)
        z.nan_to_num(0, 0, 0).square().mean().backward()
        found.append([z, inputs.grad, *(p.grad for p in m.parameters()), *m.buffers()])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs)
    plain.eval(), fused.eval()
    with torch.inference_mode():
        row = fastres.convert(nn.Sequential(copy.deepcopy(plain), copy.deepcopy(plain))).eval()
        for _ in range(2):
            inputs = [x.clone() for _ in range(4)]
            close(fused(inputs[0]), plain(inputs[1]))
            assert torch.equal(inputs[0], inputs[1])
            if name not in ("option A", "ResNet-D"):
                close(row(inputs[2]), plain(plain(inputs[3])))
    assert isinstance(row, SequenceMixin)


def test_a_hook_sees_the_call_of_such_a_shortcut_once() -> None:
    fused = fastres.convert(_open_block("broadcast")).eval()
    seen = []
    fused.downsample.register_forward_hook(lambda *_: seen.append(1))
    x = torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last)
    with torch.no_grad():
        fused(x)
    assert len(seen) == 1
    fused(x)
    assert len(seen) == 2


# --- the watch, and the passes --------------------------------------------------------------------


def _watched() -> tuple[nn.Conv2d, Watch]:
    conv = nn.Conv2d(8, 8, 1)
    return conv, Watch([conv], [], [conv.weight], [(nn.Conv2d, "forward")])


@pytest.mark.parametrize(
    "change",
    [
        lambda c: setattr(c, "stride", (2, 2)),
        lambda c: setattr(c, "new", 1),
        lambda c: delattr(c, "padding_mode"),
        lambda c: c._parameters.pop("bias"),
        lambda c: c.register_buffer("more", torch.ones(1)),
        lambda c: c.register_forward_pre_hook(print),
        lambda c: setattr(c, "__class__", nn.ConvTranspose2d),
        lambda c: setattr(c, "training", False),
        lambda c: c.weight.detach().zero_(),
        lambda c: setattr(c.weight, "data", c.weight.detach().clone()),
        lambda c: setattr(c.weight, "data", c.weight.data.transpose(0, 1)),
    ],
)
def test_a_watch_sees(change) -> None:
    conv, watch = _watched()
    assert watch.holds() and watch.holds()
    change(conv)
    assert not watch.holds()


def test_a_watch_does_not_see_what_is_put_back() -> None:
    conv, watch = _watched()
    conv.eval()
    assert not watch.holds()
    conv.train()
    conv.register_forward_hook(print).remove()
    conv.bias.detach().zero_()  # not asked for
    assert watch.holds()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("c", [1, 35, 64, 160])
@pytest.mark.parametrize("window", [(3, 2, 1), (2, 2, 0), (5, 3, 2), (1, 1, 0)])
def test_max_pool_matches_torchs(window, c: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(c)
    x = torch.randn(2, c, 13, 18, generator=g).relu().to(dtype)
    x[0, 0] = -0.0
    x = x.contiguous(memory_format=torch.channels_last)
    z = inference.max_pool(x, *window)
    assert z.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(z, F.max_pool2d(x, *window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 1000, 65536, 300_001])
def test_abs_max_matches_torchs(count: int, dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(count)
    x = torch.randn(1, count, 1, 1, generator=g).to(dtype)
    assert inference.abs_max(x) == x.abs().max().item()
    x[0, count // 2] = -1e30
    assert inference.abs_max(x) == x.abs().max().item()
    x[0, count - 1] = -float("inf")
    assert inference.abs_max(x) == float("inf")
    x[0, 0] = float("nan")
    assert inference.abs_max(x) != inference.abs_max(x)
