"""Every configuration dataclass, its fields with their units and limits. Imports no torch, reads no file.

`config_io` reads these from YAML and checks the limits (system/fields.py). `Config` is the root that every
tool shares.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator

from megatron_r1.system.fields import (
    AT_LEAST_0,
    AT_LEAST_1,
    AdamBeta,
    ByName,
    Coefficient,
    Epochs,
    Finite,
    NaturalInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    Share,
    T,
    Text,
    Truth,
    apart,
    is_name,
    limit,
    plain_data,
)

RESERVED = ("step", "source", "example", "tokens", "loss", "norm")
"""Columns of exported scores (influence/store.py), beside which each capability has one."""
ByCapability = Annotated[dict[Annotated[str, is_name(*RESERVED)], T], AfterValidator(apart)]


@dataclass(frozen=True)
class RopeScaling(Section):
    """Slower rotation for a context longer than the first training's (model/gpt.py, `scaled_frequencies`)."""

    rope_type: Literal["linear", "llama3"]
    """linear divides all frequencies, llama3 the low ones only, as Llama 3.1 does."""
    factor: Annotated[float, limit(lambda v: 1 <= v < math.inf, "must be a finite number of at least 1")]
    """Divisor of the slowed frequencies."""
    low_freq_factor: PositiveFloat = 1.0
    """llama3: frequencies below this many turns over the original context are slowed in full."""
    high_freq_factor: PositiveFloat = 4.0
    """llama3: frequencies above this many turns over the original context are left alone."""
    original_max_position_embeddings: PositiveInt = 8192
    """llama3: the original context, tokens."""


@dataclass(frozen=True)
class ModelConfig(Section):
    """A MobileLLM-R1 shape (paper, Table 3)."""

    num_layers: PositiveInt
    hidden_size: PositiveInt
    ffn_hidden_size: PositiveInt
    """Width of the SwiGLU feed-forward."""
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    """Key/value heads."""
    vocab_size: PositiveInt
    """Rows of the tied embedding. A multiple of parallel.tensor."""
    head_dim: PositiveInt = 64
    rotary_base: PositiveFloat = 1e6
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: PositiveFloat = 1e-5
    qk_norm: Truth = True
    """RMS norm of each query and key head, without a weight."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights. Output projections have it / sqrt(2 num_layers)."""

    def parameters(self) -> int:
        """Parameters, tied embedding counted once (docs/recipe.md lists the exact integers)."""
        h, d = self.hidden_size, self.head_dim
        attention = h * d * (2 * self.num_attention_heads + 2 * self.num_query_groups)
        layer = attention + 3 * h * self.ffn_hidden_size + 2 * h
        return self.vocab_size * h + self.num_layers * layer + h

    def flops_per_token(self, seq_length: int) -> float:
        """FLOP of forward and backward of one token: 6 per weight that multiplies, plus causal attention."""
        attention = 6 * self.num_layers * seq_length * self.head_dim * self.num_attention_heads
        return 6.0 * self.parameters() + attention


@dataclass(frozen=True)
class ParallelConfig(Section):
    """Ranks per model copy. Data parallelism takes the ranks that remain in the launch."""

    tensor: PositiveInt = 1
    pipeline: PositiveInt = 1
    context: PositiveInt = 1
    virtual_pipeline: PositiveInt = 1
    """Model chunks of each pipeline rank. More than 1 interleaves: smaller bubbles, more messages."""
    sequence: Truth = False
    """Shard norms and residuals along the sequence over the tensor-parallel ranks."""

    def model_ranks(self) -> int:
        return self.tensor * self.pipeline * self.context


@dataclass(frozen=True)
class SourceConfig(Section):
    """One indexed dataset to draw from."""

    prefix: Text
    """Path without `.bin` / `.idx`."""
    documents: PositiveInt | None = None
    """Leading documents to train on. The others are set aside for probing. None: all."""
    domain: str | None = None
    """Name for reports, as code, math or knowledge."""
    tokens: PositiveInt | None = None
    """Tokens that the dataset will have. tools/plan_launch.py reads this while the dataset is not there."""


