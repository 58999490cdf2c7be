"""Calls everything in `_csrc` with random and hostile arguments: tests/test_csrc.py starts this as a process.

python tests/fuzz_csrc.py CALLS SEED [EXTENSION]

Each call answers as a simple oracle does, or raises one of EXPECTED. Most arguments are right, so that most
calls reach what they are for. Prints the calls made of each entry as JSON. EXTENSION: a build of
csrc/bindings.cpp to be called in place of the installed one, with the sanitizers for example.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import inspect
import json
import os
import pickle
import random
import resource
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

EXPECTED = ValueError, TypeError, IndexError, OverflowError, MemoryError, OSError
NEVER, MAX = 2**64 - 1, 2**62
LONGEST = 0.3
"""Seconds after which a call is ended, as by Ctrl-C."""


class Ended(Exception):
    """A call took LONGEST."""


def load(path: str | None) -> ModuleType:
    if path is None:
        from megatron_r1 import _csrc

        return _csrc
    loader = ExtensionFileLoader("megatron_r1._csrc", path)
    spec = importlib.util.spec_from_loader(loader.name, loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def entries(module: ModuleType) -> set[str]:
    """Every function, class, method and property of the module, by its dotted name."""
    found = set()
    for name, value in vars(module).items():
        if name.startswith("__"):
            continue
        found.add(name)
        if inspect.isclass(value):
            # pybind11 adds a hook of its own to each class.
            own = {
                member for member in vars(value) if member in ("__init__", "__reduce__") or member[0] != "_"
            }
            found |= {f"{name}.{member}" for member in own}
    return found


def greedy(weights: list[float], samples: int) -> tuple[list[int], list[int]]:
    """Megatron's rule: the pick of each sample, and its number in its source."""
    drawn, pick, number = [0] * len(weights), [], []
    for i in range(samples):
        errors = [w * max(i, 1) - n for w, n in zip(weights, drawn, strict=True)]
        best = errors.index(max(errors))
        pick.append(best)
        number.append(drawn[best])
        drawn[best] += 1
    return pick, number


class Known:
    """A plan, and what its phases were. `order`: Megatron's pick of each sample, where there is an oracle."""

    def __init__(self, plan: Any, megatron: bool, shuffle: bool, sources: int) -> None:
        self.plan, self.megatron, self.shuffle, self.sources = plan, megatron, shuffle, sources
        self.phases: list[dict[str, Any]] = []

    def check(self, source: np.ndarray, epoch: np.ndarray, window: np.ndarray, sample: np.ndarray) -> None:
        assert source.dtype == epoch.dtype == np.int32 and window.dtype == np.int64
        assert source.shape == epoch.shape == window.shape == sample.shape
        for k, e, w, i in zip(*(x.tolist() for x in (source, epoch, window, sample)), strict=True):
            phase = next(p for p in reversed(self.phases) if p["start"] <= i)
            assert phase["weights"][k] > 0 and e >= phase["first_epoch"][k]
            if phase["kept"][k] is None:
                assert 0 <= w < phase["windows"][k]
            else:
                assert w in phase["kept"][k]
            if i < 3000:
                # The draws of the source before this sample, its epoch and its place in the order agree.
                draws = self.plan.count(k, i)
                assert self.plan.position(k, draws) == i
                place = draws - phase["first_draw"][k]
                assert e == phase["first_epoch"][k] + place // phase["windows"][k]
                if not self.shuffle and phase["kept"][k] is None:
                    assert w == place % phase["windows"][k]


