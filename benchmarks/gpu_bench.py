"""The sections of gpu_speed.sh, one a process: python benchmarks/gpu_bench.py SECTION (see gpu_sections.py).

Times are medians of calls with a wait for the GPU after each, beside their least and most. `free_ms` is the
mean of as many steps with one wait at their end. The first call, with what it compiles, is apart. MFU counts
6 x parameters and causal attention a token against the card's dense bf16 peak. Everything is bf16.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import torch
from bench_influence import Floor
from gpu_sections import ROOT, part, say, wait_for_turn

from megatron_r1 import backend
from megatron_r1.config import Config, DataConfig, InfluenceConfig, ModelConfig, ParallelConfig, TrainConfig
from megatron_r1.data.indexed import IndexedWriter
from megatron_r1.data.loader import whole_batch
from megatron_r1.data.windows import Examples
from megatron_r1.influence import engine as engine_module
from megatron_r1.influence import kfac, methods
from megatron_r1.influence.curvature import CURVATURES
from megatron_r1.influence.engine import Engine, run_passes, weigh
from megatron_r1.influence.gradients import Scorer, score
from megatron_r1.influence.parameters import Directions, named_parameters
from megatron_r1.model import loss as loss_module
from megatron_r1.model import vocabulary
from megatron_r1.parallel import on_device, process_groups
from megatron_r1.records import Batch, Corpus
from megatron_r1.system.yaml_io import read_yaml
from megatron_r1.train import step as step_module
from megatron_r1.train.optimizer import set_schedule
from megatron_r1.train.step import Shape, Training, build_training, train_step

# isort: split
from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy
from megatron.core.transformer.mlp import MLP

TINY = "GPU_TINY" in os.environ
FOLDER = Path(os.environ.get("GPU_FOLDER", "."))
SEQ = 64 if TINY else 2048
STEPS, WARM = (2, 0) if TINY else (7, 2)
CAPABILITIES = ("code", "math", "knowledge")
END = 0
"""The token that ends a document."""
Way = Callable[[], Any]


def model_of(preset: str) -> ModelConfig:
    if TINY:
        return ModelConfig(2, 64, 96, 4, 2, 512, head_dim=16)
    return ModelConfig(**read_yaml(ROOT / f"examples/models/{preset}.yaml").tree["model"])


def sizes(*full: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Micro-batch and passes of a step."""
    return ((2, 2),) if TINY else full


# ------------------------------------------------------------------------------------------------ clock


def finish() -> None:
    """Wait for what was started on the GPU."""
    if backend.HAS_CUDA:
        torch.cuda.synchronize()


def free() -> None:
    """Give back memory that nobody holds, and begin a new peak."""
    gc.collect()
    if backend.HAS_CUDA:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def seconds_of(call: Way) -> float:
    finish()
    began = time.perf_counter()
    call()
    finish()
    return time.perf_counter() - began


def medians(call: Way) -> tuple[float, dict[str, Any]]:
    """The median seconds of a call, and the figures of its row."""
    free()
    first = seconds_of(call)
    for _ in range(WARM):
        call()
    each = [seconds_of(call) for _ in range(STEPS)]
    middle = statistics.median(each)
    row = {
        "ms": round(1e3 * middle, 2),
        "spread": f"{1e3 * min(each):.1f} to {1e3 * max(each):.1f}",
        "peak_gib": round(backend.peak_memory() / 2**30, 2),
        "first_s": round(first, 2),
    }
    return middle, row


def rate(model: ModelConfig, tokens: int, seconds: float) -> dict[str, Any]:
    peak = backend.peak_flops("bf16")
    flops = model.flops_per_token(SEQ) * tokens / seconds
    return {"tokens_per_s": round(tokens / seconds), **({"mfu": round(flops / peak, 4)} if peak else {})}


def measure(what: str, model: ModelConfig, step: Way, tokens: int, **more: Any) -> float:
    """A row on training steps of so many tokens. Their median seconds."""
    middle, row = medians(step)
    together = seconds_of(lambda: [step() for _ in range(STEPS)]) / STEPS
    say(what, **row | rate(model, tokens, middle) | {"free_ms": round(1e3 * together, 2)} | more)
    return middle


# --------------------------------------------------------------------------------------------- training


