"""Phases under KL from a teacher: loss, layouts, resume, reports, refusals. Oracle: torch's own kl_div."""

from __future__ import annotations

import json
import os
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from megatron_r1.checkpoint.files import read_meta, saved_steps
from megatron_r1.config import Config, ObjectiveConfig, ParallelConfig
from megatron_r1.data.open import launched, open_data
from megatron_r1.model.divergence import FIGURES, DenseTarget, SparseTarget
from megatron_r1.parallel import ParallelContext, process_groups
from megatron_r1.records import Batch, TeacherRecords, TrainState
from megatron_r1.train import loop
from megatron_r1.train.batches import StepBatches
from megatron_r1.train.objective import Distillation
from megatron_r1.train.resume import check_teacher
from megatron_r1.train.step import build_training
from tests.distributed import on_ranks
from tests.launch import assert_same_tensors
from tests.train import small

V, STEPS, PASSES = 128, 6, 2
KD = "phases.one.objective={name: kd, teacher: table"


class Died(Exception):
    """A launch that ends between two steps, as by SIGKILL: nothing of it is saved or recorded."""


class Table:
    """A teacher whose next token depends on the last one alone, and whose weights are a seed."""

    tokens: int = V
    records: Any = None

    def __init__(self, seed: int = 0, spoiled: tuple[int, ...] = (), dies: int | None = None):
        self.identities = {"table": f"identity of {seed}"}
        random = torch.Generator().manual_seed(seed)
        self.hidden_VD, self.head_VD = (2 * torch.randn(V, 8, generator=random) for _ in range(2))
        self.spoiled, self.dies, self.calls = spoiled, dies, 0

    def logits(self, tokens_BS: Tensor) -> Tensor:
        return self.hidden_VD[tokens_BS] @ self.head_VD.t()

    def targets(self, context: ParallelContext) -> Any:
        rows = V // context.tensor_size
        mine_VD = self.head_VD[rows * context.tensor_rank :][:rows]

        def of(batch: Batch) -> DenseTarget:
            assert not torch.is_grad_enabled()
            self.calls += 1
            if self.calls == self.dies:
                raise Died
            hidden_ND = self.hidden_VD[batch.tokens_BS.t().flatten()]
            return DenseTarget(hidden_ND * torch.nan if self.calls in self.spoiled else hidden_ND, mine_VD)

        self.loaded = weakref.ref(of)
        return of


class Recorded(Table):
    """The same teacher by records, which four labels of five have, and none of the first `empty` batches."""

    def __init__(self, empty: int = 0, **how: Any):
        super().__init__(**how)
        self.empty, self.asked = empty, 0

    def records(self, source_B: np.ndarray, window_B: np.ndarray) -> tuple[TeacherRecords, np.ndarray]:
        self.asked += 1
        known_BS = (window_B[:, None] + source_B[:, None] + np.arange(32)) % 5 > 0
        none_BS1 = torch.zeros(*known_BS.shape, 1)
        none = TeacherRecords(none_BS1.int(), none_BS1, none_BS1[..., 0])
        return none, known_BS & (self.asked > self.empty)

    def targets(self, context: ParallelContext) -> Any:
        def of(batch: Batch) -> SparseTarget:
            assert batch.teacher is not None
            self.calls += 1
            log_NV = self.logits(batch.tokens_BS.t().flatten()).log_softmax(-1)
            ids_NV = torch.arange(V).expand(len(log_NV), -1)
            entropy_N = -(log_NV.exp() * log_NV).sum(-1)
            entropy_N = entropy_N * torch.nan if self.calls in self.spoiled else entropy_N
            return SparseTarget(ids_NV, log_NV.exp(), entropy_N, tail=False)

        return of


class After(Recorded):
    """One that is loaded only once another one is gone."""

    def __init__(self, before: Table):
        super().__init__()
        self.before, self.identities = before, {"table": "identity of 1"}

    def targets(self, context: ParallelContext) -> Any:
        assert self.before.loaded() is None
        return super().targets(context)


def config(root: Path, run: str, more: str = "}", *words: str) -> Config:
    fixed = ["train={probe_every: 100, micro_batch: 4}", "model.num_layers=2"]
    return small.config(root, run, STEPS, KD + more, *fixed, *words)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    return [line["loss"] for line in lines(run)]


