"""Evaluation items are found however they are written, and ordinary text is not."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from megatron_r1 import data
from megatron_r1.curation import decontaminate
from megatron_r1.curation.decontaminate import FREQUENT, SHARE, SKETCH, Hit, Items, Matcher, Part
from megatron_r1.system.words import NGRAM
from tests.launch import ROOT
from tests.system.test_words import words

QUESTION = (
    "A ferry carries seventeen crates of oranges from Palermo to Tunis. Each crate holds “forty-two” "
    "oranges, and the sailors eat one orange in every nine. How many well-packed oranges arrive in the "
    "harbour of Tunis?"
)
SHORT = "Who painted the ceiling of the old opera in Riga?"


def matcher(*parts: Part, texts: list[str] | None = None) -> Matcher:
    items = Items(parts)
    return Matcher(items, items.count(texts or ()))


def question(text: str, item: str = "1") -> Part:
    return Part("set", item, "question", text)


def hits(text: str, *parts: Part) -> list[Hit]:
    return list(matcher(*(parts or (question(QUESTION),)))([text]))


@pytest.mark.parametrize(
    "text",
    [
        QUESTION,
        QUESTION.upper(),
        QUESTION.replace("“", '"').replace("”", '"').replace(",", " ,"),
        QUESTION.replace(" ", "\n"),
        QUESTION.replace("oranges", "oran-\n    ges"),
        QUESTION.replace("well-packed", "well-\npacked"),
        QUESTION.replace("harbour", "har\u00adbour"),
        QUESTION.replace("oranges", "ｏｒａｎｇｅｓ"),
        QUESTION.replace("Palermo", "Genoa").replace("seventeen", "eighteen").replace("sailors", "crew"),
        QUESTION.replace("one orange in ", "one big orange, in "),
    ],
    ids=[
        "verbatim",
        "case",
        "quotes",
        "lines",
        "divided",
        "hyphen",
        "soft hyphen",
        "wide",
        "changed",
        "added",
    ],
)
def test_an_item_is_found_however_it_is_written(text: str) -> None:
    (hit,) = hits(f"Some words before it.\n{text} And some after it.")
    assert (hit.document, hit.set, hit.item, hit.part) == (0, "set", "1", "question")
    assert hit.score >= SHARE and hit.item_text == QUESTION
    assert hit.document_text in text + " And some after it."
    assert hit.document_text.split()[:2] == text.split()[:2]


@pytest.mark.parametrize(
    "text",
    [
        QUESTION[: len(QUESTION) // 2],
        " ".join(sorted(QUESTION.split())),
        "A ferry carries crates of oranges. Sailors eat them. How many arrive in the harbour of Tunis?",
        "",
    ],
    ids=["half", "another order", "the same subject", "nothing"],
)
def test_other_text_is_not_hit(text: str) -> None:
    assert hits(text) == []


@given(st.integers(13, 60), st.sets(st.integers(0, 59), max_size=15))
@example(60, set(range(4, 55, 5)))
@example(50, set(range(0, 50, 5)))
@example(50, set(range(0, 55, 5)) | {1})
def test_the_score_is_the_share_of_words_that_stayed(length: int, changed: set[int]) -> None:
    """Of words that are all different, and replaced by others, the share is plain."""
    changed = {n for n in changed if n < length}
    text = " ".join(f"x{n}" if n in changed else f"w{n}" for n in range(length))
    runs = re.findall("-+", "".join("x" if n in changed else "-" for n in range(length)))
    unbroken = sum(max(0, len(run) - 4) for run in runs)
    share = 1 - len(changed) / length
    found = hits(f"before {text} after", question(" ".join(f"w{n}" for n in range(length))))
    if share >= 0.8 and unbroken * 12 >= length - 4:
        assert [hit.score for hit in found] == pytest.approx([share])
    else:
        assert found == []


@pytest.mark.parametrize(("added", "score"), [(10, 1.0), (11, None)])
def test_ten_words_may_be_put_in_at_a_place(added: int, score: float | None) -> None:
    words = [f"w{n}" for n in range(40)]
    text = " ".join([*words[:20], *(f"x{n}" for n in range(added)), *words[20:]])
    assert [hit.score for hit in hits(text, question(" ".join(words)))] == ([score] if score else [])


@pytest.mark.parametrize(("length", "found"), [(12, 0), (13, 1)])
def test_words_of_13_may_change_and_of_12_may_not(length: int, found: int) -> None:
    words = [f"w{n}" for n in range(length)]
    item = question(" ".join(words))
    words[6] = "x"
    assert len(hits(" ".join(words), item)) == found


def test_a_short_question_must_stand_whole() -> None:
    assert len(hits(f"x {SHORT.lower()} y", question(SHORT))) == 1
    assert hits(SHORT.replace("Riga", "Oslo"), question(SHORT)) == []
    assert hits(SHORT.replace("painted the", "painted all the"), question(SHORT)) == []


def test_bare_answers_and_questions_of_four_words_are_left_out_by_name() -> None:
    parts = [
        Part("s", "1", "answer", "42"),
        Part("s", "1", "question", "What is 6 7?"),
        Part("s", "2", "answer", SHORT),
    ]
    made = matcher(*parts)
    assert list(made([f"42 What is 6 7? {SHORT}"])) == []
    assert made.left_out == {"short": parts, "frequent": []} and made.counts["short"] == 3


def test_a_long_answer_is_found_by_itself() -> None:
    answer = Part("set", "1", "answer", QUESTION)
    (hit,) = hits(f"x {QUESTION}", question("Something else is asked in these words."), answer)
    assert hit.part == "answer"


NOTICE = (
    "Permission is granted to copy this notice and to pass it on as long as every copy keeps all words of "
    "it. Nobody who has written a part of it answers for what others do after they have read the whole."
)


def test_a_text_that_many_documents_hold_tells_no_item() -> None:
    item = question(f"{NOTICE} Which judge in Bergen threw it out?")
    corpus = [f"file {n}\n{NOTICE}\n{n} {n + 1}" for n in range(50)]
    assert len(list(matcher(item)(corpus))) == 50
    made = matcher(item, texts=corpus)
    assert list(made(corpus)) == []
    assert made.counts["frequent n-grams"] == len(words(NOTICE)) - NGRAM + 1
    assert len(list(made([f"x {item.text}"]))) == 1


def test_words_that_tell_no_item_do_not_count() -> None:
    item = question(f"{NOTICE} {QUESTION}")
    made = matcher(item, texts=[f"{NOTICE} {n}" for n in range(9)])
    (hit,) = made([QUESTION])
    of_question, of_notice = len(words(QUESTION)), NGRAM - 1
    assert hit.score == pytest.approx(of_question / (of_question + of_notice))


@pytest.mark.parametrize("variant", ["orange in every nine", "lemon in every nine"])
def test_many_copies_of_an_item_do_not_hide_it(variant: str) -> None:
    """Nor does one word that all copies have otherwise."""
    corpus = [f"{n} {QUESTION.replace('orange in every nine', variant)} {n}" for n in range(50)]
    assert len(list(matcher(question(QUESTION), texts=corpus)(corpus))) == 50


def test_a_short_question_of_everyday_words_is_left_out_by_name() -> None:
    corpus = [f"{n} {SHORT}" for n in range(FREQUENT)]
    made = matcher(question(SHORT), texts=corpus)
    assert list(made(corpus)) == [] and made.left_out["frequent"] == [question(SHORT)]
    assert made.passed_over() == {"short": [], "frequent": ["set/1/question"]}
    assert len(list(matcher(question(SHORT), texts=corpus[1:])(corpus))) == FREQUENT


def test_counts_are_of_documents_and_items_that_hold_an_n_gram() -> None:
    items = Items(
        [question("a b c d e f", "1"), Part("set", "1", "answer", "a b c d e"), question("b c d e f", "2")]
    )
    counts = items.count(["a b c d e a b c d e", "x", "b c d e f"])
    # The n-grams abcde of item 1 alone, and bcdef of both; each in one document.
    assert sorted(counts[:-1].tolist()) == [2, 3] and counts[-1] == 3


@pytest.mark.parametrize(("documents", "frequent"), [(9_996, 1), (9_998, 0)])
def test_one_more_holder_is_allowed_for_each_10_000_documents(documents: int, frequent: int) -> None:
    """Of items and documents. Five hold the n-grams of a question of which another word is in one."""
    items = Items([question(QUESTION), question(SHORT, "2")])
    counts = items.count([SHORT] * FREQUENT)
    counts[-1] = documents
    assert Matcher(items, counts).counts["frequent"] == frequent


def test_of_a_long_text_some_n_grams_are_looked_up() -> None:
    r = random.Random(0)
    long = " ".join(f"w{r.randrange(10**6)}" for _ in range(3000))
    part = Part("probes", "1", "text", long)
    assert len(Items([part]).part_E) == SKETCH
    changed = " ".join(f"x{n}" if n % 10 == 9 else word for n, word in enumerate(long.split()))
    (hit,) = hits(f"before {changed} after", part)
    assert 0.85 < hit.score < 0.95
    assert hits(" ".join(long.split()[:1500]), part) == []


@pytest.mark.parametrize("words", [100, 5000])
def test_a_text_that_repeats_itself_must_stand_whole(words: int) -> None:
    """Two tables of a few numbers have most of them in the same order. Comparing them takes cubic time."""
    r = random.Random(0)
    table, other = (" ".join(r.choices("01", k=words)) for _ in range(2))
    part = Part("probes", "1", "text", table)
    assert [hit.score for hit in hits(f"before {table} after", part)] == [1.0]
    assert hits(other, part) == [] and hits(table[:-1] + "2", part) == []
    assert hits(other * 20, part, question("0 1 " * 20)) == []


def test_a_long_text_with_edits_is_found_by_its_rare_words() -> None:
    r = random.Random(0)
    words = [f"w{r.randrange(10**6)}" if n % 3 else "the" for n in range(6000)]
    changed = ["x" if n % 50 == 0 else word for n, word in enumerate(words)]
    (hit,) = hits(" ".join(changed), Part("probes", "1", "text", " ".join(words)))
    assert 0.96 < hit.score < 0.995


@pytest.mark.parametrize(
    ("item", "filler"),
    [
        ("渡船从巴勒莫运送十七箱橘子到突尼斯，每箱有四十二个", "字"),
        (QUESTION.replace(" ", ","), "a,"),
        (QUESTION.replace(" ", "=").replace("-", ""), "[x]"),
    ],
    ids=["characters", "table", "code"],
)
def test_both_texts_of_a_hit_agree_where_no_space_is(item: str, filler: str) -> None:
    (hit,) = hits(f"{filler * 3000}{item}{filler * 3000}", question(item))
    assert item.strip("?.") in hit.document_text and len(hit.document_text) < len(item) + 9


@given(st.text(st.sampled_from("aB é\u0301\u3099か漢ก็กำ-\u00ad\u2010\uff0d\n.,(1=\u0338ﬁ"), max_size=40))
def test_the_pieces_of_a_text_have_its_words(text: str) -> None:
    pieces, end_N = decontaminate._pieces(text)
    assert "".join(pieces) == text
    assert [word for piece in pieces for word in words(piece)] == words(text) and end_N[-1] == len(
        words(text)
    )


def test_order_and_batches_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"{n} {QUESTION if n % 3 == 0 else SHORT} {n}" * (1 + n % 2) for n in range(40)]
    found = []
    for batch in (1, 300, 1 << 16):
        monkeypatch.setattr(decontaminate, "_BATCH", batch)
        made = matcher(question(QUESTION, "1"), question(SHORT, "2"), texts=texts[:3])
        found.append(list(made(texts)))
        assert [hit.document for hit in found[-1]] == list(range(40))
    assert found[0] == found[1] == found[2]


def write(path: Path, *records: object) -> Path:
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))
    return path


def test_items_are_read_by_any_of_the_keys(tmp_path: Path) -> None:
    records = [
        {"id": "a", "question": "q1", "answer": 42},
        {"prompt": "q2", "gold": "g2", "answer": ""},
        {"text": "t3", "id": None},
        {"answer": "a4"},
    ]
    path = write(tmp_path / "items.jsonl", *records)
    packed = tmp_path / "items.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    expected = [
        *(("a", "question", "q1"), ("a", "answer", "42"), ("2", "question", "q2"), ("2", "answer", "g2")),
        *(("3", "question", "t3"), ("4", "answer", "a4")),
    ]
    for file in (path, packed):
        assert [(p.item, p.part, p.text) for p in Items.read({"n": file}).parts] == expected


def test_a_file_without_answers_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Items.read({"n": write(tmp_path / "items.jsonl", {"question": QUESTION}, {"question": SHORT})})
    assert capsys.readouterr().err.count("no answers") == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no item is in it"),
        ("\n \n", "no item is in it"),
        (
            '{"question": "q"}\n{"body": "x"}\n',
            "items.jsonl:2: no text under any of the keys question, prompt",
        ),
        ('{"question": "", "answer": " "}\n', "items.jsonl:1: no text"),
        ('{"question": ["q"]}\n', "items.jsonl:1: no text"),
        ("[1]\n", "items.jsonl:1: bad JSON"),
    ],
)
def test_items_that_are_none_are_one_error(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        Items.read({"n": path})


def test_gold_items_are_read_by_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    item = SimpleNamespace(id=7, question=QUESTION, prompt="few shots before it", gold=SHORT)
    gold = ModuleType("megatron_r1.data.gold")
    gold.items = lambda name: {"gsm8k": [item]}[name]
    monkeypatch.setitem(sys.modules, gold.__name__, gold)
    monkeypatch.setattr(data, "gold", gold, raising=False)
    expected = [Part("gsm8k", "7", "question", QUESTION), Part("gsm8k", "7", "answer", SHORT)]
    assert Items.read({}, ["gsm8k"]).parts == expected
    path = write(tmp_path / "items.jsonl", {"question": QUESTION, "answer": "x"})
    with pytest.raises(ValueError, match="items gsm8k are given as a file and as gold"):
        Items.read({"gsm8k": path}, ["gsm8k"])


def test_no_items_at_all_are_an_error() -> None:
    with pytest.raises(ValueError, match="no evaluation items are given"):
        Items([])


def load_benchmark():
    path = ROOT / "benchmarks" / "decontamination.py"
    spec = importlib.util.spec_from_file_location("decontamination", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["decontamination"] = module
    spec.loader.exec_module(module)
    return module


def test_the_labelled_benchmark_stays_above_its_bounds() -> None:
    """Of 400 planted documents and 480 hard negatives. Without sampled documents frequent text is hit."""
    benchmark = load_benchmark()
    result = benchmark.measure(3, each=80, repeats=1)
    assert sum(result["planted"].values()) >= 400 and len(result["planted"]) == 5
    negatives = {kind: of for kind, of in result["negatives"].items() if kind != "host"}
    assert sum(negatives.values()) >= 400 and set(negatives) == set(benchmark.NEGATIVES)
    assert result["recall"][1] >= 0.93 and result["precision"][1] >= 0.93
    assert benchmark.measure(3, each=40, sampled=False, repeats=1)["precision"][2] < result["precision"][1]


def test_wilson_s_interval() -> None:
    assert load_benchmark().wilson(95, 100) == pytest.approx((0.95, 0.8882, 0.9785), abs=1e-4)
