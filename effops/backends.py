"""Which backend runs a call, and why not the others.

An ordered list: each backend says for a call, as a list of sentences, why it cannot run it (an empty list: it can),
and whether it pays. "auto" takes the first with no reasons whose cost rule agrees; it never raises, because the
reference at the end of the list runs everything. A backend asked for by name never falls back: it raises with every
backend's reasons.

A new backend is one `Backend` in `BACKENDS`, and its operators in the `KERNELS` tables of `effops/ops/<op>`.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.modules import module as _module_hooks

from effops import _library, gpu_choice
from effops.ops.higher_order import transformed
from effops.ops.registration import CUDA_HOST, INTERPRETING

__all__ = ["ExplainedCall", "Explanation", "explain", "names", "use_backend"]

ENV_VARIABLE = "EFFOPS_BACKEND"
INTERPRETED_BFLOAT16_PRODUCT = "Triton's interpreter multiplies bfloat16 matrices wrongly"
_TRANSFORMED = "functorch transforms (vmap, grad, jvp) and forward-mode AD need differentiable torch ops"


class Call(NamedTuple):
    """One call of an operator, as the backends judge it.

    Attributes:
        op: the operator: "dwconv", "dwconv_stats", "dsconv", or a later room's name (`_CHAINS`).
        name: the public function called, for messages.
        input: [N,C,H,W].
        weight: the depthwise weight [B,1,R,S]; a tuple of them where there are several parts; of "se" the reducing one;
            None of blur_max_pool, whose filter is in the geometry.
        pw_weight: the last convolution's weight (dsconv: pointwise [K,C',1,1]; sepconv: column [D,1,R,1]), or None.
        geometry: the int[] of the operator (effops/schemas.inc).
        shape: the last convolution's output shape [N,K,P,Q].
    """

    op: str
    name: str
    input: Tensor
    weight: Tensor | tuple[Tensor, ...] | None
    pw_weight: Tensor | None
    geometry: list[int]
    shape: tuple[int, ...]


class Backend(ABC):
    """One way to run the operators."""

    name: str
    device = "cpu"  # what it is for

    @abstractmethod
    def why_not(self, call: Call) -> Sequence[str]:
        """Why this backend cannot run the call; empty where it can."""

    @abstractmethod
    def worth_it(self, call: Call) -> bool:
        """The cost rule of "auto": False where a later backend is faster on this call."""


class _Reference(Backend):
    """Plain torch ops: runs everything."""

    name = "reference"

    def why_not(self, call: Call) -> Sequence[str]:
        return ()

    def worth_it(self, call: Call) -> bool:
        return True


class _Kernels(Backend):
    """A backend with kernels of its own."""

    operators = frozenset({"dwconv", "dwconv_stats", "dsconv"})  # the ones it has kernels for
    dtypes: tuple[torch.dtype, ...]

    def _call_reasons(self, call: Call) -> list[str]:
        """What holds of kernels on any device: operator, dtype, transforms."""
        reasons = []
        if call.op not in self.operators:
            reasons.append(f"it has no kernels for {call.name}")
        if call.input.dtype not in self.dtypes:
            accepted = ", ".join(map(_word, self.dtypes))
            reasons.append(f"dtype {_word(call.input.dtype)} is not supported ({accepted})")
        if transformed():
            reasons.append(_TRANSFORMED)
        return reasons


class _Cpp(_Kernels):
    """The C++ kernels of csrc/cpu."""

    name = "cpp"
    operators = _Kernels.operators | {"blur_max_pool", "bsconv", "dsconv_parts", "effnet", "mbconv", "se", "sepconv"}
    dtypes = (torch.float32, torch.bfloat16, torch.float64)

    def why_not(self, call: Call) -> Sequence[str]:
        x = call.input
        if (
            _library.kernels_loaded
            and x.is_cpu
            and x.dtype in self.dtypes
            and call.op in self.operators
            and not transformed()
        ):
            return ()
        reasons = []
        if not _library.kernels_loaded:
            reasons.append(str(_library.why_not_loaded))
        if not x.is_cpu:
            reasons.append(f"device {x.device} is not the CPU")
        return reasons + self._call_reasons(call)

    def worth_it(self, call: Call) -> bool:
        return True


def _why_no_triton() -> str | None:
    """Why Triton cannot be imported here; finds out without importing it."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed (pip install 'triton>=3.6'; Linux only)"
    version = importlib.metadata.version("triton")
    if tuple(int(part) for part in version.split(".")[:2]) < (3, 6):
        return f"Triton {version} is too old; 3.6 or newer is needed"
    return None


