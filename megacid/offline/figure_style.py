"""The style of all figures: colours, sizes, fonts, and how they are written."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from megacid.errors import UserError
from megacid.storage.atomic import writing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMN, PAGE = 3.4, 7.0  # widths in inches: one column of a two-column paper, and both
# Safe for colour-blind readers (Okabe and Ito, 2008), with a darker yellow.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#B8A800", "#000000")
GREY = "#9a9a9a"
MARKERS = "osD^vP*X"  # one per colour, so that the colour alone does not tell lines apart
DASHES = ("-", "--", "-.", ":")
_STYLE: dict[Any, Any] = {
    "font.size": 8,
    "font.family": "sans-serif",
    "axes.titlesize": 8,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "pdf.fonttype": 42,  # text stays text
    "svg.hashsalt": "megacid",  # the names of its parts are random without one
}
_FORMATS: dict[str, dict[str, None]] = {
    "png": {"Software": None},
    "svg": {"Date": None, "Creator": None},
    "pdf": {"CreationDate": None},
}


@contextmanager
def figure_style() -> Iterator[None]:
    """Applies the style. Raises UserError when matplotlib is not installed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("matplotlib is not installed, the figures need it: pip install matplotlib") from None
    with matplotlib.rc_context(_STYLE):
        yield


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of that size in inches, and its axes [rows, columns]. options: of matplotlib's `subplots`."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def add_legend(
    figure: Figure, lines: Mapping[str, Any], place: Literal["upper", "lower"], title: str | None = None
) -> None:
    """A legend outside of the axes, in as many columns as fit; the figure grows with its lines. lines: by label."""
    width, height = figure.get_size_inches()
    fitting = int(width / (0.07 * max(map(len, lines)) + 0.5))  # inches: a character, a handle with its gaps
    columns = min(max(fitting, 1), len(lines))
    figure.set_size_inches(width, height + 0.17 * (-(-len(lines) // columns) - 1))
    figure.legend(
        list(lines.values()), list(lines), loc=cast(Any, f"outside {place} center"), ncols=columns, title=title
    )


def save_figure(figure: Figure, stem: Path) -> list[Path]:
    """Writes .png at 300 dpi, .svg and .pdf, without a date: equal input gives equal bytes. Returns the paths."""
    paths = []
    for ending, metadata in _FORMATS.items():
        paths.append(stem.with_name(f"{stem.name}.{ending}"))
        with writing(paths[-1]) as temporary:
            figure.savefig(temporary, dpi=300, metadata=metadata)
    return paths
