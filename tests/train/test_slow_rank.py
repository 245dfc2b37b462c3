"""A rank that computes slowly is named, although all ranks end a step together."""

import time
from typing import Any

import pytest
import torch.distributed as dist

from based_megatron.train.step import Step
from support.runs import events, train_in_pool

SLOW_SECONDS = 0.15


def job_with_a_slow_rank(*job: Any) -> None:
    """Rank 1 takes longer in the forward pass of each micro batch."""
    loss_sum = Step.loss_sum

    def slow(*args: Any) -> Any:
        if dist.get_rank() == 1:
            time.sleep(SLOW_SECONDS)
        return loss_sum(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Step, "loss_sum", slow)
        train_in_pool(*job)


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_a_slow_rank_is_named(worker_pool, corpus, tmp_path, zero_stage):
    overrides = ("--validation.interval-steps", "0", "--checkpoint.interval-steps", "0", "--train.steps", "7")
    job = ("--parallel.zero-stage", str(zero_stage), *overrides)
    worker_pool(2).run(job_with_a_slow_rank, tmp_path, corpus, *job)
    last = events(tmp_path, "step")[-1]
    assert last["slowest_rank"] == 1
    slower = last["own_seconds_slowest"] - last["own_seconds_median"]
    assert slower > SLOW_SECONDS / 3, "the median of two is half way between them"
    (straggler,) = events(tmp_path, "straggler")
    assert straggler["rank"] == 1 and straggler["slower"] > 0.2 and straggler["host"]
