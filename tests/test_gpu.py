"""The operators on CUDA, every backend that runs there: values and gradients by the budget, streams, graphs, compile.

The truth is the oracle's in float64 on the CPU; the yardstick is torch's own unfused chain on the same GPU.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cases import DS_CASES, DW_CASES, DsCase, DwCase, Epi, activation_cases
from helpers import (
    KINKS,
    assert_within_budget,
    call,
    check_forward,
    check_gradients,
    gradients,
    make_grad_output,
    make_tensors,
    move_all,
    oracle,
    oracle_stats,
    present,
    stats_call,
    to_float64,
)
from module_helpers import randomise
from torch import Tensor

import effops
import effops.functional as EF
from effops import backends

pytestmark = pytest.mark.gpu

# Deterministic mode, which the suite runs in, wants it of cuBLAS; read when the first product is computed.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

DEVICE = "cuda"
GPU_BACKENDS = tuple(name for name in backends.names() if name not in ("auto", "cpp"))
CASES = [*DW_CASES, *DS_CASES]
ACTIVATION_CASES = [*activation_cases(DwCase), *activation_cases(DsCase)]
HALF = (torch.float16, torch.bfloat16)
GIB = 1 << 30


def case_id(case: DwCase | DsCase) -> str:
    return ("ds-" if isinstance(case, DsCase) else "dw-") + case.id


def epilogues(case: DwCase | DsCase) -> tuple[Epi, ...]:
    return (case.dw, case.pw) if isinstance(case, DsCase) else (case.epi,)


def smooth(case: DwCase | DsCase) -> bool:
    """In half precision values cannot be kept off a kink: rounding moves them across it, in torch's chain too."""
    return not {name for epi in epilogues(case) for name in (epi.activation, epi.post_activation)} & set(KINKS)


SMOOTH_CASES = [case for case in CASES if smooth(case)]
EPI = Epi(bias=True, scale=True, shift=True, activation="silu")
PLAIN_DW = DwCase(id="gpu", n=4, c=56, h=28, w=28, layout="channels_last", epi=EPI)
PLAIN_DS = DsCase(id="gpu", n=4, c=56, k=72, h=28, w=28, layout="channels_last", dw=EPI, pw=EPI)
PLAIN = (PLAIN_DW, PLAIN_DS)


@pytest.fixture(params=GPU_BACKENDS)
def gpu_backend(request: pytest.FixtureRequest) -> str:
    """The name of every backend that may run on a GPU, in turn."""
    return request.param


@pytest.fixture(autouse=True)
def _float32_is_float32() -> None:
    """torch's convolutions take TF32 unless told otherwise; the budget is float32's."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


@pytest.fixture(autouse=True)
def _skip_what_a_backend_declines(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A backend asked for by name says why it cannot run a call: that is a skip with its reason."""
    choose = backends.choose

    def choose_or_skip(call: backends.Call, backend: str) -> str:
        wanted = backends._selected if backend == "auto" else backend
        for candidate in backends.BACKENDS:
            if candidate.name == wanted and (reasons := candidate.why_not(call)):
                pytest.skip(f"backend {wanted}: {'; '.join(reasons)}")
        return choose(call, backend)

    if "test_compile" not in request.node.name:  # Dynamo would have to trace the patch
        monkeypatch.setattr(backends, "choose", choose_or_skip)


def on_gpu(case: DwCase | DsCase, dtype: torch.dtype, **options: bool) -> dict[str, Tensor | None]:
    return move_all(make_tensors(case, dtype, **options), DEVICE)


def needs_memory(gib: int, backend: str) -> None:
    if backend == "reference":
        pytest.skip("backend reference: torch's own convolutions have limits of their own beyond 2^31 elements")
    free, _ = torch.cuda.mem_get_info()
    if free < gib * GIB:
        pytest.skip(f"needs {gib} GB of free GPU memory, {free / GIB:.0f} are")


# ---- what runs at all -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_an_accelerated_backend_runs(case: DwCase | DsCase) -> None:
    """The skips above must not hide that no kernel of ours ran."""
    accelerated = set(GPU_BACKENDS) - {"reference"}
    if not accelerated:
        pytest.skip("this version has no GPU kernels: auto takes the reference")
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("the kernels are written for compute capability 8.0 and newer")
    tensors = on_gpu(case, torch.float16)
    for name in accelerated:
        call(tensors, case, name)
    (taken,) = {found.backend for found in effops.explain(lambda: call(tensors, case, "auto")).calls}
    assert taken in accelerated


