"""fastres.graph: the checks and the plain call on the CPU; capture where there is a GPU."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import nn

import fastres
from fastres import graphs

CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is captured on CUDA only")


def network(momentum: float | None = 0.1) -> nn.Module:
    from fastres.nn import ConvBNReLU

    torch.manual_seed(0)
    norm = {"norm_layer": lambda c: nn.BatchNorm2d(c, momentum=momentum)}
    body = ConvBNReLU(3, 8, 3, padding=1, **norm), ConvBNReLU(8, 8, 3, padding=1, **norm)
    return nn.Sequential(
        *body, nn.Dropout(0.5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)
    )


def batch(device="cpu", n=4):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 8, 8, generator=g).contiguous(memory_format=torch.channels_last)
    return x.to(device), torch.arange(n, device=device) % 4


def sgd(model, **kwargs):
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, **kwargs)


def test_graph_on_the_cpu_is_the_plain_call_and_says_so_once(caplog):
    model, (x, _) = network().eval(), batch()
    graphs._said.clear()
    with caplog.at_level(logging.WARNING, "fastres"):
        infer = fastres.graph(model, x)
        fastres.graph(model, x)
    assert not infer.captured
    assert [r.message for r in caplog.records] == [
        "fastres.graph: the sample is on cpu, where nothing is captured"
    ]
    with torch.no_grad():
        assert torch.equal(infer(x + 1), model(x + 1))
    assert not infer(x).requires_grad


def test_graph_of_a_step_on_the_cpu_trains_as_the_plain_step():
    x, y = batch()
    plain = network()
    graphed = copy.deepcopy(plain)
    a, b = sgd(plain), sgd(graphed)
    train = fastres.graph(graphed, (x, y), loss_fn=nn.functional.cross_entropy, optimizer=b)
    for seed in range(3):
        torch.manual_seed(seed)
        a.zero_grad()
        loss = nn.functional.cross_entropy(plain(x), y)
        loss.backward()
        a.step()
        torch.manual_seed(seed)
        assert torch.equal(train(x, y), loss)
    for key, value in plain.state_dict().items():
        assert torch.equal(graphed.state_dict()[key], value), key
    assert int(graphed[0].bn.num_batches_tracked) == 3


def test_graph_takes_a_step_of_the_users():
    x, _ = batch()
    model = network()
    assert fastres.graph(model, x, step=lambda t: t.sum() + 1)(x) == x.sum() + 1


def test_graph_keeps_the_autocast_of_the_capture():
    model, (x, _) = network().eval(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        infer = fastres.graph(model, x)
    assert infer(x).dtype == torch.bfloat16
    assert fastres.graph(model, x)(x).dtype == torch.float32


@pytest.mark.parametrize("call, match", [
    (lambda f, x: f(x[:2]), r"input 0 has shape \(2, 3, 8, 8\), the sample .* \(4, 3, 8, 8\)"),
    (lambda f, x: f(x.double()), r"input 0 has dtype torch.float64, the sample .* torch.float32"),
    (lambda f, x: f(x.to("meta")), r"input 0 has device meta, the sample .* cpu"),
    (lambda f, x: f(x, x), r"captured with 1 input\(s\), called with 2"),
])  # fmt: skip
def test_graph_rejects_other_inputs(call, match):
    model, (x, _) = network().eval(), batch()
    with pytest.raises(ValueError, match=match):
        call(fastres.graph(model, x), x)
    with pytest.raises(TypeError, match="input 0 must be a Tensor, got list"):
        fastres.graph(model, x)([1])


def test_graph_rejects_what_it_cannot_capture():
    x, y = batch()
    loss = nn.functional.cross_entropy
    model = network()
    with pytest.raises(ValueError, match=r"in train mode; call model.eval\(\)"):
        fastres.graph(model, x)
    with pytest.raises(ValueError, match="loss_fn and optimizer go together"):
        fastres.graph(model, (x, y), loss_fn=loss)
    with pytest.raises(ValueError, match="not both"):
        fastres.graph(model, (x, y), loss_fn=loss, optimizer=sgd(model), step=lambda *a: 0)
    with pytest.raises(ValueError, match="SGD with dampening"):
        fastres.graph(model, (x, y), loss_fn=loss, optimizer=sgd(model, dampening=0.1))
    with pytest.raises(ValueError, match="on one device, found cpu, meta"):
        fastres.graph(model.eval(), x.to("meta"))
    with pytest.raises(TypeError, match="non-empty tuple"):
        fastres.graph(model, ())
    averaging = network(momentum=None)
    with pytest.raises(ValueError, match=r"0\.bn has momentum=None.*num_batches_tracked"):
        fastres.graph(averaging, (x, y), loss_fn=loss, optimizer=sgd(averaging))
    averaging.eval()
    assert fastres.graph(averaging, x)(x).shape == (4, 4)


def test_graph_notices_what_a_capture_cannot_see():
    x, y = batch()
    model = network()
    optimizer = sgd(model)
    train = fastres.graph(model, (x, y), loss_fn=nn.functional.cross_entropy, optimizer=optimizer)
    train(x, y)
    optimizer.param_groups[0]["lr"] = 0.01
    with pytest.raises(RuntimeError, match=r"lr was 0\.1 at the capture and is 0\.01 now"):
        train(x, y)
    optimizer.param_groups[0]["lr"] = 0.1
    model[1].eval()
    with pytest.raises(RuntimeError, match="1 was switched between train and eval"):
        train(x, y)


OPTIMIZERS = {
    "SGD": {"momentum": 0.9}, "Adam": {"amsgrad": True}, "AdamW": {}, "NAdam": {}, "RAdam": {},
    "ASGD": {}, "Rprop": {}, "RMSprop": {"momentum": 0.9}, "Adagrad": {}, "Adadelta": {},
    "Adamax": {},
}  # fmt: skip


def steps(model, optimizer, count):
    x, y = batch()
    for seed in range(count):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@pytest.mark.parametrize("name, known", [*((name, 0) for name in OPTIMIZERS), ("NAdam", 2)])
def test_kept_puts_back_a_warm_up(name, known):
    """What _capture relies on: parameters, buffers and old state as before, new state as it starts,
    in the same tensors: what is trained from there is what a model without warm-up becomes."""
    model = network()
    plain = copy.deepcopy(model)
    make = getattr(torch.optim, name)
    optimizer = make(model.parameters(), **OPTIMIZERS[name])
    other = make(plain.parameters(), **OPTIMIZERS[name])
    steps(model, optimizer, known)
    steps(plain, other, known)
    before = copy.deepcopy(model.state_dict())
    kept = graphs._Kept(model, optimizer)
    with kept:
        steps(model, optimizer, 2)
    assert "_init_group" not in vars(optimizer)
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    assert not torch.equal(before["0.conv.weight"], model[0].conv.weight)
    kept.restore()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    after = [t for s in optimizer.state.values() for t in s.values()]
    assert after and all(a is b for a, b in zip(after, tensors, strict=True))
    steps(model, optimizer, 2)
    steps(plain, other, 2)
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


class Counts(torch.optim.SGD):
    """With a number as state."""

    def _init_group(self, group, *args):
        for p in group["params"]:
            self.state[p].setdefault("count", 0)
        return super()._init_group(group, *args)

    def step(self):
        super().step()
        for state in self.state.values():
            state["count"] += 1


class Late(torch.optim.SGD):
    """With a state that _init_group does not make."""

    def step(self):
        super().step()
        for p in self.param_groups[0]["params"]:
            self.state[p].setdefault("first", 1)


@pytest.mark.parametrize("make, message", [
    (Counts, "Counts has a state 'count' that changes on the host"),
    (Late, "Late has a state 'first' that starts at what only its first step knows"),
])  # fmt: skip
def test_a_state_that_cannot_be_put_back_is_an_error(make, message):
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = make(model.parameters(), lr=0.1)
    kept = graphs._Kept(model, optimizer)
    with kept:
        steps(model, optimizer, 2)
    with pytest.raises(ValueError, match=message):
        kept.restore()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(state.get("count", 0) == 0 for state in optimizer.state.values())


def test_adagrads_count_on_the_host_matters_to_its_decay_only():
    for decay in (0.0, 0.1):
        adagrad = torch.optim.Adagrad(network().parameters(), lr_decay=decay)
        assert graphs._counts(adagrad, "step") == bool(decay)
        assert graphs._counts(adagrad, "sum")


def test_an_optimizer_that_counts_on_the_host_is_refused_for_cuda():
    model = network()
    adam = torch.optim.Adam(model.parameters())
    graphs._check_training(model, adam, torch.device("cpu"))
    with pytest.raises(ValueError, match="Adam counts its steps on the host.*capturable=True"):
        graphs._check_training(model, adam, torch.device("cuda"))
    adam = torch.optim.Adam(model.parameters(), capturable=True)
    graphs._check_training(model, adam, torch.device("cuda"))


@CUDA
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_graph_captures_a_step(dtype):
    """Same parameters, running statistics and counters as the plain steps, bit for bit."""
    x, y = batch("cuda", 16)
    plain = network().cuda().to(memory_format=torch.channels_last)
    plain[2].p = 0.0
    graphed = copy.deepcopy(plain)
    a, b = sgd(plain), sgd(graphed)
    loss_fn = nn.functional.cross_entropy
    torch.backends.cudnn.deterministic = True
    with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
        train = fastres.graph(graphed, (x, y), loss_fn=loss_fn, optimizer=b)
    assert train.captured and int(graphed[0].bn.num_batches_tracked) == 0
    for i in range(4):
        a.zero_grad()
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = loss_fn(plain(x + i), y)
        loss.backward()
        a.step()
        torch.testing.assert_close(train(x + i, y), loss.detach(), rtol=1e-3, atol=1e-4)
    torch.backends.cudnn.deterministic = False
    for key, value in plain.state_dict().items():
        torch.testing.assert_close(graphed.state_dict()[key], value, rtol=1e-2, atol=1e-3, msg=key)
    assert int(graphed[0].bn.num_batches_tracked) == 4


@CUDA
@pytest.mark.parametrize("name", ["NAdam", "ASGD", "Rprop", "Adam"])
def test_graph_captures_an_optimizer_whose_state_does_not_start_at_zero(name):
    x, y = batch("cuda", 16)
    plain = network().cuda()
    plain[2].p = 0.0
    graphed = copy.deepcopy(plain)
    make = getattr(torch.optim, name)
    a, b = (make(m.parameters(), lr=1e-3, capturable=True) for m in (plain, graphed))
    loss_fn = nn.functional.cross_entropy
    train = fastres.graph(graphed, (x, y), loss_fn=loss_fn, optimizer=b)
    for i in range(3):
        a.zero_grad()
        loss = loss_fn(plain(x + i), y)
        loss.backward()
        a.step()
        torch.testing.assert_close(train(x + i, y), loss.detach(), rtol=1e-3, atol=1e-4)


@CUDA
def test_graph_captures_inference_that_follows_the_weights():
    x, _ = batch("cuda")
    model = network().cuda().eval()
    infer = fastres.graph(model, x)
    first = infer(x)
    with torch.no_grad():
        torch.testing.assert_close(first, model(x))
        model[-1].weight.mul_(2)
        torch.testing.assert_close(infer(x + 1), model(x + 1))
    assert not torch.equal(first, infer(x + 1)), "outputs are copies"


@CUDA
def test_graph_draws_new_random_numbers():
    x, y = batch("cuda", 16)
    model = network().cuda()
    step = fastres.graph(model, x, step=lambda t: model(t))
    assert not torch.equal(step(x), step(x))
