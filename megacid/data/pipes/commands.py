"""The commands of `data.shards` that write tars, and the order in which their tars are read."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from megacid.data.batch import Batch
from megacid.data.order import KeyedPermutation, derive_key
from megacid.data.shard_paths import expand_braces
from megacid.errors import UserError

PREFIX = "pipe:"
_TAR = re.compile(r"([^\s/\\'\"=:;|&<>()]+)\.tar(?![\w.])")


@dataclass(frozen=True)
class PipedTar:
    """A tar that a command writes to its output.

    Attributes:
        url: `pipe:COMMAND`. No message has it, because commands may contain credentials.
        name: of the tar without its ending; None: the command names no tar, or several.
        number: in the order of `data.shards`.
    """

    url: str
    name: str | None
    number: int

    def __str__(self) -> str:
        """For messages."""
        return f"{self.name}.tar" if self.name is not None else f"tar {self.number} of data.shards"


def find_pipes(spec: str) -> list[PipedTar]:
    """The tars of commands `pipe:COMMAND`, with braces, joined by `::`.

    Raises:
        UserError: a part is no command, or two tars have the same name.
    """
    urls: list[str] = []
    for part in spec.split("::"):
        if not part.startswith(PREFIX) or not part.removeprefix(PREFIX).strip():
            raise UserError(
                f"data.shards has {part[:80]!r} between commands, expected {PREFIX}COMMAND in every part: tars that "
                "are indexed and commands cannot be mixed in a run"
            )
        urls += expand_braces(part)
    tars = [PipedTar(url, _name(url), number) for number, url in enumerate(urls)]
    first: dict[str, PipedTar] = {}
    for tar in tars:
        if tar.name is not None and (other := first.setdefault(tar.name, tar)) is not tar:
            raise UserError(
                f"commands {other.number} and {tar.number} of data.shards read a tar of the same name, {tar}, expected "
                "unique ones, by which embeddings and labels are known: name it once, or rename one of them"
            )
    return tars


def _name(url: str) -> str | None:
    names = set(_TAR.findall(url))
    return names.pop() if len(names) == 1 else None


def digest(tars: Sequence[PipedTar]) -> str:
    """sha256 of the commands."""
    return hashlib.sha256("\0".join(tar.url for tar in tars).encode(errors="surrogatepass")).hexdigest()


@dataclass(frozen=True)
class TarOrder:
    """The endless sequence of tars: every epoch is a permutation of all tars, drawn from the seed and the epoch.

    Reader g of G readers, the loader processes of all ranks, reads turns g, g + G, g + 2 G, ... of the sequence. So
    every tar is read once per epoch by one reader, no reader ever ends, and it does not matter whether the number of
    tars is a multiple of that of readers.
    """

    tars: int
    seed: int

    def at(self, turn: int) -> tuple[int, int]:
        """(epoch, number of the tar) of a turn."""
        epoch, place = divmod(turn, self.tars)
        return epoch, int(KeyedPermutation(self.tars, derive_key(self.seed, epoch))(np.array([place]))[0])


class StreamPosition:
    """The tars that the readers have begun, on this rank. Checkpoints store those of all ranks.

    Attributes:
        next_turns: the next turn of every reader of this rank; those before it have been begun.
    """

    def __init__(self, tars: Sequence[PipedTar], rank: int, world: int, workers: int) -> None:
        self._digest, self._tars = digest(tars), len(tars)
        self._readers, self._first = world * workers, rank * workers
        self.next_turns = list(range(self._first, self._first + workers))

    @property
    def epoch(self) -> float:
        """Tars that were begun, in epochs: the mean of this rank's readers."""
        begun = sum(turn // self._readers for turn in self.next_turns) / len(self.next_turns)
        return begun * self._readers / self._tars

    def advance(self, batch: Batch) -> None:
        """Note that a step of training has used a batch of this rank."""
        if batch.progress is not None:  # a batch with a failure may have none
            self.next_turns[batch.progress.reader] = batch.progress.turn

    def state(self, turns_of_all_ranks: Sequence[Sequence[int]]) -> dict[str, Any]:
        """For the checkpoint. turns_of_all_ranks: `next_turns` by rank."""
        return {"tars": self._digest, "next_turns": [turn for turns in turns_of_all_ranks for turn in turns]}

    def load_state(self, state: Any) -> str:
        """Continue at the position of a checkpoint. Returns what was done, for the log.

        With another number of readers, all begin at the first turn that no reader had begun. A checkpoint of other
        tars, or without a position, gives none: the sequence begins again.
        """
        turns = state.get("next_turns") if isinstance(state, dict) and state.get("tars") == self._digest else None
        if not isinstance(turns, list) or not turns or not all(type(turn) is int and turn >= 0 for turn in turns):
            return "the checkpoint is of other data: the tars are read from the beginning"
        own = slice(self._first, self._first + len(self.next_turns))
        if len(turns) == self._readers and all(turn % self._readers == reader for reader, turn in enumerate(turns)):
            self.next_turns = turns[own]
            return "every reader continues at its next tar"
        begin = max(turns)
        self.next_turns = [begin + (reader - begin) % self._readers for reader in range(self._readers)][own]
        return (
            f"{self._readers} readers continue at tar {begin} of the sequence, which {len(turns)} readers had reached"
        )
