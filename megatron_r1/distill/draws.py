"""What decides a teacher's cache, and its records: drawn from logits, packed, unpacked.

A sampled record is `draws` points of the distribution: ids with counts. Counts over `draws` are an unbiased
estimate of every probability, so the gradient of the KL is unbiased too. The points are (u + j) / draws of
the cumulated distribution, with one uniform u a record (systematic sampling). On encyclopedia, code and
mathematics (SmolLM2-135M) their squared error is 3.1 to 5.6 times smaller than that of as many independent
draws, with a tenth more ids. u is a hash of seed, document and offset: batches, ranks and threads do not
change it. A top-k record is the k largest probabilities, and the mass of all other tokens is one outcome.

This file imports torch only to draw.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import numpy as np
import xxhash
from pydantic import TypeAdapter

from megatron_r1._csrc import draw as draw_on_cpu
from megatron_r1.config import NaturalInt, PositiveFloat, PositiveInt, Section, Seed, Text, limit
from megatron_r1.run.stage import standing
from megatron_r1.system.errors import brief, rewording
from megatron_r1.system.files import make_folder, write_json
from megatron_r1.system.json_io import read_object

if TYPE_CHECKING:
    from torch import Tensor

_NATS = 32.0
"""Largest -ln p of a top-k record."""
_AT_ONCE = {"cpu": 1 << 18}
"""Logits that torch takes at once, by the kind of device: as many as a cache holds; elsewhere 2^24."""
_MOST = limit(lambda v: 1 <= v <= 256, "must be from 1 to 256")


@dataclass(frozen=True)
class Header(Section):
    """All that decides the bytes of a cache."""

    teacher: Text
    """Its identity (distill/teacher.py)."""
    vocabulary: Text
    """Identity of its tokenizer's ids (distill/vocabulary.py)."""
    tokens: Annotated[int, limit(lambda v: 2 <= v <= 1 << 24, "must be from 2 to 2^24")]
    """Ids of the vocabulary without padding."""
    temperature: PositiveFloat
    draws: Annotated[int, _MOST] | None
    """Points of a sampled record; None: top-k records."""
    top_k: Annotated[int, _MOST] | None
    seed: Seed
    bos: NaturalInt | None
    """Token before each document for the teacher."""
    context: PositiveInt
    """Most tokens that the teacher sees at once."""
    format: Literal[1] = 1

    def __post_init__(self) -> None:
        if (self.draws is None) == (self.top_k is None):
            raise ValueError("give draws, or top_k, and not both")
        # JSON writes 1 and 1.0 apart.
        object.__setattr__(self, "temperature", float(self.temperature))

    @property
    def most(self) -> int:
        """Most ids of a record."""
        return min(self.draws or self.top_k or 0, self.tokens)

    @property
    def digest(self) -> bytes:
        return xxhash.xxh3_128_digest(json.dumps(asdict(self), sort_keys=True).encode())

    @classmethod
    def read(cls, folder: Path) -> Header:
        """The header of a folder. FileNotFoundError without one, ValueError for a damaged one."""
        path = folder / "header.json"
        if not path.is_file():
            raise FileNotFoundError(f"{folder} holds no teacher cache; tools/cache_teacher.py writes one")
        content = read_object(path, 1 << 16)
        way_out = "restore it, or write the cache anew"
        with rewording(lambda error: f"{path} is damaged: {brief(str(error))}; {way_out}"):
            return TypeAdapter(cls).validate_python(content)

    def write(self, folder: Path) -> None:
        """Make the folder this header's. ValueError where it is another's, with what differs."""
        make_folder(folder)
        theirs = asdict(Header.read(folder)) if (folder / "header.json").exists() else None
        refusal = f"{folder} is a cache of another header"
        standing(theirs, asdict(self), lambda: True, refusal, "name another folder")
        if theirs is None:
            write_json(folder / "header.json", asdict(self))


class Drawn(NamedTuple):
    """Records of consecutive offsets. Axis N: records, E: entries of all of them, ids of each ascending."""

    id_E: np.ndarray
    count_E: np.ndarray
    """Points that fell on the id; of a top-k record -ln p in the 65,535 steps of `_decoded`."""
    distinct_N: np.ndarray
    """Entries of each record."""
    entropy_N: np.ndarray
    """Of the whole distribution, nats, float32."""


