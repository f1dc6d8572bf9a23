"""fastres: ResNets that train and serve faster, with the same numbers and the same checkpoints.

model = fastres.convert(model)
"""

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
    "use_backend",
    "verify",
]
