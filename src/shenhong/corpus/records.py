"""A record on its way through the refining: what a domain is shown of it, and what the domain makes of it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import NamedTuple


def chance(name: str, seed: int, purpose: str) -> float:
    """A number in [0, 1) that depends on nothing but the record's id, the seed and the purpose."""
    salt = f"{purpose}\0{seed}\0".encode()
    digest = hashlib.blake2b(salt + name.encode("utf-8"), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2.0**64


class Record(NamedTuple):
    """One raw record, its text normalised."""

    id: str
    text: str
    original: str  # before it was simplified: equally long
    fields: Mapping[str, str]  # those the domain asked for; "" where the record lacks one
    held_out: bool  # it will be measured on, and not learnt
    seed: int  # of the run

    def chance(self, purpose: str) -> float:
        """A number in [0, 1) of this record alone, for choices that should not depend on its neighbours."""
        return chance(self.id, self.seed, purpose)


class Kept(NamedTuple):
    """What is learnt of a record: a text, what it answers ("" for a plain document), and the domain's own columns."""

    text: str
    prompt: str = ""
    columns: Mapping[str, str] = {}
