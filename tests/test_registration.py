"""The operators as torch sees them: schemas, fakes, compile, export, autocast, determinism, FLOPs, Functions."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers import interpreted
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, export
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils.flop_counter import FlopCounterMode

import effops
import effops.functional as EF
from effops import _library
from effops.ops import dsconv as dsconv_room
from effops.ops import dwconv as dwconv_room
from effops.ops.geometry import is_channels_last
from effops.ops.higher_order import KernelFunction

FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


@pytest.fixture(params=FORMATS)
def memory_format(request: pytest.FixtureRequest) -> torch.memory_format:
    return FORMATS[request.param]


def rand(*shape: int, dtype: torch.dtype = torch.float32, memory_format: Any = torch.contiguous_format) -> torch.Tensor:
    t = torch.randn(shape, dtype=dtype)
    return t.contiguous(memory_format=memory_format) if len(shape) == 4 else t


# ---- schemas, fakes, opcheck ----------------------------------------------------------------------------------------


LATER_ROOMS = ("bsconv", "sepconv", "blur_max_pool", "dsconv_parts", "se", "mbconv")  # in the order of schemas.inc


def test_functional_schemas() -> None:
    names = [schema.partition("(")[0] for schema in _library.schemas()]
    convolutions = ["dwconv_fwd", "dwconv_bwd", "dwconv_stats", "dwconv_stats_bwd", "dsconv_fwd", "dsconv_pool_fwd"]
    convolutions += ["dsconv_bwd"]
    norms = ["dsconv_norm_fwd", "dsconv_norm_bwd", "batch_norm_affine"]
    rooms = [f"{room}_{which}" for room in LATER_ROOMS for which in ("fwd", "bwd")]
    assert names == [*convolutions, *norms, *rooms, "effnet_fwd"]
    for name in names:
        schema = getattr(torch.ops.effops, name).default._schema
        assert not schema.is_mutable
        assert all(argument.alias_info is None for argument in schema.arguments)


def dw_arguments(memory_format: torch.memory_format, dtype: torch.dtype, stride: int = 2) -> tuple:
    x = rand(2, 6, 7, 6, dtype=dtype, memory_format=memory_format)
    w, per_channel = rand(12, 1, 3, 3, dtype=dtype), [rand(12, dtype=dtype) for _ in range(3)]
    residual = rand(2, 12, 4, 3, dtype=dtype)
    geometry = [stride, stride, 1, 1, 1, 1, 1, 1, 2, int(memory_format == torch.channels_last), 4, 1, 0]
    return (x, w, *per_channel, residual, geometry, 0.1)


def ds_arguments(memory_format: torch.memory_format, dtype: torch.dtype) -> tuple:
    x = rand(2, 6, 7, 6, dtype=dtype, memory_format=memory_format)
    through = rand(2, 3, 7, 6, dtype=dtype, memory_format=memory_format)
    dw = [rand(6, 1, 3, 3, dtype=dtype), *[rand(6, dtype=dtype) for _ in range(3)], rand(2, 6, 7, 6, dtype=dtype)]
    pw = [rand(5, 9, 1, 1, dtype=dtype), *[rand(5, dtype=dtype) for _ in range(3)], rand(2, 5, 7, 6, dtype=dtype)]
    geometry = [1, 1, 1, 1, 1, 1, 1, 1, 1, int(memory_format == torch.channels_last), 1, 4, 4, 0, 2, 0, 0]
    return (x, through, *dw, *pw, geometry, [0.1, 0.2])


def operator_calls(memory_format: torch.memory_format, dtype: torch.dtype) -> Iterator[tuple[Any, tuple]]:
    """Every operator with arguments that use all of its tensors."""
    ops = torch.ops.effops
    dw, ds = dw_arguments(memory_format, dtype), ds_arguments(memory_format, dtype)
    yield ops.dwconv_fwd.default, dw
    yield ops.dwconv_bwd.default, (rand(2, 12, 4, 3, dtype=dtype), None, *dw, 0b111111)
    yield ops.dwconv_bwd.default, (rand(2, 12, 4, 3, dtype=dtype), None, *dw, 0b010010)
    statistics = (*dw[:3], [*dw[6][:10], 0, 0, 0])
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    yield ops.dwconv_stats.default, statistics
    yield (
        ops.dwconv_stats_bwd.default,
        (rand(12, dtype=wide), rand(12, dtype=wide), rand(12, dtype=wide), *statistics, 0b111),
    )
    yield ops.dsconv_fwd.default, ds
    yield ops.dsconv_pool_fwd.default, ds
    yield ops.dsconv_bwd.default, (rand(2, 7, 7, 6, dtype=dtype), None, *ds, 0b111111111111)
    yield ops.dsconv_bwd.default, (rand(2, 7, 7, 6, dtype=dtype), None, *ds, 0b000010000101)
    yield ops.dsconv_norm_fwd.default, (*ds, 1e-5)
    head = (
        rand(2, 7, 7, 6, dtype=dtype),
        rand(2, 5, 7, 6, dtype=dtype),
        rand(5, dtype=wide),
        rand(5, dtype=wide).abs(),
    )
    yield ops.dsconv_norm_bwd.default, (*head, *ds, 1e-5, 0b111111111111)
    yield ops.dsconv_norm_bwd.default, (*head, *ds, 1e-5, 0b011010000101)


def test_opcheck(memory_format: torch.memory_format, cpp: str) -> None:
    for operator, arguments in operator_calls(memory_format, torch.float32):
        result = torch.library.opcheck(operator, arguments)
        assert set(result.values()) == {"SUCCESS"}, (operator, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fakes_tell_what_the_kernels_return(memory_format: torch.memory_format, dtype: torch.dtype, cpp: str) -> None:
    for operator, arguments in operator_calls(memory_format, dtype):
        real = operator(*arguments)
        meta = operator(*[a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments])
        real, meta = ([r] if isinstance(r, torch.Tensor) else list(r) for r in (real, meta))
        facts = [[(t.shape, t.dtype, t.stride()) for t in tensors] for tensors in (real, meta)]
        assert facts[0] == facts[1], operator


# ---- memory format --------------------------------------------------------------------------------------------------


def layouts(shape: tuple[int, int, int, int]) -> Iterator[torch.Tensor]:
    """Tensors of a shape with every order of strides, dense and cropped, chunks, expanded."""
    n, c, h, w = shape
    for order in itertools.permutations(range(4)):
        stored = [shape[i] for i in order]
        back = [order.index(i) for i in range(4)]
        yield torch.ones(stored).permute(back)
        yield torch.ones([size + 2 for size in stored])[tuple(slice(1, 1 + size) for size in stored)].permute(back)
    yield torch.ones(n, c + 8, h, w).contiguous(memory_format=torch.channels_last)[:, 8:]
    yield torch.ones(n, c, h, w).contiguous(memory_format=torch.channels_last)
    yield torch.empty(shape, memory_format=torch.channels_last).fill_(1)
    yield torch.ones(1, c, h, w).expand(shape)
    yield torch.ones(n, 1, h, w).expand(shape)
    yield torch.ones(n, c, 1, 1).expand(shape)


def test_output_strides_are_those_of_conv2d(backend: str) -> None:
    # Interpreted kernels see every seventh layout of a shape, and over the shapes every layout.
    share = 7 if interpreted(backend) else 1
    for number, shape in enumerate(itertools.product((0, 1, 3), (1, 5), (1, 4), (1, 3))):
        weight = torch.ones(shape[1], 1, 3, 3)
        pointwise = torch.ones(4, shape[1], 1, 1)
        for x in itertools.islice(layouts(shape), number % share, None, share):
            found = EF.depthwise_conv2d(x, weight, padding=1, backend=backend)
            if shape[0]:  # of an empty batch F.conv2d returns strides of 0; effops those of a fresh tensor
                expected = F.conv2d(x, weight, padding=1, groups=shape[1])
                assert found.stride() == expected.stride(), (shape, x.stride())
            else:
                assert found.is_contiguous() and 0 not in found.stride()
            found = EF.ds_conv2d(x, weight, pointwise, padding=1, backend=backend)
            fresh = torch.empty(
                (shape[0], 4, *shape[2:]),
                memory_format=FORMATS["channels_last" if is_channels_last(x) else "contiguous"],
            )
            assert found.stride() == fresh.stride(), (shape, x.stride())


def test_channels_last_is_read_from_symbolic_strides() -> None:
    for shape in ((2, 5, 4, 3), (2, 1, 4, 3), (3, 5, 1, 1)):
        for x in layouts(shape):
            fake = FakeTensorMode(shape_env=ShapeEnv()).from_tensor(x)
            assert is_channels_last(fake) == is_channels_last(x), (shape, x.stride())


def test_the_weight_never_decides_the_format(backend: str) -> None:
    weight = rand(6, 1, 3, 3).contiguous(memory_format=torch.channels_last)
    pointwise = rand(4, 6, 1, 1).contiguous(memory_format=torch.channels_last)
    for fmt, other in ((torch.contiguous_format, torch.channels_last), (torch.channels_last, torch.contiguous_format)):
        x = rand(2, 6, 5, 7, memory_format=fmt)
        through, residual = rand(2, 3, 3, 5, memory_format=other), rand(2, 4, 3, 5, memory_format=other)
        wide = torch.cat((rand(4, 3, 1, 1), pointwise), 1)
        for out in (
            EF.depthwise_conv2d(x, weight, backend=backend),
            EF.ds_conv2d(x, weight, pointwise, residual=residual, backend=backend),
            EF.ds_conv2d(x, weight, wide, passthrough=through, keep=2, backend=backend),
        ):
            assert out.is_contiguous(memory_format=fmt) and not out.is_contiguous(memory_format=other)


# ---- torch.compile --------------------------------------------------------------------------------------------------


def dw_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    return EF.depthwise_conv2d(x, w, b, 1, 1, activation="silu", scale=b, residual=x, backend=backend)


def ds_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    pw = w.new_ones(8, 8, 1, 1) * b.view(-1, 1, 1, 1)
    return EF.ds_conv2d(x, w, pw, b, stride=1, padding=1, dw_activation="relu6", residual=x, backend=backend)


def vgnet_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    left, right = x.chunk(2, 1)
    pw = w.new_ones(4, 8, 1, 1) * b.view(1, -1, 1, 1)
    left, right = EF.half_identity2d(left, right, w[:4], pw, activation="silu", scale=b[4:], backend=backend)
    left, right = EF.half_identity2d(left, right, "vgnet8", pw, backend=backend)
    return EF.downsampling2d(torch.cat((left, right), 1), "vgnet_blur", pw, keep=4, backend=backend)


def stats_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    mean, var = EF.depthwise_stats2d(x, w, b, padding=1, backend=backend)
    scale = torch.rsqrt(var + 1e-5)
    shift = b - mean * scale
    return EF.depthwise_conv2d(x, w, b, 1, 1, scale=scale, shift=shift, post_activation="gelu", backend=backend)


def norm_chain(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor, backend: str) -> torch.Tensor:
    left, right = x.chunk(2, 1)
    pw = w.new_ones(4, 8, 1, 1) * b.view(1, -1, 1, 1)
    running = [x.new_zeros(4), x.new_ones(4)]
    norm = EF.BatchNorm(b[:4], b[4:], *running)
    left, right = EF.half_identity2d(left, right, w[:4], pw, activation="silu", batch_norm=norm, backend=backend)
    return torch.cat((left, right * running[0].view(-1, 1, 1) + running[1].view(-1, 1, 1)), 1)


CHAINS: dict[str, Callable[..., torch.Tensor]] = {
    "dwconv": dw_chain,
    "dsconv": ds_chain,
    "vgnet": vgnet_chain,
    "stats": stats_chain,
    "norm": norm_chain,
}


def leaves(batch: int, memory_format: torch.memory_format = torch.contiguous_format) -> list[torch.Tensor]:
    x = rand(batch, 8, 9, 10, memory_format=memory_format)
    return [t.requires_grad_() for t in (x, rand(8, 1, 3, 3), rand(8))]


def same_with_gradients(compiled: Callable, eager: Callable, batch: int, memory_format: torch.memory_format) -> None:
    tensors = leaves(batch, memory_format)
    found, expected = compiled(*tensors), eager(*tensors)
    torch.testing.assert_close(found, expected)
    assert found.stride() == expected.stride()
    grad = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(found, tensors, grad), torch.autograd.grad(expected, tensors, grad), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("chain", CHAINS)
def test_compile_fullgraph_with_a_dynamic_batch(chain: str, backend: str) -> None:
    torch._dynamo.reset()
    eager = lambda x, w, b: CHAINS[chain](x, w, b, backend)  # noqa: E731
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for batch in (2, 3, 5):
        same_with_gradients(compiled, eager, batch, torch.channels_last)
    # One graph for batch 2, one for any batch; a third would be a guard too many.
    assert counter.frame_count <= 2


def test_compile_in_evaluation_and_dynamic_size(backend: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x, w, b: ds_chain(x, w, b, backend), fullgraph=True, backend=counter, dynamic=True)
    graphs = []
    with torch.no_grad():
        for shape in ((2, 8, 9, 10), (3, 8, 12, 7), (5, 8, 20, 20)):
            tensors = (rand(*shape), rand(8, 1, 3, 3), rand(8))
            torch.testing.assert_close(compiled(*tensors), ds_chain(*tensors, backend))
            graphs.append(counter.frame_count)
    assert len(set(graphs)) == 1, "another size made another graph"


def test_compile_keeps_the_kernels_in_the_graph(cpp: str) -> None:
    graphs = []

    def keep(graph: torch.fx.GraphModule, _inputs: Any) -> Callable:
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    torch.compile(lambda x, w, b: dw_chain(x, w, b, cpp), fullgraph=True, backend=keep)(
        *[t.detach() for t in leaves(2)]
    )
    targets = [node.target for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert torch.ops.effops.dwconv_fwd.default in targets
    assert not any("conv2d" in str(target) for target in targets)


def test_compile_obeys_use_backend(cpp: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(lambda x, w, b: dw_chain(x, w, b, "auto"), fullgraph=True, backend=counter)
    tensors = [t.detach() for t in leaves(2)]
    seen = []
    for name in ("cpp", "reference", "cpp"):
        with effops.use_backend(name):
            compiled(*tensors)
        seen.append(any("effops" in str(node.target) for node in counter.graphs[-1].graph.nodes))
    assert seen == [True, False, False]  # the third call reuses the first's graph
    assert counter.frame_count == 2


def test_compile_with_use_backend_inside() -> None:
    def inside(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        with effops.use_backend("reference"):
            return EF.depthwise_conv2d(x, w)

    torch._dynamo.reset()
    x, w = rand(2, 8, 5, 5), rand(8, 1, 3, 3)
    torch.testing.assert_close(torch.compile(inside, fullgraph=True, backend="eager")(x, w), inside(x, w))


def test_compile_of_a_transform_takes_the_reference() -> None:
    def gradient(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return torch.func.grad(lambda t: EF.depthwise_conv2d(t, w, activation="silu").sum())(x)

    torch._dynamo.reset()
    x, w = rand(2, 8, 5, 5), rand(8, 1, 3, 3)
    torch.testing.assert_close(torch.compile(gradient, fullgraph=True, backend="eager")(x, w), gradient(x, w))


@pytest.mark.slow
@pytest.mark.parametrize("chain", ["dsconv", "vgnet"])
def test_compile_by_inductor(chain: str, backend: str) -> None:
    torch._dynamo.reset()
    eager = lambda x, w, b: CHAINS[chain](x, w, b, backend)  # noqa: E731
    same_with_gradients(torch.compile(eager, fullgraph=True), eager, 2, torch.channels_last)


def test_symbolic_tracing_without_dynamo(backend: str) -> None:
    def call(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return ds_chain(x, w, b, backend)

    example = [t.detach() for t in leaves(2)]
    graph = make_fx(call, tracing_mode="symbolic")(*example)
    other = [t.detach() for t in leaves(4)]
    torch.testing.assert_close(graph(*other), call(*other))


# ---- torch.export ---------------------------------------------------------------------------------------------------


class _Exported(torch.nn.Module):
    def __init__(self, backend: str) -> None:
        super().__init__()
        self.weight, self.pw_weight = torch.nn.Parameter(rand(8, 1, 3, 3)), torch.nn.Parameter(rand(8, 8, 1, 1))
        self.backend = backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = EF.ds_conv2d(x, self.weight, self.pw_weight, padding=1, residual=x, activation="relu", backend=self.backend)
        return EF.shared_depthwise_conv2d(x, self.weight[:4], stride=2, padding=(0, 1, 0, 1), backend=self.backend)


def test_export_with_dynamic_batch_and_size(backend: str) -> None:
    model = _Exported(backend)
    # From 4 on: torch's own strided convolution, too, guards against an output of one row or column.
    sizes = {"x": {0: Dim("batch"), 2: Dim("height", min=4), 3: Dim("width", min=4)}}
    program = export(model, (rand(2, 8, 9, 10),), dynamic_shapes=sizes)
    for shape in ((1, 8, 9, 10), (3, 8, 17, 4)):
        x = rand(*shape)
        torch.testing.assert_close(program.module()(x), model(x))
    calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    for name in ("dsconv_fwd", "dwconv_fwd"):
        assert (f"effops.{name}.default" in calls) is (backend == "cpp")
        assert (f"effops.{name}_triton.default" in calls) is (backend == "triton")


# ---- autocast -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_as_conv2d(input_dtype: torch.dtype, backend: str) -> None:
    x, w, b = rand(2, 8, 6, 6, dtype=input_dtype), rand(8, 1, 3, 3, dtype=input_dtype), rand(8, dtype=input_dtype)
    pw = rand(4, 8, 1, 1, dtype=input_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        u = F.conv2d(x, w, b, groups=8)
        expected = F.conv2d(u, pw)
        found = EF.depthwise_conv2d(x, w, b, backend=backend)
        assert found.dtype == u.dtype
        torch.testing.assert_close(found, u, rtol=2e-2, atol=2e-2)
        found = EF.ds_conv2d(x, w, pw, b, backend=backend)
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)
        assert EF.fixed_filter_conv2d(x, "vgnet8", backend=backend).dtype == u.dtype
        mean, var = EF.depthwise_stats2d(x, w, b, backend=backend)
        assert mean.dtype == var.dtype == (torch.float64 if input_dtype == torch.float64 else torch.float32)
    assert EF.depthwise_conv2d(x, w, b, backend=backend).dtype == input_dtype


def test_autocast_casts_what_is_mixed_and_keeps_float32_affine(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x, w, pw = rand(2, 8, 6, 6, dtype=torch.bfloat16), rand(8, 1, 3, 3), rand(8, 8, 1, 1)
    scale = rand(8).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = EF.ds_conv2d(x, w, pw, rand(8), padding=1, scale=scale, shift=scale, residual=x.float(), backend=backend)
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()
    assert scale.grad.dtype == torch.float32
    if backend == "cpp":  # the operator itself received the scale unrounded
        seen = []
        real = dsconv_room.KERNELS["cpp"]
        spy = real._replace(
            forward=lambda *args: seen.append([getattr(a, "dtype", None) for a in args]) or real.forward(*args)
        )
        monkeypatch.setitem(dsconv_room.KERNELS, "cpp", spy)
        with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
            EF.ds_conv2d(x, w, pw, rand(8), padding=1, dw_scale=scale, scale=scale, backend=backend)
        half, full = torch.bfloat16, torch.float32
        assert seen == [[half, None, half, half, full, None, None, half, None, full, None, None, None, None]]


def test_autocast_gradients_have_their_parameters_dtype(backend: str) -> None:
    tensors = leaves(2)
    with torch.autocast("cpu", torch.bfloat16):
        out = ds_chain(*tensors, backend)
    out.float().square().mean().backward()
    assert [t.grad.dtype for t in tensors] == [torch.float32] * 3


def test_autocast_can_be_disabled_inside(backend: str) -> None:
    with torch.autocast("cpu", torch.bfloat16), torch.autocast("cpu", enabled=False):
        assert EF.depthwise_conv2d(rand(1, 8, 5, 5), rand(8, 1, 3, 3), backend=backend).dtype == torch.float32


def test_autocast_under_compile(backend: str) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(lambda x, w, b: ds_chain(x, w, b, backend), fullgraph=True, backend="aot_eager")
    tensors = [t.detach() for t in leaves(2)]
    with torch.autocast("cpu", torch.bfloat16):
        found, expected = compiled(*tensors), ds_chain(*tensors, backend)
    assert found.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(found, expected, rtol=5e-2, atol=5e-2)


# ---- determinism ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chain", CHAINS)
def test_bitwise_repeats(chain: str, backend: str) -> None:
    torch.set_num_threads(2)
    size = (2, 8, 14, 17) if interpreted(backend) else (4, 8, 40, 40)  # several tiles of either
    tensors = [t.requires_grad_() for t in (rand(*size), rand(8, 1, 3, 3), rand(8))]

    def run() -> list[torch.Tensor]:
        out = CHAINS[chain](*tensors, backend)
        return [out, *torch.autograd.grad(out, tensors, torch.ones_like(out))]

    first = run()
    for _ in range(1 if interpreted(backend) else 3):
        for a, b in zip(run(), first, strict=True):
            assert torch.equal(a, b)


# ---- FLOPs ----------------------------------------------------------------------------------------------------------


def flops(function: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        function()
    return counter.get_total_flops()


def test_flops_are_two_a_multiply_accumulate(backend: str) -> None:
    x, w, pw = rand(2, 8, 9, 10), rand(16, 1, 3, 5), rand(6, 19, 1, 1)
    depthwise = 2 * (2 * 16 * 4 * 3) * 15
    assert flops(lambda: EF.depthwise_conv2d(x, w, stride=2, backend=backend)) == depthwise
    assert flops(lambda: EF.depthwise_stats2d(x, w, stride=2, backend=backend)) == depthwise
    through = rand(2, 3, 4, 3)
    both = depthwise + 2 * (2 * 6 * 4 * 3) * 19
    for pool in (False, True):
        found = flops(lambda: EF.ds_conv2d(x, w, pw, stride=2, passthrough=through, keep=2, pool=pool, backend=backend))  # noqa: B023
        assert found == both


# ---- autograd.Functions ---------------------------------------------------------------------------------------------


def test_functions_are_documented_public_api() -> None:
    assert effops.autograd.__all__ == sorted(function.__name__ for function in KernelFunction.__subclasses__())
    for name in effops.autograd.__all__:
        function = getattr(effops.autograd, name)
        assert issubclass(function, torch.autograd.Function)
        assert f"{name}.apply(" in function.__doc__ and "Returns:" in function.__doc__


def test_functions_give_what_the_functional_layer_gives(cpp: str) -> None:
    x, w, b = leaves(2)
    pw = rand(8, 8, 1, 1)
    g = [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 1, 0, 0]
    found = effops.autograd.DepthwiseConv2dFunction.apply(x, w, b, None, None, None, g, 0.0)
    assert torch.equal(found, EF.depthwise_conv2d(x, w, b, padding=1, activation="relu", backend=cpp))
    tensors = (x, None, w, b, None, None, None, pw, None, None, None, x)
    found = effops.autograd.DSConv2dFunction.apply(*tensors, [*g[:12], 0, 4, 0, 0, 0], [0.0, 0.0], cpp)
    expected = EF.ds_conv2d(
        x, w, pw, b, padding=1, dw_activation="relu", residual=x, post_activation="silu", backend=cpp
    )
    assert torch.equal(found, expected)
    mean, var = effops.autograd.DepthwiseStatsFunction.apply(x, w, b, [*g[:10], 0, 0, 0])
    assert torch.equal(mean, EF.depthwise_stats2d(x, w, b, padding=1, backend=cpp)[0])
    torch.autograd.backward((mean, var), (torch.ones(8), torch.ones(8)))
    assert x.grad is not None and w.grad is not None and b.grad is not None


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (0, 1, 2)])
def test_only_the_gradients_asked_for_are_computed(
    wanted: tuple[int, ...], cpp: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    real = dwconv_room.KERNELS["cpp"]
    spy = real._replace(backward=lambda *args: masks.append(args[-1]) or real.backward(*args))
    monkeypatch.setitem(dwconv_room.KERNELS, "cpp", spy)
    tensors = [rand(2, 8, 5, 5), rand(8, 1, 3, 3), rand(8)]
    for index in wanted:
        tensors[index].requires_grad_()
    EF.depthwise_conv2d(*tensors, activation="silu", backend=cpp).sum().backward()
    assert masks == [sum(1 << index for index in wanted)]
    assert [t.grad is not None for t in tensors] == [index in wanted for index in range(3)]


def test_a_plain_residual_takes_no_kernel_backward(cpp: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("the backward kernel ran")

    monkeypatch.setitem(dwconv_room.KERNELS, "cpp", dwconv_room.KERNELS["cpp"]._replace(backward=never))
    residual = rand(2, 8, 3, 3).requires_grad_()
    grad = rand(2, 8, 3, 3)
    EF.depthwise_conv2d(rand(2, 8, 5, 5), rand(8, 1, 3, 3), residual=residual, backend=cpp).backward(grad)
    assert torch.equal(residual.grad, grad)


def test_no_function_where_nothing_needs_a_gradient(cpp: str) -> None:
    x, w, b = leaves(1)
    assert EF.depthwise_conv2d(x.detach(), w.detach(), backend=cpp).grad_fn is None
    with torch.no_grad():
        assert EF.depthwise_conv2d(x, w, b, backend=cpp).grad_fn is None
    assert type(EF.depthwise_conv2d(x.detach(), w.detach(), b, backend=cpp).grad_fn).__name__.startswith("Depthwise")


@pytest.mark.parametrize("chain", CHAINS)
def test_double_backward_with_one_tensor_in_two_places(chain: str, cpp: str) -> None:
    """x is input and residual, b is bias and scale: their gradients must stay apart, the second time too."""
    tensors = [t.detach().double().requires_grad_() for t in leaves(2)]

    def second(backend: str) -> tuple[torch.Tensor, ...]:
        out = CHAINS[chain](*tensors, backend)
        first = torch.autograd.grad(out.square().sum(), tensors, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), tensors)

    for found, expected in zip(second(cpp), second("reference"), strict=True):
        torch.testing.assert_close(found, expected)


def test_gradient_penalty_reaches_what_came_before(cpp: str) -> None:
    """The second derivative flows through the saved tensors into their own history."""
    z = rand(2, 8, 5, 5, dtype=torch.float64).requires_grad_()
    w = rand(8, 1, 3, 3, dtype=torch.float64)

    def penalty(backend: str) -> torch.Tensor:
        x = z.tanh()
        out = EF.depthwise_conv2d(x, w, activation="silu", backend=backend)
        (grad,) = torch.autograd.grad(out.sum(), x, create_graph=True)
        return torch.autograd.grad(grad.square().sum(), z)[0]

    torch.testing.assert_close(penalty(cpp), penalty("reference"))