# ---- values and gradients -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32, torch.bfloat16, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_forward(case: DwCase | DsCase, dtype: torch.dtype, gpu_backend: str) -> None:
    check_forward(case, dtype, gpu_backend, DEVICE)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_gradients(case: DwCase | DsCase, dtype: torch.dtype, gpu_backend: str) -> None:
    check_gradients(case, dtype, gpu_backend, device=DEVICE)


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", SMOOTH_CASES, ids=case_id)
def test_gradients_half(case: DwCase | DsCase, dtype: torch.dtype, gpu_backend: str) -> None:
    check_gradients(case, dtype, gpu_backend, device=DEVICE)


@pytest.mark.parametrize("case", ACTIVATION_CASES, ids=case_id)
def test_activations(case: DwCase | DsCase, gpu_backend: str) -> None:
    check_forward(case, torch.float32, gpu_backend, DEVICE)
    check_forward(case, torch.float16, gpu_backend, DEVICE)
    check_gradients(case, torch.float32, gpu_backend, device=DEVICE)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("layout", ("contiguous", "channels_last"))
def test_stats(layout: str, dtype: torch.dtype, gpu_backend: str) -> None:
    """Mean and variance in float32; of a half type with float32's rounding, as its sums are float32's."""
    case = DwCase(id="stats", n=3, c=40, h=17, w=19, layout=layout, epi=Epi(bias=True))
    on_cpu = make_tensors(case, dtype)
    tensors = move_all(on_cpu, DEVICE)
    found = stats_call(tensors, case, gpu_backend)
    truth = oracle_stats(to_float64(on_cpu), case)
    yardstick = oracle_stats({name: None if t is None else t.float() for name, t in tensors.items()}, case)
    for name, actual, true, own in zip(("mean", "variance"), found, truth, yardstick, strict=True):
        assert actual.dtype == torch.float32
        assert_within_budget(actual, true, own, f"{gpu_backend} {name}", computed_in=dtype)


@pytest.mark.parametrize("dtype", (torch.float32, *HALF), ids=str)
@pytest.mark.parametrize(
    "case",
    (
        DsCase(id="mobilenet", n=2, c=128, k=128, h=56, w=56, layout="channels_last", dw=EPI, pw=EPI),
        DsCase(id="deep", n=2, c=512, k=1024, h=14, w=14, stride=(2, 2), layout="channels_last", dw=EPI, pw=EPI),
        DsCase(id="half", n=2, c=28, k=28, passthrough=28, h=56, w=56, layout="cl_chunk", passthrough_layout="cl_chunk",
               pw=EPI),
        DsCase(id="nchw", n=2, c=96, k=160, h=28, w=28, dw=EPI, pw=EPI),
    ),
    ids=case_id,
)  # fmt: skip
def test_network_sizes(case: DsCase, dtype: torch.dtype, gpu_backend: str) -> None:
    """Tiles that fill a GPU, where the cases above leave most of each empty."""
    check_forward(case, dtype, gpu_backend, DEVICE)
    check_gradients(case, dtype, gpu_backend, device=DEVICE)


def test_nothing_depends_on_what_memory_held(gpu_backend: str) -> None:
    """What the suite's poison rests on: uninitialised GPU memory is NaN, and so are outputs before kernels write."""
    assert torch.empty(1000, device=DEVICE).isnan().all()
    case = replace(PLAIN_DS, w=27, k=33, keep=5)
    tensors = on_gpu(case, torch.float32)
    assert call(tensors, case, gpu_backend).isfinite().all()


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
def test_memory_format_is_conv2ds(memory_format: torch.memory_format, gpu_backend: str) -> None:
    x = torch.randn(2, 24, 9, 11, device=DEVICE).contiguous(memory_format=memory_format)
    weight, pw = torch.randn(24, 1, 3, 3, device=DEVICE), torch.randn(40, 24, 1, 1, device=DEVICE)
    stock = F.conv2d(F.conv2d(x, weight, padding=1, groups=24), pw)
    out = EF.ds_conv2d(x, weight, pw, padding=1, backend=gpu_backend)
    assert out.is_contiguous(memory_format=memory_format) and out.shape == stock.shape


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_tf32_where_torch_allows_it(case: DwCase | DsCase, gpu_backend: str) -> None:
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    on_cpu = make_tensors(case, torch.float32)
    out = call(move_all(on_cpu, DEVICE), case, gpu_backend).cpu()
    truth = oracle(to_float64(on_cpu), case)
    assert (out - truth).norm() <= 1e-3 * truth.norm()


