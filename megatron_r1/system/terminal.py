"""A tool at the terminal: progress with ETA, its parser, one message a mistake.

A user's mistake is one message and exit status 2; Ctrl-C is one line and 130.
"""

from __future__ import annotations

import argparse
import gc
import math
import os
import re
import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from megatron_r1.system.errors import RunBusyError, brief, printable, require_utf8

_EVERY = 10.0
"""Seconds between lines where there is no terminal."""


_LONGEST, _LINES = 1000, 200
"""Characters of a line of a message, and its lines."""


def say(line: str, result: bool = False) -> None:
    """Print a line for people: beside the results, or as one. Control characters in it are escaped."""
    print(printable(line, keep="\n\t"), file=sys.stdout if result else sys.stderr, flush=True)


def message_of(error: BaseException) -> str:
    """An error's message for people: bounded, whatever it quotes. What ran out is said by the way out."""
    text, way = str(error), f"; set {TRACEBACK}=1 to see where"
    if isinstance(error, RecursionError):
        text = f"a file is nested deeper than this program reads{way}"
    elif isinstance(error, MemoryError):
        text = f"not enough memory ({text or 'size unknown'}): for what a file claims, or here{way}"
    lines = printable(text[: _LONGEST * _LINES], keep="\n\t").split("\n")
    out = [line if len(line) <= _LONGEST else f"{line[: _LONGEST - 3]}..." for line in lines[:_LINES]]
    return "\n".join([*out, *([f"and {len(lines) - _LINES} lines more"] if len(lines) > _LINES else [])])


def is_first_rank() -> bool:
    """Whether this process is the launch's first, which speaks for all; known before the ranks have met."""
    return os.environ.get("RANK", "0") == "0"


class Progress:
    """Counts towards `total`. Only one rank should show it: pass `show=False` on the others."""

    def __init__(self, name: str, total: int, unit: str, start: int = 0, show: bool = True):
        self.name, self.total, self.unit, self.done = printable(name), total, unit, start
        self.show = show
        self._first, self._began, self._last = start, time.monotonic(), time.monotonic()
        self._bar = None
        if show and sys.stderr.isatty():
            self._bar = tqdm(total=total, initial=start, desc=self.name, unit=f" {unit}", dynamic_ncols=True)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def advance(self, n: int = 1, note: str = "") -> None:
        self.done += n
        if self._bar is not None:
            if note:
                self._bar.set_postfix_str(printable(note), refresh=False)
            self._bar.update(n)
        elif self.show:
            now = time.monotonic()
            if now - self._last >= _EVERY or self.done == self.total:
                self._last = now
                say(f"{self.name}: {self.line()}{' | ' + note if note else ''}")

    def line(self) -> str:
        """`120/200 steps, 1.9 steps/s, 42 s left`."""
        rate = (self.done - self._first) / max(1e-9, time.monotonic() - self._began)
        left = (self.total - self.done) / rate if rate > 0 else float("inf")
        eta = "done" if self.done >= self.total else f"{_duration(left)} left"
        return f"{self.done}/{self.total} {self.unit}, {rate:.3g} {self.unit}/s, {eta}"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"


TRACEBACK = "MEGATRON_R1_TRACEBACK"
"""Environment: set it to see where a message comes from."""
_STATUSES = """Exit status: 0 done, 2 a mistake in what was asked or found (one message says which), 130
interrupted, 141 the output was closed; any other is a fault, with its traceback."""


def tool_parser(doc: str, statuses: str = "") -> argparse.ArgumentParser:
    """A tool's parser, from its docstring: what it does, then the options, then, from the first command in it
    on, examples. `statuses`: exit statuses of this tool alone. Ends the tool for a word that is not UTF-8."""
    with user_errors():
        for word in sys.argv[1:]:
            require_utf8(word)
    what, examples = re.split(r"\n\n(?=python |torchrun )", doc, maxsplit=1)
    epilog, look = "\n".join([examples, _STATUSES, statuses]).rstrip(), argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=what, epilog=epilog, formatter_class=look)


def number(
    kind: Callable[[str], float], least: float, most: float = math.inf, above: bool = False
) -> Callable[[str], Any]:
    """Type of an option: a finite number of `kind` from `least`, or `above` it, to `most`."""
    begin = f"{'above' if above else 'at least'} {least:g}"
    wanted = begin if most == math.inf else f"{begin} and at most {most:g}"

    def read(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not (least < value if above else least <= value) or not value <= most or value == math.inf:
            what = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"{brief(text)} must be {what} {wanted}")
        return value

    return read


count, positive = number(int, 1), number(float, 0, above=True)


@contextmanager
def loading_torch(run: str) -> Iterator[None]:
    """Say, once a launch, what the silence is in which torch is imported within.

    Imports make a million objects and hardly a cycle of garbage. Python looks for none meanwhile, nor among
    these objects afterwards, which saves a quarter of the imports' processor time.
    """
    if is_first_rank():
        say(f"{run}: configuration checked; loading torch, which takes some seconds")
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _reader_is_gone() -> bool:
    """Whether what this process prints went to a pipe that nobody reads any more, as of `| head`."""
    poll = select.poll()
    for stream in (1, 2):
        poll.register(stream, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


@contextmanager
def user_errors() -> Iterator[None]:
    """Turn ValueError, OSError, a busy run directory and memory that ran out into `error: ...` and status 2.

    A reader of the output that is gone ends the tool in silence, as SIGPIPE ends other programs.
    """
    try:
        yield
        sys.stdout.flush()
    except (ValueError, OSError, RunBusyError, RecursionError, MemoryError) as error:
        if os.environ.get(TRACEBACK):
            raise
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            # Python flushes both once more when it ends.
            for stream in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
            sys.exit(141)
        if is_first_rank():
            say(f"error: {message_of(error)}")
        else:
            # Most mistakes are every rank's, and the first one says them; the launcher ends this one
            # before it repeats them, unless the mistake is its alone.
            time.sleep(3)
            say(f"[rank {os.environ['RANK']}] error: {message_of(error)}")
        sys.exit(2)
    except KeyboardInterrupt:
        if is_first_rank():
            say("interrupted; the same command goes on from here")
        sys.exit(130)
