"""Every setting of a run, as frozen dataclasses. The docstring under a field is its `--help` text, `Annotated` states its limits.

A number without a Range is finite and at least 0. FREE and FIXED say whether a setting may change when a run goes on; a field
without either has the mark of its section in Config.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from based_megatron.config.changes import Resume
from based_megatron.config.limits import FilePath, Range

FREE, FIXED = Resume.FREE, Resume.FIXED
Count = Annotated[int, Range(at_least=1)]
Positive = Annotated[float, Range(above=0)]
BelowOne = Annotated[float, Range(at_least=0, below=1)]
MaybePath = Annotated[str, FilePath()]


@dataclass(frozen=True)
class ModelConfig:
    """The architecture. Defaults are those shared by the released Based models."""

    layer_pattern: str = "cLScc*5 cc"
    """Mixer of each layer: c gated conv, L Taylor linear attention, S sliding window, A full attention.
    `cLScc*5 cc` is five times cLScc, then cc."""
    mixers: str = ""
    """Modules that define more mixers, by name and separated by commas; those of installed packages need no mention."""
    mixer_options: tuple[str, ...] = ()
    """Settings that only one kind of mixer has: words NAME.KEY=VALUE, such as mamba.state_dim=16, where NAME is a mixer of the pattern."""
    hidden_size: Count = 1024
    """Width of the residual stream."""
    ffn_hidden_size: Count = 2048
    """Width of the gated MLP that follows every mixer."""
    num_heads: Count = 16
    """Heads of every attention mixer. The value head dim is hidden_size / num_heads."""
    feature_dim: Annotated[int, Range(at_least=1, at_most=1024)] = 16
    """Query and key dim of a linear attention head, before the feature map."""
    feature_map: Literal["taylor", "rebased"] = "taylor"
    """Weights of linear attention, with s = q.k / sqrt(feature_dim): taylor 1 + s + s^2 / 2, as in Based; rebased s^2 of queries and
    keys that are normed and scaled and shifted by learned numbers (arXiv 2402.10644)."""
    prefix_tokens: int = 0
    """First tokens of a sequence that all its tokens see in linear attention, through keys and values of their own (JRT, arXiv
    2407.05483); with data.isolate_documents those of its first document, and no token of others sees them. 0: all is causal."""
    window_left: int = 128
    """Previous keys that a sliding window query sees besides itself (half of the released `window_size`)."""
    conv_kernel: Count = 3
    """Taps of the causal short convolution."""
    conv_expand: Annotated[int, Range(at_least=2, multiple_of=2)] = 4
    """Width of the conv mixer's input projection, in hidden sizes; half of it is convolved, half is the gate."""
    rotary_base: Annotated[float, Range(at_least=1)] = 10000.0
    """Base of the rotary frequencies."""
    rotary_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Part of each head that is rotated, in window and full attention. Conv and linear attention have no positions."""
    norm_eps: Annotated[float, Range(at_least=1e-30, at_most=1)] = 1e-5
    """Epsilon of every RMSNorm."""
    vocab_size: Count = 50257
    """Entries of the tokenizer."""
    vocab_multiple: Count = 8
    """The embedding has vocab_size rows rounded up to this; all of these rows take part in the softmax, as released."""
    tie_embeddings: bool = True
    """Use the embedding as the output projection."""
    init_std: Positive = 0.02
    """Standard deviation of initial weights; projections back to the residual use init_std / sqrt(2 layers)."""

    @property
    def embedding_rows(self) -> int:
        """Rows of the embedding, which all take part in the softmax: the vocabulary rounded up to its multiple."""
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple


@dataclass(frozen=True)
class SourceConfig:
    """One prepared corpus in a mixture."""

    path: Annotated[str, FilePath(may_be_empty=False)] = ""
    """Folder written by `based prep`, with a manifest.json."""
    weight: float = 1.0
    """Share of this source in the mixture, relative to the others' weights; 0 leaves it to `data.schedule`."""
    max_epochs: float = 0.0
    """Most passes over this source: when they are done, the others go on without it. 0 sets no limit."""


