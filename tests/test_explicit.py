"""A request, `fusion=` or `use_backend`, that a changed module cannot meet is an error; what only
watches the operations of a call gets the original ones; without a request both do."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable

import pytest
import torch
from common import backend
from torch import Tensor, nn

import fastres
from fastres import counters, selfcheck
from fastres.nn import ConvBNReLU, FastBasicBlock

torchvision = pytest.importorskip("torchvision")

REQUESTS = {
    "b": ('fusion="b"', "drop fusion="),
    "c2": ('fusion="c2" under use_backend("reference")', "drop fusion= .* and leave use_backend"),
    "backend": ('use_backend("reference")', "leave use_backend"),
}


def network() -> nn.Module:
    return copy.deepcopy(_network())


@functools.cache
def _network() -> nn.Module:
    from torchvision.models.resnet import BasicBlock, ResNet

    torch.manual_seed(0)
    model = ResNet(BasicBlock, [2, 1, 1, 1], num_classes=5)
    model.layer2, model.layer3, model.layer4 = nn.Sequential(), nn.Sequential(), nn.Sequential()
    model.fc = nn.Linear(64, 5)
    return model.to(memory_format=torch.channels_last)


def images(seed: int = 1) -> Tensor:
    x = torch.randn(2, 3, 17, 17, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def requested(model: nn.Module, request: str) -> Callable[[Tensor], Tensor]:
    """A call of the model, converted, under the request; "" is none."""
    fastres.convert(model, fusion=request if request in ("b", "c2") else None)

    def call(x: Tensor) -> Tensor:
        if request in ("", "b"):
            return model(x)
        with fastres.use_backend("reference"):
            return model(x)

    return call


def _hook(m: nn.Module, name: str, patch: pytest.MonkeyPatch) -> None:
    m.get_submodule(name).register_forward_hook(lambda m, args, z: z * 2)


def _child(m: nn.Module, name: str, patch: pytest.MonkeyPatch) -> None:
    m.set_submodule(name, nn.Hardtanh(0.0, 0.5))


def _forward(m: nn.Module, name: str, patch: pytest.MonkeyPatch) -> None:
    m.get_submodule(name).forward = lambda x: x.clamp(0, 0.5)


def _class(m: nn.Module, name: str, patch: pytest.MonkeyPatch) -> None:
    patch.setattr(nn.ReLU, "forward", lambda m, x: x.clamp(0, 0.5))


def _global(m: nn.Module, name: str, patch: pytest.MonkeyPatch) -> None:
    hooks = torch.nn.modules.module._global_forward_hooks
    key = lambda m, args, z: z * 2 if type(m) is nn.ReLU else z  # noqa: E731
    patch.setitem(hooks, 1 << 30, key)


CHANGES = {  # a way to change the module at a path, and the reason said
    "hook": (_hook, "layer1.1", "bn2", "bn2 has a hook"),
    "child": (_child, "layer1.0", "relu", "relu is Hardtanh, not ReLU"),
    "forward": (_forward, "layer1.1", "relu", "relu has another forward of its own"),
    "class": (_class, "", "relu", "ReLU.forward was replaced"),
    "global hook": (_global, "", "relu", "a global module hook is registered"),
    "stem": (_hook, "", "maxpool", "maxpool has a hook"),
}


@pytest.mark.parametrize("request_", REQUESTS)
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_module_is_an_error_under_a_request_and_else_runs(change, request_, monkeypatch):
    """Before the module changes its buffers; and its own call without a request is torch's."""
    apply, path, name, reason = CHANGES[change]
    asked, way_out = REQUESTS[request_]
    plain, fused = network(), network()
    call, free = requested(fused, request_), network()
    unasked = requested(free, "")
    for m in (plain, fused, free):
        apply(m.get_submodule(path), name, monkeypatch)
    before = {n: b.clone() for n, b in fused.named_buffers()}
    where = f" at '{path}'" if path else "FastResNet"
    said = f"{where}: {re.escape(asked)} cannot run: {re.escape(reason)}.*; change that, or "
    with pytest.raises(fastres.BackendError, match=f"{said}{way_out}"):
        call(images())
    owner = fused.get_submodule(path)
    for n, b in fused.named_buffers():
        if n.startswith(f"{path}." if path else ""):
            assert torch.equal(b, before[n]), n
    counters.reset()
    torch.testing.assert_close(unasked(images()), plain(images()), rtol=1e-4, atol=1e-5)
    assert any(f"{type(owner).__name__} ran unfused: {reason}" in e for e in counters.events())


