"""What fusing is for: the depthwise result is neither allocated in forward nor saved for backward."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import effops.functional as EF
from effops import modules, stock

CHANNELS, SIZE, BATCH, BLOCKS = 28, 28, 2, 4


def _bytes_saved(function) -> int:
    """Bytes of the distinct storages that autograd keeps for the backward of ``function()``, parameters included."""
    storages: dict[int, int] = {}
    keep_alive = []

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        keep_alive.append(tensor)  # an address is not reused while its storage lives
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = function()
    assert out.requires_grad and storages
    return sum(storages.values())


def _block_parameters() -> list[tuple[Tensor, Tensor]]:
    return [
        (
            torch.randn(CHANNELS, 1, 3, 3, requires_grad=True),
            torch.randn(CHANNELS, 2 * CHANNELS, 1, 1, requires_grad=True),
        )
        for _ in range(BLOCKS)
    ]


@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_half_identity_chain_saves_40_percent_less(
    activation: str, memory_format: torch.memory_format, cpp: str
) -> None:
    """Four VGNet half-identity blocks, trained: at least 40 % fewer bytes than the same chain of stock operators."""
    x = torch.randn(BATCH, 2 * CHANNELS, SIZE, SIZE).contiguous(memory_format=memory_format)
    parameters = _block_parameters()
    act = {"none": lambda v: v, "relu": F.relu, "silu": F.silu}[activation]

    def stock() -> Tensor:
        left, right = x.requires_grad_().chunk(2, 1)
        for dw_weight, pw_weight in parameters:
            spatial = F.conv2d(right, dw_weight, padding=1, groups=CHANNELS)
            left, right = right, act(F.conv2d(torch.cat([left, spatial], 1), pw_weight))
        return torch.cat([left, right], 1)

    def fused() -> Tensor:
        left, right = x.requires_grad_().chunk(2, 1)
        for dw_weight, pw_weight in parameters:
            left, right = EF.half_identity2d(left, right, dw_weight, pw_weight, activation=activation, backend=cpp)
        return torch.cat([left, right], 1)

    torch.testing.assert_close(fused(), stock(), rtol=1e-3, atol=1e-3)
    stock_bytes, fused_bytes = _bytes_saved(stock), _bytes_saved(fused)
    assert fused_bytes <= 0.6 * stock_bytes, f"{fused_bytes} bytes saved against {stock_bytes}"


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_half_identity_blocks_with_their_norms_save_40_percent_less(
    memory_format: torch.memory_format, cpp: str
) -> None:
    """As above with ReLU and training batch norm, as VGNet has them."""
    halves = [torch.randn(BATCH, CHANNELS, SIZE, SIZE).contiguous(memory_format=memory_format) for _ in range(2)]
    saved = {}
    for layers, options in ((stock, {}), (modules, {"backend": cpp})):
        blocks = torch.nn.Sequential(*[layers.HalfIdentityBlock(2 * CHANNELS, **options) for _ in range(BLOCKS)])
        state = tuple(half.requires_grad_() for half in halves)
        saved[layers] = _bytes_saved(lambda blocks=blocks, state=state: blocks(state)[1])
    assert saved[modules] <= 0.6 * saved[stock], f"{saved[modules]} bytes saved against {saved[stock]}"


@pytest.mark.parametrize("activation", ("none", "relu", "silu"))
def test_saved_bytes_are_the_inputs(activation: str, cpp: str) -> None:
    """Saved: the inputs, the weights and, where act' comes from it, the output. Never the depthwise result."""
    x = torch.randn(2, 64, 20, 20, requires_grad=True)
    dw_weight = torch.randn(64, 1, 3, 3, requires_grad=True)
    pw_weight = torch.randn(16, 64, 1, 1, requires_grad=True)
    saved = _bytes_saved(
        lambda: EF.ds_conv2d(
            x, dw_weight, pw_weight, padding=1, dw_activation="silu", activation=activation, backend=cpp
        )
    )
    output = 2 * 16 * 20 * 20 * 4 if activation == "relu" else 0
    assert saved <= 4 * (x.numel() + dw_weight.numel() + pw_weight.numel()) + output


# One process a measurement, and the kernel's own record of the resident set's peak: no allocator's word is taken. (Not
# ru_maxrss, which a process inherits from the one that started it.)
_PEAK = """
import sys, torch
import torch.nn.functional as F
import effops.functional as EF
from effops import modules, stock

form, direction = sys.argv[1:3]
torch.set_num_threads(2)
size, channels, out_channels = 256, 160, 8          # input, depthwise result: 40 MiB each; output: 2 MiB
def tensors(size):
    x = torch.empty(1, channels, size, size, memory_format=torch.channels_last).fill_(1.0)   # no copy on the way
    return [x, torch.ones(channels, 1, 3, 3), torch.ones(out_channels, channels, 1, 1)]
def chain(x, dw_weight, pw_weight):
    if form == "stock":
        return F.conv2d(F.conv2d(x, dw_weight, padding=1, groups=channels), pw_weight)
    return EF.ds_conv2d(x, dw_weight, pw_weight, padding=1, backend=form)
def step(x, dw_weight, pw_weight):
    if direction == "forward":
        with torch.no_grad():
            return chain(x, dw_weight, pw_weight)
    return torch.autograd.grad(chain(x, dw_weight, pw_weight).sum(), [x, dw_weight, pw_weight])
def peak():
    (line,) = [line for line in open("/proc/self/status") if line.startswith("VmHWM")]
    return int(line.split()[1]) / 1024
step(*[t.requires_grad_(direction == "backward") for t in tensors(32)])   # thread pools, lazy initialisation
arguments = [t.requires_grad_(direction == "backward") for t in tensors(size)]
before = peak()
result = step(*arguments)
print(peak() - before)
"""


def _peak_growth_mib(form: str, direction: str) -> float:
    root = Path(__file__).resolve().parent.parent
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(root), *sys.path])}
    command = [sys.executable, "-c", _PEAK, form, direction]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return float(result.stdout.splitlines()[-1])


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("direction", ("forward", "backward"))
def test_peak_has_no_room_for_the_intermediate(direction: str, cpp: str) -> None:
    """Resident memory grows by the results (2 MiB; backward 40 more for the input's gradient) and tiles; the
    depthwise result would be another 40. The stock chain, measured the same way, shows that the measure sees it."""
    results = 2.0 if direction == "forward" else 2.0 + 40.0
    stock = _peak_growth_mib("stock", direction)
    assert stock > results + 36, f"the measure does not see the stock chain's intermediate: {stock:.1f} MiB"
    fused = _peak_growth_mib(cpp, direction)
    assert fused < results + 20, f"peak grows by {fused:.1f} MiB"
