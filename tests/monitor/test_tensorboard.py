import math

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from based_megatron.train.callbacks.tensorboard import TensorBoardLogger


def reread(trainer) -> EventAccumulator:
    accumulator = EventAccumulator(str(trainer.run_dir / "tensorboard"))
    accumulator.Reload()
    return accumulator


def points(accumulator: EventAccumulator, tag: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in accumulator.Scalars(tag)]


def test_tags_of_a_step_on_a_cpu(make_trainer):
    trainer, logger = make_trainer(), TensorBoardLogger()
    trainer.run([logger], until=4)
    logger.on_end(trainer)
    assert set(reread(trainer).Tags()["scalars"]) == {
        "train/loss",
        "train/perplexity",
        "train/lr",
        "train/grad_norm",
        "train/tokens_seen",
        "throughput/tokens_per_second",
        "throughput/tokens_per_second_per_device",
        "throughput/mfu",
        "time/step_seconds",
        "time/data_seconds",
        "time/forward_backward_seconds",
        "time/optimizer_seconds",
        "memory/rss_gib",
    }


@pytest.mark.parametrize(
    "tag, values",
    [
        ("train/loss", [(1, 1.0), (2, 0.5), (4, 0.25)]),
        ("train/perplexity", [(1, math.e), (2, math.exp(0.5)), (4, math.exp(0.25))]),
        ("train/lr", [(1, 1e-3), (2, 2e-3), (4, 4e-3)]),
        ("train/grad_norm", [(1, 2.0), (2, 4.0), (4, 8.0)]),
        ("train/tokens_seen", [(1, 512), (2, 1024), (4, 2048)]),
        ("throughput/tokens_per_second", [(2, 256.0), (4, 256.0)]),
        ("throughput/tokens_per_second_per_device", [(2, 64.0), (4, 64.0)]),
        ("time/step_seconds", [(2, 2.0), (4, 2.0)]),
        ("time/data_seconds", [(2, 0.5), (4, 0.5)]),
        ("time/forward_backward_seconds", [(2, 1.0), (4, 1.0)]),
        ("time/optimizer_seconds", [(2, 0.25), (4, 0.25)]),
    ],
)
def test_values_of_a_step(make_trainer, tag, values):
    trainer, logger = make_trainer(), TensorBoardLogger()
    trainer.run([logger], until=4)
    logger.on_end(trainer)
    found = points(reread(trainer), tag)
    assert [step for step, _ in found] == [step for step, _ in values]
    assert [value for _, value in found] == pytest.approx([value for _, value in values], rel=1e-6)


def test_validation(make_trainer):
    trainer, logger = make_trainer(step=6), TensorBoardLogger()
    logger.on_start(trainer)
    logger.on_validation(trainer, 2.0)
    logger.on_end(trainer)
    found = reread(trainer)
    assert points(found, "validation/loss") == [(6, 2.0)]
    assert points(found, "validation/perplexity") == [(6, pytest.approx(math.exp(2.0)))]


def test_samples_are_text_and_other_events_are_not(make_trainer):
    trainer, logger = make_trainer(step=6), TensorBoardLogger()
    logger.on_start(trainer)
    logger.on_event(trainer, "sample", {"prompt": "import ", "text": "os\n# *not* Markdown"})
    logger.on_event(trainer, "checkpoint", {"path": "x"})
    logger.on_end(trainer)
    tags = reread(trainer).Tags()["tensors"]
    assert len(tags) == 1
    (sample,) = reread(trainer).Tensors(tags[0])
    assert sample.step == 6
    assert sample.tensor_proto.string_val[0].decode() == "    import |os\n    # *not* Markdown\n"


def test_resume_hides_the_points_of_the_killed_run(make_trainer):
    killed, logger = make_trainer(), TensorBoardLogger()
    killed.run([logger], until=8)
    logger.on_error(killed, KeyboardInterrupt())
    resumed, logger = make_trainer(step=4), TensorBoardLogger()
    logger.on_start(resumed)
    logger.on_end(resumed)
    assert [step for step, _ in points(reread(resumed), "train/loss")] == [1, 2, 4]


def test_other_ranks_write_nothing(make_trainer):
    trainer, logger = make_trainer(is_logger=False), TensorBoardLogger()
    trainer.run([logger], until=4)
    logger.on_validation(trainer, 1.0)
    logger.on_event(trainer, "sample", {"prompt": "a", "text": "b"})
    logger.on_end(trainer)
    assert not list(trainer.run_dir.iterdir())
