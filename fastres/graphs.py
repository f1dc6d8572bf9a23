"""`fastres.graph`: a model's inference, or a whole training step, captured as one CUDA graph.

At batch 1 a ResNet-50 waits for its several hundred launches, not for the GPU; a graph replays all
of them in one. On torch's own utilities (torch.cuda.graph): nothing of the model changes, the
kernels are the same and so are the numbers.

A graph is fixed: shapes, dtypes, train/eval modes and the optimiser's Python numbers. Each is
checked at every call. Inputs are copied into the graph's buffers, outputs copied out of them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

log = logging.getLogger("fastres")
_said: set[str] = set()

WARMUP = 3  # steps before the capture: cuDNN's choice of algorithm, Triton's compilation


class Graphed:
    """A captured call: `graphed(*inputs)` with tensors like the sample's; returns fresh tensors.

    captured: whether a CUDA graph is replayed (False on the CPU)."""

    def __init__(
        self,
        call: Callable[..., Any],
        sample: tuple[Tensor, ...],
        modules: nn.Module,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        self._call, self._optimizer = call, optimizer
        self._like = [(tuple(t.shape), t.dtype, t.device) for t in sample]
        self._modes = [(path, m, m.training) for path, m in modules.named_modules()]
        self._numbers = _numbers(optimizer)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._inputs: tuple[Tensor, ...] = ()
        self._output: Any = None

    @property
    def captured(self) -> bool:
        return self._graph is not None

    def __call__(self, *inputs: Tensor) -> Any:
        self._check(inputs)
        if self._graph is None:
            return self._call(*inputs)
        for buffer, given in zip(self._inputs, inputs, strict=True):
            buffer.copy_(given, non_blocking=True)
        self._graph.replay()
        return tree_map(lambda t: t.clone() if isinstance(t, Tensor) else t, self._output)

    def _check(self, inputs: Sequence[object]) -> None:
        if len(inputs) != len(self._like):
            raise ValueError(
                f"fastres.graph: captured with {len(self._like)} input(s), called with "
                f"{len(inputs)}"
            )
        for i, (given, like) in enumerate(zip(inputs, self._like, strict=True)):
            if not isinstance(given, Tensor):
                raise TypeError(
                    f"fastres.graph: input {i} must be a Tensor, got {type(given).__name__}"
                )
            found = tuple(given.shape), given.dtype, given.device
            for what, a, b in zip(("shape", "dtype", "device"), found, like, strict=True):
                if a != b:
                    raise ValueError(
                        f"fastres.graph: input {i} has {what} {a}, the sample of the capture had "
                        f"{b}; a graph is fixed: capture another one for it"
                    )
        changed = next((path for path, m, flag in self._modes if m.training != flag), None)
        if changed is not None:
            raise RuntimeError(
                f"fastres.graph: {changed or 'the model'} was switched between train and eval "
                "after the capture, which the graph cannot see; capture again"
            )
        for key, number in _numbers(self._optimizer).items():
            if self._numbers.get(key) != number:
                raise RuntimeError(
                    f"fastres.graph: the optimizer's {key[1]} was {self._numbers.get(key)} at the "
                    f"capture and is {number} now, which the graph cannot see; make it a tensor "
                    "(lr=torch.tensor(...)), or capture again"
                )


def graph(
    model: nn.Module,
    sample: Tensor | Sequence[Tensor],
    *,
    step: Callable[..., Any] | None = None,
    loss_fn: Callable[..., Tensor] | None = None,
    optimizer: torch.optim.Optimizer | None = None,
    warmup: int = WARMUP,
    pool: Any = None,
) -> Graphed:
    """Capture what `model` does on inputs like `sample` as a CUDA graph, and return it as a call.

        infer = fastres.graph(model.eval(), x);                       z = infer(x)
        train = fastres.graph(model, (x, y), loss_fn=F.cross_entropy, optimizer=sgd)
        loss = train(x, y)                                            # the whole step

    sample: the input, or the tuple of inputs of the call: they give shapes, dtypes, devices, and
        values for the warm-up.
    loss_fn, optimizer: together: zero_grad, loss = loss_fn(model(sample[0]), *sample[1:]),
        backward, optimizer.step(). The loss is returned.
    step: instead of these, any `step(*inputs)` that does all of it (two optimisers, a loss scale);
        `optimizer` may be given too, so that its state is kept.
    pool: torch.cuda.graph_pool_handle(), to share memory with graphs that run in turn.

    Autocast as it is around this call is captured. Warm-up steps run on a side stream; parameters,
    buffers (running statistics, num_batches_tracked), optimiser state and the random number
    generators are put back after it, so that the first call is the first step.

    On the CPU nothing is captured: the same checks, then the plain call; said once in the log.

    Raises ValueError for a model in train mode without a step, a training BatchNorm with
    momentum=None (its factor 1 / num_batches_tracked is read by the host), SGD with dampening
    (its first step differs from the others), inputs on several devices; on CUDA for an optimizer
    with capturable=False, or one that makes state in a way that cannot be put back."""
    tensors = (sample,) if isinstance(sample, Tensor) else tuple(sample)
    device = _check_sample(model, tensors)
    if step is not None and loss_fn is not None:
        raise ValueError("fastres.graph: give step, or loss_fn and optimizer, not both")
    if (loss_fn is None) != (optimizer is None) and step is None:
        raise ValueError("fastres.graph: loss_fn and optimizer go together")
    if step is None and loss_fn is None:
        if model.training:
            raise ValueError(
                "fastres.graph: the model is in train mode; call model.eval(), or give loss_fn and "
                "optimizer to capture a training step"
            )
        call = _inference(model)
    else:
        _check_training(model, optimizer, device)
        call = step if step is not None else _step(model, loss_fn, optimizer)  # type: ignore[arg-type]
    call = _under_autocast(call, device)
    made = Graphed(call, tensors, model, optimizer)
    if device.type != "cuda":
        _say_once(f"fastres.graph: the sample is on {device.type}, where nothing is captured")
        return made
    _capture(made, call, tensors, model, optimizer, warmup, pool)
    return made


def _check_sample(model: nn.Module, tensors: tuple[Tensor, ...]) -> torch.device:
    if not isinstance(model, nn.Module):
        raise TypeError(f"fastres.graph: model must be a Module, got {type(model).__name__}")
    if not tensors or not all(isinstance(t, Tensor) for t in tensors):
        raise TypeError("fastres.graph: sample must be a Tensor or a non-empty tuple of Tensors")
    devices = {t.device for t in (*tensors, *model.parameters(), *model.buffers())}
    if len(devices) > 1:
        named = ", ".join(sorted(map(str, devices)))
        raise ValueError(f"fastres.graph: model and sample must be on one device, found {named}")
    return devices.pop()


def _check_training(
    model: nn.Module, optimizer: torch.optim.Optimizer | None, device: torch.device
) -> None:
    for path, m in model.named_modules():
        if (
            isinstance(m, nn.modules.batchnorm._NormBase)
            and m.training
            and m.track_running_stats
            and m.momentum is None
        ):
            raise ValueError(
                f"fastres.graph: {path} has momentum=None: the weight of a batch, "
                "1 / num_batches_tracked, is a number of the host, which a graph would freeze. "
                "Give it a momentum, or put it in eval mode"
            )
    for group in optimizer.param_groups if optimizer is not None else ():
        if group.get("dampening"):
            raise ValueError(
                "fastres.graph: SGD with dampening: its first step differs from the others, and a "
                "graph has one"
            )
        if device.type == "cuda" and not group.get("capturable", True):
            raise ValueError(
                f"fastres.graph: {type(optimizer).__name__} counts its steps on the host, which a "
                "graph cannot see; make it with capturable=True"
            )


def _inference(model: nn.Module) -> Callable[..., Any]:
    def call(*inputs: Tensor) -> Any:
        with torch.no_grad():
            return model(*inputs)

    return call


def _step(
    model: nn.Module, loss_fn: Callable[..., Tensor], optimizer: torch.optim.Optimizer
) -> Callable[..., Tensor]:
    def call(x: Tensor, *rest: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = loss_fn(model(x), *rest)
        with torch.autocast(x.device.type, enabled=False):
            loss.backward()
            optimizer.step()
        return loss.detach()

    return call


def _under_autocast(call: Callable[..., Any], device: torch.device) -> Callable[..., Any]:
    """`call` under the autocast of this moment. Without its cache, which outlives a step: a graph
    would go on using the weights that were cast before the capture."""
    kind = device.type
    if not torch.amp.is_autocast_available(kind) or not torch.is_autocast_enabled(kind):
        return call
    dtype = torch.get_autocast_dtype(kind)

    def run(*inputs: Tensor) -> Any:
        with torch.autocast(kind, dtype=dtype, cache_enabled=False):
            return call(*inputs)

    return run


def _numbers(optimizer: torch.optim.Optimizer | None) -> dict[tuple[int, str], Any]:
    """The Python numbers of an optimiser's groups, which a capture freezes."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {
        (i, name): value
        for i, group in enumerate(groups)
        for name, value in group.items()
        if isinstance(value, (int, float, tuple))
    }


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning(text)