def test_what_was_undone_runs_as_asked_again():
    model = network().double()
    plain = copy.deepcopy(model)
    call = requested(model, "c2")
    handle = model.layer1[0].conv2.register_forward_hook(lambda m, args, z: None)
    x = images().double()
    with pytest.raises(fastres.BackendError, match="'layer1.0': .* conv2 has a hook"):
        call(x)
    handle.remove()
    fresh = copy.deepcopy(plain)
    model.load_state_dict(fresh.state_dict())  # the stem before the block had run
    counters.reset()
    torch.testing.assert_close(call(x), plain(x), rtol=1e-9, atol=1e-11)
    assert not [e for e in counters.events() if "unfused" in e]


def test_an_input_that_autocast_promotes():
    """An identity block adds bf16 to the fp32 input in torch; in a network its input is bf16."""
    torch.manual_seed(2)
    block = FastBasicBlock(16, 16, fusion="b").to(memory_format=torch.channels_last)
    x = torch.randn(2, 16, 7, 7).contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        with pytest.raises(fastres.BackendError, match=r"promotes \(an input in torch.bfloat16"):
            block(x)
        z = block(x.bfloat16())
        assert torch.equal(z, block.relu(z)) and z.dtype == torch.bfloat16
        block._fastres.rung = None
        assert block(x).dtype == torch.float32
        model = network()
        call = requested(model, "b")
        counters.reset()
        assert call(images()).isfinite().all()
    assert not [e for e in counters.events() if "unfused" in e]


def test_a_module_made_by_hand():
    torch.manual_seed(3)
    m = ConvBNReLU(8, 8, 3, padding=1)
    m.bn.register_forward_pre_hook(lambda m, args: None)
    said = r"^ConvBNReLU: use_backend\(.*bn has a hook"
    with fastres.use_backend("reference"), pytest.raises(fastres.BackendError, match=said):
        m(torch.randn(2, 8, 5, 5))


def test_kernels_that_fail_their_check_under_use_backend(monkeypatch):
    backend("cpu")
    monkeypatch.setattr(selfcheck, "ENABLED", True)
    monkeypatch.setattr(selfcheck, "_verdicts", {})
    monkeypatch.setattr(selfcheck, "_verdict", lambda *args: "bn_stats is off")
    model = fastres.convert(network())
    said = r'use_backend\("cpu"\) .*bn_stats is off'
    with fastres.use_backend("cpu"), pytest.raises(fastres.BackendError, match=said):
        model(images())


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("request_", REQUESTS)
def test_who_only_watches_gets_the_original_operations(request_):
    from torch.utils.flop_counter import FlopCounterMode

    plain = network().eval().requires_grad_(False)
    call = requested(copy.deepcopy(plain), request_)
    x = images()
    want = plain(x)
    counters.reset()
    with FlopCounterMode(display=False) as flops:
        torch.testing.assert_close(call(x), want, rtol=1e-4, atol=1e-5)
    assert flops.get_total_flops() > 1e5
    got, tangent = torch.func.jvp(call, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert tangent.abs().max() > 0
    graph = torch.jit.trace(call, x, check_trace=False)
    torch.testing.assert_close(graph(x), want, rtol=1e-4, atol=1e-5)
    events = " ".join(counters.events())
    for who in ("FlopCounterMode", "a torch.func transform", "traced by torch.jit"):
        assert who in events


def test_a_compiled_call_is_an_error_too():
    block = FastBasicBlock(16, 16, fusion="b")
    block.bn2.register_forward_hook(lambda m, args, z: z * 2)
    compiled = torch.compile(block, backend="eager")
    with pytest.raises(fastres.BackendError, match='fusion="b" cannot run: bn2 has a hook'):
        compiled(torch.randn(2, 16, 5, 5))