def draw(logits_NV: Tensor, header: Header, document: bytes, first: int) -> Drawn:
    """Records from the teacher's logits at offsets [first, first + N) of the document with this hash.

    Logits of float32 or bfloat16. Columns from `header.tokens` on are padding, and not read. ValueError for
    logits that are not finite, or of fewer tokens.
    """
    import torch

    if logits_NV.shape[1] < header.tokens:
        raise ValueError(f"logits of {logits_NV.shape[1]} tokens, where the cache has {header.tokens}")
    logits_NV = logits_NV[:, : header.tokens]
    if header.draws is None:
        id_NK, nats_NK, entropy_N = _largest(logits_NV, header)
    else:
        uniform_N = uniforms(header.seed, document, first, len(logits_NV))
        if logits_NV.device.type == "cpu":
            logits_NV = logits_NV.contiguous()
            bits = logits_NV.view(torch.uint16) if logits_NV.dtype == torch.bfloat16 else logits_NV.float()
            sizes = header.tokens, 1 / header.temperature, uniform_N, header.draws
            id_NK, entropy_N = draw_on_cpu(bits.numpy().ravel(), *sizes)
        else:
            id_NK, entropy_N = draw_on_device(logits_NV, header.temperature, uniform_N, header.draws)
    if not np.isfinite(entropy_N).all():
        offset = first + int(np.argmin(np.isfinite(entropy_N)))
        fault = f"the teacher's logits behind token {offset} of document {document.hex()} are not finite"
        raise ValueError(f"{fault}; set train.precision=fp32, or take another teacher")
    if header.draws is None:
        step_NK = _coded(nats_NK, _NATS, 16, np.ceil)
        return Drawn(id_NK.ravel(), step_NK.ravel(), np.full(len(id_NK), header.most), entropy_N)
    new_NK = np.ones(id_NK.shape, bool)
    new_NK[:, 1:] = id_NK[:, 1:] != id_NK[:, :-1]
    at_E = np.flatnonzero(new_NK)
    return Drawn(id_NK.ravel()[at_E], np.diff(np.append(at_E, id_NK.size)), new_NK.sum(1), entropy_N)


def uniforms(seed: int, document: bytes, first: int, count: int) -> np.ndarray:
    """u of [0, 1) for offsets [first, first + count): Philox, the offset being its counter. float64."""
    key = xxhash.xxh3_128_intdigest(seed.to_bytes(8, "little") + document)
    raw_N = np.random.Philox(key=key, counter=first).random_raw(4 * count)[::4]
    return (raw_N >> np.uint64(11)) * 2.0**-53


def draw_on_device(
    logits_NV: Tensor, temperature: float, uniform_N: np.ndarray, draws: int
) -> tuple[np.ndarray, np.ndarray]:
    """Ids at the points (u + j) / draws of each row [N, draws], and entropies [N], by torch alone."""
    import torch

    ids, entropies = [], []
    parts = _parts(logits_NV)
    uniforms = torch.from_numpy(uniform_N).split(len(parts[0]))
    for some_NV, uniform in zip(parts, uniforms, strict=True):
        share_NV = (some_NV.float() / temperature).softmax(-1)
        sum_NV = share_NV.cumsum(-1, dtype=torch.float64)
        total_N1 = sum_NV[:, -1:]
        place_NK = (uniform[:, None] + torch.arange(draws)).to(total_N1.device) / draws * total_N1
        # Below the total, so that an id with mass holds it.
        place_NK = torch.minimum(place_NK, total_N1.nextafter(torch.zeros_like(total_N1)))
        ids.append(torch.searchsorted(sum_NV, place_NK, right=True).clamp_(max=some_NV.shape[1] - 1))
        entropies.append(torch.special.entr(share_NV).sum(-1))
    return torch.cat(ids).int().cpu().numpy(), torch.cat(entropies).float().cpu().numpy()


