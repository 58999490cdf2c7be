"""Logs of a run, where the disk is full."""

from __future__ import annotations

import errno
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from megatron_r1.config import TrainConfig
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import ours
from megatron_r1.train.loggers import build_loggers
from megatron_r1.train.metrics import MetricsLog, RankLog, open_log, read
from megatron_r1.train.schedule import late_edits
from tests.train import small


def test_a_full_disk_names_the_log(tmp_path: Path) -> None:
    log = MetricsLog(RunDir(tmp_path), step=0)
    rank_log = RankLog(tmp_path / "rank.log")
    for each in (log, rank_log):
        each._file = open("/dev/full", "a", buffering=1)  # noqa: SIM115
    for each, line, name in ((log, {"step": 1}, "metrics.jsonl"), (rank_log, "line", "rank.log")):
        with pytest.raises(OSError, match=f"{tmp_path}/{name}") as caught:
            each.write(line)  # type: ignore[attr-defined]
        assert caught.value.errno == errno.ENOSPC


def test_lines_that_cannot_be_read_are_said_and_the_others_stay(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f'{{"step": {n}}}' for n in range(1, 6)]
    (tmp_path / "metrics.jsonl").write_text(
        "\n".join(["null", *lines[:2], lines[2][:4], *lines[3:]]) + '\n{"st'
    )
    MetricsLog(RunDir(tmp_path), step=4).close()
    assert [line["step"] for line in read(tmp_path / "metrics.jsonl")] == [1, 2, 4]
    assert "metrics.jsonl: 2 of its lines cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    "bad",
    ['{"step": true}', '{"step": 2.0}', '{"step": 0}', '{"step": -3}', '{"step": 2, "loss": "x"}', '"2"',
     '{"step": 2, "seconds": null}', '{"step": 2, "ranks": "1"}', '{"step": 2, "phase": ["one"]}',
     '{"step": 2, "probe_nll": [1]}', '{"step": 2, "mix_actual": null}', f'{{"step": {10**30}}}',
     '{"step": 2, "gold_bpb": 1.5}',
     '{"step": 2, "probe_nll": {"a": "b"}}', f'{{"step": 2, "loss": {"9" * 400}}}', "[" * 100_000],
)  # fmt: skip
def test_a_line_of_other_types_is_no_step(
    tmp_path: Path, bad: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{bad}\n{{"step": 3, "loss": NaN}}\n{{"step": 1}}\n{bad}\n')
    assert [line["step"] for line in read(path)] == [1, 3]
    assert f"{path}: 2 of its lines cannot be read" in capsys.readouterr().err


def test_of_several_lines_of_a_step_the_last_counts_in_order(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(f'{{"step": {step}, "loss": {n}}}\n' for n, step in enumerate([3, 1, 2, 3, 2]))
    )
    MetricsLog(RunDir(tmp_path), step=2).close()
    assert "2 lines too many" in capsys.readouterr().err
    assert [(line["step"], line["loss"]) for line in read(tmp_path / "metrics.jsonl")] == [(1, 1), (2, 4)]


@pytest.mark.parametrize(("before", "wait"), [(0.0, 0.1234567), (0.30000000000000004, 0.2), (1e-07, 12345.6)])
def test_the_wait_for_the_last_checkpoint_is_added_to_the_last_line(
    tmp_path: Path, before: float, wait: float
) -> None:
    log = MetricsLog(RunDir(tmp_path), step=0)
    lines: list[dict[str, Any]] = [{"step": n, "saving_seconds": before, "loss": 0.5} for n in (1, 2)]
    for line in lines:
        log.write(line)
    log.add_saving(wait)
    log.close()
    found = read(tmp_path / "metrics.jsonl")
    assert [line["saving_seconds"] for line in found] == [before, before + wait] and len(found[1]) == 3


def test_tensorboard_shows_the_configuration(tmp_path: Path) -> None:
    config = small.config(tmp_path, "run", 2)
    open_log(RunDir(tmp_path), 0, config).close()
    (events,) = (tmp_path / "tb").iterdir()
    board = EventAccumulator(str(events)).Reload()
    (text,) = board.Tensors("configuration/text_summary")
    assert f"global_batch: {config.train.global_batch}" in text.tensor_proto.string_val[0].decode()
    shown = plugin_data_pb2.HParamsPluginData.FromString(
        board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    ).session_start_info.hparams
    assert shown["train.global_batch"].number_value == config.train.global_batch
    assert shown["phases.one.decay"].string_value == config.phases["one"].decay


def test_other_loggers_hear_every_step_and_its_end(tmp_path: Path) -> None:
    heard: list[object] = []

    class Ear:
        def log(self, scalars: Mapping[str, float], step: int) -> None:
            heard.append((step, dict(scalars)))

        def close(self) -> None:
            heard.append("end")

    log = MetricsLog(RunDir(tmp_path), 0, [Ear()])
    log.write({"step": 1, "loss": 2.0, "loss_by_source": {"a": 3.0}})
    log.close()
    assert heard == [(1, {"loss/train": 2.0, "loss_by_source/a": 3.0}), "end"]


@pytest.mark.parametrize(
    ("package", "field"), [("wandb", {"wandb_project": "p"}), ("nemo", {"exp_manager": {}})]
)
def test_a_logger_that_is_not_installed_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, field: dict[str, Any]
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, "lightning", None)
    with pytest.raises(ValueError, match=f"train.{next(iter(field))}.*leave the field out"):
        build_loggers(
            RunDir(tmp_path), TrainConfig(run=str(tmp_path), global_batch=1, micro_batch=1, **field)
        )


