"""Compiles the CUDA kernels for GPUs that need not be there, and reads what each would take of them.

    python tests/cuda_compile.py --table docs/cuda_kernels.md

translates every csrc/cuda/*.cu to PTX, assembles that for sm_80, sm_90 and sm_100, and holds what the assembler says
about each kernel against `GPUS` and `MIN_OCCUPANCY`. How many threads and how much shared memory a kernel is launched
with comes from its own host functions, called for the problems of cuda_host/problems.cu in the host run, which only
writes launches down. Nothing is run: these are the compiler's figures, not a GPU's. The exit status is 1 where a limit
is passed.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "cuda_host"))

import build  # noqa: E402

# Sources that launch other sources' kernels and have none.
WITHOUT_KERNELS = {"bsconv.cu", "mbconv.cu", "pointwise.cu"}
SOURCES = tuple(
    source for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) if source.name not in WITHOUT_KERNELS
)
VIRTUAL = "compute_80"  # one translation for all: nothing in the kernels is newer
MIN_OCCUPANCY = 0.5
# Kernels that hide latency by other means than many warps: a pattern of the name, and by which.
REASONS: dict[str, str] = {
    r"dsconv_(forward|output_gradient)_kernel<(?!double)": "two blocks by registers: sums of a 64-pixel product and "
    "the windows of the next z; copies a stage ahead. By shared memory too on sm_90 and sm_100, with one patch instead "
    "of two where two would leave room for one block (14400 cycles a tile alone, 9900 as one of two: pointwise_tile); "
    "on sm_80 large patches leave one",
    "dsconv_": "sums of a 64-pixel product and the windows of the next z in registers: one or two "
    "blocks a processor by registers or shared memory, and copies a stage ahead",
    "(bsconv|mbconv)_forward_kernel": "the sums of the expanded patch's product and of the projection's, and the "
    "windows of the next z in registers: two blocks a processor by them (three spill on sm_90), fewer by the patch of "
    "a large window in shared memory; copies a stage ahead",
    "epilogue_gradient_kernel<.*, 2>$": "sums, their window and taps beside the epilogue's values and three running "
    "sums; without recomputed sums (another instantiation) it has 50%",
    r"forward_kernel<.*Window<5, 5": "the 50 taps of two channels stay in registers: read again for each column they "
    "would be most of the accesses",
    r"forward_(rows_)?kernel<.*, false, \d>$": "the values of any activation with an exponential beside the window's",
    r"(input|weight)_gradient_kernel<.*Window<5, 5": "as the forward's 5x5: 50 taps, or 50 sums, of two channels",
    r"statistics_kernel<": "a thread's moments, in double from its own pixels on, beside the window's sums",
    r"blur_max_pool_(gradient_)?kernel<.*, 4, 3, 2, \d>$": "windows of 3x3: the last rows' values or maxima of each "
    "channel, the weights of five columns or three windows",
    r"blur_max_pool_gradient_kernel<float, 2, 3, 2, 2, 3>$": "values of nine pixels and a row on its way, 8 bytes each",
    r"separable_kernel<.*, 2, \d, (true|false), 3>$": "two channels' taps of both stages, open sums and the values of "
    "any activation with an exponential",
    r"(separable_any|stage_gradient)_kernel<double": "two registers a value",
    "weight_gradient_any_kernel<double": "sums of double take two registers each",
}


class Gpu(NamedTuple):
    """What a multiprocessor has, from the table of compute capabilities in CUDA's programming guide.

    Attributes:
        shared: bytes of shared memory, all blocks together.
        block_shared: bytes that one block may have.
    """

    shared: int
    block_shared: int
    registers: int = 64 * 1024
    warps: int = 64
    blocks: int = 32


GPUS = {
    80: Gpu(164 * 1024, 163 * 1024),
    90: Gpu(228 * 1024, 227 * 1024),
    100: Gpu(228 * 1024, 227 * 1024),
}
_QUARTERS = 4  # of a multiprocessor: each has its own registers
_REGISTERS_AT_ONCE = 256  # a warp gets a multiple of these
_SHARED_AT_ONCE = 128
_SYSTEM_SHARED = 1024  # that the system takes of each block's


@dataclass(frozen=True)
class Usage:
    """What an assembled kernel takes: registers and bytes a thread, `shared` bytes a block (the static part)."""

    registers: int
    stack: int
    spills: int
    local: int
    shared: int


class Launch(NamedTuple):
    """A block that some problem asks for: threads, bytes of dynamic shared memory."""

    threads: int
    shared: int


Launches = dict[int, set[Launch]]  # by architecture


@dataclass
class Kernel:
    """One instantiation: what it takes and how it is launched, by architecture.

    Attributes:
        bound: threads of its __launch_bounds__.
        bytewise: instructions that move one byte, of global or shared memory.
    """

    name: str
    source: str
    bound: int
    usage: dict[int, Usage]
    launches: Launches = field(default_factory=dict)
    bytewise: int = 0


# ---- reading what the tools say: what cannot be read is an error, never a zero ---------------------------------------

_ENTRY = re.compile(r"^(?:\.\w+ )*\.entry (?P<name>\w+)\((?P<head>.*?)^\{", re.MULTILINE | re.DOTALL)
_BOUND = re.compile(r"^\.maxntid (\d+), (\d+), (\d+)$", re.MULTILINE)
_SECTION = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<arch>sm_\w+)'\n(?P<text>.*?)(?=Compiling|\Z)", re.S
)
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (?P<registers>\d+) registers(?P<rest>.*)")


def parse_bounds(ptx: str) -> dict[str, int]:
    """Threads of each kernel's launch bound, by mangled name.

    Raises:
        ValueError: there are none, or a kernel without a bound.
    """
    bounds = {}
    for match in _ENTRY.finditer(ptx):
        bound = _BOUND.search(match["head"])
        if not bound:
            raise ValueError(f"a kernel without __launch_bounds__: {match['name']}")
        x, y, z = map(int, bound.groups())
        bounds[match["name"]] = x * y * z
    if not bounds:
        raise ValueError("no kernel in the PTX")
    return bounds


_BYTEWISE = re.compile(r"^\s*(?:@\S+ )?(?:ld|st)\.(?:global|shared)\S*\.[bus]8\s", re.MULTILINE)


def parse_bytewise(ptx: str) -> dict[str, int]:
    """Loads and stores of single bytes in each kernel that has them: no element is so small, so these are pieces of one
    whose alignment the compiler did not know. Functions that are not inlined count as the kernel's before them."""
    starts = [*_ENTRY.finditer(ptx)]
    ends = [match.start() for match in starts[1:]] + [len(ptx)]
    counts = {
        match["name"]: len(_BYTEWISE.findall(ptx, match.end(), end)) for match, end in zip(starts, ends, strict=True)
    }
    return {name: count for name, count in counts.items() if count}


