"""The page in a real browser: it draws, and no two labels overlap nor leave their figure."""

from __future__ import annotations

import html
import json
import re
import shutil
import struct
import subprocess
from pathlib import Path
from typing import Any

import pytest

from megatron_r1.report import load, page

from . import conftest
from .test_checkpoints import save
from .test_mixture import rewrite

pytestmark = pytest.mark.skipif(shutil.which("chromium") is None, reason="needs chromium")

# Asks the browser itself for the boxes of all labels. 2 px of a text's box are room above and below it.
PROBE = """<script>
const found = [];
for (const drawing of document.querySelectorAll('svg')) {
  const frame = drawing.getBoundingClientRect();
  const name = drawing.getAttribute('aria-label');
  const boxes = [...drawing.querySelectorAll('text')].map(t => [t.textContent, t.getBoundingClientRect()]);
  boxes.forEach(([said, a], i) => {
    if (a.left < frame.left - 2 || a.right > frame.right + 2 ||
        a.top < frame.top - 2 || a.bottom > frame.bottom + 2)
      found.push(name + ': ' + said + ' leaves the figure');
    for (const [other, b] of boxes.slice(i + 1))
      if (a.left < b.right - 1 && b.left < a.right - 1 && a.top < b.bottom - 4 && b.top < a.bottom - 4)
        found.push(name + ': ' + said + ' overlaps ' + other);
  });
}
document.body.setAttribute('data-found', JSON.stringify(
  {found, drawings: document.querySelectorAll('svg').length,
   wide: document.documentElement.scrollWidth - window.innerWidth}));
</script>"""


def chromium(profile: Path, *arguments: str) -> str:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--hide-scrollbars", f"--user-data-dir={profile}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def looked_at(root: Path, tmp_path: Path, width: int) -> dict[str, Any]:
    copy = tmp_path / "probed.html"
    copy.write_text(page.render(load.read_all(root)).replace("</body>", f"{PROBE}</body>"))
    dom = chromium(tmp_path / "profile", f"--window-size={width},5000", "--dump-dom", copy.as_uri())
    found = re.search(r'data-found="([^"]*)"', dom)
    assert found
    return dict(json.loads(html.unescape(found[1])))


@pytest.fixture
def crowded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixteen sources, five phases, some of a few steps, and checkpoints."""
    names = [f"{domain}-source-{i}" for i in range(4) for domain in ("code", "math", "knowledge", "web")]
    monkeypatch.setattr(conftest, "SOURCES", {name: (name.split("-")[0], 5.0) for name in names})
    root = tmp_path / "crowded"
    conftest.make_arm(root, "second", "uniform", 0, 0.0)
    mixes = [{name: 1 + 7 * (i % 4 == k) for i, name in enumerate(names)} for k in range(5)]
    lengths = {"web": 40, "clean": 40, "code-heavy": 20, "anneal": 6, "sft": 2}
    rewrite(root, {phase: [mix] * n for (phase, n), mix in zip(lengths.items(), mixes, strict=True)})
    save(root, [40, 80, 100, 104, 106])
    return root


@pytest.mark.parametrize("which", ["whole", "run", "crowded"])
def test_labels_neither_overlap_nor_leave_their_figure(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    seen = looked_at(request.getfixturevalue(which), tmp_path, 1200)
    assert seen["found"] == []
    assert seen["drawings"] == {"whole": 8, "run": 7, "crowded": 6}[which]


@pytest.mark.parametrize("which", ["whole", "crowded"])
def test_a_narrow_window_scrolls_figures_and_not_the_page(
    which: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    assert looked_at(request.getfixturevalue(which), tmp_path, 500)["wide"] <= 0


def test_screenshot_has_the_size_asked_for(whole: Path, tmp_path: Path) -> None:
    path = page.write(load.read_all(whole))
    shot = tmp_path / "shot.png"
    chromium(tmp_path / "profile", "--window-size=1200,1600", f"--screenshot={shot}", path.resolve().as_uri())
    data = shot.read_bytes()
    assert struct.unpack(">II", data[16:24]) == (1200, 1600)
    # A page that drew nothing is one colour, and a few kilobytes.
    assert len(data) > 60_000
