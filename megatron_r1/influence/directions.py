"""Directions of a checkpoint: v_c = H^-1 (1/M) sum_z g_z over the M windows z of a probing set P_c.

Mean gradients are on disk while the checkpoint is scored. A launch after a kill reads them:

    RUN/influence/step_N/.directions/HASH/tensor_0.pipeline_0.pt    this rank's shard, float32

The hash is of everything that decides a gradient's bits, the layout included. H is applied after reading. The
files are removed when the checkpoint's scores are complete. Three directions are as large as an optimizer's
state.

`influence.exclude_self` scores an example of a probing set against the direction without that example.
Without the window x, the direction gives

    <v_c^{-x}, g_x> = (M <v_c, g_x> - <H^-1 g_x, g_x>) / (M - 1)

exactly, for an H that is diagonal and not measured on these windows: identity, or Adam's second moment.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_r1 import backend
from megatron_r1.checkpoint.files import identity
from megatron_r1.checkpoint.load import load_checkpoint
from megatron_r1.data.windows import Examples
from megatron_r1.influence.curvature import CURVATURES, Identity
from megatron_r1.influence.engine import Engine
from megatron_r1.influence.parameters import Directions, Gradient, named_parameters, squared_norm
from megatron_r1.influence.plan import Job, Part, Work, measured_on_examples
from megatron_r1.influence.store import hashes_of
from megatron_r1.parallel import ParallelContext, sum_over
from megatron_r1.records import CheckpointRef, Corpus
from megatron_r1.run.stage import note_launch, record_launch
from megatron_r1.system.files import regular, remove_if_empty, replacing
from megatron_r1.system.terminal import Progress

# isort: split
from megatron.core import parallel_state

_DECIDING = ("probe_examples", "seed", "loss", "layers")
"""Fields of the manifest's section `influence` that decide a gradient."""
_RECORD = 4096
"""Bytes of a file of directions for each tensor, besides its numbers: at most so many."""


