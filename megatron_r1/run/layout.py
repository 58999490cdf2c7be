"""Layout of a run directory.

RUN/ config.yaml  plan.json  metrics.jsonl  ledger.jsonl  checkpoints/  tb/  logs/  influence/  reports/
"""

from __future__ import annotations

from pathlib import Path


class RunDir:
    def __init__(self, root: Path):
        self.root = root
        self.config = root / "config.yaml"
        self.plan = root / "plan.json"
        self.metrics = root / "metrics.jsonl"
        self.checkpoints = root / "checkpoints"
        self.tensorboard = root / "tb"
        self.wandb_id = root / "wandb_id"
        self.influence = root / "influence"
        self.reports = root / "reports"

    def rank_log(self, rank: int) -> Path:
        return self.root / "logs" / f"rank_{rank:05d}.log"
