"""Keep masks of a mixture (Eq. 6): what they keep, that a phase trains on it, and that no file changes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from megatron_r1 import config_io
from megatron_r1.checkpoint.files import META
from megatron_r1.config import Config, DataConfig, MixConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.data.indexed import identity_of, open_corpus
from megatron_r1.data.keep import save_documents
from megatron_r1.data.open import open_data
from megatron_r1.influence.store import dataset_identity
from megatron_r1.mixture.files import table, write
from megatron_r1.mixture.masks import _overlap
from megatron_r1.mixture.mixture import make_mixture
from tests import launch
from tests.influence import tiny
from tests.mixture.mixture_scores import write_scores

SEQ = 16
SCORED = 30


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Sources a and b, 30 of their windows scored at two steps."""
    for seed, name in enumerate("ab"):
        launch.write_corpus(tmp_path / name, 40, seed=seed + 1)
    config = Config(
        model=tiny.MODEL,
        data=DataConfig({name: SourceConfig(f"{tmp_path}/{name}") for name in "ab"}, seq_length=SEQ),
        train=TrainConfig(run=f"{tmp_path}/run", global_batch=4, micro_batch=2),
        phases={"one": PhaseConfig(steps=5), "two": PhaseConfig(steps=10)},
        mix=MixConfig("two", keep=True),
    )
    for name in "ab":
        score(config, name, np.arange(0, 2 * SCORED, 2), gains(name))
    return config


def gains(name: str) -> np.ndarray:
    """Joint scores at the last step, [30]: a third of those of a are not positive, half of those of b."""
    return np.arange(SCORED) - (9.0 if name == "a" else 14.0)


def score(
    config: Config, source: str, example_N: np.ndarray, last_N: np.ndarray, unit: str = "window"
) -> None:
    """x has three times the joint score and y has its negative, so that their mean is the score."""
    prefix = Path(config.data.sources[source].prefix)
    for step, sign in ((10, -1), (30, 1)):
        write_scores(
            Path(config.train.run),
            step,
            source,
            sign * np.stack([3 * last_N, -last_N], axis=1),
            example_N,
            np.full(len(example_N), SEQ),
            position="ab".index(source),
            capabilities=["x", "y"],
            influence={"unit": unit},
            seq_length=SEQ,
            data={"hash": identity_of(prefix)},
        )


def mixed(config: Config, **changes: object) -> Config:
    assert config.mix is not None
    return dataclasses.replace(config, mix=dataclasses.replace(config.mix, **changes))  # type: ignore[arg-type]


def made(config: Config, output: Path) -> Config:
    """The configuration that trains what make_mix writes."""
    mixture, used = make_mixture(config)
    assert config.mix is not None
    write(mixture, used, config, output)
    (output.parent / "base.yaml").write_text(config_io.dump(config))
    return config_io.load([f"{output.parent}/base.yaml", str(output)])


def drawn(config: Config, source: str) -> set[int]:
    """Windows of a source that phase two draws, over many epochs."""
    config = dataclasses.replace(
        config, phases={**config.phases, "two": dataclasses.replace(config.phases["two"], steps=2000)}
    )
    data = open_data(config)
    corpora, plan = data.corpora, data.plan
    source_N, _, window_N = plan.locate_range(20, 8000)
    return set(window_N[source_N == [c.name for c in corpora].index(source)].tolist())


def test_a_phase_draws_the_scored_windows_that_help_and_the_unscored(config: Config, tmp_path: Path) -> None:
    windows = set(range(open_corpus("a", f"{tmp_path}/a").windows(SEQ)))
    # Eq. 6 asks the last checkpoint alone; at the first all signs are turned.
    dropped = {2 * i for i in range(10)}
    assert drawn(made(config, tmp_path / "m" / "mix.yaml"), "a") == windows - dropped
    scored = {2 * i for i in range(SCORED)}
    strict = made(mixed(config, keep_unscored=False, keep_above=1.5), tmp_path / "m" / "mix.yaml")
    assert drawn(strict, "a") == {2 * i for i in range(11, SCORED)} < scored


