"""The torch library `fastres`: schema, implementation, fake and autograd of an op in one call."""

from __future__ import annotations

from collections.abc import Callable

import torch

LIBRARY = torch.library.Library("fastres", "DEF")


def define(
    schema: str,
    impl: Callable,
    fake: Callable,
    setup: Callable | None = None,
    backward: Callable | None = None,
    check: Callable | None = None,
) -> None:
    """Register `torch.ops.fastres.<name>`; one implementation for every device, the backend is
    chosen inside.

    check: takes the op's arguments and raises where the kernels would read what is not there; for
    those who call torch.ops.fastres by hand."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    LIBRARY.impl(name, _checked(impl, check), "CompositeExplicitAutograd")
    torch.library.register_fake(f"fastres::{name}", fake, lib=LIBRARY)
    if backward is not None:
        backward = _skip_undefined(backward, torch._C.parse_schema(f"fastres::{schema}"))
        torch.library.register_autograd(
            f"fastres::{name}", backward, setup_context=setup, lib=LIBRARY
        )


def _checked(impl: Callable, check: Callable | None) -> Callable:
    if check is None:
        return impl

    def run(*args):
        check(*args)
        return impl(*args)

    return run


def _skip_undefined(backward: Callable, schema: torch._C.FunctionSchema) -> Callable:
    """backward, called only when the gradient of the first output exists; without it every input's
    is None.

    (Gradients are not materialised: the statistics and masks that ops return would each get
    zeros.)"""
    count = len(schema.arguments)

    def run(ctx, *grads):
        if grads[0] is None:
            return (None,) * count
        return backward(ctx, *grads)

    return run


def refuse_double_backward(name: str) -> tuple[Callable, Callable]:
    """(setup, backward) for an op that computes gradients: differentiating it again is an error,
    never zeros."""

    def setup(ctx, inputs, output):  # noqa: ANN001
        pass

    def backward(ctx, *grads):  # noqa: ANN001
        raise RuntimeError(
            f"fastres::{name}: double backward is not supported (the gradient of a fused op's "
            f"gradient). "
            "Call fastres.revert(model), or leave this module out of convert, to differentiate "
            "twice."
        )

    return setup, backward


def plain_eager(*tensors: torch.Tensor | None) -> bool:
    """Whether nothing watches the dispatcher (compile, export, modes, subclasses, vmap),
    so that it may be skipped with these tensors."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and all(type(t) in _PLAIN for t in tensors)
    )


def plain_backward(dz: torch.Tensor) -> bool:
    """As plain_eager, of a backward that is not to be differentiated; false for the batches of
    torch.autograd.grad(is_grads_batched=True), too."""
    return (
        not torch.is_grad_enabled()
        and plain_eager(dz)
        and not torch._C._functorch.is_legacy_batchedtensor(dz)
    )


_PLAIN = (torch.Tensor, torch.nn.Parameter, type(None))
