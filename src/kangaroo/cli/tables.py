"""Tables that a narrow terminal can show too: there, every row is a paragraph."""

from collections.abc import Collection, Mapping, Sequence

from rich.console import Console
from rich.measure import Measurement
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

_WIDEST = 10_000


def print_rows(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], texts: Collection[str] = ()
) -> None:
    """Rows under headings. The first column names them; columns are numbers, but for that one and the `texts`."""
    table = Table(box=None)
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if not place or heading in texts else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    if Measurement.get(console, console.options.update_width(_WIDEST), table).maximum <= console.width:
        console.print(table, soft_wrap=False)
        return
    for name, *cells in rows:
        console.print(Text(name, style="bold"))
        pairs = (f"{heading} {cell}" for heading, cell in zip(headings[1:], cells, strict=True))
        console.print(Padding(Text(", ".join(pairs)), (0, 0, 0, 2)), soft_wrap=False)


def print_facts(console: Console, facts: Mapping[str, str]) -> None:
    """Names and values."""
    table = Table(show_header=False, box=None)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in facts.items():
        table.add_row(name, value)
    console.print(table, soft_wrap=False)
