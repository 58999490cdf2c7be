"""Run two commits on this machine and compare what they write, bit for bit.

python benchmarks/compare_commits.py main
python benchmarks/compare_commits.py main HEAD --quick
python benchmarks/compare_commits.py d70ed03 --keep runs/compare

Each commit is unpacked into a folder, its C++ extension built there, and its tools run there in the current
environment. No result is committed: floating-point bits depend on the machine and on the libraries.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import yaml
from safetensors.torch import load_file
from tokenizers import Tokenizer
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

ROOT = Path(__file__).resolve().parent.parent
STATUSES = """Exit status: 0 equal; 1 something differs that ALLOWED does not name; 2 a commit could not be
built or run. The folders stay unless all is equal."""

GROUPS = {
    "text": "text/*.jsonl",
    "tokenizer": "tokenizer.model",
    "tokens": "data/*.bin data/*.idx data/*.npy data/*.side/*.npy",
    "probing sets": "probes/*.bin probes/*.idx probes/split.yaml",
    "losses": "**/metrics.jsonl",
    "scores": "**/influence/**/*.npy",
    "mixtures": "mix*.yaml keep/*",
    "configuration": "**/plan.json **/config.yaml",
    "weights": "**/step_*/.metadata",
    "Hugging Face": "*.safetensors *config.json tokenizer.json",
    "manifests": "data/*.json probes/*.json **/influence/**/*.json mix*.json **/step_*/megatron_r1.json",
    "ledgers": "**/ledger.jsonl",
}
"""What is compared of a run directory: patterns of files. Logs, TensorBoard events and reports are not."""

MEASURED = {
    "seconds", "saving_seconds", "tokens_per_second", "memory_bytes", "slowest_rank", "slowest_ratio",
    "finished", "device_hours", "mtime_ns",
}  # fmt: skip
"""Fields that hold times and memory. They differ between two runs of one commit."""

ANY = math.inf
ALLOWED = {
    r".*/data/(.*\.side/)?ledger\.jsonl:.*": (
        ANY,
        "ledger lines of datasets, which moved to their side folders",
    ),
    r".*/data/.*\.side/hashes\.npy:.*": (ANY, "hashes of datasets"),
    r".*/ledger\.jsonl:\d+/(inputs|outputs)/.*": (ANY, "identities in ledger lines"),
    r".*/influence/.*/manifest\.json:(format|weights|data|directions|influence/curvature_sources)\b.*": (
        ANY,
        "identities in manifests",
    ),
    r".*/probes/manifest\.json:request\b.*": (ANY, "identities in manifests"),
    r".*/mix\w*\.json:scores/.*/(format|weights|data)\b.*": (ANY, "identities in mix.json"),
    r".*(/plan\.json:|/megatron_r1\.json:plan/)data\b.*": (ANY, "identities in plans"),
    r".*/megatron_r1\.json:(files/.*|checksum)": (
        ANY,
        "checksums of checkpoint files (tensors are compared)",
    ),
    r".*/megatron_r1\.json:state/guard/(best|judged)\b.*": (ANY, "history of the step guard"),
    r".*/config\.yaml:health/loss_spike": (ANY, "the default of health.loss_spike, in nats"),
    r".*/config\.yaml:train/deterministic": (ANY, "the field train.deterministic, which is new"),
    # Weights in YAML have nine decimals.
    r".*/mix_worst\..*": (1.001e-9, "mix.objective=worst within 1e-9"),
    r".*/tokenizer\.json:bytes": (ANY, "bytes of tokenizer.json (ids are compared)"),
}
"""RUN/FILE:FIELD of a difference that does not count -> its largest size, and the reason that is printed."""

TINY = (
    "model.num_layers=2 model.hidden_size=64 model.ffn_hidden_size=128 model.num_attention_heads=2 "
    "model.head_dim=32 model.vocab_size=1024 data.seq_length=64"
)
RUN = f"examples/models/tiny.yaml examples/quickstart/train.yaml runs/quickstart/probes/split.yaml {TINY}"
INFLUENCE = "examples/quickstart/influence.yaml"
SMALL = (  # as `run.py --size small` calls the tools
    f"{RUN} {INFLUENCE} examples/quickstart/phase2.yaml train.run=runs/quickstart model.num_query_groups=1 "
    "train.checkpoint_every=8 train.probe_every=8 phases.uniform.steps=24 phases.uniform.warmup_steps=2 "
    "phases.influence.steps=12 influence.examples=24 influence.steps=[16,24]"
)
OURS = (
    f"{RUN} model.num_query_groups=2 train.checkpoint_every=10 train.probe_every=10 "
    "train.validation_windows=4"
)
TENSOR = "parallel.tensor=2 parallel.sequence=true"
MIX = f"python tools/make_mix.py {SMALL} train.run=runs/mixed"
BF16 = "train.precision=bf16 train.recompute=selective data.order=megatron"
STEPS = "phases.uniform.steps=20"
RESUME = f"torchrun tools/train.py {OURS} {BF16} train.run=runs/resumed"
SCORE = f"tools/compute_influence.py {OURS} {STEPS} {INFLUENCE} influence.steps=[20]"
METHODS = {
    "ghost": "influence.method=ghost influence.per_token=true influence.examples=16",
    "projected": "influence.method=projected influence.unit=document influence.loss=sum influence.examples=4",
    "lowrank": "influence.method=lowrank influence.rank=4 influence.min_correlation=0 "
    "influence.curvature=datainf influence.curvature_examples=16 influence.examples=16",
    "kfac": f"{TENSOR} influence.curvature=kfac influence.curvature_examples=16 influence.norms=true "
    "influence.examples=16",
}
TO_HF = (
    "python tools/convert_checkpoint.py --to hf runs/quickstart/checkpoints/step_00000036 runs/hf "
    "--tokenizer-type SentencePieceTokenizer --tokenizer-model runs/quickstart/tokenizer.model"
)
QUICK = [
    "python examples/quickstart/run.py --size small --run runs/quickstart",
    f"torchrun tools/train.py {OURS} {TENSOR} {STEPS} train.run=runs/fp32",
]
FULL = [
    *QUICK,
    "cp -r runs/quickstart runs/mixed",
    f"{MIX} mix.objective=worst mix.cap=0.4 --output runs/mixed/mix_worst.yaml",
    f"{MIX} mix.keep=true --output runs/mixed/mix_keep.yaml",
    f"torchrun tools/train.py {OURS} {BF16} {STEPS} train.run=runs/bf16",
    f"{RESUME} phases.uniform.steps=10",
    "cp -r runs/resumed runs/resumed_at_10",
    f"{RESUME} {STEPS}",
    *(f"cp -r runs/fp32 runs/{name}" for name in METHODS),
    *(
        f"{'torchrun' if TENSOR in method else 'python'} {SCORE} {method} train.run=runs/{name}"
        for name, method in METHODS.items()
    ),
    TO_HF,
    "python tools/convert_checkpoint.py --to megatron runs/hf runs/back",
]
"""What each commit runs, in its folder."""


Line = tuple[str, str, str, str]
"""Of the output: a run, what of it is compared, what differs, what of that is allowed."""


class CannotRunError(Exception):
    pass


def execute(code: Path, folder: Path, command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `folder` with the package that lies in `code`."""
    first, *words = shlex.split(command)
    if first == "torchrun":
        words = [*shlex.split("-m torch.distributed.run --standalone --nproc-per-node 2"), *words]
    program = first if first == "cp" else sys.executable
    environment = {**os.environ, "PYTHONPATH": str(code), "OMP_NUM_THREADS": "1"}
    return subprocess.run((program, *words), cwd=folder, env=environment, text=True, capture_output=True)


