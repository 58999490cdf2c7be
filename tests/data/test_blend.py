"""The blend against an oracle, against megatron-core, and at its limits."""

import hashlib
import importlib.util
import json
import math
import re
import sys
from fractions import Fraction
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_r1 import _csrc
from megatron_r1.data.blend import BlendPlan
from megatron_r1.data.plan_file import check_extends, fingerprint, from_json, to_json
from tests.oracles import blend_oracle

# Pre-training phase 2 of the recipe, percent.
TABLE5 = [0.52, 23.33, 54.83, 0.14, 1.32, 0.86, 1.26, 0.03, 0.72, 3.01, 2.7, 3.18, 8.01, 0.08]
QUICK = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def sources(count: int, windows: int = 1000) -> dict[str, int]:
    return {f"s{k}": windows + 7 * k for k in range(count)}


def normalised(weights: list[float]) -> list[float]:
    return [float(w) for w in np.array(weights) / np.sum(weights)]


# -- any plan


@st.composite
def rules(draw: st.DrawFn) -> tuple[dict[str, int], list[blend_oracle.Rules]]:
    """Up to five sources and four phases with caps and masks; every weighted source keeps a window."""
    windows = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    gaps = draw(st.lists(st.integers(1, 70), min_size=draw(st.integers(0, 3)), max_size=3))
    starts = [sum(gaps[:n]) for n in range(len(gaps) + 1)]
    phases = []
    for start in starts:
        weights = draw(st.lists(st.integers(0, 9), min_size=len(windows), max_size=len(windows)))
        weights[draw(st.integers(0, len(windows) - 1))] += 1
        cap = st.sampled_from([None, None, None, None, *map(Fraction, ("0.3", "1", "2", "2.5", "7", "12"))])
        caps = [draw(cap) for _ in windows]
        kept = []
        for n in windows:
            mask = draw(st.none() | st.sets(st.integers(0, n - 1), min_size=1))
            kept.append(frozenset(range(n) if mask is None else mask))
        phases.append(blend_oracle.Rules(start, weights, caps, kept))
    return {f"s{k}": n for k, n in enumerate(windows)}, phases


def build(
    windows: dict[str, int],
    phases: list[blend_oracle.Rules],
    order: str,
    seed: int,
    masks: Path | None = None,
) -> BlendPlan:
    plan = BlendPlan(windows, seed=seed, order=order)  # type: ignore[arg-type]
    for number, phase in enumerate(phases):
        keep = {}
        for name, kept in zip(windows, phase.kept, strict=True):
            if len(kept) < windows[name] or seed % 2:
                keep[name] = np.isin(np.arange(windows[name]), sorted(kept))
                if masks:
                    np.save(masks / f"{number}-{name}.npy", keep[name])
        plan.add_phase(
            phase.start,
            [weight / 16 for weight in phase.weights],
            {name: float(cap) for name, cap in zip(windows, phase.caps, strict=True) if cap is not None},
            {name: masks / f"{number}-{name}.npy" for name in keep} if masks else keep,
        )
    return plan


# Weights that sum to 1.5, where Megatron's rule keeps the first source from drawing but a few times.
ON_THE_LEVEL = blend_oracle.Rules(0, [2, 4, 9, 9], [None] * 4, [frozenset({0})] * 4)


