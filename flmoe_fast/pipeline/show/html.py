"""A report as one HTML file that needs nothing else: no network, no other file.

Pictures are inline SVG whose ink is the page's text colour, so that they can be read in light and dark. Behind every
picture is the table it was drawn from, in a ``details`` element that the keyboard reaches. A few lines of script sort
tables, choose between heads and open the tables for print; without them everything is there, unsorted and in full.
"""

from __future__ import annotations

import contextlib
import html
import io
import itertools
import os
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import matplotlib
import numpy as np
import pandas
from matplotlib.axes import Axes

from flmoe_fast.files import replacing
from flmoe_fast.pipeline.show.look import styled
from flmoe_fast.pipeline.show.views import spaced
from flmoe_fast.probes.colours import GROUND

#: Stands for the page's text colour while a figure is drawn; no figure uses it otherwise.
INK = "#010203"
#: Share of its own width to which a picture shrinks on a narrow screen before it scrolls: letters stay legible.
NARROWEST = 0.75
#: Inches around a picture.
MARGIN = 0.08
CSS = """
:root { color-scheme: light dark; --ground: #fdfdfc; --ink: #1b1d21; --soft: #5c626b; --line: #d9dce1;
  --mark: #0b57b0; }
@media (prefers-color-scheme: dark) {
  :root { --ground: #15171b; --ink: #e6e8eb; --soft: #9aa2ad; --line: #343941; --mark: #8ab8f5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 74rem; padding: 1.5rem; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; overflow-wrap: break-word; }
h1 { font-size: 1.6rem; margin: 0.2rem 0; } h2 { font-size: 1.25rem; margin-top: 2.2rem; }
h2, nav { border-bottom: 1px solid var(--line); padding-bottom: 0.3rem; }
h3 { font-size: 1.05rem; margin: 1.6rem 0 0.2rem; }
p { max-width: 46rem; } .soft, figcaption { color: var(--soft); font-size: 0.92rem; }
dfn { font-style: normal; font-weight: 600; } .term { border-left: 3px solid var(--line); padding-left: 0.7rem; }
a { color: var(--mark); } nav a { margin-right: 1.1rem; display: inline-block; }
:focus-visible { outline: 3px solid var(--mark); outline-offset: 2px; }
.skip { position: absolute; left: -60rem; } .skip:focus { left: 1rem; top: 0.5rem; background: var(--ground); }
figure { margin: 1rem 0; } .row { display: flex; flex-wrap: wrap; gap: 0.5rem 2rem; }
.plot { overflow-x: auto; max-width: 100%; } .plot svg { height: auto; color: var(--ink); display: block; }
details { margin: 0.3rem 0 0.8rem; } summary { cursor: pointer; color: var(--mark); width: fit-content; }
.scroll { overflow-x: auto; max-height: 26rem; } table { border-collapse: collapse; font-size: 0.86rem; }
th, td { padding: 0.15rem 0.7rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { position: sticky; top: 0; background: var(--ground); } th:first-child, td:first-child { text-align: left; }
th button { all: unset; cursor: pointer; } th button:focus-visible { outline: 3px solid var(--mark); }
th[aria-sort=ascending] button::after { content: " \\2191"; }
th[aria-sort=descending] button::after { content: " \\2193"; }
.choose { font: inherit; color: var(--ink); background: var(--ground); border: 1px solid var(--line); padding: 0.2rem; }
.text { max-width: 60rem; } .text mark { background: none; color: inherit; outline: 2px solid #e0a100; }
@media (max-width: 34rem) { body { padding: 0.8rem; } }
@media print {
  :root { color-scheme: light; --ground: #fff; --ink: #000; --soft: #444; --line: #bbb; --mark: #000; }
  body { max-width: none; padding: 0; font-size: 10pt; } nav, .skip, .choose, summary { display: none; }
  .scroll { max-height: none; overflow: visible; } th { position: static; } thead { display: table-header-group; }
  table { font-size: 6.5pt; } th, td { padding: 0.05rem 0.35rem; } p, figure, details { margin: 0.3rem 0; }
  .row { gap: 0.2rem 1rem; } .plot { overflow: visible; break-inside: avoid; }
  .plot svg { max-width: 100% !important; min-width: 0 !important; max-height: 10.5cm; }
  tr, .term { break-inside: avoid; } figcaption { break-after: avoid; } h2, h3 { break-after: avoid; }
  h3.sample { break-before: page; }
  h2 + p + h3.sample, h2 + h3.sample { break-before: auto; }
}
"""
#: Sorts tables by a click on a column's name, shows one head at a time, opens tables while printing.
SCRIPT = """
for (const table of document.querySelectorAll("table")) table.querySelectorAll("th").forEach((th, column) => {
  const button = document.createElement("button");
  button.append(...th.childNodes); th.append(button);
  button.onclick = () => {
    const up = th.getAttribute("aria-sort") === "descending", body = table.tBodies[0];
    const key = row => row.cells[column].dataset.v ?? row.cells[column].textContent;
    const number = text => text === "" ? -Infinity : Number(text);
    const rows = [...body.rows], numeric = rows.every(row => !Number.isNaN(number(key(row))));
    rows.sort((a, b) => numeric ? number(key(a)) - number(key(b)) : key(a).localeCompare(key(b)));
    table.querySelectorAll("th").forEach(other => other.removeAttribute("aria-sort"));
    th.setAttribute("aria-sort", up ? "ascending" : "descending");
    body.append(...(up ? rows : rows.reverse()));
  };
});
for (const group of document.querySelectorAll(".heads")) {
  const panels = [...group.querySelectorAll(":scope > [data-head]")], choose = document.createElement("select");
  for (const panel of panels) choose.add(new Option(panel.dataset.head));
  const show = () => panels.forEach((panel, n) => panel.hidden = n !== choose.selectedIndex);
  const label = document.createElement("label");
  choose.className = "choose"; choose.onchange = show; label.append(group.dataset.what + " ", choose);
  label.className = "choose"; label.style.border = "none"; group.prepend(label); show();
}
let closed = [];
addEventListener("beforeprint", () => { closed = [...document.querySelectorAll("details:not([open])")];
  closed.forEach(one => one.open = true); });
addEventListener("afterprint", () => closed.forEach(one => one.open = false));
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
    _explained: set[str] = field(default_factory=set)

    def section(self, title: str) -> None:
        """A heading that the navigation leads to."""
        anchor = f"s{len(self._sections) + 1}"
        self._sections.append((anchor, title))
        self._parts.append(f'<h2 id="{anchor}">{html.escape(title)}</h2>')

    def heading(self, title: str) -> None:
        """A smaller heading, of a sample; in print it starts a page."""
        self._parts.append(f'<h3 class="sample">{html.escape(title)}</h3>')

    def text(self, text: str, soft: bool = False) -> None:
        """A paragraph of plain text."""
        kind = ' class="soft"' if soft else ""
        self._parts.append(f"<p{kind}>{html.escape(text)}</p>")

    def term(self, name: str, meaning: str) -> None:
        """What a term means, where the page first uses it; asked for again, nothing."""
        if name not in self._explained:
            self._explained.add(name)
            self._parts.append(f'<p class="term soft"><dfn>{html.escape(name)}</dfn>: {html.escape(meaning)}</p>')

    def tokens(self, tokens: Sequence[str], marked: Sequence[int]) -> None:
        """A text as a person writes it, the marked tokens outlined."""
        chosen, words = set(marked), []
        for n, token in enumerate(spaced(tokens)):
            word = html.escape(token.lstrip())
            space = html.escape(token[: len(token) - len(token.lstrip())])
            words.append(space + (f"<mark>{word}</mark>" if n in chosen and word else word))
        self._parts.append(f'<p class="text">{"".join(words)}</p>')

    def figure(
        self,
        pictures: Axes | Sequence[Axes],
        description: str,
        table: pandas.DataFrame | None = None,
        title: str = "Numbers",
    ) -> None:
        """Pictures that belong together, what they show, and the numbers behind them."""
        self._parts.append(self._figure(pictures, description, table, title))

    def choice(
        self, what: str, options: Mapping[str, tuple[Axes | Sequence[Axes], str, pandas.DataFrame | None]]
    ) -> None:
        """Figures (pictures, description, table) of which the reader sees one, chosen by its name."""
        panels = [
            f'<div data-head="{html.escape(name, quote=True)}">{self._figure(*parts)}</div>'
            for name, parts in options.items()
        ]
        self._parts.append(f'<div class="heads" data-what="{html.escape(what, quote=True)}">{"".join(panels)}</div>')

    def table(self, title: str, table: pandas.DataFrame) -> None:
        """A table that can be opened."""
        self._parts.append(_details(title, table))

    def _figure(
        self,
        pictures: Axes | Sequence[Axes],
        description: str,
        table: pandas.DataFrame | None = None,
        title: str = "Numbers",
    ) -> str:
        drawn = []
        for axes in [pictures] if isinstance(pictures, Axes) else pictures:
            label = html.escape(f"{axes.get_title()}. {description}".removeprefix(". "), quote=True)
            svg = as_svg(axes, f"f{next(self._figures)}").replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
            drawn.append(f'<div class="plot" tabindex="0">{svg}</div>')
        numbers = "" if table is None else _details(title, table)
        caption = f"<figcaption>{html.escape(description)}</figcaption>"
        return f'<figure><div class="row">{"".join(drawn)}</div>{caption}{numbers}</figure>'

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
            + f"\n</main>\n<script>{SCRIPT}</script>\n</body>\n</html>\n"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write the page."""
        with replacing(path, "w") as file:
            file.write(self.render())


