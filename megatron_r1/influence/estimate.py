"""How long scoring will take: floating point operations over the rate that is assumed. No torch."""

from __future__ import annotations

from megatron_r1.config import Config
from megatron_r1.config_io import ConfigError
from megatron_r1.influence.plan import lay_plan

PASS = 1.15
"""Cost of exact scores of three capabilities, of a training pass (docs/influence.md)."""


def estimate(config: Config, devices: int, peak_tflops: float, utilisation: float) -> str:
    """The arithmetic in one line. Where datasets or checkpoints are not there yet, what is asked for counts
    in full: every source has all its examples, and a probing set without `influence.probe_examples` is all of
    the representative sets together.

    `peak_tflops`: of one device; `utilisation`: the share of it that the model's own operations get. Raises
    ValueError where these are not positive, or neither steps nor checkpoints say how many checkpoints.
    """
    influence = config.influence
    if influence is None:
        raise ConfigError(["influence: missing section; add a file that has it (see examples/influence)"])
    if not (peak_tflops > 0 and utilisation > 0 and devices > 0):
        raise ValueError(f"peak {peak_tflops} and utilisation {utilisation} must be positive")
    try:
        work = lay_plan(config)
        rows, probes, checkpoints, most = work.rows(), work.probe_windows(), len(work.steps), ""
    except ConfigError:
        rows = len(config.data.sources) * influence.examples
        probes = len(influence.directions) * (influence.probe_examples or rows)
        checkpoints, most = len(set(influence.steps)), "at most "
    if checkpoints == 0:
        raise ValueError(f"influence.steps is empty, and {config.train.run} has no checkpoints; give steps")
    seq_length = config.data.seq_length
    per_token = config.model.flops_per_token(seq_length)
    # A direction takes an ordinary forward and backward pass over its probing set.
    tokens = [n * checkpoints * seq_length for n in (rows, probes)]
    hours = per_token * (PASS * tokens[0] + tokens[1]) / (1e12 * peak_tflops * utilisation) / 3600
    without = "" if influence.method == "wgrad-dot" else f"; {PASS} is of wgrad-dot"
    if influence.curvature in ("datainf", "kfac", "ekfac"):
        without += "; without the passes of curvature"
    return (
        f"{rows:,} examples x {checkpoints} checkpoints, {most}{hours / devices:.3g} h on {devices} devices: "
        f"({PASS} x {tokens[0]:.3g} tokens scored + {tokens[1]:.3g} for directions) x {per_token:.3g} "
        f"operations / ({peak_tflops:g} TFLOP/s x {utilisation:g}) = {most}{hours:.3g} device-hours{without}"
    )
