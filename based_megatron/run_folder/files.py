"""The names of what a run and its launchers keep in the run folder: the one list of them."""

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
DONE = "done"
ERRORS = "errors"
EVENTS = "events.jsonl"
EXCLUDED_NODES = "excluded_nodes"
FAILURES = "failures"
HEARTBEAT = "heartbeat"
HISTORY = "history.jsonl"
HUNG = "hung"
LOCK = "lock"
LOGS = "logs"
PAUSE = "pause"
RECALL = "recall"
ROLLED_BACK = "rolled-back"
SBATCH = "pretrain.sbatch"
STACKS = "stacks"
STOPPED = "stopped"
TENSORBOARD = "tensorboard"
WANDB = "wandb"

FILES = (
    CONFIG,
    DONE,
    EVENTS,
    EXCLUDED_NODES,
    FAILURES,
    HEARTBEAT,
    HISTORY,
    HUNG,
    LOCK,
    PAUSE,
    SBATCH,
    STOPPED,
)
FOLDERS = (CHECKPOINTS, ERRORS, LOGS, RECALL, ROLLED_BACK, STACKS, TENSORBOARD, WANDB)
LOG_PREFIX = "slurm-"
"""What the names of SLURM's log files begin with."""
