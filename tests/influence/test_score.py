"""Scoring a run: layout of the store, kills, other ranks, refusals."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_r1 import backend, config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.config import Config, ParallelConfig, SourceConfig
from megatron_r1.config_io import ConfigError
from megatron_r1.data.indexed import IndexedDataset, identity_of, open_corpus
from megatron_r1.data.windows import choose
from megatron_r1.influence import directions
from megatron_r1.influence import engine as engine_module
from megatron_r1.influence import score as score_module
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.parameters import select
from megatron_r1.influence.plan import estimate, examples_left, lay_plan
from megatron_r1.influence.score import compute_influence, measured_estimate
from megatron_r1.influence.store import ScoreStore, read_scores, write_parquet
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import process_groups
from megatron_r1.records import ScoreTable
from megatron_r1.run import stage
from megatron_r1.run.ledger import read as read_ledger
from megatron_r1.system.files import sha256
from tests import launch
from tests.distributed import RankFailedError, on_ranks
from tests.influence import tiny
from tests.influence.conftest import SEQ


def copied(config: Config, root: Path) -> Config:
    """The same run, unscored, somewhere else."""
    shutil.copytree(Path(config.train.run) / "checkpoints", root / "run" / "checkpoints")
    return changed(config, train={"run": str(root / "run")})


def changed(config: Config, **sections: dict[str, Any]) -> Config:
    parts = {name: dataclasses.replace(getattr(config, name), **values) for name, values in sections.items()}
    return dataclasses.replace(config, **parts)


def tables(config: Config) -> list[ScoreTable]:
    return read_scores(Path(config.train.run))


@pytest.fixture(scope="module")
def whole(trained: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Scored on one rank in one go: the reference."""
    config = copied(trained, tmp_path_factory.mktemp("whole"))
    on_ranks(1, compute_influence, config)
    return config


