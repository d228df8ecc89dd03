"""Pictures for a README: each is drawn twice, for light and for dark pages, by the same function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Okabe and Ito's colours, which people who see few colours can tell apart too; the first is always flashserve's.
COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#B8A800", "#7A5195", "#8C564B")


@dataclass(frozen=True)
class Theme:
    """Colours of a page, as GitHub's."""

    name: str
    background: str
    text: str
    faint: str
    """Grids and what is not to be looked at first."""


THEMES = (Theme("light", "#ffffff", "#1f2328", "#d0d7de"), Theme("dark", "#0d1117", "#e6edf3", "#3d444d"))


def draw(path: Path, size: tuple[float, float], paint: Callable[[Any, Theme], None]) -> list[Path]:
    """Call ``paint(figure, theme)`` for each theme and write ``<path>-<theme>.png``; returns the files, none where
    matplotlib is missing."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: matplotlib is not installed (pip install 'flashserve[bench]')")
        return []
    matplotlib.use("Agg")
    from matplotlib import pyplot

    files = []
    for theme in THEMES:
        colors: dict[Any, Any] = {
            **dict.fromkeys(("figure.facecolor", "axes.facecolor", "legend.facecolor"), theme.background),
            **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), theme.text),
            **dict.fromkeys(("axes.edgecolor", "grid.color", "legend.edgecolor"), theme.faint),
        }
        others: dict[Any, Any] = {
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.axisbelow": True,
            "font.size": 10,
        }
        with matplotlib.rc_context({**colors, **others}):
            figure = pyplot.figure(figsize=size, layout="constrained")
            paint(figure, theme)
            file = path.with_name(f"{path.name}-{theme.name}.png")
            figure.savefig(file, dpi=150)
            pyplot.close(figure)
        files.append(file)
    return files


def head(figure: Any, title: str, subtitle: str, theme: Theme) -> None:
    """A title that says what is to be seen, and a smaller line that says how it was measured."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=13, fontweight="bold")
    figure.supxlabel(subtitle, x=0.02, ha="left", fontsize=8, color=theme.text, alpha=0.75)