@dataclass(frozen=True)
class DataConfig:
    """The source of tokens, and how they are cut into sequences."""

    # Where a corpus lies is free: what is in it has a fingerprint.
    path: Annotated[str, FilePath(), FREE] = ""
    """Folder written by `based prep`, with a manifest.json, or its URL. Give either this or `sources`."""
    sources: Annotated[tuple[SourceConfig, ...], FREE] = ()
    """A weighted mixture of prepared corpora: in YAML a list of entries with path, weight and max_epochs, here words PATH, PATH=WEIGHT or
    PATH=WEIGHT:MAX_EPOCHS."""
    schedule: Annotated[tuple[str, ...], FREE] = ()
    """Later weights of `sources`: words TOKENS=WEIGHT,WEIGHT,... with a weight for each, from so many tokens on, such as 300B=0.5,0.5
    (k, M, B and T count in thousands). In a run that goes on, entries may be added from its present token on."""
    sequence_length_tokens: Annotated[Count, FIXED] = 2048
    """Tokens of one training sequence, over all context parallel ranks."""
    isolate_documents: Annotated[bool, FIXED] = True
    """Reset states, windows and convolutions at document starts and do not predict across them. Off reproduces the released recipe."""
    carry_state: Annotated[bool, FIXED] = False
    """Read the corpus in order, each row of the batch a stream of its own, and start each sequence from the states that the same
    row left in the step before (without gradients), where a document goes on: documents may then be longer than a sequence."""
    cross_blocks: Annotated[bool, FIXED] = True
    """Let sequences go on from one block of a corpus in the next, so that less than one of each source is left out. Off is the order
    of runs that began before this setting: what does not fill a sequence at the end of each block is not read."""
    num_workers: Annotated[int, Range(at_least=0, at_most=256), FREE] = 1
    """Background reader threads of a rank; 0 reads in the training process. The order does not depend on it."""
    cache_dir: Annotated[str, FilePath(), FREE] = ""
    """Folder on a disk of each node for parts of corpora whose path is a URL (s3://, gs://, https://, ...); its ranks share it."""
    cache_bytes: Annotated[Count, FREE] = 64 * 2**30
    """Most bytes of these parts; those that were not read for longest are removed."""
    seed: Annotated[int, FIXED] = 42
    """Seed of the order of sequences. The order is a pure function of this seed and the step."""


@dataclass(frozen=True)
class ParallelConfig:
    """The layout of the model and the batch over ranks. Data parallel takes what is left of the world size."""

    tensor: Count = 1
    """Tensor parallel ranks."""
    pipeline: Count = 1
    """Pipeline stages."""
    virtual_pipeline: Count = 1
    """Model chunks on each stage; above 1 the interleaved schedule runs."""
    context: Count = 1
    """Ranks that share one sequence, in contiguous slices."""
    state_exchange: Literal["auto", "all_gather", "two_level", "chain"] = "auto"
    """The way that linear attention states cross slices: one all-gather (few ranks), two levels (nodes, then between nodes), or a
    chain from neighbour to neighbour (debugging); auto looks at ranks, nodes and the size of a state."""
    sequence_parallel: bool = True
    """Shard norms and residuals over the tensor parallel ranks; no effect with tensor=1."""
    overlap_tensor: Literal["off", "collectives", "memory"] = "off"
    """Send and receive rows of tensor parallel layers while others are multiplied: by collectives, or by writing into the memory of
    other GPUs. Needs sequence_parallel, no effect with tensor=1. Off until whole steps are measured with it."""
    zero_stage: int = 1
    """DeepSpeed ZeRO: 1 shards optimizer state over data x context ranks; 2 adds gradients, 3 parameters (pipeline=1 only)."""
    zero_bucket_elements: Annotated[int, Range(at_least=2, multiple_of=2)] = 50_000_000
    """Elements of one gradient reduction or parameter all-gather bucket; an even number, as DeepSpeed wants."""
    overlap_zero: Annotated[bool, FREE] = False
    """Hide what ZeRO sends behind computation: gradients are reduced inside backward passes, weights gathered ahead of forward
    passes. Stage 1 does so in bf16. No value changes. Off until it has run over NCCL."""
    timeout_seconds: Annotated[int, Range(at_least=1, at_most=1_000_000)] = 600
    """A collective that takes longer ends the run instead of hanging it."""


@dataclass(frozen=True)
class MuonConfig:
    """Settings that only Muon has. It updates the weights of linear layers inside blocks, AdamW all others."""

    momentum: BelowOne = 0.95
    """Decay of the average of gradients."""
    nesterov: bool = True
    """Orthogonalise the gradient mixed with its average, instead of the average."""
    newton_schulz_steps: Annotated[int, Range(at_least=1, at_most=100)] = 5
    """Iterations that bring the singular values of an update near 1."""
    update_rms: Positive = 0.2
    """Root mean square of an update's elements, times the learning rate. AdamW's are near 0.2: one optimizer.lr serves both."""


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW, or Muon for matrices with AdamW for the rest."""

    name: Literal["adamw", "muon"] = "adamw"
    """The optimizer: a module of train/optimizer."""
    lr: Positive = 8e-4
    """Peak learning rate."""
    beta1: BelowOne = 0.9
    """Decay of the first moment."""
    beta2: BelowOne = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Range(at_least=1e-30)] = 1e-8
    """Added to the root of the second moment."""
    weight_decay: float = 0.1
    """Decoupled weight decay."""
    weight_decay_mode: Literal["default", "reference"] = "default"
    """default: none on norms, biases and embeddings. reference: as released, norms are decayed too."""
    implementation: Annotated[Literal["auto", "torch", "fused", "apex"], FREE] = "auto"
    """AdamW to use: auto takes ours, which clips, updates and rounds weights in one pass; torch and fused are PyTorch's."""
    clip_grad_norm: float = 1.0
    """Largest global gradient norm; 0 turns clipping off."""
    muon: MuonConfig = field(default_factory=MuonConfig)