def test_the_store_is_as_documented(whole: Config) -> None:
    a, b = tables(whole)
    assert (a.source, b.source) == ("a", "b")
    assert a.capabilities == ("code", "math") and a.steps == (2, 4)
    assert a.score_NCK.shape == (50, 2, 2) and a.score_NCK.dtype == np.float32
    assert (a.length_N == SEQ).all() and (np.diff(a.example_N) > 0).all()
    # b trains on its first three documents: only their windows are candidates, and all of them.
    dataset = IndexedDataset(whole.data.sources["b"].prefix)
    assert b.example_N.tolist() == list(range((dataset.tokens_before(3) - 1) // SEQ))
    directory = Path(whole.train.run) / "influence" / "step_00000004" / "a"
    assert sorted(p.name for p in directory.iterdir()) == [
        "examples.npy", "losses.npy", "manifest.json", "scores.npy", "tokens.npy", "written.npy",
    ]  # fmt: skip
    assert np.load(directory / "written.npy").all()
    losses = np.load(directory / "losses.npy")
    assert losses.dtype == np.float32 and (losses > 0).all()
    stages = [(line["stage"], line["tokens"]) for line in read_ledger(Path(whole.train.run))]
    tokens = (len(a.example_N) + len(b.example_N) + 24) * SEQ
    assert stages == [("influence step 2", tokens), ("influence step 4", tokens)]


def test_sources_help_their_own_capability(whole: Config) -> None:
    """`code` follows the walk of source a, `math` that of b."""
    a, b = (t.score_NCK.mean((0, 2)) for t in tables(whole))
    assert a[0] > a[1] and b[1] > b[0]


def test_done_work_answers_at_once(whole: Config, capfd: pytest.CaptureFixture[str]) -> None:
    on_ranks(2, _scored_without_a_model, whole)
    assert "scored before, steps [2, 4]" in capfd.readouterr().out


def _scored_without_a_model(config: Config) -> None:
    engine_module.build_model = None  # type: ignore[assignment]  # this fork's own
    compute_influence(config)


def _killed_at(config: Config, write: int, half: bool) -> None:
    """Score until the store is to be written for the nth time; `half`: rows are there, their flags not."""
    count, original = 0, ScoreStore.write

    def counted(store: ScoreStore, first: int, results: dict[str, np.ndarray]) -> int:
        nonlocal count
        count += 1
        if count == write:
            if half:
                store._results["scores"][first : first + 3] = results["scores"][:3]
                store._results["scores"].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return original(store, first, results)

    ScoreStore.write = counted  # type: ignore[method-assign]  # this fork's own
    compute_influence(config)


def _counted(config: Config) -> int:
    """Rows computed by a start."""
    rows, original = 0, ScoreStore.write

    def counted(store: ScoreStore, first: int, results: dict[str, np.ndarray]) -> int:
        nonlocal rows
        rows += len(results["scores"])
        return original(store, first, results)

    ScoreStore.write = counted  # type: ignore[method-assign]  # this fork's own
    compute_influence(config)
    return rows


def test_killed_and_started_again_gives_the_same_bits(whole: Config, trained: Config, tmp_path: Path) -> None:
    config = copied(trained, tmp_path)
    for write, half in ((1, False), (3, True), (2, False)):
        with pytest.raises(RankFailedError, match="-9"):
            on_ranks(1, _killed_at, config, write, half)
    # 0 + 2 + 1 chunks of 16 rows are there; 50 rows of a are 4 chunks.
    total = 2 * sum(len(t.example_N) for t in tables(whole))
    assert on_ranks(1, _counted, config) == [total - 3 * 16]
    for ours, theirs in zip(tables(config), tables(whole), strict=True):
        assert np.array_equal(ours.score_NCK, theirs.score_NCK)
        assert np.array_equal(ours.example_N, theirs.example_N)


def _probing_sets_passed(config: Config) -> int:
    """How many mean gradients a start computes."""
    count, original = 0, Engine.mean_gradient

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    Engine.mean_gradient = counted  # type: ignore[method-assign]  # this fork's own
    compute_influence(config)
    return count


def test_directions_outlive_a_kill_and_go_when_all_is_scored(
    whole: Config, trained: Config, tmp_path: Path
) -> None:
    config = copied(trained, tmp_path)
    with pytest.raises(RankFailedError):
        on_ranks(2, _killed_at, config, 2, False)
    kept = tmp_path / "run/influence/step_00000002/.directions"
    assert len(list(kept.glob("*/*.pt"))) == 2
    # Those of the other checkpoint's two capabilities are left; another layout would add up otherwise.
    shutil.copytree(tmp_path / "run", tmp_path / "other/run")
    other = changed(config, train={"run": str(tmp_path / "other/run")})
    assert on_ranks(2, _probing_sets_passed, config) == [2, 2]
    assert on_ranks(1, _probing_sets_passed, other) == [4]
    assert not kept.exists()
    for ours, theirs in zip(tables(config), tables(whole), strict=True):
        scale = np.abs(theirs.score_NCK).max()
        np.testing.assert_allclose(ours.score_NCK, theirs.score_NCK, rtol=1e-5, atol=1e-6 * scale)


def test_two_ranks_score_alike_and_go_on_after_a_kill(whole: Config, trained: Config, tmp_path: Path) -> None:
    config = copied(trained, tmp_path)
    with pytest.raises(RankFailedError):
        on_ranks(2, _killed_at, config, 2, True)
    # Left over by one rank, taken over by two.
    on_ranks(2, compute_influence, config)
    for ours, theirs in zip(tables(config), tables(whole), strict=True):
        scale = np.abs(theirs.score_NCK).max()
        np.testing.assert_allclose(ours.score_NCK, theirs.score_NCK, rtol=1e-5, atol=1e-6 * scale)


@pytest.mark.parametrize(
    ("section", "values", "names"),
    [
        ("influence", {"seed": 5}, ["influence.seed (1234 there, 5 here)"]),
        ("influence", {"examples": 40}, ["influence.examples"]),
        ("data", {"seq_length": 16}, ["seq_length"]),
        ("data", {"sources": "a2"}, ["data.hash"]),
        ("influence", {"directions": "swapped"}, ["capabilities", "directions.code"]),
    ],
)
def test_changed_inputs_are_refused_by_name(
    whole: Config, section: str, values: dict[str, Any], names: list[str]
) -> None:
    root = Path(whole.data.sources["a"].prefix).parent
    if values == {"sources": "a2"}:
        launch.write_corpus(root / "a2", 40, seed=9)
        values = {"sources": {**whole.data.sources, "a": SourceConfig(f"{root}/a2")}}
    if values == {"directions": "swapped"}:
        values = {"directions": {"math": f"{root}/math", "code": f"{root}/math"}}
    before = tables(whole)
    with pytest.raises(RankFailedError) as refused:
        on_ranks(1, compute_influence, changed(whole, **{section: values}))
    message = str(refused.value)
    assert "influence/step_00000002/a holds scores of other inputs" in message and "remove" in message
    assert all(name in message for name in names), message
    for old, new in zip(before, tables(whole), strict=True):
        assert np.array_equal(old.score_NCK, new.score_NCK)


def test_other_weights_are_refused(whole: Config, tmp_path: Path) -> None:
    shutil.copytree(whole.train.run, tmp_path / "run")
    config = changed(whole, train={"run": str(tmp_path / "run")})
    first, last = (tmp_path / f"run/checkpoints/step_0000000{step}" for step in (2, 4))
    shutil.rmtree(first)
    shutil.copytree(last, first)
    with pytest.raises(RankFailedError, match="other inputs: weights"):
        on_ranks(1, compute_influence, config)


def test_scores_of_an_earlier_version_are_read_and_not_continued(whole: Config, tmp_path: Path) -> None:
    """Format 2 has the same scores, and hashes that cannot be compared."""
    shutil.copytree(whole.train.run, tmp_path / "run")
    for path in (tmp_path / "run/influence").glob("*/*/manifest.json"):
        former = {**json.loads(path.read_text()), "format": 2, "weights": "w", "data": {"hash": "d"}}
        path.write_text(json.dumps(former))
    config = changed(whole, train={"run": str(tmp_path / "run")})
    for former, now in zip(tables(config), tables(whole), strict=True):
        assert np.array_equal(former.score_NCK, now.score_NCK)
    message = r"a holds scores of an earlier version \(format 2, where 3 .* or use another train\.run"
    with pytest.raises(RankFailedError, match=message):
        on_ranks(1, compute_influence, config)
    with pytest.raises(ValueError, match=message):
        examples_left(lay_plan(config))
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="has format 1, where 2 and 3 are known; remove"):
        tables(config)
    path.write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        tables(config)


def test_a_source_that_appears_later_is_scored_and_the_rest_is_kept(
    trained: Config, whole: Config, tmp_path: Path
) -> None:
    config = copied(trained, tmp_path)
    on_ranks(1, compute_influence, changed(config, data={"sources": {"a": config.data.sources["a"]}}))
    assert [t.source for t in tables(config)] == ["a"]
    rows = 2 * len(tables(whole)[1].example_N)
    assert on_ranks(1, _counted, config) == [rows]


def influence_mistakes(config: Config, ranks: int | None = None) -> list[str]:
    try:
        lay_plan(config, ranks)
    except ConfigError as error:
        return error.mistakes
    return []


def test_mistakes_come_together_and_say_the_way_out(whole: Config, tmp_path: Path) -> None:
    assert influence_mistakes(whole) == []
    wrong = changed(
        whole,
        influence={
            "steps": [2, 3],
            "directions": {"x": f"{tmp_path}/x"},
            "norms": True,
            "layers": ["linears"],
        },
        parallel={"context": 2},
    )
    text = "\n".join(influence_mistakes(wrong))
    for part in (
        "influence.steps=[3]: no such checkpoints",
        "has [2, 4]",
        f"influence.directions.x: {tmp_path}/x.idx does not exist",
        "set parallel.context=1",
        "influence.layers='linears' selects no parameter; did you mean linear?",
    ):
        assert part in text, text
    assert "launch a multiple of 2" in influence_mistakes(changed(whole, parallel={"tensor": 2}), 3)[0]
    with pytest.raises(ConfigError, match="no checkpoint to score yet"):
        compute_influence(changed(whole, train={"run": str(tmp_path / "none")}))
    with pytest.raises(ConfigError, match="influence: missing section"):
        compute_influence(dataclasses.replace(whole, influence=None))


def test_measured_curvature_belongs_to_the_sources_it_was_measured_on(whole: Config) -> None:
    """Another source, or another order, makes another H: scores of the two must not be compared."""
    sources = list(whole.data.sources.items())
    turned = changed(whole, data={"sources": dict(reversed(sources))})
    for curvature, same in (("identity", True), ("adam", True), ("datainf", False), ("kfac", False)):
        deciding = [
            {p.corpus.name: p.inputs["influence"] for p in lay_plan(c).parts(2, "weights", curvature)}
            for c in (whole, turned)
        ]
        assert (deciding[0] == deciding[1]) is same


def test_an_empty_probing_set_is_refused(whole: Config, tmp_path: Path) -> None:
    launch.write_corpus(tmp_path / "empty", 0, seed=0)
    wrong = changed(whole, influence={"directions": {"code": f"{tmp_path}/empty"}})
    assert "0 tokens are less than one window" in influence_mistakes(wrong)[0]


def test_weights_that_are_not_finite_write_nothing(trained: Config, tmp_path: Path) -> None:
    config = copied(trained, tmp_path)
    with pytest.raises(RankFailedError, match="direction of code at step 2 is not finite"):
        on_ranks(1, _with_nan_weights, config)
    assert list((tmp_path / "run" / "influence").glob("step_*")) == []


def _with_nan_weights(config: Config) -> None:
    load = directions.load_checkpoint

    def damaged(path: Path, gpt: Any, optimizer: Any, model: Any) -> Any:
        state = load(path, gpt, optimizer, model)
        next(gpt.parameters()).data.fill_(float("nan"))
        return state

    directions.load_checkpoint = damaged  # this fork's own
    compute_influence(config)


def test_incomplete_scores_are_not_read(whole: Config, tmp_path: Path) -> None:
    shutil.copytree(whole.train.run, tmp_path / "run")
    written = tmp_path / "run/influence/step_00000004/b/written.npy"
    flags = np.load(written)
    flags[-1] = False
    np.save(written, flags)
    assert [t.steps for t in read_scores(tmp_path / "run")] == [(2,), (2,)]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("manifest.json", b'{"format": 3', r"manifest\.json is damaged .*; remove .*/b and score again"),
        ("manifest.json", b"[]", r"manifest\.json is damaged"),
        ("manifest.json", b'{"format": 3}', r"is damaged \(it lacks source, step, position, capabilities\)"),
        ("manifest.json", b'{"format": 9}', r"has format 9, where 2 and 3 are known; remove"),
        ("written.npy", b"\x93NUMPY", r"written\.npy is damaged .*; remove its folder and score again"),
    ],
)
def test_damaged_scores_are_named(
    whole: Config, tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    shutil.copytree(whole.train.run, tmp_path / "run")
    config = changed(whole, train={"run": str(tmp_path / "run")})
    (tmp_path / "run/influence/step_00000004/b" / name).write_bytes(content)
    for reader in (lambda: read_scores(tmp_path / "run"), lambda: examples_left(lay_plan(config))):
        with pytest.raises(ValueError, match=message):
            reader()


def test_what_a_kill_left_while_a_directory_was_laid_out_is_no_score(whole: Config, tmp_path: Path) -> None:
    shutil.copytree(whole.train.run, tmp_path / "run")
    half = tmp_path / "run/influence/step_00000004/.b.tmp"
    half.mkdir()
    (half / "manifest.json").touch()
    assert [t.steps for t in read_scores(tmp_path / "run")] == [(2, 4), (2, 4)]


def test_manifests_hold_what_the_scores_came_from(whole: Config) -> None:
    path = Path(whole.train.run) / "influence/step_00000002/a/manifest.json"
    manifest = json.loads(path.read_text())
    assert manifest["capabilities"] == ["code", "math"] and manifest["step"] == 2
    ref = Path(whole.train.run) / "checkpoints/step_00000002"
    assert manifest["weights"] == checkpoint_files.identity(ref)
    assert manifest["data"]["hash"] == identity_of(whole.data.sources["a"].prefix)
    assert whole.influence is not None
    probes = {name: identity_of(prefix) for name, prefix in whole.influence.directions.items()}
    assert {name: of["hash"] for name, of in manifest["directions"].items()} == probes
    # The ledger has the same.
    (line, _) = read_ledger(Path(whole.train.run))
    assert line["inputs"][str(ref)] == manifest["weights"]
    assert {manifest["data"]["hash"], *probes.values()} < set(line["inputs"].values())
    assert line["outputs"][str(path.parent)] == sha256(path.parent / "scores.npy")


def test_tokens_changed_under_their_index_are_noticed(whole: Config, tmp_path: Path) -> None:
    """No sidecar tells them, and the index is the same."""
    shutil.copytree(whole.train.run, tmp_path / "run")
    for suffix in (".bin", ".idx"):
        shutil.copy(f"{whole.data.sources['a'].prefix}{suffix}", tmp_path / f"a{suffix}")
    config = dataclasses.replace(
        changed(whole, train={"run": str(tmp_path / "run")}),
        data=dataclasses.replace(
            whole.data, sources={**whole.data.sources, "a": SourceConfig(str(tmp_path / "a"))}
        ),
    )
    assert examples_left(lay_plan(config)) == 0
    tokens = np.fromfile(tmp_path / "a.bin", np.uint16)
    tokens[[0, 1]] = tokens[[1, 0]] + 1
    tokens.tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match=r"a holds scores of other inputs: data\.bytes"):
        examples_left(lay_plan(config))


