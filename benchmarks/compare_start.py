"""What opening and resuming cost: this tree against another commit, in turns, on one machine.

python benchmarks/compare_start.py main
python benchmarks/compare_start.py HEAD~20 --model examples/models/tiny.yaml --repeats 9

Each turn is a process of each tree. It opens the same pairs as a launch would, loads the same checkpoint with
its optimizer's state, and lists a run's checkpoints. Prints medians and the ratio of each. Everything is
written by the other commit, whose extension is built first.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from io import BytesIO
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAIRS, DOCUMENTS, WORDS = 8, 40_000, 60
SEQ = 128


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", help="the other commit")
    parser.add_argument("--model", type=Path, default=ROOT / "examples/models/140m.yaml")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--folder", type=Path, help="where the pairs and the checkpoint go")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker, options.folder, options.model)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        other = folder / "other"
        packed = subprocess.run(("git", "archive", options.base), cwd=ROOT, check=True, capture_output=True)
        with tarfile.open(fileobj=BytesIO(packed.stdout)) as archive:
            archive.extractall(other, filter="data")
        build = (sys.executable, "setup.py", "build_ext", "--inplace")
        subprocess.run(build, cwd=other, check=True, capture_output=True)
        model = options.model.resolve()
        preprocess(other, folder)
        turn(other, "save", folder, model)
        found: dict[str, tuple[list[float], list[float]]] = {}
        for _ in range(options.repeats):
            for side, tree in enumerate((other, ROOT)):
                for name, seconds in turn(tree, "time", folder, model).items():
                    found.setdefault(name, ([], []))[side].append(seconds)
    for name, both in found.items():
        before, now = map(statistics.median, both)
        pairs = [b / a for a, b in zip(*both, strict=True)]
        print(
            f"{name}: {before:.4f} s at {options.base}, {now:.4f} s here, ratio {now / before:.3f} "
            f"(of turns {min(pairs):.3f} to {max(pairs):.3f}, {options.repeats} of them)"
        )


def preprocess(tree: Path, folder: Path) -> None:
    """PAIRS datasets of real form: sidecars, hashes, origins."""
    chosen = random.Random(1)
    with open(folder / "text.jsonl", "w", encoding="utf-8") as file:
        for _ in range(DOCUMENTS):
            text = " ".join(f"word{chosen.randrange(500)}" for _ in range(WORDS))
            file.write(json.dumps({"text": text}) + "\n")
    learn = "tools/train_tokenizer.py --input text.jsonl --vocab-size 280 --max-megabytes 1 --output t.model"
    run(tree, learn.split(), folder)
    for number in range(PAIRS):
        words = (
            "tools/preprocess_data.py --input text.jsonl --append-eod "
            f"--tokenizer-type SentencePieceTokenizer --tokenizer-model t.model --output-prefix pair{number}"
        )
        run(tree, words.split(), folder)


def turn(tree: Path, task: str, folder: Path, model: Path) -> dict[str, float]:
    words = [__file__, "-", "--worker", task, "--folder", str(folder), "--model", str(model)]
    answer: dict[str, float] = json.loads(run(tree, words, folder).splitlines()[-1])
    return answer


def run(tree: Path, words: list[str], folder: Path) -> str:
    program = words[0] if os.path.isabs(words[0]) else str(tree / words[0])
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        (sys.executable, program, *words[1:]), cwd=folder, env=environment, text=True, capture_output=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} in {tree}: status {done.returncode}\n{done.stderr[-2000:]}")
    return done.stdout


def worker(task: str, folder: Path, shape: Path) -> None:
    """One process: save the checkpoint, or print the seconds of each start."""
    # The package of the tree on PYTHONPATH.
    from megatron_r1.checkpoint.files import complete_checkpoints
    from megatron_r1.checkpoint.load import load_checkpoint
    from megatron_r1.checkpoint.save import save_checkpoint
    from megatron_r1.config import (
        Config,
        DataConfig,
        ModelConfig,
        ParallelConfig,
        PhaseConfig,
        SourceConfig,
        TrainConfig,
    )
    from megatron_r1.data.open import open_data
    from megatron_r1.parallel import process_groups
    from megatron_r1.records import TrainState
    from megatron_r1.system.yaml_io import read_yaml
    from megatron_r1.train.step import build_training

    model = ModelConfig(**read_yaml(shape).tree["model"])
    prefixes = sorted(str(path.with_suffix("")) for path in folder.glob("pair*.idx"))
    config = Config(
        model=model,
        data=DataConfig(
            sources={f"s{n}": SourceConfig(prefix=p) for n, p in enumerate(prefixes)}, seq_length=SEQ
        ),
        train=TrainConfig(run=str(folder / "run"), global_batch=2, micro_batch=1, precision="bf16"),
        phases={"one": PhaseConfig(steps=10)},
    )
    seconds = {}
    if task == "time":
        began = time.perf_counter()
        open_data(config)
        seconds[f"opening {len(prefixes)} pairs"] = time.perf_counter() - began
    with process_groups(ParallelConfig()):
        training = build_training(config)
        for group in training.optimizer.param_groups:
            group["lr"] = 1e-4
        checkpoints = folder / "checkpoints"
        if task == "save":
            training.optimizer.step()
            state = TrainState(1)
            save_checkpoint(checkpoints, training.gpt, training.optimizer, state, model, "one", "{}")
        else:
            began = time.perf_counter()
            (last,) = complete_checkpoints(checkpoints)
            seconds["listing checkpoints"] = time.perf_counter() - began
            for name in ("loading a checkpoint", "loading it again"):
                began = time.perf_counter()
                load_checkpoint(last.path, training.gpt, training.optimizer, model)
                seconds[name] = time.perf_counter() - began
    print(json.dumps(seconds))


if __name__ == "__main__":
    main()
