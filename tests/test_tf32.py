"""TF32 in the CUDA kernels' products: where torch's setting for convolutions allows it, and nowhere else."""

from __future__ import annotations

import pytest
import torch
from cases import DsCase, Epi
from helpers import as_leaves, call, gradients, make_grad_output, make_tensors, oracle, to_float64
from torch import Tensor

from effops.ops import geometry as G

# Relative, by norm, as everywhere in the suite. TF32 keeps 11 bits of a factor.
FLOAT32_ERROR, TF32_ERROR = 1e-5, 1e-3
CASE = DsCase(
    id="tf32", n=2, c=24, k=40, h=9, w=10, passthrough=8, keep=8, layout="channels_last",
    dw=Epi(bias=True, activation="silu"), pw=Epi(bias=True, scale=True, shift=True, activation="silu"),
)  # fmt: skip


def allow(tf32: bool) -> None:
    torch.backends.cudnn.allow_tf32 = tf32  # conftest.py restores it


def results(tf32: bool, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """The output and every gradient."""
    allow(tf32)
    tensors = make_tensors(CASE, dtype)
    grad_output = make_grad_output(CASE, (2, 48, 9, 10))
    out, grads = gradients(lambda t: call(t, CASE, "cuda"), tensors, grad_output)
    return {"output": out, **grads}


def truth() -> dict[str, Tensor]:
    grad_output = make_grad_output(CASE, (2, 48, 9, 10))
    out, grads = gradients(lambda t: oracle(t, CASE), to_float64(make_tensors(CASE, torch.float32)), grad_output)
    return {"output": out, **grads}


def test_products_are_tf32_where_torch_allows_it(cuda: str) -> None:
    ieee, tf32 = results(False), results(True)
    for name, right in truth().items():
        error, without = (float((found[name] - right).norm() / right.norm()) for found in (tf32, ieee))
        assert without <= FLOAT32_ERROR, name
        if name == "shift":  # its gradient sums the output's, without a product
            assert torch.equal(tf32[name], ieee[name])
        else:
            assert FLOAT32_ERROR < error <= TF32_ERROR, name


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_only_float32_changes(dtype: torch.dtype, cuda: str) -> None:
    ieee, tf32 = results(False, dtype), results(True, dtype)
    for name, found in ieee.items():
        assert torch.equal(found, tf32[name]), name


def test_backward_takes_what_forward_took(cuda: str) -> None:
    allow(True)
    tensors = as_leaves(make_tensors(CASE, torch.float32))
    out = call(tensors, CASE, cuda)
    allow(False)
    (grad,) = torch.autograd.grad(out, tensors["pw_weight"], make_grad_output(CASE, out.shape))
    assert torch.equal(grad, results(True)["pw_weight"])


def test_newer_settings_count() -> None:
    """The convolutions' own, else the one for everything."""
    before = torch.backends.fp32_precision
    try:
        for generic, own, allowed in (("tf32", "none", True), ("ieee", "none", False), ("tf32", "ieee", False)):
            torch.backends.fp32_precision, torch.backends.cudnn.conv.fp32_precision = generic, own
            assert G.tf32_allowed() == allowed
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.parametrize("tf32", (True, False))
def test_compiled_graph_has_the_setting(tf32: bool, cuda: str) -> None:
    tensors = make_tensors(CASE, torch.float32)
    expected = results(tf32)["output"]
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: call(t, CASE, cuda), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(tensors), expected)


@pytest.mark.parametrize("tf32", (True, False))
def test_exported_graph_has_the_setting(tf32: bool, cuda: str) -> None:
    class Layer(torch.nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            tensors["input"], tensors["pw_weight"] = x, weight
            return call(tensors, CASE, cuda)

    tensors = make_tensors(CASE, torch.float32)
    allow(tf32)
    program = torch.export.export(Layer(), (tensors["input"], tensors["pw_weight"]))
    (geometry,) = [
        node.args[12] for node in program.graph.nodes if node.op == "call_function" and "dsconv" in str(node.target)
    ]
    assert geometry[G.TF32] == tf32