def must(code: Path, folder: Path, command: str) -> str:
    """`execute`; returns stdout. Raises CannotRunError with what it printed of errors."""
    began = time.time()
    done = execute(code, folder, command)
    if done.returncode:
        printed = (done.stdout + done.stderr).splitlines()
        end = "\n".join([line for line in printed if "rror: " in line][:5] or printed[-15:])
        raise CannotRunError(f"exit status {done.returncode} in {folder}: {command}\n{end}")
    if command.startswith(("torchrun", "python tools", "python examples")):
        run = re.search(r".*(run=|--run |--to hf |--to megatron )(\S+)", command)
        print(f"  {time.time() - began:4.0f} s  {command.split()[1]} {run[2] if run else ''}", flush=True)
    return done.stdout


def git(*words: str) -> bytes:
    return subprocess.run(("git", *words), cwd=ROOT, check=True, capture_output=True).stdout


def environment() -> dict[str, str | None]:
    """What bits depend on besides the commit."""
    names = ("torch", "numpy", "megatron-core", "sympy", "sentencepiece", "gigatoken", "tokenizers")
    installed = {d.metadata["Name"].lower(): d.version for d in importlib.metadata.distributions()}
    versions = {name: installed.get(name) for name in names}
    return {"python": sys.version, "machine": platform.node(), **versions}


