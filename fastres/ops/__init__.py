"""The fused operations, also as `torch.ops.fastres.*`. Each docstring opens with its formula."""

from ._args import BatchNorm, Conv
from .add_relu import add_relu
from .bn_act import bn_add_relu, bn_relu
from .bn_relu_maxpool import bn_relu_maxpool
from .conv_bn import conv_bn, conv_bn_add_relu, conv_bn_relu
from .conv_bn_relu_maxpool import conv_bn_relu_maxpool
from .residual_stage import Block, Unit, residual_block, residual_stage

__all__ = [
    "BatchNorm",
    "Block",
    "Conv",
    "Unit",
    "add_relu",
    "bn_add_relu",
    "bn_relu",
    "bn_relu_maxpool",
    "conv_bn",
    "conv_bn_add_relu",
    "conv_bn_relu",
    "conv_bn_relu_maxpool",
    "residual_block",
    "residual_stage",
]
