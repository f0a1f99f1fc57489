"""Choice of the backend: order, reasons, cost rule, selection by argument, context and environment; explain; info."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import effops
import effops.functional as EF
from effops import _library, backends, cli, info

X, W, PW = torch.ones(2, 8, 9, 9), torch.ones(8, 1, 3, 3), torch.ones(4, 8, 1, 1)


def taken(function: Any = None, *args: Any, **kwargs: Any) -> list[str]:
    """The backends that a call takes."""
    function = function or (lambda: EF.depthwise_conv2d(X, W))
    return [call.backend for call in effops.explain(function, *args, **kwargs).calls]


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> str:
    """The kernel library made absent; returns the reason."""
    monkeypatch.setattr(_library, "kernels_loaded", False)
    monkeypatch.setattr(_library, "why_not_loaded", "the kernel library was left out")
    return "the kernel library was left out"


class _Other(backends.Backend):
    """A backend at the head of the list that never runs what it takes: for the rules of choice alone."""

    name = "other"

    def __init__(self, reasons: list[str], worth: bool) -> None:
        self.reasons, self.worth = reasons, worth

    def why_not(self, call: backends.Call) -> list[str]:
        return self.reasons

    def worth_it(self, call: backends.Call) -> bool:
        return self.worth


def call() -> backends.Call:
    geometry = [1, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 0, 0]
    return backends.Call("dwconv", "depthwise_conv2d", X, W, None, geometry, (2, 8, 7, 7))


def backend_named(name: str) -> backends.Backend:
    return next(backend for backend in backends.BACKENDS if backend.name == name)


@pytest.fixture
def no_gpu_kernels(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The backends for GPUs made absent; returns the reason of each."""
    monkeypatch.setattr(_library, "why_no_cuda", "cuda was left out")
    for name in ("triton", "cuda"):
        monkeypatch.setattr(backend_named(name), "missing", f"{name} was left out", raising=False)
        monkeypatch.setattr(backend_named(name), "on_cpu", False, raising=False)
    no_gpu = "was left out; device cpu is not a CUDA GPU"
    hint = "TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly"
    return {"triton": f"triton {no_gpu} ({hint})", "cuda": f"cuda {no_gpu}"}


def test_order_and_names() -> None:
    assert [backend.name for backend in backends.BACKENDS] == ["triton", "cuda", "cpp", "reference"]
    assert backends.names() == ("auto", "triton", "cuda", "cpp", "reference")


def test_auto_takes_the_first_that_can_and_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    for reasons, worth, expected in (([], True, True), (["too old"], True, False), ([], False, False)):
        monkeypatch.setattr(backends, "BACKENDS", [_Other(reasons, worth), backends.BACKENDS[-1]])
        assert (backends.choose(call(), "auto") == "other") is expected


def test_a_backend_asked_for_by_name_is_taken_whatever_its_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "BACKENDS", [_Other([], False), *backends.BACKENDS])
    assert backends.choose(call(), "other") == "other"


def test_a_backend_asked_for_by_name_never_falls_back(monkeypatch: pytest.MonkeyPatch, no_kernels: str) -> None:
    rest = [backend_named("cpp"), backend_named("reference")]
    monkeypatch.setattr(backends, "BACKENDS", [_Other(["too old", "too slow"], True), *rest])
    with pytest.raises(RuntimeError) as caught:
        backends.choose(call(), "cpp")
    assert str(caught.value).splitlines() == [
        f"depthwise_conv2d: backend 'cpp' cannot run input float32[2,8,9,9] on cpu: {no_kernels}",
        "backends, in the order 'auto' tries them:",
        "  other: too old; too slow",
        f"  cpp: {no_kernels}",
        "  reference: can run this: pass backend='reference' or 'auto'",
    ]


@pytest.mark.parametrize("dtype", [torch.float16])
def test_cpp_names_every_reason(dtype: torch.dtype, no_kernels: str) -> None:
    x, w = X.to("meta", dtype), W.to("meta", dtype)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(RuntimeError) as caught:
        EF.depthwise_conv2d(x, w, backend="cpp")
    first = str(caught.value).splitlines()[0]
    assert first == (
        f"depthwise_conv2d: backend 'cpp' cannot run input float16[2,8,9,9] on meta: {no_kernels}; "
        "device meta is not the CPU; dtype float16 is not supported (float32, bfloat16, float64); "
        "functorch transforms (vmap, grad, jvp) and forward-mode AD need differentiable torch ops"
    )
    assert taken(EF.depthwise_conv2d, x, w) == ["reference"]


