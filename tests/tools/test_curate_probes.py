"""curate_probes with FILE.yaml: what it says before it works, and what it refuses."""

from __future__ import annotations

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.curation.made import documents, request, write_lines, write_pair
from tests.launch import ROOT
from tests.tools.test_check import call, files

SOURCES = 14


def written(folder: Path, count: int = 1, **changes) -> Path:
    """A request of sources in two domains, whose texts and pairs are there."""
    texts = [row["text"] for row in documents(0, 20)]
    text = write_lines(folder / "a.jsonl", [{"text": text} for text in texts])
    sources = {}
    for n in range(count):
        prefix = write_pair(folder / "tokens" / str(n), texts)
        sources[f"s{n}"] = {"text": [text], "prefix": prefix, "domains": ["code"]}
    request(folder, sources, **changes)
    return folder / "request.yaml"


def test_check_says_what_would_be_done_without_torch(tmp_path):
    path = written(tmp_path, 2)
    script = "import runpy, sys; sys.modules['torch'] = None; sys.argv[0] = 'curate_probes.py'\n"
    script += "runpy.run_path('tools/curate_probes.py', run_name='__main__')"
    command = [sys.executable, "-c", script, path, "--check", "sources.s1.domains=[]"]
    items = write_lines(
        tmp_path / "items.jsonl", [{"question": "Why?"}, {"question": "How?", "answer": "So."}]
    )
    before, command = files(tmp_path), [*command, f"decontamination.items.mine={items}"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    said = done.stdout
    assert "evaluation items: 3 questions and answers" in said
    assert "s0: 1 inputs" in said and "bytes, a pair of 20 documents; code" in said
    assert "s1: 1 inputs" in said and "no domain, so it has a representative set alone" in said
    assert "quality: above 4 by Q; of too few, the best 25" in said and "items: mine" in said
    assert "out/probe_code, heldout_code: s0" in said
    assert files(tmp_path) == before


def test_estimate_gives_table_5_below_30_hours_of_an_h100(tmp_path):
    """14 sources, 125,000 documents each for the judge: 1.75 million of 1,024 tokens at 2 x 8e9 FLOP."""
    hub = "nobody/nothing@main"
    judge = {"model": hub, "prompts": str(tmp_path / "prompts")}
    quality = {"model": hub}
    path = written(tmp_path, SOURCES, documents=10_000, pilot=20_000, most=2_000_000, quality=quality,
                   judge=judge, duplicates={"semantic": hub})  # fmt: skip
    said = call("curate_probes", path, "--estimate")
    needed = 10_000 * 1.25 / 0.1
    judged = SOURCES * needed * 1024 * 2 * 8e9
    assert f"judge: {SOURCES * needed:,.0f} documents of 1024 tokens, {judged:.3g} FLOP" in said
    hours = float(re.search(r"together: .* FLOP, ([\d.]+) hours", said)[1])
    parts = [judged, judged / 10, SOURCES * needed / 0.1 * 512 * 2 * 109e6]
    parts += [SOURCES * needed / 10 * 256 * 2 * 22.7e6]
    assert hours == pytest.approx(sum(parts) / (0.4 * 989e12) / 3600, abs=0.06) and hours < 30
    assert "sample: 17,500,000 documents, 1,250,000 of each of 14 sources" in said
    half = call("curate_probes", path, "--estimate", "--tflops", 0.8 * 989)
    assert float(re.search(r"FLOP, ([\d.]+) hours of", half)[1]) == pytest.approx(hours / 2, abs=0.06)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{}", "--sources", "a=b"], "--sources is without FILE.yaml alone"),
        (["--merge", "--output-dir", "x"], "--merge is with FILE.yaml alone"),
        (["--output-dir", "x"], "name a FILE.yaml, or, without it, give --sources, --capabilities"),
        (["{}", "--shard", "0/2", "--merge"], "--shard scores, and --merge goes on"),
        (["{}", "--shard", "2/2"], "--shard 2/2: write I/N with I from 0 to N-1"),
        (["{}", "--shard", "0/2"], "waiting.json is not there: run with --merge first"),
        (["{}", "sources.s0.text=[none*.jsonl]", "--check"], "input none*.jsonl does not exist"),
        (["{}", "sources.s0.key=body", "quality=null"], "no document in 1 inputs (20 rejected"),
    ],
)
def test_a_mistake_is_one_message_and_status_2(tmp_path, capsys, monkeypatch, words, message):
    path = written(tmp_path, judge=None, quality={"model": "Q"})
    monkeypatch.setattr(sys, "argv", ["curate_probes.py", *(word.replace("{}", str(path)) for word in words)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "tools/curate_probes.py"), run_name="__main__")
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
