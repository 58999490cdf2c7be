"""Scores by pretrained models are those of one plain forward pass a text, in the order of the texts."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.utils import filter_repo_objects
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from megatron_r1 import backend
from megatron_r1.curation.models import Embedder
from megatron_r1.curation.quality import Classifier, Head
from megatron_r1.export import pretrained
from megatron_r1.export.pretrained import batches
from tests.curation.tiny import bert, byte_pairs, texts, word_pieces


@pytest.fixture(autouse=True)
def _exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "fast_precision", lambda: "fp32")


def one_by_one(folder: Path, some: list[str], tokens: int) -> list[Any]:
    """A plain pass for each text, without padding and without anything of ours: outputs of the base model."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    out = []
    for text in some:
        ids = tokenizer(text, truncation=True, max_length=tokens, return_tensors="pt")
        with torch.no_grad():
            out.append(model(**ids, output_hidden_states=True))
    return out


def test_a_regression_s_scores_are_its_logits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path)
    monkeypatch.setattr(pretrained, "BATCH_TOKENS", 100)
    some = texts(40)
    found = Classifier(str(tmp_path), 20)(some)
    expected = [float(out.logits[0, 0]) for out in one_by_one(tmp_path, some, 20)]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    # Lengths and scores differ, so another order would show.
    assert np.std(expected) > 0.1


@pytest.mark.parametrize("kind", ["single_label_classification", "multi_label_classification"])
def test_a_label_s_score_is_its_probability(tmp_path: Path, kind: str) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    bert(tmp_path, 3, problem_type=kind, id2label=names, label2id={v: k for k, v in names.items()})
    some = texts(12)
    found = Classifier(str(tmp_path), 30, label="good")(some)
    for score, out in zip(found, one_by_one(tmp_path, some, 30), strict=True):
        exp = out.logits[0].double().exp()
        expected = exp[2] / exp.sum() if kind.startswith("single") else exp[2] / (1 + exp[2])
        assert float(score) == pytest.approx(float(expected), abs=1e-5)


def test_labels_are_named_and_known(tmp_path: Path) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    bert(tmp_path / "three", 3, id2label=names, label2id={v: k for k, v in names.items()})
    bert(tmp_path / "one")
    three, one = str(tmp_path / "three"), str(tmp_path / "one")
    with pytest.raises(ValueError, match=r"has the labels \['bad', 'fair', 'good'\].*name one of several"):
        Classifier(three, 20)
    with pytest.raises(ValueError, match=r"label=goood.*did you mean good"):
        Classifier(three, 20, label="goood")
    with pytest.raises(ValueError, match=r"label=good.*none of one"):
        Classifier(one, 20, label="good")


def test_embeddings_are_means_of_norm_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path)
    monkeypatch.setattr(pretrained, "BATCH_TOKENS", 100)
    some = texts(30)
    found = Embedder(str(tmp_path), 20)(some)
    for row, out in zip(found, one_by_one(tmp_path, some, 20), strict=True):
        mean = out.hidden_states[-1][0].double().mean(0)
        np.testing.assert_allclose(row, mean / mean.norm(), atol=1e-5)


@pytest.mark.parametrize("said", [{"pooling_mode_cls_token": True}, {"pooling_mode": "cls"}])
def test_the_first_token_s_embedding_where_the_folder_says_so(tmp_path: Path, said: dict[str, Any]) -> None:
    bert(tmp_path)
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text(json.dumps({"pooling_mode_mean_tokens": False, **said}))
    some = texts(5)
    found = Embedder(str(tmp_path), 20)(some)
    for row, out in zip(found, one_by_one(tmp_path, some, 20), strict=True):
        first = out.hidden_states[-1][0, 0].double()
        np.testing.assert_allclose(row, first / first.norm(), atol=1e-5)


def test_other_poolings_and_modules_are_refused(tmp_path: Path) -> None:
    bert(tmp_path)
    for content in ('{"type": 1}', '["Pooling"]', "3", '[{"type": ["Pooling"]}]'):
        (tmp_path / "modules.json").write_text(content)
        with pytest.raises(ValueError, match=r"modules\.json: a module.* is .*; take another model"):
            Embedder(str(tmp_path), 20)
    (tmp_path / "modules.json").unlink()
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode": ["mean"]}')
    with pytest.raises(ValueError, match="pooling by"):
        Embedder(str(tmp_path), 20)
    (tmp_path / "1_Pooling/config.json").write_text('{"pooling_mode_max_tokens": true}')
    with pytest.raises(
        ValueError, match="pooling by 'max_tokens'; a transformer with pooling by mean or cls"
    ):
        Embedder(str(tmp_path), 20)
    shutil.rmtree(tmp_path / "1_Pooling")
    kinds = [{"type": f"sentence_transformers.models.{name}"} for name in ("Transformer", "Dense")]
    (tmp_path / "modules.json").write_text(json.dumps(kinds))
    with pytest.raises(ValueError, match=r"modules \['Dense', 'Transformer'\]"):
        Embedder(str(tmp_path), 20)


