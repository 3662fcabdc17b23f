"""Results as text for people: HTML pages from templates, and tables for a terminal."""

import base64
from collections.abc import Sequence
from hashlib import sha256
from itertools import zip_longest
from pathlib import Path

import jinja2
import markupsafe
from markupsafe import Markup

from nanoalign.evaluation.statistics import Figures
from nanoalign.files.text import visible


def render(template: Path, **values: object) -> str:
    """Renders a jinja2 template as HTML. A name without a value is an error.

    Every value is HTML-escaped, and control characters are shown as escapes (\\x1b). The template
    can call source_of(text), which returns the CSP source of an inline script or style, and
    picture(path), which returns a PNG or SVG file as a data: address.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(template.parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a name that is not among the values is an error
        finalize=_visible,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.globals |= {"source_of": source_of, "picture": picture}
    return environment.get_template(template.name).render(values)


def _visible(value: object) -> object:
    """Returns `visible` text for a str; Markup, which the template itself has, and others as is."""
    return value if isinstance(value, Markup) or not isinstance(value, str) else visible(value)


def escape(text: str) -> Markup:
    """Text as HTML that shows it: escaped as `render` does, with its controls as escapes."""
    return markupsafe.escape(visible(text))


def source_of(text: str) -> Markup:
    """The source expression by which a Content Security Policy (Level 3) allows an inline text."""
    return Markup(f"'sha256-{base64.b64encode(sha256(text.encode()).digest()).decode()}'")


def picture(path: Path) -> str:
    """Reads a PNG or SVG file, and returns it as a data: address."""
    kind = {".png": "png", ".svg": "svg+xml"}[path.suffix]
    return f"data:image/{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows of cells as text, a line a row.

    left: how many of the first columns are aligned on the left; the others are on the right.
    A row may have fewer cells than others.
    """
    columns = list(zip_longest(*rows, fillvalue=""))
    widths = [max(map(len, column)) for column in columns]
    lines = []
    for row in zip(*columns, strict=True):
        cells = [
            cell.ljust(widths[n]) if n < left else cell.rjust(widths[n])
            for n, cell in enumerate(row)
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def figures_table(rows: dict[str, Figures], title: str) -> str:
    """Figures as text, a line for each of `rows`, whose names are the first column.

    The words of a figure's name are below each other in the heading. title: of the first column.
    """
    names = list(dict.fromkeys(name for figures in rows.values() for name in figures))
    heads = zip_longest([title], *(name.split("_") for name in names), fillvalue="")
    body = [
        [label, *(cell(figures.get(name), 3) for name in names)] for label, figures in rows.items()
    ]
    return table([*heads, *body])


def cell(value: float | int | None, digits: int, missing: str = "-") -> str:
    """A figure as text: an int as it is, a float with `digits` digits behind the point.

    missing: the text for None.
    """
    if value is None:
        return missing
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}f}"


def share(figures: Figures, name: str) -> str:
    """A share and its interval as text, of the figures `name`, `name`_low and `name`_high."""
    value, low, high = (figures[f"{name}{end}"] for end in ("", "_low", "_high"))
    return f"{value:.1%} [{low:.1%}, {high:.1%}]"
