"""The README's table of operators: which backend runs what, in which dtypes, and where that was verified."""

from __future__ import annotations

from typing import NamedTuple


class Operator(NamedTuple):
    """A row: its name among a backend's `operators`, its public functions, modules and `torch.autograd.Function`s."""

    op: str
    what: str
    functions: tuple[str, ...]
    modules: tuple[str, ...]
    autograd: tuple[str, ...] = ()


OPERATORS = (
    Operator(
        "dwconv",
        "depthwise, shared kernels, fixed filters",
        ("depthwise_conv2d", "shared_depthwise_conv2d", "fixed_filter_conv2d"),
        ("DepthwiseConv2d", "SharedDepthwiseConv2d", "FixedFilterConv2d", "BlurPool2d"),
        ("DepthwiseConv2dFunction",),
    ),
    Operator(
        "dwconv_stats",
        "statistics of a depthwise result that is not stored",
        ("depthwise_stats2d",),
        (),
        ("DepthwiseStatsFunction",),
    ),
    Operator(
        "dsconv",
        "depthwise, then pointwise",
        ("ds_conv2d", "half_identity2d", "downsampling2d"),
        ("FusedDSConv", "HalfIdentityBlock", "DownsamplingBlock"),
        ("DSConv2dFunction", "DSConvNorm2dFunction", "DSConvPool2dFunction"),
    ),
    Operator(
        "dsconv_parts",
        "several depthwise windows side by side, then pointwise",
        ("multiception_conv2d", "mix_conv2d"),
        ("MulticeptionConv2d", "MixConv2d"),
        ("DSConvParts2dFunction",),
    ),
    Operator(
        "bsconv",
        "pointwise (one or two), then depthwise",
        ("bs_conv2d",),
        ("BSConvU", "BSConvS"),
        ("BSConv2dFunction",),
    ),
    Operator(
        "mbconv",
        "pointwise, depthwise, squeeze-excite, pointwise",
        ("inverted_residual2d",),
        ("InvertedResidual",),
        ("InvertedResidual2dFunction",),
    ),
    Operator("se", "squeeze-excite", ("squeeze_excite2d",), ("SqueezeExcite",), ("SqueezeExcite2dFunction",)),
    Operator(
        "sepconv",
        "1xS, max pool, Rx1, max pool",
        ("separable_conv_pool2d",),
        ("SeparableConvPool2d",),
        ("SeparableConvPool2dFunction",),
    ),
    Operator("effnet", "EffNet's whole block", (), ("EffNetBlock",)),
    Operator(
        "blur_max_pool",
        "max pool, then blur with stride",
        ("blur_max_pool2d",),
        ("BlurMaxPool2d",),
        ("BlurMaxPool2dFunction",),
    ),
)
INFERENCE_ONLY = {"effnet"}
# Where without a GPU; the names of GPUs come from committed results.
_VERIFIED = {"cpp": "CPU", "triton": "interpreted, compiled", "cuda": "host run, compiled"}
_SHORT = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16", "float64": "fp64"}
_LEGEND = (
    "F forward, B backward by kernels (`reference` has both for every operator, in every dtype, and all higher "
    "derivatives). Then the dtypes, and what the tests run it on: the CPU; Triton's interpreter or the CUDA sources on "
    "the host, and compiled ahead of time without spills: [Triton](docs/triton_kernels.md), "
    "[CUDA](docs/cuda_kernels.md). "
)
_NO_GPU = "**No GPU kernel has run on a GPU yet: on a device they are unverified.**"


def _cell(op: str, backend) -> str:
    if op not in backend.operators:
        return "-"
    dtypes = " ".join(_SHORT[str(dtype).removeprefix("torch.")] for dtype in backend.dtypes)
    return f"{'F' if op in INFERENCE_ONLY else 'F B'}; {dtypes}; {_VERIFIED[backend.name]}"


def rows() -> list[list[str]]:
    """The header, and a row an operator."""
    from effops import backends

    kernels = [backend for backend in backends.BACKENDS if backend.name != "reference"]
    found = [["operator", "functions", "modules", *(f"`{backend.name}`" for backend in kernels)]]
    for operator in OPERATORS:
        functions, modules = (
            ", ".join(f"`{name}`" for name in names) or "-" for names in (operator.functions, operator.modules)
        )
        name = f"`{operator.op}`: {operator.what}"
        found.append([name, functions, modules, *(_cell(operator.op, backend) for backend in kernels)])
    return found


def legend(gpus: list[str]) -> str:
    """What the cells mean; `gpus`: those that a committed run of the GPU tests passed on."""
    return _LEGEND + (f"The tests passed on: {', '.join(gpus)}." if gpus else _NO_GPU)
