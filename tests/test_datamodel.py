"""The one statistic of benchmarks/datamodel.py that is its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy.stats import spearmanr

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "datamodel.py"


def load():
    spec = importlib.util.spec_from_file_location("datamodel", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["datamodel"] = module
    spec.loader.exec_module(module)
    return module


datamodel = load()


def test_ceiling_is_what_the_truth_itself_reaches():
    generator = np.random.default_rng(0)
    truth_N = generator.normal(size=20_000)
    seeds_SN = truth_N + 0.7 * generator.normal(size=(3, 20_000))
    expected = spearmanr(truth_N, seeds_SN.mean(0)).statistic
    assert datamodel.ceiling(seeds_SN[:, None]) == pytest.approx([expected, expected], abs=0.01)
