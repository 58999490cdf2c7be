"""Every command that README.md shows in a block works, or is run by something else that CI runs."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from tests.launch import ROOT

PREPROCESS, TRAIN = (
    "python tools/preprocess_data.py --input docs.jsonl",
    "examples/launch/one_machine.sh --nproc-per-node 8",
)
HELD_BY = {
    "make quickstart": "tests/test_quickstart.py::test_killed_twice_it_goes_on",
    "make test": ".ci/run::make test",
    # One makes what the other trains on.
    PREPROCESS: "tests/test_readme.py::test_the_commands_by_hand_fit_together",
    TRAIN: "tests/test_readme.py::test_the_commands_by_hand_fit_together",
}
"""How a command begins -> the file that runs it, and what stands there."""


def commands() -> list[str]:
    """A line each, without its comment."""
    blocks = re.findall(r"^```bash\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.join(words) for line in lines if (words := shlex.split(line, comments=True))]


def starting(begin: str) -> str:
    (found,) = [command for command in commands() if command.startswith(begin)]
    return found


def test_every_command_is_held_by_something() -> None:
    assert [c for c in commands() if not any(c.startswith(begin) for begin in HELD_BY)] == []
    for begin, holder in HELD_BY.items():
        file, _, what = holder.partition("::")
        assert starting(begin) and what in (ROOT / file).read_text()


def test_the_commands_by_hand_fit_together(tmp_path: Path) -> None:
    """As they stand there, but for the trainer: one rank of its launch checks, and trains nothing."""
    for name in ("tools", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    texts = [f"question {n}?\n\nso {n}" for n in range(200)]
    (tmp_path / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    train_sentencepiece([tmp_path / "docs.jsonl"], tmp_path / "tokenizer.model", vocab_size=280)
    [mine] = re.findall(r"^```yaml\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "my_run.yaml").write_text(mine)
    shorter = ("data.seq_length=64", "phases.one.steps=2")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    launch = shlex.split(starting(TRAIN))
    script = launch.index("tools/train.py")
    ranks = {"WORLD_SIZE": launch[launch.index("--nproc-per-node") + 1], "RANK": "0"}
    for words, more in (
        (shlex.split(starting(PREPROCESS))[1:], {}),
        ([*launch[script:], *shorter, "--check"], ranks),
    ):
        done = subprocess.run(
            [sys.executable, *words],
            cwd=tmp_path,
            env={**environment, **more},
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
    assert "micro_batch: 4" in done.stdout and not (tmp_path / "runs").exists()
