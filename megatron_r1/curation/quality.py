"""Quality of documents: by a classifier of others, or by a head trained here on a few labelled examples."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_r1.curation.models import Embedder
from megatron_r1.export.pretrained import Pretrained
from megatron_r1.preprocess.documents import MOST_BYTES
from megatron_r1.preprocess.rows import parse, refused_line, text_of
from megatron_r1.system.errors import require, rewording, shown, suggest
from megatron_r1.system.files import regular
from megatron_r1.system.json_io import mistake
from megatron_r1.system.terminal import say


class Classifier(Pretrained):
    """A sequence classifier: the output of a model with one, or the probability of `label`.

    A model with one output is FineWeb-Edu's kind, whose scores are 0 to 5. ValueError for a model with
    several labels where none is named, or one that it does not have.
    """

    automatic = "AutoModelForSequenceClassification"

    def __init__(self, model: str, tokens: int, label: str | None = None):
        super().__init__(model, tokens, label=label)
        names = [str(name) for _, name in sorted(self.config.id2label.items())]
        if (len(names) == 1) != (label is None) or names.count(label or names[0]) != 1:
            fault = f"label={label}: {model} has the labels {shown(names)}{suggest(label or '', names)}"
            raise ValueError(f"{fault}; name one of several, whose probability is the score, and none of one")
        if (pad := getattr(self.config, "pad_token_id", None)) is None or pad < 0:
            raise ValueError(
                f"{model}: its config.json has no pad_token_id, by which batches are read; add it"
            )
        self._label = None if label is None else names.index(label)
        # Labels of which several may hold have a probability each.
        several = self.config.problem_type == "multi_label_classification"
        self._probability: Any = torch.sigmoid if several else lambda logits_BL: logits_BL.softmax(-1)

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores, [N] float32."""

        def forward(ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
            logits_BL = self.network(input_ids=ids_BS, attention_mask=mask_BS).logits.float()
            return logits_BL[:, 0] if self._label is None else self._probability(logits_BL)[:, self._label]

        return self.run(self.encode(texts), forward)


FEWEST, _MOST = 8, 1e9
"""Labelled texts that a head is trained on, at least; the largest score of one."""


class Head:
    """Ridge regression from sentence embeddings to the scores of labelled texts, trained at the first use.

    `labelled`: JSON lines of `text` and `score`. ValueError that names the line for one without them, for
    fewer than `FEWEST` different texts, and for texts of one score.
    """

    def __init__(self, model: str, labelled: str | Path, tokens: int):
        require("sklearn", "a quality head", "scikit-learn")
        self.embed, self._labelled, self._examples = Embedder(model, tokens), labelled, _read(labelled)
        texts, scores = {text for text, _ in self._examples}, {score for _, score in self._examples}
        if len(texts) < FEWEST or len(scores) < 2:
            fault = f"{labelled} has {len(texts)} different texts and {len(scores)} different scores"
            raise ValueError(f"{fault}; label at least {FEWEST}, with high and low scores")

    @cached_property
    def identity(self) -> str:
        """SHA-256 over the embedding model, its tokens and the labelled texts."""
        return hashlib.sha256(f"{self.embed.identity} {json.dumps(self._examples)}".encode()).hexdigest()

    def flops(self, tokens: float) -> float:
        """Operations for one document of so many tokens."""
        return self.embed.flops(tokens)

    @cached_property
    def _fitted(self) -> tuple[Any, float]:
        from sklearn.linear_model import RidgeCV
        from sklearn.model_selection import GroupKFold, cross_val_predict

        texts, score_N = zip(*self._examples, strict=True)
        ridge, embedding_ND = RidgeCV(alphas=np.logspace(-3, 3, 13)), self.embed(texts)
        # A text that comes twice is in one fold.
        predicted_N = cross_val_predict(ridge, embedding_ND, score_N, groups=texts, cv=GroupKFold(5))
        correlation = float(np.corrcoef(predicted_N, score_N)[0, 1]) if np.ptp(predicted_N) else 0.0
        say(f"{self._labelled}: {len(texts)} texts, cross-validated correlation {correlation:.2f}")
        return ridge.fit(embedding_ND, score_N), correlation

    @property
    def correlation(self) -> float:
        """Of the labelled scores with predictions by heads that were trained without the text."""
        return self._fitted[1]

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Scores, [N] float32, on the scale of the labelled ones."""
        embedding_ND = self.embed(texts)
        return self._fitted[0].predict(embedding_ND).astype(np.float32) if len(texts) else embedding_ND


def _read(path: str | Path) -> list[tuple[str, float]]:
    examples = []
    with open(path, "rb", opener=regular) as lines:
        for number, line in enumerate(lines, 1):
            with rewording(partial("{}, line {}: {}".format, path, number)):
                if (record := parse(refused_line(line, len(line), MOST_BYTES))) is not None:
                    if wrong := mistake(record, {"text": str, "score": float}):
                        raise ValueError(f"its object{wrong}; a line has a text and a number as its score")
                    if not abs(record["score"]) <= _MOST:
                        raise ValueError(f"its score is {record['score']}; name one within {_MOST:g}")
                    examples.append((text_of(record, "text")[0], float(record["score"])))
    return examples
