"""Every tool says what it does, how it is called and how it ends, at once."""

from __future__ import annotations

import json
import subprocess
import sys

from tests.launch import ROOT

TOOLS = sorted(path.name for path in (ROOT / "tools").glob("*.py"))
SCRIPT = """
import contextlib, io, json, runpy, sys

said = {}
for tool in sys.argv[1:]:
    for word in ("--help", "--no-such-option"):
        sys.argv = [tool, word]
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
            try:
                runpy.run_path(f"tools/{tool}", run_name="__main__")
            except SystemExit as end:
                said[f"{tool} {word}"] = end.code, out.getvalue()
said["torch"] = "torch" in sys.modules
print(json.dumps(said))
"""


def test_every_tool_helps_with_an_example_and_exit_statuses() -> None:
    """All in one process, which never imports torch."""
    command = [sys.executable, "-c", SCRIPT, *TOOLS]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60, check=True)
    said = json.loads(done.stdout)
    assert said.pop("torch") is False and len(said) == 2 * len(TOOLS)
    for tool in TOOLS:
        status, text = said[f"{tool} --help"]
        assert status == 0
        _, _, after = text.partition("options:")
        assert f"tools/{tool} " in after and "Exit status: 0 done, 2 a mistake" in after
        assert said[f"{tool} --no-such-option"][0] == 2
