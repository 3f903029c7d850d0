"""Initial class rows: a seeded normal matrix, centroids, or the class shards of another run.

Legend: C classes, D width. A rank reads only its own rows of a file, and no file can execute code.

Published partial-FC checkpoints (insightface's arcface_torch) are one file per rank, in one of three layouts:

    softmax_fc_gpu_{rank}.pt        {"weight": [num_local, D]}, or the tensor alone
    checkpoint_gpu_{rank}.pt        {"state_dict_softmax_fc": {"weight": [num_local, D]}, the backbone, ...}
    rank_{rank}_softmax_weight.pt   the tensor alone

The number of files tells how the classes were sharded; any number of ranks can read them.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Callable, Iterable, Mapping
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
_BLOCK = 1024  # rows per random generator: a shard draws only the blocks that overlap it
_LAYOUTS = ("softmax_fc_gpu_{}.pt", "checkpoint_gpu_{}.pt", "rank_{}_softmax_weight.pt")
_TENSOR_NAMES = ("weight", "centroids")
_SOURCES = "a .npy, .safetensors or .pt file, or a directory of per-rank files"


def random_rows(start: int, stop: int, width: int, seed: int) -> Tensor:
    """Rows [start, stop) of a normal matrix with standard deviation 0.01: fp32 [stop - start, width].

    The matrix depends only on `seed`, not on the number of ranks.
    """
    rows = torch.empty(stop - start, width, dtype=torch.float32)
    for block in range(start // _BLOCK, -(-stop // _BLOCK)):
        words = np.random.SeedSequence([seed & 0xFFFFFFFFFFFFFFFF, block]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(words[0]))
        block_rows = torch.randn(_BLOCK, width, generator=generator, dtype=torch.float32) * _STD
        first = block * _BLOCK
        low, high = max(start, first), min(stop, first + _BLOCK)
        rows[low - start : high - start] = block_rows[low - first : high - first]
    return rows


@dataclass(frozen=True)
class _Source:
    """A [C, D] matrix that is read by rows. `origin` begins error messages; `remedy` ends the one about its shape."""

    origin: str
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[int, int], Tensor]
    remedy: str = "take the centroids of that k and teacher"


def load_rows(init: Init, start: int, stop: int, shape: tuple[int, int]) -> Tensor:
    """Read rows [start, stop) of an initial class matrix: fp32 on the host, may share memory with `init`.

    Args:
        init: a [C, D] array, memmap or tensor, or the path of a .npy file, a .safetensors file with one 2-d tensor
            (or one called "weight" or "centroids"), a .pt file of all classes, or a directory of per-rank files.
        start: first global class id.
        stop: one past the last global class id.
        shape: the expected (num_classes, embed_dim).

    Raises:
        UserError: unreadable, of another shape or dtype, or a row that is not finite.
    """
    source = _open_source(init, shape)
    if source.shape != shape:
        raise UserError(
            f"{source.origin} has shape {source.shape}, expected {shape} = (num_classes, embed_dim): {source.remedy}"
        )
    if "float" not in source.dtype:
        raise UserError(f"{source.origin} holds {source.dtype}, expected floating-point numbers: save it as float32")
    rows = source.read(start, stop).float()
    finite = torch.isfinite(rows).all(1)
    if not finite.all():
        raise UserError(
            f"{source.origin} row {start + int((~finite).nonzero()[0])} is not finite: make the centroids again, "
            "or take an earlier checkpoint"
        )
    return rows


def shape_of(init: Init) -> tuple[int, int]:
    """(num_classes, embed_dim) of an `init` of `load_rows`. Raises UserError if it is unreadable."""
    path = None if isinstance(init, np.ndarray | Tensor) else Path(init)
    if path is not None and path.is_dir():
        origin = f"init {str(init)!r}"
        weights = [_load_weight(f"{origin} file {file.name}", file) for file in _rank_files(origin, path)]
        return sum(len(weight) for weight in weights), weights[0].shape[1]
    shape = _open_source(init, (0, 0)).shape
    if len(shape) != 2:
        raise UserError(f"{init} has shape {shape}, expected (classes, width): pass a file with a matrix")
    return shape[0], shape[1]


def _open_source(init: Init, shape: tuple[int, int]) -> _Source:
    if isinstance(init, np.ndarray):
        return _of_array("init", init)
    if isinstance(init, Tensor):
        return _of_tensor("init", init)
    path, origin = Path(init), f"init {str(init)!r}"
    if not path.exists():
        raise UserError(f"{origin} does not exist, expected {_SOURCES}: correct the path")
    if path.is_dir():
        return _of_directory(origin, path, shape)
    if path.suffix == ".npy":
        return _of_npy(origin, path)
    if path.suffix == ".safetensors":
        return _of_safetensors(origin, path)
    if path.suffix == ".pt":
        return _of_tensor(
            origin, _load_weight(origin, path), "pass the directory of all ranks' files if there are several"
        )
    raise UserError(f"{origin} ends in {path.suffix!r}, expected {_SOURCES}: convert it")


def _of_array(origin: str, array: np.ndarray) -> _Source:
    def read(start: int, stop: int) -> Tensor:
        # A copy: torch rejects arrays that are read-only, byte-swapped or of a dtype it does not know.
        return torch.as_tensor(np.array(array[start:stop], dtype=np.float32))

    return _Source(origin, array.shape, array.dtype.name, read)


def _of_tensor(origin: str, tensor: Tensor, remedy: str = _Source.remedy) -> _Source:
    def read(start: int, stop: int) -> Tensor:
        return tensor[start:stop].detach().cpu()

    return _Source(origin, tuple(tensor.shape), str(tensor.dtype), read, remedy)


def _of_npy(origin: str, path: Path) -> _Source:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python: RecursionError, MemoryError, TokenError, ...
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UserError(
            f"{origin} is not a readable .npy file ({reason}): pass centroids.npy of a clusters directory"
        ) from error
    if not isinstance(array, np.ndarray):
        raise UserError(
            f"{origin} is an .npz archive, expected a .npy file: pass centroids.npy of a clusters directory"
        )
    return _of_array(origin, array)


def _of_safetensors(origin: str, path: Path) -> _Source:
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
                    f"{origin} holds {_preview(shapes)}, expected one 2-d tensor, or among several one called "
                    '"weight" or "centroids": save that tensor alone'
                )
            name = fitting[0]
            dtype = handle.get_slice(name).get_dtype()  # F32, BF16, ..., I64
    except (OSError, SafetensorError) as error:
        raise UserError(f"{origin} is not a readable .safetensors file ({error}): copy or write it again") from error
    return _Source(origin, shapes[name], "float" if dtype in ("F64", "F32", "F16", "BF16") else dtype, read)


def _of_directory(origin: str, path: Path, shape: tuple[int, int]) -> _Source:
    """The per-rank files of a directory. Checks row counts and widths of all of them."""
    files = _rank_files(origin, path)
    # Memory-mapped: of files with other ranks' rows only the headers are read.
    weights = [_load_weight(f"{origin} file {file.name}", file) for file in files]
    ranges = [shard_range(shape[0], rank, len(files)) for rank in range(len(files))]
    total = sum(len(weight) for weight in weights)
    if total != shape[0]:
        raise UserError(
            f"{origin} holds {total} classes in {len(files)} files, expected num_classes = {shape[0]}: "
            "pass a checkpoint of a run with that many classes and the files of all its ranks"
        )
    for file, weight, (first, last) in zip(files, weights, ranges):
        if len(weight) != last - first:
            raise UserError(
                f"{origin} file {file.name} has {len(weight)} rows, expected {last - first} of {shape[0]} classes over "
                f"{len(files)} ranks: the files belong to different runs or their ranks are swapped, copy them again"
            )
        if weight.shape[1] != shape[1]:
            raise UserError(
                f"{origin} file {file.name} has width {weight.shape[1]}, expected embed_dim = {shape[1]}: "
                "pass a checkpoint of that width"
            )

    def read(start: int, stop: int) -> Tensor:
        return torch.cat(
            [
                weight[max(start, first) - first : min(stop, last) - first].float()
                for weight, (first, last) in zip(weights, ranges)
                if first < stop and start < last
            ]
        )

    return _Source(origin, shape, "float32", read)


def _rank_files(origin: str, path: Path) -> list[Path]:
    """The files of rank 0, 1, ... in the directory's one layout."""
    names = [entry.name for entry in path.iterdir()]
    ranks_of: dict[str, list[int]] = {}
    for layout in _LAYOUTS:
        pattern = re.compile(re.escape(layout).replace(r"\{\}", r"(0|[1-9]\d*)"))
        ranks = sorted(int(match[1]) for match in map(pattern.fullmatch, names) if match)
        if ranks:
            ranks_of[layout] = ranks
    if len(ranks_of) != 1:
        layouts = f"files of {len(ranks_of)} layouts ({_preview(ranks_of)})"
        content = layouts if ranks_of else f"no per-rank files, only {_preview(names)}"
        raise UserError(
            f"{origin} has {content}, expected one of {', '.join(_LAYOUTS)} with {{}} = 0, 1, ...: keep the files of "
            "one layout there; for a clusters directory pass its centroids.npy"
        )
    (layout, ranks) = ranks_of.popitem()
    missing = sorted(set(range(ranks[-1] + 1)) - set(ranks))
    if missing:
        raise UserError(
            f"{origin} has {len(ranks)} files up to rank {ranks[-1]}, but none of rank {_preview(missing)}: "
            f"copy {layout.format(missing[0])} too"
        )
    return [path / layout.format(rank) for rank in ranks]


