"""What a user installs: the wheel and the source distribution hold every file of the package, under its import path."""

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]
PACKAGE = REPO / "based_megatron"
SUFFIXES = {".py", ".yaml", ".sbatch", ".typed"}


def package_files() -> set[str]:
    """Every file below the package, also behind its links to the top-level folders, as `based_megatron/...`."""
    folders = [PACKAGE, *(entry for entry in PACKAGE.iterdir() if entry.is_symlink())]
    paths = (path for folder in folders for path in folder.rglob("*"))
    return {str(path.relative_to(REPO)) for path in paths if path.is_file() and path.suffix in SUFFIXES}


@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    """A folder with the wheel and the sdist, made from a copy of the sources: nothing of an earlier build can help."""
    source = tmp_path_factory.mktemp("source") / "repo"
    unwanted = shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "__pycache__", "tests", "docs", "benchmarks")
    shutil.copytree(REPO, source, symlinks=True, ignore=unwanted)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return source / "dist"


def test_the_top_level_folders_are_links_inside_the_package():
    links = {entry.name: entry.resolve() for entry in PACKAGE.iterdir() if entry.is_symlink()}
    assert links == {name: REPO / name for name in ("kernels", "launchers", "data_prep", "configs")}


def test_the_wheel_holds_every_file_of_the_package(built):
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        files = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert files == package_files()


def test_the_sdist_holds_every_file_of_the_package(built):
    with tarfile.open(next(built.glob("*.tar.gz"))) as sdist:
        files = {member.name.partition("/")[2] for member in sdist if not member.isdir()}
        assert not [member.name for member in sdist if member.issym() or member.islnk()], (
            "links need their target unpacked"
        )
    assert {name for name in files if name.startswith("based_megatron/")} == package_files()


def test_the_wheel_imports_without_the_repository(built, tmp_path):
    """The package is one folder there: `kernels` must not be a name of its own."""
    with zipfile.ZipFile(next(built.glob("*.whl"))) as wheel:
        wheel.extractall(tmp_path)
    code = (
        "import importlib.util, based_megatron, based_megatron.kernels, based_megatron.config as c\n"
        f"assert based_megatron.__file__.startswith({str(tmp_path)!r}), based_megatron.__file__\n"
        "assert importlib.util.find_spec('data_prep') is None\n"
        "assert 'tiny' in c.preset_names(), c.preset_names()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env={"PYTHONPATH": str(tmp_path)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
