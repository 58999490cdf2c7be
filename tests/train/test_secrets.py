"""A run's directory holds no key of a logger, and is readable to whom the user's umask says."""

from __future__ import annotations

import os
import stat
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.distributed import on_ranks
from tests.faults import inputs

SETTINGS = "train.exp_manager={wandb_logger_kwargs: {api_key: SEC5EC, project: p}, uri: 'https://u:SEC5EC@h'}"
PACKAGES = ("nemo", "nemo.utils", "nemo.utils.exp_manager", "lightning", "lightning.pytorch")
PACKAGES += ("lightning.pytorch.plugins", "lightning.pytorch.plugins.environments")


def _train(given: Path, launches: Sequence[Sequence[str]]) -> list[tuple[int, str]]:
    """Launches of tools/train.py with stand-ins for NeMo and Lightning, which write down their settings."""

    def manage(trainer: Any, settings: dict[str, Any]) -> None:
        with open(given, "a") as file:
            print(settings.get("wandb_logger_kwargs"), sys.argv[1:], file=file)

    package: Any = types.ModuleType("package")
    package.Trainer = lambda **_: types.SimpleNamespace(loggers=[])
    package.LightningEnvironment, package.exp_manager = lambda: None, manage
    sys.modules.update(dict.fromkeys(PACKAGES, package))
    os.umask(0o077)
    os.environ.setdefault("GLIBC_TUNABLES", "")
    # Of several launches in one process the first one's store keeps the port.
    del os.environ["MASTER_PORT"]
    return [inputs.call("train", *words) for words in launches]


def test_a_run_keeps_keys_to_itself(tmp_path: Path) -> None:
    run, given = tmp_path / "run", tmp_path / "given"
    words = [*inputs.run_words(run, inputs.pair(tmp_path / "x"), steps=1), SETTINGS]
    longer = "phases.one={steps: 2}"
    # What stands in the run goes on, without the key, and an edit of the settings tells none.
    launches = [
        words,
        [str(run / "config.yaml"), longer],
        [*words, longer, "train.exp_manager.new=1", "--check"],
    ]
    [answers] = on_ranks(1, _train, given, launches)
    assert [status for status, _ in answers] == [0, 0, 0], answers
    assert "SEC5EC" not in str(answers)
    first, second = given.read_text().splitlines()
    assert "'api_key': 'SEC5EC'" in first and first.count("SEC5EC") == 1
    assert second.startswith("{'project': 'p'} ")
    paths = [run, *run.rglob("*")]
    assert [path for path in paths if path.is_file() and b"SEC5EC" in path.read_bytes()] == []
    assert [path for path in paths if stat.S_IMODE(path.stat().st_mode) & 0o077] == []
