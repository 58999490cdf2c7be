"""Every file under examples/ resolves, says what the paper says, and can be launched."""

from __future__ import annotations

import errno
import gzip
import itertools
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml

from megatron_r1 import config_io
from megatron_r1.checkpoint.files import evenly_spaced
from megatron_r1.curation.request import load as load_curation
from megatron_r1.data.indexed import IndexedDataset
from megatron_r1.data.open import open_data
from megatron_r1.launch.paper import SOURCES
from megatron_r1.preprocess.tokenizer import build_tokenizer
from megatron_r1.preprocess.train_tokenizer import train_sentencepiece
from megatron_r1.records import CAPABILITIES
from megatron_r1.system.errors import hub_name
from megatron_r1.train.schedule import phase_spans
from tests.launch import wait_for

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"
PHASES = ["pretrain/phase1.yaml", "pretrain/phase2.yaml"]
MIDTRAIN = ["midtrain/kd.yaml", "midtrain/kd_cached.yaml"]
SPLIT = [
    f"data.sources.{name}={{prefix: none, tokens: 1000000}}"
    for name in yaml.safe_load((EXAMPLES / "quickstart/train.yaml").read_text())["data"]["sources"]
]
DOMAIN = ["models/140m.yaml", "pretrain/phase1.yaml", "influence/per_domain/domain.yaml"]
PROBES = "influence.directions={code: none}"
# What is given together on a command line.
RECIPES = [
    *(([f"models/{size}.yaml", *PHASES, "influence/pretrain.yaml"], []) for size in ("140m", "360m", "950m")),
    *(([*DOMAIN, f"influence/per_domain/{domain}.yaml"], []) for domain in ("code", "math", "knowledge")),
    (["models/140m.yaml", "pretrain/phase1.yaml", "influence/per_domain/mix.yaml", PHASES[1]], []),
    *((["models/950m.yaml", *MIDTRAIN[:n]], []) for n in (1, 2)),
    (["models/tiny.yaml", "quickstart/train.yaml", "quickstart/control.yaml"], SPLIT),
    (
        ["models/tiny.yaml"] + [f"quickstart/{name}.yaml" for name in ("train", "phase2", "influence")],
        [*SPLIT, PROBES],
    ),
]
LAUNCHERS = [f"launch/{name}" for name in ("torchrun_21x8.sh", "slurm_21x8.sbatch", "one_machine.sh")]
LAUNCHERS += ["launch/curate.sbatch", "launch/decontaminate.sbatch", "launch/cache_teacher.sbatch"]
CURATION = ["curation/table5.yaml", "curation/small.yaml"]
sys.path.insert(0, str(EXAMPLES / "corpora"))
import fetch_corpus  # noqa: E402


def test_no_recipe_is_forgotten() -> None:
    known = {name for files, _ in RECIPES for name in files} | {"corpora/corpora.yaml", *CURATION}
    assert {str(p.relative_to(EXAMPLES)) for p in EXAMPLES.rglob("*.yaml")} == known


@pytest.mark.parametrize("files, rest", RECIPES)
def test_recipe_resolves_without_its_datasets(files: list[str], rest: list[str]) -> None:
    config = config_io.load([*(str(EXAMPLES / name) for name in files), *rest])
    assert open_data(config, use="plan").plan.phases
    text = (EXAMPLES / files[0]).read_text()
    assert text.startswith(f"# {config.model.parameters():,} parameters")


def test_the_recipe_gives_the_tables_sources_and_columns() -> None:
    config = config_io.load([str(EXAMPLES / name) for name in ("models/950m.yaml", *PHASES)])
    assert {n: s.tokens for n, s in config.data.sources.items()} == {
        n: s["tokens"] for n, s in SOURCES.items()
    }
    for number in (1, 2):
        given = config.phase_weights(f"phase{number}")
        assert given == {name: row[f"phase{number}"] for name, row in SOURCES.items()}