def windows(vocabulary: int, rows: int, columns: int, seed: int) -> np.ndarray:
    """Token ids int64 [rows, columns]: few are frequent, as in text, and one in 300 ends a document."""
    random = np.random.default_rng(seed)
    out = np.minimum((vocabulary ** random.random((rows, columns))).astype(np.int64), vocabulary - 1)
    out[random.random((rows, columns)) < 1 / 300] = END
    return out


def batch_of(model: ModelConfig, micro_batch: int, seed: int = 1, eod: int | None = None) -> Batch:
    rows = windows(model.vocab_size, micro_batch, SEQ + 1, seed)
    return whole_batch(rows, np.full(micro_batch, SEQ), np.zeros(micro_batch), eod)


@contextlib.contextmanager
def weights_drawn_there(module: Any) -> Iterator[None]:
    """Models that `module` builds within get weights drawn on the device from one seed.

    The CPU would take seconds for each of the large ones, and no figure here depends on these weights.
    """
    real = module.build_model

    def build(*words: Any, **more: Any) -> Any:
        with mock.patch("torch.nn.init.normal_", lambda weight, *_, **__: weight):
            gpt = real(*words, **more)
        generator = torch.Generator(backend.device()).manual_seed(1)
        with torch.no_grad():
            for p in gpt.parameters():
                p.normal_(0.0, 0.02, generator=generator) if p.dim() > 1 else p.fill_(1.0)
        return gpt

    with mock.patch.object(module, "build_model", build):
        yield


def kernels_of(gpt: Any) -> str:
    """The project's kernels in a model: one that fell back to the plain form says so here."""
    found = {type(module).__name__ for module in gpt.modules()}
    names = sorted(name for name in found if name.startswith("Fused"))
    return ", ".join(names + ["loss"] * (getattr(gpt, "loss_kernels", None) is not None)) or "none"


def config_of(model: ModelConfig, influence: InfluenceConfig | None = None, **data: Any) -> Config:
    return Config(
        model=model,
        data=DataConfig(sources={}, seq_length=SEQ, **data),
        train=TrainConfig(run="none", global_batch=1, micro_batch=1),
        phases={},
        influence=influence,
    )


def training_of(model: ModelConfig, **data: Any) -> Training:
    with weights_drawn_there(step_module):
        return build_training(config_of(model, **data))


def step_of(
    training: Training, model: ModelConfig, micro_batch: int, passes: int, eod: int | None = None
) -> Way:
    batches = [on_device(batch_of(model, micro_batch, seed, eod)) for seed in range(passes)]
    shape = Shape(micro_batch, SEQ, 1)

    def step() -> Any:
        set_schedule(training.optimizer, 1e-4, 0.1)
        return train_step(training, iter(batches), passes, shape)

    return step


def known(result: Any) -> Any:
    """What came of a step: `train_step` may give it at once, or a call that waits for it."""
    return result() if callable(result) else result


def train(preset: str, *full: tuple[int, int]) -> None:
    """The project's own step, and its profile at the first size."""
    model = model_of(preset)
    with process_groups(ParallelConfig()):
        training = training_of(model)
        for micro_batch, passes in sizes(*full):
            with part(f"ours {micro_batch} x {passes}"):
                step = step_of(training, model, micro_batch, passes)
                tokens, used = micro_batch * passes * SEQ, kernels_of(training.gpt)
                measure(f"ours {micro_batch} x {passes}", model, step, tokens, kernels=used)
        micro_batch, passes = sizes(*full)[0]
        with part("profile"):
            profile(f"{preset} {micro_batch} x {passes}", step_of(training, model, micro_batch, passes))


def documents(preset: str) -> None:
    """Documents that attend apart, beside whole windows of the same tokens."""
    model = model_of(preset)
    micro_batch, passes = sizes((16, 2))[0]
    seconds = []
    with process_groups(ParallelConfig()):
        for what, eod in (("whole windows", None), ("documents apart", END)):
            with part(what):
                training = training_of(model, cross_documents=eod is None, eod=eod)
                step = step_of(training, model, micro_batch, passes, eod)
                seconds.append(measure(what, model, step, micro_batch * passes * SEQ))
                del training, step
            free()
    if len(seconds) == 2:
        say("documents apart / whole windows", multiple=round(seconds[1] / seconds[0], 3))


# ---------------------------------------------------------------------------------------------- profile

