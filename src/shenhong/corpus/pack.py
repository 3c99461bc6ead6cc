"""Packs texts into rows of tokens.

A text is BOS, then its prompt between the template's User and Assistant tokens (if it has one), then
the text and EOS: what the chat template renders, token for token. Texts are packed whole into rows of
T tokens by best fit; one that is longer is cut into pieces, each beginning with BOS. A document begins
at every BOS and at every row start, so its bounds need not be stored.

A row takes texts in the order of their ids, which says nothing of their length, and is closed by those
two that fit best: poems fill rows of 512 to 99.9 %. (Best fit over texts sorted by length fills 98.6 %,
and gathers texts of one length in a row.)

tokens/*.safetensors hold `tokens` [R, T] (uint16, or int32 above 65,536 entries) and `counted` [R, T]
(uint8): 1 where the token is a target that counts in the loss: not BOS, not padding, not the prompt.
The metadata has the number of characters counted: one entry, as the library writes several in random
order, and equal corpora must give equal files.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from safetensors.numpy import save

from shenhong.corpus.split import NAMES
from shenhong.errors import DataError
from shenhong.tokenizer import Tokenizer


def has_prompts(corpus_dir: Path) -> bool:
    """Whether any text of the corpus answers a prompt: without one a model never sees how it would be asked."""
    prompts = pq.read_table(Path(corpus_dir) / "train.parquet", columns=["prompt"])["prompt"]
    return any(prompts.to_pylist())


def pack(
    corpus_dir: Path,
    tokenizer_dir: Path,
    out: Path,
    sequence_length: int,
    log: Callable[[str], None],
) -> dict:
    """Write out/{train,valid,test}.safetensors; returns their counts.

    Errors: DataError, ModelError; OSError when the disk is full.
    """
    tokenizer = Tokenizer.load(Path(tokenizer_dir))
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    facts = {}
    for name in NAMES:
        path = Path(corpus_dir) / f"{name}.parquet"
        try:
            table = pq.read_table(path, columns=["prompt", "text"])
        except (OSError, ValueError) as error:
            raise DataError(f"cannot read {path} ({error}); run the corpus stage again") from None
        prompts, texts = table["prompt"].to_pylist(), table["text"].to_pylist()
        if not texts:
            raise DataError(f"{path} holds no records; run the corpus stage on more text")
        flat, counted, offsets = render(prompts, texts, tokenizer)
        tokens, counts, _ = rows(flat, counted, offsets, sequence_length, tokenizer)
        facts[name] = {
            "documents": len(texts),
            "rows": len(tokens),
            "tokens": int(offsets[-1]),
            "counted": int(counts.sum()),
            "characters": sum(map(len, texts)),
            "fill": round(float((tokens != tokenizer.pad_id).mean()), 5),
        }
        metadata = {"characters": str(facts[name]["characters"])}
        data = save({"tokens": tokens, "counted": counts}, metadata)
        (out / f"{name}.safetensors").write_bytes(data)
        log(
            f"pack {name}: {len(texts):,} texts in {len(tokens):,} rows of {sequence_length}, "
            f"{facts[name]['fill']:.2%} full"
        )
    return facts


def render(
    prompts: list[str], texts: list[str], tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All documents as ids [I] and counted [I] (uint8), and offsets [N+1] of the documents."""
    prompt_ids, prompt_at = tokenizer.encode_many(prompts)
    text_ids, text_at = tokenizer.encode_many(texts)
    asked = np.array([bool(prompt) for prompt in prompts])
    prompt_len, text_len = np.diff(prompt_at), np.diff(text_at)
    head = 1 + np.where(asked, prompt_len + 2, 0)  # BOS, and User ... Assistant
    offsets = np.concatenate([[0], np.cumsum(head + text_len + 1)])
    start, answer = offsets[:-1], offsets[:-1] + head
    ids = np.full(offsets[-1], tokenizer.eos_id, np.int32)
    counted = np.zeros(offsets[-1], np.uint8)
    ids[start] = tokenizer.bos_id
    ids[start[asked] + 1] = tokenizer.user_id
    ids[answer[asked] - 1] = tokenizer.assistant_id
    ids[_places(start + 2, prompt_len)] = prompt_ids
    places = _places(answer, text_len)
    ids[places] = text_ids
    counted[places] = 1
    counted[offsets[1:] - 1] = 1  # EOS
    return ids, counted, offsets