class _OnGpus(_Kernels):
    """What the two kinds of GPU kernels have in common; both can also run on the CPU, slowly, for tests."""

    device = "cuda"
    dtypes = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
    missing: str | None  # why there are none here
    on_cpu: bool  # whether they run on the CPU in this process
    least_capability = (8, 0)

    def why_not(self, call: Call) -> Sequence[str]:
        x = call.input
        reasons = []
        if self.missing is not None:
            reasons.append(self.missing)
        if x.is_cuda:
            reasons += self._device_reasons(x.device)
        elif not (self.on_cpu and x.is_cpu):
            reasons.append(f"device {x.device} is not a CUDA GPU{self._hint() if x.is_cpu else ''}")
        return reasons + self._call_reasons(call)

    def _hint(self) -> str:
        return ""

    def _device_reasons(self, device: torch.device) -> list[str]:
        if torch.version.hip is not None:
            return ["ROCm is not supported"]
        if self.on_cpu:
            return ["in this process the kernels run on the CPU, for tests"]
        found = torch.cuda.get_device_capability(device)
        if found >= self.least_capability:
            return []
        return [f"compute capability {found[0]}.{found[1]} of {device} is below 8.0 (Ampere)"]

    def worth_it(self, call: Call) -> bool:
        return call.input.is_cuda and not self._yields(call)

    def _yields(self, call: Call) -> bool:
        """Whether the other kind of kernels was faster on a problem like this, and can run it."""
        faster = gpu_choice.faster(call)
        if faster is None or faster == self.name:
            return False
        (other,) = (backend for backend in BACKENDS if backend.name == faster)
        return not other.why_not(call)


class _Triton(_OnGpus):
    """The Triton kernels of effops/ops/<op>/triton.py: CUDA GPUs, and the CPU where they are interpreted (tests)."""

    name = "triton"
    operators = _Kernels.operators | {"blur_max_pool", "bsconv", "dsconv_parts", "mbconv", "se", "sepconv"}
    products = frozenset({"bsconv", "dsconv", "dsconv_parts", "mbconv"})  # operators with a matrix product
    missing = _why_no_triton()
    on_cpu = INTERPRETING

    def why_not(self, call: Call) -> Sequence[str]:
        reasons = list(super().why_not(call))
        if self.on_cpu and call.input.dtype is torch.bfloat16 and call.op in self.products:
            reasons.append(INTERPRETED_BFLOAT16_PRODUCT)
        return reasons

    def _hint(self) -> str:
        return " (TRITON_INTERPRET=1 interprets the kernels on the CPU, slowly)"


class _Cuda(_OnGpus):
    """The CUDA kernels of csrc/cuda, and their host run (tests)."""

    name = "cuda"
    operators = _Kernels.operators | {"blur_max_pool", "bsconv", "dsconv_parts", "mbconv", "se", "sepconv"}
    most_parts = 7  # depthwise windows side by side (csrc/cuda/dsconv_parts.h)
    missing = None if CUDA_HOST else _library.why_no_cuda
    on_cpu = bool(CUDA_HOST)

    def why_not(self, call: Call) -> Sequence[str]:
        reasons = list(super().why_not(call))
        if call.op == "dsconv_parts" and len(call.weight) > self.most_parts:
            reasons.append(f"{len(call.weight)} windows side by side are more than the {self.most_parts} that it takes")
        return reasons


BACKENDS: list[Backend] = [_Triton(), _Cuda(), _Cpp(), _Reference()]


def names() -> tuple[str, ...]:
    """What `backend=`, `use_backend` and EFFOPS_BACKEND accept: "auto", then the backends in the order that it tries.

    Example:
        >>> effops.backends.names()
        ('auto', 'triton', 'cuda', 'cpp', 'reference')
    """
    return ("auto", *(backend.name for backend in BACKENDS))