KINDS = {
    "attention": ("flash", "fmha", "sdpa", "cudnn", "attention"),
    "products": ("gemm", "nvjet", "cutlass", "xmma", "cublas", "splitk", "::mm", "::addmm", "::bmm"),
    "Adam": ("adam",),
    "norms": ("rms", "layer_norm", "layernorm"),
    "copies": ("memcpy", "memset", "copy", "catarray", "::cat", "::zero_"),
    "look-up": ("index", "gather", "scatter", "embedding"),
    "reductions": ("reduce", "softmax", "::sum"),
    "elementwise": ("elementwise", "vectorized", "multi_tensor", "aten::"),
    "triton": ("triton",),
}
"""Marks in the names of kernels, the first that fits; of operators where no GPU is."""
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaDeviceSynchronize")


def kind_of(name: str) -> str:
    low = name.lower()
    return next((kind for kind, marks in KINDS.items() if any(mark in low for mark in marks)), "other")


def profile(tag: str, call: Way, calls: int = 3) -> None:
    """Shares of a call's time, by kind of kernel; the kernels themselves go to a file."""
    activity = torch.profiler.ProfilerActivity
    call()
    finish()
    kinds = [activity.CPU, *([activity.CUDA] if backend.HAS_CUDA else [])]
    with torch.profiler.profile(activities=kinds) as recorded:
        for _ in range(calls):
            call()
        finish()
    averages = recorded.key_averages()
    spans = [
        (event.time_range.start, event.time_range.end, event.name)
        for event in recorded.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
        and not getattr(event, "is_user_annotation", False)
        and event.time_range.end > event.time_range.start
    ]
    us, idle = Counter[str](), None
    if spans:
        for start, end, name in spans:
            us[name] += end - start
        idle = round(1 - covered(spans) / (max(e for _, e, _ in spans) - min(s for s, _, _ in spans)), 4)
    else:
        us.update({event.key: event.self_cpu_time_total for event in averages})
    by_kind = Counter[str]()
    for name, time_us in us.items():
        by_kind[kind_of(name)] += time_us
    total = sum(us.values())
    count = {event.key: event.count for event in averages}
    say(
        f"profile of {tag}",
        ms=round(total / 1e3 / calls, 2),
        **{} if idle is None else {"idle": idle},
        # The last wait is this function's own.
        waits=max(0, sum(count.get(name, 0) for name in WAITS) - 1) / calls,
        items=count.get("aten::_local_scalar_dense", 0) / calls,
        kernels=len(spans) // calls,
        **{kind: f"{t / 1e3 / calls:.1f} ms, {100 * t / total:.1f} %" for kind, t in by_kind.most_common()},
    )
    lines = [
        f"{t / 1e3 / calls:10.3f} ms a call  {kind_of(name):12} {name}" for name, t in us.most_common(60)
    ]
    (FOLDER / f"profile-{tag.replace(' ', '-')}.txt").write_text("\n".join(lines) + "\n")


def covered(spans: list[tuple[float, float, str]]) -> float:
    """Length of the union of the spans."""
    length, last = 0.0, -float("inf")
    for start, end, _ in sorted(spans):
        length += max(0.0, end - max(start, last))
        last = max(last, end)
    return length


# ------------------------------------------------------------------------------------------------ peers


def peers(preset: str, *full: tuple[int, int]) -> None:
    """transformers' Llama of the same shape, eager and compiled: pure bf16, SDPA, torch's fused AdamW."""
    model = model_of(preset)
    if importlib.util.find_spec("transformers") is None:
        say("transformers", note="not installed")
        return
    for what, compiled in (("transformers, eager", False), ("transformers, torch.compile", True)):
        with part(what):
            llama = llama_of(model)
            adam = torch.optim.AdamW(
                llama.parameters(), lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True
            )
            # Inductor's C++ would take a tiny run's whole time.
            call = torch.compile(llama, backend="eager" if TINY else "inductor") if compiled else llama
            for micro_batch, passes in sizes(*full):
                rows = [batch_of(model, micro_batch, s).tokens_BS.to(backend.device()) for s in range(passes)]
                step = partial(llama_step, llama, call, adam, rows)
                measure(f"{what}, {micro_batch} x {passes}", model, step, micro_batch * passes * SEQ)
            del llama, adam, call, step