@QUICK
@example(({f"s{k}": 1 for k in range(4)}, [ON_THE_LEVEL]), "megatron", 0)
@given(rules(), st.sampled_from(["balanced", "megatron"]), st.integers(0, 99))
def test_any_plan_obeys_the_rules(
    made: tuple[dict[str, int], list[blend_oracle.Rules]], order: str, seed: int
) -> None:
    """No window repeated or skipped within an epoch, masks and caps to the exact sample, and the inverses."""
    windows, phases = made
    oracle = blend_oracle.Replay(phases)
    try:
        plan = build(windows, phases, order, seed)
    except ValueError as error:
        # The only refusals: a phase that starts where nothing is left to draw.
        assert re.search("draws nothing|cannot start", str(error))
        return
    names = list(windows)
    located = []
    for i in range(400):
        active = oracle.active()
        if not active:
            with pytest.raises(IndexError, match=f"past the end of the plan: at sample {i} "):
                plan.locate(i)
            break
        located.append(plan.locate(i))
        if len(active) == 1:
            assert located[-1][0] == active[0]
        oracle.take(*located[-1])
    n = len(located)
    for k, name in enumerate(names):
        assert plan.count(name, n) == len(oracle.draws[k])
        assert [plan.position(name, j) for j in range(len(oracle.draws[k]))] == oracle.draws[k]
        assert plan.epochs(n)[name] == pytest.approx(float(oracle.used[k]), abs=1e-9)
        for i in range(0, n, 37):
            assert plan.count(name, i) == sum(at < i for at in oracle.draws[k])
    for phase, unseen in zip(plan.phases, oracle.unseen, strict=False):
        assert phase.unseen == {names[k]: left for k, left in unseen.items()}
    source_N, epoch_N, window_N = plan.locate_range(0, n)
    assert list(zip(source_N, epoch_N, window_N, strict=True)) == located
    i_N = np.random.default_rng(seed).integers(0, n, 50)
    for i, *answer in zip(i_N, *plan.locate_many(i_N), strict=True):
        assert tuple(answer) == located[i]


@QUICK
@given(rules(), st.sampled_from(["balanced", "megatron"]), st.integers(1, 200))
def test_the_past_does_not_see_later_phases(
    made: tuple[dict[str, int], list[blend_oracle.Rules]], order: str, more: int
) -> None:
    windows, phases = made
    try:
        plan = build(windows, phases, order, 3)
        before = plan.locate_range(0, phases[-1].start + more)
        plan.add_phase(phases[-1].start + more, [1] * len(windows))
    except (ValueError, IndexError):
        return
    for was, now in zip(before, plan.locate_range(0, phases[-1].start + more), strict=True):
        np.testing.assert_array_equal(was, now)


@QUICK
@given(rules(), st.sampled_from(["balanced", "megatron"]), st.integers(0, 99))
def test_json_round_trip(
    tmp_path_factory: pytest.TempPathFactory,
    made: tuple[dict[str, int], list[blend_oracle.Rules]],
    order: str,
    seed: int,
) -> None:
    folder = tmp_path_factory.mktemp("masks")
    try:
        plan = build(*made, order, seed, folder)
    except ValueError:
        return
    again = from_json(to_json(plan))
    assert fingerprint(again) == fingerprint(plan)
    assert to_json(again) == to_json(plan)
    check_extends(again, plan, 10**9)
    for i in (0, 5, 50):
        try:
            assert again.locate(i) == plan.locate(i)
        except IndexError:
            break


def test_json_takes_numpy_numbers_and_infinite_caps() -> None:
    plan = BlendPlan({"a": 10, "b": 20})
    plan.add_phase(0, np.array([1, 3]), {"a": np.float64(2.5), "b": math.inf})
    plan.add_phase(np.int64(9), np.array([0.5, 0.25]), np.int64(7))
    plan.add_phase(19, [1, 1], math.inf)
    assert json.loads(to_json(plan))["phases"][0]["max_epochs"] == {"a": 2.5}
    assert fingerprint(from_json(to_json(plan))) == fingerprint(plan)


# -- the balanced order


@QUICK
@given(st.lists(st.integers(0, 2**40) | st.integers(0, 5), min_size=1, max_size=12).filter(any))
def test_balanced_order_is_the_oracles(weights: list[int]) -> None:
    plan = BlendPlan(sources(len(weights), 10**9), shuffle=False)
    plan.add_phase(0, weights)
    assert plan.locate_range(0, 300)[0].tolist() == blend_oracle.balanced_order(weights, 300)


def test_shares_hold_to_the_bound_over_a_million_samples() -> None:
    plan = BlendPlan(sources(14))
    plan.add_phase(0, TABLE5)
    source_N = plan.locate_range(0, 1_000_000)[0]
    bound = plan.deviation_bound()
    assert bound < 1.5
    for k, weight in enumerate(TABLE5):
        drawn = np.cumsum(source_N == k)
        off = np.abs(drawn - weight / sum(TABLE5) * np.arange(1, 1_000_001))
        assert off.max() <= bound


