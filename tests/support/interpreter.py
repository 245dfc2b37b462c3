"""Triton's interpreter made a third faster, and its casts to e4m3 what the hardware's are."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter


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


def patch_e4m3_casts() -> None:
    """Cast to e4m3 and back as the hardware and PyTorch do.

    The interpreter drops the carry into the exponent, so that 31.5 becomes 16 and not 32, and takes NaN for 480.
    """
    original: Callable[..., Any] = interpreter._convert_float

    def convert_float(numbers: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.float8e4nv):
            return torch.from_numpy(np.array(numbers)).to(torch.float8_e4m3fn).view(torch.uint8).numpy()
        if (source, target) == (tl.float8e4nv, tl.float32):
            exact = torch.from_numpy(np.array(numbers)).view(torch.float8_e4m3fn).float()
            return exact.numpy().view(np.uint32)
        return original(numbers, source, target, rounding_mode)

    interpreter._convert_float = convert_float