def test_mid_training_is_tables_4_and_6_and_begins_where_pre_training_ends() -> None:
    config = config_io.load([str(EXAMPLES / name) for name in ("models/950m.yaml", *MIDTRAIN[:1])])
    before = config_io.load([str(EXAMPLES / name) for name in ("models/950m.yaml", *PHASES)])
    last = phase_spans(before)[-1].end
    assert config.train.init_weights == f"{before.train.run}/checkpoints/step_{last:08d}"
    assert config.tokens_per_step() == 168 * 3 * 4096 and not config.data.cross_documents
    for span, total in zip(phase_spans(config), (99.99, 99.98), strict=True):
        assert span.end - span.start == 48_441
        assert sum(config.phase_weights(span.name).values()) == pytest.approx(total)
        assert span.learning_rate(span.start) == 3.6e-4 and 0 < span.learning_rate(span.end - 1) < 1e-8
        given = config.phases[span.name].objective
        assert given is not None and (given.weight, given.temperature, given.cache) == (1, 1, None)
        # Llama 3.1 8B: untied embeddings and head, 32 layers of 4096, 1024 and 14336.
        layer = 2 * 4096 * (4096 + 1024) + 3 * 4096 * 14336 + 2 * 4096
        assert given.parameters == 2 * 128_256 * 4096 + 32 * layer + 4096
    cached = config_io.load([str(EXAMPLES / name) for name in ("models/950m.yaml", *MIDTRAIN)])
    for name, phase in cached.phases.items():
        online = config.phases[name].objective
        assert online is not None and phase.objective == replace(
            online, cache="data/cache/llama-3.1-8b-instruct"
        )


def test_influence_scores_checkpoints_that_phase_1_keeps() -> None:
    files = ["models/140m.yaml", "pretrain/phase1.yaml", "influence/pretrain.yaml"]
    config = config_io.load([str(EXAMPLES / name) for name in files])
    assert config.influence is not None
    assert config.influence.steps == evenly_spaced(0, config.phase_steps("phase1"), config.train.keep_spaced)


@pytest.mark.parametrize("domain", ["code", "math", "knowledge"])
def test_a_domains_model_sees_its_sources_and_is_scored_for_it(domain: str) -> None:
    files = [*DOMAIN, f"influence/per_domain/{domain}.yaml"]
    config = config_io.load([str(EXAMPLES / name) for name in files])
    mix = yaml.safe_load((EXAMPLES / "influence/per_domain/mix.yaml").read_text())["mix"]
    assert mix["runs"][domain] == config.train.run
    sources = config.data.sources.items()
    sizes = {n: s.tokens / 1e9 if s.domain in (domain, "all") else 0 for n, s in sources if s.tokens}
    assert config.phase_weights("phase1") == pytest.approx(sizes)
    assert config.influence is not None and list(config.influence.directions) == [domain]
    assert config.influence.steps == evenly_spaced(0, config.phase_steps("phase1"), config.train.keep_spaced)


def test_corpora_are_the_tables() -> None:
    table = yaml.safe_load((EXAMPLES / "corpora/corpora.yaml").read_text())
    assert {n: (row["rows"], float(row["tokens"])) for n, row in table.items()} == {
        n: (row["rows"], row["tokens"]) for n, row in SOURCES.items()
    }


def test_probing_sets_are_made_of_the_tables_corpora_and_the_papers_domains() -> None:
    sources = yaml.safe_load((EXAMPLES / CURATION[0]).read_text())["sources"]
    domains = {c: {name for name, of in sources.items() if c in of["domains"]} for c in CAPABILITIES}
    every = {"cosmopedia", "natural-reasoning", "pes2o"}
    assert domains == {
        "code": every | {"starcoder", "stackexchange", "nemotron-code"},
        "math": every | {"openwebmath", "finemath", "algebraic-stack", "nemotron-math"},
        "knowledge": every | {"fineweb-edu", "wiki", "arxiv", "nemotron-science"},
    }
    config = config_io.load([str(EXAMPLES / name) for name in ("models/950m.yaml", *PHASES)])
    assert {n: of["prefix"] for n, of in sources.items()} == {
        n: s.prefix for n, s in config.data.sources.items()
    }
    # Where fetch_corpus.py leaves their text.
    assert all(of["text"] == [f"data/text/{name}/part_*.jsonl.gz"] for name, of in sources.items())


