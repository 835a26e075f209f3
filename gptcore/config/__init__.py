"""The experiment file as a typed tree: one class per section, one field per choice.

The same classes check a YAML file, `section.field=value` on the command line and the form in the Prefect UI, so
a wrong key or value is refused in one place with one sentence. No torch here: checking a file costs milliseconds.

    python -m gptcore.config experiments/shakespeare.yaml train.lr=0.01      # prints the resolved tree
"""

from gptcore.config.base import Section
from gptcore.config.changing import differences, load_config, load_written, with_changes, with_overrides
from gptcore.config.checking import check_config
from gptcore.config.data import DataConfig, SourceConfig, VocabConfig, hide_password, refuse_secret
from gptcore.config.experiment import EvaluateConfig, ExperimentConfig
from gptcore.config.model import ModelConfig
from gptcore.config.reading import dump_yaml, flatten, read_yaml, write_yaml
from gptcore.config.switches import StudiesConfig
from gptcore.config.train import TrainConfig
from gptcore.errors import UserError

__all__ = [
    "DataConfig",
    "EvaluateConfig",
    "ExperimentConfig",
    "ModelConfig",
    "Section",
    "SourceConfig",
    "StudiesConfig",
    "TrainConfig",
    "UserError",
    "VocabConfig",
    "check_config",
    "differences",
    "dump_yaml",
    "flatten",
    "hide_password",
    "load_config",
    "load_written",
    "read_yaml",
    "refuse_secret",
    "with_changes",
    "with_overrides",
    "write_yaml",
]