def test_control_tokens_in_a_text_stay_text(tmp_path: Path) -> None:
    bert(tmp_path)
    (ids,) = Embedder(str(tmp_path), 40).encode(["the cat [SEP] [MASK] sat"])
    assert sorted({*ids} & {0, 2, 3, 4}) == [2, 3]
    assert ids[0] == 2
    assert ids[-1] == 3
    assert ids.count(3) == 1


def test_models_whose_scores_depend_on_the_texts_beside_are_refused(tmp_path: Path) -> None:
    vocabulary = len(word_pieces(tmp_path))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("fnet", vocab_size=vocabulary, **sizes)
    model = AutoModelForSequenceClassification.from_config(config).eval()
    ids = torch.tensor([[2, 7, 8, 3]])
    padded = model(torch.nn.functional.pad(ids, (0, 9)), attention_mask=torch.arange(13)[None] < 4)
    assert not torch.allclose(padded.logits, model(ids).logits, atol=1e-3)
    model.save_pretrained(tmp_path)
    for kind in (Classifier, Embedder):
        with pytest.raises(ValueError, match="scores of fnet depend on the texts beside"):
            kind(str(tmp_path), 20)


def test_a_model_that_does_not_run_is_one_error(tmp_path: Path) -> None:
    """A position more than the model has: the file of its tokenizer says nothing of them."""
    vocabulary = len(word_pieces(tmp_path))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model(
        "roberta", vocab_size=vocabulary, pad_token_id=1, max_position_embeddings=48, **sizes
    )
    AutoModel.from_config(config).save_pretrained(tmp_path)
    assert Embedder(str(tmp_path), 46)([" ".join(texts(9))]).shape == (1, 32)
    with pytest.raises(ValueError, match=r"transformers .* does not run it so: index 48 is out"):
        Embedder(str(tmp_path), 48)([" ".join(texts(9))])


def test_a_text_without_tokens_has_a_score_of_its_own(tmp_path: Path) -> None:
    vocabulary = len(byte_pairs(tmp_path))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = AutoConfig.for_model("llama", vocab_size=vocabulary, pad_token_id=1, num_labels=1, **sizes)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    score = Classifier(str(tmp_path), 20)
    np.testing.assert_allclose(score(["", "a cat on the mat"])[0], score([""])[0], atol=1e-6)


def test_a_text_is_cut_to_its_first_tokens(tmp_path: Path) -> None:
    bert(tmp_path)
    text = " ".join(texts(30))
    embed = Embedder(str(tmp_path), 12)
    (ids,) = embed.encode([text])
    # A tokenizer that says otherwise would take the last ones.
    assert ids == AutoTokenizer.from_pretrained(tmp_path)(text, truncation=True, max_length=12)["input_ids"]
    with pytest.raises(ValueError, match=r"tokens=49: .* takes 1 to 48"):
        Embedder(str(tmp_path), 49)


def test_weights_that_are_missing_are_not_drawn_at_random(tmp_path: Path) -> None:
    bert(tmp_path, None, num_labels=1)
    with pytest.raises(
        ValueError, match=r"its files lack classifier.bias, classifier.weight of Bert.*trained"
    ):
        Classifier(str(tmp_path), 20)(["a cat"])
    # The bare model is enough for embeddings.
    assert Embedder(str(tmp_path), 20)(["a cat"]).shape == (1, 32)


def test_models_that_are_not_there_or_not_safe(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model at org/name \(a name on the .* ORG/NAME@COMMIT"):
        Embedder("org/name")
    with pytest.raises(ValueError, match=r"org/name@abc is no folder here.*hf download org/name"):
        Embedder("org/name@abc")
    model = bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"neither model.safetensors nor .* but pytorch_model.bin"):
        Embedder(str(tmp_path), 20)


def test_a_name_on_the_hub_is_fetched_at_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path)
    asked = []

    def fetch(name: str, revision: str, allow_patterns: list[str]) -> str:
        there = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")]
        asked.append((name, revision, sorted(filter_repo_objects(there, allow_patterns=allow_patterns))))
        return str(tmp_path)

    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    (tmp_path / "consolidated.safetensors").write_bytes(b"")
    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    Embedder("org/name@abc", 20)
    files = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    assert asked == [("org/name", "abc", files)]


def test_code_of_a_model_is_not_run(tmp_path: Path) -> None:
    bert(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "theirs", "auto_map": {"AutoConfig": "theirs.C", "AutoModel": "theirs.M"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "theirs.py").write_text("raise SystemExit('it ran')")
    with pytest.raises(ValueError, match=r"transformers .* does not load it"):
        Embedder(str(tmp_path), 20)


def test_scores_that_are_not_finite_are_an_error(tmp_path: Path) -> None:
    model = bert(tmp_path)
    model.classifier.bias.data[0] = torch.nan
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"in torch\.float32 for 2 texts are not all finite"):
        Classifier(str(tmp_path), 20)(["a cat", "a mat"])


