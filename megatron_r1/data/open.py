"""Configuration -> corpora and the data plan. Imports no torch, so that `--check` is quick."""

from __future__ import annotations

import os

from megatron_r1 import config_io
from megatron_r1.config import Config
from megatron_r1.data.blend import BlendPlan, Phase
from megatron_r1.data.indexed import identity_of, open_corpus, read_sidecar
from megatron_r1.data.windows import sampled_mistakes
from megatron_r1.records import Corpus


def launched() -> tuple[int, int]:
    """This rank and how many there are, as a launcher says; (0, 1) where none says where they meet."""
    if "MASTER_PORT" not in os.environ:
        return 0, 1
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def resolve_data(config: Config, share: tuple[int, int] = (0, 1)) -> tuple[list[Corpus], BlendPlan]:
    """Open every dataset and lay the data plan. Raises ConfigError with every mistake.

    share: (rank, ranks) of a launch whose every rank calls this; each checks its part of every index.
    """
    corpora, mistakes = open_sources(config, share)
    if mistakes:
        raise config_io.ConfigError(mistakes)
    plan = build_plan(config, corpora)
    if mistakes := check_plan(config, plan):
        raise config_io.ConfigError(mistakes)
    return corpora, plan


def data_mistakes(config: Config, ranks: int | None = None) -> list[str]:
    """What is wrong with the datasets, or with training on `ranks` ranks (default: one model copy)."""
    ranks = config.parallel.model_ranks() if ranks is None else ranks
    return open_sources(config, launched())[1] + config_io.check_world(config, ranks)


def document_end(config: Config) -> int | None:
    """The token that ends each document where windows must not attend across them; else None."""
    if config.data.cross_documents:
        return None
    if config.data.eod is not None:
        return config.data.eod
    sidecar = read_sidecar(next(iter(config.data.sources.values())).prefix) or {}
    found = sidecar.get("eod")
    assert found is not None, "open_sources asks every sidecar"
    return int(found)


def open_sources(config: Config, share: tuple[int, int] = (0, 1)) -> tuple[list[Corpus], list[str]]:
    """The corpora that open, in order, and every mistake found. share: see `resolve_data`."""
    corpora: list[Corpus] = []
    mistakes: list[str] = []
    hashes: dict[str, str] = {}
    for name, source in config.data.sources.items():
        path = f"data.sources.{name}"
        try:
            corpus = open_corpus(name, source.prefix, source.documents, share)
        except (OSError, ValueError) as error:
            mistakes.append(f"{path}: {error}")
            continue
        corpora.append(corpus)
        if corpus.tokens <= config.data.seq_length:
            mistakes.append(
                f"{path}: {corpus.tokens} tokens are less than one window of data.seq_length="
                f"{config.data.seq_length}"
            )
        mistakes += _tokenizer_mistakes(path, corpus, hashes, config.model.vocab_size)
        mistakes += document_end_mistakes(path, source.prefix, config)
    for name, prefix in config.data.probes.items():
        path = f"data.probes.{name}"
        try:
            probe = open_corpus(name, prefix, share=share)
            mistakes += _tokenizer_mistakes(path, probe, hashes, config.model.vocab_size)
            mistakes += document_end_mistakes(path, prefix, config)
        except (OSError, ValueError) as error:
            mistakes.append(f"{path}: {error}")
    return corpora, mistakes


def _tokenizer_mistakes(path: str, corpus: Corpus, hashes: dict[str, str], vocab_size: int) -> list[str]:
    """Tokens of two tokenizers in one run, or ids that the model has no row for."""
    if corpus.tokenizer_hash is None:
        return [f"{path}: {mistake}" for mistake in sampled_mistakes(corpus, vocab_size)]
    out = []
    made_with = read_sidecar(corpus.prefix) or {}
    if made_with.get("vocab_size", 0) > vocab_size and corpus.tokenizer_hash not in hashes.values():
        out.append(
            f"{path}: its tokenizer has {made_with['vocab_size']} tokens, model.vocab_size={vocab_size} "
            f"fewer; set model.vocab_size={made_with['vocab_size']} or preprocess with the model's tokenizer"
        )
    hashes[path] = corpus.tokenizer_hash
    other = next(iter(hashes))
    if hashes[other] != corpus.tokenizer_hash:
        out.append(
            f"{path}: made with tokenizer {corpus.tokenizer_hash[:12]}, {other} with {hashes[other][:12]}; "
            f"preprocess both with the same one"
        )
    return out


