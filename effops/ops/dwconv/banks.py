"""Fixed kernel banks by name: values, and where they come from.

VGNet's kernels are those of its Appendix D (arXiv 2207.10318) as its authors' code had them in December 2021. Rows run
top to bottom, the operation is cross-correlation (as in `F.conv2d`) with zero padding 1; channel j uses kernel j mod K.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

Kernel = tuple[tuple[float, ...], ...]


def _fractions(rows: str) -> Kernel:
    def number(text: str) -> float:
        numerator, _, denominator = text.partition("/")
        return int(numerator) / int(denominator or 1)

    return tuple(tuple(number(text) for text in row.split()) for row in rows.split(";"))


def gaussian(sigma: float, size: int = 3, decimals: int | None = 4) -> Kernel:
    """exp(-r^2 / (2 sigma^2)) on a size x size grid, normalised to sum 1.

    VGNet's authors print and use it rounded to 4 decimals; pass decimals=None for full precision.
    """
    if not sigma > 0:
        raise ValueError(f"sigma must be positive; got {sigma!r}")
    if size < 1 or size % 2 == 0:
        raise ValueError(f"size must be a positive odd integer; got {size!r}")
    line = [math.exp(-(position**2) / (2 * sigma**2)) for position in range(-(size // 2), size // 2 + 1)]
    total = sum(line) ** 2
    values = [[a * b / total for b in line] for a in line]
    return tuple(tuple(v if decimals is None else round(v, decimals) for v in row) for row in values)


def binomial(size: int) -> Kernel:
    """Outer product of binomial coefficients, sum 1: [1 2 1]^T [1 2 1] / 16 for size 3 (BlurPool, arXiv 1904.11486)."""
    line = [math.comb(size - 1, position) for position in range(size)]
    return tuple(tuple(a * b / 4 ** (size - 1) for b in line) for a in line)


def negative(kernel: Kernel) -> Kernel:
    """The kernel with its sign turned."""
    return tuple(tuple(-v for v in row) for row in kernel)


SOBEL_Y = _fractions("-1/2 -1 -1/2 ; 0 0 0 ; 1/2 1 1/2")
SOBEL_X = _fractions("-1/2 0 1/2 ; -1 0 1 ; -1/2 0 1/2")
LAPLACIAN_8 = _fractions("-1/12 -2/12 -1/12 ; -2/12 1 -2/12 ; -1/12 -2/12 -1/12")
LAPLACIAN_4 = _fractions("0 -1/4 0 ; -1/4 1 -1/4 ; 0 -1/4 0")
DIAGONAL_DOWN = _fractions("-1 -2/3 -1/3 ; -2/3 0 2/3 ; 1/3 2/3 1")
DIAGONAL_UP = _fractions("-1/3 -2/3 -1 ; 2/3 0 -2/3 ; 1 2/3 1/3")
GAUSSIAN_1_1 = gaussian(1.1)
GAUSSIAN_0_6 = gaussian(0.6)

BANKS: dict[str, tuple[Kernel, ...]] = {
    # VGNet's six edge kernels and two Gaussians (F1, F2), and its two Sobel and two Laplacian kernels (F3, F4).
    "vgnet8": (
        SOBEL_Y, SOBEL_X, LAPLACIAN_8, LAPLACIAN_4, DIAGONAL_DOWN, DIAGONAL_UP, GAUSSIAN_1_1, GAUSSIAN_0_6,
    ),
    "vgnet4": (SOBEL_Y, SOBEL_X, LAPLACIAN_8, LAPLACIAN_4),
    # VGNet's downsampling blur, and the same with its sign turned on odd channels (the paper-era code).
    "vgnet_blur": (GAUSSIAN_1_1,),
    "vgnet_blur_alternate": (GAUSSIAN_1_1, negative(GAUSSIAN_1_1)),
    # BlurPool's filters.
    "binomial3": (binomial(3),),
    "binomial5": (binomial(5),),
}  # fmt: skip


CODES = {name: code for code, name in enumerate(BANKS, 1)}  # as the operators receive them; 0: no named bank


class NamedBank(NamedTuple):
    """A caller's tensor that holds a named bank: an operator may take the bank's constants instead of reading it.

    Attributes:
        values: [K,1,R,S]. Casting them is casting the bank: a test sees that rounding twice is rounding once.
        code: of `CODES`. Whoever makes this vouches for it; nothing compares the values again.

    Example:
        >>> from effops.ops.dwconv.banks import CODES, NamedBank, bank
        >>> known = NamedBank(bank("vgnet8"), CODES["vgnet8"])
        >>> x = torch.randn(1, 16, 9, 9)
        >>> torch.equal(EF.fixed_filter_conv2d(x, known), EF.fixed_filter_conv2d(x, "vgnet8"))
        True
    """

    values: Tensor
    code: int


def bank(name: str, *, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None) -> Tensor:
    """The bank of that name as a tensor [K,1,R,S].

    Args:
        name: "vgnet8" (six edge kernels, two Gaussians), "vgnet4" (two Sobel, two Laplacian kernels), "vgnet_blur",
            "vgnet_blur_alternate" (with its negative), "binomial3" or "binomial5".
        dtype, device: of the tensor.

    Returns:
        [K,1,R,S].

    Raises:
        ValueError: an unknown name.

    Example:
        >>> from effops.ops.dwconv.banks import bank
        >>> bank("vgnet8").shape, bank("binomial3").flatten() * 16
        (torch.Size([8, 1, 3, 3]), tensor([1., 2., 1., 2., 4., 2., 1., 2., 1.]))
    """
    if name not in BANKS:
        raise ValueError(f"unknown bank {name!r}; accepted: {', '.join(map(repr, BANKS))}, or a tensor [K,R,S]")
    return torch.tensor(BANKS[name], dtype=dtype, device=device).unsqueeze(1)


def code_of(weight: Tensor) -> int:
    """Code of the named bank whose values, rounded to its dtype, `weight` [K,1,R,S] holds; 0: of none.

    Reads the tensor: on a GPU it waits for the device.
    """
    held = weight.detach().cpu()
    for name, code in CODES.items():
        if torch.equal(held, bank(name, dtype=weight.dtype, device="cpu")):
            return code
    return 0
