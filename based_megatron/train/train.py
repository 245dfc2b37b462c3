"""`based train`: config -> topology -> model -> optimizer -> data -> checkpoint -> loop."""

from collections.abc import Sequence
from pathlib import Path

from based_megatron.config import Config, parse_config, save_config
from based_megatron.config.validate import check_run_dir, slice_multiple, validate
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import check_tokenizer
from based_megatron.data.sources import Sources
from based_megatron.model.build import build_model
from based_megatron.model.check import check_mixers
from based_megatron.monitor.flops import parameter_count
from based_megatron.monitor.hub import build_metrics
from based_megatron.monitor.sinks.build import check_trackers
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.topology import Topology, build_topology, join, leave, pick_device
from based_megatron.train.callbacks.build import loggers, side_jobs
from based_megatron.train.callbacks.checkpointer import Checkpointer
from based_megatron.train.carried import build_carried_states, carried_bytes
from based_megatron.train.optimizer import build_engine
from based_megatron.train.step import build_step
from based_megatron.train.stop import StopVote
from based_megatron.train.trainer import Trainer

CHECKPOINT_BYTES_PER_PARAMETER = 12  # fp32 weights and two moments


def main(argv: Sequence[str]) -> None:
    """Parse the command line and train on this rank."""
    train(parse_config(argv))


def train(config: Config) -> None:
    """Train on this rank, in step with all others, from the newest checkpoint of the run folder to the end or a stop.

    Raises BasedError, before any work is done, for what the user can fix.
    """
    run_dir = Path(config.run_dir)
    stop = StopVote(run_dir / config.train.stop_file)
    rank = rank_from_environment()
    validate(config, rank.world_size)
    check_mixers(config)
    check_trackers(config.monitor)
    sources = Sources(config.data, config.train.global_batch_sequences)
    for manifest in sources.manifests:
        check_tokenizer(manifest, config.model.vocab_size)
    if config.validation.interval_steps:
        sources.validation_sequences(config.validation.sequences)
    check_run_dir(run_dir, CHECKPOINT_BYTES_PER_PARAMETER * parameter_count(config.model) + carried_bytes(config))

    device = pick_device(config.train.device, rank.local_rank)
    join(rank, device, config.parallel.timeout_seconds)
    topology = build_topology(config.parallel, device, rank.node_ranks)
    if topology.is_logger:
        save_config(config, run_dir / "config.yaml")

    if train_over(config, topology, sources, stop) and topology.is_logger:
        (run_dir / "done").touch()
    leave()


def train_over(config: Config, topology: Topology, sources: Sources, stop: StopVote) -> bool:
    """Build what a run needs over the joined ranks, and train. Returns whether the run is done."""
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)

    loader = build_loader(config, topology)
    carried = build_carried_states(config, chunks, topology, loader.first_rows) if config.data.carry_state else None
    metrics = build_metrics(topology)
    step = build_step(chunks, engine, topology, config.parallel.zero_stage, carried, metrics)
    checkpointer = Checkpointer(engine, config, loader.fingerprint, carried)
    start = checkpointer.restore()

    callbacks = [*side_jobs(config, topology, loader, sources), checkpointer, *loggers(config, topology, start)]
    try:
        return Trainer(config, topology, step, loader, metrics, callbacks, stop, start).fit()
    finally:
        loader.close()


def build_loader(config: Config, topology: Topology) -> Loader:
    """This rank's view of the prepared data."""
    return Loader(
        config.data,
        vocab_size=config.model.vocab_size,
        global_batch_sequences=config.train.global_batch_sequences,
        micro_batch_sequences=config.train.micro_batch_sequences,
        dp_rank=topology.data.rank,
        dp_size=topology.data.size,
        cp_rank=topology.context.rank,
        cp_size=topology.context.size,
        slice_multiple=slice_multiple(config.parallel),
    )
