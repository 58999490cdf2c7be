"""A teacher's distributions are those of one plain call of transformers for each document."""

from __future__ import annotations

import json
import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_r1 import backend
from megatron_r1.checkpoint.files import identity
from megatron_r1.checkpoint.save import save_checkpoint
from megatron_r1.config import ModelConfig, ParallelConfig
from megatron_r1.data.loader import whole_batch
from megatron_r1.distill import teacher as teacher_room
from megatron_r1.distill.describe import Described
from megatron_r1.distill.teacher import Teacher, _batches
from megatron_r1.export import pretrained
from megatron_r1.export.pretrained import convert
from megatron_r1.model.gpt import build_model
from megatron_r1.parallel import cut_to_rank, on_device, process_groups
from megatron_r1.preprocess.preprocess import preprocess
from megatron_r1.preprocess.tokenizer import HuggingFace
from megatron_r1.records import TrainState
from tests.curation.tiny import byte_pairs, llama, texts
from tests.distributed import on_ranks

EOD, BOS = 1, 0
SIZES: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "initializer_range": 0.3}
SIZES |= {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 0}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"attention_dropout": 0.5},
    "gemma2": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.25},
    "granite": {"logits_scaling": 3.0},
    "phi": {"resid_pdrop": 0.5, "embd_pdrop": 0.5},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "resid_pdrop": 0.5},
}


def model(folder: Path, kind: str = "llama", begins: bool = False, **more: Any) -> Path:
    """A folder with a random model, whose vocabulary is larger than its tokenizer's."""
    vocabulary = len(byte_pairs(folder, begins=begins)) + 7
    torch.manual_seed(3)
    config = AutoConfig.for_model(kind, vocab_size=vocabulary, **SIZES | FAMILIES.get(kind, {}) | more)
    network = AutoModelForCausalLM.from_config(config)
    for name, parameter in network.named_parameters():
        if "bias" in name:
            torch.nn.init.normal_(parameter, 0, 0.3)
    network.save_pretrained(folder)
    return folder


def rows(b: int, s: int, seed: int = 0) -> np.ndarray:
    """Rows of tokens in documents of very different lengths, some of one token."""
    generator = np.random.default_rng(seed)
    token_BS = generator.integers(2, 200, (b, s))
    token_BS[generator.random((b, s)) < 0.15] = EOD
    return token_BS


@torch.no_grad()
def plain(network: Any, tokens: np.ndarray, bos: int | None) -> torch.Tensor:
    """Logits behind each token of a document, which begins with `bos`."""
    ids = [*([] if bos is None else [bos]), *tokens.tolist()]
    return network(torch.tensor([ids])).logits[0, len(ids) - len(tokens) :]


def documents(row_S: np.ndarray, eod: int | None) -> list[np.ndarray]:
    out, last = [], 0
    for place, token in enumerate(row_S.tolist(), 1):
        if token == eod or place == len(row_S):
            out.append(row_S[last:place])
            last = place
    return out


