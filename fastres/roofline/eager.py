"""Rung a: the kernels of operators that run as PyTorch runs them, forward and backward."""

from __future__ import annotations

from .kernel import BACKWARD, DGRAD, FORWARD, FPROP, HEAD, WGRAD, Kernel, kernel
from .trace import Op, Ref
from .traffic import Traffic, dgrad, fprop, wgrad

BATCH_NORMS = (
    "native_batch_norm",
    "cudnn_batch_norm",
    "_native_batch_norm_legit",
    "_batch_norm_with_update",
)
# Their gradient is the incoming one, or a view of it.
FREE_BACKWARD = ("add", "cat")
# Their gradient needs the incoming one and nothing of the forward but, for a pool, the indices.
LINEAR = ("mean", "sum", "clone", "_to_copy", "avg_pool2d", "_adaptive_avg_pool2d")


def _tensors(refs: tuple[Ref, ...], name: str) -> dict[str, int]:
    return {f"{name}{i or ''}": ref.bytes for i, ref in enumerate(refs)}


def forward(op: Op, dtype: str) -> list[Kernel]:
    """The kernels of one operator's forward."""
    if op.conv is not None:
        return [kernel("fprop", "forward", op.path, fprop(op.conv, dtype), FPROP, shape=op.conv)]
    x, y = op.activations, op.outputs
    if op.name in BATCH_NORMS:
        stats = kernel("bn_stats", "forward", op.path, Traffic({"x": x[0].bytes}), FORWARD)
        moved = Traffic({"x": x[0].bytes}, {"y": y[0].bytes})
        apply = kernel("bn_apply", "forward", op.path, moved, FORWARD)
        return [stats, apply] if op.training else [apply]
    reads = _tensors(op.inputs if op.flops else x, "x")
    moved = Traffic(reads, _tensors(y, "y"), op.flops)
    return [kernel(op.name, "forward", op.path, moved, HEAD if op.flops else FORWARD)]


def backward(op: Op, dtype: str) -> list[Kernel]:
    """The kernels of one operator's backward: for the inputs that need a gradient."""
    wanted = [ref for ref in op.inputs if ref.needs_grad]
    if not wanted:
        return []
    x, y = op.activations, op.outputs[0]
    if op.conv is not None:
        return conv_backward(op, dtype)
    if op.flops:
        return _product_backward(op)

    def one(name: str, reads: dict[str, int], writes: dict[str, int]) -> Kernel:
        return kernel(name, "backward", op.path, Traffic(reads, writes), BACKWARD)

    if op.name in BATCH_NORMS:
        both = {"dy": y.bytes, "x": x[0].bytes}
        reduce = one("bn_bwd_reduce", both, {})
        apply = one("bn_bwd_apply", both, {"dx": x[0].bytes})
        return [reduce, apply] if x[0].needs_grad else [reduce]
    name = f"{op.name}_backward"
    writes = {f"d{k}": v for k, v in _tensors(tuple(wanted), "x").items()}
    if op.name in FREE_BACKWARD:
        return []
    if op.name == "relu":
        return [one(name, {"dy": y.bytes, "y": y.bytes}, writes)]
    if "max_pool" in op.name:
        return [one(name, {"dy": y.bytes, **_tensors(op.outputs[1:], "index")}, writes)]
    if op.name in LINEAR:
        return [one(name, {"dy": y.bytes}, writes)]
    return [one(name, {"dy": y.bytes, **_tensors(x, "x")}, writes)]


def conv_backward(op: Op, dtype: str) -> list[Kernel]:
    """dgrad and wgrad of a vendor's convolution, for what needs a gradient."""
    assert op.conv is not None
    found = []
    x, weight, *bias = op.inputs
    if x.needs_grad:
        moved = dgrad(op.conv, dtype)
        found.append(kernel("dgrad", "backward", op.path, moved, DGRAD, shape=op.conv))
    if weight.needs_grad:
        moved = wgrad(op.conv, dtype)
        found.append(kernel("wgrad", "backward", op.path, moved, WGRAD, shape=op.conv))
    if any(ref.needs_grad for ref in bias):
        moved = Traffic({"dy": op.outputs[0].bytes})
        found.append(kernel("bias_grad", "backward", op.path, moved, BACKWARD))
    return found


def _product_backward(op: Op) -> list[Kernel]:
    """Of a matrix product: one product for each factor, from dy and the other factors."""
    dy = {"dy": op.outputs[0].bytes}
    factors = op.inputs[1:] if op.name in ("addmm", "baddbmm") else op.inputs
    found = []
    for i, ref in enumerate(factors):
        if ref.needs_grad:
            others = tuple(factors[:i] + factors[i + 1 :])
            moved = Traffic({**dy, **_tensors(others, "x")}, {"dx": ref.bytes}, op.flops)
            found.append(kernel(f"{op.name}_backward", "backward", op.path, moved, HEAD))
    if len(factors) < len(op.inputs) and op.inputs[0].needs_grad:
        moved = Traffic(dy, {"dbias": op.inputs[0].bytes})
        found.append(kernel("bias_grad", "backward", op.path, moved, HEAD))
    return found
