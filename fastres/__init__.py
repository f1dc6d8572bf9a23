"""fastres: ResNets that train and serve faster, with the same numbers and the same checkpoints.

model = fastres.convert(model)
"""

from typing import TYPE_CHECKING

from . import nn, ops
from .backends import BackendError, use_backend
from .convert import ConvertError, convert, invalidate, report, revert, verify

if TYPE_CHECKING:
    from .graphs import graph
    from .tuning import tune

__version__ = "0.1.0"
__all__ = [
    "BackendError",
    "ConvertError",
    "__version__",
    "convert",
    "graph",
    "invalidate",
    "nn",
    "ops",
    "report",
    "revert",
    "roofline",
    "tune",
    "use_backend",
    "verify",
]

if not TYPE_CHECKING:

    def __getattr__(name: str):
        """`graph`, `roofline` and `tune` are imported when first asked for."""
        import importlib

        if name == "graph":
            return importlib.import_module("fastres.graphs").graph
        if name == "roofline":
            return importlib.import_module("fastres.roofline")
        if name == "tune":
            return importlib.import_module("fastres.tuning").tune
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