def document_end_mistakes(path: str, prefix: str, config: Config) -> list[str]:
    """Datasets whose documents cannot be told apart, though `data.cross_documents` is false."""
    if config.data.cross_documents:
        return []
    sidecar = read_sidecar(prefix)
    if sidecar is None:
        if config.data.eod is not None:
            return []
        return [
            f"{path}: {prefix} has no sidecar that names its end-of-document token, which "
            f"data.cross_documents=false needs; set data.eod"
        ]
    if not sidecar.get("append_eod"):
        return [
            f"{path}: {prefix} was preprocessed without --append-eod, so data.cross_documents=false cannot "
            f"tell its documents apart; preprocess it again with --append-eod (a probing set: curate it with "
            f"--end-documents)"
        ]
    if config.data.eod is not None and sidecar.get("eod") != config.data.eod:
        return [f"{path}: its documents end with token {sidecar.get('eod')}, not data.eod={config.data.eod}"]
    return []


def build_plan(config: Config, corpora: list[Corpus]) -> BlendPlan:
    """The data plan of all phases. A phase begins at the sample where the one before it ends.

    Raises ConfigError for a phase that draws nothing, or whose keep masks do not fit.
    """
    data = config.data
    windows = {corpus.name: corpus.windows(data.seq_length) for corpus in corpora}
    plan = BlendPlan(windows, seed=data.seed, order=data.order, shuffle=data.shuffle)
    start = 0
    for name, phase in config.phases.items():
        weights = config.phase_weights(name)
        if data.order == "megatron":
            # Its greedy rule takes weights as they are, and Megatron gives it shares.
            total = sum(weights.values())
            weights = {source: weight / total for source, weight in weights.items()}
        try:
            plan.add_phase(start, weights, max_epochs=phase.max_epochs, keep=phase.keep)
        except (OSError, ValueError) as error:
            raise config_io.ConfigError([f"phases.{name}: {error}"]) from None
        if mistakes := _mask_mistakes(f"phases.{name}.keep", config, plan.phases[-1]):
            raise config_io.ConfigError(mistakes)
        start += config.phase_steps(name) * config.train.global_batch
    return plan


def _mask_mistakes(path: str, config: Config, phase: Phase) -> list[str]:
    """Masks over documents that were made for another length or another dataset."""
    out = []
    for name, mask in phase.keep.items():
        prefix = config.data.sources[name].prefix
        if mask.seq_length not in (None, config.data.seq_length):
            out.append(
                f"{path}.{name}: {mask.path} was made for windows of {mask.seq_length} tokens, not "
                f"data.seq_length={config.data.seq_length}; make it again"
            )
        elif mask.corpus is not None and mask.corpus != identity_of(prefix):
            out.append(
                f"{path}.{name}: {mask.path} was made for another dataset than {prefix}; make it again"
            )
    return out


def identities(config: Config) -> dict[str, str]:
    """Of every source's dataset."""
    return {name: identity_of(source.prefix) for name, source in config.data.sources.items()}


def check_plan(config: Config, plan: BlendPlan) -> list[str]:
    """Mistakes that only the plan can tell: epoch caps that leave nothing to draw before the end."""
    last = sum(config.phase_steps(name) for name in config.phases) * config.train.global_batch - 1
    try:
        plan.locate(last)
    except IndexError as error:
        return [f"phases: {error}"]
    return []
