"""A run is data: frozen dataclasses, checked before anything is compiled.

`RunConfig` is all that `fit` needs to know.  The comment behind a field is its `--help`.  Nothing here imports JAX, so
that a command line can be refused within a second.

run            RunConfig, OptimizerConfig and MeshConfig
model          ModelConfig, the architecture
task           the config of each task
data           DataConfig, CleaningConfig and TokenizerConfig
decoding       Decoding, how texts are generated
ranges         what fields may hold
serialisation  configs as JSON
python_files   config files
flags          the fields of a config as flags of the command line
arguments      checks of what Python users give to public functions
"""

from jaxlm.config.data import CleaningConfig, DataConfig, Format, TokenizerConfig
from jaxlm.config.decoding import MOST_TEXTS, Decoding
from jaxlm.config.model import (
    DROPOUT_SITES,
    ENCODER_BIASES,
    MOST_LAYERS,
    Activation,
    Bias,
    Head,
    ModelConfig,
    RotaryScaling,
)
from jaxlm.config.run import MatmulPrecision, MeshConfig, OptimizerConfig, Remat, RunConfig
from jaxlm.config.serialisation import difference, from_json, task_from_json, task_to_json, to_json
from jaxlm.config.task import *
from jaxlm.config.task import TASK_CONFIGS, TagScheme, TaskConfig, check_task
