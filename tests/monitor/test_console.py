import io
import re

import pytest
from rich.console import Console

from based_megatron.monitor.sinks.console import ConsoleSink, recall_line, status_line
from based_megatron.monitor.words import duration, human


def log_file() -> Console:
    """A console that is no terminal, as in a SLURM log."""
    return Console(file=io.StringIO(), width=80)


def text_of(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_log_file_gets_one_line_for_each_log_point(make_run, values):
    console = log_file()
    sink = ConsoleSink(console)
    sink.start(make_run())
    for step in (1, 2, 4):
        sink.log(step, values(step))
    lines = [line.split() for line in text_of(console).splitlines() if re.match(r"\d\d:\d\d:\d\d step ", line)]
    assert [words[2] for words in lines] == ["1/10", "2/10", "4/10"], "each begins with the time of day"


def test_status_line(values, speed):
    assert status_line(2, 100, values(2, **speed), width=200) == (
        "step 2/100 loss 0.5000 grad 4 256 tok/s MFU 6% good 90% ETA 3m16s lr 2.00e-03 ppl 2.50"
    )


@pytest.mark.parametrize(
    ("width", "shown"),
    [
        (77, "step 12345/100000 loss 0.5000 grad 4 256 tok/s MFU 6% good 90% ETA 3m16s"),
        (71, "step 12345/100000 loss 0.5000 grad 4 256 tok/s good 90% ETA 3m16s"),
        (60, "step 12345/100000 loss 0.5000 grad 4 256 tok/s ETA 3m16s"),
        (50, "step 12345/100000 loss 0.5000 256 tok/s ETA 3m16s"),
    ],
)
def test_what_does_not_fit_is_left_out_whole(values, speed, width, shown):
    assert status_line(12345, 100000, values(2, **speed), width) == shown and len(shown) <= width


def test_status_line_before_anything_is_measured(values):
    assert status_line(1, 100, values(1), 80) == "step 1/100 loss 1.0000 grad 2 lr 1.00e-03 ppl 2.50"


def test_skipped_step_is_marked(values):
    line = status_line(3, 100, values(3, **{"train/skipped": True, "train/grad_norm": float("nan")}), 80)
    assert "grad nan SKIPPED" in line


def test_table_shows_the_layout_and_the_size(make_run):
    console = log_file()
    ConsoleSink(console).start(make_run())
    table = " ".join(text_of(console).split())
    assert "'cLS'" in table
    assert "4 = tensor 1 x pipeline 1 x context 1 x data 4, ZeRO 1" in table
    assert "256 sequences x 2048 = 524k tokens" in table
    assert "2M tokens, of which an epoch reads 99.98%" in table
    assert "reads │ web: 4M tokens, 2 epochs" in table
    assert "10 steps = 5.24M tokens, from step 0" in table


def test_validation_and_events_are_lines():
    console = log_file()
    sink = ConsoleSink(console)
    sink.event(6, "validation", {"loss": 2.0, "perplexity": 7.39})
    sink.event(6, "checkpoint", {"path": "a" * 100, "seconds": 1.23456})
    assert [line[9:] for line in text_of(console).splitlines()] == [
        "step 6 validation loss 2.0000 ppl 7.39",
        f"step 6 checkpoint path='{'a' * 100}' seconds=1.235",
    ]


@pytest.mark.parametrize("name", ["start", "resume", "error"])
def test_what_the_table_or_the_last_line_says_is_not_said_twice(name):
    console = log_file()
    ConsoleSink(console).event(0, name, {"message": "x"})
    assert text_of(console) == ""


def test_the_first_cause_is_said_if_it_was_another_rank():
    console = log_file()
    ConsoleSink(console).event(7, "error", {"rank": 2, "host": "b", "type": "ValueError", "message": "no"})
    assert text_of(console)[9:] == "step 7 rank 2 on b failed first: ValueError: no\n"


def test_square_brackets_are_not_markup():
    console = log_file()
    ConsoleSink(console).event(0, "sample", {"text": "x[bold]\ny"})
    assert text_of(console)[9:] == "step 0 sample text='x[bold]\\ny'\n"


def test_terminal_gets_a_live_line_that_is_closed(make_run, values):
    console = Console(file=io.StringIO(), force_terminal=True, width=160)
    sink = ConsoleSink(console)
    sink.start(make_run())
    sink.log(10, values(10))
    sink.event(10, "end", {"tokens_seen": 5120, "skipped_steps": 4})
    sink.close()
    shown = text_of(console)
    assert (
        "step 10/10 loss 0.1000" in shown and "ended at step 10, of which 4 were skipped, after 5.12k tokens" in shown
    )
    assert shown.count("\x1b[?25l") == shown.count("\x1b[?25h") == 1  # the cursor is hidden, then shown again


def test_closing_gives_the_cursor_back(make_run):
    console = Console(file=io.StringIO(), force_terminal=True)
    sink = ConsoleSink(console)
    sink.start(make_run())
    sink.close()
    assert "\x1b[?25h" in text_of(console)


@pytest.mark.parametrize(
    "number, shown", [(0, "0"), (999, "999"), (999.9, "1k"), (54_321, "54.3k"), (999_999, "1M"), (362_620_928, "363M")]
)
def test_human_numbers(number, shown):
    assert human(number) == shown


@pytest.mark.parametrize(
    "seconds, shown", [(42.4, "42s"), (59.7, "1m00s"), (3599, "59m59s"), (11_520, "3h12m"), (90_000, "1d01h")]
)
def test_durations(seconds, shown):
    assert duration(seconds) == shown


def test_recall_is_one_line_with_what_chance_would_give(make_run):
    console = log_file()
    sink = ConsoleSink(console)
    sink.start(make_run())
    fields = {
        "ar_ppl": 551.3,
        "other_ppl": 72.2,
        "ar_share": 0.0091,
        "probes": {"induction/64": 9.871, "induction/256": 8.0, "mqar/8": None},
        "chance": {"induction/64": 7.62, "induction/256": 7.62, "mqar/8": 6.93},
    }
    sink.event(4, "recall", fields)
    (line,) = (line for line in text_of(console).splitlines() if " recall " in line)
    words = "ppl 551.30 on AR hits (0.9% of tokens), 72.20 on others; induction (chance 7.62) 9.87 8.00"
    assert line.endswith(f"step 4 recall {words}")
    assert recall_line({**fields, "ar_ppl": None, "probes": {}}) == "no AR hits"
