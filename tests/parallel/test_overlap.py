"""What ZeRO sends during computation changes no value, whenever it arrives, and is sent as early as can be."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from based_megatron.checkpoint.zero import zero_fragments
from based_megatron.config import ParallelConfig
from based_megatron.parallel.buckets import cut_into_buckets
from support.layouts import Run, build_run, small_config

STEPS, CLIP = 3, 0.3
LAYOUTS = {
    "dp2": (2, ParallelConfig()),
    "dp2-zero2": (2, ParallelConfig(zero_stage=2)),
    "dp2-zero3": (2, ParallelConfig(zero_stage=3)),
    "cp2": (2, ParallelConfig(context=2)),
    "tp2-dp2": (4, ParallelConfig(tensor=2)),
    "pp2-dp2": (4, ParallelConfig(pipeline=2)),
    "pp2-interleaved-dp2": (4, ParallelConfig(pipeline=2, virtual_pipeline=2)),
}
STAGE_1 = [name for name, (_, parallel) in LAYOUTS.items() if parallel.zero_stage == 1]


class Late:
    """A collective that does nothing before it is waited for."""

    def __init__(self, collective: Any, args: Any, kwargs: Any) -> None:
        self._call = lambda: collective(*args, **kwargs)

    def wait(self) -> None:
        self._call()


class Early:
    """A collective that is over when its call returns."""

    def __init__(self, collective: Any, args: Any, kwargs: Any) -> None:
        collective(*args, **kwargs)

    def wait(self) -> None:
        pass


def asynchronous_as(kind: Any, collective: Any) -> Any:
    """The collective, whose asynchronous calls are of a kind."""

    def call(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
        return kind(collective, args, kwargs) if async_op else collective(*args, **kwargs)

    return call


def bf16_run(parallel: ParallelConfig, **train: Any) -> Run:
    config = small_config(parallel, clip_grad_norm=CLIP, **train)
    return build_run(dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16")))


def trained(parallel: ParallelConfig) -> tuple[list[Any], dict[str, Tensor]]:
    """Losses and norms of some steps and a validation, and all that this rank then keeps of its parameters."""
    run = bf16_run(parallel)
    results = [run.train_step(number, True) for number in range(STEPS)]
    held_out, _ = run.held_out(STEPS, True)
    kept = {f"{f.spec.name} {kind}": value for f in zero_fragments(run.engine) for kind, value in f.tensors.items()}
    return [*results, held_out], kept


def differences(parallel: ParallelConfig) -> list[str]:
    """What differs between a run that hides nothing, and those whose collectives end as late or as early as can be."""
    losses, kept = trained(dataclasses.replace(parallel, overlap_zero=False))
    found = []
    for kind in (Late, Early) if parallel.zero_stage == 1 else (None,):
        with pytest.MonkeyPatch.context() as patch:
            for name in ("reduce_scatter_tensor", "all_gather_into_tensor") if kind else ():
                patch.setattr(dist, name, asynchronous_as(kind, getattr(dist, name)))
            new_losses, new_kept = trained(dataclasses.replace(parallel, overlap_zero=True))
        found += [f"{kind}: {losses} {new_losses}"] if losses != new_losses else []
        found += [f"{kind}: {name}" for name, value in kept.items() if not torch.equal(value, new_kept[name])]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_overlap_changes_no_value(worker_pool, layout):
    world_size, parallel = LAYOUTS[layout]
    assert worker_pool(world_size).run(differences, parallel) == [[]] * world_size


def first_moments(parallel: ParallelConfig) -> tuple[float, float, dict[str, Tensor]]:
    """Loss and norm of one step, and on rank 0 Adam's first moment of each whole parameter: its reduced, clipped gradient, scaled."""
    run = bf16_run(parallel)
    loss, norm = run.train_step(0, True)
    boxes = [
        (fragment.spec, rectangle.global_offset, rectangle.view(fragment.tensors["exp_avg"]).cpu())
        for fragment in zero_fragments(run.engine)
        for rectangle in fragment.rectangles()
    ]
    everywhere: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, boxes)
    whole: dict[str, Tensor] = {}
    for spec, offset, values in (box for boxes in everywhere for box in boxes):
        target = whole.setdefault(spec.name, torch.full(spec.shape, float("nan")))
        target[tuple(slice(o, o + n) for o, n in zip(offset, values.shape, strict=True))] = values
    return loss, norm, whole


