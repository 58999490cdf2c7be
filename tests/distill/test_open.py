"""Mistakes of teachers are told before anything is loaded, each as one line with a way out."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_r1 import config_io
from megatron_r1.config import Config, ParallelConfig
from megatron_r1.data.indexed import IndexedDataset
from megatron_r1.data.loader import BatchLoader
from megatron_r1.data.open import open_data
from megatron_r1.data.provenance import read_provenance
from megatron_r1.distill.cache import Cache, write_part
from megatron_r1.distill.describe import Described
from megatron_r1.distill.draws import Header, draw, pack
from megatron_r1.distill.open import check, sizes, teachers
from megatron_r1.distill.teacher import Teacher
from megatron_r1.distill.vocabulary import identity
from megatron_r1.model.divergence import DenseTarget, SparseTarget
from megatron_r1.parallel import on_device, process_groups
from megatron_r1.preprocess.preprocess import preprocess
from tests import launch
from tests.curation.tiny import texts
from tests.distill.test_teacher import model

SEQ = 32


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher, two pairs made with its tokenizer, one with another of the same size, and one with the same
    vocabulary, whose special token has another name."""
    root = tmp_path_factory.mktemp("open")
    model(root / "teacher", begins=True)
    model(root / "other", begins=True)
    path = root / "other" / "tokenizer.json"
    spec = json.loads(path.read_text())
    vocab = spec["model"]["vocab"]
    vocab["x"], vocab["y"] = vocab["y"], vocab["x"]
    path.write_text(json.dumps(spec))
    model(root / "renamed", begins=True)
    path = root / "renamed" / "tokenizer.json"
    path.write_text(path.read_text().replace("<|im_start|>", "<|im_begin|>"))
    made = {"a": "teacher", "b": "teacher", "c": "other", "d": "renamed"}
    for seed, (name, made_by) in enumerate(made.items()):
        lines = [json.dumps({"text": text}) + "\n" for text in texts(40, seed)]
        (root / f"{name}.jsonl").write_text("".join(lines))
        how = {"append_eod": True, "log": lambda _: None}
        preprocess([root / f"{name}.jsonl"], root / name, "HuggingFaceTokenizer", root / made_by, **how)
    return root


def config(root: Path, objective: str, *more: str, sources: str = "ab") -> Config:
    return config_io.load(asked_words(root, objective, *more, sources=sources))


def asked_words(root: Path, objective: str, *more: str, sources: str = "ab") -> list[str]:
    named = ", ".join(f"{name}: {{prefix: '{root}/{name}_text_document'}}" for name in sources)
    size = Described(str(root / "teacher")).tokens + 5
    return [
        *launch.TINY_MODEL,
        f"model.vocab_size={size}",
        f"train={{run: '{root}/run', global_batch: 4, micro_batch: 2, precision: fp32}}",
        f"data={{seq_length: {SEQ}, cross_documents: false, sources: {{{named}}}}}",
        "phases.plain={steps: 2}",
        "phases.one={steps: 2}",
        f"phases.one.objective={{name: kd, {objective}}}",
        *more,
    ]


def found(config: Config) -> tuple[list[str], list[str]]:
    return check(config, open_data(config))


def test_a_teacher_that_fits_is_described(root: Path) -> None:
    asked = config(root, f"teacher: '{root}/teacher', temperature: 2, weight: 0.75")
    mistakes, lines = found(asked)
    said, own = Described(str(root / "teacher")), asked.model.flops_per_token(SEQ)
    flops = said.flops_per_token(SEQ)
    assert mistakes == []
    assert lines == [
        f"phase one: 0.25 cross-entropy + 0.75 KL at temperature 2 from {root}/teacher, with token 0 before "
        "each document",
        f"  {said.parameters:,} parameters, {4 * said.parameters:,} B (fp32) on each rank",
        f"  {flops:.4g} FLOP a token: a step takes {1 + flops / own:.1f} times the student's own",
    ]
    assert sizes(asked) == {"one": (said.parameters, flops)}


