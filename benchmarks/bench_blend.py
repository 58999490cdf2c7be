"""The blend against megatron-core's build_blending_indices, and what it costs to ask it.

python benchmarks/bench_blend.py [--repeats 7] [--samples 100_000_000]

Times are processor time of this process (nothing here has a second thread), so that other work on the
machine counts for neither side; ratios are medians over turns in which both sides run one after the other.
The peer's arrays are its plan: ours is ready when sample 0 and the last one can be located. Targets are
printed with their figures.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
import time
from collections.abc import Callable
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np

from megatron_r1 import _csrc
from megatron_r1.data.blend import BlendPlan, Order

# Pre-training phase 2 of the recipe, percent.
FOURTEEN = [0.52, 23.33, 54.83, 0.14, 1.32, 0.86, 1.26, 0.03, 0.72, 3.01, 2.7, 3.18, 8.01, 0.08]

# Targets: how many times faster than megatron-core, by the number of sources; ns a sample.
PLAN_READY = 10_000
STATE_BYTES = 64 << 10
EXACT_ORDER = {14: 4, 1024: 20}
LOOKUP_NS = 60


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--samples", type=int, default=100_000_000, help="of the plan that is made ready")
    options = parser.parse_args()
    build = megatron_build()
    plan_ready(build, options.samples, options.repeats)
    for sources, samples in zip(EXACT_ORDER, (1 << 22, 1 << 18), strict=True):
        exact_order(build, sources, samples, options.repeats)
    lookups(options.samples, options.repeats)
    shares(10_000_000)


def plan_ready(build: Callable[[np.ndarray, int], object], samples: int, repeats: int) -> None:
    weights = weights_of(14)
    theirs = seconds(lambda: build(weights, samples))

    def ours() -> BlendPlan:
        plan = made(weights)
        plan.locate(0)
        plan.locate(samples - 1)
        return plan

    ours()
    mine = statistics.median(seconds(ours) for _ in range(repeats * 10))
    print(
        f"plan of {samples:.0e} samples x 14    ours {mine * 1e6:8.0f} us, {ours().state_bytes()} bytes   "
        f"megatron-core {theirs:7.2f} s, {samples * 10:.0e} bytes   ratio {theirs / mine:.0f} "
        f"(target >= {PLAN_READY}: {verdict(theirs / mine >= PLAN_READY)}; "
        f"state <= {STATE_BYTES} bytes: {verdict(ours().state_bytes() <= STATE_BYTES)})"
    )


def exact_order(build: Callable[[np.ndarray, int], object], sources: int, samples: int, repeats: int) -> None:
    """The same arrays (source, number within the source), bit for bit; and the counts alone, for a resume."""
    weights = weights_of(sources)
    turns = []
    for _ in range(repeats):
        theirs = seconds(lambda: build(weights, samples))
        arrays = seconds(lambda: _csrc.megatron_order(weights, samples))
        plan = made(weights, "megatron")
        counts = seconds(lambda plan=plan: plan.count("s0", samples))
        turns.append((theirs, arrays, counts))
    for mine, want in zip(_csrc.megatron_order(weights, samples), build(weights, samples), strict=True):
        np.testing.assert_array_equal(mine, want)
    theirs, arrays, counts = (statistics.median(turn[n] for turn in turns) / samples * 1e9 for n in range(3))
    as_arrays = statistics.median(turn[0] / turn[1] for turn in turns)
    as_counts = statistics.median(turn[0] / turn[2] for turn in turns)
    print(
        f"megatron's order x {sources:<4d}        ours {arrays:8.1f} ns, {counts:.1f} ns counts alone   "
        f"megatron-core {theirs:.1f} ns a sample   ratio {as_arrays:.1f} "
        f"(target >= {EXACT_ORDER[sources]}: {verdict(as_arrays >= EXACT_ORDER[sources])}), {as_counts:.1f}"
    )


def lookups(samples: int, repeats: int) -> None:
    plan = made(weights_of(14))
    random = np.random.default_rng(0).integers(0, samples, 10**6)
    many = [seconds(lambda: plan.locate_many(random)) for _ in range(repeats)]
    after = [seconds(lambda: plan.locate_range(samples // 2, 10**6)) for _ in range(repeats)]
    one = [seconds(lambda: [plan.locate(i) for i in range(10_000)]) * 100 for _ in range(repeats)]
    at_random = statistics.median(many) * 1e3
    print(
        f"a lookup x 14                ours at random {at_random:.1f} ns "
        f"(target <= {LOOKUP_NS}: {verdict(at_random <= LOOKUP_NS)}), "
        f"in sequence {statistics.median(after) * 1e3:.1f} ns, "
        f"one by one {statistics.median(one) * 1e3:.0f} ns"
    )


def shares(samples: int) -> None:
    """The largest distance of a source's draws from its share, over all prefixes."""
    for order in ("balanced", "megatron"):
        weights = weights_of(14)
        plan = made(weights, order)
        drawn, worst = np.zeros(14, np.int64), 0.0
        for low in range(0, samples, 1_000_000):
            source_N = plan.locate_range(low, 1_000_000)[0]
            index = np.arange(low + 1, low + 1_000_001)
            for k, weight in enumerate(weights):
                draws = drawn[k] + np.cumsum(source_N == k)
                worst = max(worst, np.abs(draws - weight * index).max())
                drawn[k] = draws[-1]
        assert worst <= plan.deviation_bound()
        bound = plan.deviation_bound()
        print(f"deviation over {samples:.0e}     {order:9s} {worst:.3f} samples, bound {bound:.3f}")


def weights_of(sources: int) -> np.ndarray:
    values = FOURTEEN if sources == 14 else np.random.default_rng(sources).pareto(1.0, sources) + 1e-4
    return np.array(values) / np.sum(values)


def made(weights: np.ndarray, order: Order = "balanced", shuffle: bool = True) -> BlendPlan:
    windows = 10**7 if shuffle else 10**12
    plan = BlendPlan({f"s{k}": windows + k for k in range(len(weights))}, order=order, shuffle=shuffle)
    plan.add_phase(0, weights)
    return plan


def megatron_build() -> Callable[[np.ndarray, int], tuple[np.ndarray, np.ndarray]]:
    spec = importlib.util.find_spec("megatron")
    assert spec is not None and spec.submodule_search_locations is not None
    folders = [Path(folder) / "core/datasets" for folder in spec.submodule_search_locations]
    library = next(path for folder in folders for path in folder.glob("helpers_cpp*.so"))
    loader = ExtensionFileLoader("helpers_cpp", str(library))
    module_spec = importlib.util.spec_from_loader("helpers_cpp", loader)
    assert module_spec is not None
    module: ModuleType = importlib.util.module_from_spec(module_spec)
    loader.exec_module(module)

    def build(weights: np.ndarray, samples: int) -> tuple[np.ndarray, np.ndarray]:
        source, draw = np.zeros(samples, np.int16), np.zeros(samples, np.int64)
        module.build_blending_indices(source, draw, weights, len(weights), samples, False)
        return source, draw

    return build


def verdict(met: bool) -> str:
    return "met" if met else "MISSED"


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


if __name__ == "__main__":
    main()