def test_bounds_add_up_over_phases() -> None:
    plan = BlendPlan(sources(3))
    bounds = []
    for start, weights in ((0, [5, 3, 2]), (1001, [1, 1, 8]), (2222, [0, 1, 1])):
        plan.add_phase(start, weights)
        bounds.append(plan.deviation_bound())
    assert bounds[0] < bounds[1] < bounds[2] < 5


def test_float_weights_are_taken_exactly_or_within_the_stated_error() -> None:
    wide = [1.0, 1e-9, 1 / 3]
    plan = BlendPlan(sources(3))
    plan.add_phase(0, wide)
    drawn = [plan.count(name, 2**40) for name in plan.sources]
    exact = [Fraction(w) / sum(map(Fraction, wide)) * 2**40 for w in wide]
    assert all(abs(n - e) <= plan.deviation_bound() for n, e in zip(drawn, exact, strict=True))
    denormal = BlendPlan(sources(2))
    denormal.add_phase(0, [1.0, 5e-324])
    assert denormal.count("s1", 2**40) <= 1


def test_indices_near_two_to_the_forty() -> None:
    plan = BlendPlan(sources(14, 10**9))
    plan.add_phase(0, TABLE5)
    low = 2**40 - 500
    source_N, epoch_N, window_N = plan.locate_range(low, 1000)
    names = list(plan.sources)
    for n in range(0, 1000, 13):
        name = names[source_N[n]]
        draw = plan.count(name, low + n)
        assert plan.position(name, draw) == low + n
        assert draw // plan.sources[name] == epoch_N[n]
        assert 0 <= window_N[n] < plan.sources[name]
    assert sum(plan.count(name, low) for name in names) == low


def test_an_epoch_beyond_int32_is_an_error_not_a_wrap() -> None:
    plan = BlendPlan({"tiny": 1})
    plan.add_phase(0, [1])
    assert plan.locate(2**40) == (0, 2**40, 0)
    with pytest.raises(OverflowError, match="int32"):
        plan.locate_range(2**40, 1)


def test_forty_thousand_sources() -> None:
    count = 40_000
    plan = BlendPlan({f"s{k}": 3 for k in range(count)})
    plan.add_phase(0, np.arange(1, count + 1), max_epochs={"s39999": 2})
    source_N, _, _ = plan.locate_range(0, 200_000)
    drawn = np.bincount(source_N, minlength=count)
    share = np.arange(1, count + 1) / (count * (count + 1) / 2)
    assert source_N.max() > 32_767
    assert np.abs(drawn[:-1] - share[:-1] * 200_000).max() < 3
    assert drawn[-1] == 6
    assert plan.position("s39998", 4) == np.flatnonzero(source_N == 39_998)[4]


@pytest.mark.parametrize("count", [1, 2, 14])
def test_state_is_kilobytes_for_any_number_of_samples(count: int) -> None:
    plan = BlendPlan(sources(count))
    plan.add_phase(0, TABLE5[:count])
    plan.locate(2**50)
    assert plan.state_bytes() < 64 * 1024


# -- Megatron's order


def megatron_helpers() -> ModuleType:
    """megatron-core's compiled helpers alone: importing the package costs seconds."""
    spec = importlib.util.find_spec("megatron")
    folders = (Path(folder) / "core" / "datasets" for folder in spec.submodule_search_locations or ())  # type: ignore[union-attr]
    found = [path for folder in folders for path in folder.glob("helpers_cpp*.so")]
    if not found:
        pytest.skip("megatron-core was installed without its compiled helpers")
    loader = ExtensionFileLoader("helpers_cpp", str(found[0]))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("helpers_cpp", loader))  # type: ignore[arg-type]
    loader.exec_module(module)
    return module


def random_weights(count: int) -> list[float]:
    return normalised(list(np.random.default_rng(count).pareto(1.0, count) + 1e-4))


