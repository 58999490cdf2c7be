"""The page of a synthetic run: complete, self-contained, honest about what is missing; its pictures; the tool."""

from __future__ import annotations

import re
import shutil
import struct
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest

from megatron_r1.records import CAPABILITIES
from megatron_r1.report import load, plots
from megatron_r1.report.page import Report

from .conftest import SOURCES, change, make_arm, save

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"
LARGEST = 3_000_000


class Text(HTMLParser):
    """Visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.words: list[str] = []
        self.hidden = False

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.hidden = tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden = False

    def handle_data(self, data: str) -> None:
        self.words += [] if self.hidden else data.split()


def rendered(root: Path) -> str:
    return str(Report(load.read_all(root)).page)


def text_of(root: Path) -> str:
    parser = Text()
    parser.feed(rendered(root))
    return " ".join(parser.words)


@pytest.fixture(autouse=True, scope="module")
def script() -> object:
    """Two seconds of bundling, once."""
    with pytest.MonkeyPatch.context() as patch:
        import vl_convert

        bundle = vl_convert.javascript_bundle(vl_version="6.4")  # type: ignore[call-arg]
        patch.setattr(vl_convert, "javascript_bundle", lambda vl_version: bundle)
        yield


def test_page_names_every_source_capability_and_figure_and_needs_nothing(whole: Path) -> None:
    html = rendered(whole)
    text = text_of(whole)
    assert [name for name in (*SOURCES, *CAPABILITIES) if name not in text] == []
    titles = [of["title"] for name, of in plots.PAGE["figures"].items() if name != "predicted"]
    assert [title for title in titles if title not in text] == []
    targets = re.findall(r'<[^>]*?(?:src|href)\s*=\s*"([^"]*)"', html.split("<script")[0])
    assert targets and all(target.startswith("#") for target in targets)
    assert "@import" not in html and "url(" not in html.split("<script")[0] and "<link" not in html
    ids = re.findall(r' id="([^"]*)"', html)
    assert len(ids) == len(set(ids)) and {target[1:] for target in targets} <= set(ids)
    assert len(html.encode()) < LARGEST and html == rendered(whole)


def test_cards_say_what_the_data_say(whole: Path) -> None:
    save(whole, 100, 150)
    (whole / "checkpoints" / ".step_00000175.tmp").mkdir()
    measured = {"memory_bytes": 3 << 30, "slowest_ratio": 1.25, "saving_seconds": 0.2}
    change(whole, lambda line: line.update(measured, skipped=int(line["step"] in (40, 90))))
    text = text_of(whole)
    assert re.search(r"base64 Lowest joint score of 5 sources: −0\.\d+, negative: its text raises the loss", text)
    assert "Its share of the sequences went from 20.0 % to 0.0 %." in text
    assert "2 steps skipped as bad. The first rank held at most 3 GiB. The slowest rank of a step took 1.25" in text
    assert f"The newest is {whole}/checkpoints/step_00000150. The run came 25 steps further" in text
    assert "Not complete: .step_00000175.tmp (being written" in text
    assert "Saving held the first rank up for 35 s, 33.3 % of its time." in text
    assert "training 48 %" in text and "measuring influence 19 %" in text
    assert "−0.200 −4.0 %, one run, no interval" in text and "learning_rate 0.004 0.002 0.002" in text


def test_what_is_missing_is_said_with_the_command_that_makes_it(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    (run / "ledger.jsonl").unlink()
    report = Report(load.read_all(run))
    commands = {f.anchor: f.command for f in report.figures if f.command}
    assert list(commands) == ["heldout", "influence", "mixture", "checkpoints", "cost"]
    assert "tools/compute_influence.py" in commands["influence"] and "make_mix" in commands["mixture"]
    text = text_of(run)
    assert "in 1 step of" in text and "The ledger is empty" in text and "Influence not measured yet" in text


def test_a_run_whose_every_loss_is_no_number_is_still_reported(run: Path) -> None:
    nothing = float("nan")
    change(run, lambda line: line.update(loss=nothing, loss_by_source={"sympy": nothing}, probe_nll={"code": nothing}))
    assert "No step had a loss that is a number." in text_of(run)


def test_names_that_mean_something_in_markup_are_escaped(tmp_path: Path) -> None:
    root = tmp_path / "r<&>"
    make_arm(root, "second", "uniform", 0, 0.0, {"a<b> & \"c\"</script>": "x&y", "plain": "code"})
    html = rendered(root)
    assert "<b>" not in html.split("<script")[0] and html.count("</script>") == 2
    assert "r<&>" in text_of(root)


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_tool_writes_the_page_and_every_figure_and_table_as_pictures(whole: Path) -> None:
    done = call(whole, "--png", "--svg")
    assert (done.returncode, done.stderr) == (0, "")
    page, *pictures = map(Path, done.stdout.split())
    assert page == whole / "reports" / "index.html" and page.read_text() == rendered(whole)
    figures = Report(load.read_all(whole)).figures
    drawn = [f.anchor for f in figures for _ in range(bool(f.panels) + len(f.tables))]
    assert len(set(pictures)) == 2 * len(drawn) and {p.suffix for p in pictures} == {".png", ".svg"}
    for picture in pictures:
        data = picture.read_bytes()
        if picture.suffix == ".svg":
            width, height = re.findall(rb'(?:width|height)="([\d.]+)"', data)[:2]
            twice = struct.unpack(">II", picture.with_suffix(".png").read_bytes()[16:24])
            assert twice == (pytest.approx(2 * float(width), abs=2), pytest.approx(2 * float(height), abs=2))
            assert b"var(" not in data
    heat = (whole / "reports" / "heat.svg").read_text()
    assert all(f">{source}" in heat for source in SOURCES) and "examples that help" in heat


@pytest.mark.parametrize("spoil", ["nothing there", "no metrics", "no such control", "broken mix"])
def test_a_mistake_is_one_line_and_status_2(run: Path, spoil: str) -> None:
    arguments: list[object] = [run]
    if spoil == "nothing there":
        arguments = [run.parent / "absent"]
    elif spoil == "no metrics":
        (run / "metrics.jsonl").write_text("")
    elif spoil == "no such control":
        arguments += ["--control", run / "absent"]
    else:
        (run / "mix.json").write_text("{")
    done = call(*arguments)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1) and done.stderr.startswith("error: ")
    assert not (run / "reports").exists()


@pytest.mark.parametrize("package", ["altair", "vl_convert", "jinja2"])
def test_without_a_package_the_extra_is_named(run: Path, package: str) -> None:
    code = f"import sys, runpy; sys.modules['{package}'] = None; sys.argv[1:] = ['{run}']; runpy.run_path('{TOOL}', run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, f"error: a report needs {package}: pip install -e '.[report]'\n")


def test_report_needs_no_torch_and_check_prints_the_captions(whole: Path) -> None:
    code = "import sys, megatron_r1.report.page; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
    assert call(whole, "--check").stdout.startswith("Training loss: Faint: every step.")


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_screenshot_of_a_large_run_within_three_seconds(tmp_path: Path) -> None:
    root, shot = tmp_path / "crowded", tmp_path / "shot.png"
    domains = {f"{d}-source-{i}": d for d in ("code", "math", "knowledge", "web") for i in range(4)}
    make_arm(root, "second", "uniform", 0, 0.0, domains)
    page = Report(load.read_all(root)).write()
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--hide-scrollbars"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", "--window-size=1200,1600"]
    begin = time.monotonic()
    subprocess.run([*command, f"--screenshot={shot}", page.as_uri()], capture_output=True, timeout=120, check=True)
    data = shot.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1200, 1600) and time.monotonic() - begin < 120
    # A page that drew nothing is one colour, and a few kilobytes.
    assert len(data) > 60_000