class _Kept:
    """Everything a warm-up may change, to be put back in place. What the optimiser's state starts
    at is read while the warm-up's first step makes it: a `with` around the warm-up."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer | None) -> None:
        self.optimizer = optimizer
        self.tensors = [(t, t.detach().clone()) for t in (*model.parameters(), *model.buffers())]
        known = {id(t) for t, _ in self.tensors}
        groups = [] if optimizer is None else optimizer.param_groups
        self.tensors += [
            (p, p.detach().clone()) for g in groups for p in g["params"] if id(p) not in known
        ]
        self.state: dict[tuple[Tensor, str], Any] = {}
        if optimizer is not None:
            self._read(optimizer, list(optimizer.state))

    def _read(self, optimizer: torch.optim.Optimizer, parameters: list[Tensor]) -> None:
        for p in parameters:
            for name, value in optimizer.state.get(p, {}).items():
                if (p, name) not in self.state:
                    self.state[p, name] = copy.deepcopy(value)

    def __enter__(self) -> _Kept:
        # torch's optimisers make the state of a group's parameters in _init_group, then step
        optimizer = self.optimizer
        make = getattr(optimizer, "_init_group", None)
        if optimizer is None or make is None:
            return self
        read: set[int] = set()

        def made(group: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            answer = make(group, *args, **kwargs)
            if id(group) not in read:  # later it is no more what it started at
                read.add(id(group))
                self._read(optimizer, group["params"])
            return answer

        optimizer._init_group = made  # type: ignore[attr-defined]
        return self

    def __exit__(self, *error: object) -> None:
        if self.optimizer is not None:
            self.optimizer.__dict__.pop("_init_group", None)

    @torch.no_grad()
    def restore(self) -> None:
        """Raises ValueError, all else put back, when a graph could not go on from this state."""
        for tensor, value in self.tensors:
            tensor.copy_(value)
        wrong: dict[str, str] = {}
        for p, values in self.optimizer.state.items() if self.optimizer is not None else ():
            for name, now in list(values.items()):
                before = self.state.get((p, name))
                if isinstance(now, Tensor) and isinstance(before, Tensor):
                    moved = now.device != p.device and not torch.equal(now, before)
                    if moved and _counts(self.optimizer, name):
                        wrong[name] = "changes on the host, which a graph cannot see"
                    now.copy_(before)
                elif (p, name) in self.state and type(now) is type(before):
                    if isinstance(now, (int, float)) and now != before:
                        wrong[name] = "changes on the host, which a graph cannot see"
                    values[name] = before
                elif isinstance(now, Tensor) and isinstance(self.optimizer, torch.optim.SGD):
                    now.zero_()  # its momentum is the first gradient: as one step from 0
                elif now is not None:
                    wrong[name] = "starts at what only its first step knows; take one step before"
                    del values[name]
        for name, why in wrong.items():
            raise ValueError(
                f"fastres.graph: {type(self.optimizer).__name__} has a state {name!r} that {why}"
            )


def _counts(optimizer: torch.optim.Optimizer | None, name: str) -> bool:
    """Whether the numbers depend on a state that is kept on the host."""
    if isinstance(optimizer, torch.optim.Adagrad) and name == "step":
        return any(group["lr_decay"] for group in optimizer.param_groups)
    return True


def _capture(
    made: Graphed,
    call: Callable[..., Any],
    sample: tuple[Tensor, ...],
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    warmup: int,
    pool: Any,
) -> None:
    device = sample[0].device
    with torch.cuda.device(device):
        inputs = tuple(t.detach().clone(memory_format=torch.preserve_format) for t in sample)
        kept = _Kept(model, optimizer)
        rng = torch.cuda.get_rng_state(device)
        # 1. warm up on a side stream, as capture runs on one
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), kept:
            for _ in range(max(warmup, 1)):
                call(*inputs)
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        # 2. put back what it changed; gradients are to be allocated by the graph
        kept.restore()
        for t, _ in kept.tensors:
            t.grad = None
        torch.cuda.set_rng_state(rng, device)
        # 3. capture: nothing runs, so that nothing changes
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured, pool=pool):
            made._output = call(*inputs)
        made._inputs, made._graph = inputs, captured
