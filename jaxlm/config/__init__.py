"""Configs: frozen dataclasses that describe a run and are checked before anything is compiled.

`RunConfig` is the complete input of `fit`.  The comment on a field is its help text in `--help`.  This package does not
import JAX, so that an invalid command line is reported within a second.

run            RunConfig, OptimizerConfig and MeshConfig
adapter        AdapterConfig: training of low-rank updates
privacy        PrivacyConfig: differentially private training
safety         filters of generated texts
pruning        PruneConfig: pruning while training
model          ModelConfig: the architecture
choices        the closed choices of ModelConfig
model_checks   sizes and choices of a model that contradict each other
task           the base of the configs of tasks, and their table
text_tasks, record_tasks    the config of each task: over running text, over the rows of a table
quantize       QuantizeConfig: quantisation-aware training
data           DataConfig, CleaningConfig and TokenizerConfig
baseline       BaselineConfig: the baselines that a report shows
compress       CompressConfig: how the verb `compress` makes smaller variants of a model
decoding       Decoding: options of text generation
vectors        VectorsConfig: a run that trains word vectors
distill        DistillConfig: the teacher of a run, and what the run learns from it
ranges         types and ranges of fields
serialisation  conversion to and from JSON
python_files   config files
flags          command-line flags for the fields of a config
arguments      checks of the arguments of public functions
"""

from jaxlm.config.adapter import NO_ADAPTER, AdapterConfig
from jaxlm.config.baseline import BaselineConfig
from jaxlm.config.choices import (
    DROPOUT_SITES,
    ENCODER_BIASES,
    LINEAR_SIZES,
    MAX_LAYERS,
    Activation,
    Bias,
    Head,
    Residual,
    RotaryScaling,
    is_local,
    is_rotated,
)
from jaxlm.config.compress import CompressConfig
from jaxlm.config.data import CleaningConfig, DataConfig, Format, TokenizerConfig
from jaxlm.config.decoding import MAX_TEXTS, Decoding
from jaxlm.config.distill import DistillConfig
from jaxlm.config.model import ModelConfig
from jaxlm.config.privacy import PrivacyConfig
from jaxlm.config.pruning import NO_PRUNING, PruneConfig
from jaxlm.config.quantize import QuantizeConfig
from jaxlm.config.record_tasks import *
from jaxlm.config.record_tasks import TagScheme
from jaxlm.config.run import MatmulPrecision, MeshConfig, OptimizerConfig, Remat, RunConfig
from jaxlm.config.safety import SafetyConfig
from jaxlm.config.serialisation import difference, from_json, task_from_json, task_to_json, to_json
from jaxlm.config.task import TASK_CONFIGS, TaskConfig, check_task
from jaxlm.config.text_tasks import *
from jaxlm.config.vectors import GloVeConfig, SkipGramConfig, VectorsConfig
