"""What benchmarks/distill.py computes by itself; the study as a whole at its tiny size under `make soak`."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import ttest_rel

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "distill.py"


def load() -> Any:
    spec = importlib.util.spec_from_file_location("distill_study", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distill_study"] = module
    spec.loader.exec_module(module)
    return module


distill = load()


def results(seeds: int) -> dict[str, dict[str, Any]]:
    """Two arms, of which the second is lower by 0.1 a seed and 0.5."""
    made = {}
    for seed in range(1, seeds + 1):
        made[f"ce-{seed}"] = {"probe_nll": {"code": 3.0 + seed}, "gold_bpb": {"mbpp": 1.5}}
        made[f"kd-{seed}"] = {"probe_nll": {"code": 2.5 + 0.9 * seed}, "gold_bpb": {"mbpp": 1.25}}
    return made


def test_differences_are_taken_within_a_seed_with_students_interval() -> None:
    compared = distill.compare(results(4), ("ce", "kd"), 4)
    assert list(compared) == ["code, nats a token", "mbpp, bits per byte"]
    of = compared["code, nats a token"]
    assert of["ce"] == {"seeds": [4.0, 5.0, 6.0, 7.0], "mean": 5.5}
    expected = ttest_rel(of["kd"]["seeds"], of["ce"]["seeds"]).confidence_interval(0.95)
    assert of["kd"]["difference"] == pytest.approx(-0.75)
    found = of["kd"]["difference"] - of["kd"]["half"], of["kd"]["difference"] + of["kd"]["half"]
    assert found == pytest.approx((expected.low, expected.high))
    text = distill.table(compared, {"ce": "plain", "kd": "KL"})
    assert text.splitlines()[:2] == ["| | plain | KL | difference |", "|---|---|---|---|"]
    assert text.splitlines()[3] == "| mbpp, bits per byte | 1.500 | 1.250 | -0.250 ± 0.000 |"


def test_one_seed_has_no_interval() -> None:
    mean, half = distill.interval([2.0])
    assert mean == 2.0 and np.isnan(half)


def test_pieces_come_once_in_the_order_of_their_hashes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = "".join(f"{n:06d}" for n in range(2_500))
    monkeypatch.setattr(distill, "texts", lambda source: iter(["short", long, "x" * 300, "x" * 300]))

    class Letters:
        encode = staticmethod(list)

    path = tmp_path / "one.jsonl"
    with pytest.raises(ValueError, match=r"one: 15,304 tokens on this disk, and 15,400 are wanted"):
        distill.write_source("one", path, Letters(), 15_400)
    assert not path.exists()
    distill.write_source("one", path, Letters(), 15_303)
    pieces = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    assert sorted(map(len, pieces)) == [300, 3_000, 6_000, 6_000]
    hashes = [distill.hashlib.sha256(piece.encode()).digest() for piece in pieces]
    assert hashes == sorted(hashes) and sorted(pieces, key=long.find)[-1] != "short"
    # A file that is there stays; fewer tokens take the first pieces.
    distill.write_source("one", path, Letters(), 10**9)
    distill.write_source("one", tmp_path / "less.jsonl", Letters(), 300)
    less = (tmp_path / "less.jsonl").read_text()
    assert path.read_text().startswith(less) and 1 <= less.count("\n") < 4


def test_arms_of_the_same_flop_cost_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = distill.Study(tmp_path, distill.SIZES["core"])
    monkeypatch.setattr(distill.Study, "flops", lambda self: (40e6, 260e6))
    trials = {(arm, seed): tokens for arm, seed, tokens in study.trials()}
    assert len(trials) == 15 and trials["kd", 3] == trials["ce", 1] == 1_000_000
    assert trials["kd-same-flop", 2] * 300e6 == pytest.approx(trials["ce", 2] * 40e6, rel=1e-5)
    assert trials["online", 1] == trials["cached", 1] == 100_000


@pytest.mark.soak
def test_the_study_runs_and_answers_at_once_the_second_time(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--size", "tiny", "--output", str(tmp_path)]
    first = subprocess.run(command, capture_output=True, text=True, check=False)
    assert first.returncode == 0, first.stderr
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert again.stdout == first.stdout and "budget: 5 arms x 2 seeds" in first.stdout
    found = json.loads((tmp_path / "results.json").read_text())
    assert set(found["main"]) == {"code, nats a token", "knowledge, nats a token"}
    online, cached = found["divergence"]["online"], found["divergence"]["cached"]
    assert all(a["kl"] > 0 and b["kl"] > 0 for a, b in zip(online, cached, strict=True))
    assert found["skipped"] and not any(found["skipped"].values())
