"""What torch's settings say of TF32, for every backend."""

from __future__ import annotations

import torch


def conv_tf32() -> bool:
    """Whether fp32 convolutions may be rounded to TF32, as cuDNN is told.

    torch resolves "none" through its parents (cudnn.fp32_precision, torch.backends.fp32_precision)
    and keeps the legacy flag, torch.backends.cudnn.allow_tf32, in step: but reading that flag
    raises once the newer settings were used.
    """
    return torch.backends.cudnn.conv.fp32_precision == "tf32"  # type: ignore[attr-defined]
