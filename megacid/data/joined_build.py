"""Makes joined tables: in train.py's start or ahead of it, by any number of ranks and processes, also after a kill.

Ranks that see the same folder divide its parts; hosts that have disks of their own each make all of them. A part that
two processes make has the same bytes.
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import numpy as np

from megacid.data.index_build import remove_old_temporary_files
from megacid.data.index_ranks import ranks_that_share
from megacid.data.joined import PART, JoinedTable, JoinSources, header_of, rows_path
from megacid.data.teacher_table import IMAGE, TEXT
from megacid.distributed.divided_work import ALONE, Workers
from megacid.distributed.progress import progress_bar
from megacid.errors import UserError
from megacid.storage.atomic import write_json_atomic
from megacid.storage.npy import load_npy, write_array

log = logging.getLogger(__name__)

_SAMPLE_S = 2e-6  # to join a sample of the index, by one process from memory
_SEED_S = 1.2e-6  # for each view of it
_SHOWN_S = 10.0  # of an estimate: a shorter build needs no progress bar
_ANNOUNCED_MIN = 1.0  # of an estimate: a shorter build is not announced


def open_joined(
    sources: JoinSources,
    block_shards: int = PART,
    fallback: Path | None = None,
    workers: Workers = ALONE,
    tables: int = 1,
) -> JoinedTable:
    """The joined table of some sources; what is missing, incomplete or cut is made.

    A collective of the ranks of `workers`.

    Args:
        block_shards: tars whose files the table keeps open.
        fallback: folder for the table if the index cannot be written.
        tables: number of joined tables that are open at the same time.

    Raises:
        RanksDisagree: the ranks have other shards, or another run of a stage.
        UserError: a side table is damaged or does not match, or the folder cannot be written.
    """
    workers.agree_on_mapping(
        sources.made_from, "the shards and the meta.json of data.teacher, data.labels and data.keep"
    )
    name = f"joined-{sources.digest[:16]}"
    parents = [folder / sources.index.caption.index_folder for folder in sources.index.paths.folders]
    folders = [parent / name for parent in [*parents, fallback] if parent is not None]
    with workers.together():
        complete = {folder: tars for folder in folders if (tars := _complete(sources, folder)) is not None}
    if all(workers.gather(bool(complete))):
        folder, tars = next(iter(complete.items()))
        return JoinedTable(sources, folder, tars, block_shards, tables)
    with workers.together():
        folder = next(iter(complete), None) or _writable(folders, sources, warn=workers.rank == 0)
    ranks = ranks_that_share({folder: folder not in complete}, workers)
    _make_parts(sources, folder, ranks, workers)
    with workers.together():
        tars = _entries_of_parts(sources, folder)
        if folder not in complete and workers.rank == ranks[0]:
            write_array(folder / "tars.npy", tars)
            remove_old_temporary_files(folder)
    return JoinedTable(sources, folder, tars, block_shards, tables)


def _writable(folders: list[Path], sources: JoinSources, *, warn: bool) -> Path:
    """The first folder that can be written, with made_from.json in it."""
    reasons = []
    for folder in folders:
        try:
            write_json_atomic(folder / "made_from.json", sources.made_from)
        except OSError as error:
            reasons.append(f"{folder} cannot be written ({error.strerror})")
        else:
            if reasons and warn:
                log.warning("%s: the shards are joined with their side tables in %s", ", ".join(reasons), folder)
            return folder
    raise UserError(f"{', '.join(reasons)}: correct its permissions, or free space on that disk")


def _complete(sources: JoinSources, folder: Path) -> np.ndarray | None:
    """tars.npy; None unless all files of rows are there and have the right size."""
    tars = _entries(folder / "tars.npy", sources, range(len(sources.index.names)))
    if tars is None:
        return None
    whole = (_has_rows(folder, part, sources, tars[part * PART : (part + 1) * PART]) for part in range(sources.parts))
    return tars if all(whole) else None


def _entries(path: Path, sources: JoinSources, tars: range) -> np.ndarray | None:
    """[tars] of `tar_dtype`; None when the file is missing, is not that, or is not what was written."""
    try:
        entries = np.array(load_npy(path, ""))
    except UserError:
        return None
    if entries.dtype != sources.tar_dtype or entries.shape != (len(tars),):
        return None
    return entries if (entries["check"] == sources.checks(entries, np.array(tars))).all() else None


def _entries_of_parts(sources: JoinSources, folder: Path) -> np.ndarray:
    """The entries of all tars, from the files of all parts. UserError unless they are what was written."""
    found = []
    for part in range(sources.parts):
        path = _tars_path(folder, part)
        if (entries := _entries(path, sources, _tars_of(sources, part))) is None:
            raise UserError(f"{path} is missing, or is not as it was written: check that disk, and start again")
        found.append(entries)
    return np.concatenate(found)


def _has_rows(folder: Path, part: int, sources: JoinSources, entries: np.ndarray) -> bool:
    """Whether the file of rows of a part has the size that its entries say."""
    rows = int(entries["usable"].sum())
    expected = len(header_of(sources.row_dtype, rows)) + rows * sources.row_dtype.itemsize
    try:
        return rows_path(folder, part).stat().st_size == expected
    except OSError:
        return False


def _tars_path(folder: Path, part: int) -> Path:
    return folder / f"tars-{part:05d}.npy"


def _tars_of(sources: JoinSources, part: int) -> range:
    return range(part * PART, min((part + 1) * PART, len(sources.index.names)))


def _is_made(sources: JoinSources, folder: Path, part: int) -> bool:
    entries = _entries(_tars_path(folder, part), sources, _tars_of(sources, part))
    return entries is not None and _has_rows(folder, part, sources, entries)


def _make_parts(sources: JoinSources, folder: Path, ranks: list[int], workers: Workers) -> None:
    """Make the parts that are missing in a folder, which `ranks` share. A collective."""
    with workers.together():
        missing = _missing(sources, folder) if workers.rank == ranks[0] else []
    missing = workers.gather(missing)[ranks[0]]
    own = missing[ranks.index(workers.rank) :: len(ranks)]
    views = sources.teacher.views if sources.teacher else None
    sample_s = _SAMPLE_S + (_SEED_S * views.count if views else 0.0)
    seconds = sources.index.num_samples * sample_s * len(missing) / sources.parts / len(ranks)
    processes = min(workers.max_processes(), int(seconds))
    minutes = max(workers.gather(seconds / max(1, processes))) / 60
    total = sum(workers.gather(len(own)))
    if minutes > _ANNOUNCED_MIN and workers.rank == 0:
        log.warning(
            "joining %d tars with their side tables takes about %.0f minutes with %d ranks; ahead of a run, this "
            "command does it: %s",
            *(len(sources.index.names), minutes, workers.world, sources.command),
        )
    _inherited.append((sources, folder))
    try:
        with progress_bar("join", "part", total, enabled=workers.rank == 0 and minutes * 60 > _SHOWN_S) as bar:
            # Ranks that write other folders give their parts other numbers.
            items = {sources.parts * ranks[0] + part: part for part in own}
            workers.divide(_make_part, items, processes, lambda results: bar.update(len(results)))
    finally:
        _inherited.pop()


def _missing(sources: JoinSources, folder: Path) -> list[int]:
    """The parts that are not in a folder.

    The folder is listed, since some network file systems remember for a while that a file was missing.
    """
    present = set(os.listdir(folder))
    return [
        part
        for part in range(sources.parts)
        if _tars_path(folder, part).name not in present or not _is_made(sources, folder, part)
    ]


_inherited: list[tuple[JoinSources, Path]] = []  # of forked processes: to pickle an index for every part takes longer


def _make_part(part: int) -> None:
    sources, folder = _inherited[-1]
    if not _is_made(sources, folder, part):
        rows, entries = zip(*(join_tar(sources, shard) for shard in _tars_of(sources, part)))
        write_array(rows_path(folder, part), np.concatenate(rows))
        write_array(_tars_path(folder, part), np.concatenate(entries))


def join_tar(sources: JoinSources, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """([usable] of `row_dtype`, [1] of `tar_dtype`) of a tar.

    Raises:
        UserError: a side table is damaged or does not match the tar.
    """
    table = sources.index.table(shard)
    row = np.arange(len(table.keys)) if sources.keep is None else sources.keep.kept(shard)
    row = row[table.text[row, 1] >= 0]
    joined = [teacher.join(shard) for teacher in sources.teachers]
    embedded = np.ones(len(row), bool)
    for shard_rows in joined:
        embedded &= shard_rows.row_of[row] >= 0
    entry = np.zeros(1, sources.tar_dtype)
    entry["lacking"], row = np.sum(~embedded), row[embedded]
    rows = np.zeros(len(row), sources.row_dtype)
    entry["usable"], rows["row"] = len(row), row
    rows["image"], rows["text"] = table.image[row], table.text[row]
    if sources.labels is not None:
        rows["labels"] = sources.labels.join(shard)[row]
    for number, one in enumerate(joined):
        rows["teacher"][:, number] = at = one.row_of[row]
        if one.first is not None:
            rows["caption"][:, number] = one.first[at]
            rows["captions"][:, number] = one.first[at + 1] - one.first[at]
        for kind, array in ((IMAGE, one.image), (TEXT, one.text)):
            if array is not None:
                stored = (array.start, array.bytes, array.dtype.encode(), array.sha256.encode())
                entry["files"][0, number, kind] = stored
    if sources.teacher is not None and (views := sources.teacher.views) is not None:
        keys = [table.keys[number] for number in row.tolist()]
        seeds = [[views.seed_of(key, view) for view in range(views.count)] for key in keys]
        rows["seeds"] = np.array(seeds, np.uint64).reshape(len(row), views.count)  # of no row, too
    rows["check"], entry["check"] = sources.checks(rows, shard, np.arange(len(rows))), sources.checks(entry, shard)
    return rows, entry