def test_tensor_parallel_scores_a_run_alike(whole: Config, trained: Config, tmp_path: Path) -> None:
    config = dataclasses.replace(copied(trained, tmp_path), parallel=ParallelConfig(tensor=2))
    on_ranks(2, compute_influence, changed(config, influence={"steps": [4]}))
    for ours, theirs in zip(tables(config), tables(whole), strict=True):
        found, true = ours.score_NCK[:, :, 0], theirs.score_NCK[:, :, 1]
        np.testing.assert_allclose(found, true, rtol=1e-4, atol=1e-5 * np.abs(true).max())


def test_the_tool_checks_without_torch(whole: Config, tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(config_io.dump(whole))
    script = (
        "import runpy, sys; sys.argv = ['compute_influence.py', *sys.argv[1:]];"
        "runpy.run_path('tools/compute_influence.py', run_name='__main__');"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", script, f"{tmp_path}/config.yaml", "--check", "influence.steps=[4]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=launch.ROOT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    rows = sum(len(t.example_N) for t in tables(whole))
    assert f"2 sources x up to 50 examples x 1 checkpoints = {rows} examples" in done.stdout
    assert "; 0 examples left" in done.stdout
    refused = subprocess.run(
        [*command, "influence.examples=20"], capture_output=True, text=True, cwd=launch.ROOT, timeout=60
    )
    assert refused.returncode == 2 and "holds scores of other inputs" in refused.stderr
    command = [sys.executable, "tools/compute_influence.py", f"{tmp_path}/config.yaml", "influence.steps=[3]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=launch.ROOT, timeout=60, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error: 1 mistake in the configuration:")


def _documents_by_autograd(config: Config) -> np.ndarray:
    """Scores of the first source's documents: gradients of summed losses of pieces, by plain autograd."""
    influence, names = config.influence, select(["*mlp*", "embedding"], tiny.MODEL.num_layers)
    assert influence is not None
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        gpt: Any = build_model(config.model, config.parallel, "fp32", SEQ, plain_layers=True)
        load_checkpoint(Path(config.train.run) / "checkpoints/step_00000004", gpt, None, config.model)
        parameters = {n: p for n, p in gpt.named_parameters() if n in names}

        def gradient(tokens: np.ndarray) -> list[torch.Tensor]:
            window = torch.from_numpy(tokens.astype(np.int64))[None]
            position = torch.arange(window.shape[1] - 1)[None]
            loss = gpt(window[:, :-1], position, None, labels=window[:, 1:].contiguous()).sum()
            return list(torch.autograd.grad(loss, list(parameters.values())))

        v = []
        for name, prefix in influence.directions.items():
            probe = open_corpus(name, prefix)
            stream = IndexedDataset(prefix).tokens
            chosen = choose(probe, SEQ, influence.probe_examples, influence.seed)
            found = [gradient(stream[w * SEQ : w * SEQ + SEQ + 1]) for w in chosen]
            v.append([sum(parts) / len(chosen) for parts in zip(*found, strict=True)])
        dataset = IndexedDataset(config.data.sources["a"].prefix)
        corpus = open_corpus("a", config.data.sources["a"].prefix)
        rows = []
        for d in choose(corpus, SEQ, influence.examples, influence.seed, "document"):
            tokens = dataset.tokens[dataset.tokens_before(int(d)) : dataset.tokens_before(int(d) + 1)]
            pieces = [tokens[p : p + SEQ + 1] for p in range(0, len(tokens) - 1, SEQ)]
            total = [sum(parts) for parts in zip(*map(gradient, pieces), strict=True)]
            rows.append([sum(float((g * w).sum()) for g, w in zip(total, c, strict=True)) for c in v])
        return np.array(rows)


def test_documents_and_selected_layers_score_as_autograd_says(trained: Config, tmp_path: Path) -> None:
    choice = {
        "unit": "document",
        "layers": ["*mlp*", "embedding"],
        "curvature": "identity",
        "examples": 7,
        "steps": [4],
    }
    found = {}
    for loss in ("sum", "mean"):
        config = changed(copied(trained, tmp_path / loss), influence={**choice, "loss": loss})
        on_ranks(2, compute_influence, config)
        found[loss] = tables(config)[0]
    true = on_ranks(1, _documents_by_autograd, config)[0]
    by_sum, by_mean = found["sum"], found["mean"]
    dataset = IndexedDataset(config.data.sources["a"].prefix)
    assert by_sum.length_N.tolist() == [int(dataset.lengths[d]) - 1 for d in by_sum.example_N]
    np.testing.assert_allclose(by_sum.score_NCK[:, :, 0], true, rtol=1e-4, atol=1e-5 * np.abs(true).max())
    # A mean over the document's labels; its direction is of means over SEQ labels.
    by_mean_NC = by_mean.score_NCK[:, :, 0] * by_mean.length_N[:, None] * SEQ
    np.testing.assert_allclose(by_mean_NC, true, rtol=1e-4, atol=1e-5 * np.abs(true).max())
    directories = (tmp_path / loss / "run/influence/step_00000004/a" for loss in found)
    losses = [np.load(directory / "losses.npy") for directory in directories]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-5)


def test_norms_bound_the_scores(trained: Config, tmp_path: Path) -> None:
    config = changed(copied(trained, tmp_path), influence={"norms": True, "steps": [4], "examples": 8})
    on_ranks(2, compute_influence, config)
    directory = Path(config.train.run) / "influence/step_00000004/a"
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["influence"]["curvature"] == "adam"
    norm_C = np.array([manifest["direction_norms"][c] for c in manifest["capabilities"]])
    cosine_NC = np.load(directory / "scores.npy") / np.load(directory / "norms.npy")[:, None] / norm_C
    assert (np.abs(cosine_NC) < 1).all() and (np.abs(cosine_NC) > 1e-4).all()


@pytest.mark.parametrize("curvature", ["datainf", "ekfac"])
def test_curvature_is_measured_on_the_sources(trained: Config, tmp_path: Path, curvature: str) -> None:
    few = {"steps": [4], "examples": 4, "curvature": curvature, "curvature_examples": 6}
    found = {}
    for ranks in (1, 2):
        config = changed(copied(trained, tmp_path / str(ranks)), influence=few)
        on_ranks(ranks, compute_influence, config)
        found[ranks] = tables(config)[0].score_NCK
    scale = np.abs(found[1]).max()
    np.testing.assert_allclose(found[2], found[1], rtol=1e-4, atol=1e-4 * scale)
    path = tmp_path / "1/run/influence/step_00000004/a/manifest.json"
    influence = json.loads(path.read_text())["influence"]
    assert (influence["curvature"], influence["curvature_examples"]) == (curvature, 6)
    documents = changed(config, influence={"unit": "document"})
    assert f"curvature={curvature}: not of documents" in influence_mistakes(documents)[0]


def test_other_methods_store_what_they_keep(
    trained: Config, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    few = {"steps": [4], "examples": 4}
    ways: dict[str, dict[str, Any]] = {
        "ghost": {"per_token": True},
        "lowrank": {"rank": 60},
        "projected": {"projection": 3},
    }
    found = {}
    for method, values in ways.items():
        config = changed(copied(trained, tmp_path / method), influence={**few, "method": method, **values})
        on_ranks(2, compute_influence, config)
        found[method] = Path(config.train.run) / "influence/step_00000004/a"
    scores = {method: np.load(directory / "scores.npy") for method, directory in found.items()}
    np.testing.assert_allclose(
        np.load(found["ghost"] / "token_scores.npy").sum(1), scores["ghost"], rtol=1e-3
    )
    scale = np.abs(scores["ghost"]).max()
    np.testing.assert_allclose(scores["lowrank"], scores["ghost"], rtol=1e-2, atol=1e-2 * scale)
    # Matrices as 3 x 3 numbers, norms' weights as 3.
    assert np.load(found["projected"] / "projections.npy").shape == (4, 9 * 9 + 5 * 3)
    assert "directions of rank 60, correlation" in capfd.readouterr().out
    config = changed(config, influence={"method": "lowrank", "rank": 1, "min_correlation": 1.0})
    with pytest.raises(RankFailedError, match=r"below influence\.min_correlation=1\.0; raise"):
        on_ranks(1, compute_influence, copied(config, tmp_path / "refused"))
    assert list((tmp_path / "refused/run/influence").glob("step_*/*/scores.npy")) == []


def test_an_estimate_is_operations_over_their_rate(whole: Config, tmp_path: Path) -> None:
    seconds = 10.0
    rows = sum(len(t.example_N) for t in tables(whole))
    per_token = whole.model.flops_per_token(SEQ)
    # 1.15 of a pass for each example and one for each probing window, at two checkpoints.
    rate = per_token * SEQ * 2 * (1.15 * rows + 24) / seconds
    said = estimate(whole, 4, rate / 0.5 / 1e12, 0.5)
    assert f"{rows} examples x 2 checkpoints, {seconds / 3600 / 4:.3g} h on 4 devices" in said
    # Before there is any data, what is asked for counts in full.
    early = changed(whole, train={"run": str(tmp_path)}, influence={"steps": [1, 2, 3]})
    assert estimate(early, 1, 1.0, 1.0).startswith("100 examples x 3 checkpoints, at most ")
    with pytest.raises(ValueError, match="give steps"):
        estimate(changed(early, influence={"steps": []}), 1, 1.0, 1.0)


def _measured(config: Config, ranks: int) -> str:
    return measured_estimate(config, ranks)


@pytest.mark.parametrize(("ranks", "parallel"), [(1, {}), (2, {}), (2, {"tensor": 2}), (2, {"pipeline": 2})])
def test_an_estimate_measures_the_devices_of_its_launch(
    whole: Config, monkeypatch: pytest.MonkeyPatch, ranks: int, parallel: dict[str, Any]
) -> None:
    """Its parts multiply and add up; passes are those of the launch."""
    monkeypatch.setattr("megatron_r1.influence.score._BUDGET", 0.5)
    config = changed(whole, parallel=parallel)
    rows, copies = sum(len(t.example_N) for t in tables(whole)), 1 if parallel else ranks
    for text in on_ranks(ranks, _measured, config, ranks):
        found = re.findall(r"(?<![\w.])\d[\d,]*\.?\d*(?:e-?\d+)?", text)
        number = [float(x.replace(",", "")) for x in found]
        examples, steps, hours, devices, scored, each, probed, gradient, total, size, tokens, memory = number
        assert (examples, steps, devices, tokens) == (rows, 2, ranks, SEQ) and size in (1, 2), text
        assert scored == 2 * -(-rows // (size * copies)) and probed == 2 * -(-24 // (size * copies)), text
        assert hours * 3600 == pytest.approx(scored * each + probed * gradient, rel=0.02), text
        assert total == pytest.approx(hours * ranks, rel=0.01) and memory > 0 and 0 < each < 60, text


def test_an_estimate_of_a_layout_needs_its_ranks(whole: Config) -> None:
    with pytest.raises(ConfigError, match="launch a multiple of 4, or give --peak-tflops"):
        measured_estimate(changed(whole, parallel={"tensor": 4}), 1)


def test_a_killed_launch_is_in_the_ledger(trained: Config, tmp_path: Path) -> None:
    """Two launches of step 2, each with what passed through the model in it, and one of step 4."""
    config = copied(trained, tmp_path)
    with pytest.raises(RankFailedError, match="-9"):
        on_ranks(1, _killed_at, config, 3, False)
    run = Path(config.train.run)
    note = run / "influence/.step_00000002.launch.json"
    assert read_ledger(run) == [] and json.loads(note.read_text())["seconds"] > 0
    on_ranks(1, compute_influence, config)
    lines = [line for line in read_ledger(run) if line["stage"] == "influence step 2"]
    assert [bool(line["outputs"]) for line in lines] == [False, True] and not note.exists()
    assert lines[0]["inputs"] == lines[1]["inputs"]
    work = lay_plan(config)
    assert lines[0]["tokens"] == (2 * 16 + work.probe_windows()) * SEQ
    assert lines[1]["tokens"] == (work.examples() - 2 * 16) * SEQ, "the directions were on disk"


def test_a_launch_killed_with_all_scores_there_is_recorded_with_them(whole: Config, tmp_path: Path) -> None:
    shutil.copytree(whole.train.run, tmp_path / "run")
    config = changed(whole, train={"run": str(tmp_path / "run")})
    ledger, note = tmp_path / "run/ledger.jsonl", tmp_path / "run/influence/.step_00000004.launch.json"
    *before, last = ledger.read_text().splitlines(keepends=True)
    ledger.write_text("".join(before))
    line = json.loads(last)
    stage.note_launch(note, name=line["stage"], inputs=line["inputs"], seconds=1.0)
    on_ranks(1, compute_influence, config)
    found = read_ledger(tmp_path / "run")[-1]
    assert found["stage"] == "influence step 4" and not note.exists()
    assert list(found["outputs"].values()) == list(line["outputs"].values())


def _replace(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        np.save(directory / name, change(np.load(directory / name)))

    return damage


def _nan(array: np.ndarray) -> np.ndarray:
    array[3] = np.nan
    return array


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "written.npy").unlink(), r"b/written\.npy is missing; remove its folder and score"),
        (lambda d: (d / "scores.npy").unlink(), r"b/scores\.npy is missing; remove its folder and score"),
        (
            lambda d: (d / "manifest.json").unlink(),
            r"b has no manifest\.json, .*; remove .*b and score again",
        ),
        (_replace("written.npy", lambda w: w.astype(np.int8)), r"written\.npy is damaged \(it holds int8"),
        (_replace("written.npy", lambda w: w[:-1]), r"written\.npy is damaged \(its shape is \[\d+\], not"),
        (_replace("scores.npy", lambda s: s[:, :1]), r"scores\.npy is damaged \(its shape is"),
        (
            _replace("scores.npy", lambda s: s.astype(np.float64)),
            r"scores\.npy is damaged \(it holds float64",
        ),
        (
            _replace("scores.npy", _nan),
            r"scores\.npy: scores of b are not finite, first of example \d+; remove",
        ),
        (_replace("losses.npy", _nan), r"losses\.npy: losses of b are not finite"),
        (lambda d: (d / "losses.npy").write_bytes(b"PK\x05\x06" + bytes(18)), r"losses\.npy is damaged"),
    ],
)
def test_scores_that_are_not_what_they_say_are_named(
    whole: Config, tmp_path: Path, damage: Callable[[Path], object], message: str
) -> None:
    """By the writer, the reader of mixtures and the report, and the table."""
    shutil.copytree(whole.train.run, tmp_path / "run")
    run, config = tmp_path / "run", changed(whole, train={"run": str(tmp_path / "run")})
    damage(run / "influence/step_00000004/b")
    readers = {"writer": lambda: examples_left(lay_plan(config))}
    if "has no manifest" not in message:
        readers["table"] = lambda: write_parquet(run, tmp_path / "scores.parquet")
    if "losses" not in message and "has no manifest" not in message:
        readers["mixture"] = lambda: read_scores(run)
    for reader in readers.values():
        with pytest.raises(ValueError, match=message):
            reader()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": "4"}, r"manifest\.json is damaged \(step is '4'\); remove"),
        ({"capabilities": "code"}, r"is damaged \(capabilities is 'code'\)"),
        ({"source": "a"}, r"is of step_00000004/a: its folder was copied or renamed; remove .*/b and score"),
    ],
)
def test_a_manifest_of_another_place_or_type_is_named(
    whole: Config, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    shutil.copytree(whole.train.run, tmp_path / "run")
    path = tmp_path / "run/influence/step_00000004/b/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        read_scores(tmp_path / "run")


def test_rows_of_other_examples_are_not_continued(whole: Config, tmp_path: Path) -> None:
    """The manifest is of these examples, and examples.npy is not."""
    directory = tmp_path / "run/influence/step_00000004/b"
    shutil.copytree(Path(whole.train.run) / "influence/step_00000004/b", directory)
    number_N = np.load(directory / "examples.npy")
    inputs = json.loads((directory / "manifest.json").read_text())
    with pytest.raises(ValueError, match=r"examples\.npy names other examples than its manifest"):
        ScoreStore(directory, inputs, number_N + 1, np.load(directory / "tokens.npy"), {"losses": ()})


def _overflowing(config: Config) -> None:
    original = score_module.score_examples

    def huge(*args: Any) -> tuple[np.ndarray, np.ndarray]:
        rows_NX, loss_N = original(*args)
        rows_NX[2] = 1e39
        return rows_NX, loss_N

    score_module.score_examples = huge  # this fork's own
    compute_influence(config)


def test_a_score_beyond_float32_is_not_stored(trained: Config, tmp_path: Path) -> None:
    config = copied(trained, tmp_path)
    with pytest.raises(RankFailedError, match=r"scores of window \d+ of a at step 2 are not finite"):
        on_ranks(1, _overflowing, config)
    assert not np.load(tmp_path / "run/influence/step_00000002/a/written.npy").any()


def test_another_model_is_refused_before_torch_is_loaded(whole: Config) -> None:
    """By the plan, which `--check` prints."""
    other = dataclasses.replace(whole, model=dataclasses.replace(whole.model, num_layers=3))
    with pytest.raises(ValueError, match=r"step_00000002 .*num_layers"):
        lay_plan(other)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--peak-tflops", "3"], "are for --estimate"),
        (["--utilisation", "0"], "are for --estimate"),
        (["--estimate", "--utilisation", "0.3"], "--utilisation is a share of --peak-tflops"),
    ],
    ids=str,
)
def test_an_option_that_would_count_for_nothing_is_refused(
    words: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["compute_influence.py", "no.yaml", *words])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(launch.ROOT / "tools/compute_influence.py"), run_name="__main__")
    assert ended.value.code == 2 and said in capsys.readouterr().err
