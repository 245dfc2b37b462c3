"""Settings: the schema, presets and overrides, and the checks that need no GPU."""

from based_megatron.config.command_line import parse_config
from based_megatron.config.load import from_dict, load_config, preset_names, save_config, to_dict
from based_megatron.config.schema import (
    CheckpointConfig,
    Config,
    DataConfig,
    GuardsConfig,
    ModelConfig,
    MonitorConfig,
    MuonConfig,
    OptimizerConfig,
    ParallelConfig,
    ScheduleConfig,
    SourceConfig,
    TrainConfig,
    ValidationConfig,
)

__all__ = [
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "GuardsConfig",
    "ModelConfig",
    "MonitorConfig",
    "MuonConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ScheduleConfig",
    "SourceConfig",
    "TrainConfig",
    "ValidationConfig",
    "from_dict",
    "load_config",
    "parse_config",
    "preset_names",
    "save_config",
    "to_dict",
]