@pytest.mark.parametrize(
    "weights",
    [
        [1.0],
        [0.5, 0.5],
        [0.25] * 4,
        [0.3, 0.3, 0.2, 0.1, 0.1],
        [1 / 3, 1 / 3, 1 / 3],
        [30.0, 70.0],
        [0.2, 0.1],
        [1e-7, 0.4, 0.6 - 1e-7],
        [w / 100 for w in TABLE5],
        normalised(TABLE5),
        random_weights(40),
        random_weights(257),
        random_weights(1024),
    ],
    ids=lambda weights: f"{len(weights)}-{weights[0]:.3g}",
)
def test_megatron_order_is_megatrons(weights: list[float]) -> None:
    samples = 200_000 if len(weights) < 100 else 20_000
    source = np.zeros(samples, np.int16)
    draw = np.zeros(samples, np.int64)
    megatron_helpers().build_blending_indices(source, draw, np.array(weights), len(weights), samples, False)
    plan = BlendPlan(sources(len(weights), 10**12), order="megatron", shuffle=False)
    plan.add_phase(0, weights)
    source_N, _, window_N = plan.locate_range(0, samples)
    for mine in ((source_N, window_N), _csrc.megatron_order(weights, samples)):
        np.testing.assert_array_equal(mine[0], source)
        np.testing.assert_array_equal(mine[1], draw)
    for i in (samples - 1, 0, samples // 3):
        name = f"s{source[i]}"
        assert plan.locate(i)[::2] == (source[i], draw[i])
        assert plan.position(name, draw[i]) == i
        assert plan.count(name, i) == draw[i]


@QUICK
@given(st.lists(st.floats(1e-6, 1e3) | st.sampled_from([0.5, 0.25]), min_size=1, max_size=10))
def test_megatron_order_is_the_double_arithmetic_of_the_oracle(weights: list[float]) -> None:
    plan = BlendPlan(sources(len(weights), 10**9), order="megatron")
    plan.add_phase(0, weights)
    assert plan.locate_range(0, 200)[0].tolist() == blend_oracle.megatron_order(weights, 200)


def test_megatron_order_restarts_at_a_phase_and_cursors_go_on() -> None:
    plan = BlendPlan(sources(3, 10**6), order="megatron", shuffle=False)
    first, second = [0.5, 0.3, 0.2], [0.1, 0.1, 0.8]
    plan.add_phase(0, first)
    plan.add_phase(777, second)
    source_N, _, window_N = plan.locate_range(0, 2000)
    want = blend_oracle.megatron_order(first, 777) + blend_oracle.megatron_order(second, 1223)
    assert source_N.tolist() == want
    for k in range(3):
        assert window_N[source_N == k].tolist() == list(range(want.count(k)))


def test_a_source_of_weight_zero_is_never_drawn() -> None:
    """megatron-core refuses such a source; given one, its rule would draw it on ties."""
    plan = BlendPlan(sources(3), order="megatron")
    plan.add_phase(0, [0.0, 0.5, 0.5])
    assert plan.count("s0", 10_000) == 0


def test_megatron_state_is_a_megabyte_for_1e9_samples() -> None:
    plan = BlendPlan(sources(14), order="megatron")
    plan.add_phase(0, normalised(TABLE5))
    samples = 3_000_000
    empty = plan.state_bytes()
    plan.count("s0", samples)
    assert plan.state_bytes() - empty <= 1e6 * samples / 1e9


def test_megatron_deviation_stays_within_the_bound() -> None:
    for weights in (normalised(TABLE5), random_weights(40), [0.5, 0.5]):
        plan = BlendPlan(sources(len(weights)), order="megatron")
        plan.add_phase(0, weights)
        source_N = plan.locate_range(0, 100_000)[0]
        worst = max(
            np.abs(np.cumsum(source_N == k) - w * np.arange(1, 100_001)).max() for k, w in enumerate(weights)
        )
        assert worst <= plan.deviation_bound() < 6
    plan = BlendPlan(sources(2), order="megatron")
    plan.add_phase(0, [30, 70])
    assert plan.deviation_bound() == math.inf


# -- shuffling


@pytest.mark.parametrize("lag", [1, 2, 16, 256])
def test_neighbours_are_shuffled_apart(lag: int) -> None:
    """Rank correlation of windows drawn `lag` apart is noise, in every epoch, and epochs are independent."""
    windows, epochs = 20_011, 12
    plan = BlendPlan({"a": windows})
    plan.add_phase(0, [1])
    drawn = plan.locate_range(0, windows * epochs)[2].reshape(epochs, windows)
    assert (np.sort(drawn, axis=1) == np.arange(windows)).all()
    limit = 4.5 / math.sqrt(windows)
    for epoch in range(epochs):
        a = drawn[epoch]
        assert abs(np.corrcoef(a[:-lag], a[lag:])[0, 1]) < limit
        assert abs(np.corrcoef(np.diff(a)[:-lag] > 0, np.diff(a)[lag:] > 0)[0, 1]) < limit or lag == 1
        assert abs(np.corrcoef(a, drawn[epoch - 1])[0, 1]) < limit
        # The gap to the neighbour is spread as that of independent draws: mean n / 3.
        assert abs(np.abs(a[lag:] - a[:-lag]).mean() / windows - 1 / 3) < limit


def test_the_key_is_the_name_so_leaving_a_source_out_reorders_no_other() -> None:
    whole, less = BlendPlan({"a": 500, "b": 500, "c": 500}), BlendPlan({"a": 500, "c": 500})
    whole.add_phase(0, [1, 1, 1])
    less.add_phase(0, [1, 1])
    for name in ("a", "c"):
        one = [whole.locate(whole.position(name, j))[1:] for j in range(700)]
        two = [less.locate(less.position(name, j))[1:] for j in range(700)]
        assert one == two
    other = BlendPlan({"a": 500, "b": 500, "c": 500}, seed=1)
    other.add_phase(0, [1, 1, 1])
    assert (other.locate_range(0, 500)[2] != whole.locate_range(0, 500)[2]).mean() > 0.9


def test_without_shuffle_windows_come_in_stored_order() -> None:
    plan = BlendPlan({"a": 5, "b": 4}, shuffle=False)
    plan.add_phase(0, [1, 0])
    assert plan.locate_range(0, 12)[2].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0, 1]


