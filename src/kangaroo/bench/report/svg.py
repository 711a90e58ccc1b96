"""From a drawing to SVG that can stand inside a page: no prolog, no outside reference, ids that no other drawing has.

matplotlib draws; it comes with the `bench` extra and is imported when the first drawing is made.
"""

import io
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from kangaroo.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, FAINT = "#1d2730", "#d5dbe0"
STYLE: dict[str, Any] = {
    "svg.fonttype": "none",  # text stays text: it takes the page's font, can be searched and read aloud
    "svg.hashsalt": "kangaroo",  # the same drawing gives the same file
    "font.family": "sans-serif",
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.edgecolor": INK,
    "axes.linewidth": 0.7,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": FAINT,
    "grid.linewidth": 0.6,
    "hatch.linewidth": 0.7,
    "hatch.color": INK,
    "legend.frameon": False,
    "legend.handlelength": 2.8,
}


def draw(name: str, width: float, height: float, paint: Callable[["Axes"], None]) -> str:
    """SVG of `width` by `height` inches that `paint` fills; `name` is no other drawing's on the page.

    Raises ConfigError if matplotlib is not installed.
    """
    try:
        from matplotlib import style
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("the report's plots need the bench extra: pip install 'kangaroo-decoding[bench]'") from None
    with style.context(["default", STYLE]):
        figure = Figure(figsize=(width, height), layout="constrained")
        paint(figure.add_subplot())
        text = io.StringIO()
        figure.savefig(
            text, format="svg", transparent=True, metadata=dict.fromkeys(("Creator", "Date", "Format", "Type"))
        )
    return inline(text.getvalue(), name)


def inline(svg: str, name: str) -> str:
    """A standalone SVG file as an element of a page."""
    element = svg[svg.index("<svg") :]
    element = re.sub(r"<svg[^>]*?(viewBox=\"[^\"]*\")[^>]*>", r'<svg \1 aria-hidden="true">', element, count=1)
    element = re.sub(r"<style.*?</style>", "", element, flags=re.DOTALL)  # the page has it once for all
    element = re.sub(r'\bid="', f'id="{name}-', element)
    element = re.sub(r'(?:xlink:)?href="#', f'href="#{name}-', element)
    return re.sub(r"url\(#", f"url(#{name}-", element).strip()
