import dataclasses
import json
import math
from pathlib import Path

from based_megatron.config import MonitorConfig
from based_megatron.monitor.events import append_event, read_events
from based_megatron.train.callbacks.events import EventLog


def events_of(trainer) -> list[dict]:
    return list(read_events(trainer.run_dir / "events.jsonl"))


def test_log_points_are_the_first_each_interval_and_the_last(make_trainer):
    trainer = make_trainer(step=0)
    trainer.run([EventLog()], until=5)
    assert [e["step"] for e in events_of(trainer) if e["event"] == "step"] == [1, 2, 4]
    trainer.run([EventLog()], until=10)
    assert [e["step"] for e in events_of(trainer) if e["event"] == "step"] == [1, 2, 4, 6, 8, 10]


def test_last_step_is_logged_between_intervals(make_trainer):
    trainer = make_trainer(step=8)
    trainer.config = dataclasses.replace(trainer.config, monitor=MonitorConfig(log_interval_steps=4))
    trainer.run([EventLog()], until=10)
    assert [e["step"] for e in events_of(trainer) if e["event"] == "step"] == [10]


def test_values_of_a_step(make_trainer):
    trainer = make_trainer()
    trainer.run([EventLog()], until=2)
    step = events_of(trainer)[-1]
    assert (step["loss"], step["grad_norm"], step["lr"], step["skipped"]) == (0.5, 4.0, 0.002, False)
    assert step["tokens_seen"] == 1024
    assert step["tokens_per_second"] == 256.0


def test_start_and_resume_are_told_apart(make_trainer):
    trainer = make_trainer()
    trainer.run([EventLog()], until=3)
    trainer.run([EventLog()], until=3)
    starts = [(event["event"], event["step"]) for event in events_of(trainer) if event["event"] != "step"]
    assert starts == [("start", 0), ("resume", 3)]


def test_every_hook_has_its_event(make_trainer):
    trainer, log = make_trainer(step=7), EventLog()
    log.on_start(trainer)
    log.on_validation(trainer, 2.0)
    log.on_event(trainer, "checkpoint", {"path": Path("checkpoints/step-00000007"), "seconds": 1.5})
    log.on_error(trainer, ValueError("no more data"))
    log.on_end(trainer)
    resume, validation, checkpoint, error, end = events_of(trainer)
    assert {e["step"] for e in (resume, validation, checkpoint, error, end)} == {7}
    assert (validation["loss"], validation["perplexity"]) == (2.0, math.exp(2.0))
    assert (checkpoint["event"], checkpoint["seconds"]) == ("checkpoint", 1.5)
    assert checkpoint["path"] == "checkpoints/step-00000007"
    assert (error["event"], error["type"], error["message"]) == ("error", "ValueError", "no more data")
    assert end["event"] == "end"


def test_other_ranks_write_nothing(make_trainer):
    trainer, log = make_trainer(is_logger=False), EventLog()
    trainer.run([log], until=4)
    log.on_validation(trainer, 1.0)
    log.on_event(trainer, "stop", {})
    log.on_error(trainer, RuntimeError())
    log.on_end(trainer)
    assert not list(trainer.run_dir.iterdir())


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
