"""First class rows: the same for any number of ranks, from every kind of source; files that lie, are torn or bite."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from megacid.classifier.initialization import load_rows, random_rows
from megacid.distributed.parallel import shard_range
from megacid.errors import UserError

C, D = 23, 6
SHAPE = (C, D)


def matrix() -> torch.Tensor:
    return torch.randn(C, D, generator=torch.Generator().manual_seed(0))


def shards(world: int, weight: torch.Tensor | None = None) -> list[torch.Tensor]:
    weight = matrix() if weight is None else weight
    return [weight[slice(*shard_range(len(weight), rank, world))].clone() for rank in range(world)]


def checkpoint(weight: torch.Tensor) -> dict[str, Any]:
    """What arcface_torch's train_v2 saves on each rank, with state of torch's own optimizer and scheduler."""
    backbone = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.BatchNorm1d(3))
    parameter = torch.nn.Parameter(weight.clone())
    opt = torch.optim.SGD([{"params": backbone.parameters()}, {"params": [parameter]}], lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.PolynomialLR(opt, total_iters=10)
    backbone(torch.randn(5, 4)).sum().backward()
    parameter.grad = torch.ones_like(weight)
    opt.step()
    schedule.step()
    return {
        "epoch": 3,
        "global_step": 1200,
        "state_dict_backbone": backbone.state_dict(),
        "state_dict_softmax_fc": {"weight": weight},
        "state_optimizer": opt.state_dict(),
        "state_lr_scheduler": schedule.state_dict(),
    }


def in_files(folder: Path, layout: str, parts: list[torch.Tensor], wrap: Callable[[torch.Tensor], Any]) -> Path:
    folder.mkdir()
    (folder / "training.log").write_text("other files do not matter")
    (folder / "model.pt").write_bytes(b"")
    for rank, part in enumerate(parts):
        torch.save(wrap(part), folder / layout.format(rank))
    return folder


def state_dict(weight: torch.Tensor) -> Any:
    module = torch.nn.Module()
    module.weight = torch.nn.Parameter(weight)
    return module.state_dict(keep_vars=True)  # an OrderedDict with metadata, of a Parameter


def sources(folder: Path) -> dict[str, Any]:
    """The same matrix in every form that is read."""
    weight = matrix()
    np.save(folder / "c.npy", weight.numpy())
    np.save(folder / "swapped.npy", weight.numpy().astype(">f4", order="F"))
    save_file({"anything": weight}, folder / "one.safetensors")
    save_file({"weight": weight, "other": weight * 2, "bias": weight[:, 0].clone()}, folder / "weight.safetensors")
    save_file({"centroids": weight, "other": weight * 2}, folder / "centroids.safetensors")
    torch.save({"weight": weight}, folder / "state.pt")
    torch.save(checkpoint(weight), folder / "whole.pt")
    softmax, whole, first = "softmax_fc_gpu_{}.pt", "checkpoint_gpu_{}.pt", "rank_{}_softmax_weight.pt"
    return {
        "array": weight.numpy(),
        "read-only array": np.load(folder / "c.npy", mmap_mode="r"),
        "tensor": weight,
        "parameter": torch.nn.Parameter(weight.clone()),
        ".npy": folder / "c.npy",
        "text": str(folder / "c.npy"),
        "big endian, column by column": folder / "swapped.npy",
        ".safetensors with one": folder / "one.safetensors",
        ".safetensors with weight": folder / "weight.safetensors",
        ".safetensors with centroids": folder / "centroids.safetensors",
        ".pt": folder / "state.pt",
        ".pt of one rank": folder / "whole.pt",
        "softmax_fc_gpu, 3 ranks": in_files(folder / "a", softmax, shards(3), state_dict),
        "softmax_fc_gpu, 3 tensors": in_files(folder / "b", softmax, shards(3), lambda part: part),
        "checkpoint_gpu, 5 ranks": in_files(folder / "c", whole, shards(5), checkpoint),
        "checkpoint_gpu, 12 ranks": in_files(folder / "d", whole, shards(12), checkpoint),
        "rank_softmax_weight, 4 ranks": in_files(folder / "e", first, shards(4), lambda part: part),
        "one rank": in_files(folder / "f", whole, shards(1), checkpoint),
    }


def test_every_source_gives_the_same_bits_at_every_number_of_ranks(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        for world in (1, 2, 3, 4):
            parts = [load_rows(source, *shard_range(C, rank, world), SHAPE) for rank in range(world)]
            assert all(part.dtype == torch.float32 and not part.requires_grad for part in parts), name
            assert torch.equal(torch.cat(parts), matrix()), f"{name} at {world} ranks"


def test_rows_across_the_bounds_of_files_come_in_order(tmp_path: Path) -> None:
    folder = in_files(tmp_path / "x", "softmax_fc_gpu_{}.pt", shards(11), state_dict)
    for start, stop in ((0, 1), (2, 9), (4, 5), (5, 23), (22, 23)):
        assert torch.equal(load_rows(folder, start, stop, SHAPE), matrix()[start:stop])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_types_become_fp32(tmp_path: Path, dtype: torch.dtype) -> None:
    weight = matrix().to(dtype)
    save_file({"w": weight}, tmp_path / "w.safetensors")
    torch.save(weight, tmp_path / "w.pt")
    inputs: list[Any] = [weight, tmp_path / "w.safetensors", tmp_path / "w.pt"]
    inputs.append(in_files(tmp_path / "x", "softmax_fc_gpu_{}.pt", shards(3, weight), state_dict))
    if dtype != torch.bfloat16:  # numpy has none
        np.save(tmp_path / "w.npy", weight.numpy())
        inputs.append(tmp_path / "w.npy")
    for source in inputs:
        rows = load_rows(source, 3, 19, SHAPE)
        assert rows.dtype == torch.float32 and torch.equal(rows, weight[3:19].float()), source


def test_random_rows_depend_on_the_seed_and_not_on_the_shard() -> None:
    whole = random_rows(0, 2500, 4, seed=3)
    for start, stop in ((0, 1), (1000, 1030), (1024, 2048), (2047, 2500)):
        assert torch.equal(random_rows(start, stop, 4, seed=3), whole[start:stop])
    assert 0.0098 < float(whole.std()) < 0.0102 and abs(float(whole.mean())) < 5e-4
    assert not torch.equal(random_rows(0, 5, 4, seed=4), whole[:5])
    assert not torch.equal(whole[:1024], whole[1024:2048]), "the blocks repeat"


# ---- what does not fit -------------------------------------------------------------------------------------------


def refused(source: Any, expected: str, shape: tuple[int, int] = SHAPE, part: tuple[int, int] = (0, 5)) -> str:
    with pytest.raises(UserError, match=expected) as caught:
        load_rows(source, *part, shape)
    message = str(caught.value)
    assert ": " in message and "weights_only=False" not in message
    return message


def test_a_matrix_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    for name, source in sources(tmp_path).items():
        if isinstance(source, Path) and source.is_dir():
            count = {"a": 3, "b": 3, "c": 5, "d": 12, "e": 4, "f": 1}[source.name]
            refused(source, f"holds 23 classes in {count} files, expected num_classes = 24", (24, D))
            refused(source, r"has width 6, expected embed_dim = 7", (C, 7))
        else:
            for shape in ((24, D), (C, 7)):
                message = refused(
                    source, re.escape(f"shape (23, 6), expected {shape} = (num_classes, embed_dim)"), shape
                )
                assert not isinstance(source, str | Path) or str(source) in message, name
    refused(matrix().ravel(), r"shape \(138,\)")


def test_every_rank_sees_a_wrong_file_of_another_rank(tmp_path: Path) -> None:
    """All counts are checked, also those of files whose rows this rank does not take."""
    parts = shards(4)
    parts[0], parts[3] = parts[3], parts[0]  # 6 and 5 rows
    folder = in_files(tmp_path / "swapped", "softmax_fc_gpu_{}.pt", parts, state_dict)
    for part in ((0, 3), (22, 23)):
        refused(folder, r"softmax_fc_gpu_0\.pt has 5 rows, expected 6 of 23 classes over 4 ranks", part=part)
    parts = [*shards(3)[:2], shards(3)[2][:, :4].clone()]
    folder = in_files(tmp_path / "narrow", "softmax_fc_gpu_{}.pt", parts, state_dict)
    refused(folder, r"softmax_fc_gpu_2\.pt has width 4, expected embed_dim = 6")
    parts = [*shards(3)[:2], shards(3)[2].long()]
    folder = in_files(tmp_path / "whole", "softmax_fc_gpu_{}.pt", parts, lambda part: part)
    refused(folder, r"softmax_fc_gpu_2\.pt holds torch\.int64")


def test_a_missing_rank_is_named(tmp_path: Path) -> None:
    folder = in_files(tmp_path / "x", "checkpoint_gpu_{}.pt", shards(5), checkpoint)
    (folder / "checkpoint_gpu_2.pt").unlink()
    refused(folder, r"4 files up to rank 4, but none of rank 2: copy checkpoint_gpu_2\.pt")
    (folder / "checkpoint_gpu_3.pt").unlink()
    (folder / "checkpoint_gpu_4.pt").unlink()
    refused(folder, r"holds 10 classes in 2 files, expected num_classes = 23: .*all its ranks")


def test_a_directory_without_or_with_two_kinds_of_files_is_refused(tmp_path: Path) -> None:
    folder = in_files(tmp_path / "x", "softmax_fc_gpu_{}.pt", [], state_dict)
    refused(folder, r"has no per-rank files, only .*training\.log.*, expected one of softmax_fc_gpu_\{\}\.pt")
    torch.save(matrix(), folder / "softmax_fc_gpu_0.pt")
    assert torch.equal(load_rows(folder, 0, C, SHAPE), matrix())
    torch.save(checkpoint(matrix()), folder / "checkpoint_gpu_0.pt")
    refused(folder, "has files of 2 layouts")


class Trap:
    """Creates a directory when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.sprung),)