def test_repeats_bitwise(gpu_backend: str) -> None:
    """Under torch's deterministic mode, gradients that are summed over the batch included."""
    tensors = on_gpu(PLAIN_DS, torch.float32, kink_free=True)
    grad_output = make_grad_output(PLAIN_DS, (4, 72, 28, 28))
    runs = [gradients(lambda t: call(t, PLAIN_DS, gpu_backend), tensors, grad_output) for _ in range(3)]
    for out, grads in runs[1:]:
        assert torch.equal(out, runs[0][0])
        for name, grad in grads.items():
            assert torch.equal(grad, runs[0][1][name]), name


def test_batch_of_none(gpu_backend: str) -> None:
    case = replace(PLAIN_DS, n=0)
    tensors = on_gpu(case, torch.float16)
    out, grads = gradients(lambda t: call(t, case, gpu_backend), tensors, torch.zeros(0, 72, 28, 28))
    assert out.shape == (0, 72, 28, 28)
    for name, grad in grads.items():
        assert grad.shape == tensors[name].shape and not grad.any(), name


# ---- devices, streams, graphs ---------------------------------------------------------------------------------------


def check_against_oracle(out: Tensor, on_cpu: dict, case: DwCase | DsCase, what: str) -> None:
    yardstick = oracle(move_all(on_cpu, DEVICE), case)
    assert_within_budget(out, oracle(to_float64(on_cpu), case), yardstick, what)


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_second_device(case: DwCase | DsCase, gpu_backend: str) -> None:
    """The input's device counts, not the current one."""
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two GPUs, there is {torch.cuda.device_count()}")
    on_cpu = make_tensors(case, torch.float32)
    tensors = move_all(on_cpu, "cuda:1")
    assert torch.cuda.current_device() == 0
    grad_output = make_grad_output(case, (4, case_k(case), 28, 28))
    out, grads = gradients(lambda t: call(t, case, gpu_backend), tensors, grad_output)
    assert torch.cuda.current_device() == 0
    assert {out.device, *(grad.device for grad in grads.values())} == {torch.device("cuda:1")}
    check_against_oracle(out, on_cpu, case, "second device")


def case_k(case: DwCase | DsCase) -> int:
    return case.k if isinstance(case, DsCase) else case.c


def test_tensors_on_two_devices_are_an_error() -> None:
    x, weight = torch.randn(1, 8, 5, 5, device=DEVICE), torch.randn(8, 1, 3, 3)
    with pytest.raises(ValueError, match="weight.*(cpu|cuda)"):
        EF.depthwise_conv2d(x, weight)


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_runs_on_the_current_stream(case: DwCase | DsCase, gpu_backend: str) -> None:
    """The input appears on a side stream, after a long wait: a kernel on any other stream would read NaN."""
    on_cpu = make_tensors(case, torch.float32)
    tensors = move_all(on_cpu, DEVICE)
    call(tensors, case, gpu_backend)  # compiles outside of what follows
    source = tensors["input"]
    waiting = torch.full_like(source, float("nan"))
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(100_000_000)  # cycles: about 50 ms
        waiting.copy_(source)
        out = call({**tensors, "input": waiting}, case, gpu_backend)
        copied = out.clone()
    side.synchronize()
    check_against_oracle(copied, on_cpu, case, "side stream")


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_backward_runs_on_the_forwards_stream(case: DwCase | DsCase, gpu_backend: str) -> None:
    tensors = on_gpu(case, torch.float32, kink_free=True)
    grad_output = make_grad_output(case, (4, case_k(case), 28, 28)).to(DEVICE)
    _, expected = gradients(lambda t: call(t, case, gpu_backend), tensors, grad_output)
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        torch.cuda._sleep(20_000_000)
        _, actual = gradients(lambda t: call(t, case, gpu_backend), tensors, grad_output)
    side.synchronize()
    for name, grad in actual.items():
        assert torch.equal(grad, expected[name]), name


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_does_not_wait_for_the_gpu(case: DwCase | DsCase, gpu_backend: str) -> None:
    tensors = on_gpu(case, torch.float16)
    grad_output = make_grad_output(case, (4, case_k(case), 28, 28)).to(DEVICE)
    run = lambda: gradients(lambda t: call(t, case, gpu_backend), tensors, grad_output)  # noqa: E731
    run()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def capture(run: Callable[[], tuple[Tensor, ...]]) -> tuple[torch.cuda.CUDAGraph, tuple[Tensor, ...]]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run()
    return graph, results


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_cuda_graph(case: DwCase | DsCase, gpu_backend: str) -> None:
    """Forward and backward in one graph; the replay takes what the buffers hold then."""
    first, second = make_tensors(case, torch.float32), make_tensors(replace(case, id="other values"), torch.float32)
    static = {name: None if t is None else t.requires_grad_() for name, t in move_all(first, DEVICE).items()}
    names = present(static)
    grad_output = make_grad_output(case, (4, case_k(case), 28, 28))
    static_grad = grad_output.to(DEVICE, torch.float32)

    def run() -> tuple[Tensor, ...]:
        out = call(static, case, gpu_backend)
        return (out.detach(), *torch.autograd.grad(out, [static[name] for name in names], static_grad))

    graph, results = capture(run)
    for values in (second, first):
        with torch.no_grad():
            for name in names:
                static[name].copy_(values[name])
        graph.replay()
        torch.cuda.synchronize()
        truth_out, truth = gradients(lambda t: oracle(t, case), to_float64(values), grad_output)
        own_out, own = gradients(lambda t: oracle(t, case), move_all(values, DEVICE), grad_output)
        assert_within_budget(results[0], truth_out, own_out, "replayed output")
        for name, grad in zip(names, results[1:], strict=True):
            assert_within_budget(grad, truth[name], own[name], f"replayed gradient of {name}")


