"""torchvision models by name, checkpoints, and running statistics that make sense."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastres.bench.options import UsageError, check_model_name

if TYPE_CHECKING:
    from torch import Tensor, nn

CLASSES = 1000
RESIDUAL_WEIGHT = 0.2


def build_model(name: str, seed: int = 0) -> nn.Module:
    """The torchvision model `name` with random weights from `seed`. Nothing is downloaded."""
    import torch
    import torchvision

    check_model_name(name)
    torch.manual_seed(seed)
    return getattr(torchvision.models, name)(weights=None)


def load_weights(model: nn.Module, name: str, file: str) -> None:
    """Loads a state_dict checkpoint into `model`, with one clear error when it does not fit."""
    accepted = f"a state_dict of torchvision's {name}, saved with torch.save or safetensors"
    state = _read_state_dict(file, accepted)
    wanted = model.state_dict()
    missing = [k for k in wanted if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in wanted]
    wrong = [
        f"{k} is {tuple(state[k].shape)}, not {tuple(v.shape)}"
        for k, v in wanted.items()
        if k in state and state[k].shape != v.shape
    ]
    if missing or unknown or wrong:
        parts = []
        if missing:
            parts.append(f"{len(missing)} keys missing ({_some(missing)})")
        if unknown:
            parts.append(f"{len(unknown)} unknown ({_some(unknown)})")
        if wrong:
            parts.append(f"{len(wrong)} of another shape ({_some(wrong)})")
        raise UsageError(
            f"argument --weights: '{file}' does not fit {name}: {'; '.join(parts)}. "
            f"Accepted: {accepted}"
        )
    model.load_state_dict(state, strict=False)


def _some(names: list[str]) -> str:
    return ", ".join(names[:2]) + (", ..." if len(names) > 2 else "")


def _read_state_dict(file: str, accepted: str) -> dict[str, Tensor]:
    import torch

    def refuse(what: str) -> UsageError:
        return UsageError(f"argument --weights: '{file}' is {what}. Accepted: {accepted}")

    try:
        if Path(file).suffix == ".safetensors":
            from safetensors.torch import load_file  # only those who have such files need it

            state: Any = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except ImportError as error:
        raise refuse("a safetensors file, and safetensors is not installed") from error
    except Exception as error:  # safetensors has its own type; torch.load's vary with the bytes
        raise refuse("not a checkpoint that can be read") from error
    for key in ("state_dict", "model"):  # how training scripts, torchvision's included, wrap it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        found = f"a {type(state).__name__}" if not isinstance(state, dict) else "a dict"
        raise refuse(f"{found}, not a dict of tensors")
    if not state:
        raise refuse("an empty dict")
    return {str(k).removeprefix("module."): v for k, v in state.items()}


def damp_residuals(model: nn.Module, weight: float = RESIDUAL_WEIGHT) -> None:
    """Sets the weight of the last BN of every block, as in a model that was trained a little.

    At 1, where torchvision starts, rounding grows from block to block: the bf16 gradients of eager
    PyTorch itself are then 110% off those in float64 (ResNet-50), and no comparison means anything.
    At 0.2 they are 25% off, and fp32 outputs are right to 1e-6.
    """
    import torch

    for module in model.modules():
        if hasattr(module, "downsample"):  # BasicBlock or Bottleneck
            last: Any = getattr(module, "bn3", None) or module.bn2
            torch.nn.init.constant_(last.weight, weight)


def settle_running_stats(model: nn.Module, x: Tensor, forwards: int = 3) -> None:
    """Gives a randomly initialised model the running statistics of `x`.

    With the initial 0 and 1, evaluation would not see normalised activations. Averages `forwards`
    training forwards (momentum=None) and puts momentum back.
    """
    import torch

    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    momenta = [m.momentum for m in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    was_training = model.training
    model.train()
    with torch.no_grad():
        for _ in range(forwards):
            model(x)
    model.train(was_training)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