def llama_of(model: ModelConfig) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=model.vocab_size,
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        num_key_value_heads=model.num_query_groups,
        head_dim=model.head_dim,
        max_position_embeddings=SEQ,
        tie_word_embeddings=True,
        use_cache=False,
    )
    with backend.device():
        llama = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.bfloat16)
    return llama.to(backend.device()).train()


def llama_step(llama: Any, call: Any, adam: Any, rows: list[torch.Tensor]) -> None:
    for ids in rows:
        (call(input_ids=ids, labels=ids).loss / len(rows)).backward()
    torch.nn.utils.clip_grad_norm_(llama.parameters(), 1.0)
    adam.step()
    adam.zero_grad()


# ------------------------------------------------------------------------------------------------- arms


def plain_kernels() -> Any:
    """Models that are built within have the forms that run where Triton is absent."""
    return mock.patch.object(backend, "has_triton", lambda: False, create=True)


class HeadProduct(torch.autograd.Function):
    """Logits of the tied head; its gradient is added where DistributedDataParallel keeps it."""

    @staticmethod
    def forward(ctx: Any, hidden_ND: Any, weight_VD: Any) -> Any:
        ctx.save_for_backward(hidden_ND)
        ctx.weight = weight_VD
        return hidden_ND @ weight_VD.t()

    @staticmethod
    def backward(ctx: Any, grad_NV: Any) -> Any:
        (hidden_ND,) = ctx.saved_tensors
        loss_module.main_gradient(ctx.weight).add_(grad_NV.t() @ hidden_ND)
        loss_module.say_added(ctx.weight)
        return grad_NV @ ctx.weight, None


def fuse_as_core(gpt: Any) -> None:
    """megatron-core's cross_entropy_loss_fusion and bias_activation_fusion."""

    def loss(hidden_ND: Any, weight_VD: Any, labels_N: Any, group: Any, *_: Any) -> Any:
        logits_N1V = HeadProduct.apply(hidden_ND, weight_VD)[:, None]
        return fused_vocab_parallel_cross_entropy(logits_N1V, labels_N[:, None], group)[:, 0]

    vocabulary.linear_cross_entropy = loss
    for module in gpt.modules():
        if hasattr(module, "config"):
            module.config.bias_activation_fusion = True


