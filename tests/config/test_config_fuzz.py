"""1,000 random configs and YAML files: each is accepted or refused in one line, within a second."""

import time
from collections.abc import Callable
from typing import Any

import yaml
from config_changes import changed, legal
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from based_megatron.config import from_dict, load_config, to_dict
from based_megatron.config.limits import settings_of
from based_megatron.config.validate import validate
from based_megatron.errors import ConfigError
from based_megatron.model.check import check_mixers

KEYS = [setting.key for setting in settings_of(legal())]
NUMBERS = st.sampled_from(
    [0, -1, 1, 2, 3, 7, 10**9, 10**18, 2**63, 10**30, 1e-300, 1e20, 1e300, float("nan"), float("inf")]
)
TEXTS = st.sampled_from(
    ["", "c*999999999", "cLS*2 cc", "${run_dir}", "${oc.env:HOME}", "???", "\ud800", "\0", "a/../b", "/" * 300]
)
VALUES = st.recursive(
    NUMBERS
    | TEXTS
    | st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=8)
    | st.dates()
    | st.binary(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
FUZZ = settings(max_examples=250, derandomize=True, suppress_health_check=list(HealthCheck))


def judged(make: Callable[[], Any]) -> None:
    start = time.process_time()
    try:
        config = make()
        validate(config, 1)
        check_mixers(config)
    except ConfigError as error:
        assert "\n" not in str(error) and len(str(error)) < 2000
    assert time.process_time() - start < 1


@FUZZ
@given(
    st.dictionaries(
        st.sampled_from(KEYS), NUMBERS | TEXTS | st.integers() | st.floats() | st.text(max_size=8), max_size=3
    )
)
def test_values_of_the_right_type_or_another(values):
    plain = to_dict(legal())
    for key, value in values.items():
        *sections, name = key.split(".")
        section = plain
        for part in sections:
            section = section[part]
        section[name] = value
    judged(lambda: from_dict(plain, "mine.yaml"))


@FUZZ
@given(st.dictionaries(st.sampled_from([*to_dict(legal()), "extends"]) | st.text(max_size=4), VALUES, max_size=4))
def test_sections_of_any_kind(tmp_path_factory, values):
    path = tmp_path_factory.getbasetemp() / "sections.yaml"
    path.write_text(yaml.dump(values), errors="replace")
    judged(lambda: load_config(str(path)))


@FUZZ
@given(st.binary(max_size=60) | st.text(alphabet="ab:*&!<>-[]{}?|'\"#%@\n ~01.e", max_size=60).map(str.encode))
def test_files_of_any_bytes(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "bytes.yaml"
    path.write_bytes(content)
    judged(lambda: load_config(str(path)))


TEXT = yaml.safe_dump(to_dict(changed(legal(), {"run_dir": "somewhere"})), sort_keys=False).encode()


@FUZZ
@given(st.integers(0, len(TEXT) - 1), st.integers(0, 12), st.binary(max_size=6))
def test_files_with_a_damage(tmp_path_factory, begin, length, instead):
    path = tmp_path_factory.getbasetemp() / "damaged.yaml"
    path.write_bytes(TEXT[:begin] + instead + TEXT[begin + length :])
    judged(lambda: load_config(str(path)))
