"""Set the style of all figures: drawn off screen, in colours for colour-blind readers, legible in a README."""

import io
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from dyndit.files import written_whole

INK, FAINT = "#222222", "#bbbbbb"
# Okabe and Ito's palette, ordered so that neighbours also differ in lightness; full depth has INK.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "svg.hashsalt": "dyndit",
}
SAVED = {"dpi": 150, "facecolor": "white"}


def save(figure: Figure, path: Path) -> None:
    """Write the figure in the format of the suffix (.png, .svg, .pdf), whole or not at all."""
    dated = {"metadata": {"Date": None}} if Path(path).suffix == ".svg" else {}  # equal figures make equal files
    with written_whole(path) as draft, matplotlib.rc_context({"svg.hashsalt": "dyndit"}):
        figure.savefig(draft, **SAVED, **dated)


def png(figure: Figure) -> bytes:
    """Return the figure as a PNG, the same bytes as from `save`."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", **SAVED)
    return buffer.getvalue()


def panels(num: int, columns: int, width: float, height: float, **kwargs) -> tuple[Figure, list[Axes]]:
    """Return a figure without pyplot's global state, and `num` axes, `columns` per row."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(width, height * -(-num // columns)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(-(-num // columns), columns, squeeze=False, **kwargs).ravel()
        for spare in axes[num:]:
            spare.set_visible(False)
    return figure, list(axes[:num])


def number_log(axis: Axis, subs: tuple[float, ...] = (1, 2, 3, 5, 7)) -> None:
    """Label an axis of log scale with plain numbers: 1, 2, 3, 5, 7, 10, 20, ..."""
    axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