def test_the_identity_tells_what_decides_a_score(tmp_path: Path) -> None:
    names = {"id2label": {0: "bad", 1: "good"}, "label2id": {"bad": 0, "good": 1}}
    model = bert(tmp_path / "a", 2, **names)
    shutil.copytree(tmp_path / "a", tmp_path / "b")

    def identity(folder: str = "a", tokens: int = 20, label: str = "good") -> str:
        return Classifier(str(tmp_path / folder), tokens, label).identity

    first = identity()
    assert identity("b") == first
    assert (
        len({first, identity(tokens=21), identity(label="bad"), Embedder(str(tmp_path / "a"), 20).identity})
        == 4
    )
    tokenizer = tmp_path / "b/tokenizer.json"
    tokenizer.write_text(tokenizer.read_text().replace('"cat"', '"tac"'))
    changed = identity("b")
    model.classifier.bias.data += 1
    model.save_pretrained(tmp_path / "a")
    assert len({first, changed, identity("a")}) == 3


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    bert(tmp_path)
    score = Classifier(str(tmp_path), 40)
    (ids,) = score.encode([" ".join(texts(9))])
    network = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(torch.tensor([ids]))
    # The pooler and the head are counted as if they ran at each token.
    assert score.flops(len(ids)) == pytest.approx(counter.get_total_flops(), rel=0.08)
    assert score.flops(1000) == score.flops(40)


@given(st.lists(st.integers(0, 60), max_size=40), st.integers(1, 200), st.integers(0, 30))
def test_batches_hold_each_sequence_once_within_the_budget(
    lengths: list[int], budget: int, before: int
) -> None:
    found = list(batches(np.array(lengths, dtype=np.int64), budget, before))
    assert sorted(n for batch in found for n in batch) == [*range(len(lengths))]
    longest = [max(lengths[n] for n in batch) for batch in found]
    assert longest == sorted(longest, reverse=True)
    for batch, most in zip(found, longest, strict=True):
        assert len(batch) == 1 or len(batch) * (before + most) <= budget


def labelled(folder: Path, lines: list[Any]) -> Path:
    path = folder / "labelled.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_head_learns_what_embeddings_tell(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    embed, some = Embedder(str(tmp_path / "model"), 20), texts(60, seed=3)
    direction = np.random.default_rng(0).normal(size=32)
    truth = embed(some) @ direction
    path = labelled(tmp_path, [{"text": t, "score": float(s)} for t, s in zip(some, truth, strict=True)])
    head, new = Head(str(tmp_path / "model"), path, 20), texts(30, seed=4)
    assert head.correlation > 0.9
    assert np.corrcoef(head(new), embed(new) @ direction)[0, 1] > 0.95
    assert head.flops(20) == embed.flops(20)
    # Scores that have nothing to do with the texts are not predicted.
    noise = np.random.default_rng(1).normal(size=60)
    path = labelled(tmp_path, [{"text": t, "score": float(s)} for t, s in zip(some, noise, strict=True)])
    other = Head(str(tmp_path / "model"), path, 20)
    assert abs(other.correlation) < 0.5
    assert other.identity != head.identity


def test_a_text_does_not_predict_itself(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    noise = np.random.default_rng(1).normal(size=20)
    twice = [{"text": t, "score": float(s)} for t, s in zip(texts(20, seed=3), noise, strict=True)] * 5
    assert Head(str(tmp_path / "model"), labelled(tmp_path, twice), 20).correlation < 0.5


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (
            [{"text": t, "score": i} for i, t in enumerate(texts(7))],
            "7 different texts and 7 different scores",
        ),
        ([{"text": "a cat", "score": i} for i in range(20)], "1 different texts"),
        ([{"text": t, "score": 3} for t in texts(20)], "1 different scores; label at least 8"),
        ([{"text": "a", "score": 1}, {"text": "b"}], "line 2: its object lacks score"),
        ([{"text": "a", "score": True}], r"line 1: its object\.score is True"),
        ([{"text": "a", "score": math.nan}], "line 1: its score is nan; name one within"),
        ([{"text": "a", "score": -1e300}], r"line 1: its score is -1e\+300"),
        ([{"text": "", "score": 1}], "line 1: empty document"),
        (["a"], "line 1: bad JSON|line 1: .*object"),
        ([], "0 different texts"),
    ],
)
def test_labelled_texts_that_teach_nothing_are_refused(
    tmp_path: Path, lines: list[Any], message: str
) -> None:
    bert(tmp_path / "model")
    with pytest.raises(ValueError, match=message):
        Head(str(tmp_path / "model"), labelled(tmp_path, lines), 20)
