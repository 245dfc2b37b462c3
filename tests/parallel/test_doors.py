"""The host of this package keeps its own torch, DeepSpeed, warnings, environment and log levels."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "based_megatron"
THIRD_PARTIES = "import deepspeed, deepspeed.ops, megatron.core, transformers.modeling_utils, torch.utils.tensorboard, rich, omegaconf, tyro"

PRELUDE = f"""
import copy, importlib, logging, os, pkgutil, sys, warnings
import torch
with warnings.catch_warnings():
    {THIRD_PARTIES}
    from deepspeed.runtime import bf16_optimizer
    from megatron.core.pipeline_parallel import schedules

def host():
    return dict(
        device=torch.cuda.current_device, synchronize=torch.cuda.synchronize, schedules=schedules.torch,
        memory=bf16_optimizer.see_memory_usage, ops=deepspeed.ops.__compatible_ops__, filters=list(warnings.filters),
        environment=dict(os.environ), levels={{name: logging.getLogger(name).level for name in (None, "DeepSpeed", "torch")}},
        threads=torch.get_num_threads(), dtype=torch.get_default_dtype(), grad=torch.is_grad_enabled(),
    )

def changes(before):
    now = host()
    return [name for name in before if now[name] is not before[name] and now[name] != before[name]]

before = host()
"""
IMPORTS = """
import based_megatron
failed = []
for found in pkgutil.walk_packages(based_megatron.__path__, "based_megatron."):
    if not found.name.endswith("__main__"):
        try:
            importlib.import_module(found.name)
        except ModuleNotFoundError as error:
            failed.append((found.name, error.name))
assert not [name for name, missing in failed if missing.startswith("based_megatron")], failed
assert "based_megatron.parallel.megatron" in sys.modules and "based_megatron.train.step" in sys.modules
assert changes(before) == [], changes(before)
"""
STEP = """
sys.path.insert(0, "tests")
from based_megatron.config import ParallelConfig
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.topology import join, leave
from support.layouts import build_run, small_config
join(rank_from_environment({}), torch.device("cpu"), 60)
for stage in (1, 2):
    run = build_run(small_config(ParallelConfig(zero_stage=stage)))
    run.train_step(0, True)
    assert changes(before) == [], (stage, changes(before))
leave()
assert changes(before) == [], changes(before)
"""


def test_nothing_of_the_host_is_changed():
    """Not by importing every module, and not by training steps after it."""
    finished = subprocess.run(
        [sys.executable, "-c", PRELUDE + IMPORTS + STEP], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert finished.returncode == 0, finished.stderr[-2000:]


def importers(library: str) -> list[str]:
    """Files of ours that import a library, by path in the package."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            if any(name.split(".")[0] == library for name in names):
                found.append(str(path.relative_to(PACKAGE)))
    return sorted(set(found))


@pytest.mark.parametrize("library", ["megatron", "deepspeed"])
def test_each_library_has_one_door(library):
    assert importers(library) == [f"parallel/{library}.py"]


def test_names_of_deepspeed_stay_behind_its_door():
    private = ("_hp_grad", "_hp_mapping", "ds_pipe_replicated", "fp32_groups_flat", "grad_position", "update_lp_params")
    files = [path for path in PACKAGE.rglob("*.py") if any(name in path.read_text() for name in private)]
    assert [str(path.relative_to(PACKAGE)) for path in files] == ["parallel/deepspeed.py"]
