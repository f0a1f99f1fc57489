"""The fixed kernels' values: VGNet's as printed (four decimals), the binomials by their definition."""

from __future__ import annotations

import pytest
import torch
from module_helpers import bank_codes

import effops.functional as EF
from effops.ops.dwconv import banks

HALF, THIRD, SIXTH, TWELFTH = 1 / 2, 1 / 3, 1 / 6, 1 / 12
EDGES = [
    [[-HALF, -1, -HALF], [0, 0, 0], [HALF, 1, HALF]],
    [[-HALF, 0, HALF], [-1, 0, 1], [-HALF, 0, HALF]],
    [[-TWELFTH, -SIXTH, -TWELFTH], [-SIXTH, 1, -SIXTH], [-TWELFTH, -SIXTH, -TWELFTH]],
    [[0, -1 / 4, 0], [-1 / 4, 1, -1 / 4], [0, -1 / 4, 0]],
    [[-1, -2 * THIRD, -THIRD], [-2 * THIRD, 0, 2 * THIRD], [THIRD, 2 * THIRD, 1]],
    [[-THIRD, -2 * THIRD, -1], [2 * THIRD, 0, -2 * THIRD], [1, 2 * THIRD, THIRD]],
]
GAUSSIAN_1_1 = [[0.0811, 0.1226, 0.0811], [0.1226, 0.1853, 0.1226], [0.0811, 0.1226, 0.0811]]
GAUSSIAN_0_6 = [[0.0277, 0.1110, 0.0277], [0.1110, 0.4452, 0.1110], [0.0277, 0.1110, 0.0277]]
GAUSSIAN_1_0 = [[0.0751, 0.1238, 0.0751], [0.1238, 0.2042, 0.1238], [0.0751, 0.1238, 0.0751]]


def test_vgnet_banks_are_the_printed_ones() -> None:
    expected = torch.tensor([*EDGES, GAUSSIAN_1_1, GAUSSIAN_0_6], dtype=torch.float64)[:, None]
    found = banks.bank("vgnet8", dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-15)
    assert torch.equal(banks.bank("vgnet4", dtype=torch.float64), found[:4])
    assert torch.equal(banks.bank("vgnet_blur", dtype=torch.float64), found[6:7])
    assert torch.equal(banks.bank("vgnet_blur_alternate", dtype=torch.float64), torch.cat((found[6:7], -found[6:7])))


def test_sums() -> None:
    sums = banks.bank("vgnet8", dtype=torch.float64).sum((1, 2, 3))
    assert sums[:6].abs().max() < 1e-15
    assert (sums[6:] - 1).abs().max() < 5e-4  # four decimals
    for name in ("binomial3", "binomial5"):
        assert banks.bank(name, dtype=torch.float64).sum() == 1


def test_gaussian_of_any_sigma() -> None:
    assert banks.gaussian(1.0) == tuple(map(tuple, GAUSSIAN_1_0))
    full = torch.tensor(banks.gaussian(0.8, 5, decimals=None), dtype=torch.float64)
    assert full.shape == (5, 5) and abs(full.sum() - 1) < 1e-15
    ratio = torch.log(full[2, 2] / full[0, 1])  # r^2 = 4 + 1
    torch.testing.assert_close(ratio, torch.tensor(5 / (2 * 0.8**2), dtype=torch.float64))


def test_binomials() -> None:
    assert torch.equal(banks.bank("binomial3")[0, 0] * 16, torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]]))
    line = torch.tensor([1.0, 4, 6, 4, 1])
    assert torch.equal(banks.bank("binomial5")[0, 0] * 256, torch.outer(line, line))


@pytest.mark.parametrize("multiplier", [1, 8])
def test_output_channel_o_uses_kernel_o_mod_k(multiplier: int, backend: str) -> None:
    x = torch.zeros(1, 12, 3, 3, dtype=torch.float64)
    x[:, :, 1, 1] = 1  # an impulse gives the kernel, turned by 180 degrees
    out = EF.fixed_filter_conv2d(x, "vgnet8", multiplier=multiplier, backend=backend)[0].flip(1, 2)
    bank = banks.bank("vgnet8", dtype=torch.float64)[:, 0]
    for channel in range(12 * multiplier):
        assert torch.equal(out[channel], bank[channel % 8])


def test_operators_receive_the_code_of_a_named_bank_only() -> None:
    """A backend may compile a named bank's values in: the code must never stand beside other values."""
    x = torch.zeros(1, 8, 5, 5)
    with bank_codes() as seen:
        for name in banks.BANKS:
            EF.fixed_filter_conv2d(x, name)
            EF.ds_conv2d(x, name, torch.zeros(3, 8, 1, 1), padding=1)
            EF.depthwise_stats2d(x, name)
        EF.fixed_filter_conv2d(x, banks.bank("vgnet8"))
        EF.depthwise_conv2d(x, torch.zeros(8, 1, 3, 3))
    assert seen == [code for code in range(1, len(banks.BANKS) + 1) for _ in range(3)] + [0, 0]


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
@pytest.mark.parametrize("name", banks.BANKS)
def test_a_bank_is_recognised_in_every_dtype_and_after_casts(name: str, dtype: torch.dtype) -> None:
    """Kernels have the values rounded once; a module's may have been rounded to float32 before."""
    bank = banks.bank(name, dtype=dtype)
    assert banks.code_of(bank) == banks.CODES[name]
    assert torch.equal(banks.bank(name, dtype=torch.float32).to(dtype), bank) or dtype == torch.float64
    assert banks.code_of(bank[:, :, :, :-1]) == 0
    changed = bank.clone()
    changed[-1, 0, 1, 1] = torch.nextafter(changed[-1, 0, 1, 1], torch.zeros((), dtype=dtype))
    assert banks.code_of(changed) == 0
    if dtype in HALVES:
        assert banks.code_of(bank.float()) == (banks.CODES[name] if name.startswith("binomial") else 0)
