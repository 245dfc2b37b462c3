"""The jobs besides the training loop that a config asks for."""

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer

from based_megatron.checkpoint.ranks import all_ranks
from based_megatron.config import Config
from based_megatron.config.validate import validated_sequences
from based_megatron.data.loader import Loader
from based_megatron.data.manifest import TOKENIZER_NAME
from based_megatron.data.recall import training_tokens
from based_megatron.data.sources import Sources
from based_megatron.model.mixers import layer_mixers
from based_megatron.monitor.sinks.base import RunFacts
from based_megatron.monitor.sinks.build import start_sinks
from based_megatron.parallel.topology import Topology
from based_megatron.train.callbacks.advice import Advice
from based_megatron.train.callbacks.base import Callback
from based_megatron.train.callbacks.debug_gradients import DebugGradients
from based_megatron.train.callbacks.logger import Logger
from based_megatron.train.callbacks.norms import Norms
from based_megatron.train.callbacks.recall_probe import recall_probe
from based_megatron.train.callbacks.replicas import Replicas
from based_megatron.train.callbacks.sampler import Sampler
from based_megatron.train.callbacks.validator import Validator, read_on_all
from based_megatron.train.callbacks.watchdog import Watchdog
from based_megatron.train.identity import Identity


def side_jobs(
    config: Config, topology: Topology, loader: Loader, sources: Sources, hosts: Sequence[str]
) -> list[Callback]:
    """What is measured of the model, and validation and samples where the config asks for them. hosts: of each rank."""
    jobs: list[Callback] = [Advice(sources.warnings), Norms([mixer.name for mixer in layer_mixers(config.model)])]
    if config.guards.replica_check_interval_steps and config.parallel.zero_stage < 3 and topology.world_size > 1:
        jobs.append(Replicas(hosts))
    if config.monitor.debug_gradients:
        jobs.append(DebugGradients())
    if config.validation.interval_steps and config.validation.recall:
        jobs.append(recall_probe(config, loader, sources, all_ranks(), topology.pipeline.size))
    elif config.validation.interval_steps:
        batches = loader.validation_batches(validated_sequences(config))
        jobs.append(Validator(read_on_all(batches, all_ranks()), topology.pipeline.size))
    if config.monitor.sample_interval_steps:
        jobs.append(Sampler(Tokenizer.from_file(str(sources.manifests[0].folder / TOKENIZER_NAME))))
    return jobs


def loggers(
    config: Config,
    topology: Topology,
    sources: Sources,
    start: tuple[int, int],
    identity: Identity,
    hosts: Sequence[str],
) -> list[Callback]:
    """What is written while training. start: (steps done, tokens seen). hosts: of each rank."""
    names, tokens = (identity.run_id, identity.run_name), (training_tokens(sources), sources.tokens_read)
    plan = tuple(map(str, sources.plan(config.train.steps * config.train.global_batch_sequences)))
    facts = RunFacts(config, Path(config.run_dir), topology.device, topology.world_size, *start, *names, *tokens, plan)
    return [
        Logger(start_sinks(facts) if topology.is_logger else [], hosts),
        Watchdog(hosts, config.monitor.hang_seconds),
    ]
