"""Reading of piped tars in a loader process: the samples of its tars, shuffled, joined and decoded to batches.

Shapes: b micro-batch, l labels per sample.
"""

from __future__ import annotations

import random
import time
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.sharedctypes import RawArray
from typing import Any

import numpy as np
import webdataset
from torch.utils.data import IterableDataset, get_worker_info

from megacid.data.augmentation import Views
from megacid.data.batch import Batch, Positions, ReaderProgress
from megacid.data.captions import BLANK, CaptionError, CaptionSource, is_blank
from megacid.data.decode import BadSample, decode_caption, decode_text
from megacid.data.order import derive_key
from megacid.data.pairs import Choice, PairBatches, PairOptions
from megacid.data.pipes.commands import PipedTar, TarOrder
from megacid.data.pipes.side_files import SideFiles, TarSides
from megacid.data.pipes.tar_stream import TarFailed, read_samples
from megacid.data.tar_samples import IMAGE_EXTENSIONS
from megacid.errors import UserError

PAUSES_S = (1.0, 4.0)  # before a command that failed is started again
WINDOW = 1000  # samples
MAX_MISSING = 0.25  # share of them without an embedding, an image or a caption
FAILED_IN_A_ROW = 3  # tars of a reader
UNUSED_IN_A_ROW = 100  # tars of a reader without a usable sample
_INITIAL = 1000  # samples in the shuffle buffer before the first is used
_MAX_IMAGE_BYTES = 64 << 20
_SHUFFLE = 4  # separates this draw from the others
_NUMBER_BITS = 32


class _Stop(Exception):  # noqa: N818  becomes the failure of a batch
    """Why the run has to end."""


@dataclass(frozen=True, slots=True)
class _Sample:
    """A sample in the shuffle buffer: the encoded image, and what is joined."""

    tar: PipedTar
    key: str
    number: int
    image: bytes
    caption: str
    choice: Choice
    labels: np.ndarray | None
    teacher_image: np.ndarray | None
    teacher_text: np.ndarray | None


class PipedPairs(PairBatches, IterableDataset[Any]):
    """Iterates endlessly over the batches of one reader, or ends with the reason why the run has to stop.

    Args:
        options: how samples are read. block_shards has no effect.
        plan: how many batches this rank reads.
        turns: of every reader of this rank, where it begins in the sequence of tars.
        buffer: samples in the shuffle buffer of a reader.

    Raises:
        UserError: the embeddings of the first tar are damaged. Never raised while iterating.
    """

    def __init__(
        self,
        tars: Sequence[PipedTar],
        sides: SideFiles,
        caption: CaptionSource,
        options: PairOptions,
        plan: Positions,
        turns: Sequence[int],
        buffer: int,
    ) -> None:
        labels = sides.labels.labels_per_sample if sides.labels else 0
        dtype = sides.teacher_dtype(tars) if sides.teachers else np.dtype(np.float16)
        super().__init__(options, sides if sides.teachers else None, dtype, labels)
        self.tars, self.sides, self.caption, self.plan = tars, sides, caption, plan
        self.turns, self.buffer = list(turns), buffer
        self.order = TarOrder(len(tars), options.seed)
        self._reading = RawArray("q", [-1] * len(turns))

    def being_read(self) -> str:
        return ", ".join(str(self.tars[number]) for number in self._reading if number >= 0)

    def note_tar(self, reader: int, tar: int) -> None:
        """For `being_read`."""
        self._reading[reader] = tar

    def __iter__(self) -> Iterator[Batch | str]:
        worker = get_worker_info()
        reader = _Reader(self, 0 if worker is None else worker.id)
        try:
            while True:
                with self.generators():
                    batch = reader.batch()
                yield batch
        except (_Stop, UserError, OSError) as error:
            yield f"rank {self.plan.rank}: {error}"
        finally:
            reader.close()


