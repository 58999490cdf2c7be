"""Run commands one after the other, each once. A pipeline that was cut off goes on where it ended.

Every command resumes by itself. The pipeline only remembers which ones have finished, for which inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_r1.run.stage import Standing, read, standing
from megatron_r1.system.files import beside, write_text
from megatron_r1.system.process import RunLock, owner_environment


@dataclass(frozen=True)
class Stage:
    """One command of a pipeline."""

    name: str
    command: Sequence[str]
    outputs: Sequence[Path]
    """Files it leaves. A stage whose outputs are gone runs again."""
    files: Sequence[Path] = ()
    """Files it reads besides what earlier stages left: when they change, it runs again."""
    environment: dict[str, str] = field(default_factory=dict)

    def is_there(self) -> bool:
        """Whether all outputs are there."""
        return all(path.exists() for path in self.outputs)


class PipelineError(ValueError):
    """A stage failed; its own message stands above."""


def run(directory: Path, stages: Sequence[Stage]) -> None:
    """Bring every stage to its end, in order. Raises PipelineError at the first that fails."""
    lock = RunLock(directory / "stages")
    lock.take()
    began = time.monotonic()
    chain = hashlib.sha256()
    for number, stage in enumerate(stages, 1):
        title = f"[{number}/{len(stages)}] {stage.name}"
        # Chained: a stage whose predecessor changed has other inputs, and so runs again.
        chain.update(json.dumps([stage.name, list(stage.command)]).encode())
        for file in stage.files:
            chain.update(file.read_bytes())
        stamp = beside(directory / "stages" / "the list of stages", f"{stage.name.replace(' ', '_')}.json")
        made, inputs = (read(stamp) or {}).get("inputs"), chain.hexdigest()
        if standing({"inputs": made}, {"inputs": inputs}, stage.is_there) is Standing.DONE:
            print(f"{title}: done before", flush=True)
            continue
        print(f"{title}: {_short(stage.command)}", flush=True)
        seconds = _call(stage)
        write_text(stamp, json.dumps({"inputs": inputs, "seconds": seconds}))
        print(f"{title}: {seconds:.0f} s\n", flush=True)
    print(f"all {len(stages)} stages done, {time.monotonic() - began:.0f} s this time", flush=True)
    lock.release()


def _call(stage: Stage) -> float:
    start = time.monotonic()
    child = subprocess.Popen(stage.command, env={**os.environ, **owner_environment(), **stage.environment})
    try:
        status = child.wait()
    except KeyboardInterrupt:
        # The terminal has interrupted the child too, and a second signal would break off its own end.
        try:
            child.wait(timeout=20)
        except subprocess.TimeoutExpired:
            child.terminate()
            child.wait()
        raise
    # A tool that was asked to stop (SIGTERM) saves and ends with 0.
    absent = ", ".join(str(path) for path in stage.outputs if not path.exists())
    if status or absent:
        failed = f"with status {status}; its message stands above"
        end = failed if status else f"before its end: {absent} is not there yet"
        raise PipelineError(f"stage {stage.name} ended {end}. The same command again goes on from here")
    return time.monotonic() - start


def _short(command: Sequence[str]) -> str:
    """The command as a reader would type it."""
    typed = " ".join("python" if part == sys.executable else part for part in command)
    return typed.replace("python -m torch.distributed.run", "torchrun")
