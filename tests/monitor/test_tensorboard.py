import math
import re

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar.layout_pb2 import Layout
from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

from based_megatron.data.slices import MOST_SLICES, Slices
from based_megatron.monitor.sinks.recall_image import COLOURS, recall_image
from based_megatron.monitor.sinks.tensorboard import LAYOUT, TensorBoardSink
from based_megatron.train.callbacks.recall_probe import Recall


def reread(run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def reread_by_tokens(run) -> EventAccumulator:
    accumulator = EventAccumulator(str(run.run_dir / "tensorboard" / "by_tokens"))
    accumulator.Reload()
    return accumulator


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def test_every_metric_is_a_scalar_of_its_name(make_run, values, speed):
    run, sink = make_run(), TensorBoardSink()
    sink.start(run)
    sink.log(1, values(1))
    sink.log(2, values(2, **speed))
    sink.close()
    found = reread(run)
    assert set(found.Tags()["scalars"]) == {*values(2), *speed}
    assert reread_by_tokens(run).Tags()["scalars"] == []
    assert points(found, "train/loss") == [(1, 1.0), (2, 0.5)]
    assert points(found, "train/skipped") == [(1, 0.0), (2, 0.0)]
    assert points(found, "time/step_seconds") == [(2, 2.0)]


def test_validation(make_run):
    run, sink = make_run(step=6), TensorBoardSink()
    sink.start(run)
    sink.event(7, "validation", {"loss": 2.0})
    sink.event(8, "sample", {"prompt": "x"})
    sink.close()
    found = reread(run)
    assert points(found, "validation/loss") == [(7, 2.0)]
    ((step, perplexity),) = points(found, "validation/perplexity")
    assert step == 7 and math.isclose(perplexity, math.exp(2.0), rel_tol=1e-6)
    assert len(found.Tags()["scalars"]) == 2


def test_samples_are_preformatted_text(make_run):
    run, sink = make_run(step=6), TensorBoardSink()
    sink.start(run)
    sink.text(7, "sample/import ", "import |os\n# *not* Markdown")
    sink.close()
    found = reread(run)
    (tag,) = (tag for tag in found.Tags()["tensors"] if tag.startswith("sample"))
    (sample,) = found.Tensors(tag)
    assert sample.step == 7
    assert sample.tensor_proto.string_val[0].decode() == "    import |os\n    # *not* Markdown\n"


def test_resume_hides_the_points_of_the_killed_run(make_run, values):
    for start, until in ((0, 8), (4, 4)):
        run, sink = make_run(step=start), TensorBoardSink()
        sink.start(run)
        for step in range(start + 1, until + 1):
            sink.log(step, values(step))
        sink.close()
    assert [step for step, _ in points(reread(run), "train/loss")] == [1, 2, 3, 4]


def test_the_layout_shows_the_run_at_a_glance(make_run, values, speed):
    run, sink = make_run(), TensorBoardSink()
    sink.start(run)
    sink.close()
    found = reread(run)
    (tag,) = (tag for tag in found.Tags()["tensors"] if "custom_scalars" in tag)
    layout = Layout.FromString(found.Tensors(tag)[0].tensor_proto.string_val[0])
    assert [category.title for category in layout.category] == ["at a glance", "model", "data", "recall", "machine"]
    patterns = [tag for category in LAYOUT.values() for _, tags in category.values() for tag in tags]
    assert [tag for c in layout.category for chart in c.chart for tag in chart.multiline.tag] == patterns
    shown = {name for name in {**values(1), **speed} if any(re.search(pattern, name) for pattern in patterns)}
    assert shown == {*values(1), *speed} - {"train/perplexity", "train/skipped", "train/tokens_seen"}


def test_every_metric_of_recall_is_in_a_chart():
    slices = Slices(1.0, (16,), ("induction/64", "mqar/8"))
    names = Recall(slices, [(1.0, 1.0)] * MOST_SLICES).metrics()
    patterns = [pattern for _, tags in LAYOUT["recall"].values() for pattern in tags]
    assert len(names) == 3 + 5 + 2 + 2
    assert all(sum(bool(re.search(pattern, f"recall/{name}")) for pattern in patterns) == 1 for name in names)


@pytest.mark.parametrize("loss", [None, math.inf, math.nan, 7.5])
def test_a_picture_of_recall_can_have_bins_without_a_loss(loss):
    row = [loss, 1]
    fields = {"by_count": {"0": {"first": row, "repeat": row}}, "by_distance": {"1-16": row, "17_up": [3.0, 2]}}
    image = recall_image(fields, 5)
    assert image.shape == (360, 960, 3) and image.dtype == np.uint8
    red = (image == COLOURS["AR hits"]).all(-1)
    assert red[100:, 780:].any(), "the other bin"
    assert red[100:, :780].any() == (loss == 7.5)


def test_losses_over_tokens_survive_a_resume(make_run, values):
    """In a folder of their own: hiding the steps after that of the resume would hide all of them."""
    for start, until in ((0, 4), (2, 3)):
        run, sink = make_run(step=start), TensorBoardSink()
        sink.start(run)
        for step in range(start + 1, until + 1):
            sink.log(step, values(step, **{"train/loss_mean": 1 / step}))
        sink.event(until, "validation", {"loss": 2.0})
        sink.close()
    found = reread_by_tokens(run)
    assert points(found, "by_tokens/loss_mean") == [(512, 1.0), (1024, 0.5), (1536, pytest.approx(1 / 3))]
    assert points(found, "by_tokens/validation_loss") == [(1536, 2.0)]


def test_events_are_counted(make_run):
    run, sink = make_run(), TensorBoardSink()
    sink.start(run)
    for step, name in ((3, "skip"), (4, "checkpoint"), (5, "skip"), (5, "rollback"), (6, "stop")):
        sink.event(step, name, {})
    sink.close()
    found = reread(run)
    assert points(found, "events/skips") == [(3, 1.0), (5, 2.0)]
    assert points(found, "events/saves") == [(4, 1.0)] and points(found, "events/rollbacks") == [(5, 1.0)]
    assert set(found.Tags()["scalars"]) == {"events/skips", "events/saves", "events/rollbacks"}


def test_the_settings_and_the_command_are_there(make_run, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/bin/based", "train", "--run-name", "my run"])
    run, sink = make_run(), TensorBoardSink()
    sink.start(run)
    sink.close()
    found = reread(run)
    text = {
        tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode()
        for tag in found.Tags()["tensors"]
        if "run/" in tag
    }
    assert text["run/command/text_summary"] == "    based train --run-name 'my run'\n"
    assert "    model:\n      layer_pattern: cLS\n" in text["run/config/text_summary"]
    (start,) = (
        HParamsPluginData.FromString(found.SummaryMetadata(tag).plugin_data.content).session_start_info
        for tag in ["_hparams_/session_start_info"]
    )
    assert (
        start.hparams["model.layer_pattern"].string_value == "cLS" and start.hparams["train.steps"].number_value == 10
    )