def results(folder: Path, commit: str, wanted: list[str], reuse: bool) -> None:
    """Unpack a commit into `folder`, build it and run `wanted`; or reuse what the same machine did before."""
    record, here = folder / "complete.json", environment()
    if reuse and record.exists():
        before = json.loads(record.read_text())
        if before["environment"] == here and all(c in before["commands"] for c in wanted):
            print(f"{commit[:9]}: reused from {folder}")
            return
    print(f"{commit[:9]}: in {folder}", flush=True)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    subprocess.run(("tar", "-x"), cwd=folder, input=git("archive", commit), check=True)
    must(folder, folder, "python setup.py build_ext --inplace")
    found = must(folder, folder, "python -c 'import megatron_r1._csrc as it; print(it.__file__)'")
    if not Path(found.strip()).resolve().is_relative_to(folder.resolve()):
        raise CannotRunError(f"the environment puts {found.strip()} before PYTHONPATH={folder}")
    for command in wanted:
        must(folder, folder, command)
    record.write_text(json.dumps({"environment": here, "commands": wanted}))


def read(path: Path) -> Any:
    """A file as something that `differences` walks through."""
    if path.name == ".metadata":
        return checkpoint(path.parent)
    if path.suffix in (".npy", ".npz"):
        array = np.load(path)
        return array if path.suffix == ".npy" else dict(array)
    if path.suffix == ".safetensors":
        return arrays(load_file(path))
    if path.suffix == ".yaml":
        return yaml.safe_load(path.read_text())
    if path.name in ("metrics.jsonl", "ledger.jsonl"):
        return [json.loads(line) for line in path.read_text().splitlines()]
    if path.suffix == ".json":
        value = json.loads(path.read_text())
        if path.name == "megatron_r1.json" and value["plan"]:
            value["plan"] = json.loads(value["plan"])
        return value
    return np.fromfile(path, np.uint8)