# -- caps and masks, by example


def test_the_end_of_a_capped_plan() -> None:
    plan = BlendPlan({"a": 10, "b": 20})
    plan.add_phase(0, {"a": 1, "b": 1}, max_epochs={"a": 1.5, "b": 2})
    assert plan.epochs(55) == {"a": 1.5, "b": 2.0}
    with pytest.raises(IndexError, match=r"sample 55 is past the end .* at sample 55 .* max_epochs"):
        plan.locate(55)
    with pytest.raises(IndexError):
        plan.locate_range(50, 6)
    with pytest.raises(IndexError, match="draw 15 of 'a'"):
        plan.position("a", 15)
    with pytest.raises(ValueError, match=r"cannot start at sample 60: .*past the end .* sample 55"):
        plan.add_phase(60, [1, 1])
    with pytest.raises(ValueError, match="draws nothing"):
        plan.add_phase(55, [1, 1], max_epochs=1.5)
    plan.add_phase(55, [1, 1], max_epochs=3)
    assert plan.locate(55 + 15 + 20 - 1)[1] == 2
    with pytest.raises(IndexError):
        plan.locate(55 + 15 + 20)


def test_a_packed_mask_is_the_same_mask() -> None:
    kept = np.arange(77) % 3 > 0
    one, two = BlendPlan({"a": 77}), BlendPlan({"a": 77})
    one.add_phase(0, [1], keep={"a": kept})
    two.add_phase(0, [1], keep={"a": np.packbits(kept, bitorder="little")})
    assert fingerprint(one) == fingerprint(two)
    assert set(one.locate_range(0, int(kept.sum()))[2]) == set(np.flatnonzero(kept))


