"""The page of a synthetic run: complete, needs nothing, honest about what is missing; pictures; the tool."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import vl_convert

from megatron_r1.records import CAPABILITIES
from megatron_r1.report import load, plots
from megatron_r1.report.page import Report
from tests.faults import inputs

from .conftest import SOURCES, change, make_arm, save

TOOL = Path(__file__).resolve().parents[2] / "tools" / "report.py"


def shown(root: Path) -> tuple[str, str]:
    """The page, and its visible text."""
    page = str(Report(load.read_all(root)).page)
    text = re.sub(r"<(script|style).*?</\1>|<[^>]*>", " ", page, flags=re.DOTALL)
    return page, " ".join(html.unescape(text).split())


@pytest.fixture(autouse=True, scope="module")
def script() -> Any:
    """Two seconds of bundling, once."""
    with pytest.MonkeyPatch.context() as patch:
        bundle = vl_convert.javascript_bundle(vl_version="6.4")  # type: ignore[call-arg]
        patch.setattr(vl_convert, "javascript_bundle", lambda vl_version: bundle)
        yield


def test_page_names_every_source_capability_and_figure_and_needs_nothing(whole: Path) -> None:
    page, text = shown(whole)
    titles = [of["title"] for name, of in plots.PAGE["figures"].items() if name != "predicted"]
    assert [name for name in (*SOURCES, *CAPABILITIES, *titles) if name not in text] == []
    before = page.split("<script")[0]
    targets = re.findall(r'(?:src|href)\s*=\s*"([^"]*)"', before)
    ids = re.findall(r' id="([^"]*)"', before)
    assert targets and all(target[0] == "#" and target[1:] in ids for target in targets)
    assert "@import" not in page and "url(" not in before and "<link" not in before
    assert len(ids) == len(set(ids)) and len(page.encode()) < 3_000_000 and page == shown(whole)[0]


def test_cards_say_what_the_data_say(whole: Path) -> None:
    save(whole, 100, 150)
    (whole / "checkpoints" / ".step_00000175.tmp").mkdir()
    measured = {"memory_bytes": 3 << 30, "slowest_ratio": 1.25, "saving_seconds": 0.2}
    change(whole, lambda line: line.update(measured, skipped=int(line["step"] in (40, 90))))
    text = shown(whole)[1]
    assert re.search(r"Lowest joint score of 5 sources: −0\.\d+, negative: its text raises the loss", text)
    for said in (
        "Its share of the sequences went from 20.0 % to 0.0 %.",
        "2 steps skipped as bad. The first rank held at most 3 GiB. The slowest rank of a step took 1.25",
        f"The newest is {whole}/checkpoints/step_00000150. The run came 25 steps further",
        "Not complete: .step_00000175.tmp (being written",
        "Saving held the first rank up for 35 s, 33.3 % of its time.",
        "measuring influence 19 %, other 13 %, training 48 %, its control 21 %",
        "learning_rate 0.004 0.002 0.002",
    ):
        assert said in text
    # In the card and again in the figure; no difference stands without it.
    for difference in ("−0.200 −4.0 %", "−0.080 ", "+0.040 "):
        assert len(re.findall(rf"{re.escape(difference)}[^,]*, one run, no interval", text)) == 2


def test_lost_lines_are_said_on_the_page(pair: Path) -> None:
    path = pair / "control" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:9] + lines[12:]))
    text = shown(pair)[1]
    assert f"{path} has lost the lines of step 110 to 112, 3 in all." in text
    assert "A shaded stretch is steps whose lines metrics.jsonl has lost." in text


def test_what_is_missing_is_said_with_the_command_that_makes_it(run: Path) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text(lines[0] + "\n" + lines[1][:40])
    (run / "ledger.jsonl").unlink()
    commands = {f.anchor: f.command for f in Report(load.read_all(run)).figures if f.command}
    assert list(commands) == ["heldout", "influence", "mixture", "checkpoints", "cost"]
    assert "tools/compute_influence.py" in commands["influence"] and "make_mix" in commands["mixture"]
    text = shown(run)[1]
    assert "in 1 step of" in text and "The ledger is empty" in text and "Influence not measured yet" in text


def test_a_run_whose_every_loss_is_no_number_is_still_reported(run: Path) -> None:
    no = float("nan")
    change(run, lambda line: line.update(loss=no, loss_by_source={"sympy": no}, probe_nll={"code": no}))
    assert "No step had a loss that is a number." in shown(run)[1]


def test_names_that_mean_something_in_markup_are_escaped(tmp_path: Path) -> None:
    make_arm(tmp_path / "r<&>", "second", "uniform", 0, 0.0, {"a": 'x<b> & "c"</script>', "plain": "code"})
    page, text = shown(tmp_path / "r<&>")
    assert "<b>" not in page.split("<script")[0] and page.count("</script>") == 2 and "r<&>" in text


def call(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300)


def test_tool_writes_the_page_and_every_figure_and_table_as_pictures(whole: Path) -> None:
    check = f"import runpy, sys; sys.argv = ['', {str(whole)!r}, '--check']; runpy.run_path({str(TOOL)!r}, "
    done = call("-c", f"{check}run_name='__main__'); sys.exit('torch' in sys.modules)")
    assert done.returncode == 0 and done.stdout.startswith("Training loss: Faint: every step.")
    done = call(TOOL, whole, "--png", "--svg")
    assert (done.returncode, done.stderr) == (0, "")
    page, *pictures = map(Path, done.stdout.split())
    assert page == whole / "reports" / "index.html" and page.read_text() == shown(whole)[0]
    figures = Report(load.read_all(whole)).figures
    assert len(set(pictures)) == 2 * sum(bool(f.panels) + len(f.tables) for f in figures)
    for picture in (p for p in pictures if p.suffix == ".svg"):
        data = picture.read_bytes()
        width, height = map(float, re.findall(rb'(?:width|height)="([\d.]+)"', data)[:2])
        size = struct.unpack(">II", picture.with_suffix(".png").read_bytes()[16:24])
        assert b"var(" not in data and size == pytest.approx((2 * width, 2 * height), abs=2)
    heat = (whole / "reports" / "heat.svg").read_text()
    assert all(f">{source}" in heat for source in SOURCES) and "examples that help" in heat


@pytest.mark.parametrize("spoilt", ["config.yaml", "metrics.jsonl", "control", "mix.json"])
def test_a_mistake_is_one_line_and_status_2(run: Path, spoilt: str) -> None:
    (run / "mix.json").write_text("{" if spoilt == "mix.json" else "null")
    if spoilt in ("config.yaml", "metrics.jsonl"):
        (run / spoilt).unlink()
    more = ("--control", run / "control") if spoilt == "control" else ()
    status, text = inputs.call("report", run, *more)
    assert (status, text.count("\n")) == (2, 1) and text.startswith("error: ")
    assert not (run / "reports").exists()


@pytest.mark.parametrize("package", ["altair", "vl_convert", "jinja2"])
def test_without_a_package_the_extra_is_named(run: Path, package: str) -> None:
    code = f"import sys, runpy; sys.modules['{package}'] = None; sys.argv = ['', '{run}']; "
    done = call("-c", f"{code}runpy.run_path('{TOOL}', run_name='__main__')")
    assert done.returncode == 2
    assert done.stderr == f"error: a report needs {package}: pip install -e '.[report]'\n"


@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")
def test_screenshot(tmp_path: Path) -> None:
    root, shot = tmp_path / "crowded", tmp_path / "shot.png"
    domains = {f"{d}-source-{i}": d for d in ("code", "math", "knowledge", "web") for i in range(4)}
    make_arm(root, "second", "uniform", 0, 0.0, domains)
    page = Report(load.read_all(root)).write()
    flags = "headless no-sandbox disable-gpu no-first-run hide-scrollbars disable-background-networking"
    flags += " disable-component-update disable-sync virtual-time-budget=5000 window-size=1200,1600"
    flags += f" user-data-dir={tmp_path}/profile screenshot={shot}"
    command = ["chromium", *(f"--{flag}" for flag in flags.split()), page.as_uri()]
    subprocess.run(command, capture_output=True, timeout=120, check=True)
    data = shot.read_bytes()
    # A page that drew nothing is one colour, and a few kilobytes.
    assert struct.unpack(">II", data[16:24]) == (1200, 1600) and len(data) > 60_000


@pytest.mark.parametrize(
    "made",
    [{}, "x", {"steps": [[1]]}, {"alpha": [[1.0, 2.0]]}, {"alpha": "x"}, {"alpha": [[float("nan")]]},
     {"mix": [1]}, {"mix": {"scale": "z"}}, {"mix": {"keep_above": "x"}}, {"steps": [], "alpha": []}],
)  # fmt: skip
def test_a_mixture_of_another_form_is_one_line(tmp_path: Path, made: object) -> None:
    whole = {"capabilities": ["code"], "steps": [50], "alpha": [[0.5]], "mix": {"phase": "a"}}
    path = tmp_path / "mix.json"
    path.write_text(json.dumps(whole))
    assert load._made_mix(path) == whole
    path.write_text(json.dumps(whole | made if isinstance(made, dict) and made else made))
    with pytest.raises(ValueError, match=r"mix\.json is damaged \(.*make the mixture again") as caught:
        load._made_mix(path)
    assert "\n" not in str(caught.value)
