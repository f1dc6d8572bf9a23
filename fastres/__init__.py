"""fastres: ResNets that train and serve faster, with the same numbers and the same checkpoints.

model = fastres.convert(model)
"""

from typing import TYPE_CHECKING

from . import nn, ops
from .backends import BackendError, use_backend
from .convert import ConvertError, convert, invalidate, report, revert, verify

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "ConvertError",
    "__version__",
    "convert",
    "invalidate",
    "nn",
    "ops",
    "report",
    "revert",
    "roofline",
    "use_backend",
    "verify",
]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        """`roofline` is imported when first asked for."""
        if name == "roofline":
            import importlib

            return importlib.import_module("fastres.roofline")
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