def test_code_in_a_pickle_does_not_run(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trapped = {"weight": matrix(), "more": Trap(sprung)}
    torch.save(trapped, tmp_path / "trap.pt")
    folder = in_files(tmp_path / "x", "softmax_fc_gpu_{}.pt", shards(2), lambda part: {"weight": part})
    torch.save(trapped, folder / "softmax_fc_gpu_1.pt")
    np.save(tmp_path / "trap.npy", np.array([Trap(sprung)], dtype=object), allow_pickle=True)
    says = r"holds (posix|nt)\.mkdir, expected only tensors and plain values.*save its \"weight\" alone"
    refused(tmp_path / "trap.pt", says)
    refused(folder, r"softmax_fc_gpu_1\.pt " + says)
    refused(tmp_path / "trap.npy", r"not a readable \.npy file")
    assert not sprung.exists(), "the pickle ran"
    torch.load(tmp_path / "trap.pt", weights_only=False)
    assert sprung.exists(), "the trap of this test does not work"


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 0.95])
def test_truncated_files_are_refused(tmp_path: Path, share: float) -> None:
    found = sources(tmp_path)
    for name, kind in ((".npy", ".npy"), (".safetensors with one", ".safetensors"), (".pt", "torch.save")):
        path: Path = found[name]
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        refused(path, f"is not a readable (file of )?{re.escape(kind)}")
    path = found["checkpoint_gpu, 5 ranks"] / "checkpoint_gpu_4.pt"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    refused(path.parent, r"checkpoint_gpu_4\.pt is not a readable file of torch\.save")