@dataclass(frozen=True)
class DataConfig(Section):
    sources: ByName[SourceConfig]
    """Name -> dataset. The order is part of the data plan."""
    seq_length: PositiveInt = 2048
    """Tokens per sequence."""
    seed: Seed = 1234
    order: Literal["balanced", "megatron"] = "balanced"
    """Order of the sources: evenly spaced, or megatron-core's own greedy order bit for bit."""
    shuffle: Truth = True
    """Permute each epoch of each source."""
    cross_documents: Truth = True
    """Tokens attend to all before them in the window. False: in their document alone, positions from 0."""
    eod: NaturalInt | None = None
    """Token that ends a document, for `cross_documents: false`. None: the datasets' sidecars give it."""
    probes: ByCapability[Text] = field(default_factory=dict)
    """Capability -> prefix of a held-out dataset. Training reports its NLL."""
    gold: ByName[Text] = field(default_factory=dict)
    """Set -> prefix of its gold answers (tools/prepare_gold.py). Training reports their bits per byte."""


@dataclass(frozen=True)
class ObjectiveConfig(Section):
    """A phase's loss where it is another than the next token's (docs/distillation.md).

    kd: (1 - weight) CE + weight temperature^2 KL(teacher || student), mean over labels.
    """

    name: Literal["kd"]
    teacher: Text | None = None
    """Causal language model of the same tokenizer: a Hugging Face folder or name, or a run's checkpoint.
    Without `cache` it runs beside the student."""
    cache: Text | None = None
    """Folder of a teacher's records (tools/cache_teacher.py). `teacher` then says whose."""
    temperature: PositiveFloat = 1.0
    """Divisor of both models' logits in the divergence."""
    weight: Share = 1.0
    """Of the divergence; cross-entropy has the rest."""
    bos: Literal["auto", "none"] | NaturalInt = "auto"
    """Token before each document for the teacher. auto: what its tokenizer puts before a text."""
    parameters: PositiveInt | None = None
    """Parameters that the teacher will have. tools/plan_launch.py reads this while it is not there."""


