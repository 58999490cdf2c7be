"""How exact are scores in fp32 and bf16? Against float64 autograd of the same weights, on real text.

OMP_NUM_THREADS=1 python benchmarks/influence_accuracy.py [--seeds 3] [--steps 200] [--examples 96]

A small model trains in fp32 on bytes of text that every Python carries: its manual and two of its packages.
For each precision the weights are rounded to it. The reference is autograd in float64 with these weights, of
each example and of the mean loss of each probing set. Runs on a GPU, too, where there is one.

    relative error    |s - s64| / |s64| over examples, the worst of three capabilities
    Spearman, Pearson over examples, the worst of three capabilities
    own directions    mean gradients in the run's precision, as compute_influence takes them
    exact directions  of float64: the error of the examples' gradients alone
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import email
import json
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.data.loader import whole_batch
from megatron_r1.influence.engine import run_passes, weigh
from megatron_r1.influence.gradients import Scorer, score
from megatron_r1.influence.methods import Ghost, Method, WgradDot
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups

# isort: split
from megatron.core.transformer.torch_norm import L2Norm

MODEL = ModelConfig(4, 128, 384, 4, 2, 256, head_dim=32)
SEQ, SIZE, PROBES = 128, 8, 32


def texts() -> dict[str, np.ndarray]:
    """Bytes of three kinds of text."""

    def sources(package: Any) -> str:
        return "".join(path.read_text() for path in sorted(Path(package.__file__).parent.glob("*.py")))

    kinds = {
        "manual": "".join(pydoc_data.topics.topics.values()),
        "asyncio": sources(asyncio),
        "email": sources(email) + sources(json),
    }
    return {name: np.frombuffer(text.encode(), np.uint8).astype(np.int64) for name, text in kinds.items()}


def windows(byte_N: np.ndarray, count: int, random: np.random.Generator) -> np.ndarray:
    """[count, S + 1], from anywhere."""
    first_N = random.integers(0, len(byte_N) - SEQ - 1, count)
    return np.stack([byte_N[first : first + SEQ + 1] for first in first_N])


def batches(window_NS: np.ndarray) -> list[Any]:
    full = np.full(SIZE, SEQ)
    return [
        weigh(whole_batch(part, full, 0 * full, None), 1 / full)
        for part in np.split(window_NS, len(window_NS) // SIZE)
    ]


def train(gpt: Any, byte_N: list[np.ndarray], steps: int, random: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=3e-3, weight_decay=0.1)
    for step in range(steps):
        rows = np.concatenate([windows(text, SIZE, random) for text in byte_N])
        run_passes(gpt, iter(batches(rows)), 3, SIZE, SEQ)
        optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
        optimizer.step()
        optimizer.zero_grad()


def gradient(gpt: Any, window_NS: np.ndarray) -> dict[str, torch.Tensor]:
    """Gradient of the mean of the windows' losses, in the model's precision, summed in float32."""
    total = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in gpt.named_parameters()}
    for batch in batches(window_NS):
        run_passes(gpt, iter([batch]), 1, SIZE, SEQ)
        for name, p in gpt.named_parameters():
            total[name] += p.grad.float() / len(window_NS)
            p.grad = None
    return total


def exact_gradient(gpt: Any, window_NS: np.ndarray) -> torch.Tensor:
    """The same by autograd in float64, all parameters in one vector."""
    parameters = list(gpt.parameters())
    total = torch.zeros(sum(p.numel() for p in parameters), dtype=torch.float64, device=backend.device())
    for part in np.array_split(window_NS, max(1, len(window_NS) // SIZE)):
        window = torch.from_numpy(part).to(backend.device())
        position = torch.arange(SEQ, device=window.device).expand(len(part), -1)
        logits_BSV = gpt(window[:, :-1].contiguous(), position, None)
        assert logits_BSV.dtype == torch.float64
        loss = F.cross_entropy(logits_BSV.flatten(0, 1), window[:, 1:].flatten(), reduction="sum") / SEQ
        total += torch.cat([g.flatten() for g in torch.autograd.grad(loss, parameters)]) / len(window_NS)
    return total


def _norm_as_given(self: Any, x: torch.Tensor) -> torch.Tensor:
    """megatron-core's norm of queries and keys without its float32."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def measure(seed: int, steps: int, examples: int) -> dict[tuple[str, str, str], np.ndarray]:
    """(precision, method, directions) -> relative error, Spearman, Pearson: the worst capability's."""
    random, byte = np.random.default_rng(seed), list(texts().values())
    backend.seed_model_parallel(seed)
    trained: Any = build_model(MODEL, ParallelConfig(), "fp32", SEQ, plain_layers=True)
    train(trained, byte, steps, random)
    rows = np.concatenate([windows(text, examples // 3, random) for text in byte])
    probes = [windows(text, PROBES, random) for text in byte]
    weights, out = copy.deepcopy(trained.state_dict()), {}
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        gpt: Any = build_model(MODEL, ParallelConfig(), precision, SEQ, plain_layers=True).to(dtype)
        gpt.load_state_dict(weights)
        wide: Any = build_model(MODEL, ParallelConfig(), "fp32", SEQ, plain_layers=True).double()
        wide.load_state_dict(gpt.state_dict())
        plain, L2Norm.forward = L2Norm.forward, _norm_as_given
        v64_CP = torch.stack([exact_gradient(wide, probe) for probe in probes])
        true_NC = torch.stack([v64_CP @ exact_gradient(wide, row[None]) for row in rows]).cpu().numpy()
        L2Norm.forward = plain
        own = [gradient(gpt, probe) for probe in probes]
        split = [p.numel() for p in wide.parameters()]
        directions = {
            "own": {name: torch.stack([g[name] for g in own]) for name in own[0]},
            "exact": {
                name: part_CP.float().reshape(3, *p.shape).contiguous()
                for (name, p), part_CP in zip(
                    wide.named_parameters(), v64_CP.split(split, dim=1), strict=True
                )
            },
        }
        for which, v in directions.items():
            methods: dict[str, Method] = {"wgrad-dot": WgradDot(v, 3), "ghost": Ghost(v, 3, SEQ)}
            for name, method in methods.items():
                with Scorer(gpt, method) as scorer:
                    passes = batches(rows)
                    row_NX, _ = score(gpt, scorer, iter(passes), len(passes), SIZE, SEQ)
                found_NC = row_NX.cpu().numpy()
                out[precision, name, which] = np.array(
                    [
                        max(np.linalg.norm(found_NC - true_NC, axis=0) / np.linalg.norm(true_NC, axis=0)),
                        min(spearmanr(found_NC[:, c], true_NC[:, c]).statistic for c in range(3)),
                        min(np.corrcoef(found_NC[:, c], true_NC[:, c])[0, 1] for c in range(3)),
                    ]
                )
    return out


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--examples", type=int, default=96, help="a multiple of 24")
    options = parser.parse_args()
    with process_groups(ParallelConfig()):
        found = [measure(seed, options.steps, options.examples) for seed in range(options.seeds)]
    print(
        f"{MODEL.parameters():,} parameters, {options.steps} steps, {options.examples} examples, seeds 0 to "
        f"{options.seeds - 1}: the worst of them | {backend.describe(plain_layers=True, trains=False)}"
    )
    for key in found[0]:
        error, spearman, pearson = np.array([each[key] for each in found]).T
        print(
            f"{key[0]} {key[1]:10s} {key[2]:5s} directions: relative error {error.max():.2e}, "
            f"Spearman {spearman.min():.5f}, Pearson {pearson.min():.6f}"
        )


if __name__ == "__main__":
    main()