def test_an_unchanged_mask_does_not_close_the_epoch() -> None:
    kept = np.arange(50) < 40
    plan = BlendPlan({"a": 50})
    plan.add_phase(0, [1], keep={"a": kept})
    plan.add_phase(13, [2], keep={"a": kept.copy()})
    assert plan.phases[1].unseen == {}
    assert sorted(plan.locate_range(0, 40)[2]) == list(range(40))


# -- mistakes, each with its way out


def test_mistakes_say_what_which_and_the_way_out(tmp_path: Path) -> None:
    def fails(message: str, *arguments: object, **keywords: object) -> None:
        plan = BlendPlan({"web": 100, "code": 50})
        plan.add_phase(0, [1, 1])
        before = fingerprint(plan)
        with pytest.raises(ValueError, match=message):
            plan.add_phase(*arguments, **keywords)  # type: ignore[arg-type]
        assert fingerprint(plan) == before and plan.locate_range(0, 500)

    fails("name 'wbe', but the sources are 'web', 'code'; 'wbe' is near 'web'", 9, {"wbe": 1, "code": 1})
    fails("lack the sources 'code'.*weight 0", 9, {"web": 1})
    fails("3 weights for the 2 sources", 9, [1, 2, 3])
    fails("weight of 'code' is -1", 9, [1, -1])
    fails("weight of 'code' is nan", 9, [1, math.nan])
    fails("all weights are 0", 9, [0, 0])
    fails("append-only.*starts at sample 0.*got 0", 0, [1, 1])
    fails("start_sample=1.5", 1.5, [1, 1])
    fails("max_epochs of 'web' is 0", 9, [1, 1], max_epochs=0)
    fails("max_epochs name 'cod'.*near 'code'", 9, [1, 1], max_epochs={"cod": 1})
    fails("keep name 'x'", 9, [1, 1], keep={"x": np.ones(3, bool)})
    fails(
        r"keep mask of 'web' is bool \[3\]; the source has 100 windows",
        9,
        [1, 1],
        keep={"web": np.ones(3, bool)},
    )
    fails(
        "'web' has weight 1 but its keep mask keeps no window", 9, [1, 1], keep={"web": np.zeros(100, bool)}
    )
    with pytest.raises(ValueError, match=r'order=.*"balanced" or "megatron"'):
        BlendPlan({"a": 1}, order="greedy")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one source"):
        BlendPlan({})
    with pytest.raises(ValueError, match="'a' has -1 windows"):
        BlendPlan({"a": -1})
    with pytest.raises(ValueError, match="'a' has weight 1 but it has no window"):
        BlendPlan({"a": 0}).add_phase(0, [1])
    with pytest.raises(ValueError, match="first phase must start at sample 0"):
        BlendPlan({"a": 1}).add_phase(5, [1])
    with pytest.raises(IndexError, match="add_phase"):
        BlendPlan({"a": 1}).locate(0)
    plan = BlendPlan({"web": 100, "code": 50})
    plan.add_phase(0, [1, 1], keep={"web": np.arange(100) > 3})
    with pytest.raises(ValueError, match=r"keep mask of 'web' was given as an array; np.save"):
        to_json(plan)
    with pytest.raises(IndexError, match="count from 0"):
        plan.locate(-1)
    with pytest.raises(ValueError, match="near 'code'"):
        plan.count("cods", 3)
    with pytest.raises(ValueError, match="integers"):
        plan.locate_many(np.array([0.5]))


def test_a_changed_mask_file_or_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "web.npy"
    np.save(path, np.arange(100) > 3)
    plan = BlendPlan({"web": 100})
    plan.add_phase(0, [1], keep={"web": path})
    text = to_json(plan)
    assert fingerprint(from_json(text)) == fingerprint(plan)
    with pytest.raises(ValueError, match="text was edited"):
        from_json(text.replace('"seed": 1234', '"seed": 1235'))
    with pytest.raises(ValueError, match="version 9"):
        from_json(text.replace('"version": 1', '"version": 9'))
    with pytest.raises(ValueError, match="not a blend plan"):
        from_json("{}")
    np.save(path, np.arange(100) > 4)
    with pytest.raises(ValueError, match=r"phase 0: the keep mask of 'web', .*web.npy, changed"):
        from_json(text)


