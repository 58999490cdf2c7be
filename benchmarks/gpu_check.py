"""The sections of gpu_correct.sh: python benchmarks/gpu_check.py SECTION (see gpu_sections.py).

Launches of tools/train.py that are compared run at the same time: nothing here is timed. Where no GPU is,
both sides run on the CPU, which shows that the script works.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from gpu_bench import (
    CAPABILITIES,
    FOLDER,
    TINY,
    Way,
    finished,
    kernels_of,
    knows_deterministic,
    launch,
    metrics,
    plain_kernels,
    run_file,
    steps_logged,
    windows,
)
from gpu_sections import ROOT, part, say, wait_for_turn
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from megatron_r1 import backend
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.data.loader import whole_batch
from megatron_r1.influence.engine import weigh
from megatron_r1.influence.gradients import Scorer, score
from megatron_r1.influence.methods import WgradDot, dot_with_directions
from megatron_r1.influence.parameters import named_parameters
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import on_device, process_groups

CPU = {"CUDA_VISIBLE_DEVICES": ""}
GPU: dict[str, str] = {}
LOSS, NORM = 2e-5, 2e-3
"""Most relative difference of a GPU's losses and gradient norms from the CPU's over 20 steps of fp32. The
first H100 had 1.3e-6 and 2.9e-4."""

# ----------------------------------------------------------------------------------------------- launches


def folder_of(name: str) -> Path:
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def compare(
    what: str, run: Path, other: Path, loss: float = LOSS, norm: float = NORM, first: int = 1
) -> None:
    """A row: the largest relative differences of losses and gradient norms from step `first` on."""
    ours, theirs = metrics(run), metrics(other)
    same_steps = [line["step"] for line in ours] == [line["step"] for line in theirs]
    pairs = [(a, b) for a, b in zip(ours, theirs, strict=False) if a["step"] >= first]
    off = {
        key: max((abs(a[key] / b[key] - 1) for a, b in pairs), default=float("inf"))
        for key in ("loss", "grad_norm")
    }
    # NaN is within no bound.
    ok = same_steps and off["loss"] <= loss and off["grad_norm"] <= norm
    bounds = "bit for bit" if loss == norm == 0 else f"{loss:.0e} and {norm:.0e}"
    say(what, ok=ok, steps=len(pairs), loss_off=off["loss"], norm_off=off["grad_norm"], bound=bounds)


def tensors(run: Path) -> dict[str, Tensor]:
    """The last checkpoint's, whole."""
    path = sorted((run / "checkpoints").glob("step_*"))[-1]
    parts = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    out: dict[str, Any] = {
        name: torch.empty(part.size, dtype=part.properties.dtype)
        for name, part in parts.items()
        if isinstance(part, TensorStorageMetadata)
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(out, checkpoint_id=path, no_dist=True)
    return out


def compare_tensors(what: str, run: Path, other: Path) -> None:
    """A row: weights and optimizer state of the last checkpoints, bit for bit."""
    ours, theirs = tensors(run), tensors(other)
    unequal = [name for name in ours if name not in theirs or not torch.equal(ours[name], theirs[name])]
    ok = not unequal and ours.keys() == theirs.keys() and len(ours) > 10
    say(what, ok=ok, tensors=len(ours), unequal=len(unequal), bound="bit for bit")


def cpu_and_gpu() -> None:
    """20 steps in fp32 on both; and each goes on from the other's checkpoint of step 10."""
    folder = folder_of("cpu-and-gpu")
    config = run_file(
        "tiny",
        folder,
        20,
        64 if TINY else 256,
        global_batch=8,
        micro_batch=4,
        precision="fp32",
        checkpoint_every=10,
        probe_every=10_000,
    )
    half = "phases.one.steps=10"
    runs = {name: folder / name for name in ("cpu", "gpu", "cpu-then-gpu", "gpu-then-cpu")}
    begun = {
        name: launch(config, run, *([half] if "then" in name else []), **(CPU if name[0] == "c" else GPU))
        for name, run in runs.items()
    }
    for name, process in begun.items():
        finished(process, runs[name])
    compare("GPU against CPU", runs["gpu"], runs["cpu"])
    crossed = {"cpu-then-gpu": GPU, "gpu-then-cpu": CPU}
    begun = {name: launch(config, runs[name], **where) for name, where in crossed.items()}
    for name, process in begun.items():
        with part(name):
            finished(process, runs[name])
            compare(f"{name} against CPU", runs[name], runs["cpu"], first=11)


def deterministic() -> None:
    """Two runs, and one that is stopped half-way and resumed, in bf16."""
    folder = folder_of("deterministic")
    sizes = dict(global_batch=4, micro_batch=2, precision="bf16", checkpoint_every=100, probe_every=10_000)
    config = run_file("tiny" if TINY else "140m", folder, 12, 64 if TINY else 1024, **sizes)
    layers = [] if TINY else ["model.num_layers=4"]
    known = knows_deterministic()
    switch = ["train.deterministic=true"] if known else []
    if not known:
        say("two runs", note="train.deterministic is unknown in this commit; what follows is without it")
    words = {"one": switch, "two": switch, "resumed": [*switch, "phases.one.steps=6"], "plain": []}
    runs = {name: folder / name for name in words}
    begun = {name: launch(config, runs[name], *layers, *more) for name, more in words.items()}
    for name, process in begun.items():
        finished(process, runs[name])
    finished(launch(config, runs["resumed"], *layers, *switch), runs["resumed"])
    # Without the switch only a CPU promises bits.
    bound = 0.0 if known or not backend.HAS_CUDA else 1e-2
    for name in ("two", "resumed"):
        compare(f"{name} against one", runs[name], runs["one"], bound, bound)
        if not bound:
            compare_tensors(f"{name} against one, checkpoint", runs[name], runs["one"])
    if known:
        compare("without the switch against one", runs["plain"], runs["one"], 1e-2, 1e-1)


def sigterm() -> None:
    """SIGTERM in a long run; the same command goes on; beside it a run that was never stopped."""
    folder = folder_of("sigterm")
    sizes = dict(global_batch=8, micro_batch=4, precision="fp32", checkpoint_every=10_000, probe_every=10_000)
    config = run_file("tiny", folder, 20, 64 if TINY else 256, **sizes)
    stopped, straight = folder / "stopped", folder / "straight"
    process = launch(config, stopped, "phases.one.steps=100000")
    until = time.monotonic() + 80
    while steps_logged(stopped) < 10 and process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    process.terminate()
    process.wait(timeout=60)
    log = Path(f"{stopped}.log").read_text(errors="replace")
    said = re.search(r"stops \(SIGTERM.* at step (\d+), .* wrote (\S+)", log)
    if not said:
        raise RuntimeError(f"no word of SIGTERM; the log ends with {log.strip().splitlines()[-1:]}")
    step, written = int(said[1]), Path(said[2])
    say("stops", ok=written.is_dir() and process.returncode == 0, step=step, status=process.returncode)
    last = f"phases.one.steps={step + 5}"
    begun = {run: launch(config, run, last) for run in (stopped, straight)}
    for run, process in begun.items():
        finished(process, run)
    goes_on = f"continues from {written}" in Path(f"{stopped}.log").read_text(errors="replace")
    say("goes on from that checkpoint", ok=goes_on)
    compare("stopped against never stopped", stopped, straight)


# ------------------------------------------------------------------------------- against float64

SHAPE = ModelConfig(2, 64, 96, 4, 2, 509, head_dim=16, init_std=0.1)
LARGER = ModelConfig(3, 512, 1408, 8, 2, 8_003, head_dim=64, init_std=0.05)
MODEL, PLACES = (SHAPE, 32) if TINY else (LARGER, 256)
Weights = dict[str, Tensor]


def oracle(weights: Weights, tokens_BS: Tensor, labels_BS: Tensor, model: ModelConfig = MODEL) -> Tensor:
    """Label losses [B, S] of the whole model, written out in the weights' type."""
    d, groups = model.head_dim, model.num_query_groups
    per_group = model.num_attention_heads // groups
    b, s = tokens_BS.shape
    angle_SD = torch.outer(
        torch.arange(s, dtype=torch.float64),
        model.rotary_base ** (-torch.arange(0, d, 2, dtype=torch.float64) / d),
    ).repeat(1, 2)
    future_SS = torch.ones(s, s, dtype=torch.bool).triu(1)

    def normed(x: Tensor, weight: Tensor | float, eps: float) -> Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight

    def rotated(x_BSHD: Tensor) -> Tensor:
        first, second = x_BSHD.chunk(2, -1)
        turned = torch.cat((-second, first), -1)
        return x_BSHD * angle_SD.cos()[:, None] + turned * angle_SD.sin()[:, None]

    embedding = weights["embedding.word_embeddings.weight"]
    x_BSD = embedding[tokens_BS]
    for layer in range(model.num_layers):
        w = {
            name.split(f"layers.{layer}.")[1]: v for name, v in weights.items() if f"layers.{layer}." in name
        }
        y_BSD = normed(x_BSD, w["input_layernorm.weight"], model.rms_norm_eps)
        mixed = (y_BSD @ w["self_attention.linear_qkv.weight"].T).view(b, s, groups, per_group + 2, d)
        q, k, v = mixed[..., :per_group, :].flatten(2, 3), mixed[..., -2, :], mixed[..., -1, :]
        q, k = (rotated(normed(t, 1.0, model.rms_norm_eps)) for t in (q, k))
        k, v = (t.repeat_interleave(per_group, 2) for t in (k, v))
        seen = torch.einsum("bshd,bthd->bhst", q, k) / d**0.5
        share = seen.masked_fill(future_SS, -torch.inf).softmax(-1)
        attended = torch.einsum("bhst,bthd->bshd", share, v).flatten(2)
        x_BSD = x_BSD + attended @ w["self_attention.linear_proj.weight"].T
        y_BSD = normed(x_BSD, w["pre_mlp_layernorm.weight"], model.rms_norm_eps)
        gate, up = (y_BSD @ w["mlp.linear_fc1.weight"].T).chunk(2, -1)
        x_BSD = x_BSD + (F.silu(gate) * up) @ w["mlp.linear_fc2.weight"].T
    x_BSD = normed(x_BSD, weights["decoder.final_layernorm.weight"], model.rms_norm_eps)
    return F.cross_entropy((x_BSD @ embedding.T).transpose(1, 2), labels_BS, reduction="none")


def model_in(precision: str) -> tuple[Any, Weights]:
    """The model on the device, and its weights in float64 on the CPU."""
    backend.seed_model_parallel(7)
    gpt: Any = build_model(MODEL, ParallelConfig(), precision, PLACES, plain_layers=True)
    gpt = gpt.bfloat16() if precision == "bf16" else gpt
    weights = {name: p.detach().cpu().double() for name, p in named_parameters(gpt).items()}
    return gpt, weights


def rows_of(count: int, seed: int) -> np.ndarray:
    return windows(MODEL.vocab_size, count, PLACES + 1, seed)


def exact_gradient(weights: Weights, rows_NS: np.ndarray) -> tuple[Weights, float]:
    """Of the mean loss of some windows, and that loss."""
    variables = {name: w.clone().requires_grad_() for name, w in weights.items()}
    rows = torch.from_numpy(rows_NS)
    loss = oracle(variables, rows[:, :-1], rows[:, 1:]).mean()
    loss.backward()
    return {name: w.grad for name, w in variables.items()}, float(loss.detach())


def relative(found: Weights, true: Weights) -> float:
    """|found - true| / |true| of the worst parameter."""
    return max(float((found[n].cpu().double() - true[n]).norm() / true[n].norm()) for n in true)


def kernels() -> None:
    """Loss and gradients of a whole model with the kernels and without them, against float64."""
    count = 2
    fused = backend.has_triton() if hasattr(backend, "has_triton") else None
    if not fused:
        say("kernels", note="not in this commit" if fused is None else "no Triton here: the plain form alone")
    with process_groups(ParallelConfig()):
        for precision in ("fp32", "bf16"):
            rows, errors = rows_of(count, 3), {}
            for form in ("plain", "kernels") if fused else ("plain",):
                with part(f"{form}, {precision}"):
                    with plain_kernels() if form == "plain" else contextlib.nullcontext():
                        gpt, weights = model_in(precision)
                    errors[form] = loss, gradient = of_a_step(gpt, weights, rows)
                    most = (1e-6, 1e-5) if precision == "fp32" else (1e-3, 0.03)
                    if form == "kernels" and precision == "bf16" and "plain" in errors:
                        # The plain form's own error, but for the order of sums.
                        most = 1e-3, 1.2 * errors["plain"][1]
                    used = kernels_of(gpt)
                    say(
                        f"{form}, {precision}",
                        ok=loss <= most[0] and gradient <= most[1] and (form == "plain") == (used == "none"),
                        loss_off=loss,
                        gradient_off=gradient,
                        bound=f"{most[0]:.1e} and {most[1]:.1e}",
                        kernels=used,
                    )
    for dtype, most in ((torch.float32, 4e-7), (torch.bfloat16, 3e-4)):
        with part(f"dots, {dtype}"):
            error = max(error_of_dots(dtype, *shape) for shape in ((64, 96), (341, 1024), (1000, 200)))
            name = str(dtype).removeprefix("torch.")
            say(f"products with directions, {name}", ok=error <= most, off=error, bound=f"{most:.0e}")


def of_a_step(gpt: Any, weights: Weights, rows_NS: np.ndarray) -> tuple[float, float]:
    """Relative errors of the mean loss and of the worst parameter's gradient."""
    n = len(rows_NS)
    batch = on_device(whole_batch(rows_NS, np.full(n, PLACES), np.zeros(n), None))
    loss = gpt(batch.tokens_BS, batch.position_BS, None, labels=batch.labels_BS).float().mean()
    loss.backward()
    true, true_loss = exact_gradient(weights, rows_NS)
    found = {name: p.grad for name, p in named_parameters(gpt).items()}
    return abs(float(loss.detach()) / true_loss - 1), relative(found, true)


def error_of_dots(dtype: torch.dtype, outputs: int, inputs: int) -> float:
    """Of dot_with_directions with norms, in units of |direction| |gradient|, and of the norm."""
    generator = torch.Generator().manual_seed(outputs)
    s, b, c = PLACES, 3, 3
    a, g = (torch.randn(s, b, n, generator=generator).to(dtype) for n in (inputs, outputs))
    v = torch.randn(c, outputs, inputs, generator=generator)
    found = dot_with_directions(*(t.to(backend.device()) for t in (a, g, v)), squares=True).cpu()
    gradient_BOI = torch.einsum("sbo,sbi->boi", g.double(), a.double())
    true = torch.einsum("boi,coi->bc", gradient_BOI, v.double())
    norm_B = gradient_BOI.flatten(1).norm(dim=1)
    scale_BC = norm_B[:, None] * v.double().flatten(1).norm(dim=1)
    norm_off = (found[:, c].sqrt() / norm_B - 1).abs().max()
    return max(float(((found[:, :c] - true).abs() / scale_BC).max()), float(norm_off))


def bf16_scores() -> None:
    """Scores by the default method against float64 autograd of every window."""
    count, probes, size = (8, 4, 4) if TINY else (32, 8, 8)
    with process_groups(ParallelConfig()):
        for precision, (error_most, rank_least) in {"fp32": (1e-5, 0.999), "bf16": (0.02, 0.99)}.items():
            with part(f"scores, {precision}"):
                gpt, weights = model_in(precision)
                direction = [
                    exact_gradient(weights, rows_of(probes, 50 + c))[0] for c in range(len(CAPABILITIES))
                ]
                rows = rows_of(count, 9)
                true_NC = torch.empty(count, len(direction), dtype=torch.float64)
                for n in range(count):
                    gradient, _ = exact_gradient(weights, rows[n : n + 1])
                    for c, v in enumerate(direction):
                        true_NC[n, c] = sum((gradient[name] * v[name]).sum() for name in v)
                there = {
                    name: torch.stack([v[name] for v in direction]).float().to(backend.device())
                    for name in weights
                }
                batches = [
                    weigh(
                        whole_batch(rows[i : i + size], np.full(size, PLACES), np.zeros(size), None),
                        np.full(size, 1 / PLACES),
                    )
                    for i in range(0, count, size)
                ]
                with Scorer(gpt, WgradDot(there, len(direction))) as scorer:
                    found_NC, _ = score(gpt, scorer, iter(batches), len(batches), size, PLACES)
                found_NC = found_NC.cpu()
                error = float((found_NC - true_NC).norm(dim=0).div(true_NC.norm(dim=0)).max())
                ranks = min(rank_correlation(found_NC[:, c], true_NC[:, c]) for c in range(len(direction)))
                ok = error <= error_most and ranks >= rank_least
                bound = f"{error_most:.0e} and {rank_least}"
                say(
                    f"scores, {precision}",
                    ok=ok,
                    off=error,
                    rank_correlation=ranks,
                    examples=count,
                    bound=bound,
                )


def rank_correlation(x_N: Tensor, y_N: Tensor) -> float:
    """Spearman's, of numbers that all differ."""
    ranks = torch.stack([t.argsort().argsort().double() for t in (x_N, y_N)])
    return float(torch.corrcoef(ranks)[0, 1])


def gpu_tests() -> None:
    """tests/gpu, which need pytest and hypothesis."""
    if lacks := [
        name for name in ("pytest", "hypothesis", "psutil") if importlib.util.find_spec(name) is None
    ]:
        say("pytest tests/gpu", note=f"not run: no {', '.join(lacks)}")
        return
    words = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", "-n", "0"]
    if importlib.util.find_spec("xdist") is None:
        del words[-2:]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    print(done.stdout, done.stderr)
    summary = re.compile(r"\d+ (passed|failed|skipped|error)")
    last = next((x for x in reversed(done.stdout.splitlines()) if summary.search(x)), done.stdout[-200:])
    # On a GPU, tests that are all skipped show nothing.
    ok = done.returncode == 0 and ("passed" in last or not backend.HAS_CUDA)
    say("pytest tests/gpu", ok=ok, note=last)


SECTIONS: dict[str, Way] = {
    "cpu-and-gpu": cpu_and_gpu,
    "deterministic": deterministic,
    "sigterm": sigterm,
    "kernels": kernels,
    "bf16-scores": bf16_scores,
    "gpu-tests": gpu_tests,
}


def main() -> None:
    wait_for_turn()
    if TINY:
        torch.set_num_threads(1)
    SECTIONS[sys.argv[1]]()


if __name__ == "__main__":
    main()
