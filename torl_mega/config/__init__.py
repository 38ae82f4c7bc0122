"""The one strict config tree, a module for each kind of sections. Loading, overrides and error texts live in `config_file.py`.

Every section is frozen and refuses unknown keys. A default lives in exactly one place: what belongs to the training
recipe of ToRL has no default here and stands in `conf/base.yaml`; what is mechanics (time limits, buffer sizes) or an
option that ToRL does not have is given its default here, with its unit and its reason in the field's docstring.

A recipe field's docstring ends in `Source:`, where ToRL's value was found, and `Differs:` where ours is another on purpose;
`tools/make_recipe_doc.py` makes docs/recipe.md of them. "paper" is arXiv 2503.23383; "script" its scripts/torl_1.5b.sh, and
file names are those of GAIR-NLP/ToRL at cb78cf1, whose verl is a copy of its own ("verl" in the path).
"""

from torl_mega.config.cluster import ClusterConfig
from torl_mega.config.data import ColumnsConfig, DataConfig, ModelConfig, WeightedData
from torl_mega.config.objective import SHAPING, AdvantageKind, AlgoConfig, OptimConfig, RewardConfig
from torl_mega.config.rollout import RolloutConfig, SandboxConfig, ServingConfig
from torl_mega.config.section import Section
from torl_mega.config.training import CheckpointConfig, ParallelConfig, PretrainConfig, TrainerConfig
from torl_mega.config.tree import Config
from torl_mega.config.watching import (
    BenchmarkConfig,
    EvalConfig,
    GuardsConfig,
    LoggingConfig,
    MlflowConfig,
    WandbConfig,
)

__all__ = [
    "SHAPING",
    "AdvantageKind",
    "AlgoConfig",
    "BenchmarkConfig",
    "CheckpointConfig",
    "ClusterConfig",
    "ColumnsConfig",
    "Config",
    "DataConfig",
    "EvalConfig",
    "GuardsConfig",
    "LoggingConfig",
    "MlflowConfig",
    "ModelConfig",
    "OptimConfig",
    "ParallelConfig",
    "PretrainConfig",
    "RewardConfig",
    "RolloutConfig",
    "SandboxConfig",
    "Section",
    "ServingConfig",
    "TrainerConfig",
    "WandbConfig",
    "WeightedData",
]
