"""Max pooling with a blur before it subsamples."""

from __future__ import annotations

from torch import Tensor, nn

import effops.functional as EF
from effops.functional.blurmaxpool import MAX_FILTER_SIZE, PADDING_MODES
from effops.modules._arguments import IntOrPair, check_int, check_pair


class BlurMaxPool2d(nn.Module):
    """y = blur(max_pool2d(x, kernel_size, 1, padding), stride), one kernel; nothing learned, nothing stored.

    Zhang, "Making Convolutional Networks Shift-Invariant Again" (arXiv 1904.11486). The defaults are mosaicml's
    BlurMaxPool2d ("Nuts & Bolts", arXiv 2205.12050); Zhang's own is filter_size=4, padding_mode="reflect".

    Args:
        kernel_size: of the max pool, int or (height, width); its stride is 1.
        stride: of the blur, int or (height, width).
        padding: of the max pool, at most half of its window.
        filter_size: of the binomial blur, 1 to 7.
        padding_mode: of the blur, 'zeros' or 'reflect'.
        backend: as in `effops.functional`.

    Shape:
        [N, C, H, W] -> [N, C, P, Q], P = (H + 2 * padding - kernel_size) // stride + 1.

    Raises:
        TypeError, ValueError: an argument of a wrong kind or value.

    Example:
        >>> pool, x = effops.BlurMaxPool2d(), torch.randn(1, 8, 14, 14)
        >>> torch.equal(pool(x), EF.blur_max_pool2d(x)), pool(x).shape
        (True, torch.Size([1, 8, 7, 7]))
    """

    def __init__(
        self,
        kernel_size: IntOrPair = 2,
        stride: IntOrPair = 2,
        padding: IntOrPair = 0,
        *,
        filter_size: int = 3,
        padding_mode: str = "zeros",
        backend: str = "auto",
    ) -> None:
        super().__init__()
        where = type(self).__name__
        self.kernel_size = check_pair(where, "kernel_size", kernel_size)
        self.stride = check_pair(where, "stride", stride)
        self.padding = check_pair(where, "padding", padding, 0)
        if any(2 * pad > window for pad, window in zip(self.padding, self.kernel_size, strict=True)):
            raise ValueError(f"{where}: padding must be at most half of kernel_size {kernel_size}, got {padding}")
        if check_int(where, "filter_size", filter_size) > MAX_FILTER_SIZE:
            raise ValueError(f"{where}: filter_size must be at most {MAX_FILTER_SIZE}, got {filter_size}")
        if padding_mode not in PADDING_MODES:
            raise ValueError(f"{where}: unknown padding_mode {padding_mode!r}; accepted: {', '.join(PADDING_MODES)}")
        self.filter_size = filter_size
        self.padding_mode = padding_mode
        self.backend = backend

    def forward(self, input: Tensor) -> Tensor:
        """[N, C, H, W] -> [N, C, P, Q]."""
        return EF.blur_max_pool2d(
            input,
            self.kernel_size,
            self.stride,
            self.padding,
            filter_size=self.filter_size,
            padding_mode=self.padding_mode,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        text = f"kernel_size={self.kernel_size}, stride={self.stride}, padding={self.padding}"
        return f"{text}, filter_size={self.filter_size}, padding_mode={self.padding_mode!r}"