class Fuzz:
    def __init__(self, module: ModuleType, seed: int, folder: Path) -> None:
        self.module, self.random, self.folder = module, random.Random(seed), folder
        self.array = np.random.default_rng(seed)
        self.called: Counter[str] = Counter()
        self.raised: Counter[str] = Counter()
        self.keeps: list[tuple[Any, set[int], int]] = []
        self.plans: list[Known] = []
        self.streams = module.Streams()
        self.tokens: list[np.ndarray] = []
        self.make_files()
        self.table: dict[str, Callable[[], None]] = {
            "megatron_order": self.megatron_order,
            "divergence_statistics": self.divergence,
            "divergence_gradient": self.divergence,
            "draw": self.draw,
            "Keep": self.unmade,
            "Plan": self.unmade,
            "Streams": self.threads,
            "Keep.__init__": self.keep,
            "Keep.windows": self.keep_properties,
            "Keep.kept": self.keep_properties,
            "Keep.bytes": self.keep_properties,
            "Plan.__init__": self.plan,
            "Plan.add_phase": self.add_phase,
            "Plan.locate": self.locate,
            "Plan.locate_range": self.locate_range,
            "Plan.locate_many": self.locate_many,
            "Plan.counts": self.counts,
            "Plan.count": self.count,
            "Plan.position": self.position,
            "Plan.bounds": self.bounds,
            "Plan.segment_starts": self.segment_starts,
            "Plan.bytes": self.plan_bytes,
            "Streams.__init__": self.new_streams,
            "Streams.add": self.add,
            "Streams.gather": self.gather,
            "Streams.whole_windows": self.whole_windows,
            "Streams.will_need": self.will_need,
            **dict.fromkeys(("Keep.__reduce__", "Plan.__reduce__", "Streams.__reduce__"), self.copies),
        }
        assert entries(module) == self.table.keys(), entries(module) ^ self.table.keys()

    # -- arguments

    def spoil(self, value: Any, odds: float = 0.1) -> Any:
        """Mostly the value; else something near it, or nothing like it."""
        if self.random.random() >= odds:
            return value
        if isinstance(value, np.ndarray) and self.random.random() < 0.8:
            return self.array_like(value)
        numbers = [
            -1,
            0,
            1,
            2**31,
            2**32,
            2**38,
            2**53,
            MAX - 1,
            MAX,
            2**63 - 1,
            2**63,
            NEVER,
            2**64,
            -(2**63),
        ]
        odd = [
            None,
            1.5,
            float("nan"),
            "7",
            b"7",
            True,
            10**400,
            -(10**400),
            np.float32(1.7),
            np.int8(3),
            [],
            {},
        ]
        odd += [
            object(),
            np.array(3),
            np.array(1.5),
            np.zeros((2, 2)),
            [[1], [2, 3]],
            range(4),
            iter([1]),
            1j,
        ]
        return self.random.choice(numbers + odd)

    def array_like(self, value: np.ndarray) -> Any:
        """An array of the same numbers in another form, or of others."""
        n = len(value)
        with np.errstate(all="ignore"):
            if self.random.random() < 0.5:
                forms = [
                    lambda: value.tolist(),
                    lambda: value.astype(value.dtype.newbyteorder()),
                    lambda: np.repeat(value, 3)[::3],
                    lambda: value[::-1].copy()[::-1],
                    lambda: self.misaligned(value),
                    lambda: value.astype(np.int64 if value.dtype.kind in "iu" else np.float32),
                ]
            else:
                forms = [
                    lambda: value[:-1],
                    lambda: np.broadcast_to(value[:1], value.shape) if n else value,
                    lambda: value.astype(np.float64) + 0.5,
                    lambda: value.astype(object),
                    lambda: value.astype("M8[s]") if value.dtype.kind in "iu" else value.astype(str),
                    lambda: value.reshape(1, -1),
                    lambda: value.astype(np.longdouble),
                    lambda: value.astype(bool),
                    lambda: np.concatenate((value, value)),
                    lambda: self.with_entry(value),
                    lambda: np.zeros(0),
                ]
            return self.random.choice(forms)()

    def misaligned(self, value: np.ndarray) -> np.ndarray:
        room = np.zeros(value.nbytes + 1, np.uint8)
        room[1:] = np.frombuffer(value.tobytes(), np.uint8)
        return room[1:].view(value.dtype).reshape(value.shape)

    def with_entry(self, value: np.ndarray) -> np.ndarray:
        out = value.copy()
        if not len(out):
            return out
        if out.dtype.kind == "f":
            bad: list[Any] = [np.nan, np.inf, -1.0, 1e308, 5e-324, -0.0]
        else:
            limits = np.iinfo(out.dtype)
            bad = [limits.max, limits.min, 0, limits.max // 2, limits.max // 4 + 1]
        out[self.random.randrange(len(out))] = self.random.choice(bad)
        return out

    def number(self, most: int = 3000) -> int:
        return self.random.choice([self.random.randrange(most)] * 6 + [0, 2**40, MAX - 1])

    def call(self, entry: str | None, function: Callable[..., Any], *arguments: Any) -> Any:
        """The answer, or None where an expected exception was raised."""
        if entry:
            self.called[entry] += 1
        begin = time.monotonic()
        answer = error = None
        try:
            signal.setitimer(signal.ITIMER_REAL, LONGEST)
            try:
                answer = function(*arguments)
            except EXPECTED as raised:
                error = raised
            signal.setitimer(signal.ITIMER_REAL, 0)
        except Ended as raised:
            error = raised
        except RuntimeError as raised:
            # The alarm came while pybind11 made another exception.
            if "REPLACED BY Ended" not in str(raised):
                raise
            error = Ended()
        # Under the sanitizers on a busy machine, work that takes 0.1 s may take many.
        assert time.monotonic() - begin < 60, entry
        if error is None:
            return answer
        self.raised[type(error).__name__] += 1
        assert len(str(error)) < 4000, str(error)[:200]
        return None

    def fails(self, function: Callable[..., Any], *arguments: Any) -> None:
        answer = self.call(None, function, *arguments)
        assert answer is None, (function, arguments, answer)

    # -- rows of logits

    def logits(self, rows: int, tokens: int) -> np.ndarray:
        """fp32, or bf16 as its bits, of rows that may lie apart."""
        wide = self.array.normal(0, 9, (rows, tokens + self.random.choice([0, 5]))).astype(np.float32)
        if self.random.random() < 0.5:
            return wide[:, :tokens]
        return (wide.view(np.uint32) >> 16).astype(np.uint16)[:, :tokens]

    def divergence(self) -> None:
        """Statistics and gradient of one student, mostly with a teacher."""
        rows, tokens = self.random.randrange(1, 5), self.random.choice([1, 15, 16, 17, 600])
        student, inverse, threads = self.logits(rows, tokens), self.random.choice([1.0, 0.3]), 3
        teacher = self.random.choice([None, self.logits(rows, tokens), self.logits(rows, tokens)])
        given = [self.spoil(student), self.spoil(teacher), self.spoil(inverse), self.spoil(threads)]
        right = all(a is b for a, b in zip(given, (student, teacher, inverse, threads), strict=True))
        answer = self.call("divergence_statistics", self.module.divergence_statistics, *given)
        assert answer is not None or not right
        if not right:
            return
        z = [np.zeros((rows, tokens)) if x is None else self.widened(x) for x in (student, teacher)]
        own, its = (x - x.max(1, keepdims=True) for x in z)
        np.testing.assert_array_equal(answer[0], z[0].max(1))
        np.testing.assert_allclose(answer[1], np.exp(own * inverse).sum(1), 2e-6)
        if teacher is not None:
            np.testing.assert_allclose(answer[3], np.exp(its * inverse).sum(1), 2e-6)
        a, b, c = self.array.random((3, rows)).astype(np.float32)
        numbers = [answer[0], answer[2], inverse, a, b, self.random.choice([None, c])]
        spoilt = [self.spoil(x, 0.05) for x in numbers]
        given[:2] = self.spoil(student, 0.05), self.spoil(teacher, 0.05)
        words = [*given[:2], *spoilt], [student, teacher, *numbers]
        right = all(x is y for x, y in zip(*words, strict=True))
        done = self.call(
            "divergence_gradient",
            lambda *words: (self.module.divergence_gradient(*words), True)[1],
            given[0],
            given[1],
            *spoilt,
            self.spoil(threads, 0.05),
        )
        if right and done:
            terms = [a[:, None] * np.exp(own * inverse)]
            terms += [] if teacher is None else [-b[:, None] * np.exp(its * inverse)]
            terms += [] if numbers[5] is None else [c[:, None] * np.exp(own)]
            error = np.abs(self.widened(student) - sum(terms))
            assert (error <= (1e-5 if student.dtype == np.float32 else 1e-2) * sum(map(np.abs, terms))).all()

    def widened(self, logits: np.ndarray) -> np.ndarray:
        if logits.dtype == np.uint16:
            logits = (np.ascontiguousarray(logits).astype(np.uint32) << 16).view(np.float32)
        return logits.astype(np.float64)

    # -- Keep

    def keep(self) -> None:
        windows = self.random.choice([0, 1, 7, 8, 63, 64, 65, 447, 448, 449, self.random.randrange(3000)])
        bits = self.array.random(windows) < self.random.choice([0, 0.01, 0.5, 1])
        packed = np.packbits(bits, bitorder="little")
        if len(packed) and self.random.random() < 0.3:
            packed[-1] |= 0xFF << (windows % 8 or 8) & 0xFF  # Bits past the end are ignored.
        given = self.spoil(windows), self.spoil(packed, 0.2)
        made = self.call("Keep.__init__", self.module.Keep, *given)
        if made is None:
            assert given[0] is not windows or given[1] is not packed
        elif given[0] is windows and given[1] is packed:
            kept = set(np.flatnonzero(bits).tolist())
            assert (made.windows, made.kept) == (windows, len(kept))
            self.keeps = [*self.keeps[-5:], (made, kept, windows)]

    def keep_properties(self) -> None:
        if not self.keeps:
            self.keep()
        for made, kept, windows in self.keeps[-1:]:
            for name in ("windows", "kept", "bytes"):
                assert self.call(f"Keep.{name}", getattr, made, name) is not None
            assert (made.windows, made.kept) == (windows, len(kept)) and made.bytes > 0

    def unmade(self) -> None:
        """Objects whose constructor has not run, or failed, and what is called with the wrong self."""
        for name in ("Keep", "Plan", "Streams"):
            kind = getattr(self.module, name)
            made = kind.__new__(kind)
            if self.random.random() < 0.5 and name != "Streams":
                self.call(name, made.__init__, self.spoil(0, 1))
            for member, arguments in self.members(name):
                if isinstance(vars(kind)[member], property):
                    self.fails(getattr, made, member)
                for receiver in (made, None, 3, self.streams if name != "Streams" else object()):
                    self.fails(lambda r=receiver, m=member, k=kind, a=arguments: getattr(k, m)(r, *a))
            self.called[name] += 1
        if self.plans:
            # A mask that was not made.
            self.add_phase(self.module.Keep.__new__(self.module.Keep))

    def members(self, kind: str) -> list[tuple[str, list[Any]]]:
        methods = [name.split(".")[1] for name in self.table if name.startswith(f"{kind}.")]
        return [(name, [0] * n) for name in methods if name[0] != "_" for n in (0, 1, 2, 3, 4, 8)]

    def copies(self) -> None:
        self.plans or self.plan()
        self.keeps or self.keep()
        for made in (self.streams, *(p.plan for p in self.plans[:1]), *(k[0] for k in self.keeps[:1])):
            self.called[f"{type(made).__name__}.__reduce__"] += 1
            for form in (copy.copy, copy.deepcopy, *(lambda o, n=n: pickle.dumps(o, n) for n in range(6))):
                self.fails(form, made)

    # -- Plan

    def plan(self) -> None:
        megatron, shuffle = self.random.random() < 0.4, self.random.random() < 0.5
        sources = self.random.choice([0, 1, 2, 3, 5, 14, 20, 70])
        keys = self.array.integers(0, 2**63, sources).astype(np.uint64)
        given = self.spoil(megatron), self.spoil(shuffle), self.spoil(keys)
        made = self.call("Plan.__init__", self.module.Plan, *given)
        right = all(a is b for a, b in zip(given, (megatron, shuffle, keys), strict=True))
        assert made is not None or not right
        if right:
            self.plans = [*self.plans[-5:], Known(made, megatron, shuffle, sources)]
            self.add_phase()

    def some_plan(self) -> Known:
        while not self.plans:
            self.plan()
        return self.random.choice(self.plans)

    def add_phase(self, mask: Any = None) -> None:
        known = self.plans[-1] if self.plans else self.some_plan()
        n = known.sources
        start = known.phases[-1]["start"] + self.random.randrange(1, 400) if known.phases else 0
        weights = self.array.integers(0, 9, n).astype(np.uint64) ** self.random.choice([1, 1, 9])
        exact = weights / max(1.0, float(weights.sum()) * self.random.choice([1, 1, 0.5]))
        windows = self.array.integers(1, 50, n).astype(np.uint64)
        kept: list[set[int] | None] = [None] * n
        keep: list[Any] = [None] * n
        for k in range(n):
            if self.keeps and self.random.random() < 0.3:
                keep[k], kept[k], _ = self.random.choice(self.keeps)
                windows[k] = len(kept[k] or ())
                weights[k] *= int(windows[k] > 0)
                exact[k] *= windows[k] > 0
        drawn = [known.plan.count(k, 0) for k in range(n)]
        with contextlib.suppress(IndexError):
            drawn = known.plan.counts(start).tolist()
        most = self.array.integers(1, 2000, n).astype(np.uint64)
        limit = np.where(self.array.random(n) < 0.3, most, np.uint64(NEVER)).astype(np.uint64)
        first_draw = np.array([self.random.randint(0, d) for d in drawn], np.uint64)
        first_epoch = self.array.integers(0, 5, n).astype(np.uint64)
        if mask is not None and n:
            keep[0] = mask
        arguments = [start, weights, exact, windows, limit, first_draw, first_epoch, keep]
        given = [self.spoil(value, 0.03) for value in arguments]
        if self.random.random() < 0.1 and n:
            given[3] = windows + np.uint64(10)  # More windows than the masks keep.
        before = known.plan.bytes
        drew = self.call("Plan.add_phase", lambda *a: (known.plan.add_phase(*a), True)[1], *given)
        if drew is None:
            # Nothing of a phase that was refused stays, but segments that a question opened may.
            assert known.plan.bytes >= before
            return
        assert mask is None
        as_given = [np.array(value).tolist() for value in given[1:7]]
        known.phases.append(
            dict(start=int(given[0]), weights=as_given[1] if known.megatron else as_given[0])
            | dict(windows=as_given[2], first_draw=as_given[4], first_epoch=as_given[5], kept=kept)
        )
        phase = known.phases[-1]
        for k, (weight, w) in enumerate(zip(phase["weights"], phase["windows"], strict=True)):
            in_mask = kept[k]
            assert 0 <= weight < 2**64 and w < MAX and phase["first_draw"][k] <= drawn[k]
            assert in_mask is None or w <= len(in_mask)

    def locate(self) -> None:
        known = self.some_plan()
        i = self.number()
        given = self.spoil(i)
        got = self.call("Plan.locate", known.plan.locate, given)
        if got is not None:
            k, e, w = got
            if e < 2**31:
                known.check(np.int32([k]), np.int32([e]), np.int64([w]), np.int64([int(given)]))

    def locate_range(self) -> None:
        known = self.some_plan()
        given = self.spoil(self.number()), self.spoil(self.random.choice([0, 1, 63, 64, 65, 300]))
        got = self.call("Plan.locate_range", known.plan.locate_range, *given)
        if got is not None:
            known.check(*got, np.arange(int(given[0]), int(given[0]) + int(given[1])))

    def locate_many(self) -> None:
        known = self.some_plan()
        samples = self.array.integers(0, 3000, self.random.choice([0, 1, 64, 100]))
        given = self.spoil(samples, 0.3)
        got = self.call("Plan.locate_many", known.plan.locate_many, given)
        if got is not None:
            known.check(*got, np.asarray(given).astype(np.int64))

    def counts(self) -> None:
        known = self.some_plan()
        given = self.spoil(self.number())
        got = self.call("Plan.counts", known.plan.counts, given)
        if got is not None:
            assert got.dtype == np.uint64 and len(got) == known.sources
            assert int(got.sum()) == (int(given) if known.phases else 0)

    def count(self) -> None:
        known = self.some_plan()
        given = self.spoil(self.random.randrange(-1, known.sources + 2)), self.spoil(self.number())
        got = self.call("Plan.count", known.plan.count, *given)
        if got is not None:
            assert 0 <= int(given[0]) < known.sources and 0 <= got <= int(given[1])
            if int(given[1]) < 3000:
                assert got == known.plan.counts(given[1])[int(given[0])]

    def position(self) -> None:
        known = self.some_plan()
        given = self.spoil(self.random.randrange(-1, known.sources + 2)), self.spoil(self.number())
        got = self.call("Plan.position", known.plan.position, *given)
        if got is not None:
            assert 0 <= int(given[0]) < known.sources and got >= -1
            if 0 <= got < 3000:
                assert known.plan.locate(got)[0] == given[0]
                assert known.plan.count(given[0], got) == given[1]

    def bounds(self) -> None:
        known = self.some_plan()
        got = self.call("Plan.bounds", known.plan.bounds)
        assert got.shape == (known.sources,) and (got >= 0).all()

    def segment_starts(self) -> None:
        known = self.some_plan()
        got = self.call("Plan.segment_starts", known.plan.segment_starts)
        assert got == sorted(got) and set(p["start"] for p in known.phases[-1:]) <= set(got)

    def plan_bytes(self) -> None:
        known = self.some_plan()
        assert self.call("Plan.bytes", lambda: known.plan.bytes) >= 8 * known.sources

    def megatron_order(self) -> None:
        weights = self.array.integers(0, 6, self.random.choice([1, 2, 14, 30])).astype(np.float64)
        if self.random.random() < 0.7:
            weights /= max(1.0, weights.sum())
        samples = self.random.choice([0, 1, 70, 400])
        given = self.spoil(weights, 0.2), self.spoil(samples)
        got = self.call("megatron_order", self.module.megatron_order, *given)
        if got is not None and int(given[1]) <= 400:
            pick, number = greedy(np.asarray(given[0], np.float64).tolist(), int(given[1]))
            assert got[0].tolist() == pick and got[1].tolist() == number

    def draw(self) -> None:
        rows, size = self.random.choice([0, 1, 3]), self.random.choice([1, 2, 127, 300])
        draws = self.random.choice([1, 2, 50])
        logits = self.array.normal(0, 3, rows * size).astype(np.float32)
        if self.random.random() < 0.3:
            logits = logits.view(np.uint32) >> 16
            logits = logits.astype(np.uint16)
        uniform = self.array.random(rows)
        arguments = logits, size, self.random.choice([1.0, 0.5, 3.0]), uniform, draws
        given = [self.spoil(value) for value in arguments]
        got = self.call("draw", self.module.draw, *given)
        if any(a is not b for a, b in zip(given, arguments, strict=True)):
            return
        ids, entropies = got
        assert ids.shape == (rows, draws) and ids.dtype == np.int32 and entropies.dtype == np.float32
        if logits.dtype == np.uint16:
            logits = (logits.astype(np.uint32) << 16).view(np.float32)
        for n, row in enumerate(logits.reshape(rows, size).astype(np.float64) * arguments[2]):
            share = np.exp(row - row.max())
            share /= share.sum()
            end, point = np.append(0, share.cumsum()), (uniform[n] + np.arange(draws)) / draws
            assert (end[ids[n]] - 1e-6 < point).all() and (point < end[ids[n] + 1] + 1e-6).all()
            assert abs(entropies[n] + (share * np.log(np.maximum(share, 1e-300))).sum()) < 1e-4

    # -- Streams

    def make_files(self) -> None:
        folder = self.folder
        for name, dtype in (("a", np.uint16), ("b", np.int32)):
            tokens = self.array.integers(0, 60000, 20_000).astype(dtype)
            tokens[:: self.random.randrange(3, 200)] = 0
            tokens.tofile(folder / name)
            self.tokens.append(tokens)
            self.streams.add(str(folder / name), tokens.itemsize, len(tokens))
        with open(folder / "sparse", "wb") as file:
            file.truncate(2**39)
        self.streams.add(folder / "sparse", 2, 2**38)
        np.arange(3000, dtype=np.uint16).tofile(folder / "cut")
        self.streams.add(folder / "cut", 2, 3000)
        os.truncate(folder / "cut", 1001)
        os.mkfifo(folder / "pipe")
        (folder / "loop").symlink_to("loop")

    def new_streams(self) -> None:
        made = self.call("Streams.__init__", self.module.Streams)
        assert self.call("Streams.__init__", self.module.Streams, 3) is None
        self.fails(made.gather, np.zeros(1, np.int32), np.zeros(1, np.int64), 8, None)

    def add(self) -> None:
        names = [*"ab", "sparse", "pipe", "loop", "none", "a/b", "", ".", "a\0b", "x" * 5000, "\udcff", "é"]
        path: Any = self.random.choice(
            [str(self.folder / n) for n in names] + ["/dev/zero", "/proc/self/mem"]
        )
        path = self.random.choice([path, path, Path(path), os.fsencode(path)])
        streams = self.module.Streams()
        given = self.spoil(path), self.spoil(self.random.choice([2, 4, 3])), self.spoil(self.number(11_000))
        made = self.call("Streams.add", lambda *a: (streams.add(*a), True)[1], *given)
        if made is not None:
            assert os.stat(given[0]).st_size >= int(given[1]) * int(given[2]) and int(given[1]) in (2, 4)

    def some_windows(self) -> tuple[list[Any], bool]:
        """source, window, length, as arguments; and whether an oracle holds for them."""
        length = self.random.choice([1, 7, 64, 100, 4095, 4096, 4097, 9000])
        n = self.random.choice([0, 1, 3, 16])
        source = self.array.integers(0, 2, n).astype(np.int32)
        window = self.array.integers(0, 19_999 // length, n)
        right = [source, window, length]
        given = [self.spoil(value, 0.1) for value in right]
        if self.random.random() < 0.1:
            # Sparse, cut short; and rows x tokens x bytes that is 0 in 64 bits.
            rows, given[2] = self.random.choice([(3, 2000), (1 << 21, 1 << 37), (2, 1 << 36), (1, 1 << 39)])
            given[:2] = np.full(rows, self.random.choice([2, 3]), np.int32), np.zeros(rows, np.int64)
        return given, all(a is b for a, b in zip(given, right, strict=True))

    def rows(self, given: list[Any]) -> np.ndarray:
        """int64 [rows, length + 1], by NumPy."""
        source, window, length = given
        spans = [
            self.tokens[k][w * length : w * length + length + 1] for k, w in zip(source, window, strict=True)
        ]
        return np.array(spans, np.int64).reshape(len(source), length + 1)

    def gather(self) -> None:
        given, right = self.some_windows()
        eod = self.random.choice([None, 0, 0, -1, 65536, 2**31, 2**63 - 1, 2**80])
        got = self.call(
            "Streams.gather", self.streams.gather, *given, self.spoil(eod, 0.1) if not right else eod
        )
        if not right:
            return
        rows = self.rows(given)
        tokens, labels, mask, position, segment = got
        np.testing.assert_array_equal(tokens, rows[:, :-1])
        np.testing.assert_array_equal(labels, rows[:, 1:])
        assert (mask == 1).all() and (segment is None) == (eod is None)
        want_segment, want_position = np.zeros_like(tokens), np.zeros_like(tokens)
        for s in range(1, tokens.shape[1]):
            ends = (
                (tokens[:, s - 1] == eod) if eod is not None and eod < 2**63 else np.zeros(len(tokens), bool)
            )
            want_segment[:, s] = want_segment[:, s - 1] + ends
            want_position[:, s] = np.where(ends, 0, want_position[:, s - 1] + 1)
        np.testing.assert_array_equal(position, want_position)
        if segment is not None:
            np.testing.assert_array_equal(segment, want_segment)

    def whole_windows(self) -> None:
        given, right = self.some_windows()
        got = self.call("Streams.whole_windows", self.streams.whole_windows, *given)
        if right:
            np.testing.assert_array_equal(got, self.rows(given))

    def will_need(self) -> None:
        given, right = self.some_windows()
        answer = self.call("Streams.will_need", lambda *a: (self.streams.will_need(*a), True)[1], *given)
        assert answer or not right

    def threads(self) -> None:
        """One plan and one Streams in three threads, while a fourth changes the arrays and adds streams."""
        self.called["Streams"] += 1
        streams, path, stop = self.module.Streams(), str(self.folder / "a"), threading.Event()
        streams.add(path, 2, 20_000)
        known = self.some_plan()
        source, window, sample = np.zeros(300, np.int32), np.zeros(300, np.int64), np.arange(300)
        wrong: list[BaseException] = []

        def ask(question: Callable[[], Any]) -> None:
            while not stop.is_set():
                try:
                    question()
                except EXPECTED:
                    pass
                except BaseException as error:
                    wrong.append(error)
                    return

        questions = [
            lambda: streams.gather(source, window, 60, 0),
            lambda: known.plan.locate_many(sample),
            lambda: (known.plan.counts(2000), known.plan.bytes, known.plan.segment_starts()),
        ]
        threads = [threading.Thread(target=ask, args=(question,)) for question in questions]
        for thread in threads:
            thread.start()
        for turn in range(60):
            source[turn::7] = self.random.choice([0, 0, 2**30, -1])
            sample[:] = self.array.integers(-1 if turn % 9 == 0 else 0, 2000, 300)
            streams.add(path, 2, 20_000)
        stop.set()
        for thread in threads:
            thread.join()
        assert not wrong, wrong


def main() -> None:
    calls, seed = int(sys.argv[1]), int(sys.argv[2])
    sanitized = len(sys.argv) > 3
    module = load(sys.argv[3] if sanitized else None)
    if not sanitized:  # The sanitizers map terabytes.
        resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))

    def end(*_: Any) -> None:
        raise Ended

    signal.signal(signal.SIGALRM, end)
    with tempfile.TemporaryDirectory() as folder:
        fuzz = Fuzz(module, seed, Path(folder))
        # Everything once, then what has arguments more often.
        first = sorted(fuzz.table)
        plain = [name for name in first if not name.endswith("__reduce__")]
        asked = [name for name in plain if "." in name or name.islower()]
        names = first + asked * 7
        while sum(fuzz.called.values()) < calls or first:
            fuzz.table[first.pop(0) if first else fuzz.random.choice(names)]()
    print(json.dumps({"called": fuzz.called, "raised": fuzz.raised}))


if __name__ == "__main__":
    main()
