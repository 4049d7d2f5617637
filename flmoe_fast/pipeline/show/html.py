"""A report as one HTML file that needs nothing else: no network, no script, no other file.

Pictures are inline SVG whose ink is the page's text colour, so that they can be read in light and dark. Behind every
picture is the table it was drawn from, in a ``details`` element that the keyboard reaches.
"""

from __future__ import annotations

import html
import io
import itertools
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np
import pandas
from matplotlib.figure import Figure

from flmoe_fast.files import replacing
from flmoe_fast.pipeline.show.figures import STYLE

#: Stands for the page's text colour while a figure is drawn; no figure uses it otherwise.
INK = "#010203"
CSS = """
:root { color-scheme: light dark; --ground: #fdfdfc; --ink: #1b1d21; --soft: #5c626b; --line: #d9dce1;
  --mark: #0b57b0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171b; --ink: #e6e8eb; --soft: #9aa2ad; --line: #343941; --mark: #8ab8f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0.2rem 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h2, nav { border-bottom: 1px solid var(--line); padding-bottom: 0.3rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.2rem; }
p { max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: 0.92rem; }
a { color: var(--mark); } nav a { margin-right: 1.1rem; display: inline-block; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
.skip { position: absolute; left: -60rem; } .skip:focus { left: 1rem; top: 0.5rem; background: var(--ground); }
figure { margin: 1rem 0; } figure svg { max-width: 100%; height: auto; color: var(--ink); display: block; }
details { margin: 0.3rem 0 0.8rem; } summary { cursor: pointer; color: var(--mark); width: fit-content; }
.scroll { overflow-x: auto; max-height: 26rem; } table { border-collapse: collapse; font-size: 0.86rem; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--ground); } th:first-child, td:first-child { text-align: left; }
.text { max-width: 60rem; } .text mark { background: none; color: inherit; outline: 2px solid #f2b632; }
"""


@dataclass
class Page:
    """Builds a report from headings, texts, figures and tables.

    Parameters
    ----------
    title : str
        Of the page.
    subtitle : str
        A line below it.
    """

    title: str
    subtitle: str = ""
    _parts: list[str] = field(default_factory=list)
    _sections: list[tuple[str, str]] = field(default_factory=list)
    _figures: itertools.count = field(default_factory=itertools.count)

    def section(self, title: str) -> None:
        """A heading that the navigation leads to."""
        anchor = f"s{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def heading(self, title: str) -> None:
        """A smaller heading."""
        self._parts.append(f"<h3>{html.escape(title)}</h3>")

    def text(self, text: str, soft: bool = False) -> None:
        """A paragraph of plain text."""
        kind = ' class="soft"' if soft else ""
        self._parts.append(f"<p{kind}>{html.escape(text)}</p>")

    def tokens(self, tokens: Sequence[str], marked: Sequence[int]) -> None:
        """A text as its tokens, the marked ones outlined."""
        chosen = set(marked)
        words = [
            f"<mark>{html.escape(token)}</mark>" if n in chosen else html.escape(token)
            for n, token in enumerate(tokens)
        ]
        self._parts.append(f'<p class="text">{"".join(words)}</p>')

    def figure(self, figure: Figure, description: str, table: pandas.DataFrame | None = None) -> None:
        """A picture, what it shows, and the numbers behind it."""
        number = next(self._figures)
        label = html.escape(description, quote=True)
        svg = as_svg(figure, f"f{number}").replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
        self._parts.append(f"<figure>{svg}<figcaption>{html.escape(description)}</figcaption>")
        if table is not None:
            self._parts.append(_details("Numbers", table))
        self._parts.append("</figure>")

    def table(self, title: str, table: pandas.DataFrame) -> None:
        """A table that can be opened."""
        self._parts.append(_details(title, table))

    def render(self) -> str:
        """The whole page."""
        links = "".join(f'<a href="#{anchor}">{html.escape(title)}</a>' for anchor, title in self._sections)
        subtitle = f'<p class="soft">{html.escape(self.subtitle)}</p>' if self.subtitle else ""
        return (
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            '<link rel="icon" href="data:,">\n'
            f"<title>{html.escape(self.title)}</title>\n<style>{CSS}</style>\n</head>\n<body>\n"
            '<a class="skip" href="#main">Skip to the content</a>\n'
            f"<header><h1>{html.escape(self.title)}</h1>{subtitle}</header>\n"
            f'<nav aria-label="Sections">{links}</nav>\n<main id="main">\n'
            + "\n".join(self._parts)
            + "\n</main>\n</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the page."""
        with replacing(path, "w") as file:
            file.write(self.render())


def inked():
    """The style in which figures of a page are drawn, as a context."""
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    style = {**STYLE, **dict.fromkeys(parts, INK), "svg.fonttype": "none", "font.family": "sans-serif"}
    style |= {"figure.facecolor": "none", "axes.facecolor": "none", "savefig.facecolor": "none"}
    return matplotlib.rc_context(style)


def as_svg(figure: Figure, prefix: str) -> str:
    """A figure as an SVG element; names in it start with ``prefix``, so that figures of a page do not meet."""
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "none"}):
        # Tight, since layouts leave too little room above titles of axes that keep their aspect.
        clear = {"Date": None, "Creator": None}
        figure.savefig(buffer, format="svg", metadata=clear, bbox_inches="tight", pad_inches=0.08)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # Only what is referred to keeps a name: matplotlib names equal images alike.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{prefix}-', svg)
    return re.sub(r"url\(#", f"url(#{prefix}-", svg)


def _details(title: str, table: pandas.DataFrame) -> str:
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in table.columns)
    rows = []
    for row in table.itertuples(index=False):
        rows.append("<tr>" + "".join(f"<td>{html.escape(_cell(value))}</td>" for value in row) + "</tr>")
    # A region that scrolls has to take the focus, or the keyboard could not scroll it.
    label = html.escape(title, quote=True)
    return (
        f"<details><summary>{html.escape(title)} ({len(table)} rows)</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _cell(value: object) -> str:
    if isinstance(value, (bool, np.bool_)):
        return "yes" if value else "no"
    if isinstance(value, (float, np.floating)):
        return "" if np.isnan(value) else f"{value:.4g}"
    return str(value)
