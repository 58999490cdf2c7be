"""Does influence predict? Scores of groups of real text, held against models trained without them.

make datamodel, or: OMP_NUM_THREADS=1 python benchmarks/datamodel.py [--output DIR] [--quick]

Text of installed packages (examples/quickstart/gather_text.py) is cut into 40 groups of neighbouring
documents. Each is a source; part of it is set aside for the probing sets, which give the directions, and for
held-out sets. A small model trains on all groups alike, in two phases. At T checkpoints of the second
tools/compute_influence.py's scores give each group's density rho_g (Eq. 5), with alpha (Eq. 4) proportional
to the step, or to the learning rate, which is what a step on an example is multiplied with.

Then the second phase is trained again from where the first ends: without each group (Eq. 1), and on random
halves of the groups. Every batch holds a window of each group; a retraining leaves out the rows of the groups
that it is not to see, and the others come in the same order. Seeds are orders of the data.

    leave-one-out   Spearman of rho_g with the measured impact of Eq. 1, over groups
    LDS             linear datamodeling score: Spearman of the sum of rho_g over a subset's groups with the
                    measured loss of the model trained on it, over subsets
    ceiling         what a predictor without error would reach, as far as the seeds agree

with 95 % bootstrap intervals over groups, or subsets; measured losses are means over seeds. DIR becomes a run
directory. DIR/measured_impact.json, {capability: {source: nats}}, says how much higher the loss on
the capability's probing set is without the source. Run again, it goes on where it was cut off.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import torch
from scipy.stats import spearmanr
from torch import Tensor

from megatron_r1 import config_io
from megatron_r1.checkpoint import files as checkpoint_files
from megatron_r1.checkpoint.files import evenly_spaced, step_path
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.config import Config, InfluenceConfig, MixConfig
from megatron_r1.curation.probes import curate_probes
from megatron_r1.data.indexed import open_corpus
from megatron_r1.data.loader import BatchLoader, example_batches
from megatron_r1.data.open import open_data
from megatron_r1.data.windows import Examples
from megatron_r1.influence.curvature import resolve
from megatron_r1.influence.score import compute_influence
from megatron_r1.influence.store import read_scores
from megatron_r1.mixture.weights import checkpoint_weights, densities
from megatron_r1.parallel import ParallelContext, on_device, process_groups
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.tokenizer import SentencePiece, build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.records import Batch
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import replacing, write_json, write_text
from megatron_r1.system.terminal import Progress, user_errors
from megatron_r1.system.yaml_io import parse_yaml
from megatron_r1.train.batches import micro_batches
from megatron_r1.train.loop import train
from megatron_r1.train.optimizer import set_schedule
from megatron_r1.train.schedule import phase_spans
from megatron_r1.train.step import Shape, build_training, label_losses, train_step

GATHER = Path(__file__).resolve().parent.parent / "examples/quickstart/gather_text.py"
SOURCES = {
    "python-stdlib": ("code", 6),
    "torch-source": ("code", 6),
    "sympy": ("math", 6),
    "mathlib-python": ("math", 6),
    "gcide": ("knowledge", 6),
    "world-factbook": ("knowledge", 6),
    "base64": ("none", 4),
}
"""Source -> the capability that it serves, and how many groups it is cut into."""
GROUPS = [f"{source}-{n + 1}" for source, (_, count) in SOURCES.items() for n in range(count)]
CAPABILITIES = ("code", "math", "knowledge")
MEMBERS = {c: [g for g in GROUPS if SOURCES[g.rpartition("-")[0]][0] == c] for c in CAPABILITIES}
PIECE = 500
"""Characters of a document at most, so that a group has some to set aside."""
ASIDE = 0.33
"""Of a group's tokens."""
CURVATURES = [k for k in get_args(get_type_hints(InfluenceConfig)["curvature"]) if k != "auto"]
COMPARED = {"half": "LDS", "without": "Leave-one-out"}
RESAMPLES = 1000
SETTINGS = """
model: {num_layers: 2, hidden_size: 64, ffn_hidden_size: 192, num_attention_heads: 2, num_query_groups: 1,
  head_dim: 32, vocab_size: 1024}
data: {seq_length: 64}
train: {precision: fp32, global_batch: 40, micro_batch: 40}
phases:
  first: {learning_rate: 4.0e-3, warmup_steps: 20, decay: constant}
  second: {learning_rate: 1.0e-3}
"""
"""What all sizes share. A batch is a window of each group; the second phase decays linearly to a tenth."""