@dataclass(frozen=True)
class ScheduleConfig:
    """Linear warmup, then cosine: the released schedule."""

    warmup_steps: int = 200
    """Steps from warmup_lr to the peak."""
    warmup_lr: float = 1e-6
    """Learning rate of the first step."""
    decay_steps: int = 0
    """Steps from the peak to min_lr; 0 means the rest of the run."""
    min_lr: float = 8e-5
    """Learning rate at the end of the cosine and after it."""


@dataclass(frozen=True)
class TrainConfig:
    """The job itself."""

    steps: Annotated[Count, FIXED] = 20_000
    """Optimizer steps of the whole run."""
    global_batch_sequences: Annotated[Count, FIXED] = 256
    """Sequences of one optimizer step, over all ranks."""
    micro_batch_sequences: Annotated[Count, FREE] = 8
    """Sequences of one forward and backward pass on one data parallel rank."""
    precision: Annotated[Literal["bf16", "fp32", "fp8"], FIXED] = "bf16"
    """bf16: bf16 weights and activations over fp32 master weights, residual, states and gradient sums. fp8: the same, but for the matrix
    products of `fp8_layers`, which take numbers of 8 bits (Hopper and later; a CPU emulates it)."""
    fp8_layers: Annotated[str, FIXED] = "1:-1"
    """Layers whose products run in fp8, as a Python slice: 1:-1 leaves out the first and the last. Embedding and output are never in it."""
    recompute: Annotated[Literal["none", "mixer", "full"], FREE] = "none"
    """Activations to recompute in backward: none, those of the mixers, or those of whole blocks."""
    backend: Annotated[Literal["auto", "reference", "triton"], FREE] = "auto"
    """Kernels of the mixers: auto takes triton on a GPU where it is built, else the PyTorch references."""
    device: Annotated[Literal["auto", "cpu", "cuda"], FREE] = "auto"
    """Device to run on: auto takes a GPU if there is one."""
    seed: Annotated[int, FIXED] = 1111
    """Seed of the initial weights."""
    prefix_mask_fraction: Annotated[float, Range(at_least=0, at_most=0.5), FIXED] = 0.15
    """Part of the tokens of a prefix (model.prefix_tokens) that is masked, to be predicted with a weight of 0.25."""
    prefix_mask_token: Annotated[int, FIXED] = 0
    """Token that stands for masked ones; 0 takes the last row of the embedding, if that is no token of the vocabulary."""
    max_skipped_steps: Annotated[Count, FREE] = 10
    """Steps in a row that are skipped, for a gradient that is not finite or a spike, before the run goes back (guards.rollback)
    or gives up."""
    stop_file: Annotated[str, FREE] = "stop"
    """A file of this name in the run folder stops the run after the current step, with a checkpoint."""
    lock_seconds: Annotated[int, Range(at_least=6, at_most=86_400), FREE] = 60
    """A start takes the run folder from a process of another machine that has not touched the folder's lock for so many seconds,
    which it does six times in that time; from one that was killed on the same machine, and in a requeued SLURM job, at once."""


@dataclass(frozen=True)
class GuardsConfig:
    """What keeps bad steps out of a run. A gradient that is not finite is skipped in any case."""

    spike: Literal["off", "record", "skip"] = "skip"
    """Loss or gradient norm far above those of the last good steps: record it, or skip the step too."""
    window_steps: Annotated[int, Range(at_least=2, at_most=10_000)] = 128
    """Last good steps that a step is compared with."""
    warmup_steps: Annotated[int, Range(at_least=2)] = 64
    """Good steps of a run before the first is judged."""
    threshold: Annotated[float, Range(at_least=1)] = 8.0
    """Standard deviations above the median that are too far. Of logarithms, by the median deviation of the window; a deviation
    counts as at least 0.01 for the loss and 0.2 for the norm."""
    rollback: bool = True
    """After train.max_skipped_steps skipped steps in a row, or when the loss has risen and stays (the median of a window above the lowest
    one, by threshold): go back to the last good checkpoint and step over the data since."""
    max_rollbacks: Count = 5
    """Rollbacks of a run before it gives up."""
    replica_check_interval_steps: int = 1000
    """Steps between comparisons of the weights of all ranks that hold the same ones; 0 turns them off. ZeRO-3 keeps one copy of each
    weight: there is nothing to compare."""


