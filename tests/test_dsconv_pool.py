"""Sums that the depthwise separable convolutions take of their results, and the squeeze-excite that takes them over."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cases import BIAS_RELU, FULL, DsCase, Epi, ids
from helpers import (
    Tensors,
    as_leaves,
    assert_within_budget,
    call,
    draw,
    generator,
    make_grad_output,
    make_tensors,
    oracle,
    present,
    sized_for,
    to_float64,
)
from torch import Tensor

import effops.functional as EF
from effops.ops import dsconv

CASES = [
    DsCase(id="vgnet-28", c=28, k=28, h=28, w=28, passthrough=28, layout="channels_last",
           passthrough_layout="channels_last", pw=Epi(activation="relu", scale=True, shift=True), interpreted=(9, 11)),
    DsCase(id="ranges_end_within_images", n=3, c=24, k=40, h=31, w=29, layout="channels_last", pw=BIAS_RELU,
           interpreted=(9, 9)),
    DsCase(id="small_map", n=3, c=40, k=56, h=7, w=7, layout="channels_last", pw=Epi(post_activation="silu")),
    DsCase(id="many_images", n=40, c=16, k=17, h=5, w=4, pw=BIAS_RELU, interpreted=(2, 3)),
    DsCase(id="nchw", c=17, k=19, h=10, w=9, pw=FULL),
    DsCase(id="keep", c=20, k=12, keep=14, stride=(2, 2), h=11, w=12, layout="channels_last", pw=BIAS_RELU),
    DsCase(id="odd_dw", c=9, k=33, multiplier=2, dw=Epi(bias=True, activation="silu"), layout="cl_odd_chunk"),
    DsCase(id="one_pixel", n=5, c=3, k=6, h=1, w=1, pw=BIAS_RELU),
    DsCase(id="wide_rows", n=1, c=16, k=8, h=3, w=400, layout="channels_last", interpreted=(3, 70)),
    DsCase(id="batch0", n=0, c=8, k=8),
]  # fmt: skip
POOLED = {"triton", "cpp"}  # the others take the sums in a pass of their own


def pooled(tensors: Tensors, case: DsCase, backend: str) -> tuple[Tensor, Tensor]:
    return call(tensors, case, backend, pool=True)


def sums_of(output: Tensor, case: DsCase) -> Tensor:
    return output[:, case.keep :].sum((2, 3), dtype=dsconv.sums_dtype(output))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("case", CASES, ids=ids(CASES))
def test_sums(case: DsCase, dtype: torch.dtype, backend: str) -> None:
    case = sized_for(case, backend)
    tensors = make_tensors(case, dtype)
    output, sums = pooled(tensors, case, backend)
    truth, yardstick = oracle(to_float64(tensors), case), oracle(tensors, case)
    assert_within_budget(output, truth, yardstick, f"{case.id} output")
    assert sums.dtype == dsconv.sums_dtype(output) and sums.is_contiguous() and not sums.requires_grad
    # Of what is stored, or of that before it was rounded: as close to the sums of the truth as torch's own.
    computed_in = torch.bfloat16 if dtype == torch.bfloat16 else None
    expected, torchs = truth[:, case.keep :].sum((2, 3)), sums_of(yardstick, case)
    assert_within_budget(sums, expected, torchs, f"{case.id} sums", computed_in)


def test_who_pools() -> None:
    """The test's own list; `sums` of the others come from torch."""
    assert set(dsconv.POOL_KERNELS) == POOLED


@pytest.mark.parametrize("threads", (1, 2, 3))
def test_threads(threads: int, cpp: str) -> None:
    for case in CASES:
        tensors = make_tensors(case, torch.float32)
        torch.set_num_threads(threads)
        output, sums = pooled(tensors, case, cpp)
        again = pooled(tensors, case, cpp)
        assert torch.equal(output, again[0]) and torch.equal(sums, again[1])
        # Exact values have their test above; here a range that was left out or counted twice would show.
        torch.testing.assert_close(sums, output[:, case.keep :].double().sum((2, 3)).float(), rtol=1e-5, atol=1e-3)


