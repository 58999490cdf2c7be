"""Decontamination against a labelled corpus: recall, precision and time, each by kind of document.

    python benchmarks/decontamination.py [--seed 2] [--rounds 3]

Items, plants and hard negatives are generated here. Host text is what the quickstart reads: the standard
library, the dictionary and the factbook of the installed packages. Seeds 0 and 1 were looked at while the
rule was made. Report other seeds.

    planted     an item verbatim; with a tenth of its words changed, within 2 kB of host text; wrapped anew at
                60 characters with words divided at line ends and other case; verbatim within 2 kB; ten copies
                each of a few items
    negatives   licence headers, quotes, instructions and formula lists that items quote too; problems,
                functions and questions from the templates of the items; host text of the items' subjects

A hit counts as right where its item was planted in that document, and as wrong otherwise, also in a document
with another item. Recall is over planted documents, precision over pairs of document and item. Intervals are
Wilson's, 95 %.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import math
import random
import re
import sys
import textwrap
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from megatron_r1.curation.decontaminate import WHOLE, Items, Matcher, Part

PLANTED = ("verbatim", "edited", "wrapped", "embedded", "copies")
NEGATIVES = ("licence", "quote", "instruction", "formulas", "same template", "same subject")
EACH = 120
"""Documents of each kind."""

LICENCES = (
    "Permission is granted to any person who obtains a copy of this program to use, copy, change and pass it "
    "on, provided that this notice stays in all copies. The program comes as it is, without warranty of any "
    "kind, express or implied, and its authors answer for no damage that follows from its use.",
    "This program is free software. You may redistribute it and change it under the terms of its licence, "
    "version two or any later version of your choice. It is distributed in the hope that it will be useful, "
    "but without any warranty, not even that of fitness for a particular purpose.",
    "Redistribution and use in source and binary forms are permitted where the following conditions hold: "
    "copies of the source keep this notice, copies in binary form reproduce it in their documentation, and "
    "the names of the contributors endorse no product without written permission.",
    "The contents of this file are subject to the public licence of its initial developer. You may not use "
    "this file except in compliance with that licence. Software under it is distributed on an as is basis, "
    "and the licence says which rights and limitations govern it.",
)
QUOTES = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in "
    "Liberty, and dedicated to the proposition that all men are created equal.",
    "To be, or not to be, that is the question: Whether 'tis nobler in the mind to suffer the slings and "
    "arrows of outrageous fortune, or to take arms against a sea of troubles, and by opposing end them.",
    "We hold these truths to be self-evident, that all men are created equal, that they are endowed by "
    "their Creator with certain unalienable Rights, that among these are Life, Liberty and the pursuit of "
    "Happiness.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of "
    "foolishness, it was the epoch of belief, it was the epoch of incredulity.",
    "We the People of the United States, in Order to form a more perfect Union, establish Justice, insure "
    "domestic Tranquility, provide for the common defence, promote the general Welfare, do ordain and "
    "establish this Constitution.",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in "
    "want of a wife.",
)
INSTRUCTIONS = (
    "Read the passage carefully and answer the question that follows it. Think step by step, write down each "
    "of your steps, and give the final answer alone on the last line.",
    "The following is a multiple choice question about a subject taught at school. Choose the one option "
    "that is correct and reply with its letter only, without any explanation.",
    "You are an expert programmer. Complete the function below so that it passes all of the tests. Return "
    "only code, without comments, and do not change the name of the function.",
    "Below is an instruction that describes a task, paired with an input that provides further context. "
    "Write a response that appropriately completes the request.",
)
FORMULAS = (
    "e^x = 1 + x + x^2/2! + x^3/3! + x^4/4! + ..., sin x = x - x^3/3! + x^5/5! - x^7/7! + ..., cos x = 1 - "
    "x^2/2! + x^4/4! - x^6/6! + ..., 1/(1-x) = 1 + x + x^2 + x^3 + ...",
    "d/dx x^n = n x^(n-1), d/dx sin x = cos x, d/dx cos x = -sin x, d/dx e^x = e^x, d/dx ln x = 1/x, d/dx "
    "tan x = sec^2 x, d/dx arctan x = 1/(1 + x^2)",
    "sin^2 x + cos^2 x = 1, sin 2x = 2 sin x cos x, cos 2x = cos^2 x - sin^2 x, tan 2x = 2 tan x / (1 - "
    "tan^2 x), sin(x + y) = sin x cos y + cos x sin y",
    "1 + 2 + 3 + ... + n = n(n+1)/2, 1^2 + 2^2 + ... + n^2 = n(n+1)(2n+1)/6, 1^3 + 2^3 + ... + n^3 = "
    "n^2(n+1)^2/4, a + ar + ar^2 + ... = a/(1-r)",
)
PEOPLE = ("Amara", "Benito", "Chiyo", "Dmitri", "Esi", "Farid", "Greta", "Hoang", "Ines", "Jonas", "Kirra",
          "Lukas", "Mirela", "Nadia", "Oskar", "Priya", "Quentin", "Rosa", "Samir", "Tove")  # fmt: skip
THINGS = ("apples", "marbles", "stamps", "lanterns", "tulips", "bricks", "kites", "notebooks", "candles",
          "buttons", "pears", "shells", "posters", "chairs", "ribbons", "coins", "mugs", "seeds")  # fmt: skip
PLACES = ("the harbour market", "a village school", "the town library", "her uncle's barn", "the museum shop",
          "a mountain hut", "the bakery", "the ferry", "a summer camp", "the greenhouse")  # fmt: skip
BEGINNINGS = (
    "{a} brings {n} boxes with {m} {things} each to {place}.",
    "At {place}, {a} counts {n} {things} and {b} counts {m} more than that.",
    "{a} and {b} share {n} {things} so that {a} gets {m} times as many as {b}.",
    "For a feast at {place} {a} needs {n} {things}, which are sold in bags of {m}.",
    "{b} has saved {n} dollars and buys {things} at {m} dollars apiece from {a}.",
    "Each of the {n} visitors of {place} leaves {m} {things} behind for {a}.",
    "A crate of {n} {things} weighs {m} pounds, and {a} carries it to {place}.",
)
MIDDLES = (
    "On the way {k} of them are lost, and {b} replaces half of these the next morning.",
    "The day after, {b} takes {k} {others} in exchange for every third one.",
    "Then {k} percent turn out to be broken and go back to {place}.",
    "{b}, who came late, adds another {k} and paints all of them green.",
    "A storm ruins {k}, so {a} has to borrow twice that number from {b}.",
    "Because {others} are cheaper on Mondays, {b} trades {k} for two each.",
    "Later a friend gives {a} {k} {others} and asks for nothing in return.",
)
ENDS = (
    "How many {things} are left for {a} in the end?",
    "How much does {b} still owe if every one costs {q} cents?",
    "What fraction of all {things} does {a} keep after {q} days?",
    "If this goes on for {q} weeks, how many {others} will {b} own?",
    "How many more than {b} does {a} have, given {q} at the start?",
    "After how many days are fewer than {q} {things} left at {place}?",
)
VERBS = ("count", "merge", "rotate", "filter", "pair", "split", "rank", "mirror", "compress", "shift")
SHAPES = ("intervals", "anagrams", "digits", "brackets", "columns", "vowels", "matrices", "polygons", "paths",
          "prefixes", "timestamps", "fractions", "ledgers", "palindromes")  # fmt: skip
TASKS = (
    "Given a list of {shape}, {verb} those whose sum exceeds {n} and return them in {order} order.",
    "{Verb} all {shape} of a nested list, ignoring entries that repeat more than {n} times in a row.",
    "Return the {shape} that appear in exactly {n} of the given tuples, {order} first; {verb} ties.",
    "For every pair of {shape} less than {n} apart, {verb} the two and keep the {order} one of them.",
)
LINES = (
    "if {x} % {n} == {m}: seen.setdefault({x}, []).append({y})",
    "total = sum({y}[{x}:{x} + {n}]) - {m}",
    "while out and out[-1] > {x} + {n}: out.pop()",
    "best = max(best or 0, {x} * {m} - len({y}))",
    "{x}, {y} = sorted(({x} + {m}, {y} * {n}))",
    "queue.extend({x} + step for step in range({m}, {n}, {k}))",
    "{y} = [{x} for {x} in {y} if str({x}).count('{m}') < {k}]",
    "if not {y} or {x} > {n}: return {k}",
    "key = ''.join(map(chr, ({x} + {m}, {x} ^ {n}, {k})))",
    "table[{x}] = table.get({x} - {m}, 0) + {n} // {k}",
)
FIELDS = ("capital city", "highest mountain", "main export", "official language", "longest river",
          "national flower", "currency unit", "largest lake", "national anthem", "busiest port")  # fmt: skip
WHENS = ("Before the railway reached {place} in {year},", "After {n} dry summers in {place},",
         "When the last king of {place} sold his {thing} in {year},", "Since the treaty of {year},",
         "Of all {n} islands that {place} claimed in {year},", "During the census of {year} in {place},",
         "As prices of {thing} fell below {n} pounds,", "Under the second king of {place},")  # fmt: skip
ASKS = ("which neighbour closed its border first", "how many towns lost their right to hold a fair",
        "what did merchants carry to the coast instead", "why was the mint moved away from the {field}",
        "who paid for the bridge beside the {field}", "which of the guilds asked for a lower toll",
        "what made sailors avoid the southern strait", "how far did the new road have to lead")  # fmt: skip
ENDINGS = ("and what did a traveller from {other} write about it?", "according to the archive of {other}?",
           "until envoys of {other} arrived {n} weeks later?", "if {thing} are left out of the account?",
           "though {other} had promised {n} ships?", "and by which year was this undone?",
           "as pupils in {other} still learn today?", "when measured against {other} alone?")  # fmt: skip
"""Parts of questions about countries."""
DISPUTES = ("{name} of {place} read this aloud at a feast in {year}, and {n} guests left. Explain this.",
            "On a wall in {place} somebody has painted {thing} over this. Which words survive the paint?",
            "Why would a printer in {place} refuse to set these lines for {name} without payment in {thing}?",
            "{name} learnt this by heart at the age of {n}. Name the error that a clerk in {place} found.",
            "Suppose that {n} {thing} depend on it: which claim here must {name} check first?",
            "Put this into plain words for a child in {place} who collects {thing} and likes {name}.",
            "In {year} the council of {place} voted on this with {n} against {other}. Say what followed.",
            "Count the commas, multiply by {n}, and tell {name} how many {thing} that buys.")  # fmt: skip
"""Questions about quoted text."""


@dataclass(frozen=True)
class Document:
    kind: str
    text: str
    item: str | None
    """The item that was planted."""


def gather_text():
    """The quickstart's readers of installed text."""
    path = Path(__file__).parents[1] / "examples" / "quickstart" / "gather_text.py"
    spec = importlib.util.spec_from_file_location("gather_text", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules.setdefault("gather_text", module)
    spec.loader.exec_module(module)
    return module


@cache
def hosts(most: int = 1000) -> dict[str, list[str]]:
    """Documents of each subject."""
    gather = gather_text()
    readers = {"code": gather.stdlib, "words": gather.gcide, "countries": gather.factbook}
    return {name: [text for text, _ in itertools.islice(read(), most)] for name, read in readers.items()}


def problem(r: random.Random) -> tuple[str, str]:
    a, b = r.sample(PEOPLE, 2)
    things, others = r.sample(THINGS, 2)
    of = dict(a=a, b=b, things=things, others=others, place=r.choice(PLACES), n=r.randint(12, 400),
                 m=r.randint(2, 30), k=r.randint(3, 60), q=r.randint(3, 95))  # fmt: skip
    lines = [r.choice(BEGINNINGS), *r.sample(MIDDLES, r.randint(1, 3)), r.choice(ENDS)]
    return " ".join(lines).format(**of), str(r.randint(2, 5000))


def task(r: random.Random) -> tuple[str, str]:
    verb, shape, n, m = r.choice(VERBS), r.choice(SHAPES), r.randint(2, 90), r.randint(2, 9)
    order = r.choice(("ascending", "descending", "shortest", "newest", "alphabetical", "reverse"))
    says = r.choice(TASKS).format(verb=verb, Verb=verb.title(), shape=shape, n=n, order=order)
    examples = [r.sample(range(100), 4) for _ in range(2)]
    name = f"{verb}_{shape}_{r.choice(('by', 'in', 'of'))}_{r.choice(THINGS)}"
    shown = "".join(f"    >>> {name}({e})\n    {sorted(e)[: r.randint(1, 3)]}\n" for e in examples)
    question = f'def {name}(values):\n    """{says}\n\n{shown}    """\n'
    names = r.sample(("value", "entry", "cell", "item", "node", "row"), 2)
    of = {"x": names[0], "y": f"{names[1]}s", "n": n, "m": m, "k": r.randint(2, 40)}
    body = "".join(f"    {line.format(**of)}\n" for line in r.sample(LINES, r.randint(3, 5)))
    return question, f"{body}    return {of['y']}\n"


def slots(r: random.Random, countries: list[str]) -> dict[str, object]:
    place, other = r.sample(countries, 2)
    return {"place": place, "other": other, "field": r.choice(FIELDS), "year": r.randint(1850, 1999),
            "n": r.randint(3, 90), "thing": r.choice(THINGS), "name": r.choice(PEOPLE)}  # fmt: skip


def fact(r: random.Random, countries: list[str]) -> tuple[str, str]:
    """A question about a country, half of them short."""
    forms = ("What is the {field} of {place} called?", "Name the {field} of {place} in one word.",
             "In {place}, what is the {field} today?")  # fmt: skip
    long = " ".join(r.choice(some) for some in (WHENS, ASKS, ENDINGS))
    return r.choice((r.choice(forms), long)).format(**slots(r, countries)), r.choice(PEOPLE)


def quoting(r: random.Random, countries: list[str]) -> tuple[str, str]:
    """An item that quotes text of which the world is full, with a question of its own."""
    quoted = r.choice((LICENCES, QUOTES, INSTRUCTIONS, FORMULAS))
    own = " ".join(r.sample(DISPUTES, r.randint(1, 2))).format(**slots(r, countries))
    if quoted is INSTRUCTIONS:
        own = r.choice((problem, task))(r)[0]
    return "\n\n".join([*r.sample(quoted, r.randint(1, 2)), own]), r.choice(PEOPLE)


def make_items(r: random.Random, countries: list[str], each: int) -> list[Part]:
    makers = {"problems": problem, "code": task, "facts": lambda r: fact(r, countries),
              "quoting": lambda r: quoting(r, countries)}  # fmt: skip
    parts, known = [], set[str]()
    for name, make in makers.items():
        # Few quote each text, so that the documents have to tell how common it is.
        for number in range(each // 8 if name == "quoting" else each):
            question, answer = make(r)
            if question not in known:
                known.add(question)
                parts += [
                    Part(name, str(number), "question", question),
                    Part(name, str(number), "answer", answer),
                ]
    return parts


def edited(r: random.Random, text: str) -> str:
    """A tenth of the words replaced, left out, doubled or moved, at random places. Wrapping is lost."""
    words = text.split()
    for at in sorted(r.sample(range(len(words)), max(1, round(len(words) / 10))), reverse=True):
        how = r.random()
        if how < 0.6:
            words[at] = r.choice(THINGS + SHAPES + VERBS)
        elif how < 0.8:
            del words[at]
        elif how < 0.9:
            words.insert(at, r.choice(THINGS))
        else:
            words[at : at + 2] = words[at : at + 2][::-1]
    return " ".join(words)


def wrapped(r: random.Random, text: str) -> str:
    """Lines of at most 60 characters, some words divided at their ends, in another case."""
    lines = textwrap.wrap(r.choice((str, str.upper, str.title))(text), 60, break_on_hyphens=False)
    for n in range(len(lines) - 1):
        first, _, rest = lines[n + 1].partition(" ")
        if first.isalpha() and len(first) > 6 and r.random() < 0.5:
            lines[n], lines[n + 1] = f"{lines[n]} {first[:3]}-", f"{first[3:]} {rest}"
    return "\n".join(lines)


def within(r: random.Random, text: str, host: str, size: int = 2000) -> str:
    """The text at a random place of a piece of a host."""
    begin = r.randint(0, max(0, len(host) - size))
    piece = host[begin : begin + size]
    cut = r.randint(0, len(piece))
    return f"{piece[:cut]}\n\n{text}\n\n{piece[cut:]}"


def corpus(seed: int, each: int = EACH) -> tuple[list[Part], list[Document]]:
    """Items, and documents of every kind in a random order."""
    r = random.Random(f"decontamination {seed}")
    of = hosts()
    everything = [text for texts in of.values() for text in texts]
    countries = sorted({text.partition(":")[0] for text in of["countries"]})
    parts = make_items(r, countries, 2 * each)
    answers = {(p.set, p.item): p.text for p in parts if p.part == "answer"}
    questions = [p for p in parts if p.part == "question"]
    long = [p for p in questions if len(p.text.split()) >= WHOLE + 2]
    documents: list[Document] = []

    def plant(kind: str, part: Part, text: str) -> None:
        documents.append(Document(kind, text, f"{part.set}/{part.item}"))

    def whole(part: Part) -> str:
        return f"Question: {part.text}\nAnswer: {answers[part.set, part.item]}"

    for _ in range(each):
        host = r.choice(everything)
        plant("verbatim", part := r.choice(questions), whole(part))
        plant("edited", part := r.choice(long), within(r, edited(r, part.text), host))
        plant("wrapped", part := r.choice(questions), within(r, wrapped(r, part.text), host))
        plant("embedded", part := r.choice(questions), within(r, whole(part), host))
    for part in r.sample(long, max(1, each // 10)):
        for _ in range(10):
            plant("copies", part, within(r, part.text, r.choice(everything)))
    known = {part.text for part in parts}
    fresh = {"licence": LICENCES, "quote": QUOTES, "instruction": INSTRUCTIONS, "formulas": FORMULAS}
    for _ in range(each):
        for kind, texts in fresh.items():
            text = "\n\n".join(r.sample(texts, r.randint(1, len(texts))))
            documents.append(Document(kind, within(r, text, r.choice(everything)), None))
        text = next(
            text
            for _ in range(100)
            if (text := r.choice((problem, task, lambda r: fact(r, countries)))(r)[0]) not in known
        )
        documents.append(Document("same template", within(r, text, r.choice(everything)), None))
        documents.append(Document("same subject", r.choice(of["countries"] + of["code"]), None))
    documents += [Document("host", text, None) for text in r.sample(everything, 4 * each)]
    r.shuffle(documents)
    return parts, documents


def wilson(right: int, of: int) -> tuple[float, float, float]:
    """Share and its 95 % interval."""
    z, share = 1.959964, right / of
    middle, half = share + z * z / (2 * of), z * math.sqrt(share * (1 - share) / of + z * z / (4 * of * of))
    return share, (middle - half) / (1 + z * z / of), (middle + half) / (1 + z * z / of)


class Plain:
    """Finds documents that share n words in a row with an item: the rule that most reports name."""

    def __init__(self, parts: list[Part], n: int = 13):
        self.n = n
        self.of: dict[tuple[str, ...], set[str]] = {}
        for part in parts:
            for gram in self.grams(part.text):
                self.of.setdefault(gram, set()).add(f"{part.set}/{part.item}")

    def grams(self, text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"\w+", text.lower())
        return set(zip(*(words[k:] for k in range(self.n)), strict=False))

    def __call__(self, texts: list[str]) -> set[tuple[int, str]]:
        """Pairs of document and item."""
        grams = ((k, gram) for k, text in enumerate(texts) for gram in self.grams(text))
        return {(k, item) for k, gram in grams for item in self.of.get(gram, ())}


def rates(documents: list[Document], pairs: set[tuple[int, str]]) -> dict[str, object]:
    """Recall and precision with their intervals, and counts by kind of document."""
    planted = Counter(document.kind for document in documents if document.item)
    found = Counter(d.kind for n, d in enumerate(documents) if d.item and (n, d.item) in pairs)
    wrong = Counter(documents[n].kind for n, item in pairs if documents[n].item != item)
    return {
        "recall": wilson(found.total(), planted.total()),
        "precision": wilson(found.total(), found.total() + wrong.total()),
        "planted": dict(planted),
        "found": dict(found),
        "negatives": dict(Counter(document.kind for document in documents if not document.item)),
        "wrong": dict(wrong),
    }


def measure(seed: int, each: int = EACH, sampled: bool = True, repeats: int = 5) -> dict[str, object]:
    """`rates` of the rule, and of plain 13-grams; microseconds of both a clean text of 2 kB; mistakes.

    `sampled`: whether frequent n-grams are counted in the documents, or in the items alone.
    """
    parts, documents = corpus(seed, each)
    items = Items(parts)
    texts = [document.text for document in documents]
    matcher = Matcher(items, items.count(texts if sampled else ()))
    pairs = {(hit.document, f"{hit.set}/{hit.item}") for hit in matcher(texts)}
    clean = [document.text[:2000] for document in documents if document.kind == "host"]
    clean = [text for text in clean if len(text) == 2000]
    plain, microseconds = Plain(parts), []
    for find in (lambda: list(matcher(clean)), lambda: plain(clean)):
        start = time.process_time()
        for _ in range(repeats):
            find()
        microseconds.append((time.process_time() - start) * 1e6 / (repeats * len(clean)))
    return {
        **rates(documents, pairs),
        "plain": rates(documents, plain(texts)),
        "us_a_2kB": microseconds,
        "items": matcher.counts,
        "missed": [d for n, d in enumerate(documents) if d.item and (n, d.item) not in pairs],
        "wrongly": [(documents[n], item) for n, item in pairs if documents[n].item != item],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3, help="seeds from --seed on (default: 3)")
    parser.add_argument("--show", type=int, default=0, help="documents of each mistake to print")
    parser.add_argument("--unsampled", action="store_true", help="count n-grams in the items alone")
    args = parser.parse_args()
    for seed in range(args.seed, args.seed + args.rounds):
        result = measure(seed, sampled=not args.unsampled)
        ours, plainly = result["us_a_2kB"]
        print(f"seed {seed}: {ours:.0f} us of processor time a clean 2 kB, {plainly:.0f} plainly")
        print(f"  {result['items']}")
        for name in ("recall", "precision"):
            both = ["{:.3f} ({:.3f} to {:.3f})".format(*of[name]) for of in (result, result["plain"])]
            print(f"  {name} {both[0]}, of plain 13-grams {both[1]}")
        for kind, of in result["planted"].items():
            found = [one["found"].get(kind, 0) for one in (result, result["plain"])]
            print(f"  {kind}: {found[0]} of {of} found, {found[1]} plainly")
        for kind, of in {**result["negatives"], **result["planted"]}.items():
            wrong = [one["wrong"].get(kind, 0) for one in (result, result["plain"])]
            print(f"  {kind}: {wrong[0]} wrong in {of}, {wrong[1]} plainly")
        for document in result["missed"][: args.show]:
            print("MISSED", document)
        for document, item in result["wrongly"][: args.show]:
            print("WRONG", item, document)


if __name__ == "__main__":
    main()
