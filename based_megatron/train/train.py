"""A training run on one rank: config -> topology -> model -> optimizer -> data -> checkpoint -> loop."""

import socket
from pathlib import Path

from based_megatron.checkpoint.ranks import all_ranks
from based_megatron.config import Config
from based_megatron.config.limits import absolute_paths
from based_megatron.data.loader import build_loader
from based_megatron.data.sources import Sources
from based_megatron.model.build import build_model
from based_megatron.monitor.hub import build_metrics
from based_megatron.parallel.environment import rank_from_environment
from based_megatron.parallel.topology import Topology, build_topology, join, leave, pick_device
from based_megatron.run_folder.files import DONE
from based_megatron.run_folder.lock import RunLock
from based_megatron.train.accept import accept, check_memory, check_precision, memory_bytes
from based_megatron.train.callbacks.build import loggers, side_jobs
from based_megatron.train.callbacks.checkpointer import Checkpointer
from based_megatron.train.callbacks.outcome import Outcome
from based_megatron.train.callbacks.owner import Owner
from based_megatron.train.carried import build_carried_states
from based_megatron.train.guard import Guard
from based_megatron.train.identity import Identity, identify, is_done, locked_folder, record_start
from based_megatron.train.optimizer import build_engine
from based_megatron.train.signals import StopSignals
from based_megatron.train.step import build_step
from based_megatron.train.stop import StopVote
from based_megatron.train.trainer import Trainer


def train(config: Config, signals: StopSignals | None = None) -> None:
    """Train on this rank, in step with all others, from the newest checkpoint of the run folder to the end or a stop.

    signals: those that arrived so far. Raises BasedError, before any work is done, for what the user can fix.
    """
    config = absolute_paths(config)
    run_dir = Path(config.run_dir)
    stop = StopVote(run_dir / config.train.stop_file, signals, config.parallel.timeout_seconds)
    rank = rank_from_environment()
    sources = accept(config, rank.world_size, rank.rank)
    device = pick_device(config.train.device, rank.local_rank)
    check_precision(config, device)
    check_memory(config, rank.world_size, memory_bytes(device))

    join(rank, device, config.parallel.timeout_seconds)
    topology = build_topology(config.parallel, device, rank.node_ranks)
    train_in_folder(config, topology, sources, stop)
    leave()


def train_in_folder(config: Config, topology: Topology, sources: Sources, stop: StopVote) -> bool:
    """Train over the joined ranks in a run folder that is theirs alone. Returns whether the run is done."""
    ranks, run_dir = all_ranks(), Path(config.run_dir)
    with locked_folder(config, ranks) as lock:
        identity = ranks.on_first(lambda: identify(config, sources.fingerprint))
        if is_done(config, identity, ranks):
            if topology.is_logger:
                print(f"already done: {identity.saved_step} of {config.train.steps} steps; {run_dir}", flush=True)
            done = True
        else:
            done = train_over(config, topology, sources, stop, identity, lock)
        if done and topology.is_logger:
            (run_dir / DONE).touch()
    return done


def train_over(
    config: Config, topology: Topology, sources: Sources, stop: StopVote, identity: Identity, lock: RunLock
) -> bool:
    """Build what a run needs over the joined ranks, and train. Returns whether the run is done."""
    chunks = build_model(config, topology)
    engine = build_engine(chunks, config, topology)

    loader = build_loader(config, topology, sources)
    carried = build_carried_states(config, chunks, topology, loader.first_rows) if config.data.carry_state else None
    metrics = build_metrics(topology)
    step = build_step(chunks, engine, topology, config.parallel.zero_stage, carried, metrics)
    guard = Guard(config, topology.device)
    checkpointer = Checkpointer(engine, config, identity.run_id, loader.fingerprint, guard, topology.device, carried)
    start = checkpointer.restore()
    hosts = all_ranks().together(socket.gethostname)
    record_start(config, identity, start[0], all_ranks(), hosts)

    jobs = side_jobs(config, topology, loader, sources, hosts)
    logs = loggers(config, topology, sources, start, identity, hosts)
    # A checkpoint comes after the log of its step; at the end and at an error the order is the opposite.
    callbacks = [Owner(identity, lock), *jobs, *logs, Outcome(), checkpointer]
    try:
        go_back = checkpointer.go_back
        return Trainer(config, topology, step, loader, metrics, callbacks, stop, guard, go_back, start).fit()
    finally:
        loader.close()
