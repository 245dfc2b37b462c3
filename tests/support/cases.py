"""Many small cases in one run of a pool: forking ranks costs more than most cases."""

from collections.abc import Callable, Hashable, Iterable
from typing import Any


def each(function: Callable[..., Any], cases: Iterable[Hashable]) -> dict[Hashable, Any]:
    """{case: function(*case)}, or function(case) where a case is not a tuple. Runs on a rank."""
    return {case: function(*case) if isinstance(case, tuple) else function(case) for case in cases}
