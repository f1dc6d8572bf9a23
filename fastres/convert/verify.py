"""Is the fused module the same function? Forward, gradients and running statistics against the
original.

The judge is the original in float64. A fused result passes when its max and RMS error against it
are at most 2x those of the original in its own dtype, plus a floor (`FLOOR`, relative to the
largest true value): DESIGN.md section 3.

A ReLU whose input lies within rounding of 0 may open in one and stay shut in the other; both are
right, and the gradients differ by that element's whole contribution. A block is therefore tried on
up to ATTEMPTS slightly different samples, of which a wrong kernel fails each; a whole network,
where such elements are certain and are amplified layer by layer, is held to the RMS error of its
gradients with NETWORK_GRADIENT_FLOOR."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

FACTOR = 2.0
ATTEMPTS = 3
NETWORK_GRADIENT_FLOOR = 5e-2
FLOOR = {torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float64: 1e-12}


@dataclass(frozen=True)
class Difference:
    """One compared tensor: errors relative to the largest true magnitude (max) and to the true RMS
    (rms)."""

    name: str
    ours_max: float
    theirs_max: float
    ours_rms: float
    theirs_rms: float
    floor: float
    rms_only: bool = False

    @property
    def excess(self) -> float:
        """Error over what is allowed; at most 1 passes."""
        rms = self.ours_rms / (FACTOR * self.theirs_rms + self.floor)
        return (
            rms
            if self.rms_only
            else max(rms, self.ours_max / (FACTOR * self.theirs_max + self.floor))
        )

    @property
    def ok(self) -> bool:
        return self.excess <= 1

    def __str__(self) -> str:
        return (
            f"{self.name}: relative error {self.ours_max:.2e} (max), {self.ours_rms:.2e} (rms); "
            f"the original has {self.theirs_max:.2e}, {self.theirs_rms:.2e}"
        )


@dataclass(frozen=True)
class Verification:
    """All compared tensors; `ok` when each passes."""

    differences: tuple[Difference, ...]

    @property
    def ok(self) -> bool:
        return all(d.ok for d in self.differences)

    @property
    def worst(self) -> Difference:
        """The tensor furthest over (or nearest to) what is allowed."""
        return max(self.differences, key=lambda d: d.excess)

    def __str__(self) -> str:
        verdict = "same function" if self.ok else "NOT the same function"
        return f"{verdict}; {len(self.differences)} tensors compared, worst {self.worst}"


def _errors(value: Tensor, truth: Tensor) -> tuple[float, float]:
    """(max, rms) error of value, relative to the largest and the RMS magnitude of truth."""
    truth = truth.double()
    diff = value.double() - truth
    same = (value.double() == truth) | (value.isnan() & truth.isnan())
    diff = torch.where(same, 0.0, diff).nan_to_num(nan=torch.inf)
    scale_max = truth.abs().max().item() or 1.0
    scale_rms = truth.square().mean().sqrt().item() or 1.0
    return diff.abs().max().item() / scale_max, diff.square().mean().sqrt().item() / scale_rms


def difference(
    name: str, ours: Tensor, theirs: Tensor, truth: Tensor, network: bool = False
) -> Difference:
    """Compare ours and theirs with the float64 truth; the floor is that of theirs' dtype."""
    floor = FLOOR[theirs.dtype]
    rms_only = network and "gradient" in name
    if rms_only:
        floor = max(floor, NETWORK_GRADIENT_FLOOR)
    ours_max, ours_rms = _errors(ours, truth)
    theirs_max, theirs_rms = _errors(theirs, truth)
    return Difference(name, ours_max, theirs_max, ours_rms, theirs_rms, floor, rms_only)


Call = Callable[[nn.Module, Tensor], Tensor]