@contextlib.contextmanager
def inked() -> Iterator[None]:
    """The style in which figures of a page are drawn, as a context."""
    parts = ("text.color", "axes.labelcolor", "axes.edgecolor", "axes.titlecolor", "xtick.color", "ytick.color")
    grounds = ("figure.facecolor", "axes.facecolor", "savefig.facecolor")
    style = {**dict.fromkeys(parts, INK), **dict.fromkeys(grounds, "none"), "svg.fonttype": "none"}
    with styled(style), warnings.catch_warnings():
        # The browser draws the letters, and has more fonts.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
        yield


def as_svg(axes: Axes, prefix: str) -> str:
    """The figure of some axes as an SVG element; names in it start with ``prefix``, so that figures do not meet."""
    buffer = io.StringIO()
    figure: Any = axes.get_figure(root=True)
    with matplotlib.rc_context({"svg.hashsalt": prefix, "svg.fonttype": "none"}):
        figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg ") :].replace(INK, "currentColor").replace(GROUND, "var(--ground)")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    # What is seen of it is as large as what was drawn: layouts leave too little room above titles of axes that keep
    # their aspect. matplotlib's own way to the same end draws everything twice.
    box = figure.get_tightbbox().padded(MARGIN)
    left, top, width, height = 72 * box.x0, 72 * (figure.get_figheight() - box.y1), 72 * box.width, 72 * box.height
    # As wide as it was drawn where there is room.
    size = f"width:{width:.0f}pt;max-width:100%;min-width:{NARROWEST * width:.0f}pt"
    svg = re.sub(r'\s(?:width|height)="[\d.]+pt"', "", svg, count=2)
    seen = f'style="{size}" viewBox="{left:.2f} {top:.2f} {width:.2f} {height:.2f}"'
    svg = re.sub(r'viewBox="[^"]*"', seen, svg, count=1)
    # Only what is referred to keeps a name: matplotlib names equal images alike.
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', svg))
    svg = re.sub(r'\sid="([^"]*)"', lambda found: f' id="{prefix}-{found[1]}"' if found[1] in used else "", svg)
    svg = re.sub(r'((?:xlink:)?href)="#', rf'\1="#{prefix}-', svg)
    return re.sub(r"url\(#", f"url(#{prefix}-", svg)


def _details(title: str, table: pandas.DataFrame) -> str:
    head = "".join(f'<th scope="col">{html.escape(str(column))}</th>' for column in table.columns)
    rows = []
    for row in table.itertuples(index=False):
        rows.append("<tr>" + "".join(_cell(value) for value in row) + "</tr>")
    # A region that scrolls has to take the focus, or the keyboard could not scroll it.
    label = html.escape(title, quote=True)
    return (
        f"<details><summary>{html.escape(title)} ({len(table)} rows)</summary>"
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div></details>"
    )


def _cell(value: object) -> str:
    """A cell; of a rounded number also its exact value, to sort by."""
    if isinstance(value, (bool, np.bool_)):
        return f"<td>{'yes' if value else 'no'}</td>"
    if isinstance(value, (float, np.floating)):
        return "<td></td>" if np.isnan(value) else f'<td data-v="{float(value)!r}">{value:.4g}</td>'
    return f"<td>{html.escape(str(value))}</td>"