@dataclass(frozen=True)
class ValidationConfig:
    """Loss on held-out sequences."""

    interval_steps: int = 1000
    """Steps between validations; 0 turns them off."""
    sequences: int = 1000
    """Held-out sequences of one validation (fewer if the split is smaller)."""
    max_tokens: Count = 2**25
    """Most tokens of these sequences, which are kept in memory: 21 bytes a token, shared by the data parallel ranks. Of long sequences
    fewer are read, and one at least."""
    recall: bool = True
    """Measure recall in the same pass: losses of tokens whose bigram stood earlier in the document, by its training count and by
    distance, and of synthetic probes. Bigrams of the training split are counted at the first start."""
    recall_rare_count: int = 0
    """Largest training count of a bigram whose repeats are recall, not memory; 0 takes Zoology's 1,250 in 10.5 G training tokens, and 1
    at least."""
    recall_counted_tokens: Count = 1_000_000_000
    """Tokens of a training split to count bigrams in; a larger split is sampled, and counts are scaled."""
    recall_probe_sequences: Annotated[int, Range(at_least=0, at_most=100_000)] = 32
    """Synthetic sequences that are read after the held-out ones; 0 leaves them out."""


@dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep."""

    interval_steps: int = 1000
    """Steps between checkpoints; 0 saves at the end only, or by time."""
    interval_seconds: float = 0.0
    """Longest time between the starts of two saves, by the clock of rank 0; 0 saves by steps only."""
    keep_last: int = 3
    """Newest checkpoints to keep; 0 keeps all."""
    keep_every_steps: int = 0
    """Keep the first checkpoint of every so many steps for good; 0 keeps none for that."""
    asynchronous: bool = True
    """Copy weights and moments to host memory and write them while training goes on. Without room for a copy, training waits."""
    max_failed_saves: Count = 3
    """Saves in a row that fail before the run stops."""
    resume: bool = True
    """Continue from the newest complete checkpoint of the run folder if there is one. If this is off, a folder that has one is refused."""
    load: MaybePath = ""
    """Start from the weights of this checkpoint (a new run, step 0) when the run folder has none."""
    allow_changed: tuple[str, ...] = ()
    """Settings that may differ from those of the checkpoint although they are part of what the run is, such as optimizer.lr, or whole
    sections, such as optimizer. data.path allows another content of the data."""


@dataclass(frozen=True)
class MonitorConfig:
    """Logs and samples that are written while training."""

    log_interval_steps: Count = 10
    """Steps between console lines and TensorBoard points."""
    tensorboard: bool = True
    """Write TensorBoard logs to the run folder."""
    trackers: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Write to Weights & Biases or MLflow too, where they are installed (extra `trackers`); they read their own environment variables."""
    project: str = "based"
    """Project (wandb) or experiment (mlflow) that the run belongs to; the run is named after its folder."""
    hang_seconds: float = 0.0
    """Seconds without progress after which every rank writes its stacks to the run folder; 0 takes ten times the measured time of a
    step, a save or a validation, and two minutes at least (15 for saves and validations)."""
    debug_gradients: bool = False
    """Name the parameters whose gradient is not finite, and the first layer whose output is not; slow, for a search only."""
    peak_flops: float = 0.0
    """Peak FLOP/s of one device for MFU; 0 looks the device up, and leaves MFU out where it is unknown."""
    sample_interval_steps: int = 0
    """Steps between sampled generations; 0 turns them off."""
    sample_prompts: tuple[str, ...] = ("The", "import ")
    """Prompts to continue."""
    sample_tokens: Annotated[int, Range(at_least=1, at_most=100_000)] = 32
    """Tokens to generate for each prompt."""


@dataclass(frozen=True)
class Config:
    """A whole run."""

    run_dir: Annotated[str, FilePath(may_be_empty=False), FREE] = "runs/based"
    """Folder of this run: config, checkpoints, logs. Running again with the same folder goes on with the same run."""
    run_name: Annotated[str, FREE] = ""
    """Name of the run in its history and in trackers; empty: that of its folder."""
    model: Annotated[ModelConfig, FIXED] = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    parallel: Annotated[ParallelConfig, FREE] = field(default_factory=ParallelConfig)
    optimizer: Annotated[OptimizerConfig, FIXED] = field(default_factory=OptimizerConfig)
    schedule: Annotated[ScheduleConfig, FIXED] = field(default_factory=ScheduleConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    guards: Annotated[GuardsConfig, FREE] = field(default_factory=GuardsConfig)
    validation: Annotated[ValidationConfig, FREE] = field(default_factory=ValidationConfig)
    checkpoint: Annotated[CheckpointConfig, FREE] = field(default_factory=CheckpointConfig)
    monitor: Annotated[MonitorConfig, FREE] = field(default_factory=MonitorConfig)
