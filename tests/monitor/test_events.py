import json
import math
from pathlib import Path

from based_megatron.monitor.events import append_event, each_step, read_events
from based_megatron.monitor.sinks.events import EventsSink


def test_fields_of_a_step_go_by_their_short_names(make_run, values, speed):
    run, sink = make_run(), EventsSink()
    sink.start(run)
    sink.log(2, values(2, **speed, **{"grad_norm/mlp": 1.5}))
    (step,) = read_events(run.run_dir / "events.jsonl")
    assert step.pop("time") > 1e9
    assert step == {
        "step": 2,
        "event": "step",
        "loss": 0.5,
        "grad_norm": 4.0,
        "perplexity": 2.5,
        "lr": 0.002,
        "skipped": False,
        "skipped_steps": 0,
        "rollbacks": 0,
        "tokens_seen": 1024,
        "tokens_per_second": 256.0,
        "mfu": 0.064,
        "goodput": 0.9,
        "eta_seconds": 196.0,
        "step_seconds": 2.0,
        "data_seconds": 0.5,
        "memory/rss_gib": 0.5,
        "grad_norm/mlp": 1.5,
    }


def test_an_event_keeps_its_fields(make_run):
    run, sink = make_run(), EventsSink()
    sink.start(run)
    sink.event(7, "checkpoint", {"path": Path("checkpoints/step-00000007"), "seconds": 1.5})
    (event,) = read_events(run.run_dir / "events.jsonl")
    assert (event["step"], event["event"], event["seconds"]) == (7, "checkpoint", 1.5)
    assert event["path"] == "checkpoints/step-00000007"


def test_line_cut_by_a_crash_costs_only_itself(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"step": 1})
    append_event(path, {"step": 2})
    path.write_bytes(path.read_bytes()[:-5])
    append_event(path, {"step": 3})
    append_event(path, {"step": 4})
    assert [event["step"] for event in read_events(path)] == [1, 3, 4]


def test_whole_file_gets_no_empty_lines(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"step": 1})
    append_event(path, {"step": 2})
    assert path.read_bytes() == b'{"step": 1}\n{"step": 2}\n'


def test_infinities_stay_legal_json(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"norm": math.inf, "many": [math.nan, 1.0]})
    event = json.loads(path.read_text(), parse_constant=lambda name: (_ for _ in ()).throw(AssertionError(name)))
    assert float(event["norm"]) == math.inf
    assert math.isnan(float(event["many"][0]))


def test_losses_are_kept_to_the_last_bit(tmp_path):
    path = tmp_path / "events.jsonl"
    append_event(path, {"loss": 0.1 + 0.2})
    assert next(read_events(path))["loss"] == 0.1 + 0.2


def test_each_step_is_read_back_to_the_last_bit(make_run):
    run, sink = make_run(), EventsSink()
    sink.start(run)
    sink.steps(1, [0.1 + 0.2], [1.0])
    sink.log(1, {"train/loss": 5.0})
    sink.steps(2, [2.0, math.nan, 4.0], [math.inf, 3.0, 4.0])
    sink.steps(4, [4.5], [4.25])
    events = list(read_events(run.run_dir / "events.jsonl"))
    assert [(event["event"], event["step"]) for event in events] == [
        ("steps", 1),
        ("step", 1),
        ("steps", 4),
        ("steps", 4),
    ]
    found = each_step(events)
    assert found[1] == (0.1 + 0.2, 1.0) and found[2] == (2.0, math.inf) and found[4] == (4.5, 4.25)
    assert math.isnan(found[3][0]) and list(found) == [1, 2, 3, 4]
