"""Recall of a validation: metrics and tables from sums by slice, and a whole job that shows them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from based_megatron.config import parse_config
from based_megatron.data.slices import MOST_SLICES, Slices
from based_megatron.data.sources import Sources
from based_megatron.train.callbacks.recall_probe import Recall
from benchmarks import recall_curves
from support.runs import command, events, losses, train_in_pool

SLICES = Slices(rare_count=9.0, distance_ends=(16, 64), probes=("induction/64", "mqar/8"))


def sums(**of_slices: tuple[float, float]) -> list[tuple[float, float]]:
    """Sums by slice from mean losses and tokens; COUNT__KIND, with `from_` and `to` in the place of signs."""
    found = [(0.0, 0.0)] * MOST_SLICES
    for name, (mean, tokens) in of_slices.items():
        count, _, kind = name.partition("__")
        key = (count.removeprefix("c").replace("to", "-"), kind.removeprefix("d").replace("to", "-"))
        found[SLICES.keys.index(key)] = (mean * tokens, tokens)
    return found


GIVEN = sums(
    c0__first=(8.0, 10.0),
    c0__d1to16=(6.0, 4.0),
    c0__d65_up=(7.0, 2.0),
    c1to9__first=(5.0, 20.0),
    c1to9__d17to64=(3.0, 4.0),
    c10to99__first=(4.0, 30.0),
    c10to99__common=(3.5, 30.0),
)
GIVEN[SLICES.of_probe("mqar/8")] = (12.0, 6.0)


def test_metrics_are_means_over_what_their_names_say():
    found = Recall(SLICES, GIVEN).metrics()
    hits, others = 4 * 6 + 2 * 7 + 4 * 3, 8 * 10 + 5 * 20 + 4 * 30 + 3.5 * 30
    assert found == pytest.approx(
        {
            "ar_ppl": math.exp(hits / 10),
            "other_ppl": math.exp(others / 90),
            "ar_share": 10 / 100,
            "gain_by_count/0": 8 - (24 + 14) / 6,
            "gain_by_count/1-9": 5 - 3,
            "gain_by_count/10-99": 4 - 3.5,
            "loss_by_distance/1-16": 6,
            "loss_by_distance/17-64": 3,
            "loss_by_distance/65_up": 7,
            "mqar/8": 2,
        }
    )


def test_tables_have_every_bin_and_its_tokens():
    found = Recall(SLICES, GIVEN).tables()
    assert list(found["by_count"]) == SLICES.counts and list(found["by_distance"]) == SLICES.distances
    assert found["by_count"]["0"] == {"first": [8.0, 10], "repeat": [pytest.approx(38 / 6), 6]}
    assert found["by_count"]["10-99"] == {"first": [4.0, 30], "repeat": [3.5, 30]}
    assert found["by_count"]["1000_up"] == {"first": [None, 0], "repeat": [None, 0]}
    assert found["by_distance"]["65_up"] == [7.0, 2]
    assert found["probes"] == {"induction/64": None, "mqar/8": 2.0}
    json.dumps(found)


def test_a_validation_without_tokens_has_no_metrics():
    found = Recall(SLICES, [(0.0, 0.0)] * MOST_SLICES)
    assert found.metrics() == {} and found.tables()["ar_ppl"] is None


JOB = (
    "--train.steps", "2", "--validation.interval-steps", "1", "--checkpoint.interval-steps", "2",
    "--validation.recall-rare-count", "500",
)  # fmt: skip


@pytest.fixture(scope="module")
def jobs(worker_pool, corpus, tmp_path_factory):
    """Run folders of a job with recall, on one rank and on two stages, and of one without."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "stages", "off")}
    one, off = (folders["one"], ()), (folders["off"], ("--validation.no-recall",))
    worker_pool(1).run(train_each, corpus, [one, off])
    worker_pool(2).run(train_each, corpus, [(folders["stages"], ("--parallel.pipeline", "2"))])
    return folders