Losses = dict[str, float]  # nats a label by set, "probe code" or "heldout code"


@dataclass(frozen=True)
class Size:
    first: int
    """Steps of the first phase."""
    second: int
    """Of the second, and windows that it draws of each group; all of a group are a few more."""
    checkpoints: int
    probe_tokens: int
    """Of each group, in each of the two sets."""
    left_out: int
    """Groups without which is trained."""
    subsets: int
    seeds: int


FULL = Size(first=200, second=50, checkpoints=10, probe_tokens=640, left_out=40, subsets=40, seeds=3)
QUICK = Size(first=20, second=24, checkpoints=2, probe_tokens=96, left_out=4, subsets=4, seeds=2)


def configure(output: Path, size: Size) -> Config:
    """The run, on data that are made where they are not there yet."""
    text, tokenizer, probes = output / "text", output / "tokenizer.model", output / "probes"
    shared, kind = parse_yaml(SETTINGS, "SETTINGS").tree, SentencePiece.kind
    subprocess.run([sys.executable, GATHER, "--output-dir", text], check=True)
    files = [text / f"{source}.jsonl" for source in SOURCES]
    if not tokenizer.exists():
        train_sentencepiece(files, tokenizer, shared["model"]["vocab_size"], max_bytes=3_000_000)
    tokens = size.second * shared["data"]["seq_length"] / (1 - ASIDE) + PIECE
    prefixes: dict[str, str] = {}
    for path in itertools.chain.from_iterable(cut(file, tokenizer, tokens) for file in files):
        made = preprocess([path], output / "data" / path.stem, kind, tokenizer, append_eod=True, log=str)
        prefixes[path.stem] = next(iter(made))
    curate_probes(prefixes, MEMBERS, probes, tokens_per_source=size.probe_tokens, fraction=ASIDE)
    write_text(output / "settings.yaml", SETTINGS)
    return config_io.load(
        [
            str(probes / "split.yaml"),
            str(output / "settings.yaml"),
            f"train.run={output}",
            f"train.keep_spaced={size.checkpoints}",
            f"phases.first.steps={size.first}",
            f"phases.second.steps={size.second}",
            f"influence.examples={2 * size.second}",
            f"influence.steps={evenly_spaced(size.first, size.first + size.second, size.checkpoints)}",
        ]
    )


