"""Compiles the Triton kernels for a GPU that need not be there, and reads what each would take of it.

    python tests/triton_compile.py --arch 90 --only dwconv_fwd -v

calls every operator of a list of problems on meta tensors, compiles the launches that this records for the architecture
of a stand-in driver, and holds registers, shared memory, spills, atomics and the use of tensor cores against `LIMITS`.
Nothing is run: what comes out are the compiler's figures, not a GPU's. One process is for one architecture and one
Triton, and never the interpreter (TRITON_INTERPRET). The exit status is 1 where a limit is passed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import zip_longest
from pathlib import Path
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """What a program may take at most, and why no more.

    Attributes:
        shared: bytes of shared memory. What CUDA's programming guide grants one block: the multiprocessor's, less the
            KiB that the system keeps.
        tensor_memory: columns of tensor memory, all that a multiprocessor has.
        registers: a thread's. As many as an instruction can name.
        stack, local: bytes a thread. A spill is memory traffic that the picture of no tiling counts.
    """

    shared: int
    tensor_memory: int = 0
    registers: int = 255
    stack: int = 0
    local: int = 0


LIMITS = {80: Limits(163 * 1024), 90: Limits(227 * 1024), 100: Limits(227 * 1024, tensor_memory=512)}
MEMORY_BOUND = ("dwconv.", "triton_faulty.")  # kernels that must use the widest loads the maps allow
MANY_SUMS = "dwconv._weight_gradient_kernel"  # a sum a tap and element: 25 taps of 16 bytes do not fit the registers

Configs = dict[str, list[dict[str, Any]]]  # kernel: the configs it may be launched with


@dataclass(frozen=True)
class Usage:
    """What a compiled kernel takes and does.

    Attributes:
        registers: a thread's.
        stack: bytes a thread; more than 0 is spilled registers or a local array.
        local: bytes of local memory that is not stack (0 however much a kernel spills).
        shared: bytes a program, the dynamic part included.
        tensor_memory: columns (sm_100).
        loads, stores: how many instructions access global memory with so many bytes a thread.
        atomics: instructions that change global memory atomically.
        matrix: the kinds of tensor-core instructions.
        dots: element types of the products the source asks for.
    """

    registers: int
    stack: int
    local: int
    shared: int
    tensor_memory: int
    loads: dict[str, int]
    stores: dict[str, int]
    atomics: int
    matrix: list[str]
    dots: list[str]


# The constants that say how a kernel is tiled; other ones say what it computes.
_CHOSEN = ("BLOCK_", "ROWS", "COLS", "GROUP_", "PARTS")


@dataclass
class Row:
    """A launch that some problem makes, and what it compiled to where it was compiled.

    Attributes:
        constants: those of the launch that are numbers, text or None.
        vector_bytes: the widest access that the maps' alignment allows, as the launch says.
        signature: what Triton specialises on.
    """

    kernel: str
    constants: dict[str, Any]
    dtype: str
    layout: str
    problem: str
    vector_bytes: int
    signature: str = field(repr=False)
    usage: Usage | None = None
    seconds: float = 0.0

    @property
    def config(self) -> str:
        """What a chooser chose, in words: `BLOCK_M 64, BLOCK_C 32, 4 warps, 2 stages, at most 128 registers`."""
        said = [f"{name} {value}" for name, value in self.constants.items() if name.startswith(_CHOSEN)]
        words = {"num_warps": "{} warps", "num_stages": "{} stages", "maxnreg": "at most {} registers"}
        said += [text.format(self.constants[name]) for name, text in words.items() if self.constants.get(name)]
        return ", ".join(said)

    @property
    def key(self) -> tuple[str, ...]:
        """What tells launches apart, from coarse to fine."""
        return self.kernel, self.config, self.dtype, self.layout, self.signature


# ---- reading what was compiled: whatever cannot be read is an error, never a zero -----------------------------------

_FUNCTION = re.compile(r"^ Function (?P<name>\S+):\n(?P<usage>.*)$", re.MULTILINE)
_MEMORY = re.compile(r"^\s*(?:@!?%p\d+ )?(?P<opcode>[a-z][\w:.]*\.global[\w:.]*)\s+(?P<operands>.*);", re.MULTILINE)
_WIDTH = re.compile(r"\.(?:v(?P<lanes>\d)\.)?[bfsu](?P<bits>\d+)$")
_COPIED = re.compile(r"\], 0x(?P<bytes>[0-9a-f]+)")
_MATRIX = re.compile(r"\b(mma\.sync|wgmma\.mma_async|tcgen05\.mma)\b")
_DOT = re.compile(r"= tt\.dot .* : tensor<[\dx]+x(?P<element>[a-z]+\d+)[,>]")
_HARMLESS = ("cvta", "prefetch")


def parse_resources(text: str, kernel: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of the only function in `cuobjdump -res-usage`'s output.

    Raises:
        ValueError: another function, or a figure that is not there.
    """
    functions = _FUNCTION.findall(text)
    if [name for name, _ in functions] != [kernel]:
        raise ValueError(f"expected the resources of {kernel} alone, got:\n{text}")
    figures = {name: int(value) for name, value in re.findall(r"\b([A-Z]+):(\d+)", functions[0][1])}
    missing = {"REG", "STACK", "SHARED", "LOCAL"} - figures.keys()
    if missing or not figures["REG"]:
        raise ValueError(f"no {', '.join(sorted(missing)) or 'REG'} in the resources of {kernel}:\n{text}")
    return figures


