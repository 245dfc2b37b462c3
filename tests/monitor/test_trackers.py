"""Weights & Biases and MLflow, offline: what is written can be read back."""

import dataclasses
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from based_megatron.config import MonitorConfig
from based_megatron.errors import ConfigError
from based_megatron.monitor.sinks import build
from based_megatron.monitor.sinks.mlflow import MlflowSink
from based_megatron.monitor.sinks.wandb import WandbSink

pytestmark = pytest.mark.filterwarnings("ignore")


def write(sink, run, values) -> None:
    sink.start(run)
    sink.log(1, values(1))
    sink.log(2, values(2))
    sink.event(2, "validation", {"loss": 2.0, "perplexity": math.exp(2.0)})
    sink.event(2, "checkpoint", {"path": "x"})
    sink.text(2, "sample/a", "a|b")
    sink.close()


def test_mlflow(make_run, values, tmp_path, monkeypatch):
    tracking = pytest.importorskip("mlflow.tracking", reason="needs the extra `trackers`")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    run = make_run(project="mine")
    write(MlflowSink(), run, values)
    resumed = MlflowSink()
    resumed.start(make_run(step=2, project="mine", log_interval_steps=5))
    client = tracking.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.status == "RUNNING", "the same one goes on"
    resumed.log(3, values(3))
    resumed.close()
    (found,) = client.search_runs([client.get_experiment_by_name("mine").experiment_id])
    assert found.info.run_name == "a run" and found.info.status == "FINISHED"
    assert found.data.params["model.layer_pattern"] == "cLS"
    history = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5), (3, 1 / 3)]
    assert found.data.metrics["validation/loss"] == 2.0
    MlflowSink().start(dataclasses.replace(run, run_id="beef"))
    assert len(client.search_runs([found.info.experiment_id])) == 2, "another run of the same name is another one"


def records(data: bytes) -> Iterator[bytes]:
    """The records of an offline run's file: blocks of 32 KiB with LevelDB's framing, after a header of 7 bytes."""
    place, record = 7, b""
    while place + 7 <= len(data):
        if 32768 - place % 32768 < 7:
            place += 32768 - place % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, place)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def history(path: Path) -> dict[int, dict[str, Any]]:
    """Values by step that an offline run of Weights & Biases has left."""
    from wandb.proto.wandb_internal_pb2 import Record

    rows = [Record.FromString(record).history for record in records(path.read_bytes())]
    return {
        row.step.num: {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in rows
        if row.item
    }


def test_wandb(make_run, values, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="needs the extra `trackers`")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run = make_run(project="mine")
    write(WandbSink(), run, values)
    wandb.teardown()  # its service writes the file, and has not always done so when a run has finished
    (file,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    rows = history(file)
    assert [(step, rows[step]["train/loss"]) for step in (1, 2)] == [(1, 1.0), (2, 0.5)]
    assert rows[2]["validation/loss"] == 2.0 and rows[2]["sample/a"] == "a|b"


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch):
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"monitor\.trackers has wandb.*pip install"):
        build.check_trackers(MonitorConfig(trackers=("wandb",)))
    build.check_trackers(MonitorConfig())
