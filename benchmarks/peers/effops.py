"""effops through its public functions with backend "auto"; EFFOPS_BACKEND in the environment asks for another one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.problems import FORMATS
from effops import backends


def candidates(problem) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the effops call once for each memory format."""
    if hasattr(problem, "candidates"):
        yield from problem.candidates("effops")
        return
    for variant in FORMATS:
        yield variant, problem.effops(variant)


def note(fn: Callable[[], object]) -> dict[str, str]:
    """Which backends `auto` took for the calls inside `fn`."""
    return {"backend": "+".join(sorted({call.backend for call in backends.explain(fn).calls}))}
