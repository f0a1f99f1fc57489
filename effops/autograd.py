"""One documented `torch.autograd.Function` per operator: public API for layers of one's own on the kernels."""

from effops.ops.dsconv import DSConv2dFunction, DSConvNorm2dFunction
from effops.ops.dwconv import DepthwiseConv2dFunction, DepthwiseStatsFunction

__all__ = ["DSConv2dFunction", "DSConvNorm2dFunction", "DepthwiseConv2dFunction", "DepthwiseStatsFunction"]
