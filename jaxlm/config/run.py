"""Configs of a run, its optimizer and its device mesh."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from jaxlm.config.adapter import AdapterConfig
from jaxlm.config.baseline import BaselineConfig
from jaxlm.config.choices import MAX_LAYERS
from jaxlm.config.data import DataConfig, TokenizerConfig
from jaxlm.config.distill import DistillConfig
from jaxlm.config.model import ModelConfig
from jaxlm.config.model_checks import divisors
from jaxlm.config.privacy import PrivacyConfig
from jaxlm.config.pruning import NO_PRUNING, PruneConfig
from jaxlm.config.quantize import QuantizeConfig
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
from jaxlm.config.record_tasks import MultiTask
from jaxlm.config.task import TaskConfig, check_reader, check_task
from jaxlm.config.text_tasks import CausalLM
from jaxlm.errors import UserError

Remat = Literal["auto", "none", "elementwise", "dots", "full", "offload"]
Unroll = Annotated[int, Range(1, MAX_LAYERS, special=(0, "a choice by device"))]
AxisSize = Annotated[int, Range(1, 1_000_000, special=(-1, "all remaining devices"))]


@dataclass(frozen=True)
class OptimizerConfig(Config):
    """The optax chain: clipping, preconditioning, weight decay, layer-wise rates, schedule."""

    name: Literal["adamw", "adafactor", "lion", "muon"] = "adamw"  # update rule
    rate: NotNegative = 1e-3  # peak learning rate
    relative: bool = False  # scale each update by the size of its tensor, as in the Adafactor paper
    schedule: Literal["linear", "cosine", "inverse_sqrt", "constant", "warmup_stable_decay"] = "cosine"  # after warm-up
    warmup: NotNegative = 0.05  # steps of linear warm-up; below 1: fraction of all steps
    final: Share = 0.1  # learning rate at the end of the run, as a fraction of the peak
    decay_share: Share = 0.2  # fraction of the steps in which warmup_stable_decay decays
    weight_decay: NotNegative = 0.1  # decoupled weight decay; biases and norms are excluded
    clip: NotNegative = 1.0  # maximum global norm of the gradients; 0: no clipping
    beta1: ShareBelowOne = 0.9  # decay rate of the first moment (adamw, lion) or of the momentum (muon)
    beta2: ShareBelowOne = 0.95  # decay rate of the second moment (adamw) or of the momentum (lion)
    epsilon: ShareAboveZero = 1e-8  # added to the denominator of adamw
    momentum_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the first moment; the second is float32
    layer_decay: ShareAboveZero = 1.0  # ratio of each layer's learning rate to that of the layer above (ELECTRA)
    freeze: Literal["none", "embeddings", "all_but_heads"] = "none"  # parameters that are not trained
    freeze_layers: Count = 0  # number of first layers that are not trained, together with the embeddings


@dataclass(frozen=True)
class MeshConfig(Config):
    """Number of devices on each axis of the mesh; at most one axis may be -1, for all remaining devices."""

    data: AxisSize = -1  # data parallelism: replicas of the model, each with a part of the batch
    fsdp: AxisSize = 1  # fully sharded data parallelism: shards the batch, and the model width of parameters
    tensor: AxisSize = 1  # tensor parallelism: shards heads, MLP width, vocabulary and, between layers, row length
    context: AxisSize = 1  # context parallelism: shards the length of rows; every query attends to all keys
    expert: AxisSize = 1  # expert parallelism: shards the batch, and the experts of each layer


MatmulPrecision = Literal["default", "high", "highest"]


@dataclass(frozen=True)
class RunConfig(Config):
    """One run, from the data to the exported model."""

    model: ModelConfig | None = field(default_factory=ModelConfig)  # model architecture; None: that of `init`
    task: Any = field(default_factory=CausalLM)  # config of the task
    data: DataConfig = field(default_factory=DataConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    prune: PruneConfig = field(default_factory=PruneConfig)
    quantize: QuantizeConfig = field(default_factory=QuantizeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    baseline: BaselineConfig = field(default_factory=BaselineConfig)
    privacy: PrivacyConfig = field(default_factory=PrivacyConfig)
    batch: Positive = 32  # rows per update, over all devices and micro-batches
    accumulate: Positive = 1  # micro-batches per update, to save memory
    examples: Count = 0  # mean number of examples per update; above 0 it overrides batch
    steps: Positive = 1000  # number of optimizer updates
    eval_tokens: Count = 1 << 22  # held-out tokens for evaluating a language model, sampled by document; 0: all
    epochs: Annotated[float, Range(0, 1_000_000)] = 0.0  # passes over the training data; above 0 they override steps
    seed: Seed = 0  # seed for parameters, data order, masking and dropout
    compute_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of matrix products; the rest is float32
    # "default" multiplies float32 in one pass of bfloat16 on TPU and in TensorFloat32 on GPU; "highest" is float32.
    matmul_precision: MatmulPrecision = "default"  # precision of float32 matrix products
    # "offload" is "full" with the layer inputs, from which all else is recomputed, in host memory.
    # "auto" is "elementwise" (norms, activations, softmax, masks), which repeats no product, and "none" on CPU.
    remat: Remat = "auto"  # what backward recomputes: nothing; elementwise operations; all but products; all
    attention: Literal["auto", "xla", "splash", "cudnn", "triton"] = "auto"  # kernel; auto: splash on TPU, cudnn on GPU
    # By device: on GPU all layers of a model with up to 12, otherwise 4; on TPU and CPU 1.
    unroll: Unroll = 0  # layers per iteration of the layer loop; larger values run faster and compile longer
    log_every: Positive = 10  # steps between lines of metrics.jsonl
    eval_every: Count = 0  # steps between evaluations; 0: after each epoch if epochs is set, and at the end
    best: str = ""  # score that selects the best checkpoint; empty: the task's default
    patience: Count = 0  # evaluations without a better score until the run stops early; 0: no early stopping
    checkpoint_every: Count = 0  # steps between checkpoints; 0: a tenth of the run
    keep: Positive = 2  # latest checkpoints that an unfinished run keeps, in addition to the best
    keep_checkpoints: bool = False  # keep the checkpoints of a finished run, not only the exported model
    dropout: ShareBelowOne | None = None  # dropout rate of a model loaded from `init`; None: unchanged
    init: str = ""  # initial weights: a run, a folder in Hugging Face format, a GGUF file, or a hub name
    # A word2vec or GloVe file, or a run that trained vectors, as wide as the embeddings; other rows stay as they are.
    embeddings: str = ""  # word vectors that the embeddings of tokens that are words start from
    new_head: bool = False  # initialise the task's head randomly even if the weights of `init` have one
    workdir: str = ""  # run folder; empty: runs/CONFIG_NAME
    sample_prompt: str = ""  # prompt of the sample text that a decoder generates at the end of the run
    sample_tokens: Count = 120  # length of the sample text in tokens; 0: no sample
    profile: Count = 0  # steps to trace, after the first few, to WORKDIR/profile for TensorBoard; 0: none

    def check(self) -> None:
        """Raises UserError if the config is invalid, without reading data or devices."""
        check_fields(self)
        check_task(self.task)
        self._check_distill()
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
            raise UserError("data.documents is 'boundary', but data.boundary is empty; set it to a regular expression")
        if self.model is None and not self.init:
            raise UserError("there is no model; give the weights to start from with --init FOLDER_OR_HUB_NAME")
        if self.model is not None:
            self._check_model(self.model)
        if self.optimizer.name == "adafactor" and self.optimizer.momentum_dtype != "float32":
            raise UserError("adafactor has no first moment; leave out --optimizer.momentum-dtype")
        self.prune.check(self.optimizer, self.adapter.rank)
        self._check_quantize()
        self.privacy.check(self)
        if not self.epochs:
            self.prune.window(self.steps)
        if self.new_head and not getattr(self.task, "has_label_head", True):
            raise UserError(f"new_head is set, but {type(self.task).__name__} has no label head; leave it out")
        if self.dropout is not None and self.model is not None:
            raise UserError(f"dropout is {self.dropout}, but the config defines the model; set --model.dropout instead")

    def _check_distill(self) -> None:
        self.distill.check()
        if self.distill.teacher and isinstance(self.task, MultiTask):
            raise UserError(
                "distill.teacher is given, but several tasks cannot be distilled at once; distil each alone"
            )

    def _check_quantize(self) -> None:
        weights = self.quantize.weights
        if weights == "float":
            return
        for name, is_set in (("adapter.rank", self.adapter.rank), ("prune", self.prune != NO_PRUNING)):
            if is_set:
                raise UserError(f"quantize.weights is {weights}, and {name} is set; set one of them in a run")
        if self.quantize.inputs == "int8" and weights not in ("int8", "int4"):
            raise UserError(f"quantize.inputs is int8, which requires integer weights, not {weights}; use int8 or int4")

    def _check_model(self, model: ModelConfig) -> None:
        model.check()
        remedy = "lower --data.length, or use a model with more positions (--model.max-length)"
        model.decoder_config.check_length(self.data.length, "data.length", remedy)
        if isinstance(self.task, TaskConfig):
            self.task.check_model(self, model)
        else:
            check_reader(self.task, model)
        if not 0 <= self.optimizer.freeze_layers <= model.layers:
            raise UserError(
                f"optimizer.freeze_layers is {self.optimizer.freeze_layers}; the model has only {model.layers} layers"
            )
