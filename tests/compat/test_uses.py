"""Uses of an export that need no more than the package itself; `python tests/compat` tries all."""

import pytest
import uses_generation
import uses_loading
from tiny_export import tiny_export


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return tiny_export(tmp_path_factory.mktemp("export"))


@pytest.mark.parametrize("use", [*uses_loading.USES, *uses_generation.USES], ids=lambda use: use.__name__)
def test_use(export, tmp_path, use):
    if use is uses_loading.device_map:
        pytest.importorskip("accelerate")
    use(export, tmp_path)
