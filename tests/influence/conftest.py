"""The run that scores are computed of, trained once."""

from __future__ import annotations

import pytest

from megatron_r1.config import Config, DataConfig, InfluenceConfig, PhaseConfig, SourceConfig, TrainConfig
from megatron_r1.train.loop import train
from tests import launch
from tests.distributed import on_ranks
from tests.influence import tiny

SEQ = 32


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run with checkpoints at steps 2 and 4 of two sources, and two probing sets."""
    root = tmp_path_factory.mktemp("score")
    for number, name in enumerate(("a", "b", "code", "math")):
        launch.write_corpus(root / name, 40 if number < 2 else 8, seed=number % 2)
    config = Config(
        model=tiny.MODEL,
        data=DataConfig(
            sources={"a": SourceConfig(f"{root}/a"), "b": SourceConfig(f"{root}/b", documents=3)},
            seq_length=SEQ,
        ),
        train=TrainConfig(
            run=f"{root}/run", global_batch=4, micro_batch=2, precision="fp32", checkpoint_every=2
        ),
        phases={"one": PhaseConfig(steps=4, learning_rate=1e-2)},
        influence=InfluenceConfig(
            directions={"code": f"{root}/code", "math": f"{root}/math"},
            examples=50,
            probe_examples=12,
            micro_batch=2,
        ),
    )
    on_ranks(1, train, config)
    return config
