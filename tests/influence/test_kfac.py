"""K-FAC and EK-FAC against explicit Kronecker products from plain autograd, and in every layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ParallelConfig
from megatron_r1.influence import kfac
from megatron_r1.influence.curvature import CURVATURES
from megatron_r1.influence.engine import draw
from megatron_r1.influence.parameters import EMBEDDING, Directions
from megatron_r1.parallel import ParallelContext, process_groups
from megatron_r1.records import Batch, TrainState
from tests.distributed import RankFailedError, on_ranks
from tests.influence import tiny
from tests.influence.test_gradients import LAYOUTS, error

# isort: split
from megatron.core import parallel_state

MICRO_BATCH = 3
ROWS = (4, 3)
"""Of two sources; they fill no micro-batch."""
KINDS = ("kfac", "ekfac")
SMALL = dataclasses.replace(
    tiny.MODEL,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=2,
    num_query_groups=1,
    head_dim=8,
    vocab_size=32,
)


def _windows() -> list[np.ndarray]:
    return [tiny.windows(rows, seed=50 + number) for number, rows in enumerate(ROWS)]


def _apply(kind: str, v: Directions, gpt: Any, context: ParallelContext) -> None:
    sources = [tiny.Windows(rows) for rows in _windows()]
    CURVATURES[kind]().apply(v, tiny.engine(gpt, context, MICRO_BATCH), Path(), sources)


def _record_labels() -> list[Batch]:
    """The batches of the passes to come, their labels as drawn."""
    seen: list[Batch] = []
    run = kfac.run_passes

    def watched(model: Any, batches: Iterator[Batch], *others: Any) -> None:
        def kept() -> Iterator[Batch]:
            for batch in batches:
                seen.append(batch)
                yield batch

        run(model, kept(), *others)

    kfac.run_passes = watched  # type: ignore[assignment]  # this fork's own
    return seen


def _tokens(gpt: Any, tokens_S: torch.Tensor, labels_S: torch.Tensor) -> dict[str, Any]:
    """One example by plain autograd, float64: (a, g) of each linear layer, u of the look-up, norms."""
    inputs, outputs, hooks = {}, {}, []
    for name, module in gpt.named_modules():
        if "linear" in name or name.endswith(("word_embeddings", "final_layernorm")):

            def keep(module: Any, given: Any, output: Any, name: str = name) -> None:
                out = output[0] if isinstance(output, tuple) else output
                out.retain_grad()
                inputs[name], outputs[name] = given[0].detach(), out

            hooks.append(module.register_forward_hook(keep))
    position = torch.arange(tiny.SEQ)[None]
    gpt.zero_grad()
    gpt(tokens_S[None], position, None, labels=labels_S[None]).mean().backward()
    for hook in hooks:
        hook.remove()
    out: dict[str, Any] = {}
    for name, output in outputs.items():
        g = output.grad.double()
        if "linear" in name:
            out[f"{name}.weight"] = inputs[name][:, 0].double(), g[:, 0]
        elif "word" in name:
            out["look-up"] = g[0]
        else:
            h = output.detach()[:, 0].double()
            p = torch.softmax(h @ gpt.embedding.word_embeddings.weight.double().T, 1).detach()
            g = (p - torch.nn.functional.one_hot(labels_S, p.shape[1])) / tiny.SEQ
            out[EMBEDDING] = h, g
    out |= {n: p.grad.double().clone() for n, p in gpt.named_parameters() if "norm" in n}
    gpt.zero_grad(set_to_none=True)
    return out


def _explicit(kind: str, name: str, v_COI: torch.Tensor, seen: list[dict[str, Any]], token: Any) -> Any:
    """H^-1 v with H written out as a matrix over all elements of the parameter."""
    n = len(seen)
    if "norm" in name:
        h = torch.stack([s[name] for s in seen]).square().mean(0)
        return v_COI / (h + 0.1 * h.mean())
    if name == EMBEDDING:
        columns = v_COI.shape[2]
        r, c = torch.zeros(v_COI.shape[1]).double(), torch.zeros(columns, columns).double()
        for s, tokens_S in zip(seen, token, strict=True):
            for a, g in zip(*s[name], strict=True):
                r += a.square().sum() * g.square() / n
                c += g.square().sum() * torch.outer(a, a) / n
            for place, u in zip(tokens_S, s["look-up"], strict=True):
                r[place] += u.square().sum() / n
                c += torch.outer(u, u) / n
        h = torch.kron(torch.diag(r), c / c.trace())
    else:
        a = torch.cat([s[name][0] for s in seen])
        g = torch.cat([s[name][1] for s in seen])
        big_g, big_a = g.T @ g / n, a.T @ a / len(a)
        h = torch.kron(big_g, big_a)
        if kind == "ekfac":
            q = torch.kron(torch.linalg.eigh(big_g)[1], torch.linalg.eigh(big_a)[1])
            each = torch.stack([(s[name][1].T @ s[name][0]).flatten() @ q for s in seen])
            h = q @ torch.diag(each.square().mean(0)) @ q.T
    h += 0.1 * h.trace() / len(h) * torch.eye(len(h))
    return torch.linalg.solve(h, v_COI.flatten(1).T).T.view_as(v_COI)


def _against_explicit(kind: str) -> tuple[dict[str, float], list[float], float]:
    tiny.MODEL = SMALL  # this fork's own
    with process_groups(ParallelConfig()) as context:
        gpt = tiny.build()
        v = tiny.directions(gpt, context)
        plain = {name: w.double() for name, w in v.items()}
        batches = _record_labels()
        _apply(kind, v, gpt, context)
        rows = [
            (tokens_S, labels_S)
            for batch in batches[: sum(-(-rows // MICRO_BATCH) for rows in ROWS)]
            for tokens_S, labels_S, mask_S in zip(
                batch.tokens_BS, batch.labels_BS, batch.loss_mask_BS, strict=True
            )
            if mask_S.any()
        ]
        assert len(rows) == sum(ROWS)
        seen = [_tokens(gpt, *row) for row in rows]
        worst = {}
        for name, w in plain.items():
            true = _explicit(kind, name, w, seen, [tokens_S for tokens_S, _ in rows])
            worst[name] = error(v[name].numpy(), true.numpy())
        effect_C = sum((v[n].double() * w).flatten(1).sum(1) for n, w in plain.items())
        true_labels = torch.from_numpy(np.concatenate(_windows())[:, 1:])
        same = (torch.stack([labels_S for _, labels_S in rows]) == true_labels).float().mean()
        return worst, effect_C.tolist(), float(same)


@pytest.mark.parametrize("kind", KINDS)
def test_directions_equal_the_explicit_inverse(kind: str) -> None:
    worst, effect_C, same = on_ranks(1, _against_explicit, kind)[0]
    assert len(worst) == 2 * 6 + 2
    assert {name: e for name, e in worst.items() if not e < 1e-4} == {}
    # H is positive definite: a step along H^-1 v lowers the loss that v is the gradient of.
    assert all(0 < effect < float("inf") for effect in effect_C)
    assert same < 0.5, "labels must be the model's own"


def _drawn(shape: tuple[int, int]) -> np.ndarray:
    with process_groups(ParallelConfig(tensor=2)):
        group = parallel_state.get_tensor_model_parallel_group()
        logits_NV, uniform_N = _predictions(shape)
        return draw(logits_NV.chunk(2, 1)[group.rank()], uniform_N, group).numpy()


def _predictions(shape: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=random), torch.rand(shape[0], generator=random, dtype=torch.float64)


def test_labels_are_drawn_from_the_predictions_of_all_shards() -> None:
    logits_NV, uniform_N = _predictions((500, 12))
    below_NV = torch.softmax(logits_NV.double(), 1).cumsum(1).numpy()
    true = [np.searchsorted(below, u, side="right") for below, u in zip(below_NV, uniform_N, strict=True)]
    for found in on_ranks(2, _drawn, (500, 12)):
        assert found.tolist() == true


def _scores(parallel: ParallelConfig, checkpoints: Path) -> dict[str, np.ndarray]:
    kfac._AT_ONCE = 100_000  # this fork's own: several groups of layers
    kfac._BLOCK = 10_000
    with process_groups(parallel) as context:
        gpt = tiny.build(parallel)
        ref = save_checkpoint(checkpoints, gpt, None, TrainState(), tiny.MODEL, "one", "")
        load_checkpoint(ref.path, gpt, None, tiny.MODEL)
        plain = tiny.directions(gpt, context)
        out = {"plain": tiny.scores(gpt, context, plain, tiny.windows())[0]}
        for kind in KINDS:
            v = dict(plain)
            _apply(kind, v, gpt, context)
            out[kind] = tiny.scores(gpt, context, v, tiny.windows())[0]
        return out


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("weights")


@pytest.fixture(scope="module")
def alone(weights: Path) -> dict[str, np.ndarray]:
    return on_ranks(1, _scores, ParallelConfig(), weights)[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_ranks_find_the_same(alone: dict[str, np.ndarray], weights: Path, layout: str) -> None:
    for found in on_ranks(2, _scores, LAYOUTS[layout], weights):
        assert {k: e for k in KINDS if not (e := error(found[k], alone[k])) < 1e-5} == {}


def test_the_two_forms_and_the_plain_directions_differ(alone: dict[str, np.ndarray]) -> None:
    assert (np.corrcoef([found.ravel() for found in alone.values()]) < 0.9995).sum() == 6


def _without_gradients() -> None:
    with process_groups(ParallelConfig()) as context:
        gpt = tiny.build()
        v = tiny.directions(gpt, context)
        with torch.no_grad():
            gpt.decoder.layers[1].mlp.linear_fc2.weight.zero_()
        _apply("kfac", v, gpt, context)


def test_a_layer_without_gradients_is_refused() -> None:
    with pytest.raises(RankFailedError, match=r"curvature=kfac: 7 examples have no gradient of .*linear_fc1"):
        on_ranks(1, _without_gradients)