# ---- compile, autocast ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_compile_fullgraph(case: DwCase | DsCase, dtype: torch.dtype, gpu_backend: str) -> None:
    """Against the unfused chain compiled likewise: Inductor's own sums have errors of their own."""
    torch._dynamo.reset()
    on_cpu = make_tensors(case, dtype)
    tensors = move_all(on_cpu, DEVICE)
    grad_output = make_grad_output(case, (4, case_k(case), 28, 28))
    compiled = torch.compile(lambda t: call(t, case, gpu_backend), fullgraph=True)
    out, actual = gradients(compiled, tensors, grad_output)
    truth_out, truth = gradients(lambda t: oracle(t, case), to_float64(on_cpu), grad_output)
    own_out, own = gradients(torch.compile(lambda t: oracle(t, case)), tensors, grad_output)
    assert_within_budget(out, truth_out, own_out, "compiled output")
    for name, grad in actual.items():
        assert_within_budget(grad, truth[name], own[name], f"compiled gradient of {name}")


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_autocast(case: DwCase | DsCase, dtype: torch.dtype, gpu_backend: str) -> None:
    """As with the inputs cast by hand: scale and shift stay float32, as they are."""
    tensors = on_gpu(case, torch.float32)
    with torch.autocast(DEVICE, dtype):
        found = call(tensors, case, gpu_backend)
    affine = ("scale", "shift", "dw_scale", "dw_shift")
    cast = {name: t if t is None or name in affine else t.to(dtype) for name, t in tensors.items()}
    expected = call(cast, case, gpu_backend)
    assert found.dtype == dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", PLAIN, ids=case_id)
def test_autocast_gradients(case: DwCase | DsCase, gpu_backend: str) -> None:
    """A GradScaler's scaled loss: parameters' gradients come in the parameters' dtype."""
    tensors = on_gpu(case, torch.float32)
    leaves = {name: None if t is None else t.requires_grad_() for name, t in tensors.items()}
    with torch.autocast(DEVICE, torch.float16):
        out = call(leaves, case, gpu_backend)
    (out.float().mean() * 1024).backward()
    for name in present(leaves):
        grad = leaves[name].grad
        assert grad.dtype == torch.float32 and grad.isfinite().all() and grad.any(), name


# ---- modules and networks -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("mobilenet_v2", "vgnetg_1_0mp"))
def test_networks_agree_with_their_twins(name: str, gpu_backend: str) -> None:
    torch.manual_seed(0)
    model, twin = effops.create_model(name), effops.create_model(name, reference=True)
    randomise(model)
    twin.load_state_dict(model.state_dict())
    x = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    truth = twin.eval().double()(x.double()).detach()
    model, twin = model.eval().to(DEVICE), twin.float().to(DEVICE)
    with torch.no_grad(), effops.use_backend(gpu_backend):
        actual = model(x.to(DEVICE))
        assert_within_budget(actual, truth, twin(x.to(DEVICE)), f"{name} logits")