def train_each(corpus: Path, given: list[tuple[Path, tuple[str, ...]]]) -> None:
    for folder, overrides in given:
        train_in_pool(folder, corpus, *JOB, *overrides)


def test_a_job_measures_recall_at_each_validation(jobs, corpus):
    found = events(jobs["one"], "recall")
    assert [event["step"] for event in found] == [1, 2]
    config = parse_config(command(jobs["one"], corpus, *JOB)[4:])
    sources = Sources(config.data)
    chosen = sources.validation_sequences(config.validation.sequences)
    labels = sum(64 - len(sources.validation[s].document_starts(n)[1:]) for s, n in chosen)
    counted = [row[1] for rows in found[0]["by_count"].values() for row in rows.values()]
    assert sum(counted) == labels > 0, "each label with a loss is in one slice"
    assert found[0]["rare_count"] == 500
    hits = sum(row[1] for row in found[0]["by_distance"].values())
    assert found[0]["ar_share"] == pytest.approx(hits / labels) and hits
    losses_and_tokens = [row for rows in found[0]["by_count"].values() for row in rows.values() if row[1]]
    (validation, _) = events(jobs["one"], "validation")
    mean = sum(loss * tokens for loss, tokens in losses_and_tokens) / labels
    assert mean == pytest.approx(validation["loss"], abs=1e-5)
    assert found[0]["probes"].keys() == {"mqar/8"} == found[0]["chance"].keys()
    assert found[1]["probes"]["mqar/8"] > 1


def test_every_layout_finds_the_same(jobs):
    for one, other in zip(events(jobs["one"], "recall"), events(jobs["stages"], "recall"), strict=True):
        for name in ("by_count", "by_distance", "probes"):
            pairs = zip(flat(one[name]), flat(other[name]), strict=True)
            assert all(a == pytest.approx(b, abs=2e-3) for a, b in pairs), name


def flat(table) -> list:
    if isinstance(table, dict):
        return [value for part in table.values() for value in flat(part)]
    return [table] if not isinstance(table, list) else table


def test_recall_changes_no_loss_of_training_or_validation(jobs):
    assert losses(jobs["off"]) == losses(jobs["one"])
    validations = [[event["loss"] for event in events(jobs[name], "validation")] for name in ("one", "off")]
    assert validations[0] == validations[1] and not events(jobs["off"], "recall")


def test_bigrams_are_counted_once_for_all_runs_of_a_corpus(jobs, corpus):
    assert len(list((corpus / "recall").glob("*.counts"))) == 1
    assert not (jobs["stages"] / "recall").exists()


def test_tensorboard_has_the_numbers_and_a_picture(jobs):
    found = EventAccumulator(str(jobs["one"] / "tensorboard"))
    found.Reload()
    tags = found.Tags()
    assert [point.step for point in found.Scalars("recall/mqar/8")] == [1, 2]
    assert {"recall/ar_share", "recall/ar_ppl", "recall/other_ppl"} <= set(tags["scalars"])
    (image, _) = found.Images("recall/losses")
    assert (image.width, image.height) == (960, 360) and image.step == 1
    assert np.frombuffer(image.encoded_image_string[:4], np.uint8).tolist() == [0x89, *b"PNG"]


def test_the_curves_of_a_run_are_collected_and_drawn(jobs, tmp_path):
    pytest.importorskip("matplotlib")
    recall_curves.main("collect", jobs["one"], tmp_path / "curves.json")
    found = json.loads((tmp_path / "curves.json").read_text())
    assert [validation["tokens"] for validation in found["validations"]] == [8 * 64, 2 * 8 * 64]
    assert found["validations"][0]["ar_ppl"] == pytest.approx(events(jobs["one"], "recall")[0]["ar_ppl"], abs=1e-5)
    recall_curves.main("draw", tmp_path / "curves.json", tmp_path / "curves.svg")
    assert "AR hits by distance" in (tmp_path / "curves.svg").read_text()
