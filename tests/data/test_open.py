"""Datasets against configuration: what does not fit is said before anything runs."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.config_io import ConfigError
from megatron_r1.data.indexed import IndexedDataset, IndexedWriter
from megatron_r1.data.open import OpenData, open_data
from tests.launch import TINY_MODEL, start, write_corpus


def sidecar(prefix: Path, fingerprint: str, vocab_size: int) -> None:
    """What tools/preprocess_data.py leaves beside a pair."""
    dataset = IndexedDataset(prefix)
    made_with = {
        "tokenizer_fingerprint": fingerprint,
        "vocab_size": vocab_size,
        "documents": dataset.num_documents,
        "tokens": len(dataset.tokens),
        "dtype": dataset.dtype.name,
    }
    Path(f"{prefix}.json").write_text(json.dumps(made_with))


@pytest.fixture
def words(tmp_path: Path) -> list[str]:
    for number, name in enumerate("ab"):
        write_corpus(tmp_path / name, 20, seed=number)
    return [
        *TINY_MODEL,
        "train={run: unused, global_batch: 4, micro_batch: 2}",
        f"data={{seq_length: 32, sources: {{a: {{prefix: '{tmp_path}/a'}}, b: {{prefix: '{tmp_path}/b'}}}}}}",
        "phases.one.steps=5",
    ]


def opened(words: list[str]) -> tuple[Config, OpenData]:
    """As tools/train.py does."""

    def opener(config: Config) -> OpenData:
        return open_data(config, also=lambda _: config_io.check_world(config, 1))

    return config_io.load_with(words, opener)


def mistakes(words: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        opened(words)
    return caught.value.mistakes


def test_datasets_of_two_tokenizers_are_refused(words: list[str], tmp_path: Path) -> None:
    sidecar(tmp_path / "a", "1" * 64, 128)
    sidecar(tmp_path / "b", "2" * 64, 128)
    (found,) = mistakes(words)
    assert found.startswith("data.sources.b: made with tokenizer 222222222222, data.sources.a with 1111")


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(words: list[str], tmp_path: Path) -> None:
    sidecar(tmp_path / "a", "1" * 64, 4096)
    sidecar(tmp_path / "b", "1" * 64, 4096)
    (found,) = mistakes(words)
    assert found.startswith("data.sources.a: its tokenizer has 4096 tokens, model.vocab_size=128 fewer;")


@pytest.mark.parametrize("tokens", [50_000, 3_000_000])
def test_an_id_beyond_the_vocabulary_is_refused_where_no_sidecar_tells(
    tokens: int, words: list[str], tmp_path: Path
) -> None:
    """A short stream is looked at whole; a long one in stretches, the last tokens among them."""
    stream = np.ones(tokens, np.uint16)
    stream[-2] = 128
    with IndexedWriter(tmp_path / "a", np.uint16) as writer:
        writer.add_document(stream)
    (found,) = mistakes(words)
    assert found.startswith(
        f"data.sources.a: {tmp_path}/a.bin: token {tokens - 2} has id 128, but model.vocab_size=128"
    )


def test_mistakes_of_files_and_fields_come_in_one_message(words: list[str], tmp_path: Path) -> None:
    found = mistakes([*words, "data.sources.a.prefix=nowhere/a", "train.micro_batch=3"])
    assert len(found) == 2 and "micro_batch=3" in found[0] and "nowhere/a.idx does not exist" in found[1]


def test_more_documents_than_there_are_is_refused(words: list[str]) -> None:
    (found,) = mistakes([*words, "data.sources.a.documents=21"])
    assert found.startswith("data.sources.a: ") and "21" in found and "20" in found


def test_epoch_caps_that_end_the_data_early_are_refused(words: list[str]) -> None:
    _, data = opened([*words, "phases.one.max_epochs=0.1"])
    with pytest.raises(ConfigError, match="max_epochs"):
        data.plan  # noqa: B018


def test_megatrons_order_is_given_shares(words: list[str]) -> None:
    plan = opened([*words, "data.order=megatron", "phases.one.weights={a: 3, b: 1}"])[1].plan
    assert plan.count("a", 20) == 15 and plan.count("b", 20) == 5


def test_phases_meet_at_whole_steps(words: list[str]) -> None:
    _, data = opened([*words, "phases.two={steps: 3, weights: {b: 1}}"])
    plan = data.plan
    assert [corpus.name for corpus in data.corpora] == ["a", "b"]
    assert plan.count("a", 20) == 10 and plan.count("a", 32) == 10 and plan.count("b", 32) == 22


def write_ended(prefix: Path, ends: list[int]) -> None:
    """A pair of documents that end with these tokens, which stand nowhere else."""
    with IndexedWriter(prefix, np.uint16) as writer:
        for end in ends:
            writer.add_document(np.append(np.full(40, 100), end))


@pytest.mark.parametrize(
    ("ends", "message"),
    [
        ([5] * 20, ""),
        ([], ""),
        ([5] * 15 + [6] * 5, "data.eod=5 ends 15 of 20 documents looked at; windows attend from the others"),
        ([5] * 5 + [6] * 15, "data.eod=5 ends 5 of 20 documents looked at (15 of them end with 6); name the"),
        ([5] * 5000 + [6] * 4000, "data.eod=5 ends 569 of 1024 documents looked at; windows attend"),
    ],
)
def test_documents_end_where_the_index_says(
    ends: list[int], message: str, words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_ended(tmp_path / "a", [5] * 20)
    write_ended(tmp_path / "b", ends)
    apart = [*words, "data.cross_documents=false", "data.eod=5"]
    if "name the" in message or not ends:
        assert any(message in mistake for mistake in mistakes(apart))
        return
    opened(apart)
    assert message in capsys.readouterr().err


def test_documents_apart_need_a_known_end(words: list[str], tmp_path: Path) -> None:
    apart = [*words, "data.cross_documents=false"]
    for name in "ab":
        write_ended(tmp_path / name, [5] * 20)
    assert "a has no sidecar that names its end-of-document token" in mistakes(apart)[0]
    assert opened([*apart, "data.eod=5"])[1].eod == 5
    sidecar(tmp_path / "a", "1" * 64, 128)
    assert "was preprocessed without --append-eod" in mistakes([*apart, "data.eod=0"])[0]
    for name in "ab":
        sidecar(tmp_path / name, "1" * 64, 128)
        made_with = json.loads((tmp_path / f"{name}.json").read_text())
        (tmp_path / f"{name}.json").write_text(json.dumps({**made_with, "append_eod": True, "eod": 5}))
    assert mistakes([*apart, "data.eod=4"])[0].endswith("its documents end with token 5, not data.eod=4")
    assert opened(apart)[1].eod == 5 and opened(words)[1].eod is None


def test_a_probing_set_without_a_window_is_refused(words: list[str], tmp_path: Path) -> None:
    write_corpus(tmp_path / "none", 0, seed=0)
    (found,) = mistakes([*words, f"data.probes={{code: '{tmp_path}/none'}}"])
    assert found == (
        "data.probes.code: 0 tokens are less than one window of data.seq_length=32, which takes 33; set more "
        "documents aside"
    )


def test_only_what_a_use_reads_is_opened(words: list[str], tmp_path: Path) -> None:
    write_corpus(tmp_path / "p", 5, seed=5)
    more = [f"data.probes={{p: '{tmp_path}/p'}}", f"influence={{directions: {{q: '{tmp_path}/nowhere'}}}}"]
    config = config_io.load([*words, *more])
    data = open_data(config)
    assert [c.name for c in data.probes] == ["p"] and not data.directions
    assert data.identities.keys() == {f"{tmp_path}/{name}" for name in "abp"}
    with pytest.raises(ConfigError, match=r"1 mistake .*\n  influence.directions.q: .*nowhere.idx does not"):
        open_data(config, use="score")
    assert not open_data(config, use="mix").probes


def test_a_source_that_is_not_there_is_planned_by_its_tokens(words: list[str]) -> None:
    config = config_io.load([*words, "data.sources.b={prefix: nowhere/b, tokens: 321}"])
    data = open_data(config, use="plan")
    assert data.absent == {"b"} and data.plan.sources["b"] == 10
    with pytest.raises(ConfigError, match=r"for a plan without it, say data\.sources\.b\.tokens=N"):
        open_data(config_io.load([*words, "data.sources.b.prefix=nowhere/b"]), use="plan")
    with pytest.raises(ConfigError, match=r"nowhere/b\.idx does not exist"):
        open_data(config)


def test_ranks_without_torchrun_all_find_damage(words: list[str], tmp_path: Path) -> None:
    """Nobody ends the others when one alone does; the others would wait ten minutes for it to join them."""
    index = tmp_path / "a.idx"
    damaged = bytearray(index.read_bytes())
    # A length in the second rank's part of the index.
    damaged[34 + 4 * 15] += 1
    index.write_bytes(damaged)
    IndexedDataset(tmp_path / "a", share=(0, 2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    command = [sys.executable, "tools/train.py", *words]
    processes = [
        start(command, log, RANK=str(rank), LOCAL_RANK=str(rank), **meeting) for rank, log in enumerate(logs)
    ]
    try:
        assert [process.wait(timeout=60) for process in processes] == [2, 2]
    finally:
        for process in processes:
            process.kill()
    assert all(f"{index} is damaged at offset" in log.read_text() for log in logs)


def test_sources_of_one_pair_are_refused_and_a_probe_of_one_is_told(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "there" / ".." / "a"
    (tmp_path / "there").mkdir()
    assert any(
        "its pair is that of data.sources.a;" in m
        for m in mistakes([*words, f"data.sources.c.prefix={other}"])
    )
    opened([*words, f"data.probes.p={other}"])
    assert (
        "data.probes.p is the pair of data.sources.a, so its loss is not held out" in capsys.readouterr().err
    )