def excitation(channels: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    gen = generator("pool-excite")
    return [draw(shape, gen, "normal", 0.3).to(dtype) for shape in ((3, channels, 1, 1), (channels, 3, 1, 1))]


def excite(y: Tensor, sums: Tensor | None, backend: str, weights: list[Tensor] | None = None) -> Tensor:
    weights = weights or excitation(y.shape[1], y.dtype)
    return EF.squeeze_excite2d(y, weights[0], None, weights[1], None, activation="silu", sums=sums, backend=backend)


def excited(tensors: Tensors, case: DsCase, backend: str) -> Tensor:
    """The convolution and a squeeze-excite behind it that takes its sums over."""
    output, sums = pooled(tensors, case, backend)
    weights = [weight.to(output.device) for weight in excitation(case.k, output.dtype)]
    return excite(output[:, case.keep :], sums, backend, weights)


def oracle_excited(tensors: Tensors, case: DsCase) -> Tensor:
    y = oracle(tensors, case)[:, case.keep :]
    reduce, expand = [weight.to(y.device) for weight in excitation(case.k, y.dtype)]
    return y * F.conv2d(F.silu(F.conv2d(y.mean((2, 3), True), reduce)), expand).sigmoid()


@pytest.mark.parametrize("case", [case for case in CASES if case.n], ids=ids([case for case in CASES if case.n]))
def test_excited(case: DsCase, backend: str) -> None:
    case = sized_for(case, backend)
    tensors = make_tensors(case, torch.float32)
    truth, yardstick = oracle_excited(to_float64(tensors), case), oracle_excited(tensors, case)
    assert_within_budget(excited(tensors, case, backend), truth, yardstick, case.id)


@pytest.mark.parametrize("name", ("vgnet-28", "keep", "nchw"))
def test_squeeze_excite_takes_the_sums_over(name: str, backend: str) -> None:
    """The same values and gradients as when it reads the map for them."""
    case = sized_for(next(case for case in CASES if case.id == name), backend)
    tensors = as_leaves(make_tensors(case, torch.float64))
    names = present(tensors)
    results = []
    for pool in (True, False):
        found = call(tensors, case, backend, pool=pool)
        output, sums = found if pool else (found, None)
        y = excite(output[:, case.keep :], sums, backend)
        grad = make_grad_output(case, y.shape).double()
        results.append([y, *torch.autograd.grad(y, [tensors[key] for key in names], grad)])
    for what, with_sums, without in zip(["output", *names], *results, strict=True):
        # The message is made at once, so that a later `what` cannot get into it: B023 does not see that.
        torch.testing.assert_close(with_sums, without, rtol=1e-11, atol=1e-11, msg=lambda text: f"{what}: {text}")  # noqa: B023


def test_given_sums_are_believed(backend: str) -> None:
    """Other sums give another result, except on the reference, which always takes its own."""
    y = torch.rand(2, 8, 5, 5)
    own = excite(y, y.sum((2, 3)), backend)
    other = excite(y, y.sum((2, 3)) * 3, backend)
    torch.testing.assert_close(own, excite(y, None, backend))
    assert torch.equal(own, other) == (backend == "reference")


def test_blocks_and_batch_norm(backend: str) -> None:
    left, right = torch.rand(2, 6, 5, 7), torch.rand(2, 6, 5, 7)
    dw, pw = torch.rand(6, 1, 3, 3), torch.rand(6, 12, 1, 1)
    same, new, sums = EF.half_identity2d(left, right, dw, pw, pool=True, backend=backend)
    assert same is right
    torch.testing.assert_close(sums, new.sum((2, 3)))
    y, sums = EF.downsampling2d(right, dw, torch.rand(5, 6, 1, 1), keep=4, pool=True, backend=backend)
    torch.testing.assert_close(sums, y[:, 4:].sum((2, 3)))
    norm = EF.BatchNorm(None, None, None, None, 0.1, 1e-5)
    y, sums = EF.ds_conv2d(right, dw, pw[:, :6], padding=1, batch_norm=norm, pool=True, backend=backend)
    torch.testing.assert_close(sums, y.sum((2, 3)), rtol=1e-4, atol=1e-4)


def test_compiles(cpp: str) -> None:
    x, dw, pw = torch.rand(2, 6, 5, 7, requires_grad=True), torch.rand(6, 1, 3, 3), torch.rand(4, 6, 1, 1)
    weights = excitation(4)

    def block(x: Tensor) -> Tensor:
        y, sums = EF.ds_conv2d(x, dw, pw, padding=1, activation="relu", pool=True)
        return excite(y, sums, "auto", weights)

    out = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=True)(x)
    torch.testing.assert_close(out, block(x))
    torch.testing.assert_close(*[torch.autograd.grad(y.sum(), x)[0] for y in (out, block(x))])


def test_errors() -> None:
    x, dw, pw = torch.ones(2, 6, 5, 7), torch.ones(6, 1, 3, 3), torch.ones(4, 6, 1, 1)
    with pytest.raises(TypeError, match=r"^ds_conv2d: pool must be True or False; got 1 \(int\)$"):
        EF.ds_conv2d(x, dw, pw, pool=1)
    with pytest.raises(ValueError, match="no kernels of a backend 'cuda'; accepted: 'triton', 'cpp'"):
        dsconv.DSConvPool2dFunction.apply(x, *[None] * 11, [], [], "cuda")
