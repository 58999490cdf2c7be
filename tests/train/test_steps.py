"""What a run does besides stepping: bad steps, lost data, a phase that forgets."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.config import Config
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter, open_corpus
from megatron_r1.run import ledger
from megatron_r1.system.files import sha256
from megatron_r1.train import loop
from megatron_r1.train.health import TooManyBadStepsError, UnreadableDataError
from tests.distributed import RankFailedError, on_ranks
from tests.train import small
from tests.train.small import figures

STEPS = 6
RARE = ["model.num_layers=2", "train.checkpoint_every=100", "train.probe_every=100"]


def config(root: Path, run: str, *more: str) -> Config:
    return small.config(root, run, STEPS, *more)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = small.written(tmp_path_factory.mktemp("steps"))
    on_ranks(1, loop.train, config(root, "one"))
    return root


def _with_bad_steps(config: Config, bad: dict[int, float]) -> None:
    """Train, but in these steps (from 1) the final norm is multiplied, so that the loss is."""
    took = loop.train_step

    def spoiling(training: Any, batches: Any, passes: int, *rest: Any, **more: Any) -> Any:
        factor = bad.get(spoiling.step, 1.0)  # type: ignore[attr-defined]
        spoiling.step += 1  # type: ignore[attr-defined]
        if factor != 1.0:
            weight = training.last.decoder.final_layernorm.weight
            kept = weight.detach().clone()
            weight.data.mul_(factor)
            result = took(training, batches, passes, *rest, **more)
            weight.data.copy_(kept)
            return result
        return took(training, batches, passes, *rest, **more)

    spoiling.step = 1  # type: ignore[attr-defined]
    loop.train_step = spoiling
    loop.train(config)


def test_a_bad_step_is_left_out_and_said(root: Path) -> None:
    on_ranks(2, _with_bad_steps, config(root, "bad", "health.max_skipped=2"), {3: float("nan")})
    lines = [json.loads(line) for line in (root / "bad" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped"] for line in lines] == [0, 0, 1, 0, 0, 0]
    assert all(np.isfinite(line["loss"]) for line in lines if not line["skipped"])
    # Its samples are gone by; the weights are those of before.
    assert [line["samples"] for line in lines] == [8, 16, 24, 32, 40, 48]


def test_too_many_bad_steps_end_the_run_with_a_checkpoint(root: Path) -> None:
    bad = dict.fromkeys((4, 5), float("inf"))
    with pytest.raises(RankFailedError, match=TooManyBadStepsError.__name__):
        on_ranks(2, _with_bad_steps, config(root, "worse", "health.max_skipped=2"), bad)
    saved = checkpoint_files.complete_checkpoints(root / "worse" / "checkpoints")
    assert [ref.step for ref in saved] == [2, 4, 5]
    # The samples of the bad steps are gone by, so the same command goes on behind them.
    on_ranks(2, loop.train, config(root, "worse", "health.max_skipped=2"))
    lines = [json.loads(line) for line in (root / "worse" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["skipped"]) for line in lines] == [
        (1, 0), (2, 0), (3, 0), (4, 1), (5, 1), (6, 0)
    ]  # fmt: skip


def _in_order(config: Config) -> list[str]:
    """Train: which steps were enqueued, and when the result of each was asked for."""
    took, order = loop.train_step, []

    def noting(*rest: Any, **more: Any) -> Any:
        number, result = len([word for word in order if word[0] == "+"]) + 1, took(*rest, **more)
        order.append(f"+{number}")

        def asked() -> Any:
            order.append(f"={number}")
            return result()

        return asked

    loop.train_step = noting
    loop.train(config)
    return order


def test_a_result_is_read_behind_the_next_step_but_where_it_is_needed(root: Path) -> None:
    """Needed at the first step, measurements (5, 10), a save (8), the last step, and where a run may stop."""
    words = ["model.num_layers=1", "train.checkpoint_every=8", "train.probe_every=5"]
    (order,) = on_ranks(1, _in_order, small.config(root, "in order", 11, *words))
    assert " ".join(order) == "+1 =1 +2 +3 =2 +4 =3 +5 =4 =5 +6 +7 =6 +8 =7 =8 +9 +10 =9 =10 +11 =11"
    # Any bad step may stop this run: no step is taken before the last one is judged.
    (order,) = on_ranks(1, _in_order, small.config(root, "one by one", 5, *words, "health.max_skipped=1"))
    assert " ".join(order) == "+1 =1 +2 =2 +3 =3 +4 =4 +5 =5"
    lines = [json.loads(line) for line in (root / "in order" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 12))
    assert all(line["seconds"] > 0 for line in lines)
    told = (root / "in order" / "logs" / "rank_00000.log").read_text()
    assert re.findall(r"step (\d+) \|", told) == [str(step) for step in range(1, 12)]


def _counting(config: Config) -> None:
    """Train, but each step's count of windows of one id is its number."""
    steps = itertools.count(1)
    loop.StepBatches.one_id_windows = lambda of: next(steps)  # type: ignore[method-assign]
    loop.train(config)


