"""Distillation: how far the student is from its teacher, over the steps whose objective had one."""

from __future__ import annotations

from megatron_r1.report import plots
from megatron_r1.report.load import Reading


def panels(reading: Reading) -> plots.Panels:
    """KL of both arms; their cross-entropy beside the teacher's entropy; their agreement with the teacher.

    Rows as of `plots.curves`. Nothing where no step had a teacher. The axes begin where the first one had.
    """
    entropies = [run.points("kd/teacher_entropy") for run in reading.arms.values()]
    measured = [points for points in entropies if len(points[0])]
    if not measured:
        return []
    since = min(float(at[0]) for at, _ in measured)
    drawn = [*plots.arms(reading, "kd/ce"), plots.Curve("teacher's entropy", measured[0], "var(--muted)")]
    span = plots.late_span(reading.run, [curve.points for curve in drawn])
    return [
        *plots.over_steps(reading, "kd/kl", "KL(teacher || student)", since=since),
        plots.curves(reading.run, drawn, "cross-entropy", span=span, since=since, smoothed=True),
        *plots.over_steps(reading, "kd/agreement", "agreement", "share of labels", since=since),
    ]