def test_nemo_s_experiment_manager_logs(tmp_path: Path) -> None:
    pytest.importorskip("nemo.utils.exp_manager")
    train = TrainConfig(run=str(tmp_path), global_batch=1, micro_batch=1, exp_manager={})
    log = MetricsLog(RunDir(tmp_path), 0, build_loggers(RunDir(tmp_path), train))
    log.write({"step": 7, "loss": 2.0})
    log.close()
    (events,) = (tmp_path / "nemo").rglob("events.out.*")
    board = EventAccumulator(str(events))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("loss/train")] == [(7, 2.0)]


def test_weights_and_biases_logs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Offline: the file that a later `wandb sync` reads holds the scalar, as name and JSON."""
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    train = TrainConfig(run=str(tmp_path), global_batch=1, micro_batch=1, wandb_project="p")
    log = MetricsLog(RunDir(tmp_path), 0, build_loggers(RunDir(tmp_path), train))
    log.write({"step": 7, "loss": 2.125})
    log.close()
    (path,) = tmp_path.rglob("*.wandb")
    assert re.search(rb"loss/train.{0,4}2\.125", path.read_bytes(), re.DOTALL)


class _Wandb:
    """Stands for the package: keeps what it was given."""

    def __init__(self) -> None:
        self.given: list[dict[str, Any]] = []

    def init(self, **given: Any) -> None:
        self.given.append({**given, "argv": sys.argv[:]})


def _wandb_ids(wandb: _Wandb, *runs: Path) -> list[str]:
    for run in runs:
        run.mkdir(parents=True, exist_ok=True)
        train = TrainConfig(run=str(run), global_batch=1, micro_batch=1, wandb_project="p")
        build_loggers(RunDir(run), train)
    return [given["id"] for given in wandb.given[-len(runs) :]]


def test_runs_of_one_name_stay_apart_and_a_moved_one_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    one, other, moved = tmp_path / "a/base", tmp_path / "b/base", tmp_path / "c/renamed"
    first, second = _wandb_ids(wandb, one, other)
    assert first != second and all(re.fullmatch(r"base-[0-9a-f]{8}", name) for name in (first, second))
    assert [given["name"] for given in wandb.given] == ["base", "base"]
    moved.parent.mkdir()
    one.rename(moved)
    assert _wandb_ids(wandb, moved, other) == [first, second]
    # A run of an earlier version goes on under its name.
    (tmp_path / "old/wandb").mkdir(parents=True)
    assert _wandb_ids(wandb, tmp_path / "old", tmp_path / "old") == ["old", "old"]


@pytest.mark.parametrize("content", ["", "a/b", "x" * 5000, "a\nb", "\xff"])
def test_a_damaged_id_is_drawn_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str) -> None:
    wandb = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    (tmp_path / "wandb_id").write_text(content, encoding="latin-1")
    first, again = _wandb_ids(wandb, tmp_path, tmp_path)
    assert first == again and re.fullmatch(r"[\w.-]+-[0-9a-f]{8}", first)


class _Nemo(types.ModuleType):
    """Stands for the packages of the experiment manager."""

    def __init__(self, fail: str = "") -> None:
        super().__init__("nemo.utils.exp_manager")
        self.given: dict[str, Any] = {}
        self.argv: list[str] = []
        self.fail = fail

    def exp_manager(self, trainer: Any, given: dict[str, Any]) -> None:
        self.given, self.argv = given, sys.argv[:]
        if self.fail:
            raise AttributeError(self.fail)


def _manage(monkeypatch: pytest.MonkeyPatch, run: Path, nemo: _Nemo, settings: dict[str, Any]) -> None:
    other = types.SimpleNamespace(
        Trainer=lambda **given: types.SimpleNamespace(loggers=[]), LightningEnvironment=lambda: None
    )
    for name in ("nemo", "nemo.utils", "lightning", "lightning.pytorch", "lightning.pytorch.plugins"):
        monkeypatch.setitem(sys.modules, name, other)
    monkeypatch.setitem(sys.modules, "lightning.pytorch.plugins.environments", other)
    monkeypatch.setitem(sys.modules, "nemo.utils.exp_manager", nemo)
    build_loggers(RunDir(run), TrainConfig(str(run), 1, 1, exp_manager=settings))


def test_loggers_get_their_keys_and_see_no_key_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nemo, settings = _Nemo(), {"wandb_logger_kwargs": {"api_key": "SECRET", "project": "p"}}
    words = [
        "train.py",
        "base.yaml",
        "train.exp_manager={a: SECRET}",
        "train.exp_manager.b.c=SECRET",
        "train={a: SECRET}",
    ]
    monkeypatch.setattr(sys, "argv", words[:])
    _manage(monkeypatch, tmp_path, nemo, settings)
    assert nemo.given["wandb_logger_kwargs"] == settings["wandb_logger_kwargs"]
    assert "SECRET" not in str(nemo.argv) and nemo.argv[:2] == words[:2] and sys.argv == words
    # As RUN/config.yaml has it.
    _manage(monkeypatch, tmp_path, nemo, {"wandb_logger_kwargs": {"api_key": "(hidden)", "project": "p"}})
    assert nemo.given["wandb_logger_kwargs"] == {"project": "p"}
    nemo.fail = "wandb: no access with api_key=SECRET to p"
    with pytest.raises(
        ValueError, match=r"exp_manager: AttributeError: wandb: no access with api_key=\(hidden\) to p"
    ):
        _manage(monkeypatch, tmp_path, nemo, settings)


def test_a_package_that_is_missing_is_named_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron_r1.train.loop import train

    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match=r"train.wandb_project=p needs the package wandb"):
        train(small.config(small.written(tmp_path), "run", 2, "train.wandb_project=p"))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["symlink_to", "hardlink_to"])
@pytest.mark.parametrize("name", ["metrics.jsonl", "logs/rank_00000.log"])
def test_a_run_appends_to_no_file_of_others(tmp_path: Path, kind: str, name: str) -> None:
    run, victim = RunDir(tmp_path / "run"), tmp_path / "victim"
    victim.write_text("precious\n")
    (run.root / "logs").mkdir(parents=True)
    getattr(run.root / name, kind)(victim)
    with pytest.raises(OSError, match=r"where a file of our own is written; move it away"):
        RankLog(run.rank_log(0)) if "logs" in name else open(run.metrics, "a", opener=ours).close()
    if "logs" not in name:
        # What is rewritten whole takes the name, and follows no link.
        MetricsLog(run, 0).close()
    assert victim.read_text() == "precious\n"


def test_a_change_of_loggers_tells_no_key(tmp_path: Path) -> None:
    config = small.config(
        small.written(tmp_path), "run", 2, "train.exp_manager={api_key: NEW, project: b, s: {a: 1}}"
    )
    for old in ("OLD", "(hidden)"):
        before = {"train": {"exp_manager": {"api_key": old, "project": "a"}, "seed": [1] * 10**6}}
        (line,) = late_edits(before, config, 1)
        assert "OLD" not in line and "NEW" not in line and "'project': 'a'" in line and len(line) < 1000