def _run(module: nn.Module, call: Call, x: Tensor, training: bool) -> dict[str, Tensor]:
    """Output, gradients, buffers and inference output of one call."""
    module.train(training)
    module.zero_grad(set_to_none=True)
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(x.is_floating_point())
    out = call(module, x)
    generator = torch.Generator(device="cpu").manual_seed(0)
    dz = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out)
    found = {"output": out.detach()}
    if out.requires_grad:
        out.backward(dz.contiguous(memory_format=torch.preserve_format))
        found["input gradient"] = x.grad if x.grad is not None else torch.zeros_like(x)
    for name, p in module.named_parameters():
        if p.grad is not None:
            found[f"gradient of {name}"] = p.grad
    for name, b in module.named_buffers():
        if b.is_floating_point():
            found[f"buffer {name}"] = b.detach().clone()
    with torch.no_grad():
        found["output without gradients"] = call(module, x.detach()).clone()
    return found


def compare(
    original: nn.Module,
    original_call: Call,
    fused: nn.Module,
    fused_call: Call,
    x: Tensor,
    network: bool = False,
    modes: tuple[bool, ...] = (True, False),
) -> Verification:
    """Run both on x, in train (True) and in eval mode, against the original in float64; none of
    the arguments is changed."""
    differences = []
    truth = copy.deepcopy(original).double()
    theirs, ours = copy.deepcopy(original), copy.deepcopy(fused)
    for mode in modes:
        with torch.enable_grad():
            expected = _run(truth, original_call, x.double(), mode)
            got_theirs = _run(theirs, original_call, x, mode)
            got_ours = _run(ours, fused_call, x, mode)
        if got_ours.keys() != got_theirs.keys():
            missing = sorted(got_ours.keys() ^ got_theirs.keys())
            raise AssertionError(f"fused and original disagree on what exists: {missing}")
        label = "train" if mode else "eval"
        differences += [
            difference(f"{label} {name}", got_ours[name], got_theirs[name], expected[name], network)
            for name in expected
        ]
    return Verification(tuple(differences))


def compare_block(
    original: nn.Module,
    original_call: Call,
    fused: nn.Module,
    fused_call: Call,
    x: Tensor,
    modes: tuple[bool, ...] = (True, False),
) -> Verification:
    """`compare` on up to ATTEMPTS samples near x; the first that passes counts, otherwise the
    last."""
    generator = torch.Generator().manual_seed(0)
    for attempt in range(ATTEMPTS):
        if attempt:
            noise = torch.randn(x.shape, generator=generator, dtype=torch.float64)
            spread = x.detach().double().std(correction=0).cpu()
            x = x + (0.05 * spread * noise).to(x)
        result = compare(original, original_call, fused, fused_call, x, modes=modes)
        if result.ok:
            break
    return result


def verify(original: nn.Module, converted: nn.Module, sample: Tensor) -> Verification:
    """Compare a converted network with its original on a sample, forward, gradients, running
    statistics, inference.

    Both are deep-copied first. sample: (N, C, H, W), the dtype and device of the parameters.
    Returns a Verification; `.ok` is the verdict and `str()` names the worst tensor. Raises
    TypeError or ValueError for a bad argument."""
    for name, m in (("original", original), ("converted", converted)):
        if not isinstance(m, nn.Module):
            raise TypeError(f"verify: {name} must be a torch.nn.Module, got {type(m).__name__}")
    check_sample("verify", original, sample)
    return compare(original, _call, converted, _call, sample, network=True)


def _call(m: nn.Module, x: Tensor) -> Tensor:
    return m(x)


def check_sample(op: str, model: nn.Module, sample: Tensor) -> None:
    if not isinstance(sample, Tensor):
        raise TypeError(f"{op}: the sample must be a Tensor, got {type(sample).__name__}")
    if sample.dim() != 4 or sample.numel() == 0:
        raise ValueError(
            f"{op}: the sample must be a non-empty (N, C, H, W) batch, got shape "
            f"{tuple(sample.shape)}"
        )
    p = next(model.parameters(), None)
    if p is not None and (p.dtype != sample.dtype or p.device != sample.device):
        raise ValueError(
            f"{op}: the sample is {sample.dtype} on {sample.device}, the model {p.dtype} on "
            f"{p.device}; they must agree"
        )
