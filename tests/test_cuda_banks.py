"""The constants of the CUDA kernels are the banks of `effops/ops/dwconv/banks.py`."""

import re
from pathlib import Path

import pytest

from effops.ops.dwconv.banks import BANKS, CODES

HEADER = Path(__file__).parents[1] / "csrc" / "cuda" / "banks.h"
ROW = re.compile(r'\{"(\w+)", (\d+), (\d+), (\d+), \d+,\s*\{([^{}]*)\}\}')
ROWS = {name: fields for name, *fields in ROW.findall(HEADER.read_text())}


def test_the_table_has_every_bank():
    assert list(ROWS) == list(BANKS) and len(ROWS) == HEADER.read_text().count('{"')


@pytest.mark.parametrize("name", ROWS)
def test_constants_are_the_bank(name):
    code, size, kernels, values = ROWS[name]
    bank = BANKS[name]
    assert int(code) == CODES[name]
    assert int(kernels) == len(bank)
    assert all(len(kernel) == int(size) and all(len(row) == int(size) for row in kernel) for kernel in bank)
    assert [float(value) for value in values.split(",")] == [tap for kernel in bank for row in kernel for tap in row]
