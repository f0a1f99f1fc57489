"""The kernel library runs on any x86-64: code for a newer instruction set stays in functions named after that set.

The linker keeps one copy of an inline function or template that several sources use. If the copy it keeps comes from
the AVX-512 source, the baseline path dies of an illegal instruction on older CPUs, and no test on a new CPU notices.
Hence the machine code is read.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections.abc import Iterable

import pytest

from effops import _library

# The instruction sets, each a superset of those before it. A function's level is the highest one its name speaks of.
LEVELS = ("baseline", "avx2", "avx512", "avx512bf16")
HEADER = re.compile(r"^[0-9a-f]+ <(?P<name>.*)>:$")
INSTRUCTION = re.compile(r"^\s+[0-9a-f]+:\t(?P<text>.*)$")
# What an instruction needs, by its AT&T text, the most demanding first: bf16 arithmetic; then EVEX (512-bit or upper
# registers, masks); then VEX (256-bit registers, or any mnemonic in v: the others of user code are verr and verw).
NEEDS = (
    (3, re.compile(r"^vdpbf16ps|^vcvtne2?ps2bf16")),
    (2, re.compile(r"%zmm|%[xy]mm(1[6-9]|2\d|3[01])\b|%k[0-7]\b")),
    (1, re.compile(r"%ymm|^v(?!err|erw)")),
)


def level_needed(instruction: str) -> int:
    return next((level for level, pattern in NEEDS if pattern.search(instruction)), 0)


def level_allowed(function: str) -> int:
    if function.startswith(
        "_GLOBAL__"
    ):  # a static initialiser: runs while the library is loaded, on whatever CPU it is
        return 0
    return max((level for level in range(1, len(LEVELS)) if LEVELS[level] in function), default=0)


def highest_levels(disassembly: Iterable[str]) -> dict[str, tuple[int, str]]:
    """For every function the highest level that one of its instructions needs, and that instruction."""
    found: dict[str, tuple[int, str]] = {}
    function = "(no function)"
    for line in disassembly:
        if header := HEADER.match(line):
            function = header["name"]
        elif instruction := INSTRUCTION.match(line):
            level = level_needed(instruction["text"])
            if level >= found.get(function, (0, ""))[0]:
                found[function] = (level, instruction["text"])
    return found


def misplaced(levels: dict[str, tuple[int, str]]) -> list[str]:
    return [
        f"{function}: `{instruction}` needs {LEVELS[level]}, the name allows {LEVELS[level_allowed(function)]}"
        for function, (level, instruction) in sorted(levels.items())
        if level > level_allowed(function)
    ]


@pytest.fixture(scope="module")
def library_levels() -> dict[str, tuple[int, str]]:
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip(f"the rule is about x86-64, this is {platform.machine()}")
    if not _library.kernels_loaded:
        pytest.skip(f"there is no library to read: {_library.why_not_loaded}")
    objdump = shutil.which("objdump")
    if objdump is None:
        pytest.skip("objdump is not installed (Debian and Ubuntu: apt install binutils)")
    command = [objdump, "--disassemble", "--demangle", "--no-show-raw-insn", str(_library.LIBRARY_PATH)]
    text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return highest_levels(text.splitlines())


def test_each_instruction_stays_in_a_function_named_after_its_set(library_levels: dict[str, tuple[int, str]]) -> None:
    wrong = misplaced(library_levels)
    assert not wrong, f"{len(wrong)} functions:\n" + "\n".join(wrong[:20])


def test_every_compiled_set_is_really_used(library_levels: dict[str, tuple[int, str]]) -> None:
    """Guards the test above: it would pass on a library whose names or disassembly it cannot read."""
    compiled = set(_library.build_info()["compiled_isas"])
    assert compiled <= set(LEVELS)
    used = {LEVELS[level] for level, _ in library_levels.values()}
    assert compiled - used <= {"baseline"}, f"compiled {sorted(compiled)}, but the code uses only {sorted(used)}"


@pytest.mark.parametrize(
    ("function", "instruction", "ok"),
    [
        ("effops::baseline::relu(float*)", "movaps %xmm0,%xmm1", True),
        ("effops::baseline::relu(float*)", "vmovaps %xmm0,%xmm1", False),
        ("std::vector<float>::resize(unsigned long)", "vmovups %ymm0,(%rax)", False),
        ("effops::avx2::(anonymous namespace)::relu(float*)", "vmovups %ymm15,(%rax)", True),
        ("effops::avx2::(anonymous namespace)::relu(float*)", "vmovups %ymm16,(%rax)", False),
        ("effops::avx2::(anonymous namespace)::relu(float*)", "kmovw  %eax,%k1", False),
        ("effops::avx512::(anonymous namespace)::relu(float*)", "vmovups %zmm0,(%rax){%k1}", True),
        ("effops::avx512::(anonymous namespace)::gemm()", "vdpbf16ps %zmm0,%zmm1,%zmm2", False),
        ("effops::avx512bf16::(anonymous namespace)::gemm()", "vdpbf16ps %zmm0,%zmm1,%zmm2", True),
        ("_GLOBAL__sub_I_kernels_avx512.cpp", "vpxor  %xmm0,%xmm0,%xmm0", False),
        ("effops::parallel_tasks(long)", "verr   (%rax)", True),
    ],
)
def test_the_rule(function: str, instruction: str, ok: bool) -> None:
    listing = [
        f"0000000000001000 <{function}>:",
        "    1000:\tpush   %rbp",
        f"    1001:\t{instruction}",
        "    1008:\tret",
    ]
    assert (misplaced(highest_levels(listing)) == []) is ok
