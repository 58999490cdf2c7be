"""Bits per byte of gold answers are those of transformers, item by item, in any layout."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron_r1.checkpoint.load import load_weights
from megatron_r1.config import Config
from megatron_r1.data import gold
from megatron_r1.data.open import open_data
from megatron_r1.parallel import process_groups
from megatron_r1.train import loop
from megatron_r1.train.evaluate import Evaluation
from megatron_r1.train.step import build_training
from tests import gold_packages
from tests.data.test_gold import TOKENIZER, in_bytes
from tests.distributed import on_ranks
from tests.faults.inputs import call
from tests.train import small

SEQ = 256
"""Rows of 128 and of 256 labels. Some prompts are longer, and some answers."""
NAMES = ["humaneval", "mbpp"]


def config(root: Path, *words: str) -> Config:
    sets = [f"data.gold.{name}={root}/gold/{name}" for name in NAMES]
    return small.config(root, "run", 2, f"data.seq_length={SEQ}", "train.probe_every=1", *sets, *words)


def made(root: Path) -> dict[str, list[gold.Item]]:
    with pytest.MonkeyPatch.context() as patch:
        gold_packages.install(root / "packages", patch)
        return {name: gold.items(name)[:60] for name in NAMES}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two steps of one rank, with some of the items."""
    root = small.written(tmp_path_factory.mktemp("gold"), end=7)
    items = made(root)
    with pytest.MonkeyPatch.context() as patch:
        gold_packages.install(root / "packages", patch)
        patch.setattr(gold, "items", items.__getitem__)
        gold.prepare(NAMES, root / "gold", in_bytes, TOKENIZER)
    on_ranks(1, loop.train, config(root))
    return root


@pytest.fixture(scope="module")
def expected(root: Path) -> dict[str, float]:
    """A loop over the made items. A long item is cut from its end, into rows of SEQ labels."""
    import torch
    from transformers import AutoModelForCausalLM

    status, text = call(
        "convert_checkpoint", "--to", "hf", root / "run/checkpoints/step_00000002", root / "hf"
    )
    assert status == 0, text
    model, out, longest = AutoModelForCausalLM.from_pretrained(root / "hf").double().eval(), {}, 0
    for name in NAMES:
        nats = size = 0
        for item in made(root)[name]:
            tokens, prompt = torch.tensor([list((item.prompt + item.gold).encode())]), len(item.prompt)
            end, longest = tokens.shape[1], max(longest, len(item.gold))
            while end > prompt:
                row = tokens[:, max(0, end - 1 - SEQ) : end]
                counted = min(SEQ, end - prompt)
                with torch.no_grad():
                    logp = model(row[:, :-1]).logits[0, -counted:].log_softmax(-1)
                nats -= float(logp.gather(1, row[0, -counted:, None]).sum())
                end -= counted
            size += len(item.gold)
        out[name] = nats / math.log(2) / size
    assert longest > SEQ
    return out


def measured(config: Config, checkpoint: Path) -> dict[str, float]:
    """On this rank: what an evaluation says of a checkpoint's weights."""
    data = open_data(config)
    with process_groups(config.parallel) as context:
        training = build_training(config)
        load_weights(checkpoint, training.gpt, training.optimizer, config.model, None)
        line = Evaluation(config, data, training, context).measure()
        assert line.keys() == {"probe_nll", "rank_me", "gold_bpb"} if config.data.probes else {"gold_bpb"}
        found: dict[str, float] = line["gold_bpb"]
        return found


def test_metrics_and_tensorboard_have_them(root: Path, expected: dict[str, float]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = [json.loads(line) for line in (root / "run/metrics.jsonl").read_text().splitlines()]
    assert [set(line.get("gold_bpb", ())) for line in lines] == [set(NAMES)] * 2
    assert lines[1]["gold_bpb"] == pytest.approx(expected, rel=2e-6)
    # Each value is of its own set and step.
    assert len({f"{v:.3f}" for line in lines for v in line["gold_bpb"].values()}) == 4
    board = EventAccumulator(str(root / "run/tb")).Reload()
    (last,) = [event.value for event in board.Scalars("gold_bpb/mbpp") if event.step == 2]
    assert last == pytest.approx(expected["mbpp"], rel=1e-5)


LAYOUTS = {
    "other micro-batch, documents apart": (
        1,
        ["train.micro_batch=4", "data={cross_documents: false, eod: 7}"],
    ),
    "data": (2, []),
    "tensor and sequence": (2, ["parallel={tensor: 2, sequence: true}"]),
    "interleaved": (2, ["parallel={pipeline: 2, virtual_pipeline: 2}"]),
    "context": (2, ["parallel.context=2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_measures_the_same(root: Path, expected: dict[str, float], layout: str) -> None:
    ranks, words = LAYOUTS[layout]
    given = config(root, "data.probes={}", *words)
    for found in on_ranks(ranks, measured, given, root / "run/checkpoints/step_00000002"):
        assert found == pytest.approx(expected, rel=2e-6)