def exact(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()


@pytest.mark.parametrize("kind", FAMILIES)
def test_logits_are_those_of_a_plain_call(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network = exact(model(tmp_path, kind, begins=kind == "gemma2"))
    monkeypatch.setattr(pretrained, "BATCH_TOKENS", 40)
    teacher = Teacher(str(tmp_path), "fp32")
    monkeypatch.setattr("megatron_r1.distill.teacher._LOGITS", 4 * teacher.tokens * 7)
    assert teacher.bos == (BOS if kind == "gemma2" else None)
    some = documents(rows(1, 90)[0], EOD)
    assert len({len(one) for one in some}) > 5
    found: dict[int, dict[int, torch.Tensor]] = {}
    for n, first, logits_NV in teacher.logits(some):
        assert not logits_NV.requires_grad and len(logits_NV) <= 7
        found.setdefault(n, {})[first] = logits_NV
    for n, tokens in enumerate(some):
        wanted_SV = plain(network, tokens, teacher.bos)[:, : teacher.tokens]
        ours_SV = torch.cat([part for _, part in sorted(found[n].items())])
        assert ours_SV.shape == wanted_SV.shape
        assert (ours_SV - wanted_SV).abs().max() < 1e-5 * wanted_SV.abs().max()


def _window(token_BS: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Rows with a label more, which no teacher sees."""
    b, s = token_BS.shape
    return np.pad(token_BS, ((0, 0), (0, 1)), constant_values=2), np.full(b, s), np.zeros(b, np.int64)


def target_logits(folder: Path, token_BS: np.ndarray, eod: int | None, **how: Any) -> Any:
    """Logits [B, S, this rank's tokens] of the targets of a batch, on this rank's part of the rows."""
    from megatron.core import parallel_state as ps

    ranks = ps.get_tensor_model_parallel_world_size()
    teacher = Teacher(str(folder), "fp32", **how)
    targets = teacher.targets(eod, -(-teacher.tokens // ranks) + 3)
    target = targets(on_device(whole_batch(*_window(token_BS), None)))
    assert not target.hidden_ND.requires_grad and not target.weight_VD.requires_grad
    b = len(token_BS)
    return target.logits(slice(None)).unflatten(0, (-1, b)).transpose(0, 1)


def wanted(folder: Path, token_BS: np.ndarray, eod: int | None, bos: int | None) -> torch.Tensor:
    network = exact(folder)
    each = [[plain(network, one, bos) for one in documents(row_S, eod)] for row_S in token_BS]
    return torch.stack([torch.cat(row) for row in each])


@pytest.mark.parametrize(
    ("kind", "bos", "eod"),
    [("llama", BOS, EOD), ("llama", "none", None), ("phi", BOS, None), ("phi", "none", EOD)],
)
def test_targets_are_those_of_each_document(
    kind: str, bos: Any, eod: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pretrained, "BATCH_TOKENS", 60)
    model(tmp_path, kind)
    token_BS = rows(3, 40)
    with process_groups(ParallelConfig()):
        ours_BSV = target_logits(tmp_path, token_BS, eod, bos=bos)
    theirs_BSV = wanted(tmp_path, token_BS, eod, None if bos == "none" else bos)
    theirs_BSV = theirs_BSV[..., : ours_BSV.shape[-1]]
    assert (ours_BSV - theirs_BSV).abs().max() < 1e-5 * theirs_BSV.abs().max()
    # The token before a document, and the documents' bounds, would show.
    other_BSV = wanted(tmp_path, token_BS, eod, BOS if bos == "none" else None)[..., : ours_BSV.shape[-1]]
    assert (theirs_BSV - other_BSV).abs().max() > 0.1


def checkpoint(folder: Path) -> Path:
    """A checkpoint of a run, whose data was made with byte pairs. `folder`/hf: the same for transformers."""
    fast = byte_pairs(folder / "tokenizer", begins=True)
    (folder / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts(9)))
    preprocess([folder / "text.jsonl"], folder / "data", HuggingFace.kind, folder / "tokenizer")
    size = ModelConfig(2, 32, 64, 4, 2, len(fast) + 3, head_dim=8, init_std=0.3)
    with process_groups(ParallelConfig()):
        backend.seed_model_parallel(1)
        gpt = build_model(size, ParallelConfig(), "fp32", 1)
        at = folder / "run" / "checkpoints"
        path = save_checkpoint(at, gpt, None, TrainState(), size, "phase", plan="{}").path
    sources = {"a": {"prefix": str(folder / "data_text_document")}}
    run = {"data": {"seq_length": 256, "sources": sources}}
    (folder / "run" / "config.yaml").write_text(yaml.safe_dump(run))
    convert(path, folder / "hf")
    return path


def _on_a_rank(folder: Path, own: Path, token_BS: np.ndarray) -> tuple[Any, ...]:
    with process_groups(ParallelConfig(tensor=2, context=2)) as context:
        seen = list[int]()
        forward = Teacher._hidden

        def counted(self: Teacher, ids_BS: torch.Tensor) -> torch.Tensor:
            seen.append(ids_BS.numel())
            return forward(self, ids_BS)

        Teacher._hidden = counted  # type: ignore[method-assign]
        # Of so few tokens it could be half.
        teacher_room._PADDING = 0
        ours_BSV = target_logits(folder, token_BS, EOD, bos=BOS).numpy()
        work = sum(seen[1:])
        own_BSV = target_logits(own, token_BS, EOD, together=True).numpy()
        number_BS = cut_to_rank({"n": torch.arange(token_BS.size).view(token_BS.shape)})["n"].numpy()
        return context.tensor_rank, number_BS, work, ours_BSV, own_BSV


def test_ranks_share_sequences_and_keep_their_part(tmp_path: Path) -> None:
    """Also those of a checkpoint, which a process of its own converts for all ranks of the machine."""
    token_BS = rows(2, 48)
    folder, own = model(tmp_path / "a"), checkpoint(tmp_path / "b")
    tokens = Described(str(folder)).tokens
    assert tokens == Described(str(own)).tokens
    theirs = [wanted(folder, token_BS, EOD, BOS), wanted(tmp_path / "b" / "hf", token_BS, EOD, None)]
    found = on_ranks(4, partial(_on_a_rank, folder, own, token_BS))
    shard = -(-tokens // 2) + 3
    for tensor_rank, number_BS, _, *both in found:
        for ours_BSV, theirs_BSV in zip(both, theirs, strict=True):
            part_BSV = theirs_BSV.flatten(0, 1)[torch.from_numpy(number_BS)][..., :tokens]
            part_BSV = part_BSV.split(shard, -1)[tensor_rank]
            assert ours_BSV.shape == part_BSV.shape
            assert np.abs(ours_BSV - part_BSV.numpy()).max() < 1e-5 * part_BSV.abs().max()
    kept = {n for _, number_BS, *_ in found for n in number_BS.ravel().tolist()}
    assert kept == set(range(token_BS.size))
    # Each does part of the work: documents, their first token and padding.
    whole = token_BS.size + sum(len(documents(row, EOD)) for row in token_BS)
    assert all(0.2 * whole < work < 0.75 * whole for _, _, work, *_ in found), found
    described = Described(str(own))
    assert (described.bos, described.longest, described.identity) == (None, 256, identity(own))
    hf = Described(str(tmp_path / "b" / "hf"))
    # The tokenizer has one, which preprocessing leaves out.
    assert hf.bos == BOS
    assert (described.parameters, described.vocabulary) == (hf.parameters, hf.vocabulary)
    assert described.flops_per_token(64) == pytest.approx(hf.flops_per_token(64), rel=1e-2)


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 1000))
def test_batches_hold_each_sequence_once_with_little_padding(lengths: list[int], budget: int) -> None:
    length_N = np.array(lengths, np.int64)
    found = list(_batches(length_N, budget))
    assert sorted(n for batch in found for n in batch) == list(range(len(lengths)))
    for batch in found:
        size = len(batch) * length_N[batch].max()
        assert length_N[batch[0]] == length_N[batch].max()
        assert size <= budget or len(batch) == 1
        assert size - length_N[batch].sum() <= 64 + size / 10
    # Of one length, as few as the budget allows.
    of_one = list(_batches(np.full(7, 10), 30))
    assert [len(batch) for batch in of_one] == [3, 3, 1]


def test_a_teacher_is_frozen_and_in_eval_mode(tmp_path: Path) -> None:
    teacher = Teacher(str(model(tmp_path)), "fp32")
    assert not teacher.network.training
    assert not any(p.requires_grad for p in teacher.network.parameters())


def test_a_document_that_begins_with_the_token_gets_no_second(tmp_path: Path) -> None:
    network = exact(model(tmp_path, begins=True))
    teacher, tokens = Teacher(str(tmp_path), "fp32"), np.array([BOS, 5, 6, 7, EOD])
    ((_, _, ours_SV),) = teacher.logits([tokens])
    theirs_SV = plain(network, tokens, None)[:, : teacher.tokens]
    assert (ours_SV - theirs_SV).abs().max() < 1e-5 * theirs_SV.abs().max()


def test_a_model_of_unknown_parts_serves_a_cache_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own forward pass is right, and its head and layers apart are not."""
    network = exact(model(tmp_path))

    def twice(self: Any) -> Any:
        return lambda **how: SimpleNamespace(last_hidden_state=2 * self.model(**how).last_hidden_state)

    monkeypatch.setattr("transformers.LlamaForCausalLM.get_decoder", twice)
    teacher, some = Teacher(str(tmp_path), "fp32"), documents(rows(1, 30)[0], EOD)
    for n, first, logits_NV in teacher.logits(some):
        theirs_NV = plain(network, some[n], None)[first : first + len(logits_NV), : teacher.tokens]
        assert (logits_NV - theirs_NV).abs().max() < 1e-5 * theirs_NV.abs().max()
    with pytest.raises(ValueError, match="do not give its logits; write a cache with it instead"):
        teacher.targets(None, 500)


def test_a_model_that_sees_what_follows_is_refused(tmp_path: Path) -> None:
    model(tmp_path, "bert")
    with pytest.raises(ValueError, match="depend on the tokens behind; take a causal model"):
        Teacher(str(tmp_path), "fp32")


@torch.no_grad()
def test_logits_that_are_not_finite_are_one_error(tmp_path: Path) -> None:
    network: Any = llama(tmp_path, len(byte_pairs(tmp_path)))
    network.model.layers[1].mlp.up_proj.weight[0, 0] = math.nan
    network.save_pretrained(tmp_path / "nan")
    byte_pairs(tmp_path / "nan")
    with pytest.raises(ValueError, match=r"nan: its logits are not finite; its weights are damaged"):
        Teacher(str(tmp_path / "nan"), "fp32")
    # Of one token that the first look does not meet.
    teacher, token_BS = Teacher(str(tmp_path), "fp32"), np.full((2, 6), 7)
    token_BS[1, 3] = 11
    assert 11 not in (torch.arange(16) * 7919 % teacher.tokens)
    teacher.network.get_input_embeddings().weight[11] = math.nan
    with process_groups(ParallelConfig()):
        target = teacher.targets(EOD, 500)(on_device(whole_batch(*_window(token_BS), None)))
    # They reach the loss, by which all ranks leave the step out.
    assert target.hidden_ND.isnan().any(1).view(6, 2).tolist() == [[False, True]] * 6


def test_files_describe_a_teacher(tmp_path: Path) -> None:
    """FLOP by torch's counter, which does not see attention."""
    folder = str(tmp_path / "a")
    network = exact(model(tmp_path / "a", begins=True))
    described = Described(folder)
    assert (described.bos, described.longest) == (BOS, 2048)
    assert described.parameters == sum(p.numel() for p in {*network.parameters()})
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.ones(1, 64, dtype=torch.int64))
    # Two products of width 32 with half of 64 keys, in 2 layers.
    attention = 2 * 2 * 2 * 32 * 32
    assert described.flops_per_token(64) == counter.get_total_flops() / 64 + attention
    assert Described(folder, "none").bos is None and Described(folder, 5).bos == 5
    with pytest.raises(ValueError, match=r"objective.bos=9999 is no token of .*; give another"):
        Described(folder, 9999)
    model(tmp_path / "other", begins=True)
    assert Described(str(tmp_path / "other")).identity == described.identity
    model(tmp_path / "more", begins=True, rms_norm_eps=1e-4)
    assert Described(str(tmp_path / "more")).identity != described.identity
    with pytest.raises(FileNotFoundError, match="no model at"):
        Described(str(tmp_path / "none"))