def _parts(logits_NV: Tensor) -> tuple[Tensor, ...]:
    return logits_NV.split(max(1, _AT_ONCE.get(logits_NV.device.type, 1 << 24) // logits_NV.shape[1]))


def _largest(logits_NV: Tensor, header: Header) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids of the k largest logits of each row, ascending, their -ln p, and the row's entropy."""
    import torch

    found = []
    for some_NV in _parts(logits_NV):
        nats_NV = -(some_NV.float() / header.temperature).log_softmax(-1)
        id_NK = nats_NV.topk(header.most, largest=False).indices.sort(-1).values
        entropy_N = torch.special.entr((-nats_NV).exp()).sum(-1)
        found.append((id_NK.int(), nats_NV.gather(-1, id_NK), entropy_N))
    return tuple(torch.cat(some).cpu().numpy() for some in zip(*found, strict=True))  # type: ignore[return-value]


def _coded(value: np.ndarray, most: float, bits: int, rounding: np.ufunc = np.rint) -> np.ndarray:
    """Steps of [0, most], the finer the smaller the value."""
    return rounding(np.sqrt(np.clip(value / most, 0, 1)) * ((1 << bits) - 1)).astype(np.int64)


def _decoded(step: np.ndarray, most: float, bits: int) -> np.ndarray:
    return (most * (step / ((1 << bits) - 1)) ** 2).astype(np.float32)


def _sizes(header: Header) -> tuple[int, int, float]:
    """Bits of an id above 16, bits of an entropy, and the largest entropy."""
    high = max(0, (header.tokens - 1).bit_length() - 16)
    return high, 16 - (header.most - 1).bit_length(), float(np.log(header.tokens))


def pack(header: Header, drawn: Drawn) -> bytes:
    """Records as the body of a block, five streams:

    head     2 bytes a record: entries - 1, and in the bits that are left its entropy
    low      2 bytes an entry: the id's lower 16 bits
    high     the id's other bits, as many as the vocabulary needs, bit by bit
    several  of sampled records, 1 bit an entry: whether its count is above 1
    count    1 byte for each of these: count - 1; of top-k records 2 bytes an entry: -ln p, coded

    The largest entropy is ln(tokens). Values are coded by the square root, so that small ones are precise.
    """
    high, bits, most = _sizes(header)
    head_N = (drawn.distinct_N - 1) | (_coded(drawn.entropy_N, most, bits) << (16 - bits))
    id_E, count_E = drawn.id_E.astype(np.int64), drawn.count_E
    streams = [head_N.astype("<u2"), (id_E & 0xFFFF).astype("<u2")]
    streams.append(np.packbits((id_E[:, None] >> np.arange(16, 16 + high)) & 1))
    if header.draws is None:
        return b"".join(stream.tobytes() for stream in (*streams, count_E.astype("<u2")))
    streams += [np.packbits(count_E > 1), (count_E[count_E > 1] - 1).astype(np.uint8)]
    return b"".join(stream.tobytes() for stream in streams)


def unpack(
    header: Header, body: bytes, records: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Ids and shares of all entries, number of entries and entropy of each record. ValueError for a body that
    is not of so many records."""
    high, bits, most = _sizes(header)
    fault, at = ValueError(f"{len(body)} bytes are not {records} records"), 0

    def take(count: int, dtype: str = "u1") -> np.ndarray:
        nonlocal at
        begin, at = at, at + count * np.dtype(dtype).itemsize
        if at > len(body):
            raise fault
        return np.frombuffer(body, dtype, count, begin)

    head_N = take(records, "<u2").astype(np.int64)
    distinct_N = (head_N & ((1 << (16 - bits)) - 1)) + 1
    entries = int(distinct_N.sum())
    id_E = take(entries, "<u2").astype(np.int32)
    if high:
        bit_EH = np.unpackbits(take(-(-entries * high // 8)), count=entries * high).reshape(-1, high)
        id_E += bit_EH @ (1 << np.arange(16, 16 + high, dtype=np.int32))
    if header.draws is None:
        share_E = np.exp(-_decoded(take(entries, "<u2"), _NATS, 16))
    else:
        several_E = np.unpackbits(take(-(-entries // 8)), count=entries).view(bool)
        share_E = np.ones(entries, np.float32)
        share_E[several_E] += take(int(several_E.sum()))
        share_E /= header.draws
    if at != len(body):
        raise fault
    return id_E, share_E, distinct_N, _decoded(head_N >> (16 - bits), most, bits)
