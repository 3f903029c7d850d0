"""Which groups and which cluster are shown, and what the drawings are made of."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megacid.errors import UserError
from megacid.offline.balance import cluster_process as cluster_process_module
from megacid.offline.balance.cluster_process import choose_cluster, cluster_process, layout, spread_overlaps
from megacid.offline.balance.drawing import (
    group_colour,
    group_figure,
    process_figure,
    size_curve,
    size_figure,
)
from megacid.offline.balance.figures import Choice
from megacid.offline.balance.gallery import group_rows, page
from megacid.offline.balance.groups import Groups, perceptual_distance, representative_distance
from megacid.offline.figure_style import figure_style, save_figure
from megacid.offline.rows import ArrayRows

# Groups {0, 1}, {2, 3, 4}, {5, 6}, {7, 8} of spread 0.5, 0.2, 0.05, 0.3; 9 is alone.
REPRESENTATIVE = np.array([0, 0, 2, 2, 2, 5, 5, 7, 7, 9])
DISTANCE = np.array([0, 0.5, 0, 0.2, 0.1, 0, 0.05, 0, 0.3, 0])


def test_groups_are_sorted_by_their_largest_distance_and_parted_at_the_given_one() -> None:
    groups = Groups(REPRESENTATIVE, DISTANCE)
    assert groups.spread.tolist() == [0.05, 0.2, 0.3, 0.5]
    perceptual, semantic = groups.perceptual(0.3, 9, 9), groups.semantic(0.3, 9, 9)
    assert [group.rows.tolist() for group in perceptual] == [[5, 6], [2, 4, 3]]  # kept one, then nearest first
    assert [group.rows.tolist() for group in semantic] == [[7, 8], [0, 1]]  # 0.3 is not below 0.3
    assert perceptual[1].distances.tolist() == [0, 0.1, 0.2] and perceptual[1].size == 3
    few = groups.perceptual(1.0, 2, 2)
    assert [(group.spread, len(group.rows), group.size) for group in few] == [(0.05, 2, 2), (0.5, 2, 2)]
    assert [group.spread for group in groups.near(0.32, 0.1, 2, 9)] == [0.2, 0.3]  # the two nearest to 0.32, by spread
    assert [group.spread for group in groups.near(0.32, 0.25, 2, 9)] == [0.3, 0.5]
    assert groups.perceptual(0.01, 9, 9) == [] and groups.count_perceptual(0.01) == 0
    nothing = Groups(np.arange(4), np.zeros(4))
    assert (
        len(nothing) == 0 and nothing.perceptual(1, 3, 3) == nothing.near(1, 0, 3, 3) == nothing.semantic(0, 3, 3) == []
    )


def test_members_of_a_large_group_are_spread_over_its_distances() -> None:
    representative, distance = np.zeros(101, np.int64), np.arange(101) / 100
    group = Groups(representative, distance).at(0, 5)
    assert group.rows.tolist() == [0, 1, 34, 67, 100] and group.size == 101 and group.spread == 1.0


def test_distance_of_perceptual_redundancy() -> None:
    assert perceptual_distance(0.4) == 0.2 and perceptual_distance(0.4, 0.4) == 0.4
    for wrong in (0.0, 0.5):
        with pytest.raises(UserError, match=r"--perceptual is .*, expected above 0 and at most the threshold .* 0\.4"):
            perceptual_distance(0.4, wrong)
    with pytest.raises(UserError, match="--members is 1, expected at least 2"):
        Choice(members=1)


def circle(angles: list[float]) -> ArrayRows:
    return ArrayRows(np.stack([np.cos(angles), np.sin(angles)], axis=1).astype(np.float32))


def test_sample_cluster_has_the_median_size_among_those_with_two_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    # Clusters 0 .. 4 of 4, 6, 9, 5 and 20 samples; cluster 3 has one group.
    label = np.repeat([0, 1, 2, 3, 4], [4, 6, 9, 5, 20])
    representative = np.arange(len(label))
    for cluster, groups in ((0, 2), (1, 2), (2, 2), (3, 1), (4, 3)):
        first = int(np.flatnonzero(label == cluster)[0])
        for group in range(groups):
            representative[first + 2 * group + 1] = first + 2 * group
    assert choose_cluster(label, representative, 5) == 1  # 4, 6, 9, 20: the lower median
    monkeypatch.setattr(cluster_process_module, "MOST_SHOWN", 8)
    assert choose_cluster(label, representative, 5) == 0  # 4, 6
    assert choose_cluster(label, np.arange(len(label)), 5) is None


def test_process_of_a_cluster_is_that_of_its_pairs() -> None:
    angles = [0.0, 0.1, 0.2, 1.0, 1.1, 2.0, 0.05]  # the last one is in another cluster
    label, representative = np.array([0, 0, 0, 0, 0, 0, 1]), np.array([1, 1, 1, 3, 3, 5, 1])
    keep = representative == np.arange(7)
    rows = circle(angles)
    shown = cluster_process(rows, label, representative, keep, 0.15, 0)
    assert shown.links.tolist() == [[0, 1], [1, 2], [3, 4]]
    assert shown.component.tolist() == [0, 0, 0, 1, 1, -1]  # the largest first; a sample alone has none
    assert shown.kept.tolist() == [False, True, False, True, False, True]
    # Rows of two dimensions lie in their first two components: distances stay.
    x = rows.array[:6].astype(float)
    np.testing.assert_allclose(
        np.linalg.norm(shown.place[:, None] - shown.place[None], axis=2),
        np.linalg.norm(x[:, None] - x[None], axis=2),
        atol=1e-6,
    )
    assert shown.explained == pytest.approx(1)
    alone = cluster_process(circle([0.3]), np.zeros(1, int), np.zeros(1, int), np.ones(1, bool), 0.1, 0)
    assert alone.place.tolist() == [[0, 0]] and layout(alone)[0].shape == (1, 2)
    with pytest.raises(UserError, match="cluster 7 has 0 samples, expected 1 to 500"):
        cluster_process(rows, label, representative, keep, 0.15, 7)
    np.testing.assert_allclose(
        representative_distance(rows, representative),
        2 * np.sin(np.abs(np.array(angles) - np.array(angles)[representative]) / 2),
        atol=1e-6,
    )


def test_pictures_of_one_point_are_moved_apart_inside_the_square() -> None:
    place = np.concatenate([np.full((20, 2), 0.5), np.random.default_rng(0).random((10, 2))])
    side = 0.1
    moved = spread_overlaps(place, side)
    gap = np.abs(moved[:, None] - moved[None]).max(axis=2) + np.eye(30)
    assert gap.min() > 0.9 * side and moved.min() >= side / 2 and moved.max() <= 1 - side / 2
    apart_already = np.array([[0.2, 0.2], [0.8, 0.8]])
    np.testing.assert_allclose(spread_overlaps(apart_already, side), apart_already, atol=0.01 * side)


def test_curve_of_a_million_clusters_is_short() -> None:
    sizes = np.random.default_rng(0).zipf(1.5, 1_000_000)
    ranks, at = size_curve(sizes)
    assert len(ranks) <= 300 and ranks[0] == 1 and ranks[-1] == 1_000_000
    np.testing.assert_array_equal(at, np.sort(sizes)[::-1][ranks - 1])
    for after, points in (([1, 1, 0], 2), ([0, 0, 0], 0)):  # a cluster without samples has no point
        lines = size_figure(np.array([5, 3, 0]), np.array(after)).axes[0].lines
        assert [len(line.get_xdata()) for line in lines] == [2, points]


def test_drawings_show_every_image_and_repeat_bit_for_bit(tmp_path: Path) -> None:
    angles = [0.0, 0.01, 0.02, 1.0, 1.01, 2.0, 2.5]
    representative, label = np.array([0, 0, 0, 3, 3, 5, 6]), np.zeros(7, int)
    keep, rows = representative == np.arange(7), circle(angles)
    show = lambda row: (Image.new("RGB", (9, 6), (30 * row, 90, 200)), str(row), "")  # noqa: E731
    shown = cluster_process(rows, label, representative, keep, 0.1, 0)
    groups = Groups(representative, representative_distance(rows, representative)).perceptual(1, 9, 9)
    with figure_style():
        panels = [len(axes.images) for axes in process_figure(shown, show).axes]
        assert panels == [7, 7, 4]  # before, links, after
        assert [len(axes.images) for axes in group_figure(groups, keep, show).axes] == [5]
        first, again = (
            save_figure(process_figure(shown, show), tmp_path / name / "figure") for name in ("first", "again")
        )
    assert [path.suffix for path in first] == [".png", ".svg", ".pdf"]
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]


def test_page_escapes_what_comes_from_the_data() -> None:
    image = Image.new("RGB", (8, 8))
    show = lambda row: (image, f"<key {row}>", 'a "caption" <b>')  # noqa: E731
    keep = np.array([True, False] + [False] * 8)
    body = group_rows(Groups(REPRESENTATIVE, DISTANCE).semantic(0.4, 1, 9), keep, show)
    text = page("<t>", "<s>", [("<h>", "<x>", body)])
    assert (
        "&lt;key 1&gt;" in text and "&quot;caption&quot; &lt;b&gt;" in text and "<key" not in text and "<b>" not in text
    )
    assert all(f"&lt;{letter}&gt;" in text and f"<{letter}>" not in text for letter in "tshx")
    assert text.count('class="kept"') == 1 and "0.5000" in text
    # A group of which the cap left nothing says so.
    assert "removed by the cap" in group_rows(Groups(REPRESENTATIVE, DISTANCE).semantic(0.4, 1, 9), ~keep & False, show)
    assert group_colour(-1) not in {group_colour(number) for number in range(8)}


def test_control_characters_of_captions_and_keys_are_escapes_in_the_gallery() -> None:
    codes = "\x1b\x07\x9b\0\r\u202e\udc9b"

    def show(number: int) -> tuple[Image.Image, str, str]:
        return Image.new("RGB", (8, 8)), f"key{codes}", f"caption{codes}<"

    keep = np.array([True, False] + [False] * 8)
    body = group_rows(Groups(REPRESENTATIVE, DISTANCE).semantic(0.4, 1, 9), keep, show)
    shown = r"\x1b\x07\x9b\x00\r\u202e\udc9b"
    assert f"key{shown}<br>" in body and f'title="caption{shown}&lt;"' in body and f'alt="caption{shown}&lt;"' in body
    assert not any(code in body for code in codes)
    body.encode()