@dataclass(frozen=True)
class PhaseConfig(Section):
    """A stretch of training with one mixture and one learning-rate schedule (Table 4)."""

    weights: dict[str, Coefficient] | Literal["uniform"] = "uniform"
    """Source -> share of sequences, normalised. Sources left out are not drawn."""
    steps: PositiveInt | None = None
    """Optimizer steps. Give this or `tokens`."""
    tokens: PositiveInt | None = None
    """Token budget, rounded up to whole steps."""
    learning_rate: PositiveFloat = 4e-3
    """Peak."""
    min_lr_ratio: Share = 0.1
    """Final learning rate as a share of the peak. One step more would reach it."""
    warmup_steps: NaturalInt = 0
    """Steps of linear warm-up in this phase. 0: the phase starts at the peak."""
    decay: Literal["linear", "cosine", "constant", "wsd"] = "linear"
    """After the warm-up: linear and cosine fall to the phase's end, constant stays, wsd falls at the end."""
    decay_steps: PositiveInt | None = None
    """wsd: last steps of the phase, in which the rate falls linearly. None: a tenth of the phase."""
    reset_optimizer: Truth = False
    """Clear Adam's moments when the phase begins. False: they carry over."""
    max_epochs: Epochs | dict[str, Epochs] | None = None
    """Most passes over a source, counted over the whole plan. The others then take its weight."""
    keep: dict[str, Text] = field(default_factory=dict)
    """Source -> keep mask over windows or documents (Eq. 6, data/keep.py). Other sources are drawn whole."""
    objective: ObjectiveConfig | None = None
    """None: cross-entropy of the next token."""

    def wsd_steps(self, steps: int) -> int:
        """Number of last steps in which the learning rate of a wsd phase of `steps` steps falls."""
        return self.decay_steps if self.decay_steps is not None else max(1, steps // 10)


@dataclass(frozen=True)
class OptimizerConfig(Section):
    """AdamW. Norm weights are exempt from decay."""

    adam_beta1: AdamBeta = 0.9
    adam_beta2: AdamBeta = 0.95
    # Of 0, a parameter whose gradient is 0 would become 0 / 0.
    adam_eps: PositiveFloat = 1e-8
    weight_decay: Coefficient = 0.1
    clip_grad: Coefficient = 1.0
    """Most global gradient norm. 0: no clipping."""
    z_loss: Coefficient = 0.0
    """Weight of log^2 of the softmax's normaliser in the gradient. Reported losses are without it."""


@dataclass(frozen=True)
class TrainConfig(Section):
    run: Text
    """Run directory. The same command again continues the run."""
    global_batch: PositiveInt
    """Sequences per optimizer step, over all ranks."""
    micro_batch: PositiveInt
    """Sequences per forward pass on one rank."""
    precision: Literal["fp32", "bf16"] = "bf16"
    """bf16 keeps fp32 main parameters and gradients."""
    head_chunk: PositiveInt | None = None
    """Tokens whose logits exist at a time. Fewer take less memory and more time. None: a micro-batch."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in backward. selective: the feed-forward's. full: all but layers' inputs."""
    seed: Seed = 1234
    """Of the initial weights."""
    deterministic: Truth = False
    """On GPUs of one kind in one layout, the same command gives the same bits. A CPU always gives them."""
    checkpoint_every: PositiveInt = 1000
    """Steps between checkpoints. The end of every phase is saved, too."""
    keep_last: PositiveInt | None = None
    """Newest checkpoints to keep. None: all. Never deleted are ends of phases, influence.steps, and the
    checkpoints of keep_every and keep_spaced."""
    keep_every: PositiveInt | None = None
    """With keep_last: checkpoints at multiples of this number of steps stay, too."""
    keep_spaced: Annotated[int, limit(lambda v: 0 <= v <= 100_000, "must be within 0 and 100,000")] = 0
    """Evenly spaced checkpoints to save and keep in every phase, for influence. The paper has 10."""
    probe_every: PositiveInt = 1000
    """Steps between measurements on `data.probes` and `data.gold`. Ends of phases are measured, too."""
    validation_windows: NaturalInt = 0
    """Windows of each source, behind its `documents`, whose NLL is measured with the probes."""
    exp_manager: Annotated[dict[str, Any], AfterValidator(plain_data)] | None = None
    """Settings of NeMo's experiment manager, whose loggers then log, too. Needs nemo-toolkit.
    {create_mlflow_logger: true} adds MLflow, {} its own TensorBoard. None: off. Keys belong in the
    environment: a value whose name looks like a key's is given to the loggers, and recorded nowhere."""
    wandb_project: str | None = None
    """Weights & Biases project to report to. Needs wandb."""
    init_weights: str | None = None
    """Checkpoint whose weights alone a new run begins with. The rotary base and scaling may differ."""
    init_from: str | None = None
    """Checkpoint whose weights, optimizer state and data position a new run begins with."""
    expect: str | None = None
    """Identity that this checkpoint must have: the SHA-256 of its megatron_r1.json."""


@dataclass(frozen=True)
class HealthConfig(Section):
    """When a step is skipped, and when a run stops."""

    loss_spike: Annotated[float, AT_LEAST_0] = 0.2
    """Nats. The run saves and stops when the median loss of the last 32 accepted steps is more than this
    above the best such median of the phase. 0: never."""
    grad_norm_spike: Annotated[float, AT_LEAST_0] = 20.0
    """A step whose gradient norm, before clipping, exceeds this many times the median of the last 128
    accepted steps is told. It is taken all the same. 0: none is told."""
    max_skipped: Annotated[int, AT_LEAST_1] = 10
    """Steps in a row whose loss or gradient norm is not finite, after which the run saves and stops."""
    hang_seconds: Annotated[int, AT_LEAST_0] = 540
    """Seconds without a completed step. A rank then writes its stacks to RUN/logs and ends. 0: never."""


@dataclass(frozen=True)
class InfluenceConfig(Section):
    """Scores of representative sets against capability directions (Eqs. 2-4)."""

    directions: ByCapability[Text]
    """Capability -> prefix of its probing set P_c."""
    examples: PositiveInt = 10_000
    """Windows drawn per source, the representative set R_g."""
    probe_examples: PositiveInt | None = None
    """Windows of each probing set. None: all."""
    steps: list[NaturalInt] = field(default_factory=list)
    """Steps of the checkpoints to score. Empty: every checkpoint of the run."""
    micro_batch: PositiveInt = 8
    """Sequences per forward pass."""
    unit: Literal["window", "document"] = "window"
    """An example is `data.seq_length` tokens of the stream, or a document by itself."""
    loss: Literal["mean", "sum"] = "mean"
    """Loss of an example: mean or sum over its labels."""
    layers: str | list[str] = "all"
    """Parameters that count: all, linear, embedding, or globs over names (influence/parameters.py)."""
    norms: Truth = False
    """Store |grad l(x)|, too. Cosines need it."""
    exclude_self: Truth = False
    """Score a window that lies in a probing set against that set's direction without it."""
    method: Literal["wgrad-dot", "ghost", "lowrank", "projected"] = "wgrad-dot"
    """Computation of scores (influence/methods.py). wgrad-dot and ghost are exact. lowrank truncates the
    directions. projected stores random projections of gradients for later queries, and scores by them."""
    per_token: Truth = False
    """ghost: store each token's part of the scores, too."""
    rank: PositiveInt = 32
    """lowrank: singular values kept of a matrix's direction."""
    min_correlation: Share = 0.999
    """lowrank: least correlation with exact scores, measured on 64 examples. Below it scoring stops."""
    projection: PositiveInt = 16
    """projected: k. A matrix is stored as k x k numbers an example."""
    curvature: Literal["auto", "identity", "adam", "datainf", "kfac", "ekfac"] = "auto"
    """H of Eq. 2 (docs/influence.md). Its inverse is applied once to each direction. auto: adam if every
    checkpoint holds Adam's second moment, else identity."""
    curvature_examples: PositiveInt = 256
    """datainf, kfac, ekfac: examples of all sources together on which H is measured."""
    seed: Seed = 1234
    """Of the choice of examples."""


@dataclass(frozen=True)
class MixConfig(Section):
    """From scores to source weights and keep masks (Eqs. 4-6)."""

    phase: Annotated[str, is_name()]
    """Phase whose weights are written."""
    runs: ByCapability[Text] = field(default_factory=dict)
    """Capability -> run whose scores for it count, the paper's form of Eq. 3. Empty: train.run for all."""
    checkpoint_weight: Literal["step", "uniform"] = "step"
    """alpha_{c,t} of Eq. 4: proportional to the step, or equal."""
    capability_weight: dict[str, Coefficient] = field(default_factory=dict)
    """Weight of each capability in the sum. Empty: equal."""
    scale: Literal["raw", "zscore", "cosine"] = "raw"
    """Scale of a capability's scores in the sum. raw is the paper's. zscore measures sources against their
    average, in units of the spread, so that no capability outweighs another by its scale. cosine divides
    by the norms of both gradients and needs influence.norms."""
    objective: Literal["sum", "worst"] = "sum"
    """sum: Eq. 5. worst: the worst-served capability gets most of its best gain (mixture/weights.py)."""
    floor: Share = 0.0
    """Least weight of any source."""
    cap: Share = 1.0
    """Greatest weight of any source."""
    max_epochs: Epochs | dict[str, Epochs] | None = None
    """Most passes over a source in the whole plan. Bounds its weight. The phase gets it. None: its own."""
    keep: Truth = False
    """Write keep masks, too (Eq. 6). Of the scored examples the phase draws only those that help."""
    keep_above: Finite = 0.0
    """An example helps if its joint score at the last checkpoint is above this."""
    keep_unscored: Truth = True
    """With `keep`: draw examples that were not scored."""


@dataclass(frozen=True)
class Config(Section):
    """The root. Files merge into it from left to right, then dotted overrides."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    phases: ByName[PhaseConfig]
    """Name -> phase, in training order. A later file may append one."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    health: HealthConfig = field(default_factory=HealthConfig)
    influence: InfluenceConfig | None = None
    mix: MixConfig | None = None

    def tokens_per_step(self) -> int:
        return self.train.global_batch * self.data.seq_length

    def phase_steps(self, name: str) -> int:
        """Optimizer steps of a phase."""
        phase = self.phases[name]
        if phase.steps is not None:
            return phase.steps
        assert phase.tokens is not None, "config_io requires steps or tokens"
        return -(-phase.tokens // self.tokens_per_step())

    def phase_weights(self, name: str) -> dict[str, float]:
        """Source -> its weight in a phase, 0 for sources that the phase leaves out."""
        weights = self.phases[name].weights
        if weights == "uniform":
            return dict.fromkeys(self.data.sources, 1.0)
        assert isinstance(weights, dict)
        return {source: weights.get(source, 0.0) for source in self.data.sources}