def test_a_mask_whose_name_is_of_other_content_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "mask.npy", np.arange(100) > 3)
    content = (tmp_path / "mask.npy").read_bytes()
    path = tmp_path / f"web-{hashlib.sha256(content).hexdigest()[:16]}.npy"
    path.write_bytes(content)
    BlendPlan({"web": 100}).add_phase(0, [1], keep={"web": path})
    with pytest.raises(ValueError, match="its name says that it was made for 'web'"):
        BlendPlan({"code": 100}).add_phase(0, [1], keep={"code": path})
    path.write_bytes(content[:-40] + bytes(40))
    with pytest.raises(ValueError, match=r"keep mask of 'web' \(.*damaged: its name holds another hash"):
        BlendPlan({"web": 100}).add_phase(0, [1], keep={"web": path})


def test_extends_says_what_changed() -> None:
    def plan(
        names: dict[str, int] | None = None,
        phases: tuple[tuple[int, list[float]], ...] = ((0, [1, 3]), (100, [1, 1])),
        cap: float | None = None,
        kept: int = 100,
        **keywords: object,
    ) -> BlendPlan:
        made = BlendPlan(names or {"web": 100, "code": 50}, **keywords)  # type: ignore[arg-type]
        for start, weights in phases:
            made.add_phase(start, weights, cap, {next(iter(made.sources)): np.arange(100) < kept})
        return made

    def changed(message: str, now: BlendPlan, samples: int = 150) -> None:
        with pytest.raises(ValueError, match=message):
            check_extends(now, plan(), samples)

    check_extends(plan(), plan(), 10**6)
    check_extends(plan(phases=((0, [0.25, 0.75]), (100, [7, 7]))), plan(), 10**6)
    check_extends(plan(phases=((0, [1, 3]), (100, [1, 1]), (150, [9, 1]))), plan(), 150)
    check_extends(plan(phases=((0, [1, 3]), (90, [9, 1]))), plan(), 90)
    check_extends(plan(phases=((0, [1, 3]),)), plan(), 100)
    changed("phase 1 weights web 1 -> 2.*new phase at sample 150", plan(phases=((0, [1, 3]), (100, [2, 1]))))
    changed("phase 1 start 100 -> 90", plan(phases=((0, [1, 3]), (90, [1, 1]))))
    changed("phase 1 .start 100. is gone", plan(phases=((0, [1, 3]),)))
    changed(
        "phase 2 is new but starts at sample 140", plan(phases=((0, [1, 3]), (100, [1, 1]), (140, [1, 1])))
    )
    changed("phase 0 max_epochs web None -> 9, code None -> 9", plan(cap=9))
    changed("phase 0 keep masks of 'web'", plan(kept=90))
    changed("seed 1234 -> 7", plan(seed=7))
    changed("order 'balanced' -> 'megatron'", plan(order="megatron"))
    changed("shuffle True -> False", plan(shuffle=False))
    changed("source 'code' windows 50 -> 51", plan({"web": 100, "code": 51}))
    changed("source 'code' renamed to 'coda'", plan({"web": 100, "coda": 50}))
    changed("sources reordered", plan({"code": 100, "web": 50}))
    changed("source 'x' added", plan({"web": 100, "code": 50, "x": 9}, ((0, [1, 3, 1]),)))
    changed("source 'code' removed", plan({"web": 100}, ((0, [1]),)))


def test_importing_the_blend_loads_neither_torch_nor_megatron_core() -> None:
    import subprocess

    code = (
        "import sys, megatron_r1.data.blend; "
        "assert not {'torch', 'megatron.core'} & sys.modules.keys(), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_source_of_no_windows_may_stand_in_a_plan_with_weight_0() -> None:
    plan = BlendPlan({"empty": 0, "masked": 8, "full": 10})
    keep = {"masked": np.zeros(8, dtype=bool)}
    plan.add_phase(0, {"empty": 0, "masked": 0, "full": 1}, keep=keep)
    assert {plan.locate(i)[0] for i in range(25)} == {2}
    assert plan.count("empty", 25) == plan.count("masked", 25) == 0
