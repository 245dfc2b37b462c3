"""The door to fla-core: which machines it leaves to our own forms."""

import pytest

from based_megatron.baselines.fla import is_refused


@pytest.mark.parametrize(
    ("capability", "triton", "refused"),
    [
        ((9, 0), "3.6.0+git", True),
        ((9, 0), "3.4.0", True),
        ((9, 0), "3.7.0", True),
        ((9, 0), "3.3.1", False),
        ((9, 0), "3.7.1", False),
        ((8, 0), "3.6.0", False),
        ((10, 0), "3.6.0", False),
    ],
)
def test_wrong_gradients_on_hopper_are_not_asked_for(capability, triton, refused):
    assert is_refused(capability, triton) == refused