def fuse_as_liger(gpt: Any) -> None:
    """Liger's cross-entropy, SwiGLU and RMSNorm."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    def loss(hidden_ND: Any, weight_VD: Any, labels_N: Any, *_: Any) -> Any:
        logits_NV = HeadProduct.apply(hidden_ND, weight_VD)
        return LigerCrossEntropyFunction.apply(logits_NV, labels_N, None, -100, 0.0, 0.0, "none")[0].float()

    def norm(self: Any, x: Any) -> Any:
        return LigerRMSNormFunction.apply(x, self.weight, self.eps, 0.0, "llama", False)

    def feed_forward(self: Any, x: Any, *_: Any, **__: Any) -> Any:
        return self.linear_fc2(LigerSiLUMulFunction.apply(*self.linear_fc1(x)[0].chunk(2, -1)))

    vocabulary.linear_cross_entropy = loss
    for module in gpt.modules():
        if isinstance(module, MLP):
            module.forward = feed_forward.__get__(module)
        elif isinstance(module, torch.nn.RMSNorm):
            module.forward = norm.__get__(module)


ARMS: dict[str, tuple[bool, Callable[[Any], None]]] = {
    "plain kernels": (True, lambda gpt: None),
    "megatron-core's fusions": (True, fuse_as_core),
    "Liger": (True, fuse_as_liger),
    "ours": (False, lambda gpt: None),
}
"""Name -> whether it begins with the plain kernels, and what it changes of the model."""


def arms(preset: str, size: tuple[int, int]) -> None:
    """One step by each arm from the same weights, which says whether it computes the same; then its time."""
    model, real, reference = model_of(preset), vocabulary.linear_cross_entropy, None
    micro_batch, passes = sizes(size)[0]
    with process_groups(ParallelConfig()):
        for what, (plain, change) in ARMS.items():
            if not plain and not hasattr(backend, "has_triton"):
                say(what, note="not in this commit")
                continue
            if what == "Liger" and importlib.util.find_spec("liger_kernel") is None:
                say(what, note="not installed")
                continue
            with part(what), contextlib.ExitStack() as stack:
                stack.callback(setattr, vocabulary, "linear_cross_entropy", real)
                if plain:
                    stack.enter_context(plain_kernels())
                training = training_of(model)
                change(training.gpt)
                step = step_of(training, model, micro_batch, passes)
                began = time.perf_counter()
                result = known(step())
                found = torch.tensor([float(result.loss()), float(result.grad_norm)], dtype=torch.float64)
                first = time.perf_counter() - began
                reference = found if reference is None else reference
                loss, norm = ((found / reference - 1).abs()).tolist()
                used = kernels_of(training.gpt)
                # Kernels that were all left out measure the plain form once more.
                ok = loss < 1e-3 and norm < 1e-2 and (plain or not backend.has_triton() or used != "none")
                more = {"ok": ok, "loss_off": loss, "norm_off": norm, "kernels": used}
                measure(what, model, step, micro_batch * passes * SEQ, **more, first_s=round(first, 2))
            training = step = result = None
            free()


# -------------------------------------------------------------------------------------------- influence

METHODS = {
    "wgrad-dot": {},
    "wgrad-dot and norms": {"norms": True},
    "ghost": {"method": "ghost"},
    "lowrank": {"method": "lowrank"},
    "projected": {"method": "projected"},
}


def engine_of(model: ModelConfig, context: Any, micro_batch: int) -> Engine:
    influence = InfluenceConfig(dict.fromkeys(CAPABILITIES, "none"), micro_batch=micro_batch)
    with weights_drawn_there(engine_module):
        return Engine.build(config_of(model, influence), None, context)


def random_directions(engine: Engine, only: str = "") -> Directions:
    return {
        name: torch.randn(len(CAPABILITIES), *p.shape, device=p.device)
        for name, p in named_parameters(engine.gpt).items()
        if only in name
    }


def influence(preset: str, micro_batch: int) -> None:
    """Multiples of a forward and backward pass of the same micro-batch on the same model."""
    model = model_of(preset)
    micro_batch = sizes((micro_batch, 1))[0][0]
    with process_groups(ParallelConfig()) as context:
        engine = engine_of(model, context, micro_batch)
        batch = weigh(batch_of(model, micro_batch), np.full(micro_batch, 1 / SEQ))
        base = row_of("forward and backward", partial(pass_of, engine, batch), model, micro_batch)
        directions = random_directions(engine)
        with cheap_factors():
            for name, fields in METHODS.items():
                with part(name):
                    changed = dataclasses.replace(engine.influence, **fields)
                    method = methods.METHODS[changed.method](
                        directions, dataclasses.replace(engine, influence=changed)
                    )
                    way = partial(score_of, engine, batch, method)
                    row_of(name, way, model, micro_batch, base)
                    if name == "wgrad-dot":
                        floor = partial(score_of, engine, batch, method, Floor)
                        row_of("activation gradients alone", floor, model, micro_batch, base)
                        profile(f"{preset} {name}", way, 1)
                    del method, way
        with part("one truncation"):
            name = next(name for name in directions if name.endswith("linear_fc1.weight"))
            call = partial(methods.truncated, directions[name][:1], engine.influence.rank)
            say(f"lowrank: one direction of {name}", ms=round(1e3 * seconds_of(call), 2))
        if "950m" not in preset:
            with part("kfac"):
                kfac_rows(engine, model, dict(directions), micro_batch, base)
        with part("datainf"):
            count = 4
            examples = examples_of(engine, model, count)
            call = partial(CURVATURES["datainf"]().apply, directions, engine, Path(), [examples])
            seconds = seconds_of(call) / count
            say("datainf, an example", ms=round(1e3 * seconds, 2), multiple=round(seconds / base, 3))


def row_of(what: str, way: Way, model: ModelConfig, micro_batch: int, base: float | None = None) -> float:
    middle, row = medians(way)
    tokens = round(micro_batch * SEQ / middle)
    say(what, **row, tokens_per_s=tokens, multiple=round(middle / (base or middle), 3))
    return middle


def pass_of(engine: Engine, batch: Batch) -> None:
    run_passes(engine.model, iter([batch]), 1, len(batch.tokens_BS), SEQ)
    for p in engine.gpt.parameters():
        p.grad = None


def score_of(engine: Engine, batch: Batch, method: Any, kind: type[Scorer] = Scorer) -> Any:
    with kind(engine.gpt, method) as scorer:
        return score(engine.model, scorer, iter([batch]), 1, len(batch.tokens_BS), SEQ)


@contextlib.contextmanager
def cheap_factors() -> Iterator[None]:
    """lowrank's factors are random within. Decomposing some hundred directions would take a minute."""

    def random(direction_COI: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        capabilities, *sides = direction_COI.shape
        return tuple(torch.randn(n, capabilities * rank, device=direction_COI.device) for n in sides)

    with mock.patch.object(methods, "truncated", random):
        yield


def examples_of(engine: Engine, model: ModelConfig, count: int) -> Examples:
    corpus = write_corpus(FOLDER / "examples", model, count * SEQ + 1)
    return engine.examples(corpus, np.arange(count))


def write_corpus(prefix: Path, model: ModelConfig, tokens: int, seed: int = 1) -> Corpus:
    """Made-up documents that end with END."""
    (row,) = windows(model.vocab_size, 1, tokens, seed)
    row[-1] = END
    parts = np.split(row, np.flatnonzero(row == END)[:-1] + 1)
    with IndexedWriter(prefix, np.dtype("int32")) as writer:
        for document in parts:
            writer.add_document(document.astype(np.int32))
        writer.finalize()
    return Corpus(prefix.name, prefix, len(parts), tokens, "int32", None)


def kfac_rows(
    engine: Engine, model: ModelConfig, directions: Directions, micro_batch: int, base: float
) -> None:
    """K-FAC on one micro-batch: its factors, and the decompositions that are done once a checkpoint."""
    spent = Counter[str]()

    def clocked(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(real)
        def call(*words: Any, **more: Any) -> Any:
            out = None

            def run() -> None:
                nonlocal out
                out = real(*words, **more)

            spent[name] += seconds_of(run)
            return out

        return call

    examples = examples_of(engine, model, micro_batch)
    with contextlib.ExitStack() as stack:
        for name in ("_collect", "_decompose"):
            stack.enter_context(mock.patch.object(kfac, name, clocked(name, getattr(kfac, name))))
        whole = seconds_of(partial(CURVATURES["kfac"]().apply, directions, engine, Path(), [examples]))
    for what, name in (("factors of a micro-batch", "_collect"), ("decompositions", "_decompose")):
        ms = round(1e3 * spent[name], 1)
        say(f"kfac, {what}", ms=ms, multiple=round(spent[name] / base, 2), of=f"{len(directions)} parameters")
    say("kfac, all", ms=round(1e3 * whole, 1), multiple=round(whole / base, 2))


def kfac_of_a_layer(preset: str, micro_batch: int) -> None:
    """One layer alone: the decompositions of all would take minutes."""
    model = model_of(preset)
    micro_batch = sizes((micro_batch, 1))[0][0]
    with process_groups(ParallelConfig()) as context:
        engine = engine_of(model, context, micro_batch)
        batch = weigh(batch_of(model, micro_batch), np.full(micro_batch, 1 / SEQ))
        base = row_of("forward and backward", partial(pass_of, engine, batch), model, micro_batch)
        with part("kfac"):
            kfac_rows(engine, model, random_directions(engine, "layers.0."), micro_batch, base)


# ------------------------------------------------------------------------------------------------- tool


def run_file(preset: str, folder: Path, steps: int, seq_length: int = SEQ, **train: Any) -> Path:
    """A configuration of tools/train.py on made-up text. Its run directory is given to each launch."""
    model = model_of(preset)
    write_corpus(folder / "docs", model, max(200, 2 * train["global_batch"] * steps) * seq_length // 2)
    phase = {"steps": steps, "learning_rate": 2e-3, "warmup_steps": 2, "decay": "constant"}
    tree = {
        "model": dataclasses.asdict(model),
        "data": {"seq_length": seq_length, "eod": END, "sources": {"docs": {"prefix": str(folder / "docs")}}},
        "train": {"run": "unset", **train},
        "phases": {"one": phase},
    }
    path = folder / "run.yaml"
    path.write_text(json.dumps(tree))
    return path


def launch(
    config: Path, run: Path, *words: str, torchrun: bool = False, **environment: str
) -> subprocess.Popen[bytes]:
    """tools/train.py on one rank, its output in RUN.log."""
    start = [sys.executable]
    if torchrun:
        start = [str(ROOT / "examples/launch/one_machine.sh"), "--nproc-per-node", "1"]
    command = [*start, str(ROOT / "tools/train.py"), str(config), f"train.run={run}", *words]
    with open(f"{run}.log", "ab") as log:
        return subprocess.Popen(
            command, stdout=log, stderr=log, env={**os.environ, "PYTHON": sys.executable, **environment}
        )


def finished(process: subprocess.Popen[bytes], run: Path) -> list[dict[str, Any]]:
    """The metrics of a launch that ends well. Raises RuntimeError with the last line of one that does not."""
    if status := process.wait():
        lines = Path(f"{run}.log").read_text(errors="replace").strip().splitlines()
        raise RuntimeError(f"{run.name} ended with status {status}: {lines[-1] if lines else 'no output'}")
    return metrics(run)


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def steps_logged(run: Path) -> int:
    """Steps in the log of the first rank, which is written line by line; metrics.jsonl is at saves."""
    return sum(path.read_text().count("| loss") for path in run.glob("logs/rank_*0.log"))


def knows_deterministic() -> bool:
    return "deterministic" in {field.name for field in dataclasses.fields(TrainConfig)}


def tool(preset: str, size: tuple[int, int]) -> None:
    """tools/train.py from end to end. Cold: with empty caches of Triton, Inductor and CUDA."""
    model = model_of(preset)
    micro_batch, passes = sizes(size)[0]
    folder = FOLDER / f"tool-{preset}"
    folder.mkdir(exist_ok=True)
    batch, steps = micro_batch * passes, 4 if TINY else 25
    config = run_file(preset, folder, steps, global_batch=batch, micro_batch=micro_batch, probe_every=10_000)
    names = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "CUDA_CACHE_PATH")
    caches = {name: str(folder / "caches" / name.lower()) for name in names}
    launches: dict[str, tuple[bool, tuple[str, ...]]] = {
        "cold": (False, ()),
        "warm": (False, ()),
        "warm, torchrun": (True, ()),
        "deterministic": (False, ("train.deterministic=true",)),
    }
    for number, (what, (torchrun, words)) in enumerate(launches.items()):
        if words and not knows_deterministic():
            say(what, note="train.deterministic is unknown in this commit")
            continue
        with part(what):
            run, began = folder / f"run{number}", time.perf_counter()
            process = launch(config, run, *words, torchrun=torchrun, **caches)
            while process.poll() is None and not steps_logged(run):
                time.sleep(0.02)
            first = time.perf_counter() - began
            later = finished(process, run)[1 if TINY else 5 :]
            seconds = statistics.median(line["seconds"] for line in later)
            say(
                f"{what}, {micro_batch} x {passes}",
                ms=round(1e3 * seconds, 2),
                **rate(model, batch * SEQ, seconds),
                peak_gib=round(later[-1]["memory_bytes"] / 2**30, 2),
                first_step_s=round(first, 1),
                launch_s=round(time.perf_counter() - began, 1),
            )


SECTIONS: dict[str, Way] = {
    "peers-950m": partial(peers, "950m", (8, 2)),
    "train-950m": partial(train, "950m", (8, 2), (12, 2), (16, 1)),
    "arms-950m": partial(arms, "950m", (8, 2)),
    "influence-950m": partial(influence, "950m", 8),
    "tool-140m": partial(tool, "140m", (16, 2)),
    "peers-140m": partial(peers, "140m", (16, 2)),
    "train-140m": partial(train, "140m", (16, 2), (32, 1)),
    "influence-140m": partial(influence, "140m", 8),
    "documents-140m": partial(documents, "140m"),
    "peers-360m": partial(peers, "360m", (16, 1)),
    "train-360m": partial(train, "360m", (16, 1)),
    "kfac-950m": partial(kfac_of_a_layer, "950m", 8),
}


def main() -> None:
    name = sys.argv[1]
    if name.startswith("peers") and importlib.util.find_spec("transformers"):
        import transformers  # noqa: F401
    wait_for_turn()
    torch.set_num_threads(1 if TINY else torch.get_num_threads())
    SECTIONS[name]()


if __name__ == "__main__":
    main()
