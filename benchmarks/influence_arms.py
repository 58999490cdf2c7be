"""Who scores in bench_influence_peers.py: this project, bergson and dattri-llm, each with the same interface.

Nothing of them is imported before it is built, as each has a process of its own.
"""

from __future__ import annotations

import contextlib
import copy
import tempfile
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

QUERIES = 3


class Arm(NamedTuple):
    plain: Callable[[], None]
    """Forward and backward of all batches, with every parameter's gradient."""
    score: Callable[[], Any]
    """[N, QUERIES]"""
    gradients: Callable[[Any], list[dict[str, Any]]]
    """By autograd, of each window's mean label loss; the peers' with both uses of the tied weight apart."""
    covered: str = ""
    """What the names of parameters that count have in common."""


def windows(vocabulary: int, rows: int, seq: int) -> Any:
    """Random tokens [QUERIES + rows, S + 1], the queries first."""
    return torch.randint(vocabulary, (QUERIES + rows, seq + 1), generator=torch.Generator().manual_seed(1))


@contextlib.contextmanager
def megatron(onednn: bool) -> Any:
    from megatron_r1 import backend
    from megatron_r1.backend import cpu_products
    from megatron_r1.config import ParallelConfig
    from megatron_r1.parallel import process_groups

    if not onednn:
        cpu_products.wanted = lambda: False
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        yield


def ours(shape: dict[str, Any], micro_batch: int, window: Any) -> Arm:
    import numpy as np

    from megatron_r1.config import ModelConfig, ParallelConfig
    from megatron_r1.data.loader import whole_batch
    from megatron_r1.influence.engine import run_passes, weigh
    from megatron_r1.influence.gradients import Scorer, score
    from megatron_r1.influence.methods import WgradDot
    from megatron_r1.influence.parameters import named_parameters
    from megatron_r1.model.gpt import build_model

    seq = window.shape[1] - 1
    gpt: Any = build_model(ModelConfig(**shape), ParallelConfig(), "fp32", seq, plain_layers=True)

    def batch(rows: Any) -> Any:
        n = len(rows)
        return weigh(whole_batch(rows.numpy(), np.full(n, seq), np.zeros(n), None), np.full(n, 1 / seq))

    def gradients(rows: Any) -> list[dict[str, Any]]:
        return [passes([batch(row[None])], 1) for row in rows]

    def passes(batches: list[Any], size: int) -> dict[str, Any]:
        run_passes(gpt, iter(batches), len(batches), size, seq)
        out = {name: p.grad for name, p in named_parameters(gpt).items()}
        for p in gpt.parameters():
            p.grad = None
        return out

    queries = gradients(window[:QUERIES])
    directions = {name: torch.stack([q[name] for q in queries]) for name in queries[0]}
    batches = [batch(rows) for rows in window[QUERIES:].split(micro_batch)]

    def scores() -> Any:
        with Scorer(gpt, WgradDot(directions, QUERIES)) as scorer:
            return score(gpt, scorer, iter(batches), len(batches), micro_batch, seq)[0]

    return Arm(lambda: passes(batches, micro_batch), scores, gradients)  # type: ignore[arg-type, return-value]


def llama(shape: dict[str, Any], micro_batch: int, window: Any) -> tuple[Any, Any, Any, Any]:
    """A model to score, its inputs, a plain pass of all batches, and gradients by autograd."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=shape["vocab_size"],
        hidden_size=shape["hidden_size"],
        intermediate_size=shape["ffn_hidden_size"],
        num_hidden_layers=shape["num_layers"],
        num_attention_heads=shape["num_attention_heads"],
        num_key_value_heads=shape["num_query_groups"],
        tie_word_embeddings=True,
        use_cache=False,
    )
    model = LlamaForCausalLM._from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    rows, trained = window[:, :-1], copy.deepcopy(model)  # as many places as ours, one label less

    def plain() -> None:
        for part in rows[QUERIES:].split(micro_batch):
            trained(input_ids=part, labels=part).loss.backward()
            trained.zero_grad()

    def gradients(_: Any) -> list[dict[str, Any]]:
        trained.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        out = []
        for row in rows:
            trained(input_ids=row[None], labels=row[None]).loss.backward()
            out.append({name: p.grad for name, p in trained.named_parameters()})
            trained.zero_grad()
        return out

    return model.requires_grad_(False), rows, plain, gradients


def bergson(shape: dict[str, Any], micro_batch: int, window: Any) -> Arm:
    from bergson import CollectorComputer, IndexConfig, InMemoryCollector, Scorer
    from bergson.score.score_writer import InMemorySequenceScoreWriter
    from datasets import Dataset

    model, rows, plain, gradients = llama(shape, micro_batch, window)
    model.enable_input_require_grads()
    model.model.norm.requires_grad_(True)  # It asks for a parameter that does.
    config = IndexConfig(run_path=tempfile.mkdtemp(), loss_reduction="mean")
    config.partial_run_path.mkdir()

    def collect(some: Any, size: int, scorer: Any = None) -> Any:
        data = Dataset.from_dict({"input_ids": some.tolist()})
        collector = InMemoryCollector(model=model.base_model, data=data, cfg=config, scorer=scorer)
        batches = [part.tolist() for part in torch.arange(len(some)).split(size)]
        computer = CollectorComputer(model, data, collector=collector, batches=batches, cfg=config)
        computer.run_with_collector_hooks()
        return collector

    queries = dict(collect(rows[:QUERIES], 1).gradients)

    def score() -> Any:
        writer = InMemorySequenceScoreWriter(len(rows) - QUERIES, QUERIES)
        scorer = Scorer(queries, list(queries), writer, torch.device("cpu"), torch.float32)
        return collect(rows[QUERIES:], micro_batch, scorer).scores

    return Arm(plain, score, gradients, "_proj.")


def dattri(shape: dict[str, Any], micro_batch: int, window: Any) -> Arm:
    import dattri_llm
    from dattri_llm.utils.module import rms_norm_module_kwargs

    model, rows, plain, gradients = llama(shape, micro_batch, window)
    model.get_input_embeddings().requires_grad_(True)
    norms = {
        name: rms_norm_module_kwargs(normalized_shape=shape["hidden_size"], eps=module.variance_epsilon)
        for name, module in model.named_modules()
        if name.endswith("norm")
    }
    config = dattri_llm.HookManagerConfig(
        hook_types=dict.fromkeys(["model.embed_tokens", *norms], "linear_io"),
        invasive_linear_io=dattri_llm.REGISTER_ALL,
        layer_types=dict.fromkeys(norms, "nn.RMSNorm"),
        module_kwargs=norms,
        include_frozen=True,
        capture_style="auto",
    )
    arguments = dattri_llm.AttributionArguments(
        tempfile.mkdtemp(), per_device_train_batch_size=micro_batch, per_device_eval_batch_size=QUERIES
    )
    task = dattri_llm.AttributionTask(
        # transformers' loss is the mean over all rows: each counts whole.
        loss_func=lambda model, part: model(input_ids=part, labels=part).loss * len(part),
        model=model,
    )
    tracin = dattri_llm.TracInAttributor(arguments, task=task)
    with tracin.generate_test_rep(rows[:QUERIES], hook_config=config) as source:
        queries = [(step, block.materialize(), names) for step, block, names in source]

    def score() -> Any:
        with tracin.generate_train_rep(rows[QUERIES:], hook_config=config) as source:
            return tracin.score_sources(source, queries)[0]

    return Arm(plain, score, gradients)
