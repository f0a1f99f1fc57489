"""Host time of a call above its kernels; overhead.py says what is subtracted."""

import pytest
import torch

from benchmarks import overhead
from effops import _library


@pytest.mark.skipif(not _library.kernels_loaded, reason=f"no kernels: {_library.why_not_loaded}")
def test_overhead(benchmark):
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        rows = benchmark.pedantic(overhead.measure, kwargs={"quick": not benchmark.enabled}, rounds=1, iterations=1)
    finally:
        torch.set_num_threads(before)
    for row in rows:
        benchmark.extra_info[row["operator"]] = row
        print("\n" + "\n".join(f"{key}: {value}" for key, value in row.items()))