def parse_resources(text: str, arch: int, names: Iterable[str]) -> dict[str, Usage]:
    """What `ptxas -v` says about these kernels, by mangled name. Functions that a kernel calls count as its own.

    Raises:
        ValueError: other kernels, another architecture, or a figure that is not there.
    """
    found = {}
    for match in _SECTION.finditer(text):
        stacks, used = _STACK.findall(match["text"]), _USED.search(match["text"])
        if match["arch"] != f"sm_{arch}" or not stacks or not used:
            raise ValueError(f"what ptxas says about {match['name']} is not understood:\n{match[0]}")
        bytes_of = {kind: int(number) for number, kind in re.findall(r"(\d+) bytes (smem|lmem)", used["rest"])}
        found[match["name"]] = Usage(
            registers=int(used["registers"]),
            stack=max(int(stack) for stack, _, _ in stacks),
            spills=sum(int(stored) + int(loaded) for _, stored, loaded in stacks),
            local=bytes_of.get("lmem", 0),
            shared=bytes_of.get("smem", 0),
        )
    if found.keys() != set(names):
        raise ValueError(f"ptxas was to speak of {sorted(names)}, spoke of {sorted(found)}")
    return found


def short_names(mangled: Iterable[str]) -> dict[str, str]:
    """Names as the source has them, by mangled name: `forward_kernel<half_t, 3, true>`."""
    mangled = list(mangled)
    done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
    return {name: shorten(line) for name, line in zip(mangled, done.stdout.splitlines(), strict=True)}


def shorten(demangled: str) -> str:
    """Without return type, parameters and the namespaces that every kernel is in."""
    text = demangled.replace("(anonymous namespace)::", "").replace("effops::cuda::", "").replace("effops::", "")
    depth = 0
    for place, letter in enumerate(text):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            text = text[:place]
            break
    return text.removeprefix("void ")


# ---- compiling -------------------------------------------------------------------------------------------------------


def tool(name: str) -> str | None:
    """The path of nvcc, or of ptxas beside it."""
    found = shutil.which(name)
    if found is None and (nvcc := shutil.which("nvcc")):
        beside = Path(nvcc).resolve().with_name(name)
        found = str(beside) if beside.exists() else None
    return found