@pytest.mark.parametrize("name", ["triton", "cuda", "cpp"])
def test_operator_without_kernels_is_a_reason(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A room whose kernels a backend lacks: refused by name, passed over by auto."""
    monkeypatch.setattr(backend_named(name), "operators", frozenset())
    assert f"it has no kernels for {call().name}" in backend_named(name).why_not(call())
    assert backends.choose(call(), "auto") != name


def test_reasons_are_empty_exactly_where_cpp_runs(cpp: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.float16):
        for device in ("cpu", "meta"):
            c = call()._replace(input=X.to(device, dtype))
            runs = device == "cpu" and dtype != torch.float16
            assert (not backend_named("cpp").why_not(c)) is runs


def test_auto_without_kernels_is_the_reference(no_kernels: str) -> None:
    assert taken() == ["reference"]


def test_auto_with_kernels_is_cpp(cpp: str) -> None:
    assert taken() == ["cpp"]


def test_use_backend_holds_inside_and_is_restored(cpp: str) -> None:
    with effops.use_backend("reference"):
        assert taken() == ["reference"]
        with effops.use_backend("cpp"):
            assert taken() == ["cpp"]
        assert taken() == ["reference"]
        with effops.use_backend("auto"):
            assert taken() == ["cpp"]
    assert taken() == ["cpp"]
    with pytest.raises(KeyError), effops.use_backend("reference"):
        raise KeyError
    assert taken() == ["cpp"]


def test_use_backend_never_falls_back(no_kernels: str) -> None:
    with effops.use_backend("cpp"), pytest.raises(RuntimeError, match="backend 'cpp' cannot run"):
        EF.depthwise_conv2d(X, W)


def test_the_argument_goes_before_the_context(cpp: str) -> None:
    with effops.use_backend("reference"):
        assert taken(lambda: EF.depthwise_conv2d(X, W, backend="cpp")) == ["cpp"]
    with effops.use_backend("cpp"):
        assert taken(lambda: EF.ds_conv2d(X, W, PW, backend="reference")) == ["reference"]


def test_the_choice_of_forward_holds_for_backward(cpp: str) -> None:
    x = X.clone().requires_grad_()
    with effops.use_backend("cpp"):
        y = EF.depthwise_conv2d(x, W)
    with effops.use_backend("reference"):
        y.sum().backward()
    assert type(y.grad_fn).__name__ == "DepthwiseConv2dFunctionBackward"
    expected = torch.autograd.grad(EF.depthwise_conv2d(x, W, backend="reference").sum(), x)[0]
    assert torch.equal(x.grad, expected)


# ---- Triton ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("triton", "cuda"))
def test_kernels_for_gpus_name_every_reason(name: str, no_gpu_kernels: dict[str, str]) -> None:
    x, w = X.to("meta", torch.int32), W.to("meta")
    c = call()._replace(input=x, weight=w)
    with torch.autograd.forward_ad.dual_level():
        assert backend_named(name).why_not(c) == [
            f"{name} was left out",
            "device meta is not a CUDA GPU",
            "dtype int32 is not supported (float32, float16, bfloat16, float64)",
            "functorch transforms (vmap, grad, jvp) and forward-mode AD need differentiable torch ops",
        ]


def test_triton_interprets_on_the_cpu_when_asked_by_name_only(triton: str, cpp: str) -> None:
    assert taken(EF.depthwise_conv2d, X, W) == ["cpp"]
    assert taken(lambda: EF.depthwise_conv2d(X, W, backend="triton")) == ["triton"]


def test_cuda_runs_on_the_host_when_asked_by_name_only(cuda: str, cpp: str) -> None:
    assert taken(EF.depthwise_conv2d, X, W) == ["cpp"]
    assert taken(lambda: EF.depthwise_conv2d(X, W, backend="cuda")) == ["cuda"]


def test_cuda_without_its_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert torch.version.cuda or _library._load_cuda() == "this torch is built without CUDA"
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(_library, "CUDA_LIBRARY_PATH", tmp_path / "libeffops_cuda.so")
    assert _library._load_cuda() == "libeffops_cuda.so is not built (EFFOPS_BUILD=cuda builds it; it needs nvcc)"
    (tmp_path / "libeffops_cuda.so").write_bytes(b"no library")
    assert f"{tmp_path / 'libeffops_cuda.so'} does not load: OSError: " in _library._load_cuda()


def test_triton_interpreted_refuses_bfloat16_products(triton: str) -> None:
    x, w, pw = X.bfloat16(), W.bfloat16(), PW.bfloat16()
    with pytest.raises(RuntimeError, match="interpreter multiplies bfloat16 matrices wrongly"):
        EF.ds_conv2d(x, w, pw, backend="triton")


@pytest.mark.parametrize(("version", "reason"), [("3.5.1", "Triton 3.5.1 is too old; 3.6 or newer"), ("3.10.0", None)])
def test_triton_version(monkeypatch: pytest.MonkeyPatch, version: str, reason: str | None) -> None:
    monkeypatch.setattr(backends.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(backends.importlib.metadata, "version", lambda name: version)
    found = backends._why_no_triton()
    assert found is None if reason is None else found.startswith(reason)


# ---- transforms -----------------------------------------------------------------------------------------------------


TRANSFORMS = {
    "vmap": lambda f: torch.vmap(f)(X[None]),
    "grad": lambda f: torch.func.grad(lambda t: f(t).sum())(X),
    "jacrev": lambda f: torch.func.vjp(f, X)[1](torch.ones(2, 4, 9, 9)),
    "jvp": lambda f: torch.func.jvp(f, (X,), (X,)),
    "vmap_of_grad": lambda f: torch.vmap(torch.func.grad(lambda t: f(t).sum()))(X[None]),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_transforms_take_the_reference_and_agree_with_torch(name: str) -> None:
    def ours(t: torch.Tensor) -> torch.Tensor:
        return EF.ds_conv2d(t, W, PW, padding=1, dw_activation="silu", activation="silu")

    def stock(t: torch.Tensor) -> torch.Tensor:
        u = torch.nn.functional.silu(torch.nn.functional.conv2d(t, W, padding=1, groups=8))
        return torch.nn.functional.silu(torch.nn.functional.conv2d(u, PW))

    ours_found, stock_found = TRANSFORMS[name](ours), TRANSFORMS[name](stock)
    torch.testing.assert_close(ours_found, stock_found)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_cpp_by_name_refuses_transforms(name: str, cpp: str) -> None:
    with pytest.raises(RuntimeError, match="functorch transforms .* and forward-mode AD need differentiable torch ops"):
        TRANSFORMS[name](lambda t: EF.ds_conv2d(t, W, PW, padding=1, backend=cpp))


def test_forward_mode_dual_numbers() -> None:
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(X, X * 2)
        tangent = torch.autograd.forward_ad.unpack_dual(EF.depthwise_conv2d(dual, W)).tangent
    torch.testing.assert_close(tangent, EF.depthwise_conv2d(X * 2, W))


# ---- explain --------------------------------------------------------------------------------------------------------


class _Block(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return EF.ds_conv2d(x, W, PW, stride=2, padding=1, keep=3)


class _Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = _Block()
        self.act = torch.nn.ReLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        EF.depthwise_stats2d(x, W)
        return self.act(self.first(x))


def test_explain_tells_module_call_backend_and_reasons(no_kernels: str, no_gpu_kernels: dict[str, str]) -> None:
    explanation = effops.explain(_Net(), X)
    stats, block = explanation.calls
    assert stats == (
        "",
        "depthwise_stats2d",
        "float32[2,8,9,9] on cpu",
        "3x3",
        "2 x [8]",
        "reference",
        no_gpu_kernels | {"cpp": no_kernels},
    )
    assert block == (
        "first", "ds_conv2d", "float32[2,8,9,9] on cpu", "3x3 stride 2x2 + 1x1", "[2,7,5,5]", "reference",
        no_gpu_kernels | {"cpp": no_kernels},
    )  # fmt: skip
    triton, cuda = no_gpu_kernels.values()
    lines = str(explanation).splitlines()
    assert re.split(" {2,}", lines[0])[-3:] == ["output", "backend", "why not the others"]
    assert lines[1].startswith("-  ")
    assert lines[2].startswith("first") and lines[2].endswith(
        f"reference  triton: {triton}; cuda: {cuda}; cpp: {no_kernels}"
    )
    assert len({line.index(word) for line, word in zip(lines[1:], ("reference", "reference"), strict=True)}) == 1


def test_explain_of_a_chosen_kernel(cpp: str, no_gpu_kernels: dict[str, str]) -> None:
    (found,) = effops.explain(EF.depthwise_conv2d, X, W, padding=1).calls
    assert found.backend == "cpp"
    assert found.why_not == no_gpu_kernels | {"reference": "comes later in the list"}
    with effops.use_backend("reference"):
        (found,) = effops.explain(EF.depthwise_conv2d, X, W).calls
    assert found.why_not == no_gpu_kernels | {"cpp": "another was asked for, or the cost rule prefers it"}


def test_explain_leaves_nothing_behind() -> None:
    net = _Net()
    with pytest.raises(ValueError, match="must have 4 dimensions"):
        effops.explain(net, X[0])
    assert backends._recorder is None
    assert not torch.nn.modules.module._global_forward_hooks and not torch.nn.modules.module._global_forward_pre_hooks
    assert str(effops.explain(torch.nn.ReLU(), X)) == "no effops call was made"


def test_explain_records_no_gradient() -> None:
    seen = []
    effops.explain(lambda t: seen.append(EF.depthwise_conv2d(t, W)), X.clone().requires_grad_())
    assert not seen[0].requires_grad


# ---- info and the command line --------------------------------------------------------------------------------------


def test_info_says_what_works_and_why_not(no_kernels: str, no_gpu_kernels: dict[str, str]) -> None:
    report = info.collect()
    assert report["backends"] == no_gpu_kernels | {"cpp": no_kernels, "reference": "works"}
    assert report["kernel library"] == {"loaded": False, "why not": no_kernels}
    assert report["CUDA kernel library"] == {"loaded": False, "why not": _library.why_no_cuda}
    assert report["effops"] == effops.__version__
    assert report["torch"]["torch"] == torch.__version__
    assert f"  cpp: {no_kernels}" in info.text(report).splitlines()


def test_info_of_a_loaded_library(cpp: str) -> None:
    report = info.collect()
    assert report["backends"]["cpp"] == "works"
    library = report["kernel library"]
    assert library["loaded"] is True
    assert library["isa"] in library["compiled_isas"]
    assert library["compiler"]


def test_info_of_a_loaded_cuda_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_library, "why_no_cuda", None)
    expected = {"loaded": True, "file": str(_library.CUDA_LIBRARY_PATH)}
    assert info.collect()["CUDA kernel library"] == expected


def test_info_never_throws(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(builtins, "open", broken)
    monkeypatch.setattr(_library, "build_info", broken)
    monkeypatch.setattr(_library, "kernels_loaded", True)
    monkeypatch.setattr(info.platform, "platform", broken)
    monkeypatch.setattr(torch, "get_num_threads", broken)
    monkeypatch.setattr(info.metadata, "version", broken)
    monkeypatch.setattr(backend_named("cpp"), "why_not", broken, raising=False)
    report = info.collect()
    for key in ("platform", "torch", "kernel library"):
        assert report[key] == "unknown (OSError: no such thing)"
    assert report["backends"]["cpp"] == "unknown (OSError: no such thing)"
    assert report["backends"]["reference"] == "works"
    assert info.text(report)


def test_info_shows_the_environment(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("EFFOPS_BACKEND", "auto")
    monkeypatch.delenv("EFFOPS_BUILD", raising=False)
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["environment"]["EFFOPS_BACKEND"] == "auto"
    assert report["environment"]["EFFOPS_BUILD"] == "(not set)"


def test_explain_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["explain", "vgnetg_1_0mp", "--shape", "1", "3", "64", "64", "--channels-last"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("module") and len(lines) > 20
    assert any("half_identity2d" in line for line in lines) and any("downsampling2d" in line for line in lines)


@pytest.mark.parametrize("arguments", [[], ["dance"]])
def test_wrong_command(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        cli.main(arguments)
    assert caught.value.code == 2
    assert "usage: effops" in capsys.readouterr().err