def first_loss(given: Config, teacher: Table | None = None) -> tuple[float, dict[str, float]]:
    """Loss and figures of the first step from whole logits."""
    objective = given.phases["one"].objective
    assert objective is not None
    asked = teacher or Table()
    inverse, sums = 1 / objective.temperature, torch.zeros(5, dtype=torch.float64)
    with process_groups(given.parallel) as context:
        gpt = build_training(given).gpt
        batches = StepBatches(given, open_data(given, launched()), context)
        batches.records = asked.records
        for batch in batches.of_step(0):
            with torch.no_grad():
                student = gpt(batch.tokens_BS, batch.position_BS, batch.documents).double()
            theirs = asked.logits(batch.tokens_BS).double()
            log_q, log_p = (student * inverse).log_softmax(-1), (theirs * inverse).log_softmax(-1)
            kl_BS = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
            ce_BS = F.cross_entropy(student.flatten(0, 1), batch.labels_BS.flatten(), reduction="none")
            same_BS = student.argmax(-1) == theirs.argmax(-1)
            each = (kl_BS, ce_BS.view_as(kl_BS), -(log_p.exp() * log_p).sum(-1), same_BS)
            sums += torch.stack([(x * batch.loss_mask_BS).sum() for x in (*each, torch.ones_like(kl_BS))])
    assert (sums[4] < given.tokens_per_step()) == isinstance(teacher, Recorded)
    kl, ce, *others = (sums[:4] / sums[4]).tolist()
    loss = (1 - objective.weight) * ce + objective.weight * objective.temperature**2 * kl
    return loss, dict(zip(FIGURES, [kl, ce, *others], strict=True))


def _refused(given: Config, teachers: dict[str, Any], error: type[Exception] = ValueError) -> str:
    with pytest.raises(error) as caught:
        loop.train(given, teachers=teachers)
    return str(caught.value)


def _one_rank(root: Path) -> dict[str, Any]:
    """All launches of one rank, whose runs the tests read; what they compare besides."""
    # Each launch opens a store of its own.
    del os.environ["MASTER_PORT"]
    apart = "data={cross_documents: false, eod: 7}"
    mixed = config(root, "mixed", ", temperature: 2, weight: 0.75}", apart)
    loop.train(config(root, "plain"), teachers={"one": Table()})
    loop.train(mixed, teachers={"one": Table()})
    loop.train(config(root, "none", ", weight: 0}", "phases.one.steps=3"), teachers={"one": Table()})
    loop.train(config(root, "ce", "}", "phases.one={steps: 3, objective: null}"))
    two = config(
        root,
        "phases",
        "}",
        "phases.one={steps: 2, objective: null}",
        "phases.two={steps: 4, objective: {name: kd, teacher: table}}",
        "phases.three={steps: 2, objective: {name: kd, teacher: table}}",
        "phases.four={steps: 2}",
    )
    first = Table()
    out = {"no teacher": _refused(two, {"two": first})}
    third = After(first)
    loop.train(two, teachers={"two": first, "three": third})
    # No other phase asks.
    assert third.asked == 2 * PASSES
    killed = config(root, "killed")
    _refused(killed, {"one": Table(dies=PASSES * 5 + 2)}, Died)
    before = (root / "killed/metrics.jsonl").read_text()
    out["replaced"] = _refused(killed, {"one": Table(seed=1)})
    assert (root / "killed/metrics.jsonl").read_text() == before
    loop.train(killed, teachers={"one": Table()})
    out["spoiled"] = _refused(config(root, "spoiled"), {"one": Table(spoiled=(2,))})
    recorded = config(root, "recorded", "}", apart)
    loop.train(recorded, teachers={"one": Recorded()})
    spoiled = Recorded(empty=PASSES, spoiled=(2 * PASSES + 1,))
    loop.train(config(root, "left_out", "}", apart), teachers={"one": spoiled})
    out |= {"plain": first_loss(config(root, "plain")), "mixed": first_loss(mixed)}
    return out | {"recorded": first_loss(recorded, Recorded())}


LAYOUTS = {"data": "{}", "tensor": "{tensor: 2}", "sequence": "{tensor: 2, sequence: true}"}
LAYOUTS["context"] = "{context: 2}"


def _open_store_in(folder: Path) -> None:
    """Let the next launch of these ranks find its store by a file: the port of the last one may be taken."""
    folder.mkdir(exist_ok=True)
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / "attempt" / "error.json")


def _two_ranks(root: Path) -> None:
    for name, layout in LAYOUTS.items():
        _open_store_in(root / f"store_{name}")
        loop.train(config(root, name, "}", f"parallel={layout}"), teachers={"one": Table()})
    _open_store_in(root / "store")
    kd = ObjectiveConfig("kd", "table")
    with process_groups(ParallelConfig(pipeline=2)), pytest.raises(ValueError, match=r"parallel.pipeline=1"):
        Distillation(None, lambda _: None, V, kd)  # type: ignore[arg-type, return-value]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small.written(tmp_path_factory.mktemp("objective"), end=7)


@pytest.fixture(scope="module")
def one(root: Path) -> dict[str, Any]:
    return on_ranks(1, _one_rank, root)[0]


@pytest.mark.parametrize("run", ["plain", "mixed", "recorded"])
def test_the_first_loss_is_that_of_whole_logits(root: Path, one: dict[str, Any], run: str) -> None:
    loss, figures = one[run]
    line = lines(root / run)[0]
    assert line["loss"] == pytest.approx(loss, rel=1e-6)
    assert line["kd"] == pytest.approx(figures, rel=1e-5)