def _places(start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """start[0], start[0]+1, ... length[0] numbers, then those of start[1], and so on."""
    return np.repeat(start - np.cumsum(length) + length, length) + np.arange(length.sum())


def rows(
    ids: np.ndarray, counted: np.ndarray, offsets: np.ndarray, width: int, tokenizer: Tokenizer
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The documents packed into rows [R, width]: tokens, counted, and where a document or its next piece starts."""
    # Cut what is longer than a row: the first piece is `width` long, later ones width - 1 after a BOS.
    length = np.diff(offsets)
    extra = np.maximum(0, -(-(length - width) // (width - 1)))
    number = np.repeat(np.arange(len(length)), 1 + extra)
    piece = _places(np.zeros(len(length), np.int64), 1 + extra)
    first = piece == 0
    start = offsets[number] + np.where(first, 0, width + (piece - 1) * (width - 1))
    end = np.minimum(start + np.where(first, width, width - 1), offsets[number + 1])
    row, column = best_fit(end - start + ~first, width)
    height = int(row.max()) + 1
    dtype = np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.int32
    tokens = np.full((height, width), tokenizer.pad_id, dtype)
    counts = np.zeros((height, width), np.uint8)
    starts = np.zeros((height, width), np.uint8)
    starts[row, column] = 1
    later = ~first
    tokens[row[later], column[later]] = tokenizer.bos_id
    source = _places(start, end - start)
    target = _places(row * width + column + later, end - start)
    tokens.reshape(-1)[target] = ids[source]
    counts.reshape(-1)[target] = counted[source]
    return tokens, counts, starts


def best_fit(lengths: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Row and column of each piece of length 1..width.

    A row takes pieces in their order until two more can close it; these are the two (or the one) that
    leave the least room, and among equals those of the lengths that are most plentiful.
    """
    row = np.empty(len(lengths), np.int64)
    column = np.empty(len(lengths), np.int64)
    waiting: list[list[int]] = [
        [] for _ in range(width + 1)
    ]  # pieces by length, the first one last
    for index in range(len(lengths) - 1, -1, -1):
        waiting[lengths[index]].append(index)
    sizes = lengths.tolist()
    present = sum(1 << length for length in range(1, width + 1) if waiting[length])
    placed = bytearray(len(sizes))
    following = here = 0

    def take(length: int, room: int) -> int:
        nonlocal present
        index = waiting[length].pop()
        if not waiting[length]:
            present ^= 1 << length
        placed[index] = 1
        row[index], column[index] = here, width - room
        return room - length

    while present:
        room = width
        while present:
            longest = present.bit_length() - 1
            if room > 2 * longest:
                while placed[following]:
                    following += 1
                # The first piece of this length that waits is this very piece.
                room = take(sizes[following], room)
                continue
            closing = _closing(waiting, present, room)
            if not closing:
                break
            for length in closing:
                room = take(length, room)
        here += 1
    return row, column


def _closing(waiting: list[list[int]], present: int, room: int) -> list[int]:
    """The one or two lengths of waiting pieces that fill `room` best."""
    best, chosen = (-1, -1), list[int]()
    rest = present & ((1 << (room + 1)) - 1)
    while rest:
        first = rest.bit_length() - 1
        rest ^= 1 << first
        if 2 * first < room and best[0] >= 2 * first:
            break  # the longer of any further two is too short to do better
        partners = present & ((1 << min(room - first + 1, first + 1)) - 1)
        if len(waiting[first]) == 1 and partners >> first & 1:
            partners ^= 1 << first
        second = max(partners.bit_length() - 1, 0)
        plenty = min(len(waiting[first]), len(waiting[second]) if second else len(waiting[first]))
        if (first + second, plenty) > best:
            best, chosen = (first + second, plenty), [first, second] if second else [first]
        if first == room:
            break
    return chosen
