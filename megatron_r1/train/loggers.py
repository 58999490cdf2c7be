"""Other loggers of a step's figures: Weights & Biases, and those of NeMo's experiment manager."""

from __future__ import annotations

import importlib
import re
import secrets
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any, Protocol

from megatron_r1.config import TrainConfig
from megatron_r1.run.layout import RunDir
from megatron_r1.system.errors import HIDDEN, brief, hidden, require, unhidden
from megatron_r1.system.files import regular, write_text


class Logger(Protocol):
    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


_NEMO = ("nemo.utils.exp_manager", "lightning.pytorch", "lightning.pytorch.plugins.environments")


def require_packages(train: TrainConfig) -> None:
    """Raise ValueError if a package is not installed whose logger `train` names."""
    if train.wandb_project:
        require(
            "wandb",
            f"train.wandb_project={brief(hidden(train.wandb_project))}",
            "wandb, or leave the field out",
        )
    for module in _NEMO if train.exp_manager is not None else ():
        require(module, "train.exp_manager", "'megatron_r1[nemo]', or leave the field out")


def build_loggers(run: RunDir, train: TrainConfig) -> list[Logger]:
    """The loggers that `train` names. Raises ValueError if a package is not installed."""
    require_packages(train)
    out: list[Logger] = []
    with _command_hidden():
        if train.wandb_project:
            out.append(_WeightsAndBiases(run, train.wandb_project))
        if train.exp_manager is not None:
            out.append(_ExperimentManager(run, train.exp_manager))
    return out


@contextmanager
def _command_hidden() -> Iterator[None]:
    """Loggers record the command line. Settings of loggers on it may hold keys."""
    given = sys.argv[:]
    for n, word in enumerate(given):
        if word.startswith(("train=", "train.exp_manager")):
            sys.argv[n] = f"{word.partition('=')[0]}={HIDDEN}"
    try:
        yield
    finally:
        sys.argv[:] = given


def _wandb_id(run: RunDir) -> str:
    """Name of the run among the project's. It stays when the run directory is moved or renamed.

    It is kept in a file. Runs of earlier versions, which have none, go on under the directory's name.
    """
    with (
        suppress(OSError, UnicodeDecodeError),
        open(run.wandb_id, encoding="utf-8", opener=regular) as file,
    ):
        if re.fullmatch(r"[\w.-]{1,128}", kept := file.read(200).strip()):
            return kept
    name = run.root.absolute().name
    if not (run.root / "wandb").is_dir():
        name = f"{re.sub(r'[^A-Za-z0-9_.-]', '-', name)[:48]}-{secrets.token_hex(4)}"
    write_text(run.wandb_id, name + "\n")
    return name


class _WeightsAndBiases:
    def __init__(self, run: RunDir, project: str):
        wandb = importlib.import_module("wandb")
        # One run of theirs for one of ours, however often it was resumed.
        name = run.root.absolute().name
        self._run = wandb.init(project=project, name=name, id=_wandb_id(run), dir=run.root, resume="allow")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _ExperimentManager:
    """The loggers that `exp_manager` attaches to a Lightning trainer, which trains nothing here."""

    def __init__(self, run: RunDir, given: Mapping[str, Any]):
        nemo, lightning, environments = map(importlib.import_module, _NEMO)
        trainer = lightning.Trainer(
            accelerator="cpu",
            devices=1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            # This rank alone, whatever launched it: only the first rank logs.
            plugins=[environments.LightningEnvironment()],
        )
        ours = {
            "exp_dir": str(run.root / "nemo"),
            "name": run.root.name,
            "use_datetime_version": False,
            "create_checkpoint_callback": False,
        }
        # What a configuration written by an earlier launch leaves out, loggers read from the environment.
        try:
            nemo.exp_manager(trainer, {**ours, **unhidden(given)})
        except Exception as error:  # Of NeMo, Lightning and all loggers, whose messages quote settings.
            mistake = f"{type(error).__name__}: {hidden(str(error))}"
            raise ValueError(f"train.exp_manager: {mistake}") from None
        self._loggers = trainer.loggers

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.save()
            logger.finalize("success")