def parse_accesses(ptx: str) -> tuple[Counter[str], Counter[str], int]:
    """Loads and stores of global memory by bytes a thread, and the number of atomics.

    Raises:
        ValueError: an instruction on global memory that is none of these.
    """
    loads, stores, atomics = Counter(), Counter(), 0
    for opcode, operands in _MEMORY.findall(ptx):
        kind = opcode.split(".")[0]
        width = _WIDTH.search(opcode)
        copied = _COPIED.search(operands)
        if kind in ("ld", "st") and width:
            size = str(int(width["lanes"] or 1) * int(width["bits"]) // 8)
            (loads if kind == "ld" else stores)[size] += 1
        elif opcode.startswith("cp.async.c") and copied:
            loads[str(int(copied["bytes"], 16))] += 1
        elif kind in ("atom", "red"):
            atomics += 1
        elif kind not in _HARMLESS:
            raise ValueError(f"unknown access to global memory: {opcode} {operands}")
    if not stores and not atomics:
        raise ValueError("no instruction writes global memory: the PTX was not understood")
    return loads, stores, atomics


def parse_dots(ttir: str) -> list[str]:
    """Element types of the matrix products in Triton's intermediate code.

    Raises:
        ValueError: a product whose type cannot be read.
    """
    found = [match["element"] for match in _DOT.finditer(ttir)]
    if len(found) != ttir.count("= tt.dot "):
        raise ValueError("a tt.dot whose element type cannot be read")
    return sorted(set(found))


def measure(compiled: Any) -> Usage:
    """Reads a kernel that Triton compiled."""
    import triton

    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", cubin.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures = parse_resources(done.stdout, compiled.metadata.name)
    loads, stores, atomics = parse_accesses(compiled.asm["ptx"])
    return Usage(
        registers=figures["REG"],
        stack=figures["STACK"],
        local=figures["LOCAL"],
        shared=figures["SHARED"] + compiled.metadata.shared,
        tensor_memory=compiled.metadata.tmem_size,
        loads=dict(loads),
        stores=dict(stores),
        atomics=atomics,
        matrix=sorted(set(_MATRIX.findall(compiled.asm["ptx"]))),
        dots=parse_dots(compiled.asm["ttir"]),
    )


# ---- judging --------------------------------------------------------------------------------------------------------


def faults(row: Row, arch: int) -> Iterator[str]:
    """What is wrong with a compiled kernel, in words."""
    usage, limits = row.usage, LIMITS[arch]
    if usage.stack > limits.stack:
        yield f"spills: {usage.stack} bytes of stack a thread"
    if usage.local > limits.local:
        yield f"{usage.local} bytes of local memory a thread"
    if usage.registers > limits.registers:
        yield f"{usage.registers} registers, {limits.registers} exist"
    if usage.shared > limits.shared:
        yield f"{usage.shared} bytes of shared memory, a program can have {limits.shared}"
    if usage.tensor_memory > limits.tensor_memory:
        yield f"{usage.tensor_memory} columns of tensor memory, there are {limits.tensor_memory}"
    if usage.atomics:
        yield f"{usage.atomics} atomic instructions: results would differ from run to run"
    if {"f16", "bf16"} & set(usage.dots) and not usage.matrix:
        yield "a product of half-precision tiles without tensor cores"
    widest = max(map(int, usage.loads), default=row.vector_bytes)
    wanted = row.vector_bytes
    if row.kernel == MANY_SUMS and row.constants["GROUP_R"] * row.constants["GROUP_S"] > 14:
        wanted = min(wanted, 8)
    if row.kernel.startswith(MEMORY_BOUND) and widest < wanted:
        yield f"no load of {wanted} bytes, which the maps' alignment allows"


def complaints(rows: Iterable[Row], arch: int) -> list[str]:
    """One line for each fault of each compiled kernel."""
    import triton

    where = f"sm_{arch}, Triton {triton.__version__}"
    return [
        f"{where}: {row.kernel} [{row.config}] {row.dtype} {row.layout} ({row.problem}): {fault}"
        for row in rows if row.usage is not None for fault in faults(row, arch)
    ]  # fmt: skip


def table_faults(rows: Iterable[Row], configs: Configs) -> tuple[list[str], list[str]]:
    """Listed configs that no launch has, and launches that no listed config describes."""
    rows = list(rows)

    def describes(kernel: str, config: dict[str, Any], row: Row) -> bool:
        return kernel == row.kernel and config.items() <= row.constants.items()

    listed = [(kernel, config) for kernel, of_kernel in configs.items() for config in of_kernel]
    unreached = [
        f"{kernel} {config}" for kernel, config in listed if not any(describes(kernel, config, r) for r in rows)
    ]
    unlisted = [row for row in rows if not any(describes(kernel, config, row) for kernel, config in listed)]
    return unreached, sorted({f"{row.kernel} [{row.config}]" for row in unlisted})


# ---- recording and compiling ----------------------------------------------------------------------------------------


class StandInDriver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def kernel_name(kernel: Any) -> str:
    """Room and function: `dwconv._forward_kernel`."""
    return f"{room_name(kernel.fn.__module__)}.{kernel.fn.__name__}"


def room_name(module: str) -> str:
    """`dwconv` of effops.ops.dwconv.triton, `dsconv_parts` of effops.ops.dsconv.triton_parts."""
    return re.sub(r"^effops\.ops\.(\w+)\.triton", r"\1", module).split(".")[-1]


def signature_of(launch: Any) -> str:
    """What Triton specialises a kernel on, so that launches which are one compilation can be told beforehand."""
    from torch import Tensor

    def of(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(of, value))
        if isinstance(value, Tensor):
            return str(value.dtype), value.data_ptr() % 16 == 0
        if isinstance(value, int):
            return "1" if value == 1 else ("i64" if abs(value) >= 2**31 else "i32", value % 16 == 0)
        return repr(value)

    return repr((of(launch.arguments), sorted((name, repr(value)) for name, value in launch.constants.items())))


def vector_width(constants: dict[str, Any]) -> int:
    """Elements of the widest load of a map: VEC, one number or one for each kind of map.

    With a channel multiplier neighbouring output channels read the same input channel, one by one.
    """
    if constants.get("WINDOW") and constants["WINDOW"].MULT > 1:
        return 1
    vec = constants.get("VEC", 1)
    return max(vec) if isinstance(vec, tuple) else vec


def row_of(launch: Any, problem: Any) -> Row:
    return Row(
        kernel=kernel_name(launch.kernel),
        constants={
            name: value for name, value in launch.constants.items() if isinstance(value, int | float | str | None)
        },
        dtype=str(problem.dtype).removeprefix("torch."),
        layout=problem.layout,
        problem=problem.name,
        vector_bytes=vector_width(launch.constants) * problem.dtype.itemsize,
        signature=signature_of(launch),
    )


def record(problems: Iterable[Any], call: Callable[[Any], None]) -> list[tuple[Row, Any]]:
    """The launches of all problems, each distinct one once."""
    from effops.ops import triton_launch

    found: dict[tuple[str, ...], tuple[Row, Any]] = {}
    for problem in problems:
        triton_launch.recorded.clear()
        call(problem)
        for launch in triton_launch.recorded:
            row = row_of(launch, problem)
            found.setdefault(row.key, (row, launch))
    return list(found.values())


def by_coverage(rows: list[Row], part: int = 0, parts: int = 1) -> list[int]:
    """The rows' numbers in the order in which to compile them, however many there will be time for.

    One of every kernel, one of every kernel and config, one of each with every dtype, with every layout, the rest. Of
    several parts each begins with its share of kernels and configs; together they see as much as one of all their time.
    """
    firsts: dict[tuple[str, ...], int] = {}  # of every key, cut at every length, the first row
    for number, row in enumerate(rows):
        for length in range(1, len(row.key) + 1):
            firsts.setdefault(row.key[:length], number)
    by_kernel: dict[str, list[int]] = {}
    for key, number in firsts.items():
        if len(key) == 2:
            by_kernel.setdefault(key[0], []).append(number)
    pairs = [number for turn in zip_longest(*by_kernel.values()) for number in turn if number is not None]
    finer = [number for length in (3, 4, 5) for key, number in firsts.items() if len(key) == length]
    return list(dict.fromkeys([*pairs[part::parts], *pairs, *finer]))


def configs_of(kernels: Iterable[Any]) -> Configs:
    """What the modules of these kernels list as theirs.

    Such a module has a function configs(), which returns for the name of each kernel the configs its choosers can
    return, each as a dict of the launch's constants.
    """
    modules = {kernel.fn.__module__ for kernel in kernels}
    return {
        f"{room_name(module)}.{kernel}": list(configs)
        for module in sorted(modules)
        for kernel, configs in getattr(sys.modules[module], "configs", dict)().items()
    }


def compile_row(row: Row, launch: Any) -> None:
    start = time.perf_counter()
    compiled = launch.compile()
    row.seconds = round(time.perf_counter() - start, 3)
    row.usage = measure(compiled)


def describe(row: Row) -> str:
    usage = row.usage
    sizes = sorted(usage.loads.items(), key=lambda item: -int(item[0]))
    loads = " ".join(f"{count}x{size}B" for size, count in sizes)
    return (
        f"{row.seconds:5.1f} s  {row.kernel} [{row.config}] {row.dtype} {row.layout}: {usage.registers} registers, "
        f"stack {usage.stack}, shared {usage.shared}, loads {loads} {' '.join(usage.matrix)} ({row.problem})"
    )


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--arch", type=int, required=True, choices=sorted(LIMITS))
    parser.add_argument(
        "--at-most", type=int, metavar="N", help="compile N launches (default: all), widest coverage first"
    )
    parser.add_argument(
        "--part", default="0/1", metavar="I/N", help="with --at-most: the share of I of N processes first"
    )
    parser.add_argument("--only", default="", metavar="REGEX", help="problems whose name matches")
    parser.add_argument("--problems", default="triton_problems", metavar="MODULE", help="another list of problems")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every figure there")
    parser.add_argument("-v", "--verbose", action="store_true", help="a line for each kernel as it is compiled")
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        raise SystemExit("TRITON_INTERPRET is set: kernels would be interpreted, not compiled")
    import triton

    triton.runtime.driver.set_active(StandInDriver(args.arch))
    listed = importlib.import_module(args.problems)
    problems = [problem for problem in listed.PROBLEMS if re.search(args.only, problem.name)]
    found = record(problems, listed.launch)
    part, parts = map(int, args.part.split("/"))
    chosen = by_coverage([row for row, _ in found], part, parts)[: args.at_most]
    for place, number in enumerate(chosen, 1):
        row, launch = found[number]
        compile_row(row, launch)
        if args.verbose:
            print(f"sm_{args.arch} {place}/{len(chosen)} {describe(row)}", flush=True)
    rows = [row for row, _ in found]
    unreached, unlisted = table_faults(rows, configs_of(launch.kernel for _, launch in found))
    wrong = complaints(rows, args.arch) + [
        f"sm_{args.arch}: {line}: not in its module's configs()" for line in unlisted
    ]
    if args.json:
        report = {
            "triton": triton.__version__, "arch": args.arch, "limits": LIMITS[args.arch]._asdict(), "complaints": wrong,
            "unreached": unreached, "rows": [asdict(row) | {"config": row.config} for row in rows],
        }  # fmt: skip
        args.json.write_text(json.dumps(report, indent=1))
    print(*wrong, sep="\n", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
