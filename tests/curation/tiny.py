"""Small random models of Hugging Face, as folders, and texts that are in no order of length."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

WORDS = [
    "the",
    "cat",
    "sat",
    "on",
    "a",
    "mat",
    "and",
    "read",
    "books",
    "about",
    "rain",
    "12",
    "times",
    "slept",
]
CONTROL = ["<|im_start|>", "<|im_end|>", "<tool>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def texts(count: int, seed: int = 0, most: int = 60) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, most, (count,), generator=generator).tolist()
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist())
        for n in lengths
    ]


def word_pieces(folder: Path) -> Any:
    """As BERT's: lower case, [CLS] and [SEP] around a text."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=150, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([*texts(50), "[ ] CLS SEP MASK"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{one[1:-1].lower()}_token": one for one in special}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=48, **names)
    fast.save_pretrained(folder)
    return fast


def bert(folder: Path, labels: int | None = 1, **more: Any) -> Any:
    """A classifier with so many labels; None: the bare model."""
    torch.manual_seed(1)
    vocabulary = len(word_pieces(folder))
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = BertConfig(
        vocab_size=vocabulary, max_position_embeddings=64, initializer_range=0.3, **sizes, **more
    )
    if labels is not None:
        config.num_labels = labels
    model: Any = (BertModel if labels is None else BertForSequenceClassification)(config).eval()
    model.save_pretrained(folder)
    return model


def byte_pairs(
    folder: Path, digits: bool = True, template: str | None = None, begins: bool = False, words: bool = False
) -> Any:
    """As SmolLM2's, with digits apart; without, " 1" is one token. begins: a text begins with <s>."""
    tokenizer = Tokenizer(models.BPE())
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False)
    apart = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*apart, bytes_alone])  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>", *CONTROL[:2]],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*texts(50), "Answer: 1", " 1", " 0", " 1 0" * 9], trainer)
    tokenizer.add_tokens([CONTROL[2]])
    if begins:
        tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    fast.save_pretrained(folder)
    return fast


def llama(folder: Path, vocabulary: int, **more: Any) -> Any:
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(
        vocab_size=vocabulary, max_position_embeddings=512, initializer_range=0.3, **sizes, **heads, **more
    )
    model: Any = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    return model