def run_tool(name: str, *arguments: str | Path) -> str:
    """What a tool prints.

    Raises:
        RuntimeError: it is not there, or fails.
    """
    path = tool(name)
    if path is None:
        raise RuntimeError(f"{name} is not installed")
    done = subprocess.run([path, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} failed:\n{done.stdout}{done.stderr}")
    return done.stdout + done.stderr


def compile_source(source: Path, archs: Iterable[int]) -> list[Kernel]:
    """The kernels of a source."""
    archs = list(archs)
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder) / "kernels.ptx"
        run_tool("nvcc", "-std=c++20", "-I.", f"-arch={VIRTUAL}", "-ptx", "-o", ptx, source)
        bounds, bytewise = parse_bounds(ptx.read_text()), parse_bytewise(ptx.read_text())

        def assemble(arch: int) -> dict[str, Usage]:
            output = run_tool("ptxas", "-v", f"-arch=sm_{arch}", "-o", Path(folder) / f"sm_{arch}.cubin", ptx)
            return parse_resources(output, arch, bounds)

        with ThreadPoolExecutor(2) as pool:
            usages = dict(zip(archs, pool.map(assemble, archs), strict=True))
    names = short_names(bounds)
    return sorted(
        (
            Kernel(
                names[name],
                source.name,
                bound,
                {arch: usages[arch][name] for arch in archs},
                bytewise=bytewise.get(name, 0),
            )
            for name, bound in bounds.items()
        ),
        key=lambda kernel: kernel.name,
    )


def recorded_launches() -> dict[str, Launches]:
    """What the host functions ask for, by kernel."""
    program = build.executable("problems", build.Source(ROOT / "tests" / "cuda_host" / "problems.cu"))
    rows = json.loads(subprocess.run([program, "--dry"], capture_output=True, text=True, check=True).stdout)
    symbols = subprocess.run(["nm", "--defined-only", program], capture_output=True, text=True, check=True).stdout
    symbol_at = {int(address, 16): symbol for address, _, symbol in map(str.split, symbols.splitlines())}
    names = short_names({symbol_at[row["address"]] for row in rows})
    found: dict[str, Launches] = {name: {} for name in names.values()}
    for row in rows:
        of_arch = found[names[symbol_at[row["address"]]]].setdefault(row["arch"], set())
        of_arch.add(Launch(row["threads"], row["shared"]))
    return found


def collect(archs: Iterable[int]) -> list[Kernel]:
    """Every kernel of every source."""
    archs = list(archs)
    kernels = [kernel for source in SOURCES for kernel in compile_source(source, archs)]
    launches = recorded_launches()
    for kernel in kernels:
        kernel.launches = launches.get(kernel.name, {})
    return kernels


# ---- judging ---------------------------------------------------------------------------------------------------------