def test_a_line_has_the_windows_of_one_id_of_the_step_before(root: Path) -> None:
    on_ranks(1, _counting, config(root, "one id", *RARE, "model.num_layers=1"))
    lines = [json.loads(line) for line in (root / "one id" / "metrics.jsonl").read_text().splitlines()]
    assert [line.get("one_id_windows", 0) for line in lines] == list(range(STEPS))


def _with_rates(config: Config, factor: dict[int, float]) -> None:
    """Train, but in these steps (from 1) the learning rate is multiplied."""
    took, begun = loop.set_schedule, []

    def schedule(optimizer: Any, lr: float, weight_decay: float) -> None:
        begun.append(lr)
        took(optimizer, lr * factor.get(len(begun), 1.0), weight_decay)

    loop.set_schedule = schedule
    loop.train(config)


def test_masks_and_the_last_wait_are_in_ledger_and_metrics(root: Path) -> None:
    mask = root / "mask.npy"
    windows = open_corpus("a", root / "a").windows(32)
    np.save(mask, np.arange(windows) % 2 == 0)
    words = [*RARE, f"phases.one.keep={{a: {mask}}}"]
    on_ranks(1, loop.train, config(root, "masked", *words))
    lines = [json.loads(line) for line in (root / "masked" / "metrics.jsonl").read_text().splitlines()]
    kept = -(-windows // 2) / windows
    assert [line["kept_by_source"] for line in lines] == [{"a": kept}] * STEPS
    # Nothing was written while the last step was taken, and its checkpoint was waited for.
    assert lines[-1]["saving_seconds"] > 1e-3
    (stage,) = ledger.read(root / "masked")
    assert stage["inputs"][str(mask)] == sha256(mask)
    assert stage["seconds"] > sum(line["seconds"] + line["saving_seconds"] for line in lines)
    unmasked = (root / "one" / "metrics.jsonl").read_text()
    assert "kept_by_source" not in unmasked


def test_a_run_outlives_a_bad_update(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The guard before skipped steps 18 to 27 here, because the weights stayed bad, and then stopped."""
    words = [*RARE, "health.grad_norm_spike=3"]
    on_ranks(1, _with_rates, small.config(root, "outlives", 40, *words), {17: 30.0})
    losses = [of[0] for of in figures(root / "outlives").values()]
    assert losses[17] > losses[15] + 3 and losses[-1] < losses[10] < losses[17]
    told = re.search(r"step 18, samples 136 to 143: (.*)", capsys.readouterr().out)
    assert told and re.fullmatch(
        r"gradient norm \S+ is \S+ times the usual \S+; taken .optimizer.clip_grad=1.", told[1]
    )


def test_a_loss_that_stays_high_stops_the_run_with_ways_on(root: Path) -> None:
    """Cut before and gone on with, it stops at the same step. Then by each way that the message names."""
    rates, rare = (
        dict.fromkeys(range(41, 200), 100.0),
        [*RARE, "train.checkpoint_every=30", "model.num_layers=1"],
    )
    with pytest.raises(RankFailedError) as failed:
        on_ranks(1, _with_rates, small.config(root, "risen", 80, *rare), rates)
    steps = figures(root / "risen")
    stop = max(steps)
    message = re.search(r"TooManyBadStepsError: (.*)", str(failed.value))
    assert message and 45 < stop < 75 and not any(math.isnan(of[0]) for of in steps.values())
    directory = root / "risen" / "checkpoints"
    ways = (
        rf"nats above the phase's best, .* \(health.loss_spike=0.2\); {directory}/step_{stop:08d} is saved.*"
    )
    ways += rf"checkpoints after {directory}/step_00000030 away and lower phases.one.learning_rate"
    assert re.search(ways, message[1])
    # The same decisions over a cut, whichever steps a launch began with.
    with pytest.raises(RankFailedError, match="TooManyBadStepsError"):
        on_ranks(1, _with_rates, small.config(root, "cut", 46, *rare), rates)
        later = {step - 46: rate for step, rate in rates.items()}
        on_ranks(1, _with_rates, small.config(root, "cut", 80, *rare), later)
    assert {n: of[:2] for n, of in figures(root / "cut").items()} == {n: of[:2] for n, of in steps.items()}
    # On from here, whatever the loss.
    words = re.search(r"with (health\S+ health\S+) it does not", message[1])
    assert words
    shutil.copytree(root / "risen", root / "on")
    on_ranks(1, _with_rates, small.config(root, "on", 80, *rare, *words[1].split()), rates)
    assert max(figures(root / "on")) == 80
    # Back, with a lower rate.
    shutil.rmtree(directory / f"step_{stop:08d}")
    on_ranks(2, loop.train, small.config(root, "risen", 80, *rare, "phases.one.learning_rate=0.005"))
    assert figures(root / "risen")[80][0] < steps[35][0]


def _with_lost_files(config: Config, step: int) -> None:
    """Train, but from this step on (from 0) the second rank reads no data, and the first from the next on."""
    from megatron_r1.data.loader import BatchLoader

    read = BatchLoader.batch

    def failing(loader: BatchLoader, sample_N: np.ndarray) -> Any:
        second = sample_N[0] // 2 % 2 == 1
        if sample_N[0] >= (step if second else step + 1) * 8:
            raise OSError(5, "Input/output error", "web.bin" if second else "later.bin")
        return read(loader, sample_N)

    BatchLoader.batch = failing  # type: ignore[method-assign]
    loop.train(config)


def test_data_that_one_rank_cannot_read_ends_all_with_a_checkpoint(root: Path) -> None:
    """The next step is under way by then. It changes nothing, and what is lost there is not named."""
    with pytest.raises(RankFailedError) as failed:
        on_ranks(2, _with_lost_files, config(root, "lost", "train.checkpoint_every=100"), 3)
    said = str(failed.value)
    assert "error: 'web.bin'" in said and "error: 'later.bin'" not in said
    if UnreadableDataError.__name__ in said:
        assert "rank 1 could not read its part of step 4, samples 24 to 31: " in said
    assert [ref.step for ref in checkpoint_files.complete_checkpoints(root / "lost" / "checkpoints")] == [3]
    lines = [json.loads(line) for line in (root / "lost" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3]
    on_ranks(2, loop.train, config(root, "lost", "train.checkpoint_every=100"))
    straight, resumed = figures(root / "one"), figures(root / "lost")
    assert resumed[STEPS] == pytest.approx(straight[STEPS], rel=1e-5)


def test_a_run_whose_first_step_is_lost_begins_again(root: Path) -> None:
    """Its checkpoint at step 0 has moments, of zeros, as no step was taken."""
    with pytest.raises(RankFailedError, match=r"error: 'web\.bin'"):
        on_ranks(2, _with_lost_files, config(root, "lost at once", "train.checkpoint_every=100"), 0)
    on_ranks(2, loop.train, config(root, "lost at once", "train.checkpoint_every=100"))
    straight, again = figures(root / "one"), figures(root / "lost at once")
    assert list(again) == list(straight) and again[STEPS] == pytest.approx(straight[STEPS], rel=1e-5)


def test_a_phase_may_forget_the_moments(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["phases.one.steps=4", "phases.two={steps: 2, learning_rate: 0.01, decay: constant}"]
    on_ranks(1, loop.train, config(root, "forgets", *words, "phases.two.reset_optimizer=true"))
    on_ranks(1, loop.train, config(root, "keeps", *words))
    one, forgets, keeps = (figures(root / run) for run in ("one", "forgets", "keeps"))
    assert keeps[6] == pytest.approx(one[6], rel=1e-4)
    assert forgets[5][0] == keeps[5][0]
    assert abs(forgets[6][0] - keeps[6][0]) > 0.01
    # Cut where the phase begins, and begun again: the same.
    on_ranks(1, loop.train, config(root, "cut there", "phases.one.steps=4"))
    # The past stays, whatever its phase now says; an older checkpoint that was damaged since is no obstacle.
    (root / "cut there" / "checkpoints" / "step_00000002" / checkpoint_files.META).write_text("{")
    capsys.readouterr()
    edited = [*words, "phases.two.reset_optimizer=true", "phases.one.learning_rate=0.5"]
    on_ranks(1, loop.train, config(root, "cut there", *edited))
    output = capsys.readouterr().out
    assert "phases.one: learning_rate 0.01 -> 0.5; the phase is over, so this has no effect" in output
    assert "warning: step_00000002 cannot be read" in output
    assert figures(root / "cut there")[6] == forgets[6]


def test_a_run_begins_with_the_weights_of_another(root: Path) -> None:
    """The same weights, another context, a first step: the loss is that of the weights, Adam is at step 1."""
    start = f"train.init_weights={root}/one/checkpoints/step_00000006"
    for precision in ("fp32", "bf16"):
        words = [start, f"train.precision={precision}", "model.rotary_base=5e5", "phases.one.steps=1"]
        on_ranks(2, loop.train, config(root, f"tuned {precision}", *words))
        begun = figures(root / f"tuned {precision}")[1][0]
        fresh = figures(root / "one")[1][0]
        assert begun < fresh - 0.3
        (line,) = (root / f"tuned {precision}" / "metrics.jsonl").read_text().splitlines()
        assert json.loads(line)["samples"] == 8
    with pytest.raises(RankFailedError, match="holds another model: hidden_size 64 there, 128 here"):
        on_ranks(1, loop.train, config(root, "wider", start, "model.hidden_size=128"))


def test_data_made_again_is_refused(root: Path) -> None:
    """Other documents in as many windows: nothing but their identity can tell."""
    small.written(root / "copy")
    words = [f"data.sources.{name}.prefix={root}/copy/{name}" for name in "ab"]
    on_ranks(1, loop.train, config(root, "drawn", *words, "phases.one.steps=2"))
    whole = IndexedDataset(root / "copy" / "a")
    documents = [whole[n].copy() for n in range(len(whole))]
    with IndexedWriter(root / "copy" / "a", np.uint16) as writer:
        for tokens in reversed(documents):
            writer.add_document(tokens)
    with pytest.raises(RankFailedError, match="the datasets of a are not those that"):
        on_ranks(1, loop.train, config(root, "drawn", *words))


def test_a_group_that_the_first_rank_has_nothing_of_resumes_with_its_steps(root: Path) -> None:
    """Pipeline 2, a feed-forward that fills the first rank's shard: norms lie on the other alone."""
    wide = ["model.num_layers=2", "model.ffn_hidden_size=2048", "parallel.pipeline=2", "train.micro_batch=1"]
    words = [*wide, "train.checkpoint_every=3"]
    on_ranks(4, loop.train, config(root, "straight", *words))
    on_ranks(4, loop.train, config(root, "resumed", *words, "phases.one.steps=3"))
    on_ranks(4, loop.train, config(root, "resumed", *words))
    straight, resumed = figures(root / "straight"), figures(root / "resumed")
    assert {step: values[:2] for step, values in resumed.items()} == {
        step: values[:2] for step, values in straight.items()
    }
