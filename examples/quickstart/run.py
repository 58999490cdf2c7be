"""The whole loop on real text: gather, tokenize, train, score, mix, train on, compare, report.

    make quickstart                                  # or, once installed:
    python examples/quickstart/run.py

Run again, it goes on where it was cut off, or answers at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import gather_text

from megatron_r1.run.pipeline import Stage, run
from megatron_r1.system.files import write_text
from megatron_r1.system.process import exit_when_orphaned
from megatron_r1.system.terminal import user_errors
from megatron_r1.system.yaml_io import read_yaml

HERE = Path("examples/quickstart")
ROOT = Path(__file__).resolve().parent.parent.parent
DEFAULT = Path("runs/quickstart")
RANKS = 2


@dataclass(frozen=True)
class Size:
    """How much of everything; `small` is the same pipeline at the size of a test."""

    megabytes: float
    """Text per source."""
    vocab_size: int
    probe_tokens: int
    """Of each capability's probing set, from each of its sources."""
    overrides: tuple[str, ...] = ()
    """Of the model and the run."""
    first: tuple[str, ...] = ()
    second: tuple[str, ...] = ()
    scoring: tuple[str, ...] = ()


SIZES = {
    "full": Size(megabytes=5, vocab_size=4096, probe_tokens=10_000),
    "small": Size(
        megabytes=0.4,
        vocab_size=1024,
        probe_tokens=2_000,
        overrides=(
            "model.num_layers=2",
            "model.hidden_size=64",
            "model.ffn_hidden_size=128",
            "model.num_attention_heads=2",
            "model.num_query_groups=1",
            "model.head_dim=32",
            "model.vocab_size=1024",
            "data.seq_length=64",
            "train.checkpoint_every=8",
            "train.probe_every=8",
        ),
        first=("phases.uniform.steps=24", "phases.uniform.warmup_steps=2"),
        second=("steps=12",),
        scoring=("influence.examples=24", "influence.steps=[16,24]"),
    ),
}