def _load_weight(origin: str, path: Path) -> Tensor:
    """The memory-mapped [num_local, D] weight in a file of torch.save. Unpickles only tensors and plain values."""
    try:
        saved: Any = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    except Exception as error:  # a damaged pickle can raise any exception
        is_unsafe = isinstance(error, pickle.UnpicklingError)
        if is_unsafe and (unsafe := re.search(r"(?:GLOBAL|class) (\S+)", str(error))):
            raise UserError(
                f"{origin} holds {unsafe[1]}, expected only tensors and plain values, because others can execute code: "
                'if you trust the file, load it elsewhere and save its "weight" alone with torch.save'
            ) from error
        reason = (str(error).splitlines() or [type(error).__name__])[0].split(". ")[0]
        raise UserError(
            f"{origin} is not a readable file of torch.save ({reason}): copy it again, or save it with torch >= 1.6"
        ) from error
    where = origin
    for key in ("state_dict_softmax_fc", "weight"):
        if isinstance(saved, Mapping) and (key == "weight" or key in saved):
            if key not in saved:
                raise UserError(f'{where} holds {_preview(saved)}, expected "weight": pass the file of the classifier')
            saved, where = saved[key], f'{where} "{key}"'
    if not isinstance(saved, Tensor) or saved.ndim != 2:
        content = f"shape {tuple(saved.shape)}" if isinstance(saved, Tensor) else type(saved).__name__
        raise UserError(f"{where} is {content}, expected a tensor [classes, width]: pass the file of the classifier")
    if not saved.dtype.is_floating_point:
        raise UserError(
            f"{where} holds {saved.dtype}, expected floating-point numbers: pass the file of the classifier"
        )
    return saved.detach()


def _preview(items: Iterable[object], limit: int = 8) -> str:
    """The first items, comma-separated."""
    names = [str(item) for item in items]
    return (", ".join(names[:limit]) + (", ..." if len(names) > limit else "")) or "nothing"
