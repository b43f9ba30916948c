"""Settings: every dataclass whose fields are flags, and what all programs do with them."""

from efficientnet_ns.config.command_line import run
from efficientnet_ns.config.fields import (
    ConfigError,
    Settings,
    as_dict,
    check,
    check_no_file,
    comparable,
    define_flags,
    from_flags,
    require,
    setting,
    subsections,
)
from efficientnet_ns.config.ingest import MakeConfig, SvhnConfig
from efficientnet_ns.config.labeling import (
    BeamConfig,
    FilterConfig,
    ReportConfig,
    SelectConfig,
    shard_list,
)
from efficientnet_ns.config.loop import DemoConfig, LoopConfig, StudyConfig
from efficientnet_ns.config.programs import (
    BenchmarkConfig,
    ConvertConfig,
    ExportConfig,
    ListConfig,
    ModeConfig,
    OwnSetConfig,
    PhotosConfig,
    RobustnessConfig,
)
from efficientnet_ns.config.sections import (
    Config,
    DataConfig,
    HardwareConfig,
    LegacyConfig,
    ModelConfig,
    PredictConfig,
    TrainConfig,
)

__all__ = [
    "BeamConfig",
    "BenchmarkConfig",
    "Config",
    "ConfigError",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "ExportConfig",
    "FilterConfig",
    "HardwareConfig",
    "LegacyConfig",
    "ListConfig",
    "LoopConfig",
    "MakeConfig",
    "ModeConfig",
    "ModelConfig",
    "OwnSetConfig",
    "PhotosConfig",
    "PredictConfig",
    "ReportConfig",
    "RobustnessConfig",
    "SelectConfig",
    "Settings",
    "StudyConfig",
    "SvhnConfig",
    "TrainConfig",
    "as_dict",
    "check",
    "check_no_file",
    "comparable",
    "define_flags",
    "from_flags",
    "require",
    "run",
    "setting",
    "shard_list",
    "subsections",
]