def cut(path: Path, tokenizer: Path, tokens: float) -> Iterator[Path]:
    """The groups of a source: stretches of its documents by origin, from evenly spaced places."""
    encode = build_tokenizer(SentencePiece.kind, tokenizer).encode
    documents = sorted(map(json.loads, path.open(encoding="utf-8")), key=lambda d: str(d["origin"]))
    texts = [document["text"] for document in documents]
    pieces = [text[i : i + PIECE] for text in texts for i in range(0, len(text), PIECE)]
    (path.parent / "groups").mkdir(exist_ok=True)
    names = [name for name in GROUPS if name.startswith(path.stem)]
    for number, name in enumerate(names):
        group = path.parent / "groups" / f"{name}.jsonl"
        if not group.exists():
            left = tokens
            with replacing(group) as stream:
                for piece in itertools.islice(pieces, len(pieces) * number // len(names), None):
                    stream.write(json.dumps({"text": piece}).encode() + b"\n")
                    left -= len(encode(piece))
                    if left < 0:
                        break
        yield group


class Retrainings:
    """The second phase, again and again, and the losses it leads to."""

    def __init__(self, config: Config, context: ParallelContext):
        assert config.influence is not None
        self.config, self.context = config, context
        self.training = build_training(config)
        self.span = phase_spans(config)[-1]
        self.start = step_path(RunDir(Path(config.train.run)).checkpoints, self.span.start)
        named = {f"probe {c}": config.influence.directions[c] for c in CAPABILITIES}
        named |= {f"heldout {c}": config.data.probes[c] for c in CAPABILITIES}
        opened = [open_corpus(name, prefix) for name, prefix in named.items()]
        seq_length, batch = config.data.seq_length, config.train.global_batch
        sets = [(corpus, np.arange(corpus.windows(seq_length))) for corpus in opened]
        self.held_out = Examples(sets, seq_length)
        self.sets = [corpus.name for corpus in opened]
        self.shape, self.eval_shape = (Shape(batch, seq_length, n) for n in (len(GROUPS), len(sets)))

    def losses(self, seed: int, kept_G: np.ndarray) -> Losses:
        """After training on the groups `kept_G` in the order of `seed`; 0 is the run's own."""
        config, optimizer, keep_G = self.config, self.training.optimizer, torch.from_numpy(kept_G)
        load_checkpoint(self.start, self.training.gpt, optimizer, config.model)
        data = dataclasses.replace(config.data, seed=config.data.seed + seed)
        sources = open_data(dataclasses.replace(config, data=data))
        loader = BatchLoader(sources.plan, sources.corpora, config.data.seq_length)
        batch = config.train.global_batch
        for step in range(self.span.start, self.span.end):
            set_schedule(optimizer, self.span.learning_rate(step), config.optimizer.weight_decay)
            batches = micro_batches(loader, step * batch, batch, batch, self.context)
            kept = (rows_of(whole, keep_G[whole.source_B]) for whole in batches)
            train_step(self.training, kept, 1, self.shape)
        span = (0, len(self.held_out))
        passes = self.held_out.passes(*span, batch * self.context.data_size)
        rows = example_batches(self.held_out, span, batch, self.context, None)
        batches = (on_device(held) for held, _ in rows)
        loss_N, tokens_N = label_losses(self.training, batches, passes, self.eval_shape)
        return dict(zip(self.sets, (loss_N / tokens_N).tolist(), strict=True))


def rows_of(batch: Batch, keep_B: Tensor) -> Batch:
    """Left-out rows are not there at all, so that a step's mean is over the labels of the others."""
    rows = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
    return Batch(**{name: None if t is None else t[keep_B] for name, t in rows.items()})


def trained_on(size: Size) -> dict[str, np.ndarray]:
    """Every retraining's groups, bool [G] each."""
    without = {f"without {GROUPS[g]}": np.arange(len(GROUPS)) != g for g in range(size.left_out)}
    generator = np.random.default_rng(0)
    halves = {f"half {n}": generator.permutation(len(GROUPS)) < len(GROUPS) // 2 for n in range(size.subsets)}
    return {"all": np.ones(len(GROUPS), bool), **without, **halves}


def measure(config: Config, size: Size, output: Path) -> list[dict[str, Losses]]:
    """Losses by retraining, of each seed; each is on the disk before the next begins."""
    path = output / "losses.json"
    found = json.loads(path.read_text()) if path.exists() else [{} for _ in range(size.seeds)]
    wanted = [(seed, name, kept_G) for seed in range(size.seeds) for name, kept_G in trained_on(size).items()]
    left = [one for one in wanted if one[1] not in found[one[0]]]
    if left:
        bar = Progress("retrain", len(wanted), "runs", len(wanted) - len(left))
        with process_groups(config.parallel) as context, bar:
            retrainings = Retrainings(config, context)
            for seed, name, kept_G in left:
                found[seed][name] = retrainings.losses(seed, kept_G)
                write_json(path, found)
                bar.advance(note=f"seed {seed}, {name}")
    return list(found)


def score(config: Config, curvature: str, output: Path) -> dict[str, np.ndarray]:
    """Density of each group for each capability, [G, C] of Eq. 5, by how checkpoints are weighted.

    The run is scored with the default's curvature; others go to a run directory with the same checkpoints.
    """
    assert config.influence is not None
    own = RunDir(output)
    run = output / "curvature" / curvature
    if curvature == resolve(
        "auto", [ref.path for ref in checkpoint_files.complete_checkpoints(own.checkpoints)]
    ):
        run = output
    elif not run.exists():
        run.mkdir(parents=True)
        (run / "checkpoints").symlink_to(own.checkpoints.resolve())
    influence = dataclasses.replace(config.influence, curvature=curvature)
    of_run = dataclasses.replace(config.train, run=str(run))
    compute_influence(dataclasses.replace(config, train=of_run, influence=influence))
    tables, mix = read_scores(run), MixConfig(phase="second")
    assert [t.source for t in tables] == GROUPS and tables[0].capabilities == CAPABILITIES
    rho_GCK, steps = densities(tables, mix), tables[0].steps
    rate_K = np.array([phase_spans(config)[-1].learning_rate(step - 1) for step in steps])
    return {
        f"{curvature}, by step": rho_GCK @ checkpoint_weights(mix, CAPABILITIES, steps).sum(0),
        f"{curvature}, by rate": rho_GCK @ (rate_K / rate_K.sum()),
        f"{curvature}, last": rho_GCK[:, :, -1],
    }


def with_interval(x_CN: np.ndarray, y_CN: np.ndarray) -> list[list[float]]:
    """Spearman of each row, and their mean last; each with its 95 % bootstrap interval over N: [C + 1, 3]."""

    def of(pick_N: np.ndarray) -> list[float]:
        pairs = zip(x_CN[:, pick_N], y_CN[:, pick_N], strict=True)
        found = [float(spearmanr(x_N, y_N).statistic) for x_N, y_N in pairs]
        return [*found, float(np.mean(found))]

    n, generator = x_CN.shape[1], np.random.default_rng(0)
    resampled = [of(generator.integers(0, n, n)) for _ in range(RESAMPLES)]
    bounds = np.nanquantile(resampled, (0.025, 0.975), axis=0)
    return np.stack([of(np.arange(n)), *bounds], axis=1).tolist()


def ceiling(y_SCN: np.ndarray) -> list[float]:
    """Spearman that the expectation over seeds would have with the mean of these S, and its mean over C.

    The square root of that mean's reliability, by Spearman and Brown from the mean correlation r of two
    seeds: S r / (1 + (S - 1) r).
    """
    s = len(y_SCN)
    pairs = itertools.combinations(y_SCN, 2)
    r_PC = [[spearmanr(a, b).statistic for a, b in zip(*pair, strict=True)] for pair in pairs]
    r_C = np.clip(np.mean(r_PC, axis=0), 0, 1)
    found_C = np.sqrt(s * r_C / (1 + (s - 1) * r_C))
    return [*found_C.tolist(), float(found_C.mean())]


def report(config: Config, size: Size, output: Path, curvatures: list[str]) -> None:
    """Print every comparison, and write them to DIR/datamodel.json and the impacts beside the scores."""
    losses, groups = measure(config, size, output), trained_on(size)
    trained = json.loads(RunDir(output).metrics.read_text().splitlines()[-1])["probe_nll"]
    assert trained == {c: losses[0]["all"][f"heldout {c}"] for c in CAPABILITIES}, "not what the run does"

    def higher(kind: str, of: str) -> np.ndarray:
        """Losses above those of training on all groups, [seeds, C, retrainings]."""
        names = [name for name in groups if name.startswith(kind)]
        sets = [f"{of} {c}" for c in CAPABILITIES]
        return np.array([[[run[n][s] - run["all"][s] for n in names] for s in sets] for run in losses])

    (output / "influence").mkdir(exist_ok=True)
    named = zip(CAPABILITIES, higher("without", "probe").mean(0).tolist(), strict=True)
    impact = {c: dict(zip(GROUPS, of_G, strict=False)) for c, of_G in named}
    write_json(output / "measured_impact.json", impact)
    member_GC = np.array([[float(g in MEMBERS[c]) for c in CAPABILITIES] for g in GROUPS])
    predictors = {"whose domain it is": member_GC}
    for curvature in curvatures:
        predictors |= score(config, curvature, output)
    half_MG = np.array([kept for name, kept in groups.items() if name.startswith("half")], float)
    figures: dict[str, dict[str, list]] = {}
    for (kind, title), of in itertools.product(COMPARED.items(), ("probe", "heldout")):
        y_SCN, rows = higher(kind, of), figures.setdefault(f"{title}, {of} sets", {})
        for name, rho_GC in predictors.items():
            # More influence: less loss with the group, more without it.
            x_CN = -(half_MG @ rho_GC).T if kind == "half" else rho_GC[: size.left_out].T
            rows[name] = with_interval(x_CN, y_SCN.mean(0))
        rows["ceiling"] = ceiling(y_SCN)
    write_json(output / "datamodel.json", figures)
    for title, rows in figures.items():
        print(f"\n{title}\n\n| | {' | '.join(CAPABILITIES)} | mean |\n|---|---|---|---|---|")
        for name, values in rows.items():
            form = "{:.2f}" if name == "ceiling" else "{:.2f} ({:.2f} to {:.2f})"
            cells = [form.format(*np.atleast_1d(v)) for v in values]
            print(f"| {name} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/datamodel[-quick]")
    parser.add_argument("--quick", action="store_true", help="the same at the size of a test: no figures")
    parser.add_argument("--curvature", nargs="+", choices=CURVATURES, default=CURVATURES)
    options = parser.parse_args()
    size = QUICK if options.quick else FULL
    output = options.output or Path("runs/datamodel-quick" if options.quick else "runs/datamodel")
    torch.set_num_threads(1)
    with user_errors():
        config = configure(output, size)
        train(config)
        report(config, size, output, options.curvature)


if __name__ == "__main__":
    main()
