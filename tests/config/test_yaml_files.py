"""Files of settings: what is no plain YAML of sections is refused in one line, and a saved file that is cut off is recognised."""

import os
import time

import pytest
from config_changes import changed

from based_megatron.config import SourceConfig, load_config, save_config
from based_megatron.config.yaml_files import read_yaml, write_yaml
from based_megatron.errors import ConfigError

BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{below}'] * 9)}]\n" for below, name in zip("abcdefgh", "bcdefghi", strict=True)
)

REFUSED = {
    "nothing": (b"", "holds a NoneType"),
    "only a comment": (b"# model:\n", "holds a NoneType"),
    "a list": (b"- a\n", "holds a list"),
    "not closed": (b"model: [", "is not YAML"),
    "not UTF-8": (b"run_dir: caf\xe9\n", "is not UTF-8"),
    "UTF-16": ("run_dir: a\n".encode("utf-16"), "UTF-8"),
    "a bomb": (BOMB.encode(), "alias"),
    "an anchor that holds itself": (b"model: &m {a: *m}\n", "alias"),
    "a merge of a section": (b"a: &a {x: 1}\nb:\n  <<: *a\n", "alias"),
    "a key twice": (b"model:\n  feature_dim: 8\n  feature_dim: 16\n", "the key feature_dim twice"),
    "a section twice": (b"train: {}\nmodel: {}\ntrain: {}\n", "the key train twice"),
    "too deep": (b"a: " + b"[" * 5000, "nested too deeply"),
    "too deep without brackets": (b"a:\n  " + b"- " * 5000, "nested too deeply"),
    "a date that is none": (b"run_dir: 2024-13-45\n", "is not YAML"),
    "an endless number": (b"train: {steps: " + b"9" * 5000 + b"}\n", "is not YAML"),
    "an object": (b"run_dir: !!python/object/apply:os.getcwd []\n", "is not YAML"),
    "a number that is none": (b"train: {steps: !!int x}\n", "is not YAML"),
    "an empty number": (b"train: {steps: !!int ''}\n", "is not YAML"),
    "a truth that is none": (b"a: !!bool x\n", "is not YAML"),
    "a time that is none": (b"a: !!timestamp x\n", "is not YAML"),
    "two documents": (b"a: 1\n---\nb: 2\n", "is not YAML"),
    "a control character": (b"run_dir: a\x07\n", "is not YAML"),
    "too large": (b"# " + b"x" * (1 << 16) + b"\nrun_dir: a\n", "at most 65,536 bytes"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_file_of_settings_is_refused_in_one_line_at_once(tmp_path, name):
    content, words = REFUSED[name]
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    start = time.process_time()
    with pytest.raises(ConfigError, match=words) as error:
        read_yaml(path)
    assert time.process_time() - start < 1
    line = str(error.value)
    assert str(path) in line and "\n" not in line and len(line) < 800


def test_a_folder_and_a_pipe_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    for name in ("pipe.yaml", "folder.yaml"):
        with pytest.raises(ConfigError, match="is no file"):
            read_yaml(tmp_path / name)


@pytest.fixture
def saved(tmp_path):
    """A config and the file that a run saved of it."""
    config = changed(load_config("based-1b"), {"data.sources": (SourceConfig("a", 2.5),), "run_dir": "/runs/a b"})
    save_config(config, tmp_path / "config.yaml")
    return config, tmp_path / "config.yaml"


def test_no_part_of_a_saved_file_loads_as_other_settings(saved, tmp_path):
    config, path = saved
    text, cut = path.read_bytes(), tmp_path / "cut.yaml"
    loaded = 0
    line_ends = [size + more for size in range(len(text)) if text[size : size + 1] == b"\n" for more in (0, 1)]
    for size in sorted({*line_ends, *range(0, len(text), 7), len(text)}):
        cut.write_bytes(text[:size])
        try:
            assert load_config(str(cut)) == config
            loaded += 1
        except ConfigError as error:
            assert "\n" not in str(error)
    assert loaded == 2, "the whole file, and the whole file without its last line break"


def test_a_saved_file_that_is_cut_off_between_sections_says_so(saved):
    _, path = saved
    text = path.read_text()
    path.write_text(text[: text.index("train:")])
    with pytest.raises(ConfigError, match="is cut off"):
        load_config(str(path))


def test_a_saved_file_can_be_edited(saved):
    config, path = saved
    path.write_text(path.read_text().replace("/runs/a b", "/runs/c"))
    assert load_config(str(path)) == changed(config, {"run_dir": "/runs/c"})


def test_a_file_is_replaced_as_a_whole(saved, tmp_path, monkeypatch):
    """Where the write fails, the old file stays as it is and nothing else is left."""
    config, path = saved
    before = path.read_bytes()

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_yaml({"run_dir": "other"}, path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["config.yaml"]
    assert load_config(str(path)) == config