def test_a_damaged_pickle_inside_a_whole_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.pt"
    torch.save({"weight": matrix()}, path)
    whole = path.read_bytes()
    place = whole.index(b"weight")
    path.write_bytes(whole[: place - 8] + b"\xff" * 8 + whole[place:])
    refused(path, "is not a readable file of torch.save")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_the_first_row_that_is_not_finite_is_named_by_its_global_number(tmp_path: Path, bad: float) -> None:
    weight = matrix()
    weight[17, 3] = weight[19, 0] = bad
    np.save(tmp_path / "w.npy", weight.numpy())
    save_file({"w": weight}, tmp_path / "w.safetensors")
    folder = in_files(tmp_path / "x", "softmax_fc_gpu_{}.pt", shards(4, weight), state_dict)
    for source in (weight, tmp_path / "w.npy", tmp_path / "w.safetensors", folder):
        refused(source, "row 17 is not finite", part=(12, 23))
        refused(source, "row 19 is not finite", part=(18, 20))
        assert torch.equal(load_rows(source, 0, 17, SHAPE), weight[:17])  # of others' rows nothing is read


def test_other_files_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "w.bin").write_bytes(b"1")
    refused(tmp_path / "w.bin", r"ends in '\.bin', expected a \.npy, \.safetensors or \.pt file, or a directory")
    refused("centriods", r"init 'centriods' does not exist, expected a \.npy")
    save_file({"a": matrix(), "b": matrix() + 1}, tmp_path / "two.safetensors")
    refused(tmp_path / "two.safetensors", r'holds a, b, expected one 2-d tensor.*"weight" or "centroids"')
    save_file({"weight": matrix(), "centroids": matrix() + 1}, tmp_path / "both.safetensors")
    refused(tmp_path / "both.safetensors", "holds centroids, weight, expected one 2-d tensor")
    torch.save({"epoch": 1, "state_dict_backbone": {}}, tmp_path / "backbone.pt")
    refused(tmp_path / "backbone.pt", r'holds epoch, state_dict_backbone, expected "weight"')
    torch.save({"state_dict_softmax_fc": {"kernel": matrix()}}, tmp_path / "named.pt")
    refused(tmp_path / "named.pt", r'"state_dict_softmax_fc" holds kernel, expected "weight"')
    torch.save({"weight": torch.zeros(3)}, tmp_path / "flat.pt")
    refused(tmp_path / "flat.pt", r'"weight" is shape \(3,\), expected a tensor \[classes, width\]')
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "is list, expected a tensor")
    np.save(tmp_path / "labels.npy", np.zeros(SHAPE, dtype=np.int64))
    refused(tmp_path / "labels.npy", "holds int64, expected floating-point")
    save_file({"w": torch.zeros(SHAPE, dtype=torch.int64)}, tmp_path / "labels.safetensors")
    refused(tmp_path / "labels.safetensors", "holds I64, expected floating-point")


def test_only_the_own_rows_of_a_file_pass_through_memory(tmp_path: Path) -> None:
    weight = torch.zeros(1 << 18, 64)  # 64 MiB
    np.save(tmp_path / "w.npy", weight.numpy())
    save_file({"w": weight}, tmp_path / "w.safetensors")
    torch.save({"weight": weight}, tmp_path / "w.pt")
    shape = (1 << 18, 64)
    del weight
    for name in ("w.npy", "w.safetensors", "w.pt"):
        before = resident_kib()
        rows = load_rows(tmp_path / name, 1000, 1010, shape)
        assert rows.shape == (10, 64) and resident_kib() - before < 16 << 10, name


def resident_kib() -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])  # type: ignore[index]
