"""Where the first class rows come from: a seeded normal matrix, given centroids, or another run's class shards.

Legend: C classes, D width. Of a file a rank reads its own rows only, and nothing in a file can run.

Published partial-FC checkpoints (insightface's arcface_torch) are one file per rank, in one of three layouts:

    softmax_fc_gpu_{rank}.pt        {"weight": [num_local, D]}, or the tensor alone
    checkpoint_gpu_{rank}.pt        {"state_dict_softmax_fc": {"weight": [num_local, D]}, the backbone, the optimizer, ...}
    rank_{rank}_softmax_weight.pt   the tensor alone

Their number says how the classes were sharded, whatever number of ranks reads them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megacid.distributed.parallel import shard_range
from megacid.errors import UserError

Init = np.ndarray | Tensor | str | PathLike[str]

_STD = 0.01
_BLOCK = 1024  # rows per generator: a shard draws only the blocks it touches, whatever the number of ranks
_LAYOUTS = ("softmax_fc_gpu_{}.pt", "checkpoint_gpu_{}.pt", "rank_{}_softmax_weight.pt")
_TENSOR_NAMES = ("weight", "centroids")
_SOURCES = "a .npy, .safetensors or .pt file, or a directory of per-rank files"


def random_rows(start: int, stop: int, width: int, seed: int) -> Tensor:
    """Rows [start, stop) of one global N(0, 0.01) matrix that depends on the seed alone, fp32 [stop - start, width]."""
    rows = torch.empty(stop - start, width)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        words = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, block]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]))
        drawn = torch.randn(_BLOCK, width, generator=generator) * _STD
        first = block * _BLOCK
        low, high = max(start, first), min(stop, first + _BLOCK)
        rows[low - start : high - start] = drawn[low - first : high - first]
    return rows


@dataclass(frozen=True)
class _Source:
    """A [C, D] matrix that is read by rows. `said` names it in messages, `remedy` says where a fitting one is."""

    said: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Tensor]
    remedy: str = "take the centroids of that k and teacher"


def load_rows(init: Init, start: int, stop: int, shape: tuple[int, int]) -> Tensor:
    """Rows [start, stop) of the given (num_classes, embed_dim) matrix, fp32 on the host; may share memory with `init`.

    init: array, memmap or tensor; the path of a .npy file, of a .safetensors file with one 2-d tensor (or one called
    "weight" or "centroids"), of a .pt file with all classes, or of a directory of per-rank files (see above).
    UserError: unreadable, of another shape or type, or a row that is not finite.
    """
    source = _open(init, shape)
    if source.shape != shape:
        raise UserError(
            f"{source.said} has shape {source.shape}, expected {shape} = (num_classes, embed_dim): {source.remedy}"
        )
    if "float" not in source.dtype:
        raise UserError(f"{source.said} holds {source.dtype}, expected floating-point numbers: save it as float32")
    rows = source.read(start, stop).float()
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        raise UserError(
            f"{source.said} row {start + int((~finite).nonzero()[0])} is not finite: make the centroids again, "
            "or take an earlier checkpoint"
        )
    return rows


def shape_of(init: Init) -> tuple[int, int]:
    """(classes, width) of what `load_rows` would read. UserError for what it cannot read."""
    path = None if isinstance(init, np.ndarray | Tensor) else Path(init)
    if path is not None and path.is_dir():
        said = f"init {str(init)!r}"
        weights = [_load_weight(f"{said} file {file.name}", file) for file in _rank_files(said, path)]
        return sum(len(weight) for weight in weights), weights[0].shape[1]
    shape = _open(init, (0, 0)).shape
    if len(shape) != 2:
        raise UserError(f"{init} has shape {shape}, expected (classes, width): name another file")
    return shape[0], shape[1]


def _open(init: Init, shape: tuple[int, int]) -> _Source:
    if isinstance(init, np.ndarray):
        return _of_array("init", init)
    if isinstance(init, Tensor):
        return _of_tensor("init", init)
    path, said = Path(init), f"init {str(init)!r}"
    if not path.exists():
        raise UserError(f"{said} does not exist, expected {_SOURCES}: correct the path")
    if path.is_dir():
        return _of_directory(said, path, shape)
    if path.suffix == ".npy":
        return _of_npy(said, path)
    if path.suffix == ".safetensors":
        return _of_safetensors(said, path)
    if path.suffix == ".pt":
        return _of_tensor(said, _load_weight(said, path), "pass the directory of all ranks' files if there are several")
    raise UserError(f"{said} ends in {path.suffix!r}, expected {_SOURCES}: convert it")


def _of_array(said: str, given: np.ndarray) -> _Source:
    def read(start: int, stop: int) -> Tensor:
        # A copy: torch refuses arrays that are read-only, byte-swapped or of a type it does not know.
        return torch.as_tensor(np.array(given[start:stop], dtype=np.float32))

    return _Source(said, given.shape, given.dtype.name, read)


def _of_tensor(said: str, given: Tensor, remedy: str = _Source.remedy) -> _Source:
    def read(start: int, stop: int) -> Tensor:
        return given[start:stop].detach().cpu()

    return _Source(said, tuple(given.shape), str(given.dtype), read, remedy)


def _of_npy(said: str, path: Path) -> _Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # a header is parsed as Python: RecursionError, MemoryError, TokenError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{said} is not a readable .npy file ({reason}): pass centroids.npy of a clusters directory"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UserError(f"{said} is an .npz archive, expected a .npy file: pass centroids.npy of a clusters directory")
    return _of_array(said, array)


def _of_safetensors(said: str, path: Path) -> _Source:
    def read(start: int, stop: int) -> Tensor:
        with safe_open(path, "pt") as handle:
            return handle.get_slice(name)[start:stop]

    try:
        with safe_open(path, "pt") as handle:
            shapes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118 (no dict)
            matrices = [key for key, shape in shapes.items() if len(shape) == 2]
            named = [key for key in matrices if key in _TENSOR_NAMES]
            fitting = matrices if len(matrices) == 1 else named
            if len(fitting) != 1:
                raise UserError(
                    f"{said} holds {_some(shapes)}, expected one 2-d tensor, or among several one called "
                    '"weight" or "centroids": save that tensor alone'
                )
            name = fitting[0]
            # Types are written F32, BF16, ..., I64.
            kind = handle.get_slice(name).get_dtype()
    except (OSError, SafetensorError) as error:
        raise UserError(f"{said} is not a readable .safetensors file ({error}): copy or write it again") from error
    return _Source(said, shapes[name], "float" if kind in ("F64", "F32", "F16", "BF16") else kind, read)


def _of_directory(said: str, path: Path, shape: tuple[int, int]) -> _Source:
    """The per-rank files of a directory, counts and widths of all of them checked."""
    files = _rank_files(said, path)
    # Mapped, not read: of the files whose rows are not taken only the headers pass through memory.
    weights = [_load_weight(f"{said} file {file.name}", file) for file in files]
    ranges = [shard_range(shape[0], rank, len(files)) for rank in range(len(files))]
    total = sum(len(weight) for weight in weights)
    if total != shape[0]:
        raise UserError(
            f"{said} holds {total} classes in {len(files)} files, expected num_classes = {shape[0]}: "
            "take the checkpoint of a run with as many classes, with the files of all its ranks"
        )
    for file, weight, (first, last) in zip(files, weights, ranges):
        if len(weight) != last - first:
            raise UserError(
                f"{said} file {file.name} has {len(weight)} rows, expected {last - first} of {shape[0]} classes over "
                f"{len(files)} ranks: the files are of different runs or ranks are mixed up, copy them again"
            )
        if weight.shape[1] != shape[1]:
            raise UserError(
                f"{said} file {file.name} has width {weight.shape[1]}, expected embed_dim = {shape[1]}: "
                "take a checkpoint of that width"
            )

    def read(start: int, stop: int) -> Tensor:
        return torch.cat(
            [
                weight[max(start, first) - first : min(stop, last) - first].float()
                for weight, (first, last) in zip(weights, ranges)
                if first < stop and start < last
            ]
        )

    return _Source(said, shape, "float32", read)


def _rank_files(said: str, path: Path) -> list[Path]:
    """The file of rank 0, 1, ... in the one layout that the directory has."""
    names = [entry.name for entry in path.iterdir()]
    found: dict[str, list[int]] = {}
    for layout in _LAYOUTS:
        pattern = re.compile(re.escape(layout).replace(r"\{\}", r"(0|[1-9]\d*)"))
        ranks = sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)
        if ranks:
            found[layout] = ranks
    if len(found) != 1:
        says = f"files of {len(found)} layouts ({_some(found)})" if found else f"no per-rank files, only {_some(names)}"
        raise UserError(
            f"{said} has {says}, expected one of {', '.join(_LAYOUTS)} with {{}} = 0, 1, ...: leave the files of one "
            "layout there; of a clusters directory pass its centroids.npy"
        )
    (layout, ranks) = found.popitem()
    missing = sorted(set(range(ranks[-1] + 1)) - set(ranks))
    if missing:
        raise UserError(
            f"{said} has {len(ranks)} files up to rank {ranks[-1]}, but none of rank {_some(missing)}: "
            f"wanted {layout} of every rank, copy {layout.format(missing[0])} too"
        )
    return [path / layout.format(rank) for rank in ranks]


def _load_weight(said: str, path: Path) -> Tensor:
    """The [num_local, D] weight in a file of torch.save, mapped. Nothing but tensors and plain values is unpickled."""
    try:
        saved: Any = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to ask for
        refused = (
            re.search(r"(?:GLOBAL|class) (\S+)", str(error)) if isinstance(error, pickle.UnpicklingError) else None
        )
        if refused:
            raise UserError(
                f"{said} holds {refused[1]}, expected only tensors and plain values, for anything else could run code: "
                'if you trust the file, load it elsewhere and save its "weight" alone with torch.save'
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(
            f"{said} is not a readable file of torch.save ({reason}): copy it again, or save it with torch 1.6 or later"
        ) from error
    where = said
    for key in ("state_dict_softmax_fc", "weight"):
        if isinstance(saved, Mapping) and (key == "weight" or key in saved):
            if key not in saved:
                raise UserError(f'{where} holds {_some(saved)}, expected "weight": take the file of the classifier')
            saved, where = saved[key], f'{where} "{key}"'
    if not isinstance(saved, Tensor) or saved.ndim != 2:
        kind = f"shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        raise UserError(f"{where} is {kind}, expected a tensor [classes, width]: take the file of the classifier")
    if not saved.dtype.is_floating_point:
        raise UserError(
            f"{where} holds {saved.dtype}, expected floating-point numbers: take the file of the classifier"
        )
    return saved.detach()


def _some(items: Any, most: int = 8) -> str:
    """The first of many names or numbers."""
    shown = [str(item) for item in items]
    return (", ".join(shown[:most]) + (", ..." if len(shown) > most else "")) or "nothing"