# ---- more than 2^31 elements ----------------------------------------------------------------------------------------

HUGE_CHANNELS, HUGE_SIZE = 64, 56


def _huge_weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    dw = torch.randn(HUGE_CHANNELS, 1, 3, 3, generator=generator) / 3
    return dw, torch.randn(HUGE_CHANNELS, HUGE_CHANNELS, 1, 1, generator=generator) / 8


def _huge_call(op: str, x: Tensor, dw: Tensor, pw: Tensor, backend: str) -> Tensor:
    if op == "dw":
        return EF.depthwise_conv2d(x, dw, padding=1, backend=backend)
    return EF.ds_conv2d(x, dw, pw, padding=1, backend=backend)


def _huge_oracle(op: str, x: Tensor, dw: Tensor, pw: Tensor) -> Tensor:
    y = F.conv2d(x, dw, padding=1, groups=HUGE_CHANNELS)
    return y if op == "dw" else F.conv2d(y, pw)


@pytest.mark.slow
@pytest.mark.parametrize("op", ("dw", "ds"))
def test_more_than_2_31_elements_in_a_batch(op: str, gpu_backend: str) -> None:
    """Forward and input gradient: the first image, those around element 2^31, and the last one."""
    needs_memory(60, gpu_backend)
    image = HUGE_CHANNELS * HUGE_SIZE**2
    batch = 2**31 // image + 40
    probes = [0, 2**31 // image - 1, 2**31 // image, batch - 1]
    dw, pw = (w.to(DEVICE, torch.float16) for w in _huge_weights())
    x = torch.zeros(batch, HUGE_CHANNELS, HUGE_SIZE, HUGE_SIZE, dtype=torch.float16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    drawn = torch.randn(len(probes), HUGE_CHANNELS, HUGE_SIZE, HUGE_SIZE, generator=torch.Generator().manual_seed(1))
    for index, values in zip(probes, drawn, strict=True):
        x[index] = values.to(DEVICE, torch.float16)
    leaf = x.requires_grad_()
    out = _huge_call(op, leaf, dw, pw, gpu_backend)
    small = drawn.half().to(DEVICE).contiguous(memory_format=torch.channels_last).requires_grad_()
    own = _huge_oracle(op, small, dw, pw)
    double = drawn.half().double().requires_grad_()
    truth = _huge_oracle(op, double, dw.double().cpu(), pw.double().cpu())
    assert_within_budget(out.detach()[probes], truth.detach(), own, f"images {probes}")
    assert not out.detach()[1].any(), "image 1 is zero"
    grad_output = torch.zeros_like(out)
    grad_output[probes] = own.detach()
    (grad,) = torch.autograd.grad(out, leaf, grad_output)
    (own_grad,) = torch.autograd.grad(own, small, own.detach())
    (truth_grad,) = torch.autograd.grad(truth, double, own.detach().double().cpu())
    assert_within_budget(grad[probes], truth_grad, own_grad, f"gradient of images {probes}")


@pytest.mark.slow
@pytest.mark.parametrize("op", ("dw", "ds"))
def test_more_than_2_31_elements_in_an_image(op: str, gpu_backend: str) -> None:
    """Rows far beyond element 2^31 of one image, compared with the same rows of a small one."""
    needs_memory(60, gpu_backend)
    height, width, rows = 6200, 5600, 12
    dw, pw = (w.to(DEVICE, torch.float16) for w in _huge_weights())
    x = torch.zeros(1, HUGE_CHANNELS, height, width, dtype=torch.float16, device=DEVICE)
    x = x.contiguous(memory_format=torch.channels_last)
    drawn = torch.randn(1, HUGE_CHANNELS, rows, width, generator=torch.Generator().manual_seed(1)).half()
    x[:, :, -rows:] = drawn.to(DEVICE)
    out = _huge_call(op, x, dw, pw, gpu_backend)
    own = _huge_oracle(op, drawn.to(DEVICE).contiguous(memory_format=torch.channels_last), dw, pw)
    truth = _huge_oracle(op, drawn.double(), dw.double().cpu(), pw.double().cpu())
    assert_within_budget(out[:, :, -rows:], truth, own, "the last rows")
    assert not out[:, :, : height - rows - 1].any(), "rows whose input is zero"