@pytest.mark.parametrize(("run", "temperature", "weight"), [("plain", 1, 1), ("mixed", 2, 0.75)])
def test_the_student_comes_closer_and_every_line_adds_up(
    root: Path, one: dict[str, Any], run: str, temperature: float, weight: float
) -> None:
    all_lines = lines(root / run)
    for line in all_lines:
        kd = line["kd"]
        whole = (1 - weight) * kd["ce"] + weight * temperature**2 * kd["kl"]
        assert line["loss"] == pytest.approx(whole, rel=1e-6)
        assert 0 <= kd["agreement"] <= 1
    assert all_lines[-1]["kd"]["kl"] < 0.95 * all_lines[0]["kd"]["kl"]


def test_weight_0_is_cross_entropy(root: Path, one: dict[str, Any]) -> None:
    assert losses(root / "none") == pytest.approx(losses(root / "ce"), rel=1e-6)
    # Of several micro-batches: each adds the head's gradient to the buffer once.
    norms = ([line["grad_norm"] for line in lines(root / run)] for run in ("none", "ce"))
    assert next(norms) == pytest.approx(next(norms), rel=1e-5)
    assert losses(root / "plain")[:3] != pytest.approx(losses(root / "ce"), rel=1e-2)
    assert all("kd" not in line for line in lines(root / "ce"))


def test_any_layout_has_the_losses_of_one_rank(root: Path, one: dict[str, Any]) -> None:
    on_ranks(2, _two_ranks, root)
    for layout in LAYOUTS:
        for line, want in zip(lines(root / layout), lines(root / "plain"), strict=True):
            for name in ("loss", "loss_by_source", "kd"):
                assert line[name] == pytest.approx(want[name], rel=1e-5, abs=1e-9), (layout, name)
            # Adam's first steps make much of rounding.
            within = 1e-6 if line["step"] == 1 else 1e-4
            assert line["grad_norm"] == pytest.approx(want["grad_norm"], rel=within), layout


def test_each_phase_has_its_objective_and_its_ledger_line_the_teacher(
    root: Path, one: dict[str, Any]
) -> None:
    assert one["no teacher"].startswith("phases.three.objective: train() got no teacher")
    assert ["kd" in line for line in lines(root / "phases")] == [False] * 2 + [True] * 6 + [False] * 2
    ledger = [json.loads(line) for line in (root / "phases/ledger.jsonl").read_text().splitlines()]
    learnt_from = {line["stage"]: line["inputs"].get("table") for line in ledger}
    assert learnt_from == {
        "train one": None,
        "train two": "identity of 0",
        "train three": "identity of 1",
        "train four": None,
    }
    # The guard compares a phase's losses with its own alone.
    state = read_meta(root / "phases/checkpoints/step_00000006")["state"]
    assert len(state["guard"]["accepted"]) == 4
    assert "teacher" not in read_meta(root / "phases/checkpoints/step_00000010")["state"]


def test_tensorboard_has_the_figures(root: Path, one: dict[str, Any]) -> None:
    events = EventAccumulator(str(root / "plain/tb"))
    events.Reload()
    shown = {name: [e.value for e in events.Scalars(f"kd/{name}")] for name in FIGURES}
    for name, values in shown.items():
        assert values == pytest.approx([line["kd"][name] for line in lines(root / "plain")], rel=1e-6)


def test_killed_within_the_phase_it_comes_to_the_same_bits(root: Path, one: dict[str, Any]) -> None:
    last = f"checkpoints/step_{STEPS:08d}"
    assert losses(root / "killed") == losses(root / "plain")
    assert_same_tensors(root / "killed" / last, root / "plain" / last)
    ledger = [json.loads(line) for line in (root / "killed/ledger.jsonl").read_text().splitlines()]
    assert [line["inputs"]["table"] for line in ledger] == ["identity of 0"] * 2


def test_a_teacher_that_was_replaced_within_the_phase_is_refused(one: dict[str, Any]) -> None:
    assert "phases.one.objective: table is not what the steps to " in one["replaced"]
    assert " learnt from: it has changed since; restore it, or name another path" in one["replaced"]


def test_a_cache_that_grew_is_told_and_another_header_refused() -> None:
    span: Any = SimpleNamespace(name="one", start=2)
    state = TrainState(step=3, teacher={"cache": "header+parts", "teacher": "weights"})
    (line,) = check_teacher(state, span, {"cache": "header+more", "teacher": "weights"})
    assert line.startswith("cache has other parts than at step 3")
    with pytest.raises(ValueError, match=r"one\.objective: cache is not what the steps to 3 learnt from"):
        check_teacher(state, span, {"cache": "other+parts"})
    # Of a phase before, or at another path.
    assert check_teacher(replace(state, step=2), span, {"cache": "other+parts"}) == []
    assert check_teacher(state, span, {"elsewhere": "other+parts", **state.teacher}) == []


def test_a_spoiled_teacher_ends_the_phase_at_its_first_step(root: Path, one: dict[str, Any]) -> None:
    assert "the teacher's logits are not finite (phases.one.objective)" in one["spoiled"]
    assert saved_steps(root / "spoiled/checkpoints") == []


def test_a_step_without_a_record_and_one_that_is_not_finite_are_left_out(
    root: Path, one: dict[str, Any]
) -> None:
    assert [line["skipped"] for line in lines(root / "left_out")] == [1, 0, 1, 0, 0, 0]
