"""Where a step's figures go, too: Weights & Biases, the loggers of NeMo's experiment manager."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from megatron_r1.config import TrainConfig
from megatron_r1.run.layout import RunDir
from megatron_r1.system.errors import require


class Logger(Protocol):
    def log(self, scalars: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


def build_loggers(run: RunDir, train: TrainConfig) -> list[Logger]:
    """What `train` names. Raises ValueError where its package is not installed."""
    out: list[Logger] = []
    if train.wandb_project:
        out.append(_WeightsAndBiases(run, train.wandb_project))
    if train.exp_manager is not None:
        out.append(_ExperimentManager(run, train.exp_manager))
    return out


class _WeightsAndBiases:
    def __init__(self, run: RunDir, project: str):
        wandb = require("wandb", f"train.wandb_project={project}", "wandb, or leave the field out")
        # One run of theirs for one of ours, however often it was resumed.
        name = run.root.name
        self._run = wandb.init(project=project, name=name, id=name, dir=run.root, resume="allow")

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        self._run.log(dict(scalars), step=step)

    def close(self) -> None:
        self._run.finish()


class _ExperimentManager:
    """The loggers that `exp_manager` attaches to a Lightning trainer, which trains nothing here."""

    def __init__(self, run: RunDir, given: Mapping[str, Any]):
        nemo, lightning, environments = (
            require(module, "train.exp_manager", "'megatron_r1[nemo]', or leave the field out")
            for module in (
                "nemo.utils.exp_manager",
                "lightning.pytorch",
                "lightning.pytorch.plugins.environments",
            )
        )
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
        nemo.exp_manager(trainer, {**ours, **given})
        self._loggers = trainer.loggers

    def log(self, scalars: Mapping[str, float], step: int) -> None:
        for logger in self._loggers:
            logger.log_metrics(dict(scalars), step=step)

    def close(self) -> None:
        for logger in self._loggers:
            logger.save()
            logger.finalize("success")
