"""Plain eager training skips the dispatcher (fastres.ops._library.plain_eager): whatever watches it
still sees the registered op, with the same numbers."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn

from fastres.ops import BatchNorm, Conv, Unit, conv_bn_relu, residual_block

OPS = ["conv_bn_relu", "residual_block", "frozen residual_block"]


class Net(nn.Module):
    def __init__(self, op: str) -> None:
        super().__init__()
        self.op = op
        self.vectors: dict[str, Tensor] = {}  # instead of the batch norm's
        self.conv = nn.Conv2d(4, 4, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(4)
        with torch.no_grad():
            self.bn.weight.copy_(torch.tensor([0.5, 2.0, -1.5, 1.0]))
        self.train("frozen" not in op)

    def forward(self, x: Tensor) -> Tensor:
        conv, bn = Conv.of(self.conv), BatchNorm.of(self.bn)._replace(**self.vectors)
        if self.op == "conv_bn_relu":
            return conv_bn_relu(x, conv, bn)
        return residual_block(x, [Unit(conv, bn)])


def make(op: str) -> tuple[Net, Tensor]:
    torch.manual_seed(0)
    net = Net(op)
    return net, torch.randn(2, 4, 5, 5)


class Wrapped(Tensor):
    """A tensor without storage of its own, like DTensor."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        plain = torch.utils._pytree.tree_map_only(Wrapped, lambda t: t.inner, (args, kwargs or {}))
        return func(*plain[0], **plain[1])


@pytest.mark.parametrize("where", ["weight", "bias"])
@pytest.mark.parametrize("op", OPS)
def test_a_subclass_among_the_vectors_is_seen(op, where):
    net, x = make(op)
    want = net(x).detach()
    net.vectors[where] = Wrapped(getattr(net.bn, where).detach())
    torch.testing.assert_close(net(x).detach(), want)


@pytest.mark.parametrize("op", OPS)
def test_a_batched_backward(op):
    net, x = make(op)
    x.requires_grad_()
    z = net(x)
    v = torch.randn(3, *z.shape)
    if op != "conv_bn_relu":  # torch has no fallback for lists of tensors
        with pytest.raises(RuntimeError, match="Batching rule not implemented"):
            torch.autograd.grad(z, x, v, is_grads_batched=True)
        return
    want = torch.stack([torch.autograd.grad(z, x, one, retain_graph=True)[0] for one in v])
    torch.testing.assert_close(torch.autograd.grad(z, x, v, is_grads_batched=True)[0], want)


def test_a_trace_can_be_saved():
    """Of conv_bn_relu: torch traces no lists of bool, which residual_block's op takes."""
    net, x = make("conv_bn_relu")
    net.eval()
    traced = torch.jit.trace(net, x, check_trace=False)
    torch.jit.save(traced, io.BytesIO())
    assert "fastres::conv_bn_act" in str(traced.graph)
    torch.testing.assert_close(traced(x), net(x))


def test_a_trace_of_a_block_runs():
    net, x = make("residual_block")
    net.eval()
    torch.testing.assert_close(torch.jit.trace(net, x, check_trace=False)(x), net(x))