@pytest.mark.parametrize(
    ("objective", "more", "sources", "message"),
    [
        ("teacher: '{root}/none'", [], "ab", "no model at {root}/none"),
        ("teacher: '{root}/teacher', bos: 9999", [], "ab", "objective.bos=9999 is no token of "),
        (
            "teacher: '{root}/teacher'",
            [],
            "c",
            "data.sources.c has the ids of another vocabulary than the teacher: id {x} is 'y' in the data "
            "and 'x' to the teacher; take a teacher of its",
        ),
        (
            "teacher: '{root}/teacher'",
            ["data.seq_length=2048", "data.sources.a.documents=null"],
            "ab",
            "data.seq_length=2048 exceeds the context of {root}/teacher, 2,047 tokens with token 0 before a "
            "document; lower it to 2047, or take another teacher",
        ),
    ],
)
def test_a_teacher_that_does_not_fit_is_one_mistake(
    root: Path, objective: str, more: list[str], sources: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = config(root, objective.format(root=root), *more, sources=sources)
    # Windows of 2,048 tokens need no data here.
    data = open_data(config(root, objective.format(root=root), sources=sources))
    mistakes, _ = check(asked, data)
    assert len(mistakes) == 1
    x = min(map(Described(str(root / "teacher")).tokenizer._model.token_to_id, "xy"))
    message = message.format(root=root, x=x)
    assert mistakes[0].startswith("phases.one.objective: " + message)


def test_a_pair_of_the_same_vocabulary_fits(root: Path) -> None:
    asked = config(root, f"teacher: '{root}/teacher'", sources="d")
    (pair,) = open_data(asked).corpora
    assert pair.tokenizer_hash != Described(str(root / "teacher")).tokenizer.fingerprint()
    assert found(asked)[0] == []


def test_a_vocabulary_of_fewer_rows_is_a_mistake(root: Path) -> None:
    tokens = Described(str(root / "teacher")).tokens
    asked = config(root, f"teacher: '{root}/teacher'", f"model.vocab_size={tokens - 1}")
    data = open_data(config(root, f"teacher: '{root}/teacher'"))
    (mistake,), _ = check(asked, data)
    assert mistake.endswith(f"model.vocab_size={tokens - 1:,} fewer; set model.vocab_size={tokens} or more")


def written(root: Path, sources: str = "ab", keep: int = 1) -> Path:
    """A cache of every `keep`-th document of some sources: nearly all of each distribution, as top-k."""
    folder = root / f"cache_{sources}_{keep}"
    if folder.exists():
        return folder
    teacher = Teacher(str(root / "teacher"), "fp32")
    said = teacher.described
    kind = {"temperature": 1.0, "draws": None, "top_k": 256, "seed": 1, "bos": said.bos, "context": 2048}
    header = Header(said.identity, identity(said.vocabulary), said.tokens, **kind)
    header.write(folder)
    blocks = []
    for name in sources:
        prefix = root / f"{name}_text_document"
        dataset, hashes = IndexedDataset(prefix), read_provenance(prefix).hashes
        for document in range(0, len(hashes), keep):
            tokens = np.array(dataset[document])
            ((_, _, logits_NV),) = teacher.logits([tokens])
            key = hashes[document].tobytes()
            blocks.append((key, 0, len(tokens), pack(header, draw(logits_NV, header, key, 0))))
    write_part(folder, header, blocks)
    return folder


def test_a_cache_serves_what_the_teacher_says_beside_the_student(root: Path) -> None:
    """At labels whose document begins in the window, where both see the same tokens."""
    said, cache = Described(str(root / "teacher")), written(root)
    asked = config(root, f"cache: '{cache}', teacher: '{root}/teacher'")
    data = open_data(asked)
    mistakes, lines = check(asked, data)
    assert mistakes == []
    assert lines == [
        f"phase one: KL at temperature 1 from the cache {cache}, the 256 largest probabilities of each token",
        f"  of {said.identity[:12]}, token 0 before a document, context 2048",
        "  a: 100.0% of its tokens have a record",
        "  b: 100.0% of its tokens have a record",
    ]
    cached = teachers(asked, data)["one"]
    online = teachers(config(root, f"teacher: '{root}/teacher'"), data)["one"]
    assert cached.identities == {str(cache): Cache(cache).identity} | online.identities
    assert (cached.tokens, online.records) == (said.tokens, None)
    loader = BatchLoader(data.plan, data.corpora, SEQ, data.eod)
    loader.records = cached.records
    with process_groups(ParallelConfig()) as context:
        batch = on_device(loader.batch(np.arange(4)))
        sparse, dense = cached.targets(context)(batch), online.targets(context)(batch)
    assert isinstance(sparse, SparseTarget) and isinstance(dense, DenseTarget)
    assert sparse.tail and bool(batch.loss_mask_BS.all())
    share_NV = dense.logits(slice(None)).softmax(-1)
    found_NK = share_NV.gather(1, sparse.ids_NK.long()) * (sparse.share_NK > 0)
    assert batch.documents is not None
    begins_N = (batch.documents > 0).t().flatten()
    assert 0 < int(begins_N.sum()) < len(begins_N)
    error_N = (found_NK - sparse.share_NK).abs().amax(1)
    assert error_N[begins_N].max() < 1e-3
    # Elsewhere the window begins within the document, and only the cache has seen its beginning.
    assert error_N[~begins_N].max() > 0.1
    entropy_N = -(share_NV * share_NV.log()).sum(-1)
    # 256 entries leave eight bits for it.
    assert (entropy_N - sparse.entropy_N)[begins_N].abs().max() < 0.05


@pytest.mark.parametrize(
    ("objective", "held", "message"),
    [
        (
            "temperature: 2",
            "ab",
            r"another teacher or objective: temperature \(1.0 there, 2.0 here\); restore",
        ),
        (
            "bos: none",
            "ab",
            r"another teacher or objective: bos \(0 there, None here\); restore these, or name",
        ),
        ("bos: none, teacher: '{root}/teacher'", "ab", r"bos \(0 there, None here\); restore"),
        (
            "teacher: '{root}/other'",
            "ab",
            r"another teacher or objective: teacher \(\w{20} there, \w{20} here\)",
        ),
        (
            # The hub is not asked.
            "teacher: ORG/NAME@main",
            "a",
            "has no record of data.sources.b; write them with tools/",
        ),
        (
            "weight: 1",
            "a",
            "has no record of data.sources.b; write them with tools/cache_teacher",
        ),
    ],
)
def test_a_cache_that_does_not_fit_is_one_mistake(
    root: Path, objective: str, held: str, message: str
) -> None:
    mistakes, _ = found(config(root, f"cache: '{written(root, held)}', {objective.format(root=root)}"))
    assert len(mistakes) == 1
    assert re.search(rf"^phases.one.objective: .*cache .*{message}", mistakes[0]), mistakes


def test_a_cache_of_another_vocabulary_is_a_mistake(root: Path) -> None:
    mistakes, _ = found(config(root, f"cache: '{written(root, 'c')}'", sources="c"))
    assert len(mistakes) == 1 and "data.sources.c has the ids of another vocabulary" in mistakes[0]
    with pytest.raises(FileNotFoundError, match="holds no teacher cache; tools/cache"):
        teachers(asked := config(root, f"cache: '{root}/none'"), open_data(asked))


def test_a_partial_cache_says_what_it_lacks(root: Path) -> None:
    asked = config(root, f"cache: '{written(root, keep=3)}'", "phases.one.weights={a: 1}")
    mistakes, lines = found(asked)
    lengths = IndexedDataset(root / "a_text_document").lengths
    assert mistakes == []
    assert lines[2:] == [f"  a: {lengths[::3].sum() / lengths.sum():.1%} of its tokens have a record"]


def test_a_source_that_is_not_drawn_needs_no_origins(root: Path) -> None:
    asked = config(root, f"cache: '{written(root)}'", "phases.one.weights={a: 1}")
    origins = root / "b_text_document.side" / "docs.npy"
    origins.rename(hidden := root / "docs.npy")
    try:
        data = open_data(asked)
        records = teachers(asked, data)["one"].records
        assert records is not None
        found_, known_BS = records(np.array([0]), np.array([1]))
        assert found_.share_BSK.shape[:2] == known_BS.shape == (1, SEQ) and known_BS.all()
        (mistake,), _ = found(config(root, f"cache: '{written(root)}'"))
        assert "docs.npy does not exist; tools/preprocess_data.py writes it" in mistake
    finally:
        hidden.rename(origins)


def test_checks_import_no_torch() -> None:
    """transformers does, where it is asked for a teacher's tokens."""
    code = "import sys, megatron_r1.distill.open; print('torch' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


def test_a_plan_takes_a_teacher_that_is_not_here(root: Path) -> None:
    assert sizes(config(root, "teacher: 'ORG/NAME@abc', parameters: 8000")) == {"one": (8000, 16000.0)}
    with pytest.raises(FileNotFoundError, match="no model at none"):
        sizes(config(root, "teacher: none"))