class _Reader:
    """One loader process of a rank, and what it has read.

    Attributes:
        turn: of the next tar.
    """

    def __init__(self, pairs: PipedPairs, number: int) -> None:
        self._pairs, self._number = pairs, number
        self.turn = pairs.turns[number]
        self._step = pairs.plan.world * len(pairs.turns)
        self._bad: list[str] = []  # since the last batch
        self._failed: list[str] = []
        self._failed_in_a_row = 0
        self._tars, self._tars_without_use = 0, 0
        self._left_out: Counter[str] = Counter()
        self._window: deque[str] = deque(maxlen=WINDOW)  # why the last samples were left out, "" for those used
        rng = random.Random(derive_key(pairs.options.seed, self.turn, _SHUFFLE))
        initial = min(_INITIAL, pairs.buffer)
        self._source = self._usable()
        self._samples = webdataset.shuffle(pairs.buffer, initial=initial, rng=rng)(self._source)

    def close(self) -> None:
        """End the command that is running."""
        self._source.close()

    def batch(self) -> Batch:
        pairs, options = self._pairs, self._pairs.options
        samples: list[_Sample] = []
        images: list[Any] = []
        failures = 0
        while len(samples) < pairs.plan.micro_batch:
            sample = next(self._samples)
            try:
                image = options.read_image(
                    sample.image, max_pixels=options.max_image_pixels, shard=_shown(sample.tar), key=sample.key
                )
            except BadSample as bad:
                failures += 1
                if failures >= options.max_consecutive_errors:
                    raise _Stop(f"{failures} bad samples in a row, the last one {bad}: the data is damaged") from None
                self._bad.append(str(bad))
                continue
            failures = 0
            samples.append(sample)
            images.append(pairs.transformed(image, sample.choice.seed))
        replaced, self._bad = self._bad, []
        batch = pairs.batch(
            images,
            [sample.caption for sample in samples],
            _stacked([sample.labels for sample in samples]),
            (_stacked([s.teacher_image for s in samples]), _stacked([s.teacher_text for s in samples])),
            np.array([sample.number for sample in samples], np.int64),
            replaced,
        )
        failed, self._failed = tuple(self._failed), []
        return replace(
            batch, progress=ReaderProgress(self._number, self.turn, self._tars, failed, dict(self._left_out))
        )

    def _usable(self) -> Generator[_Sample, None, None]:
        """The usable samples of the tars of this reader, endlessly."""
        while True:
            epoch, number = self._pairs.order.at(self.turn)
            self.turn += self._step
            self._tars += 1
            self._pairs.note_tar(self._number, number)
            tar = self._pairs.tars[number]
            self._tars_without_use += 1
            try:
                yield from self._of_tar(tar, epoch)
                self._failed_in_a_row = 0
            except TarFailed as failed:
                self._failed.append(str(failed))
                self._failed_in_a_row += 1
                if self._failed_in_a_row >= FAILED_IN_A_ROW:
                    raise _Stop(
                        f"{self._failed_in_a_row} tars in a row cannot be read, the last one {failed}: correct the "
                        "commands of data.shards, whose own messages are in the output of the run"
                    ) from None
            if self._tars_without_use > max(min(len(self._pairs.tars), UNUSED_IN_A_ROW), FAILED_IN_A_ROW):
                raise _Stop(
                    f"no usable sample in {self._tars_without_use} tars in a row ({_counted(self._left_out)}): correct "
                    "data.shards, or what is joined to it"
                )

    def _of_tar(self, tar: PipedTar, epoch: int) -> Iterator[_Sample]:
        sides = self._pairs.sides.of(tar)
        seen: set[str] = set()
        complete = 0
        for place, members in enumerate(self._members(tar)):
            key = members["__key__"]
            if sides.is_left_out(key):
                complete += 1
                self._left_out["not kept by data.keep"] += 1
                continue
            reason, sample = "duplicate key", None
            if key not in seen:
                seen.add(key)
                number = (tar.number << _NUMBER_BITS) + place
                try:
                    reason, sample = self._joined(tar, key, number, epoch, members, sides)
                except BadSample as bad:
                    self._bad.append(str(bad))
                    reason = ""  # it counts as bad, not as missing
            complete += reason not in (_NO_IMAGE, _NO_CAPTION)
            self._judge(reason)
            if sample is not None:
                self._tars_without_use = 0
                yield sample
        if not complete:
            raise TarFailed(
                f"{tar}: none of its {len(seen)} samples has an image and a caption (.{self._pairs.caption.ending})"
            )

    def _joined(
        self, tar: PipedTar, key: str, number: int, epoch: int, members: dict[str, Any], sides: TarSides
    ) -> tuple[str, _Sample | None]:
        """(Why a sample is left out, None), or ("", the sample with what is joined to it). Raises BadSample."""
        image = next((members[ending] for ending in IMAGE_EXTENSIONS if ending in members), None)
        member = members.get(self._pairs.caption.ending)
        if image is None or member is None:
            return _NO_IMAGE if image is None else _NO_CAPTION, None
        for kind, size, limit in (
            ("image", len(image), _MAX_IMAGE_BYTES),
            ("caption", len(member), self._pairs.caption.max_bytes),
        ):
            if size > limit:
                raise BadSample(_shown(tar), key, f"{kind} of {size} bytes, more than {limit}")
        try:
            encoded = self._pairs.caption.extract(member)
        except CaptionError as error:
            return str(error), None
        if is_blank(decode_text(encoded[0], "replace")):
            return BLANK, None
        if (directory := sides.without_embedding(key)) is not None:
            return f"without an embedding in {directory}", None
        captions = [decode_caption(data, shard=_shown(tar), key=key) for data in encoded]
        if (reason := sides.other_captions(key, captions)) is not None:
            raise BadSample(_shown(tar), key, reason)
        views = self._pairs.views
        choice = self._pairs.choose(epoch, number, len(captions), lambda view: _seed_of(views, key, view))
        vectors: tuple[np.ndarray | None, np.ndarray | None] = None, None
        if self._pairs.sides.teachers:
            vectors = sides.embeddings(key, choice, self._pairs.teacher_dtype)
        labels = sides.labels(key) if self._pairs.sides.labels else None
        return "", _Sample(tar, key, number, image, captions[choice.caption], choice, labels, *vectors)

    def _members(self, tar: PipedTar) -> Iterator[dict[str, Any]]:
        """The members of the samples of a tar, each sample once, also when the command is started again."""
        endings = (*IMAGE_EXTENSIONS, self._pairs.caption.ending)
        done = 0
        for pause in (*PAUSES_S, None):
            held = None  # of the last sample before a cut, members may be missing
            try:
                samples = read_samples(tar, lambda name: _ending(name) in endings, self._left_out)
                for place, members in enumerate(samples):
                    if held is not None:
                        done += 1
                        yield held
                    held = members if place >= done else None
                if held is not None:
                    yield held
                return
            except TarFailed:
                if pause is None:
                    raise
            time.sleep(pause)

    def _judge(self, reason: str) -> None:
        """Count a sample, and why it is left out ("": it is used). _Stop when too many are."""
        self._window.append(reason)
        if not reason:
            return
        self._left_out[reason] += 1
        missing = len(self._window) - self._window.count("")
        if missing > MAX_MISSING * WINDOW:
            raise _Stop(
                f"{missing} of the last {len(self._window)} samples cannot be used ("
                f"{_counted(Counter(filter(None, self._window)))}), expected at most {MAX_MISSING * WINDOW:.0f} of "
                f"{WINDOW}: correct data.caption, or run tools/embed.py on these tars"
            )


_NO_IMAGE, _NO_CAPTION = "without an image", "without a caption"


def _shown(tar: PipedTar) -> str:
    """As indexed tars are named in messages about samples."""
    return tar.name or str(tar)


def _ending(name: str) -> str:
    """The ending of a member's name, from the first dot on, as webdataset has it."""
    return name.rpartition("/")[2].partition(".")[2].lower()


def _seed_of(views: Views | None, key: str, view: int) -> int:
    assert views is not None
    return views.seed_of(key, view)


def _stacked(rows: Sequence[np.ndarray | None]) -> np.ndarray | None:
    return None if rows[0] is None else np.stack([row for row in rows if row is not None])


def _counted(reasons: Counter[str]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(3)) or "their tars were empty"