def _up(value: int, unit: int) -> int:
    return -(-value // unit) * unit


def resident_blocks(usage: Usage, launch: Launch, gpu: Gpu) -> int:
    """How many blocks fit a multiprocessor."""
    warps = _up(launch.threads, 32) // 32
    register_warps = gpu.registers // _QUARTERS // _up(usage.registers * 32, _REGISTERS_AT_ONCE) * _QUARTERS
    shared = _up(usage.shared + launch.shared + _SYSTEM_SHARED, _SHARED_AT_ONCE)
    return min(gpu.blocks, gpu.warps // warps, register_warps // warps, gpu.shared // shared)


def occupancy(usage: Usage, launch: Launch, gpu: Gpu) -> float:
    """The share of a multiprocessor's warps that can be there at once."""
    return resident_blocks(usage, launch, gpu) * (_up(launch.threads, 32) // 32) / gpu.warps


def reason(name: str) -> str | None:
    """Why a kernel may have a low occupancy."""
    return next((text for pattern, text in REASONS.items() if re.match(pattern, name)), None)


def worst_launch(kernel: Kernel, arch: int) -> Launch | None:
    """The one with the lowest occupancy; None: no problem launches the kernel on this architecture."""
    launches = sorted(kernel.launches.get(arch, ()), reverse=True)
    return min(launches, key=lambda launch: occupancy(kernel.usage[arch], launch, GPUS[arch]), default=None)


def faults(kernel: Kernel, arch: int) -> Iterator[str]:
    """What is wrong with a kernel, in words."""
    usage, gpu = kernel.usage[arch], GPUS[arch]
    if usage.stack or usage.spills:
        yield f"spills: {usage.stack} bytes of stack a thread, {usage.spills} bytes of spill stores and loads"
    if kernel.bytewise:
        yield f"{kernel.bytewise} loads and stores of single bytes"
    if usage.local:
        yield f"{usage.local} bytes of local memory a thread"
    for launch in sorted(kernel.launches.get(arch, ())):
        if launch.threads > kernel.bound:
            yield f"launched with {launch.threads} threads, its bound is {kernel.bound}"
        if launch.shared + usage.shared > gpu.block_shared:
            yield f"launched with {launch.shared + usage.shared} bytes of shared memory, {gpu.block_shared} can be had"
    worst = worst_launch(kernel, arch)
    share = occupancy(usage, worst, gpu) if worst else 1.0
    if share < MIN_OCCUPANCY and reason(kernel.name) is None:
        yield f"occupancy {share:.0%}, at least {MIN_OCCUPANCY:.0%} or a reason in REASONS is wanted"


def complaints(kernels: Iterable[Kernel]) -> list[str]:
    """One line for each fault of each kernel, kernel that is never launched and reason that nobody needs."""
    kernels = list(kernels)
    lines = [
        f"sm_{arch}: {kernel.source}: {kernel.name}: {fault}"
        for kernel in kernels for arch in kernel.usage for fault in faults(kernel, arch)
    ]  # fmt: skip
    lines += [f"{k.source}: {k.name}: no problem of problems.cu launches it" for k in kernels if not k.launches]
    unused = [pattern for pattern in REASONS if not any(re.match(pattern, kernel.name) for kernel in kernels)]
    return lines + [f"REASONS: no kernel is called {pattern}" for pattern in unused]


# ---- the table -------------------------------------------------------------------------------------------------------

_HEAD = """\
# What the CUDA kernels take of a GPU

Written by `make cuda-kernels`, not by hand. Every kernel of `csrc/cuda` was compiled ahead of time with {nvcc} for
{archs} on a machine without a GPU: **nothing in this table was run on one**, it is what the compiler says. For
each architecture: *registers* of a thread (255 at most) / *shared memory* of a block in KiB / theoretical *occupancy*,
the share of a multiprocessor's {warps} warps that fit it at once, for the launch where it is lowest among the
problems of `tests/cuda_host/problems.cu`; *spill* bytes of a thread are shown where there are any. The limits, and what
is held against them, are in `tests/cuda_compile.py`.

| source | kernel | threads | {columns} |
|---|---|---|{dashes}
"""


def table(kernels: Iterable[Kernel], nvcc: str) -> str:
    """docs/cuda_kernels.md."""
    kernels = list(kernels)
    named = [f"sm_{arch}" for arch in sorted({arch for kernel in kernels for arch in kernel.usage})]
    head = _HEAD.format(
        nvcc=nvcc, archs=", ".join(named), warps=Gpu(0, 0).warps, columns=" | ".join(named), dashes="---|" * len(named)
    )
    return head + "\n".join(map(_line, kernels)) + "\n" + _reasons(kernels)


def _line(kernel: Kernel) -> str:
    cells = " | ".join(_cell(kernel, arch) for arch in sorted(kernel.usage))
    return f"| {kernel.source} | `{kernel.name}` | {kernel.bound} | {cells} |"


def _cell(kernel: Kernel, arch: int) -> str:
    usage, launch = kernel.usage[arch], worst_launch(kernel, arch)
    spill = f", **spill {usage.stack}**" if usage.stack else ""
    if launch is None:
        return f"{usage.registers} / not launched{spill}"
    share = occupancy(usage, launch, GPUS[arch])
    return f"{usage.registers} / {(usage.shared + launch.shared) / 1024:.0f} / {share:.0%}{spill}"


def _reasons(kernels: list[Kernel]) -> str:
    used = {pattern: text for pattern, text in REASONS.items() if any(re.match(pattern, k.name) for k in kernels)}
    if not used:
        return ""
    lines = [f"* `{pattern}`: {text}" for pattern, text in used.items()]
    return "\n".join([f"\nBelow {MIN_OCCUPANCY:.0%} on purpose:\n", *lines]) + "\n"


def kernels_in_table(markdown: str) -> set[tuple[str, str]]:
    """Source and name of the table's lines."""
    return set(re.findall(r"^\| (\S+\.cu) \| `(.*?)` \|", markdown, re.MULTILINE))


def nvcc_version() -> str:
    return "nvcc " + re.search(r"release [\d.]+, V([\d.]+)", run_tool("nvcc", "--version"))[1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", type=int, action="append", choices=sorted(GPUS), help="only these (default: all)")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the table there")
    args = parser.parse_args()
    kernels = collect(args.arch or sorted(GPUS))
    if args.table:
        args.table.write_text(table(kernels, nvcc_version()))
    wrong = complaints(kernels)
    print(f"{len(kernels)} kernels, {len(wrong)} complaints")
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