@pytest.mark.parametrize("layout", [name for name in STAGE_1 if "dp2" in name])
def test_two_replicas_sum_what_one_sums(worker_pool, layout):
    """Both make the same bf16 gradients of the same micro batches, and differ in the order of fp32 sums only."""
    world_size, parallel = LAYOUTS[layout]
    loss, norm, whole = worker_pool(world_size).run(first_moments, parallel)[0]
    loss_of_one, norm_of_one, of_one = worker_pool(world_size // 2).run(first_moments, parallel)[0]
    assert (loss, norm) == pytest.approx((loss_of_one, norm_of_one), rel=1e-6)
    assert norm > 2 * CLIP, "clipping must count"
    for name, expected in of_one.items():
        torch.testing.assert_close(whole[name], expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))


def order_of_a_step(parallel: ParallelConfig) -> list[str]:
    """Reductions and gathers of the second step as they are begun, between the first and the last gradients and the layers' forwards."""
    run, events = bf16_run(parallel), []
    run.train_step(0, True)
    model = run.step.chunks[0]
    model.final_norm.weight.register_post_accumulate_grad_hook(lambda _: events.append("first gradient"))
    model.layers["0"].mlp_norm.weight.register_post_accumulate_grad_hook(lambda _: events.append("gradient of layer 0"))
    for name, layer in model.layers.items():
        layer.register_forward_hook(lambda *_, name=name: events.append(f"layer {name}"))

    class Noted(Early):
        def __init__(self, collective: Any, args: Any, kwargs: Any) -> None:
            super().__init__(collective, args, kwargs)
            self._name = collective.__name__
            events.append(f"begin {self._name}")

        def wait(self) -> None:
            events.append(f"end {self._name}")

    with pytest.MonkeyPatch.context() as patch:
        for name in ("reduce_scatter_tensor", "all_gather_into_tensor"):
            patch.setattr(dist, name, asynchronous_as(Noted, getattr(dist, name)))
        run.train_step(1, True)
        events.append("update done")
        run.held_out(2, True)
    return events


def test_buckets_go_during_computation(worker_pool):
    """One by one between the gradients of the last micro batch, and while layers run."""
    events = worker_pool(2).run(order_of_a_step, ParallelConfig(overlap_zero=True))[0]
    last_backward = events[len(events) - 1 - events[::-1].index("first gradient") :]
    before_layer_0 = last_backward[: last_backward.index("gradient of layer 0")]
    assert before_layer_0.count("begin reduce_scatter_tensor") >= 2
    assert events.index("begin reduce_scatter_tensor") > len(events) - len(last_backward)
    after = events[events.index("update done") :]
    assert "begin all_gather_into_tensor" not in after
    waits = [after[: after.index(f"layer {layer}")].count("end all_gather_into_tensor") for layer in range(4)]
    assert waits[0] < waits[3] <= events.count("begin all_gather_into_tensor"), waits


def test_buckets_are_runs_of_parameters():
    sizes = [("a", 5), ("b", 3), ("c", 4), ("d", 20), ("e", 1), ("embedding.weight", 2), ("f", 2), ("g", 2)]
    cut = cut_into_buckets(sizes, 8)
    assert [[sizes[place][0] for place in places] for places in cut] == [
        ["a", "b"], ["c"], ["d"], ["e"], ["embedding.weight"], ["f", "g"]
    ]  # fmt: skip
