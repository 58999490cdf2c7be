"""Ask-LLM (Sachdeva et al., 2024): the probability that a causal model answers "1" and not "0" on a document.

A prompt is a text with one `{document}`. What stands before it is the instruction: its keys and values are
computed once. What follows is the question. One forward pass a document reads both probabilities, and nothing
is generated. The order of a sequence's tokens:

    instruction | the document's first tokens | question and the beginning of the answer

With a chat template the prompt is the user's turn, and the answer is the first token of the assistant's.
Without one the answer follows "Answer:" and a space.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np
import torch

from megatron_r1.export.pretrained import Pretrained, cut
from megatron_r1.preprocess.tokenizer import HuggingFace
from megatron_r1.system.errors import shown

DOCUMENT = "{document}"
LABELS = ("1", "0")
_TEMPLATE = {"add_generation_prompt": True, "date_string": "26 Jul 2024", "enable_thinking": False}
"""The last two are for templates that write today's date, or let the model think before it answers."""


@dataclass
class _Prompt:
    before: list[int]
    """Ids of the instruction."""
    after: list[int]
    """Ids of the question and the beginning of the answer."""
    labels: list[int]
    """The next id for each of `LABELS`."""
    space: str
    """Between instruction and document, whose first token it may share."""
    keys: Any = None
    """Keys and values of the instruction."""


class _LabelHead(torch.nn.Module):
    """In place of a model's last layer: the logits of two tokens at each sequence's last position, [B, 1, 2].

    In float32, as a bf16 logit near 20 moves in steps of 0.125, and many documents would have one score.
    """

    def __init__(self, head: Any):
        super().__init__()
        self._head = head
        self.labels: list[int] = []
        self.last_B: Any = None

    def forward(self, hidden_BSD: torch.Tensor) -> torch.Tensor:
        rows = torch.arange(len(hidden_BSD), device=hidden_BSD.device)
        last_BD = hidden_BSD[rows, self.last_B].float()
        bias = None if self._head.bias is None else self._head.bias[self.labels].float()
        return torch.nn.functional.linear(last_BD, self._head.weight[self.labels].float(), bias)[:, None]


class Judge(Pretrained):
    """A causal language model that says whether a document belongs to a set.

    `tokens`: the first tokens of a document that are read. Errors as of `Pretrained`, and of `HuggingFace`
    for a tokenizer that names no end token.
    """

    automatic = "AutoModelForCausalLM"

    def __init__(self, model: str, tokens: int):
        super().__init__(model, tokens)
        # It makes no added token from text, whether it is called special or not.
        self._text = HuggingFace(self._folder)
        self.asked = cache(self._prompt_of)
        """Refuses a prompt, as `judge` does, before any weights are read."""

    @cached_property
    def _head(self) -> _LabelHead:
        network = self.network
        with self._fails_to("ask"):
            head = _LabelHead(network.get_output_embeddings())
            network.set_output_embeddings(head)
        return head

    def judge(self, texts: Sequence[str], prompt: str) -> np.ndarray:
        """P("1") / (P("1") + P("0")) of each text, [N] float32.

        ValueError for a prompt without an instruction and one `{document}`, for one that leaves no place for
        `tokens`, for a tokenizer by which a label is no single token there, for a chat template that puts
        something before the answer, and for a model whose layers are not all of attention: it has no keys to
        be computed once.
        """
        asked = self.asked(prompt)
        documents = self._text.encode_batch([asked.space + text for text in cut(texts, self.reads)])
        head = self._head
        head.labels = asked.labels

        def forward(ids_BS: torch.Tensor, mask_BS: torch.Tensor) -> torch.Tensor:
            if asked.keys is None:
                head.last_B = -1
                before_1S = torch.tensor([asked.before], device=ids_BS.device)
                asked.keys = self.network(input_ids=before_1S, use_cache=True).past_key_values
            keys = copy.deepcopy(asked.keys)
            keys.batch_repeat_interleave(len(ids_BS))
            head.last_B = mask_BS.sum(1) - 1
            # Nothing sees the padding, which comes after all: no mask is needed.
            logits_B1L = self.network(input_ids=ids_BS, past_key_values=keys).logits
            assert logits_B1L.shape[1:] == (1, len(LABELS)), "its logits do not come from its last layer"
            return logits_B1L.softmax(-1)[:, 0, 0]

        ids = [[*document[: self.reads], *asked.after] for document in documents]
        return self.run(ids, forward, len(asked.before))

    def _prompt_of(self, prompt: str) -> _Prompt:
        instruction, _, question = prompt.partition(DOCUMENT)
        if prompt.count(DOCUMENT) != 1 or not instruction.strip():
            fault = f"the prompt {shown(prompt)} has {prompt.count(DOCUMENT)} times {DOCUMENT}"
            raise ValueError(f"{fault}; it stands once, after an instruction")
        if self.tokenizer.chat_template:
            turns = [{"role": "user", "content": prompt}]
            with self._fails_to("prompt"):
                text = self.tokenizer.apply_chat_template(turns, tokenize=False, **_TEMPLATE)
            if text.count(DOCUMENT) != 1:
                raise ValueError(f"{self.model}: its chat template changes the prompt; take the template out")
            instruction, _, question = text.partition(DOCUMENT)
            if question.rstrip().endswith(("<think>", "<|start|>assistant")):
                fault = "its chat template lets it think, or write a header, before the answer"
                raise ValueError(f"{self.model}: {fault}; ask another model")
            answers = [(question, ""), (question, " ")]
        else:
            question = f"{question.rstrip()}\nAnswer:"
            # By many tokenizers " 1" is two tokens, the first of which is the space.
            answers = [(f"{question} ", ""), (question, " ")]
        before, (after, labels) = self._ids(instruction.rstrip()), self._labels(answers)
        # A template may write the beginning of a text itself.
        first = self.tokenizer("")["input_ids"][:1]
        if first == [self.tokenizer.bos_token_id] and before[:1] != first:
            before = first + before
        if (room := self.longest - len(before) - len(after)) < self.reads:
            raise ValueError(f"tokens={self.reads}: {self.model} has {room} beside the prompt; take fewer")
        return _Prompt(before, after, labels, space=instruction[len(instruction.rstrip()) :])

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def _labels(self, answers: Sequence[tuple[str, str]]) -> tuple[list[int], list[int]]:
        """Of (what is asked, what the label begins with) the first by which each label is one token more."""
        for asked, space in answers:
            ids, whole = self._ids(asked), [self._ids(f"{asked}{space}{label}") for label in LABELS]
            if all(one[:-1] == ids and one[-1] != self.tokenizer.unk_token_id for one in whole):
                return ids, [one[-1] for one in whole]
        asked = answers[0][0]
        spelled = {label: self.tokenizer.tokenize(f"{asked}{label}")[-3:] for label in LABELS}
        fault = f"after {asked[-12:]!r} a label is no single token: texts end in {shown(spelled)}"
        raise ValueError(f"{self.model}: {fault}; ask another model")
