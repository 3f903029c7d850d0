"""k-means against faiss and a float64 reference, and with interruptions, several ranks and other block sizes."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from harness import run_ranks

from megacid.errors import UserError
from megacid.offline.cluster.kmeans import kmeans
from megacid.offline.cluster.lloyd import imbalance_factor, split_empty
from megacid.offline.cluster.seeding import initial_centroids
from megacid.offline.cluster.state import KMeansSettings, KMeansState
from megacid.offline.nearest import TILE_CENTROIDS, Assigner
from megacid.offline.rows import ArrayRows


def blobs(n: int = 3000, dim: int = 16, centres: int = 20, seed: int = 0, unit: bool = True) -> np.ndarray:
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(centres, dim))[rng.integers(centres, size=n)] + 0.5 * rng.normal(size=(n, dim))
    x = x / np.linalg.norm(x, axis=1, keepdims=True) if unit else 7 * x
    return x.astype(np.float16)


def reference_lloyd(x: np.ndarray, start: np.ndarray, iterations: int, metric: str) -> tuple[np.ndarray, list[float]]:
    """Plain Lloyd in float64, for data without empty clusters."""
    x, c = x.astype(np.float64), start.astype(np.float64)
    if metric == "cosine":
        x = x / np.linalg.norm(x, axis=1, keepdims=True)
    objective = []
    for _ in range(iterations):
        if metric == "cosine":
            label = (x @ c.T).argmax(1)
            objective.append(float((x * c[label]).sum(1).mean()))
        else:
            square = ((x[:, None] - c[None]) ** 2).sum(2)
            label = square.argmin(1)
            objective.append(float(square.min(1).mean()))
        assert np.bincount(label, minlength=len(c)).min() > 0
        c = np.stack([x[label == j].mean(0) for j in range(len(c))])
        if metric == "cosine":
            c /= np.linalg.norm(c, axis=1, keepdims=True)
    return c, objective


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize("backend", ["torch", "faiss"])
def test_equals_lloyd_in_float64(metric: str, backend: str) -> None:
    x = blobs(unit=metric == "cosine")
    settings = KMeansSettings(k=12, metric=metric, iterations=6, seed=1, backend=backend)
    start = initial_centroids(ArrayRows(x), settings, torch.device("cpu")).numpy()
    expected, objective = reference_lloyd(x, start, 6, metric)
    state = kmeans(ArrayRows(x), settings)
    np.testing.assert_allclose(state.centroids.numpy(), expected, atol=2e-5 * np.abs(expected).max())
    np.testing.assert_allclose(state.objective, objective, rtol=1e-5)


def test_objective_equals_faiss() -> None:
    import faiss

    x = blobs()
    settings = KMeansSettings(k=20, iterations=10, seed=3)
    start = initial_centroids(ArrayRows(x), settings, torch.device("cpu")).numpy()
    ours = kmeans(ArrayRows(x), settings)
    theirs = faiss.Kmeans(16, 20, niter=10, spherical=True, max_points_per_centroid=10**6, min_points_per_centroid=1)
    unit = x.astype(np.float32) / np.linalg.norm(x.astype(np.float32), axis=1, keepdims=True)
    theirs.train(unit, init_centroids=start)
    assert ours.objective[-1] == pytest.approx(theirs.obj[-1] / len(x), rel=1e-3)


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
def test_objective_never_gets_worse(metric: str) -> None:
    x = blobs(unit=metric == "cosine")
    objective = np.array(kmeans(ArrayRows(x), KMeansSettings(k=30, metric=metric, iterations=12)).objective)
    steps = np.diff(objective) * (1 if metric == "cosine" else -1)
    assert steps.min() > -1e-7 * abs(objective[0])
    assert steps.sum() > 0


class CountingRows(ArrayRows):
    """Records the largest block that was read."""

    largest = 0

    def read(self, start: int, stop: int) -> np.ndarray:
        self.largest = max(self.largest, stop - start)
        return super().read(start, stop)


@pytest.mark.parametrize(("backend", "tight_gb", "tile"), [("torch", 0.0009, 1024), ("faiss", 0.002, 4096)])
def test_memory_bound_changes_blocks_but_not_the_result(backend: str, tight_gb: float, tile: int) -> None:
    x = blobs(9000, unit=False)
    settings = KMeansSettings(k=15, metric="euclidean", iterations=5, memory_gb=1.0, backend=backend)
    large, small = CountingRows(x), CountingRows(x)
    whole = kmeans(large, settings)
    parts = kmeans(small, replace(settings, memory_gb=tight_gb))
    assert small.largest == tile < large.largest
    assert torch.equal(whole.centroids, parts.centroids)
    assert whole.objective == parts.objective
    with pytest.raises(UserError, match="memory-gb"):
        kmeans(small, KMeansSettings(k=15, metric="euclidean", memory_gb=0.0001))


def _on_ranks(x: np.ndarray, settings: KMeansSettings) -> tuple[torch.Tensor, list[float]]:
    state = kmeans(ArrayRows(x), settings)
    return state.centroids, state.objective


@pytest.mark.parametrize(("world", "backend"), [(2, "torch"), (3, "torch"), (3, "faiss")])
def test_ranks_give_the_same_bits(world: int, backend: str) -> None:
    x = blobs(9000)
    settings = KMeansSettings(k=10, iterations=4, backend=backend)
    alone = kmeans(ArrayRows(x), settings)
    for centroids, objective in run_ranks(_on_ranks, world, x, settings):
        assert torch.equal(centroids, alone.centroids)
        assert objective == alone.objective


def test_more_ranks_than_tiles() -> None:
    x = blobs(300)
    settings = KMeansSettings(k=5, iterations=2)
    alone = kmeans(ArrayRows(x), settings)
    assert all(torch.equal(c, alone.centroids) for c, _ in run_ranks(_on_ranks, 2, x, settings))


def test_an_invalid_row_fails_on_every_rank() -> None:
    x = blobs(4000)
    x[3990, 2] = np.nan
    with pytest.raises(AssertionError, match=r"row 3990 of the array holds NaN"):
        run_ranks(_on_ranks, 2, x, KMeansSettings(k=5))


class StopAfterError(Exception):
    pass


def test_restart_equals_an_uninterrupted_run(tmp_path: Path) -> None:
    x = blobs()
    settings = KMeansSettings(k=40, iterations=7, seed=5)
    whole = kmeans(ArrayRows(x), settings)
    done = 0

    def interrupt(rows: int) -> None:
        nonlocal done
        done += rows
        if done > 3.5 * len(x):
            raise StopAfterError

    path = tmp_path / "state.npz"
    with pytest.raises(StopAfterError):
        kmeans(ArrayRows(x), settings, checkpoint=path, progress=interrupt)
    again = 0

    def count(rows: int) -> None:
        nonlocal again
        again += rows

    resumed = kmeans(ArrayRows(x), settings, checkpoint=path, progress=count)
    assert again == 4 * len(x)
    assert torch.equal(resumed.centroids, whole.centroids)
    assert resumed.objective == whole.objective
    with pytest.raises(UserError, match=r"seed=5.*seed=6"):
        kmeans(ArrayRows(x), KMeansSettings(k=40, iterations=7, seed=6), checkpoint=path)
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match="damaged"):
        kmeans(ArrayRows(x), settings, checkpoint=path)


def test_tolerance_stops_and_the_sample_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    x = blobs()
    assert len(kmeans(ArrayRows(x), KMeansSettings(k=10, iterations=50, tolerance=0.01)).objective) < 20
    with caplog.at_level("INFO"):
        kmeans(ArrayRows(x), KMeansSettings(k=10, iterations=1, train_sample=500))
    assert "sample of 500 of 3000 rows" in caplog.text


def test_kmeans_plus_plus_has_a_better_start_than_random() -> None:
    x = blobs(2000, centres=20)
    first = {}
    for init in ("random", "k-means++"):
        first[init] = np.mean(
            [kmeans(ArrayRows(x), KMeansSettings(k=20, iterations=1, seed=s, init=init)).objective[0] for s in range(5)]
        )
    assert first["k-means++"] > first["random"]


def test_empty_clusters_split_the_cluster_with_the_largest_error() -> None:
    centroids = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    before = centroids.clone()
    # Cluster 4 is large and has no spread; cluster 2 has one row.
    sizes, errors = np.array([10, 0, 1, 0, 900]), np.array([2.0, 0, 5.0, 0, 0.1])
    assert split_empty(centroids, sizes, errors, KMeansSettings(k=5), 0) == 2
    # The error of 0 is halved between 0 and 1, then the first of the two halves once more with 3.
    assert float(centroids[1] @ before[0]) > 0.999 and float(centroids[3] @ before[0]) > 0.999
    assert torch.equal(centroids[[2, 4]], before[[2, 4]])
    assert len({tuple(row.tolist()) for row in centroids}) == 5
    assert torch.allclose(centroids.norm(dim=1), torch.ones(5))


def test_a_clump_of_copies_does_not_keep_clusters_empty() -> None:
    # 900 copies of one row: a random start takes a dozen of them, which splitting by size would never get out of there.
    x = np.concatenate([np.repeat(blobs(1), 900, axis=0), blobs(600, seed=2)])
    for metric in ("cosine", "euclidean"):
        state = kmeans(ArrayRows(x), KMeansSettings(k=30, metric=metric, iterations=15))
        unit = torch.nn.functional.normalize(torch.from_numpy(x).float(), dim=1)
        labels = Assigner(state.centroids, metric, torch.device("cpu")).tile(unit)[1]
        assert len(labels.unique()) >= 29


@pytest.mark.parametrize("metric", ["cosine", "euclidean"])
@pytest.mark.parametrize(("top", "tiles"), [(1, 1), (3, 1), (TILE_CENTROIDS // 3 + 1, 3), (TILE_CENTROIDS + 9, 3)])
def test_assigner_over_several_centroid_tiles(metric: str, top: int, tiles: int) -> None:
    generator = torch.Generator().manual_seed(0)
    centroids = torch.randn(tiles * TILE_CENTROIDS + 50, 4, generator=generator)
    x = torch.randn(20 if top < 9 else 3, 4, generator=generator)
    if metric == "cosine":
        centroids, x = (torch.nn.functional.normalize(t, dim=1) for t in (centroids, x))
    value, label = Assigner(centroids, metric, torch.device("cpu")).tile(x, top)
    exact = (
        x.double() @ centroids.double().T if metric == "cosine" else -(torch.cdist(x.double(), centroids.double()) ** 2)
    )
    expected, _ = exact.topk(top, dim=1)
    assert all(len(row.unique()) == top for row in label)
    torch.testing.assert_close(exact.gather(1, label), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close((value if metric == "cosine" else -value).double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"iterations": 0}, "iterations"),
        ({"tolerance": 1.0}, "tolerance"),
        ({"backend": "cuml"}, "backend"),
        ({"metric": "dot"}, "metric"),
    ],
)
def test_settings_are_checked(change: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        KMeansSettings(**({"k": 3} | change))


def test_inputs_are_checked() -> None:
    x = blobs(50)
    with pytest.raises(UserError, match="k is 51 but there are only 50 rows"):
        kmeans(ArrayRows(x), KMeansSettings(k=51))
    x[7] = 0
    with pytest.raises(UserError, match="row 7 of the array is zero"):
        kmeans(ArrayRows(x), KMeansSettings(k=3))
    assert isinstance(kmeans(ArrayRows(x), KMeansSettings(k=3, metric="euclidean", iterations=1)), KMeansState)
    x[9, 0] = np.inf
    with pytest.raises(UserError, match="row 9 of the array holds NaN or infinity"):
        kmeans(ArrayRows(x), KMeansSettings(k=3, metric="euclidean"))


def test_imbalance_factor() -> None:
    assert imbalance_factor(np.array([5, 5, 5])) == pytest.approx(1)
    assert imbalance_factor(np.array([15, 0, 0])) == pytest.approx(3)
