"""A report of files that others have changed: the page or one line, and no name that becomes markup."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import random
import re
import shutil
import warnings
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vl_convert

from megatron_r1 import config_io
from megatron_r1.records import ScoreTable
from megatron_r1.report import load, plots, summary, tables
from megatron_r1.report.page import Report

from . import conftest
from .conftest import change, make_arm, save, write_scores

DOMAINS = {"a": "code", "b": "math"}


@pytest.fixture(autouse=True, scope="module")
def script() -> Iterator[None]:
    """No script: two seconds of bundling."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vl_convert, "javascript_bundle", lambda vl_version: "const a = '</script>';")
        yield


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ten steps of two sources with all that a report reads."""
    monkeypatch.setattr(conftest, "UNIFORM_STEPS", 6)
    monkeypatch.setattr(conftest, "MIXED_STEPS", 4)
    monkeypatch.setattr(conftest, "GIVEN", conftest.GIVEN.replace("steps: 100", "steps: 6"))
    root = tmp_path / "small"
    make_arm(root, "influence", {"a": 0.6, "b": 0.4}, 0, 0.2, DOMAINS)
    change(root, lambda line: line.update(probe_nll={"code": 5.0}, rank_me=3.0, validation_nll={"a": 3.0}))
    numbers, draw = (np.arange(5), np.full(5, 256)), np.random.default_rng(0).standard_normal
    scores = [np.float32(draw((5, 2, 2))) for _ in DOMAINS]
    of = zip(DOMAINS, scores, strict=True)
    write_scores(root, [ScoreTable(name, ("code", "math"), (3, 6), *numbers, score) for name, score in of])
    save(root, 3, 6, 10)
    mix = {"capabilities": ["code", "math"], "steps": [3, 6], "alpha": [[0.5, 0.1], [0.2, 0.2]], "mix": {}}
    (root / "mix.json").write_text(json.dumps(mix))
    (root / "measured_impact.json").write_text(json.dumps({"code": {"a": 0.1, "b": 0.2}}))
    return root


HOSTILE: list[Any] = [
    None,
    True,
    False,
    0,
    -1,
    1,
    (1 << 61) - 1,
    (1 << 63) - 1,
    10**400,
    0.5,
    1e308,
    -1e308,
    1e-320,
]
HOSTILE += [
    float("inf"),
    float("nan"),
    "",
    " ",
    "x",
    "x" * 5000,
    "\ud800",
    "\0",
    "</script><b>",
    "\u2028",
    [],
    [1],
]
HOSTILE += [{}, {"a": 1}, {"a": {}}, {"a": float("nan")}, {"\ud800": 1}, {"a": 1e308, "b": 1e308}, [[["x"]]]]


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Each (container, key) in a JSON value."""
    for key in [*value] if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def changed(draw: random.Random, content: bytes) -> bytes:
    """A JSON text with a few values replaced, renamed or removed."""
    value = json.loads(content)
    for _ in range(draw.choice([1, 1, 2])):
        container, key = draw.choice([*places(value)])
        kind = draw.random()
        if kind < 0.6:
            container[key] = draw.choice(HOSTILE)
        elif isinstance(container, dict):
            old = container.pop(key)
            container |= {draw.choice(["</script>", "\ud800", "x", "\n", ""]): old} if kind < 0.8 else {}
        else:
            container.pop(key)
        if not [*places(value)]:
            break
    return json.dumps(value).encode()


