"""A model small enough to be checked against plain autograd, and scores of it in any layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1 import backend
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import InfluenceConfig, ModelConfig, ParallelConfig
from megatron_r1.data.windows import Examples
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.gradients import score_examples
from megatron_r1.influence.methods import Method, WgradDot
from megatron_r1.influence.parameters import Directions, named_parameters, split_axis, squared_norm
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import ParallelContext, process_groups
from megatron_r1.records import TrainState

MODEL = ModelConfig(
    num_layers=2,
    hidden_size=64,
    ffn_hidden_size=96,
    num_attention_heads=4,
    num_query_groups=2,
    vocab_size=128,
    head_dim=16,
    init_std=0.1,
)
SEQ = 24
ROWS = 12


def windows(rows: int = ROWS, seed: int = 0) -> np.ndarray:
    """int64 [rows, S + 1], few tokens often, so that rows of the embedding are hit repeatedly."""
    return np.random.default_rng(seed).zipf(1.3, size=(rows, SEQ + 1)) % MODEL.vocab_size


def build(parallel: ParallelConfig | None = None, precision: str = "fp32") -> Any:
    """The model from one seed; norm weights away from 1, so that leaving them out would show."""
    backend.seed_model_parallel(7)
    gpt = build_model(MODEL, parallel or ParallelConfig(), precision, SEQ, plain_layers=True)
    noise = torch.from_numpy(np.random.default_rng(3).normal(1, 0.2, MODEL.hidden_size)).float()
    with torch.no_grad():
        for name, p in gpt.named_parameters():
            if "norm" in name:
                p.copy_(noise)
    return gpt.bfloat16() if precision == "bf16" else gpt


class Windows(Examples):
    """Rows that lie in no corpus."""

    def __init__(self, window_NS: np.ndarray):
        n = len(window_NS)
        self.seq_length, self._window_NS = SEQ, window_NS
        self.length_N = self._labels_P = np.full(n, SEQ)
        self._example_P, self._first_N1 = np.arange(n), np.arange(n + 1)
        self._set_P = self._skipped_P = np.zeros(n, np.int64)

    def rows(self, piece_B: np.ndarray) -> np.ndarray:
        return self._window_NS[piece_B]


def engine(gpt: Any, context: ParallelContext, micro_batch: int = 3) -> Engine:
    influence = InfluenceConfig(directions={}, micro_batch=micro_batch, seed=5)
    return Engine(gpt, gpt, context, influence, SEQ)


def directions(gpt: Any, context: ParallelContext) -> Directions:
    """Of three probing sets of different sizes."""
    probes = (Windows(windows(rows, seed=100 + c)) for c, rows in enumerate((5, 6, 7)))
    gradients = [engine(gpt, context).mean_gradient(probe) for probe in probes]
    return {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}


def scores(
    gpt: Any, context: ParallelContext, v: Directions, window_NS: np.ndarray, micro_batch: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """[N, C] and [N] of all rows, on every rank."""
    return rows(gpt, context, WgradDot(v, 3), window_NS, micro_batch)


def rows(
    gpt: Any, context: ParallelContext, method: Method, window_NS: np.ndarray, micro_batch: int = 3
) -> tuple[np.ndarray, np.ndarray]:
    """A method's [N, X], and losses [N], of all rows, on every rank."""
    return score_examples(engine(gpt, context, micro_batch), method, Windows(window_NS))


def layout(
    parallel: ParallelConfig, precision: str = "fp32", checkpoints: Path | None = None
) -> dict[str, Any]:
    """A rank's body: what is measured of the standard rows in a layout.

    The first to come saves its weights under `checkpoints`, the others load them: pipeline stages draw
    other weights from the same seed.
    """
    with process_groups(parallel) as context:
        gpt = build(parallel, precision)
        for name, p in named_parameters(gpt).items():
            assert getattr(p, "tensor_model_parallel", False) == (split_axis(name) is not None), name
        if checkpoints is not None:
            ref = save_checkpoint(checkpoints, gpt, None, TrainState(), MODEL, "one", "")
            load_checkpoint(ref.path, gpt, None, MODEL)
        v = directions(gpt, context)
        found, losses = scores(gpt, context, v, windows())
        out = {"scores": found, "losses": losses, "names": sorted(named_parameters(gpt))}
        out["direction"] = squared_norm({name: t[0] for name, t in v.items()}, gpt)
        if parallel.context == 1:
            with_norms = WgradDot(v, 3, squares=True)
            row_NX = torch.from_numpy(rows(gpt, context, with_norms, windows())[0])
            out |= {name: t.numpy() for name, t in with_norms.results(row_NX).items()}
        return out


def row_loss(gpt: Any, window_S: np.ndarray) -> torch.Tensor:
    """Mean label loss of one window, differentiable: the oracle's forward pass."""
    window = torch.from_numpy(window_S)[None]
    position = torch.arange(SEQ)[None]
    return gpt(window[:, :-1], position, None, labels=window[:, 1:].contiguous()).mean()


def row_gradient(gpt: Any, window_S: np.ndarray) -> dict[str, torch.Tensor]:
    """By plain autograd over all parameters."""
    parameters = dict(gpt.named_parameters())
    found = torch.autograd.grad(row_loss(gpt, window_S), list(parameters.values()))
    return dict(zip(parameters, found, strict=True))
