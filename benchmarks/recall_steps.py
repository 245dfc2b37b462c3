"""What makes the steps of `based recall` fast on a GPU: milliseconds of a training step of the figure preset, by system.

    python -m benchmarks.recall_steps --systems based,mamba2 --output benchmarks/results/h100-recall-steps.json     one GPU

Each system's first point takes some steps of every length with the same batches in three forms: plain PyTorch in fp32, matrix products
in TF32, and layers in plain PyTorch through torch.compile; all as CUDA graphs. A step of the study is the mean over the batches of an
epoch. Losses are those after the same steps. Prints a table in Markdown and writes it with all digits as JSON.
"""

import argparse
import json
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from based_megatron.bench.table import table_line
from based_megatron.parallel.topology import Topology, join_alone
from based_megatron.recall.graphs import EAGER_STEPS
from based_megatron.recall.model import RecallModel, prepare_for_gpu
from based_megatron.recall.mqar import draw, stream_seed
from based_megatron.recall.presets import PRESETS
from based_megatron.recall.systems import SYSTEMS, Point
from based_megatron.recall.train import Run

FORMS = ("fp32", "tf32", "compiled")
RATE = 10**-2.5


def measure(point: Point, form: str, topology: Topology, timed_steps: int) -> dict[str, Any]:
    """Milliseconds of a step, seconds until graphs are there, peak memory and the loss after all steps."""
    preset, device = PRESETS["figure"], topology.device
    torch.set_float32_matmul_precision("highest" if form == "fp32" else "high")
    torch.cuda.reset_peak_memory_stats()
    model = RecallModel(point.model, topology, backend="auto", seed=0, block=point.block, compiled=form == "compiled")
    run = Run(model, RATE, preset.recipe, 10_000, 0, torch.cuda.graph_pool_handle())
    found: dict[str, Any] = {
        "system": point.system,
        "point": point.name,
        "form": form,
        "first_seconds": 0.0,
        "step_ms": 0.0,
    }
    batches = [math.ceil(segment.examples / preset.recipe.batch_examples) for segment in preset.task.train]
    for i, (segment, count) in enumerate(zip(preset.task.train, batches, strict=True)):
        generator = torch.Generator(device).manual_seed(stream_seed(0, "train", i))
        batch = draw(preset.task, segment, preset.recipe.batch_examples, generator)
        start = time.perf_counter()
        run.train([batch] * (EAGER_STEPS + 2), 0)
        torch.cuda.synchronize()
        ready = time.perf_counter()
        run.train([batch] * timed_steps, 0)
        torch.cuda.synchronize()
        ms = 1e3 * (time.perf_counter() - ready) / timed_steps
        found[f"{segment.name}_ms"] = ms
        found["step_ms"] += ms * count / sum(batches)
        found["first_seconds"] += ready - start
    return found | {"loss": float(run.losses[-1]), "peak_gb": torch.cuda.max_memory_allocated() / 1e9}


def to_markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A line for each point and form."""
    header = ["point", "form", "ms a step", "64/4", "256/64", "seconds to graphs", "peak GB", "loss"]
    lines = [table_line(*header), table_line("---", "---", *["---:"] * (len(header) - 2))]
    for row in rows:
        numbers = (row["step_ms"], row["64/4_ms"], row["256/64_ms"], row["first_seconds"], row["peak_gb"])
        lines.append(table_line(row["point"], row["form"], *(f"{x:.2f}" for x in numbers), f"{row['loss']:.4f}"))
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, measure, write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--systems", default=",".join(SYSTEMS))
    parser.add_argument("--forms", default=",".join(FORMS))
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    topology, rows = join_alone(torch.device("cuda", 0)), []
    prepare_for_gpu(compile_threads=8)
    for system in options.systems.split(","):
        point = SYSTEMS[system].figure[0](PRESETS["figure"].task.vocab_size)
        for form in options.forms.split(","):
            try:
                rows.append(measure(point, form, topology, options.steps))
            except Exception as error:  # one that does not compile costs no other
                print(f"{point.name} {form}: {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)
                continue
            print(to_markdown(rows[-1:]).splitlines()[-1], flush=True)
            torch.compiler.reset()
            options.output.write_text(
                json.dumps({"device": torch.cuda.get_device_name(), "rows": rows}, indent=1) + "\n"
            )
    print(to_markdown(rows))


if __name__ == "__main__":
    main()