def arrays(tensors: dict[str, torch.Tensor]) -> dict[str, np.ndarray]:
    """For NumPy, which has no bf16; fp32 holds it exactly."""
    return {
        f"{name} ({tensor.dtype})": (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in tensors.items()
    }


def checkpoint(path: Path) -> dict[str, Any]:
    """Every tensor of a checkpoint, whole, whatever the layout that saved it; and its common state."""
    parts = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in parts.items()
        if isinstance(part, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(tensors, checkpoint_id=path, no_dist=True)
    common = torch.load(path / "common.pt", weights_only=False)
    return {"tensors": arrays(tensors), "others": sorted(parts.keys() - tensors), "common": common}


def differences(a: Any, b: Any, field: str = "") -> Iterator[tuple[str, str, float]]:
    """Field, what differs, and by how much (above 1: as a share; infinity: not a number)."""
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted((a.keys() | b.keys()) - MEASURED):
            if key in a and key in b:
                yield from differences(a[key], b[key], f"{field}/{key}")
            else:
                yield f"{field}/{key}", f"only {'before' if key in a else 'after'}", math.inf
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple):
        if len(a) != len(b):
            yield field, f"{len(a)} and {len(b)} items", math.inf
        for i, pair in enumerate(zip(a, b, strict=False)):
            yield from differences(*pair, f"{field}/{i}")
    elif isinstance(a, np.ndarray) and isinstance(b, np.ndarray):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            yield field, f"{a.dtype} {[*a.shape]} and {b.dtype} {[*b.shape]}", math.inf
        elif a.tobytes() != b.tobytes():
            x, y = a.astype(float), b.astype(float)
            size = np.abs(x - y).max()
            yield field, f"{(x != y).sum()} of {x.size} numbers, by up to {size:.3g}", size
    elif type(a) is not type(b) or repr(a) != repr(b):
        numbers = isinstance(a, int | float) and isinstance(b, int | float)
        yield field, f"{a!r:.60} and {b!r:.60}", abs(a - b) / max(1.0, abs(a)) if numbers else math.inf


def file_differences(a: Path, b: Path) -> Iterator[tuple[str, str, float]]:
    """`differences` of two files; of tokenizer.json its bytes and its ids of the quickstart's texts."""
    if not (a.exists() and b.exists()):
        yield "", f"only {'before' if a.exists() else 'after'}", math.inf
    elif a.name != "tokenizer.json":
        yield from differences(read(a), read(b))
    elif a.read_bytes() != b.read_bytes():
        yield "bytes", "bytes", math.inf
        files = sorted((a.parent.parent / "quickstart/text").glob("*.jsonl"))
        texts = [json.loads(line)["text"] for file in files for line in file.open()]
        ids = [[e.ids for e in Tokenizer.from_file(str(p)).encode_batch(texts)] for p in (a, b)]
        if unequal := sum(x != y for x, y in zip(*ids, strict=True)):
            yield "ids", f"ids of {unequal} of {len(texts)} texts", math.inf


def _now(name: Path) -> Path:
    """The place of a file; origins of datasets once lay beside the pair."""
    stem = name.name.removesuffix(".docs.npy")
    return name if stem == name.name else name.with_name(f"{stem}.side") / "docs.npy"


def _there(folder: Path, name: Path) -> Path:
    if name.name != "docs.npy" or (folder / name).is_file():
        return folder / name
    return folder / name.parent.with_suffix(".docs.npy")


def compare(title: str, before: Path, after: Path, groups: Iterable[str] = GROUPS) -> Iterator[Line]:
    """A line for each group of files that either run directory has."""
    for group in groups:
        patterns = GROUPS[group].split()
        names = {_now(p.relative_to(d)) for d in (before, after) for glob in patterns for p in d.glob(glob)}
        differs, allowed = [], Counter[str]()
        for name in sorted(names):
            for field, what, size in file_differences(_there(before, name), _there(after, name)):
                at = f"{before.name}/{name}:{field.removeprefix('/')}"
                reasons = [why for p, (most, why) in ALLOWED.items() if re.fullmatch(p, at) and size <= most]
                allowed.update(reasons[:1])
                differs += [] if reasons else [f"{at} ({what})"]
        if len(differs) > 3:
            differs[3:] = [f"{len(differs) - 3} more"]
        if names:
            excepted = "; ".join(f"{reason}, {n}x" for reason, n in allowed.items())
            yield title, f"{group} ({len(names)})", "; ".join(differs), excepted


def compare_across(base: Path, head: Path, across: Path) -> Iterator[Line]:
    """HEAD's code reads and continues what BASE's code wrote, in a copy of it."""
    shutil.rmtree(across, ignore_errors=True)
    shutil.copytree(base / "runs", across / "runs", ignore=shutil.ignore_patterns("resumed", "hf"))
    shutil.move(across / "runs/resumed_at_10", across / "runs/resumed")
    for name in ("examples", "tools"):
        (across / name).symlink_to(head / name)
    for name, command in {"resumed": f"{RESUME} {STEPS}", "hf": TO_HF}.items():
        must(head, across, command)
        yield from compare(f"across, {name}", base / "runs" / name, across / "runs" / name)
    # Scores of the former form may be refused by name. A run without scores may not.
    for command, may_refuse in (
        ("tools/report.py runs/bf16", False),
        ("tools/report.py runs/quickstart", True),
        (f"tools/make_mix.py {SMALL}", True),
        (f"tools/compute_influence.py {SMALL}", True),
    ):
        own, other = (execute(head, where, f"python {command} --check") for where in (head, across))
        error = (other.stderr.strip().splitlines() or [""])[-1]
        what = " ".join(command.split()[:2]) if "report" in command else command.split()[0]
        if may_refuse and other.returncode == 2 and "error: " in other.stderr:
            yield "across, --check", what, "", f"refused by name, {error}"
        else:
            same = own.returncode == other.returncode == 0 and untimed(own.stdout) == untimed(other.stdout)
            yield "across, --check", what, "" if same else f"status {other.returncode} or output; {error}", ""


def untimed(printed: str) -> list[str]:
    """Lines of `--check`; of the report's sentence on time only that it is there."""
    return ["took" if " took " in line else line for line in printed.splitlines()]


def comparisons(quick: bool, before: Path, after: Path, across: Path) -> Iterator[Line]:
    for name in ("quickstart", "fp32") if quick else sorted(os.listdir(after / "runs")):
        copied = ("scores", "mixtures", "manifests", "ledgers") if name in (*METHODS, "mixed") else GROUPS
        yield from compare(name, before / "runs" / name, after / "runs" / name, copied)
    if not quick:
        whole, resumed = after / "runs/bf16", after / "runs/resumed"
        yield from compare("resumed, at once", whole, resumed, ("losses", "weights"))
        yield from compare_across(before, after, across)


def main() -> int:
    what, examples, more = (__doc__ or "").split("\n\n")
    parser = argparse.ArgumentParser(
        description=f"{what}\n\n{more}",
        epilog=f"{examples}\n\n{STATUSES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("base", metavar="BASE", help="revision before")
    parser.add_argument("head", metavar="HEAD", nargs="?", default="HEAD", help="after (default: HEAD)")
    parser.add_argument(
        "--quick", action="store_true", help="the quickstart and 20 fp32 steps on two ranks only"
    )
    parser.add_argument(
        "--keep", type=Path, metavar="DIR", help="work in DIR; reuse BASE's results from there"
    )
    options = parser.parse_args()
    began = time.time()
    try:
        names = [f"{revision}^{{commit}}" for revision in (options.base, options.head)]
        base, head = (git("rev-parse", "--verify", name).decode().strip() for name in names)
    except subprocess.CalledProcessError as error:
        parser.error(f"{error.cmd[-1]}: {error.stderr.decode().strip()}")
    if git("status", "--porcelain"):
        print("note: uncommitted changes are not compared")
    work = (options.keep or Path(tempfile.mkdtemp(prefix="compare-"))).resolve()
    before, after = work / base, work / "head"
    lines = differing = 0
    try:
        for folder, commit in ((before, base), (after, head)):
            results(folder, commit, QUICK if options.quick else FULL, reuse=folder == before)
        for title, what, differs, allowed in comparisons(options.quick, before, after, work / "across"):
            verdict = f"differs: {differs}" if differs else "equal"
            print(f"{title:<17} {what:<27} {verdict}{allowed and f' (allowed: {allowed})'}", flush=True)
            lines, differing = lines + 1, differing + bool(differs)
    except CannotRunError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{base[:9]}, {head[:9]}: {differing} of {lines} comparisons differ; {time.time() - began:.0f} s")
    if not options.keep and not differing:
        shutil.rmtree(work)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
