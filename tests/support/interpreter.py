"""Triton's interpreter made a third faster, and its bf16 and e4m3 what the hardware's are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


def patch_interpreter() -> None:
    """All of them, in a process that runs kernels on a CPU; before the first kernel is launched."""
    patch_once_a_launch()
    patch_casts()
    patch_bf16_arithmetic()


def patch_once_a_launch() -> None:
    """Replace the builtins of the language once a launch and module, not again in each call of a device function.

    A launch of the interpreter puts its own builtins into `triton.language`, and takes them out at its end. Each call of a
    device function puts them in once more, which takes 40 % of the time of the kernels' tests; after the first call of its
    module nothing is left to replace.
    """
    original: Callable[[Any], Any] = interpreter._patch_lang
    patched: set[str] = set()
    """Modules of the functions that the running launch has called."""

    def patch_lang(function: Any) -> Any:
        if function.__module__ in patched:
            return None  # of a device function: only a launch looks at it
        scope = original(function)
        if not patched:
            restore = scope.restore

            def finish() -> None:
                patched.clear()
                restore()

            scope.restore = finish
        patched.add(function.__module__)
        return scope

    interpreter._patch_lang = patch_lang


def patch_casts() -> None:
    """Cast to and from bf16 and e4m3 as the hardware and PyTorch do, to the nearest with ties to even.

    The interpreter cuts bits off for bf16. For e4m3 it drops the carry into the exponent, so that 31.5 becomes 16 and not 32, and takes
    NaN for 480.
    """
    original: Callable[..., Any] = interpreter._convert_float
    types = {tl.bfloat16: (torch.bfloat16, torch.uint16), tl.float8e4nv: (torch.float8_e4m3fn, torch.uint8)}

    def convert_float(numbers: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if source == tl.float32 and target in types:
            dtype, bits = types[target]
            return torch.from_numpy(np.array(numbers)).to(dtype).view(bits).numpy()
        if source in types and target == tl.float32:
            exact = torch.from_numpy(np.array(numbers)).view(types[source][0]).float()
            return exact.numpy().view(np.uint32)
        return original(numbers, source, target, rounding_mode)

    interpreter._convert_float = convert_float


def patch_bf16_arithmetic() -> None:
    """Compute with the values of bf16 numbers, in fp32, and round each result: the interpreter computes with their bits.

    Matrix products are sums in fp32, as those of tensor cores. Other functions of bf16 are refused.
    """
    builder = interpreter.InterpreterBuilder
    binary_op, dot = builder.binary_op, builder.create_dot

    def exact(handle: Any) -> Any:
        is_bf16 = handle.dtype.scalar == tl.bfloat16
        return interpreter.interpreter_builder.cast_impl(handle, tl.float32) if is_bf16 else handle

    def binary_of_values(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
        if lhs.dtype.scalar != tl.bfloat16:
            return binary_op(self, lhs, rhs, op)
        found = binary_op(self, exact(lhs), exact(rhs), op)
        return found if found.data.dtype == np.bool_ else self.cast_impl(found, tl.bfloat16)

    def unary_of_values(self: Any, argument: Any, op: Any) -> Any:
        if argument.dtype.scalar == tl.bfloat16:
            raise TypeError(f"{op.__name__} of bf16 is not in the patched interpreter: take it in fp32")
        return interpreter.TensorHandle(op(argument.data), argument.dtype.scalar)

    def dot_of_values(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return dot(self, exact(a), exact(b), *rest)

    builder.binary_op, builder.unary_op, builder.create_dot = binary_of_values, unary_of_values, dot_of_values
