"""The names of what a run and its launchers keep in the run folder: the one list of them."""

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
DONE = "done"
EVENTS = "events.jsonl"
FAILURES = "failures"
HEARTBEAT = "heartbeat"
HISTORY = "history.jsonl"
HUNG = "hung"
LOCK = "lock"
SBATCH = "pretrain.sbatch"
TENSORBOARD = "tensorboard"
WANDB = "wandb"

FILES = (CONFIG, DONE, EVENTS, FAILURES, HEARTBEAT, HISTORY, HUNG, LOCK, SBATCH)
FOLDERS = (CHECKPOINTS, TENSORBOARD, WANDB)
LOG_PREFIX = "slurm-"
"""What the names of SLURM's log files begin with."""