def test_shares_are_printed_and_epochs_count_what_is_kept(config: Config) -> None:
    found, _ = make_mixture(mixed(config, keep_unscored=False))
    assert {name: (m.helpful, m.scored, int(m.windows.sum())) for name, m in found.masks.items()} == {
        "a": (20, 30, 20),
        "b": (15, 30, 15),
    }
    draws = {name: round(found.weights[name] * 40) for name in "ab"}
    assert found.epochs["a"] == pytest.approx(draws["a"] / 20, abs=1 / 20)
    assert "keep a: 20 of 30 scored examples help at step 30" in table(found)


def test_zscore_moves_no_zero(config: Config) -> None:
    """A capability's scale is taken out; its zero, no effect, stays."""
    found, _ = make_mixture(mixed(config, scale="zscore", keep_unscored=False, capability_weight={"x": 1}))
    assert found.masks["a"].helpful == 20 and found.masks["b"].helpful == 15


def test_a_mask_that_is_in_use_is_never_altered(config: Config, tmp_path: Path) -> None:
    output = tmp_path / "m" / "mix.yaml"
    first = made(config, output).phases["two"].keep
    before = {path: (Path(path).read_bytes(), Path(path).stat().st_mtime_ns) for path in first.values()}
    assert made(config, output).phases["two"].keep == first, "the same scores, the same names"
    second = made(mixed(config, keep_above=3.0), output).phases["two"].keep
    assert not set(first.values()) & set(second.values())
    assert before == {p: (Path(p).read_bytes(), Path(p).stat().st_mtime_ns) for p in first.values()}
    Path(first["a"]).write_bytes(b"cut short")
    made(config, output)
    assert Path(first["a"]).read_bytes() == before[first["a"]][0], "a damaged file is made whole"


def test_what_the_phase_drops_already_stays_dropped(config: Config, tmp_path: Path) -> None:
    windows = open_corpus("a", f"{tmp_path}/a").windows(SEQ)
    bits = np.ones(windows, bool)
    bits[40:60] = False
    np.save(tmp_path / "seen.npy", bits)
    phase = dataclasses.replace(config.phases["two"], keep={"a": f"{tmp_path}/seen.npy"})
    config = dataclasses.replace(config, phases={**config.phases, "two": phase})
    expected = set(range(windows)) - {2 * i for i in range(10)} - set(range(40, 60))
    assert drawn(made(config, tmp_path / "m" / "mix.yaml"), "a") == expected


def test_a_source_of_which_nothing_helps_gets_no_weight(config: Config, tmp_path: Path) -> None:
    found, _ = make_mixture(mixed(config, keep_unscored=False, keep_above=17.0, floor=0.1))
    assert found.weights == pytest.approx({"a": 1.0, "b": 0.0})
    final = made(mixed(config, keep_unscored=False, keep_above=17.0), tmp_path / "m" / "mix.yaml")
    assert list(final.phases["two"].keep) == ["a"] and not drawn(final, "b")
    with pytest.raises(ValueError, match=r"influence above mix.keep_above=99.0 at step 30"):
        make_mixture(mixed(config, keep_unscored=False, keep_above=99.0))


def test_documents_are_kept_where_documents_were_scored(config: Config, tmp_path: Path) -> None:
    other = dataclasses.replace(config, train=dataclasses.replace(config.train, run=f"{tmp_path}/documents"))
    for name in "ab":
        score(other, name, np.arange(SCORED), gains(name), unit="document")
    final = made(other, tmp_path / "m" / "mix.yaml")
    corpus = open_corpus("a", f"{tmp_path}/a")
    kept_D = np.ones(corpus.documents, bool)
    kept_D[:10] = False
    save_documents(tmp_path / "expected.npz", corpus, kept_D, SEQ)
    assert Path(final.phases["two"].keep["a"]).read_bytes() == (tmp_path / "expected.npz").read_bytes()
    expected, windows = np.load(tmp_path / "expected.npz")["windows"], corpus.windows(SEQ)
    bits = np.unpackbits(expected, count=windows, bitorder="little")
    assert drawn(final, "a") == set(np.flatnonzero(bits).tolist())


def test_overlap_is_what_both_cover() -> None:
    random = np.random.default_rng(0)
    for _ in range(50):
        bits = random.random((2, 60)) < 0.7
        lists = [np.flatnonzero(np.diff(np.r_[0, b, 0])).reshape(-1, 2) for b in bits.astype(int)]
        covered = np.zeros(60, bool)
        for begin, end in _overlap(*lists):
            covered[begin:end] = True
        assert np.array_equal(covered, bits[0] & bits[1])