@pytest.mark.parametrize("name", CURATION)
def test_curation_resolves_with_its_prompts(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    config = load_curation([f"examples/{name}"])
    assert config.quality and config.judge and config.duplicates and config.duplicates.semantic
    # A name on the hub is one that is asked for: with its revision.
    models = [config.quality.model, config.judge.model, config.duplicates.semantic]
    assert all(hub_name(str(m), "") if "table5" in name else str(m).startswith("models/") for m in models)
    # Ten per cent of what reaches the judge are the documents.
    assert name != CURATION[0] or config.needed() == 100_000


def test_a_corpus_is_streamed_into_a_dataset(tmp_path: Path) -> None:
    rows = [
        {"input": [{"role": "user", "content": f"question {n}?"}, {"content": None}], "output": f"so {n}"}
        for n in range(7)
    ]
    (tmp_path / "hub/data").mkdir(parents=True)
    # load_dataset takes the split from a file's name of this form.
    (tmp_path / "hub/data/science-00000-of-00001.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows)
    )
    texts = [f"question {n}?\n\nso {n}" for n in range(7)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_sentencepiece([tmp_path / "texts.jsonl"], tmp_path / "sp.model", vocab_size=280)
    command = [sys.executable, str(EXAMPLES / "corpora/fetch_corpus.py"), "nemotron-science"]
    command += ["--dataset", str(tmp_path / "hub"), "--output-dir", str(tmp_path / "data")]
    command += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(tmp_path / "sp.model")]
    command += ["--rows-per-part", "3", "--max-rows", "5"]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
    dataset = IndexedDataset(tmp_path / "data/tokens/nemotron-science_text_document")
    tokenizer = build_tokenizer("SentencePieceTokenizer", str(tmp_path / "sp.model"))
    found = [tokenizer.decode(dataset[n][:-1].tolist()) for n in range(dataset.num_documents)]
    assert sorted(found) == texts[:5]


def test_corpora_are_named_with_a_revision() -> None:
    for entry in fetch_corpus.corpora().values():
        assert hub_name(entry["dataset"], "")


class _Hub:
    """A dataset of 7 rows whose branch moves at each question; it can end in an error."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.commits = iter("abcdef")
        self.asked: list[tuple[Any, ...]] = []
        self.fails_at = 99
        monkeypatch.setattr("huggingface_hub.HfApi", lambda: self)
        monkeypatch.setattr("datasets.load_dataset", self.load)

    def dataset_info(self, name: str, revision: str) -> Any:
        self.asked.append((name, revision))
        return SimpleNamespace(sha=next(self.commits) * 40)

    def load(
        self, name: str, configuration: str | None, *, split: str, revision: str, streaming: bool
    ) -> _Hub:
        self.asked.append((name, revision))
        return self

    def skip(self, first: int) -> Iterator[dict[str, str]]:
        for n in range(first, 7):
            if n == self.fails_at:
                raise RuntimeError("the hub\nis gone")
            yield {"text": f"row {n} \udc80"}


ENTRY = {"dataset": "org/name@main", "split": "train", "text": ["text"]}


def test_all_parts_of_a_corpus_are_of_one_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub, folder = _Hub(monkeypatch), tmp_path / "text"
    hub.fails_at = 4
    with pytest.raises(ValueError, match=r"org/name@a{40} cannot be had from the hub: the hub$"):
        fetch_corpus.write_parts(ENTRY, folder, None, 3, None)
    assert [path.name for path in sorted(folder.iterdir())] == ["part_00000.jsonl.gz", "request.json"]
    hub.fails_at = 99
    parts = fetch_corpus.write_parts(ENTRY, folder, None, 3, None)
    assert hub.asked == [("org/name", "main"), *[("org/name", "a" * 40)] * 2]
    rows = [line for part in parts for line in gzip.decompress(part.read_bytes()).splitlines()]
    assert rows == [b'{"text": "row %d \xed\xb2\x80"}' % n for n in range(7)]
    with pytest.raises(ValueError, match=r"was begun with .*org/name@main.*now it is .*org/name@v2"):
        fetch_corpus.write_parts({**ENTRY, "dataset": "org/name@v2"}, folder, None, 3, None)
    parts[0].unlink()
    with pytest.raises(ValueError, match="lacks a part before part_00002"):
        fetch_corpus.write_parts(ENTRY, folder, None, 3, None)


@pytest.mark.parametrize("name", ["org/name", "data/corpsu", "squad"])
def test_a_corpus_without_a_revision_is_not_asked_for(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = _Hub(monkeypatch)
    with pytest.raises(FileNotFoundError, match="ORG/NAME@COMMIT"):
        fetch_corpus.write_parts({**ENTRY, "dataset": name}, tmp_path / "text", None, 3, None)
    with pytest.raises(FileNotFoundError, match=f"--dataset {name}: no folder there"):
        fetch_corpus.write_parts(ENTRY, tmp_path / "text", name, 3, None)
    assert hub.asked == [] and not (tmp_path / "text").exists()


def test_a_part_is_on_the_disk_before_it_has_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk names the part, and leaves nothing."""
    _Hub(monkeypatch)
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no room")))
    with pytest.raises(OSError, match=r"no room.*part_00000"):
        fetch_corpus._write_part(tmp_path / "part_00000.jsonl.gz", iter([{"text": "a"}]), ["text"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_is_a_shell_script(name: str) -> None:
    assert os.access(EXAMPLES / name, os.X_OK)
    subprocess.run(["bash", "-n", EXAMPLES / name], check=True)


def test_torchrun_launcher_starts_168_ranks_of_the_tool() -> None:
    environment = {**os.environ, "MASTER_ADDR": "node0", "NODE_RANK": "20", "DRY_RUN": "1"}
    words = subprocess.run(
        [EXAMPLES / LAUNCHERS[0], "a.yaml", "train.run=with space"],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()
    given = dict(itertools.pairwise(words))
    assert int(given["--nnodes"]) * int(given["--nproc-per-node"]) == 168
    assert given["--node-rank"] == "20" and given["tools/train.py"] == "a.yaml"
    assert words[-2:] == ["train.run=with\\", "space"]


@pytest.mark.parametrize(
    "word", ["--standalone", "--stand", "--rdzv_backend=c10d", "--nn=2", "--master-addr"]
)
def test_one_machine_takes_no_words_for_several(word: str) -> None:
    done = subprocess.run([EXAMPLES / LAUNCHERS[2], word, "a.py"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith(f"error: {word}: ")


def test_one_machine_starts_torchrun_without_a_socket_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "python").write_text(
        '#!/usr/bin/env bash\nprintf "%s\\n" "$@"; env | grep PET_; ls "$TMPDIR"\n'
    )
    (tmp_path / "python").chmod(0o755)
    (tmp_path / "tmp").mkdir()
    done = subprocess.run(
        [EXAMPLES / LAUNCHERS[2], "--nproc-per-node", "8", "a.py", "train.run=with space", "--standalone"],
        env={**os.environ, "PYTHON": str(tmp_path / "python"), "TMPDIR": str(tmp_path / "tmp")}
        | {"PET_STANDALONE": "1", "PET_NNODES": "2", "PET_RDZV_BACKEND": "static"},
        capture_output=True,
        text=True,
        check=True,
    )
    words = done.stdout.splitlines()
    assert words[:4] == ["-m", "torch.distributed.run", "--nproc-per-node", "8"]
    assert words[4:7] == ["a.py", "train.run=with space", "--standalone"]
    assert {"PET_RDZV_BACKEND=c10d", "PET_RDZV_CONF=store_type=file", "PET_LOCAL_ADDR=127.0.0.1"} < set(words)
    assert {word.partition("=")[0] for word in words if word.startswith("PET_")} == {
        *("PET_RDZV_BACKEND", "PET_RDZV_CONF", "PET_RDZV_ENDPOINT", "PET_LOCAL_ADDR")
    }
    # Nothing is left in the folder of temporary files.
    assert words[-1].startswith("PET_")


def _slurm(folder: Path, ranks: str, launcher: str = LAUNCHERS[1]) -> subprocess.Popen[str]:
    """The batch script among commands that only say that they were called; `ranks` stands for torchrun."""
    for name, body in (
        ("scontrol", 'if [[ $1 == show ]]; then echo node0; else echo "$@" >>"$OUT/requeued"; fi'),
        ("srun", 'shift; SLURM_NODEID=0 exec "$@"'),
        ("torchrun", ranks),
    ):
        (folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (folder / name).chmod(0o755)
    return subprocess.Popen(
        [EXAMPLES / launcher, "a.yaml"],
        env={
            **os.environ,
            "PATH": f"{folder}:{os.environ['PATH']}",
            "PYTHON": str(folder / "torchrun"),
            "OUT": str(folder),
            "SLURM_SUBMIT_DIR": str(ROOT),
            "SLURM_JOB_NODELIST": "node[0-20]",
            "SLURM_JOB_NUM_NODES": "21",
            "SLURM_JOB_ID": "7",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_slurm_saves_and_requeues_when_time_is_nearly_up(tmp_path: Path) -> None:
    rank = 'python3 -c "import signal, sys; signal.signal(15, lambda *_: sys.exit(0)); ' + (
        "open('$OUT/ready', 'w').close(); signal.pause()\" && touch $OUT/saved"
    )
    job = _slurm(tmp_path, rank)
    wait_for((tmp_path / "ready").exists, "the ranks")
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=60)[0]
    assert job.returncode == 0, told
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"


@pytest.mark.parametrize("status", [0, 3])
def test_slurm_does_not_requeue_what_ended_by_itself(tmp_path: Path, status: int) -> None:
    job = _slurm(tmp_path, f"exit {status}")
    told = job.communicate(timeout=60)[0]
    assert job.returncode == status, told
    assert not (tmp_path / "requeued").exists()


def test_slurm_curates_by_torchrun_and_goes_on_in_the_next_job(tmp_path: Path) -> None:
    job = _slurm(tmp_path, 'echo "$@" >$OUT/words; touch $OUT/ready; sleep 1', LAUNCHERS[3])
    wait_for((tmp_path / "ready").exists, "the ranks")
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and "goes on in the next job" in told
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    words = (tmp_path / "words").read_text().split()
    assert words[-2:] == ["tools/curate_probes.py", "a.yaml"] and words[words.index("--nnodes") + 1] == "21"


def test_slurm_caches_a_teacher_by_shards_of_nodes(tmp_path: Path) -> None:
    job = _slurm(tmp_path, 'echo "$@" >$OUT/words; touch $OUT/ready; sleep 1', LAUNCHERS[5])
    wait_for((tmp_path / "ready").exists, "the ranks")
    job.send_signal(signal.SIGUSR1)
    told = job.communicate(timeout=60)[0]
    assert job.returncode == 0 and "goes on in the next job" in told
    assert (tmp_path / "requeued").read_text() == "requeue 7\n"
    words = (tmp_path / "words").read_text().split()
    assert words[:4] == ["-m", "torch.distributed.run", "--nproc-per-node", "8"]
    assert words[4:] == ["tools/cache_teacher.py", "a.yaml", "--shard", "env"]


def test_an_array_of_jobs_finds_what_one_run_finds(tmp_path: Path) -> None:
    item = "How many apples has Ann left if she gives four of her nine apples to her brother Tom on a Monday?"
    texts = [{"text": f"Line {n}. " + (item if n % 40 == 7 else "Nothing is asked.")} for n in range(200)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    (tmp_path / "items.jsonl").write_text(json.dumps({"question": item}) + "\n")
    words = [
        "--input",
        tmp_path / "a.jsonl",
        "--items",
        f"mine={tmp_path}/items.jsonl",
        "--part-megabytes",
        "0.002",
    ]
    words += ["--output", tmp_path / "clean"]
    for task in ("0", "1", "2"):
        slurm = {"SLURM_ARRAY_TASK_ID": task, "SLURM_ARRAY_TASK_COUNT": "3", "SLURM_CPUS_PER_TASK": "1"}
        slurm |= {"SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_MAX": "2", "SLURM_ARRAY_TASK_STEP": "1"}
        environment = {**os.environ, **slurm, "SLURM_SUBMIT_DIR": str(ROOT), "PYTHON": sys.executable}
        subprocess.run([EXAMPLES / "launch/decontaminate.sbatch", *words], env=environment, check=True)
    subprocess.run([sys.executable, "tools/decontaminate.py", *words, "--merge"], cwd=ROOT, check=True)
    assert len((tmp_path / "clean/dropped.txt").read_text().split()) == 5
