"""What ``from llamagen_dist.config import …`` finds; loaded when the first of it is asked for."""

from llamagen_dist.config.cluster import ClusterConfig, ElasticSection
from llamagen_dist.config.evaluation import (
    ClassifierSection,
    EvaluateConfig,
    ImageSetSection,
    InceptionSection,
    KIDSection,
)
from llamagen_dist.config.loader import KINDS, difference, dump, load, parse, shrink
from llamagen_dist.config.locations import Location, ShardAccess, is_remote
from llamagen_dist.config.sampling import ReconstructConfig, SampleConfig
from llamagen_dist.config.section import Section
from llamagen_dist.config.sections import (
    DiscriminatorSection,
    ExtractConfig,
    GPTConfigFile,
    GPTModelSection,
    ImageDataSection,
    PipelineConfig,
    StageSection,
    TokenDataSection,
    TokenizerConfigFile,
    TokenizerLossSection,
    TokenizerModelSection,
)
from llamagen_dist.config.sweep import SweepConfig
from llamagen_dist.config.training import (
    CheckpointSection,
    ComputeSection,
    EMASection,
    GuardSection,
    LogSection,
    OptimSection,
    ParallelSection,
    TrainSection,
    ValidationSection,
)

__all__ = [
    "KINDS",
    "CheckpointSection",
    "ClassifierSection",
    "ClusterConfig",
    "ComputeSection",
    "DiscriminatorSection",
    "EMASection",
    "ElasticSection",
    "EvaluateConfig",
    "ExtractConfig",
    "GPTConfigFile",
    "GPTModelSection",
    "GuardSection",
    "ImageDataSection",
    "ImageSetSection",
    "InceptionSection",
    "KIDSection",
    "Location",
    "LogSection",
    "OptimSection",
    "ParallelSection",
    "PipelineConfig",
    "ReconstructConfig",
    "SampleConfig",
    "Section",
    "ShardAccess",
    "StageSection",
    "SweepConfig",
    "TokenDataSection",
    "TokenizerConfigFile",
    "TokenizerLossSection",
    "TokenizerModelSection",
    "TrainSection",
    "ValidationSection",
    "difference",
    "dump",
    "is_remote",
    "load",
    "parse",
    "shrink",
]
