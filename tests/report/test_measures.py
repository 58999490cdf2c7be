"""What the page says of skipped steps, RankMe, validation losses, memory and stragglers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_r1.report import load, page

from .test_page import words_of


def spoil(root: Path, change: Any) -> str:
    """The page of a run whose metrics lines were passed through `change`."""
    path = root / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        change(line)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return page.render(load.read_all(root))


def test_skipped_steps_are_counted_and_marked(run: Path) -> None:
    before = page.render(load.read_all(run))
    assert "skipped as bad" not in words_of(before)
    html = spoil(run, lambda line: line.update(skipped=int(line["step"] in (40, 90))))
    assert "2 steps were skipped as bad" in words_of(html) and "no update was made" in words_of(html)
    assert [f"step {n} was skipped" in html for n in (39, 40, 90)] == [False, True, True]


def test_rank_and_validation_losses_are_drawn_where_they_were_measured(pair: Path) -> None:
    def known(line: dict[str, Any]) -> None:
        if line["step"] % 25 == 0:
            line["validation_nll"] = {"gcide": 6 - line["step"] / 100, "sympy": 5 + (line["step"] > 150)}

    text = words_of(spoil(pair, known))
    assert "Rank of the embeddings and loss on each source's held-back text" in text
    assert "RankMe goes from 12.5 to 27.5" in text and "gcide 4.25" in text
    assert (
        "sympy ends hardest on held-back text, at 6.00 nats per token. Above its lowest at the end: sympy"
        in text
    )
    text = words_of(spoil(pair, lambda line: line.pop("validation_nll", None)))
    assert "RankMe goes" in text and "held-back text" not in text
    assert "RankMe" not in words_of(spoil(pair, lambda line: line.pop("rank_me", None)))


def test_memory_and_the_slowest_rank_stand_with_the_times(whole: Path) -> None:
    text = words_of(spoil(whole, lambda line: line.update(memory_bytes=3 << 30, slowest_ratio=1.25)))
    assert "The first rank held at most 3 GiB" in text
    assert "slowest rank of a step took 1.25 times the median rank's time" in text