class CheckpointDirections:
    """The weights of one checkpoint, and v_c of every capability there.

    Every rank of the launch calls the same methods. Raises ValueError for a direction that is zero or not
    finite.
    """

    directions: Directions
    norms: dict[str, float]
    """Capability -> |v_c|."""
    seconds: float
    """Time of the directions."""
    windows_passed: int = 0
    """Windows of the probing sets whose gradients were not in the cache."""
    pass_seconds: float = 0.0
    """Time of their passes."""

    def __init__(self, engine: Engine, job: Job, ref: CheckpointRef, launch: Launch):
        """Load the checkpoint's weights into `engine` and compute the directions."""
        self._launch, self._engine, self._work = launch, engine, job.work
        self._ref, self._parts = ref, job.parts[ref.step]
        self._curvature = CURVATURES[job.curvature]()
        self._cache = DirectionCache(job.work, self._parts[0], engine)
        load_checkpoint(ref.path, engine.gpt, None, job.work.config.model)
        start = time.monotonic()
        probes, label = job.work.data.directions, f"directions of step {ref.step}"
        with Progress(label, job.work.probe_windows(), "windows", show=engine.context.leads) as bar:
            gradients = [self._mean_gradient(probe, bar) for probe in probes]
        self.directions = {name: torch.stack([g[name] for g in gradients]) for name in gradients[0]}
        measured_on = self._sources() if measured_on_examples(job.curvature) else []
        self._curvature.apply(self.directions, engine, ref.path, measured_on)
        self.norms = {
            probe.name: squared_norm({n: v[c] for n, v in self.directions.items()}, engine.gpt) ** 0.5
            for c, probe in enumerate(probes)
        }
        if bad := [name for name, norm in self.norms.items() if not 0 < norm < float("inf")]:
            raise ValueError(
                f"influence.curvature={job.curvature} makes the direction of {bad[0]} at step {ref.step} "
                f"{self.norms[bad[0]]}; look at {ref.path}, or use influence.curvature=identity"
            )
        self.seconds = time.monotonic() - start

    def _mean_gradient(self, probe: Corpus, bar: Progress) -> Gradient:
        cached = gradient = self._cache.load(probe.name)
        if gradient is None:
            windows, start = self._engine.examples(probe, self._work.probing(probe)), time.monotonic()
            gradient = self._engine.mean_gradient(windows, bar.advance)
            self.windows_passed += len(windows)
            self._launch.passed(len(windows))
            self.pass_seconds += time.monotonic() - start
        square = squared_norm(gradient, self._engine.gpt)
        if not 0 < square < float("inf"):
            raise ValueError(
                f"the direction of {probe.name} at step {self._ref.step} is "
                f"{'not finite' if square else 'zero'}; look at that checkpoint and at {probe.prefix}"
            )
        if cached is None:
            self._cache.save(probe.name, gradient)
        return gradient

    def _sources(self) -> list[Examples]:
        """The windows of each source that H is measured on: the same number of each, evenly spaced."""
        share = -(-self._work.influence.curvature_examples // len(self._parts))
        out = []
        for part in self._parts:
            place = np.linspace(0, len(part.example_N) - 1, min(share, len(part.example_N))).astype(int)
            out.append(self._engine.examples(part.corpus, part.example_N[place]))
        return out

    def leave_out(self, results: dict[str, Tensor], part: Part, first: int, shared_NC: np.ndarray) -> None:
        """Correct scores in `results`: leave each example from `first` on out of directions that hold it."""
        assert isinstance(self._curvature, Identity), "influence.exclude_self is checked"
        shared_N = np.asarray(shared_NC.any(1))
        if "norms" in results and type(self._curvature) is Identity:
            own_N = results["norms"].square()
        else:
            number_N = part.example_N[first : first + len(shared_N)][shared_N]
            windows = self._engine.examples(part.corpus, number_N)
            own_N = torch.zeros(len(shared_N), dtype=torch.float64)
            own_N[torch.from_numpy(shared_N)] = self._own_products(windows, self._curvature)
        # M, at least 2 where an example is shared.
        size_C = torch.tensor([len(self._work.probing(probe)) for probe in self._work.data.directions])
        without_NC = (size_C * results["scores"] - own_N[:, None]) / (size_C - 1)
        results["scores"] = torch.where(torch.from_numpy(shared_NC), without_NC, results["scores"])

    def _own_products(self, windows: Examples, curvature: Identity) -> Tensor:
        """<H^-1 g, g> of each window, on every rank: float64 [N]. One pass of each by itself."""
        engine, context = self._engine, self._engine.context
        root = {name: scale.sqrt_() for name, scale in curvature.diagonal(self._ref.path, engine.gpt).items()}
        mine_P = [
            squared_norm({name: g / root[name] if root else g for name, g in gradient.items()}, engine.gpt)
            for gradient in engine.example_gradients(windows)
        ]
        all_PR = torch.zeros(len(mine_P), context.data_size, dtype=torch.float64, device=backend.device())
        # Ranks that share a sequence have the same products.
        all_PR[:, context.data_rank] = all_PR.new_tensor(mine_P) / context.context_size
        return sum_over("tokens", all_PR).flatten()[: len(windows)].cpu()

    def finish(self) -> None:
        """Record the launch, and remove the cache. All scores of the checkpoint are there."""
        if self._engine.context.leads:
            self._cache.clear()
        self._launch.finish()


class Launch:
    """The ledger line of this launch's part of a checkpoint's scores. Every rank has one, the first acts.

    `began`: seconds since the epoch.
    """

    def __init__(self, stage: str, job: Job, ref: CheckpointRef, context: ParallelContext, began: float):
        self._job, self._ref, self._context = job, ref, context
        self._name, self._began, self._tokens = f"{stage} step {ref.step}", began, 0
        self._inputs = {str(ref.path): identity(ref.path)} | dict(job.work.data.identities)
        self.passed(0)

    def passed(self, rows: int) -> None:
        """Note that rows of `data.seq_length` tokens have passed through the model."""
        self._tokens += rows * self._job.work.config.data.seq_length
        if self._context.leads:
            line = {"tokens": self._tokens, "devices": self._context.world_size, "inputs": self._inputs}
            note, seconds = launch_note(self._job, self._ref), time.time() - self._began
            note_launch(note, name=self._name, seconds=seconds, **line)

    def finish(self) -> None:
        """Add the line, with the complete scores."""
        self.passed(0)
        if self._context.leads:
            record_left(self._job, self._ref)


def launch_note(job: Job, ref: CheckpointRef) -> Path:
    """The file from which the next launch knows of one that was killed while it scored a checkpoint."""
    folder = job.parts[ref.step][0].directory.parent
    return folder.with_name(f".{folder.name}.launch.json")


def record_left(job: Job, ref: CheckpointRef) -> None:
    """Add the ledger line of the launch that has left a note, with the scores if they are complete."""
    parts = job.parts[ref.step]
    outputs = {} if any(part.left() for part in parts) else hashes_of(part.directory for part in parts)
    record_launch(launch_note(job, ref), Path(job.work.config.train.run), outputs)


class DirectionCache:
    """Mean gradients of one checkpoint on disk. Every rank of the launch calls the same methods.

    `part`: any source's at that checkpoint.
    """

    def __init__(self, work: Work, part: Part, engine: Engine):
        inputs, parallel, context = part.inputs, work.config.parallel, engine.context
        self._root = part.directory.parent / ".directions"
        self._context, self._hashes = context, inputs["directions"]
        mine = named_parameters(engine.gpt).items()
        self._shapes = {name: p.shape for name, p in mine if name in engine.names}
        self._key = {
            **{name: inputs[name] for name in ("weights", "seq_length", "eod", "precision")},
            **{name: inputs["influence"][name] for name in _DECIDING},
            "layout": [parallel.tensor, parallel.pipeline, parallel.context, parallel.sequence],
            # These decide which rows are added up together.
            "batch": [work.influence.micro_batch, context.data_size],
        }

    def load(self, capability: str) -> Gradient | None:
        """This rank's shard. None on all ranks if one of them has no file."""
        path = self._path(capability)
        exists = torch.tensor(int(path.is_file()), device=backend.device())
        dist.all_reduce(exists, dist.ReduceOp.MIN)
        if not exists.item():
            return None
        try:
            return self._read(path)
        except Exception as error:  # torch names none: RuntimeError, EOFError, UnpicklingError and others
            raise ValueError(f"{path} is damaged ({error!s:.80}); remove it and score again") from None

    def _read(self, path: Path) -> Gradient:
        """The tensors of a file, which has no more bytes than they need, and unpacks to no more."""
        needed = sum(4 * shape.numel() + _RECORD for shape in self._shapes.values()) + _RECORD
        with open(path, "rb", opener=regular) as stream:
            size = os.fstat(stream.fileno()).st_size
            # torch compares no checksums.
            archive = zipfile.ZipFile(stream)
            packed = any(of.compress_type for of in archive.infolist())
            if size > needed or packed or archive.testzip():
                raise ValueError(f"{size} bytes, which are not those that were written")
            stream.seek(0)
            cached = torch.load(stream, map_location=backend.device(), weights_only=True)
        if not isinstance(cached, dict) or cached.keys() != self._shapes.keys():
            raise ValueError("other parameters than the model's")
        for name, shape in self._shapes.items():
            g = cached[name]
            dense = type(g) is Tensor and g.layout == torch.strided and g.is_contiguous()
            if not dense or g.dtype != torch.float32 or g.shape != shape or g.requires_grad:
                raise ValueError(f"{name} is no float32 {list(shape)}")
        return {name: cached[name] for name in self._shapes}

    def save(self, capability: str, gradient: Gradient) -> None:
        """Write the shard. The first of the ranks that hold the same one writes it."""
        if self._context.data_rank == 0 and parallel_state.get_context_parallel_rank() == 0:
            path = self._path(capability)
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path) as stream:
                torch.save({name: t.cpu() for name, t in gradient.items()}, stream)

    def clear(self) -> None:
        """Remove the files. One rank calls this. All else that lies there stays."""
        for folder in () if self._root.is_symlink() else self._root.glob("*"):
            for path in () if folder.is_symlink() else folder.glob("tensor_*.pipeline_*.pt*"):
                path.unlink(missing_ok=True)
            remove_if_empty(folder)
        remove_if_empty(self._root)

    def _path(self, capability: str) -> Path:
        key = json.dumps([self._key, capability, self._hashes[capability]])
        digest = hashlib.sha256(key.encode()).hexdigest()[:16]
        shard = f"tensor_{self._context.tensor_rank}.pipeline_{self._context.pipeline_rank}"
        return self._root / digest / f"{shard}.pt"