def _word(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# A plain module global, not a ContextVar: Dynamo's fullgraph rejects those. It holds for the whole process.
_selected: str = os.environ.get(ENV_VARIABLE, "") or "auto"
_recorder: Callable[[Call, Backend], None] | None = None


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs every effops call inside on one backend: `with effops.use_backend("reference"): ...`.

    An argument `backend=` other than "auto" goes before it; it goes before the environment variable EFFOPS_BACKEND. It
    holds for the whole process.

    Args:
        name: one of `effops.backends.names()`.

    Raises:
        TypeError: the name is not a string.
        ValueError: an unknown name.

    Example:
        >>> conv, x = effops.DepthwiseConv2d(8), torch.randn(1, 8, 9, 9)
        >>> with effops.use_backend("reference"):
        ...     y = conv(x)
        >>> torch.equal(y, F.conv2d(x, conv.weight, padding=1, groups=8))
        True
    """
    global _selected
    _check_name(name, "use_backend")
    before = _selected
    _selected = name
    try:
        yield
    finally:
        _selected = before


def _check_name(name: object, where: str) -> None:
    if not isinstance(name, str):
        raise TypeError(f"{where}: the backend must be a string; got {name!r} ({type(name).__name__})")
    if name not in names():
        raise ValueError(f"{where}: unknown backend {name!r}; accepted: {', '.join(map(repr, names()))}")


def allows(name: str, backend: str) -> bool:
    """Whether a call with this `backend` argument may run on the backend `name`: by that name, or under "auto"."""
    wanted = _selected if backend == "auto" else backend
    return wanted == "auto" or wanted == name


def has_kernels(op: str, input: Tensor, backend: str) -> bool:
    """Whether a call with this `backend` argument may find kernels for the operator, or asks for the reference.

    A block of several operators then calls the one that is all of it; else its parts, which more backends have.
    """
    wanted = _selected if backend == "auto" else backend
    if wanted == "reference":
        return True
    kernels = [candidate for candidate in BACKENDS if isinstance(candidate, _Kernels)]
    if wanted == "auto":
        return any(op in candidate.operators for candidate in kernels if candidate.device == input.device.type)
    return any(op in candidate.operators for candidate in kernels if candidate.name == wanted)


def choose(call: Call, backend: str) -> str:
    """The name of the backend that runs the call.

    Args:
        call: the call, validated.
        backend: the call's `backend` argument; "auto" defers to `use_backend` and EFFOPS_BACKEND.

    Raises:
        TypeError, ValueError: not a backend's name.
        RuntimeError: a backend asked for by name cannot run the call; the message lists every backend's reasons.
    """
    wanted = _selected if backend == "auto" else backend
    if wanted == "auto":
        for candidate in BACKENDS:
            if candidate.worth_it(call) and not candidate.why_not(call):  # the cost rule is the cheaper question
                break
    else:
        candidate = _by_name(call, wanted, backend)
        if candidate.why_not(call):
            raise RuntimeError(_refusal(call, candidate))
    if _recorder is not None:
        _recorder(call, candidate)
    return candidate.name


def taken_among(names: Container[str], call: Call, backend: str) -> str | None:
    """The backend of these that runs the call, or None where the choice would fall on none of them.

    For an operator that few backends have and that other operators can do in its place.
    """
    wanted = _selected if backend == "auto" else backend
    for candidate in BACKENDS:
        asked = candidate.name in names and wanted in ("auto", candidate.name)
        if asked and candidate.worth_it(call) and not candidate.why_not(call):
            if _recorder is not None:
                _recorder(call, candidate)
            return candidate.name
    return None


def _by_name(call: Call, wanted: str, backend: str) -> Backend:
    for candidate in BACKENDS:
        if candidate.name == wanted:
            return candidate
    _check_name(wanted, call.name if wanted is backend else f"environment variable {ENV_VARIABLE}")
    raise AssertionError("every accepted name but 'auto' is in BACKENDS")


def _describe(call: Call) -> str:
    x = call.input
    return f"{_word(x.dtype)}[{','.join(map(str, x.shape))}] on {x.device}"


def _refusal(call: Call, wanted: Backend) -> str:
    lines = [
        f"{call.name}: backend {wanted.name!r} cannot run input {_describe(call)}: {'; '.join(wanted.why_not(call))}",
        "backends, in the order 'auto' tries them:",
    ]
    for backend in BACKENDS:
        reasons = backend.why_not(call)
        verdict = "; ".join(reasons) if reasons else f"can run this: pass backend={backend.name!r} or 'auto'"
        lines.append(f"  {backend.name}: {verdict}")
    return "\n".join(lines)


# ---- explain --------------------------------------------------------------------------------------------------------


class ExplainedCall(NamedTuple):
    """One effops call of a forward: who made it, what it was, which backend took it and why the others did not.

    Attributes:
        module: path of the module that made it in the model; "" for the model itself.
        function: the public function.
        input: dtype, shape and device.
        kernel: what the operator computes: "3x3 stride 2x2 + 1x1".
        output: the output's shape.
        backend: which one took it.
        why_not: {another backend: why it did not}.

    Example:
        >>> call = effops.explain(effops.SqueezeExcite(16), torch.randn(1, 16, 9, 9)).calls[0]
        >>> call.function, call.input, call.kernel
        ('squeeze_excite2d', 'float32[1,16,9,9] on cpu', 'squeeze-excite')
    """

    module: str
    function: str
    input: str
    kernel: str
    output: str
    backend: str
    why_not: dict[str, str]


class Explanation:
    """What `explain` found; printing it prints a table.

    Attributes:
        calls: one `ExplainedCall` per effops call, in order.

    Example:
        >>> print(effops.explain(effops.FusedDSConv(8, 16), torch.randn(1, 8, 9, 9)))
        module  function   input                    kernel     output      backend ...
        -       ds_conv2d  float32[1,8,9,9] on cpu  3x3 + 1x1  [1,16,9,9] ...
    """

    def __init__(self, calls: list[ExplainedCall]) -> None:
        self.calls = calls

    def __str__(self) -> str:
        if not self.calls:
            return "no effops call was made"
        rows = [("module", "function", "input", "kernel", "output", "backend", "why not the others")]
        for call in self.calls:
            others = "; ".join(f"{name}: {reason}" for name, reason in call.why_not.items())
            rows.append((call.module or "-", *call[1:6], others or "-"))
        widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
        lines = ["  ".join((*(cell.ljust(w) for cell, w in zip(row, widths)), row[-1])) for row in rows]  # noqa: B905
        return "\n".join(lines)

    __repr__ = __str__


# What an operator computes, in `explain`'s column "kernel".
_CHAINS = {
    "dwconv": "{window}",
    "dwconv_stats": "{window}",
    "dsconv": "{window} + 1x1",
    "dsconv_parts": "{window} + 1x1",
    "bsconv": "1x1 + {window}",
    "sepconv": "{window} + {second}",
    "mbconv": "1x1 + {window} + 1x1",
    "effnet": "1x1 + {window} + {second} + 1x1",
    "se": "squeeze-excite",
    "blur_max_pool": "max pool {pool} + blur {window}",
}


def _windows(call: Call) -> str:
    """The sizes of the call's depthwise windows."""
    if call.weight is None:  # blur_max_pool
        return f"{call.geometry[2]}x{call.geometry[2]}"
    weights = call.weight if isinstance(call.weight, tuple) else (call.weight,)
    return ", ".join(f"{weight.shape[2]}x{weight.shape[3]}" for weight in weights)


def _explained(module: str, call: Call, taken: Backend) -> ExplainedCall:
    g = call.geometry
    window = _windows(call) + (f" stride {g[0]}x{g[1]}" if g[:2] != [1, 1] else "")
    second = "" if call.pw_weight is None else f"{call.pw_weight.shape[2]}x{call.pw_weight.shape[3]}"
    pool = f"{g[3]}x{g[4]}" if call.op == "blur_max_pool" else ""
    kernel = _CHAINS[call.op].format(window=window, second=second, pool=pool)
    n, channels, p, q = call.shape
    if call.op == "dsconv":
        channels += g[14]
    output = f"2 x [{channels}]" if call.op == "dwconv_stats" else f"[{n},{channels},{p},{q}]"
    why_not = {}
    for backend in BACKENDS:
        if backend is not taken:
            reasons = backend.why_not(call)
            after = BACKENDS.index(backend) > BACKENDS.index(taken)
            fallback = "comes later in the list" if after else "another was asked for, or the cost rule prefers it"
            why_not[backend.name] = "; ".join(reasons) or fallback
    return ExplainedCall(module, call.name, _describe(call), kernel, output, taken.name, why_not)


def explain(model: Callable[..., Any], *inputs: Any, **kwargs: Any) -> Explanation:
    """Runs `model(*inputs, **kwargs)` once, without gradients, and tells which backend each effops call takes, and why.

    Args:
        model: a module, or any callable.
        *inputs: its arguments.
        **kwargs: its keyword arguments.

    Returns:
        An `Explanation`: print it, or read its `calls`.

    Raises:
        TypeError: the model is not callable.

    Example:
        >>> model = nn.Sequential(effops.FusedDSConv(8, 16, stride=2), effops.InvertedResidual(16, 16)).eval()
        >>> for call in effops.explain(model, torch.randn(1, 8, 32, 32)).calls:
        ...     print(call.module, call.function, call.kernel, call.output)
        0 ds_conv2d 3x3 stride 2x2 + 1x1 [1,16,16,16]
        1 inverted_residual2d 1x1 + 3x3 + 1x1 [1,16,16,16]
    """
    global _recorder
    if not callable(model):
        raise TypeError(f"explain: the model must be a module or another callable; got {type(model).__name__}")
    known = {id(m): name for name, m in model.named_modules()} if isinstance(model, torch.nn.Module) else {}
    stack: list[str] = []
    calls: list[ExplainedCall] = []

    def enter(module: torch.nn.Module, _args: Any) -> None:
        stack.append(known.get(id(module), type(module).__name__))

    def leave(_module: torch.nn.Module, _args: Any, _output: Any) -> None:
        stack.pop()

    def record(call: Call, taken: Backend) -> None:
        calls.append(_explained(stack[-1] if stack else "", call, taken))

    # Global hooks: hooks on the modules themselves could change the path that a fused module takes.
    handles = [
        _module_hooks.register_module_forward_pre_hook(enter),
        _module_hooks.register_module_forward_hook(leave),
    ]
    before, _recorder = _recorder, record
    try:
        with torch.no_grad():
            model(*inputs, **kwargs)
    finally:
        _recorder = before
        for handle in handles:
            handle.remove()
    return Explanation(calls)