def stages(directory: Path, size: Size) -> list[Stage]:
    """The commands of the quickstart, as anyone would type them, for a run in `directory`."""
    text, data, probes = directory / "text", directory / "data", directory / "probes"
    tokenizer, mix, control = directory / "tokenizer.model", directory / "mix.yaml", directory / "control"
    capabilities: dict[str, list[str]] = {}
    for name, source in gather_text.SOURCES.items():
        if source.domain != "none":
            capabilities.setdefault(source.domain, []).append(name)
    jsonl = {name: text / f"{name}.jsonl" for name in gather_text.SOURCES}
    prefix = {name: data / f"{name}_text_document" for name in gather_text.SOURCES}

    first = [Path("examples/models/tiny.yaml"), HERE / "train.yaml", probes / "split.yaml"]
    options = [*([] if directory == DEFAULT else [f"train.run={directory}"]), *size.overrides, *size.first]
    second = [f"phases.influence.{o}" for o in size.second]
    third = [f"phases.control.{o}" for o in size.second]
    branch = _steps("train.yaml", "uniform", size.first)
    last = branch + _steps("phase2.yaml", "influence", size.second)

    def python(script: str, *words: object) -> list[str]:
        return [sys.executable, script, *map(str, words)]

    def torchrun(script: str, *words: object) -> list[str]:
        return ["examples/launch/one_machine.sh", *map(str, ("--nproc-per-node", RANKS, script, *words))]

    def launched(name: str, command: list[str], outputs: list[Path]) -> Stage:
        # A thread for each rank: torchrun would say at length that it sets this.
        threads = str(max(1, len(os.sched_getaffinity(0)) // RANKS))
        environment = {"OMP_NUM_THREADS": threads, "PYTHON": sys.executable}
        configs = [ROOT / word for word in command if word.startswith("examples/") and word.endswith(".yaml")]
        return Stage(name, command, outputs, files=configs, environment=environment)

    return [
        Stage(
            "gather text",
            python("examples/quickstart/gather_text.py", "--output-dir", text, "--megabytes", size.megabytes),
            list(jsonl.values()),
        ),
        Stage(
            "train tokenizer",
            python(
                "tools/train_tokenizer.py", "--input", *jsonl.values(), "--vocab-size", size.vocab_size,
                "--max-megabytes", 7, "--output", tokenizer, "--overwrite",
            ),
            [tokenizer],
        ),
        *(
            Stage(
                f"preprocess {name}",
                python(
                    "tools/preprocess_data.py", "--input", jsonl[name], "--json-keys", "text",
                    "--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", tokenizer,
                    "--output-prefix", data / name, "--append-eod", "--workers", 2, "--overwrite",
                ),
                [Path(f"{prefix[name]}.bin"), Path(f"{prefix[name]}.idx")],
                )
            for name in gather_text.SOURCES
        ),
        Stage(
            "set probes aside",
            python(
                "tools/curate_probes.py", "--output-dir", probes, "--tokens-per-source", size.probe_tokens,
                "--sources", *(f"{name}={p}" for name, p in prefix.items()),
                "--capabilities", *(f"{c}={','.join(names)}" for c, names in capabilities.items()),
            ),
            [probes / "split.yaml"],
        ),
        launched(
            "train the uniform blend",
            torchrun("tools/train.py", *first, *options),
            [directory / "checkpoints" / f"step_{branch:08d}"],
        ),
        launched(
            "score influence",
            torchrun("tools/compute_influence.py", *first, HERE / "influence.yaml", *options, *size.scoring),
            [directory / "influence"],
        ),
        Stage(
            "mix",
            python(
                "tools/make_mix.py", *first, HERE / "influence.yaml", HERE / "phase2.yaml",
                *options, *size.scoring, *second, "--output", mix,
            ),
            [mix],
            files=[ROOT / HERE / "influence.yaml"],
        ),
        launched(
            "train on, by influence",
            torchrun("tools/train.py", *first, HERE / "phase2.yaml", mix, *options, *second),
            [directory / "checkpoints" / f"step_{last:08d}"],
        ),
        launched(
            "train on, uniform control",
            torchrun(
                "tools/train.py", *first, HERE / "control.yaml", *options, *third, f"train.run={control}",
                f"train.init_from={directory / 'checkpoints' / f'step_{branch:08d}'}",
            ),
            [control / "checkpoints" / f"step_{last:08d}"],
        ),
        Stage(
            "report",
            python("tools/report.py", directory, "--control", control),
            [directory / "reports" / "index.html"],
        ),
    ]  # fmt: skip


def _same_size(directory: Path, size: str) -> None:
    """Refuse to put a run of one size into the directory of another."""
    path = directory / "size"
    if not path.exists():
        write_text(path, size)
    elif (before := path.read_text()) != size:
        raise ValueError(f"{directory} holds a run of --size {before}; name another --run, or remove it")


def _steps(file: str, phase: str, overrides: tuple[str, ...]) -> int:
    """Steps of a phase: the file's, unless this size says otherwise."""
    steps = read_yaml(ROOT / HERE / file).tree["phases"][phase]["steps"]
    for override in overrides:
        key, value = override.split("=")
        if key in ("steps", f"phases.{phase}.steps"):
            steps = int(value)
    return int(steps)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", type=Path, help="run directory (default: runs/quickstart[-small])")
    parser.add_argument("--size", choices=SIZES, default="full", help="small: as the tests run it")
    options = parser.parse_args()
    directory = (options.run or (DEFAULT if options.size == "full" else Path(f"{DEFAULT}-small"))).resolve()
    os.chdir(ROOT)
    if directory.is_relative_to(ROOT):
        directory = directory.relative_to(ROOT)
    # Killed together with whatever started it: nothing writes on behind the next start's back.
    exit_when_orphaned()
    with user_errors():
        _same_size(directory, options.size)
        run(directory, stages(directory, SIZES[options.size]))
        print(
            f"open {directory / 'reports' / 'index.html'} in a browser; "
            f"{Path(sys.executable).parent / 'tensorboard'} --logdir {directory}"
        )


if __name__ == "__main__":
    main()
