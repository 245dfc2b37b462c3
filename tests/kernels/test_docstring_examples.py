"""The examples in the docstrings of the public operators run, and every operator has one."""

import doctest
import importlib
import pkgutil

import pytest
import torch

from based_megatron import kernels

OPERATIONS = [module.name for module in pkgutil.iter_modules(kernels.__path__) if module.ispkg]


@pytest.mark.parametrize("operation", OPERATIONS)
def test_public_functions_do_what_their_examples_show(operation: str) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(f"based_megatron.kernels.{operation}")
    functions = [getattr(module, name) for name in module.__all__ if not name.isupper() and not name.endswith("State")]
    runner = doctest.DocTestRunner()
    for function in functions:
        (test,) = doctest.DocTestFinder(recurse=False).find(
            function, function.__name__, module, globs={"torch": torch, **vars(module)}
        )
        assert test.examples, f"{operation}.{function.__name__} has no example"
        runner.run(test)
    assert runner.tries and not runner.failures, "see the output of doctest above"