def spoil(draw: random.Random, root: Path) -> None:
    """Change one file of a run."""
    of_json = [*root.glob("*.json*")]
    others = [root / "config.yaml", *root.glob("checkpoints/*/*"), *root.glob("influence/*/*/written.npy")]
    path = draw.choice(of_json if draw.random() < 0.8 else others)
    content, kind = path.read_bytes(), draw.random()
    if path in of_json and kind < 0.7:
        lines = content.splitlines(keepends=True) if path.suffix == ".jsonl" else [content]
        number = draw.randrange(len(lines))
        lines[number : number + draw.randrange(2)] = [changed(draw, lines[number]) + b"\n"]
        path.write_bytes(b"".join(lines) if path.suffix == ".jsonl" else lines[number])
    elif path in of_json and kind < 0.85:
        at = draw.randrange(len(content) or 1)
        path.write_bytes(content[:at] + draw.randbytes(draw.choice([0, 1, 9])) + content[at + 3 :])
    elif path in of_json and kind < 0.9:
        path.write_bytes(
            draw.choice([content[: len(content) // 2], b"[" * 200_000, b"\0" * 5000, b"", b"\xff\n"])
        )
    else:
        path.unlink()
        if path in of_json:
            draw.choice([os.mkfifo, Path.mkdir, lambda path: path.symlink_to("/dev/zero"), id])(path)


def numbers_of(reading: load.Reading) -> None:
    """All that a page says, without the drawing of its charts."""
    scores, costs, ends = summary.scores(reading), summary.stage_costs(reading), summary.held_out(reading)
    shown = [tables.phases(reading), tables.stages(costs), *tables.overhead(costs)]
    shown += [tables.heat(reading, scores), tables.agreement(scores)] if scores else []
    shown += [tables.held_out(ends[1])] if ends else []
    shown.append(tables.checkpoints(reading.run, summary.checkpoints(reading)))
    assert all(table.rights() for table in shown)
    assert summary.launch(reading.run, "train") and summary.control_command(reading.run)
    assert len(summary.drawn(reading.run)) and plots.colors(reading.run.domains)


def survive(root: Path, seeds: range, whole: int) -> int:
    """Spoil a copy of `root` for each seed, and draw every `whole`th page. Returns how many had no error."""
    good, case = 0, root.with_name("case")
    config = config_io.load([str(root / "config.yaml")])
    for seed in seeds:
        shutil.copytree(root, case)
        draw = random.Random(seed)
        spoil(draw, case)
        try:
            with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
                # Nothing changes it, and reading it takes most of the time.
                patch.setattr(config_io, "load", lambda _: config)
                warnings.simplefilter("error", RuntimeWarning)
                reading = load.read_all(case)
                numbers_of(reading)
                if seed % whole == 0:
                    text = Report(reading).write().read_text()
                    assert len(text) < 2_000_000
                    json.loads(re.findall(r'id="specs">(.*?)</script>', text)[0], parse_constant=pytest.fail)
            good += 1
        except (ValueError, OSError) as error:
            assert str(case) in str(error) and len(str(error)) < 2000, (seed, error)
        except Exception as error:
            error.add_note(f"seed {seed}")
            raise
        shutil.rmtree(case)
    return good


def test_a_report_of_spoilt_files_is_a_page_or_a_line(small: Path) -> None:
    assert survive(small, range(300), whole=100) > 100


@pytest.mark.soak
def test_many_reports_of_spoilt_files_are_pages_or_lines(small: Path) -> None:
    assert survive(small, range(1000, 4000), whole=5) > 1000


class Outline(HTMLParser):
    """Tags with the names of their attributes; texts apart."""

    def __init__(self, page: str):
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.values: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attrs)))
        self.values += [value or "" for _, value in attrs]


MARKUP = [
    "<img src=x onerror=alert(1)>",
    "</script><script>alert(1)</script>",
    "\"onmouseover='alert(1)'",
    "{{ 7 * 7 }}",
]
MARKUP += [
    "\u2028'];alert(1);//",
    "</svg><a href='javascript:alert(1)'>",
    "]]><!--",
    "datum['x']",
    "</style>",
    "\\",
]


