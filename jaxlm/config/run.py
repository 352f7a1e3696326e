"""One run, from data to exported model; its optimizer and its mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxlm.config.data import DataConfig, TokenizerConfig
from jaxlm.config.model import MOST_LAYERS, ModelConfig, divisors
from jaxlm.config.ranges import (
    Config,
    Count,
    NotNegative,
    Positive,
    Range,
    Seed,
    Share,
    ShareAboveZero,
    ShareBelowOne,
    check_fields,
)
from jaxlm.config.task import CausalLM, MultiTask, TaskConfig, check_reader, check_task
from jaxlm.errors import UserError

Remat = Literal["auto", "none", "elementwise", "dots", "full", "offload"]
Unroll = Annotated[int, Range(1, MOST_LAYERS, special=(0, "by device"))]
AxisSize = Annotated[int, Range(1, 1_000_000, special=(-1, "all that are left"))]


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optax chain: clip, precondition, decay, layer-wise rates, schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"  # how a gradient becomes a direction
    rate: NotNegative = 1e-3  # peak learning rate
    relative: bool = False  # an update is in proportion to the size of its tensor, as Adafactor's authors have it
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant", "warmup_stable_decay"] = "cosine"  # after warm-up
    warmup: NotNegative = 0.05  # steps of linear warm-up; below 1: share of all steps
    final: Share = 0.1  # share of the peak that the learning rate has fallen to when the run ends
    decay_share: Share = 0.2  # share of the steps in which warmup_stable_decay falls
    weight_decay: NotNegative = 0.1  # decoupled; biases and norms are left out
    clip: NotNegative = 1.0  # global norm to which gradients are clipped; 0: never
    beta1: ShareBelowOne = 0.9  # of adamw, lion and muon's momentum
    beta2: ShareBelowOne = 0.95  # of adamw and lion
    epsilon: ShareAboveZero = 1e-8  # of adamw
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # of the first moment; the second's changes are too fine
    layer_decay: ShareAboveZero = 1.0  # each layer's rate is this times that of the layer above (ELECTRA's recipe)
    freeze: Literal["none", "embeddings", "all_but_heads"] = "none"  # what is not trained
    freeze_layers: Count = 0  # the first n layers (and the embeddings) are not trained


@dataclass(frozen=True)
class MeshConfig(Config):
    """How many devices each axis of the mesh has; at most one may be -1: all that are left."""

    data: AxisSize = -1  # copies of the model, each with its rows of the batch
    fsdp: AxisSize = 1  # rows of the batch and the parameters' model width, split
    tensor: AxisSize = 1  # heads, MLP width and vocabulary, split; between layers the length of rows
    context: AxisSize = 1  # the length of rows, split; every query still sees all keys


MatmulPrecision = Literal["default", "high", "highest"]


@dataclass(frozen=True)
class RunConfig(Config):
    """One run, from data to exported model."""

    model: ModelConfig | None = field(default_factory=ModelConfig)  # None: that of `init`
    task: Any = field(default_factory=CausalLM)  # what is learned
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    batch: Positive = 32  # rows in one update, over all devices and micro-batches
    accumulate: Positive = 1  # micro-batches that an update is computed in, to save memory
    examples: Count = 0  # mean number of examples in one update; above 0 it decides over batch
    steps: Positive = 1000  # optimizer updates
    eval_tokens: Count = 1 << 22  # of held-out text, that a language model is evaluated on, from all over it; 0: all
    epochs: Annotated[float, Range(0, 1_000_000)] = 0.0  # passes over the training part; above 0 they decide over steps
    seed: Seed = 0  # of parameters, data order, masking and dropout
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; the rest stays float32
    # On TPU the default multiplies float32 in one pass of bfloat16, on GPU in TensorFloat32; highest is float32.
    matmul_precision: MatmulPrecision = "default"  # of products of float32 matrices
    # Offload is full, with the inputs of the layers, from which all is recomputed, in the memory of the host.
    # Auto is elementwise (norms, activations, softmax, masks), which costs no product, and on CPU none.
    remat: Remat = "auto"  # what backward recomputes: nothing; elementwise operations; all but products; all
    attention: Literal["auto", "xla", "splash", "cudnn"] = "auto"  # kernel; auto: splash on TPU, cudnn on GPU, or XLA
    # By device: on GPU all of up to 12 layers, else 4; on TPU and CPU 1.
    unroll: Unroll = 0  # layers that one turn of the layer loop holds; more is faster and compiles longer
    log_every: Positive = 10  # steps between lines of metrics.jsonl
    eval_every: Count = 0  # steps between evaluations; 0: after each epoch, where there are epochs, and at the end
    best: str = ""  # the score that the best checkpoint has most of; empty: the task's own
    patience: Count = 0  # evaluations without a better score after which the run ends; 0: it continues
    checkpoint_every: Count = 0  # steps between checkpoints; 0: a tenth of the run
    keep: Positive = 2  # last checkpoints that an unfinished run keeps, beside the best
    keep_checkpoints: bool = False  # also of a finished run, which otherwise keeps its export: the best weights
    dropout: ShareBelowOne | None = None  # of a model that comes from `init`; None: as it has
    init: str = ""  # run, folder in Hugging Face's format, or hub name to start the weights from
    new_head: bool = False  # draw new outputs of the task's head, also where the weights of init have such a head
    workdir: str = ""  # run folder; empty: runs/CONFIG_NAME
    sample_prompt: str = ""  # what the sample at the end of a decoder's run continues
    sample_tokens: Count = 120  # its length; 0: no sample
    profile: Count = 0  # steps, after the first few, whose trace is written to WORKDIR/profile for TensorBoard; 0: none

    def check(self) -> None:
        """Raises UserError for what can be known to fail before data or devices are looked at."""
        check_fields(self)
        check_task(self.task)
        if not self.data.path and not isinstance(self.task, MultiTask):
            raise UserError("data.path is empty; give a file, a folder, a glob or tfds:NAME with --data.path")
        if self.batch % self.accumulate:
            raise UserError(
                f"accumulate is {self.accumulate}, which does not divide batch {self.batch}; "
                f"choose accumulate from {divisors(self.batch)}"
            )
        if not self.data.eval_path and not self.data.eval_split and not 0 < self.data.eval_fraction < 1:
            raise UserError(
                f"data.eval_fraction is {self.data.eval_fraction}; it must be between 0 and 1, "
                f"or give held-out data with --data.eval-path"
            )
        if self.data.documents == "boundary" and not self.data.boundary:
            raise UserError("data.documents is 'boundary' but data.boundary is empty; give the regular expression")
        if self.model is None and not self.init:
            raise UserError("there is no model; give the weights to start from with --init FOLDER_OR_HUB_NAME")
        if self.model is not None:
            self._check_model(self.model)
        if self.optimizer.name == "adafactor" and self.optimizer.momentum_dtype != "float32":
            raise UserError("adafactor has no first moment; leave out --optimizer.momentum-dtype")
        if self.new_head and not getattr(self.task, "has_label_head", True):
            raise UserError(
                f"new_head is set, and {type(self.task).__name__} has no head of labels to draw; leave it out"
            )
        if self.dropout is not None and self.model is not None:
            raise UserError(f"dropout is {self.dropout}, but the config names the model; set --model.dropout instead")

    def _check_model(self, model: ModelConfig) -> None:
        model.check()
        if model.position_limit is not None and self.data.length > model.position_limit:
            raise UserError(
                f"data.length is {self.data.length}, longer than the {model.position_limit} positions of the model; "
                f"lower --data.length, or take a model with more positions (--model.max-length)"
            )
        if isinstance(self.task, TaskConfig):
            self.task.check_model(self, model)
        else:
            check_reader(self.task, model)
        if not 0 <= self.optimizer.freeze_layers <= model.layers:
            raise UserError(
                f"optimizer.freeze_layers is {self.optimizer.freeze_layers}; the model has {model.layers} layers"
            )