def test_scores_of_other_windows_or_data_are_refused(config: Config, tmp_path: Path) -> None:
    longer = dataclasses.replace(config, data=dataclasses.replace(config.data, seq_length=32))
    with pytest.raises(ValueError, match=r"windows of 16 tokens, data.seq_length=32 cuts others"):
        make_mixture(longer)
    before = make_mixture(config)[0]
    for path in tmp_path.glob("run/influence/*/*/manifest.json"):
        manifest = json.loads(path.read_text())
        former = {"hash": dataset_identity(tmp_path / manifest["source"], 2)}
        assert former != manifest["data"]
        path.write_text(json.dumps({**manifest, "format": 2, "data": former}))
    # Of an earlier version, they are held against the dataset as it knew it.
    assert make_mixture(config)[0].weights == before.weights
    launch.write_corpus(tmp_path / "b", 41, seed=9)
    with pytest.raises(ValueError, match="b has changed since b was scored"):
        make_mixture(config)


def test_epoch_caps_bound_the_weights_and_are_written(config: Config, tmp_path: Path) -> None:
    config = mixed(config, keep=False, scale="raw", max_epochs={"b": 0.1})
    windows = open_corpus("b", f"{tmp_path}/b").windows(SEQ)
    final = made(config, tmp_path / "m" / "mix.yaml")
    found = make_mixture(config)[0]
    assert yaml.safe_load((tmp_path / "m" / "mix.yaml").read_text())["phases"]["two"]["max_epochs"] == {
        "b": 0.1
    }
    assert final.phases["two"].max_epochs == {"b": 0.1}
    # Phase one drew 10 of b's windows.
    assert found.weights["b"] <= max(0.0, (0.1 * windows - 10) / 40) + 1e-9
    plan = open_data(final).plan
    assert plan.epochs(60)["b"] <= 0.1
    with pytest.raises(ValueError, match=r"mix.max_epochs: \['c'\] not in data.sources"):
        make_mixture(mixed(config, max_epochs={"c": 1}))


def test_a_phase_that_is_trained_keeps_what_it_began_with(config: Config, tmp_path: Path) -> None:
    output = tmp_path / "m" / "mix.yaml"
    mixture, used = make_mixture(config)
    checkpoint = tmp_path / "run/checkpoints/step_00000005"
    checkpoint.mkdir(parents=True)
    (checkpoint / META).write_text("{}")
    write(mixture, used, config, output)
    # One step of the phase is trained: the same file may be written again, and no other.
    checkpoint.rename(checkpoint.with_name("step_00000006"))
    write(mixture, used, config, output)
    kept = {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}
    for name in "ab":
        score(config, name, np.arange(0, 2 * SCORED, 2), gains(name) + 3)
    with pytest.raises(ValueError, match=r"mix\.phase=two begins at step 5, and .*run is trained to step 6"):
        write(*make_mixture(config), config, output)
    assert kept == {path: path.read_bytes() for path in output.parent.rglob("*") if path.is_file()}


def test_a_full_disk_leaves_nothing_of_a_mixture(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(stream: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("megatron_r1.mixture.files.on_disk", full)
    with pytest.raises(OSError, match=r"No space left on device: '.*mix\.yaml'"):
        write(*make_mixture(config), config, tmp_path / "m" / "mix.yaml")
    assert not list((tmp_path / "m").iterdir())


@pytest.mark.parametrize("keep", [True, False])
def test_a_mask_of_another_dataset_is_refused(config: Config, tmp_path: Path, keep: bool) -> None:
    corpus = open_corpus("a", f"{tmp_path}/a")
    save_documents(tmp_path / "keep.npz", corpus, np.arange(corpus.documents) > 2, SEQ)
    phase = dataclasses.replace(config.phases["two"], keep={"a": str(tmp_path / "keep.npz")})
    config = dataclasses.replace(mixed(config, keep=keep), phases={**config.phases, "two": phase})
    make_mixture(config)
    parts = dict(np.load(tmp_path / "keep.npz"))
    np.savez(tmp_path / "keep.npz", **{**parts, "corpus": np.array("0" * 64)})
    with pytest.raises(ValueError, match=r"keep\.npz was made for another dataset than .*/a; make it again"):
        make_mixture(config)