def test_a_name_is_text_wherever_it_stands(small: Path) -> None:
    """Of a domain, a capability, a stage and a run's folder."""
    name = " ".join(MARKUP)

    def of(name: str, folder: str) -> tuple[Report, str]:
        root = small.with_name(folder)
        shutil.copytree(small, root)
        text = (root / "config.yaml").read_text().replace("domain: code", f"domain: {json.dumps(name)}")
        (root / "config.yaml").write_text(text)
        change(root, lambda line: line.update(probe_nll={name: 5.0}))
        with open(root / "ledger.jsonl", "a") as file:
            line = json.loads((root / "ledger.jsonl").read_text().splitlines()[0])
            file.write(json.dumps({**line, "stage": name}) + "\n")
        report = Report(load.read_all(root))
        return report, str(report.page)

    report, page = of(name, name.replace("/", "_"))
    plain, theirs = Outline(page), Outline(of("plain", "plain")[1])
    assert plain.tags == theirs.tags
    assert not any(value.startswith(("javascript:", "http")) for value in plain.values)
    assert page.count("</script>") == 2 and "\u2028" not in page.split("<script")[1]
    # What the charts are given is data that comes back.
    specs = json.loads(re.findall(r'id="specs">(.*?)</script>', page)[0])["figures"]
    assert json.dumps(name)[1:-1] in json.dumps(specs["sources"])
    for table in (table for figure in report.figures for table in figure.tables):
        picture = str(report.page.picture(table, "title"))
        assert {tag for tag, _ in Outline(picture).tags} <= {"svg", "rect", "text", "path", "tspan"}


def test_the_page_allows_its_own_script_alone_and_nothing_from_outside(small: Path) -> None:
    page = str(Report(load.read_all(small)).page)
    policy = re.findall(r'Content-Security-Policy" content="([^"]*)"', page)[0]
    (own,) = re.findall(r'<script type="module">(.*?)</script>', page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(own.encode()).digest()).decode()
    rules = dict(rule.split(maxsplit=1) for rule in policy.split("; "))
    assert rules["default-src"] == "'none'" and rules["script-src"] == f"'sha256-{digest}'"
    assert "ast: true" in own and "<\\/script" in own


def test_what_a_run_cannot_have_written_takes_no_memory(small: Path) -> None:
    """Each line has names of its own, and a phase of its own."""
    lines = [json.loads(line) for line in (small / "metrics.jsonl").read_text().splitlines()]
    path, base = small / "metrics.jsonl", lines[-1]
    many = [base | {"step": 11 + n, "probe_nll": {f"{n} {m}": 1.0 for m in range(100)}} for n in range(100)]
    many += [base | {"phase": f"phase {n}", "step": 200 + n} for n in range(100)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines + many))
    run = load.read_run(small)
    assert len(run.columns) < 300 and run.phases == ["uniform", "influence"] and run.end["step"] == 110


@pytest.mark.parametrize(
    "name", ["step_00000003.bak", "step_7", "step_²", "step_99999999999999999999x", ".step_x.tmp"]
)
def test_copies_and_other_folders_are_no_checkpoints(name: str, small: Path) -> None:
    (small / "checkpoints" / name).mkdir()
    saved = summary.checkpoints(load.read_all(small))
    assert [one.path.name for one in saved] == [f"step_{step:08d}" for step in (3, 6, 10)]


def test_what_lies_behind_a_link_is_not_looked_through(small: Path) -> None:
    """A link to / would be looked through for hours."""
    (small / "outside" / "below").mkdir(parents=True)
    (small / "outside" / "below" / "x").write_bytes(bytes(1 << 20))
    (small / "checkpoints" / "step_00000042").symlink_to(small / "outside")
    (one,) = [one for one in summary.checkpoints(load.read_all(small)) if one.step == 42]
    assert one.size < 1 << 16 and not one.complete


@pytest.mark.parametrize(
    "spell", [lambda root: root, lambda root: root / "x" / "..", lambda root: root.with_name("l")]
)
def test_a_run_is_not_compared_with_itself(spell: Callable[[Path], Path], small: Path) -> None:
    (small / "x").mkdir()
    small.with_name("l").symlink_to(small)
    with pytest.raises(ValueError, match="is the run itself; name the run to compare it with"):
        load.read_all(small, spell(small))


def test_a_control_of_the_same_name_and_phases_is_told_apart(small: Path) -> None:
    control = shutil.copytree(small, small.with_name("other") / small.name)
    reading = load.read_all(small, control)
    assert list(reading.arms) == ["run", "control"] and "arm control" in str(Report(reading).page)
