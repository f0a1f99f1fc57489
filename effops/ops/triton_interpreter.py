"""Mends of Triton's interpreter (TRITON_INTERPRET=1): one thing that does not run, and where its time goes to no use.

What is computed stays as it is. Written against Triton 3.6 and 3.9.
"""

from __future__ import annotations

import operator

import numpy as np
import triton.language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def mend() -> None:
    """Mends the interpreter of this process; to be called once."""
    interpreter._patch_lang_tensor = _let_scalars_bound_loops(interpreter._patch_lang_tensor)
    interpreter._patch_lang = _patch_language_once(interpreter._patch_lang)
    interpreter._get_np_dtype = _remember(interpreter._get_np_dtype)
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _let_scalars_bound_loops(patch):
    """Lets the interpreter run `for i in range(n)` with n computed in the kernel.

    It asks for int() of an array of one element, which NumPy refuses from 2.4 on (Triton 3.6).
    """

    def patch_and_mend(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    return patch_and_mend


def _patch_language_once(patch):
    """Leaves out the patching of triton.language where it is patched.

    The interpreter looks through all of it again whenever a kernel calls a device function, for a third of its time. A
    kernel's own call is what undoes the patches, at its end.
    """

    def patch_unless_patched(function):
        languages = [value for value in function.__globals__.values() if value is tl or value is tl.core]
        if languages and not any(tl.core.is_builtin(lang.load) for lang in languages):
            return interpreter._LangPatchScope()
        return patch(function)

    return patch_unless_patched


def _remember(numpy_dtype):
    """Keeps NumPy's type for each of Triton's: the interpreter builds its table anew whenever it looks one up."""
    known = {}  # by name: pointer types have no hash

    def remembered(dtype):
        if dtype.name not in known:
            known[dtype.name] = numpy_dtype(dtype)
        return known[dtype.name]

    return remembered


def _check_overflow(semantic, lhs, rhs, operation) -> None:
    """Raises where integer arithmetic of fewer than 64 bits overflows.

    The interpreter's own check does this in a dozen interpreted operations, for 40 % of its time.
    """
    dtype = lhs.type.scalar
    if dtype.int_bitwidth >= 64:
        return
    exact = getattr(operator, operation.__name__)(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
    if exact.min() < dtype.get_int_min_value() or exact.max() > dtype.get_int_max_value():
        raise OverflowError(f"{operation.__name__} of {dtype} overflows")
