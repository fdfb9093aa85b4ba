"""Typed configuration: YAML files plus ``key=value`` become one frozen, validated section."""
# ruff: noqa: F401 - what other rooms use

from llamagen_dist.config.data import ExtractConfig, ShardAccess, is_remote
from llamagen_dist.config.during import EvaluationSection
from llamagen_dist.config.evaluate import (
    ClassifierSection,
    DrawSection,
    EvaluateConfig,
    InceptionSection,
    LPIPSSection,
    NeighboursConfig,
    ReconstructConfig,
    ReferenceConfig,
    SampleConfig,
    TokenLossConfig,
)
from llamagen_dist.config.launch import ClusterConfig, PipelineConfig, StageSection, SweepConfig
from llamagen_dist.config.loader import KINDS, difference, dump, load
from llamagen_dist.config.model import GPTModelSection, TokenizerModelSection
from llamagen_dist.config.search import SearchConfig
from llamagen_dist.config.section import Section, shrink
from llamagen_dist.config.tokenizer import TokenizerConfigFile, TokenizerLossSection
from llamagen_dist.config.tokenizers import ProbeSection, TokenizersConfig
from llamagen_dist.config.training import (
    GPTConfigFile,
    OptimSection,
    TrainingConfig,
    TrainSection,
    rungs,
)
from llamagen_dist.config.yaml_text import parse
