"""From raw strings and images through transformers classes to a page, and what such a page has to be."""

from __future__ import annotations

import csv
import dataclasses
import html
import json
import re
from html.parser import HTMLParser

import numpy as np
import pandas
import pytest
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image, ImageDraw

from flmoe_fast.checks import ArgumentError
from flmoe_fast.cli import main
from flmoe_fast.model.checkpoint import load_checkpoint
from flmoe_fast.pipeline.faithful.occurrence import frequent_tokens, occurrences, where
from flmoe_fast.pipeline.records import SampleRecord, is_done, read_records
from flmoe_fast.pipeline.show.data_views import place_map
from flmoe_fast.pipeline.show.html import INK, Page, as_svg, inked
from flmoe_fast.pipeline.show.pair_view import pair_view
from flmoe_fast.pipeline.show.views import View
from flmoe_fast.pipeline.summary import compare, player_points, summarize
from flmoe_fast.probes.colours import SUBSTITUTION, SYNERGY
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.runs.faithfulness import compared, read_patterns
from flmoe_fast.runs.settings import read_settings
from flmoe_fast.runs.terms import MEANING
from tests.small_transformers import GRID, save_clip, save_text

SETTINGS = """
out = "run"
[data]
kind = "own"
path = "table.csv"
target = "label"
id = "id"
[data.modalities]
caption = {text = "caption"}
photo = {image = "photo"}
facts = {table = ["size", "weight"]}
[encoders.caption]
name = "text"
max_length = 16
[encoders.photo]
name = "clip"
[model]
hidden = 16
heads = 2
layers = 1
reweight_hidden = 8
[training]
epochs = 2
lr = 1e-2
threads = 1
reference_layout = true
[explain]
samples = 3
candidates = 3
contexts = 4
also = ["SV"]
most = [1, 2]
repeats = 2
[faithfulness]
part = "test"
repeats = 2
"""

PLAIN = """
[data]
kind = "digits"
[model]
hidden = 8
heads = 2
layers = 1
roles = ["dense"]
[training]
epochs = 1
threads = 1
[faithfulness]
samples = 5
repeats = 1
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run on forty captions, pictures and numbers."""
    root = tmp_path_factory.mktemp("study")
    (root / "photos").mkdir()
    captions = []
    with open(root / "table.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(("id", "caption", "photo", "size", "weight", "label"))
        for n in range(40):
            colour = ("red", "blue")[n % 2]
            picture = Image.new("RGB", (40 + n, 60), (240, 240, 235))
            ImageDraw.Draw(picture).rectangle((5, 5 + n, 30, 30 + n), fill=colour)
            picture.save(root / "photos" / f"{n}.png")
            captions.append(f"a {colour} <thing> & number {n}")
            writer.writerow((f"s{n}", captions[-1], f"photos/{n}.png", n, n % 7, colour))
    save_text(root / "text", captions)
    save_clip(root / "clip")
    path = root / "run.toml"
    path.write_text(SETTINGS)
    for command in ("train", "explain", "faithfulness", "report"):
        assert main([command, str(path), "--no-progress"]) == 0
    return path


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text."""

    def __init__(self, text):
        super().__init__()
        self.found, self.inside = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs), list(self.inside)))
        if tag not in ("meta", "link", "br", "img", "path", "use", "image", "rect"):
            self.inside.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.found.append((tag, dict(attrs), list(self.inside)))

    def handle_endtag(self, tag):
        while self.inside and self.inside.pop() != tag:
            pass

    def all(self, tag):
        return [attributes for name, attributes, _ in self.found if name == tag]


def test_page_needs_nothing_else(run):
    text = (run.parent / "run" / "report.html").read_text()
    page = Elements(text)
    assert [attributes for attributes in page.all("script")] == [{}]  # its own, which loads and runs nothing else
    assert not re.search(r"fetch|XMLHttp|import\(|eval|innerHTML|document\.write", text[text.index("<script>") :])
    assert not page.all("iframe") and not page.all("img")
    for tag, attributes, _ in page.found:
        for name, value in attributes.items():
            if name in ("href", "src", "xlink:href") and value:
                assert value.startswith(("#", "data:")), (tag, value)
            assert not name.startswith("on")
            assert name != "style" or "url(" not in value
    assert "url(http" not in text and "@import" not in text
    names = [attributes["id"] for _, attributes, _ in page.found if "id" in attributes]
    assert len(names) == len(set(names))
    referred = set(re.findall(r'href="#([^"]+)"', text)) | set(re.findall(r"url\(#([^)]+)\)", text))
    assert referred and referred <= set(names)


def test_page_is_readable_in_light_and_dark_and_by_keyboard(run):
    text = (run.parent / "run" / "report.html").read_text()
    page = Elements(text)
    assert "prefers-color-scheme: dark" in text and "color-scheme: light dark" in text and ":focus-visible" in text
    assert INK not in text and "currentColor" in text
    assert page.all("html")[0]["lang"] == "en" and page.all("a")[0]["href"] == "#main"
    figures = text.split("<figure>")[1:]
    assert len(figures) > 15
    for figure in figures:
        assert "<details><summary>" in figure and "<figcaption>" in figure
        assert re.search(r'<svg role="img" aria-label="[^"]{10,}"', figure)
    regions = [a for a in page.all("div") if a.get("class") == "scroll"]
    assert regions and all(a["tabindex"] == "0" and a["aria-label"] for a in regions)
    assert len(page.all("summary")) >= len(figures) and not [a for a in page.all("summary") if "tabindex" in a]


def test_page_says_what_was_found(run):
    text = (run.parent / "run" / "report.html").read_text()
    records = read_records(read_settings(run).out)
    assert [record.id for record in records] == sorted((r.id for r in records), key=lambda i: int(i[1:]))
    for record in records:
        assert f"Sample {record.id}" in text
        best = record.interactions.order("abs_sii")[0]
        sii = float(record.interactions.sii[best, 0])
        assert f'<td data-v="{sii!r}">{sii:.4g}</td>' in text
        for head in record.interactions.heads:
            assert (f'data-head="{head}"' in text) == (not head.startswith("weighted"))
    assert "&lt;" in text and "<thing>" not in text  # texts of the data are no markup
    for section in (
        "Model",
        "Faithfulness",
        "Concentration and specificity",
        "Masking pairs",
        "Synergy and redundancy over the data set",
        "Samples",
    ):
        assert re.search(f"<h2 id=[^>]*>{section}</h2>", text)


def test_terms_are_explained_once_and_where_they_appear(run):
    text = (run.parent / "run" / "report.html").read_text()
    for term in MEANING:
        assert text.count(f"<dfn>{term}</dfn>") == 1, term
    assert text.index("<dfn>Comprehensiveness") < text.index("Comprehensiveness (higher is better)")


def test_players_are_called_what_a_person_calls_them(run):
    record = read_records(read_settings(run).out)[0]
    text = (run.parent / "run" / "report.html").read_text()
    rows = list(csv.DictReader((run.parent / "table.csv").open()))
    row = next(row for row in rows if row["id"] == record.id)
    names = record.interactions.player_names
    assert names[-2:] == (f"size = {row['size']}", f"weight = {row['weight']}")  # as in the file
    assert "photo 1,1" in names and f"photo {GRID},{GRID}" in names and "a" in names
    assert len(set(names)) == len(names)
    folder = sorted(path.name for path in (run.parent / "run" / "samples").glob("test-*"))[0]
    assert f"Files: samples/{folder}." in text
    assert html.escape(row["caption"]) in re.sub("</?mark>", "", text)  # with its spaces, without <s>


def test_effective_settings_are_kept(run):
    kept = json.loads((run.parent / "run" / "settings.json").read_text())
    assert kept["training"]["epochs"] == 2 and kept["explain"]["part"] == "test"  # given, and by default
    assert kept["data"]["path"] == str(run.parent / "table.csv")


def test_patterns_of_the_experts_are_kept_and_compared(run, capsys):
    settings = read_settings(run)
    found = read_patterns(settings.out)
    (patterns,) = found.values()
    assert patterns.names == ("mixture", *read_records(settings.out)[0].experts) and patterns.whole == "mixture"
    table = pandas.read_csv(settings.out / "faithfulness" / "attnXgrad" / "patterns.csv")
    row = table[(table["measure"] == "gini") & (table["map"] == "synergy")].iloc[0]
    assert row["mean"] == pytest.approx(patterns.measures["gini"][:, patterns.names.index("synergy")].mean())
    same = dataclasses.replace(settings, faithfulness=dataclasses.replace(settings.faithfulness, against=("run",)))
    (difference,) = compared(same, found).values()
    assert len(difference) > 10 and difference["difference"].abs().max() == 0.0  # of a run with itself
    assert main(["faithfulness", str(run), "--no-progress"]) == 0  # from the blocks that are there
    assert f"Gini of mixture {patterns.by_sample()['gini of mixture'].mean():.3f}" in capsys.readouterr().out
    none = dataclasses.replace(settings, faithfulness=dataclasses.replace(settings.faithfulness, against=("no",)))
    with pytest.raises(ArgumentError, match="faithfulness.against"):
        compared(none, found)


def test_heads_of_a_plain_transformer_stand_in_for_experts(tmp_path):
    path = tmp_path / "plain.toml"
    path.write_text(PLAIN)
    for command in ("train", "faithfulness", "report"):
        assert main([command, str(path), "--no-progress"]) == 0
    (patterns,) = read_patterns(tmp_path / "out" / "plain").values()
    assert patterns.names == ("dense", "head 1", "head 2") and patterns.whole == "dense"
    text = (tmp_path / "out" / "plain" / "report.html").read_text()
    assert "head 2" in text and "lies between classes" not in text  # a single weight follows nothing


def test_records_hold_what_was_read(run):
    record = read_records(read_settings(run).out)[0]
    words, photo, facts = record.views
    assert (words.kind, photo.kind, facts.kind) == ("text", "image", "table")
    assert words.tokens[0] == "<s>" and words.tokens[-1] == "</s>" and "number" in "".join(words.tokens)
    assert photo.grid == (GRID, GRID) and photo.image.shape == (16 * GRID, 16 * GRID, 3) and photo.image.std() > 10
    assert [token.split(" = ")[0] for token in facts.tokens] == ["size", "weight"]
    # Neither start symbol nor padding plays; the end symbol does.
    players = [position for m, position in record.places if m == 0]
    assert players == list(range(1, len(words.tokens)))
    assert [len(players) for _, players in record.groups] == [len(words.tokens) - 1, GRID * GRID, 2]
    assert record.interactions.heads[0] == "mixture" and record.faithfulness.heads == record.interactions.heads
    share = record.weights @ record.expert_logits
    assert np.exp(share)[record.target[0]] / np.exp(share).sum() == pytest.approx(record.full, abs=1e-5)


def test_records_come_back_as_they_were(run, tmp_path):
    record = read_records(read_settings(run).out)[1]
    assert not is_done(tmp_path / "x")
    record.save(tmp_path / "x")
    again = SampleRecord.load(tmp_path / "x")
    assert is_done(tmp_path / "x")
    for name in ("id", "truth", "target", "full", "experts", "groups", "places"):
        assert getattr(again, name) == getattr(record, name)
    pandas.testing.assert_frame_equal(again.importance, record.importance)
    assert np.array_equal(again.masked["SII"].random_logits, record.masked["SII"].random_logits)
    assert again.masked["SII"].most == (1, 2) and again.faithfulness.percents == record.faithfulness.percents
    assert np.array_equal(again.views[1].image, record.views[1].image)
    (tmp_path / "x" / "record.npz").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match="folder"):
        SampleRecord.load(tmp_path / "x")


def test_reference_layout_is_written_too(run):
    folder = run.parent / "run"
    own = load_checkpoint(folder / "model.safetensors")
    other = load_checkpoint(folder / "model.pth")
    for key, value in own.state_dict().items():
        assert (other.state_dict()[key] == value).all()


def test_occurrences_are_counts(run):
    records = read_records(read_settings(run).out)
    table = occurrences(records, ("blue", "red"))
    first = table[table["head"] == "mixture"]
    assert first["pairs"].sum() == sum(len(record.interactions.pairs) for record in records)
    wanted, total = 0, 0
    name = first["class"].iloc[0]
    for record in records:
        if ("blue", "red")[record.target[0]] == name:
            low, _ = record.interactions.interval(0.95, "sii", "mixture")
            wanted, total = wanted + (low > 0).sum(), total + len(low)
    assert first["synergy"].iloc[0] == pytest.approx(wanted / total)
    by_modalities = occurrences(records, ("blue", "red"), by="modalities")
    names = ["caption x photo", "caption x facts", "photo x facts"]
    assert sorted(by_modalities["modalities"].unique()) == sorted(names)
    up, down = where(records)["photo"]
    sums, counts = np.zeros((GRID, GRID)), np.zeros((GRID, GRID))
    for record in records:
        for (i, j), value in zip(record.interactions.pairs, record.interactions.column("sii")):
            for player in (i, j):
                m, position = record.places[player]
                if m == 1:
                    sums[divmod(position, GRID)] += max(value, 0)
                    counts[divmod(position, GRID)] += 1
    np.testing.assert_allclose(up, np.where(counts > 0, sums / np.maximum(counts, 1), np.nan), atol=1e-12)
    assert (np.nan_to_num(down) >= 0).all()
    words = frequent_tokens(records, k=3)
    assert set(words["modality"]) == {"caption", "facts"} and (words.groupby("modality").size() <= 3).all()
    with pytest.raises(ArgumentError, match="records"):
        occurrences([], ("blue", "red"))


def test_summary_and_comparison(run):
    records = read_records(read_settings(run).out)
    table = summarize(records)
    assert list(table.index) == list(records[0].interactions.heads) and (table["samples"] == 3).all()
    shares = [float((r.interactions.interval(of="sii")[0] > 0).mean()) for r in records]
    assert table.loc["mixture", "synergy"] == pytest.approx(np.mean(shares))
    assert table.loc["mixture", "synergy_stderr"] == pytest.approx(np.std(shares, ddof=1) / np.sqrt(3))
    same = compare(records, records[:2], head="synergy")
    assert (same["difference"] == 0).all() and (same["samples"] == 2).all()
    louder = [dataclasses.replace(r, full=r.full + 0.1) for r in records]
    found = compare(louder, records).loc["full"]
    assert found["difference"] == pytest.approx(0.1) and found["difference_stderr"] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ArgumentError, match="second"):
        compare(records, [dataclasses.replace(r, id=f"other {r.id}") for r in records])
    results = [record.interactions for record in records]
    assert summarize(results).loc["mixture", "mean_gap"] == table.loc["mixture", "mean_gap"]
    assert (compare(results, records, head="synergy").loc[["synergy", "mean_gap"], "difference"] == 0).all()
    with pytest.raises(ArgumentError, match="second: got 2 samples, expected 3"):
        compare(results, results[:2])
    points = player_points(records)
    years = points[points["name"] == "size"]
    assert len(points) == sum(len(r.interactions.also["SV", 1].members) for r in records)
    assert (years["feature"] == years["sample"].str[1:].astype(float)).all()  # the size of sample s7 is 7


def test_pair_view_draws_what_it_says():
    text = View("text", "text", tuple(f"w{n}" for n in range(5)))
    image = View("img", "image", tuple(map(str, range(4))), np.zeros((8, 8, 3), dtype=np.uint8), (2, 2))
    places = [(0, n) for n in range(5)] + [(1, n) for n in range(4)]

    def value(z):  # 1 and 6 work together, 2 and 7 replace each other, nothing else interacts
        return (z[:, 1] & z[:, 6]).double() + (z[:, 2] | z[:, 7]).double()

    result = interactions(value, n=9, rows=range(5), cols=range(5, 9), contexts=64, progress=False)
    axes = pair_view(result, places, [text, image])
    lines = [p for p in axes.patches if type(p).__name__ == "PathPatch"]
    assert len(lines) == 2
    wanted = {tuple(np.round(to_rgb(colour), 2)) for colour in (SYNERGY, SUBSTITUTION)}
    assert {tuple(np.round(line.get_edgecolor()[:3], 2)) for line in lines} == wanted
    outlined = [p for p in axes.patches if type(p).__name__ == "Rectangle" and p.get_linewidth() > 1]
    assert len(outlined) == 4
    gap = pair_view(result, places, [text, image], of="gap")
    assert len([p for p in gap.patches if type(p).__name__ == "PathPatch"]) >= 1
    with pytest.raises(ArgumentError, match="image"):
        View("img", "image", ("a",))


def test_svg_follows_the_page():
    with inked():
        figure = Figure(figsize=(2, 2))
        axes = figure.subplots()
        axes.imshow(np.eye(3))
        axes.set_title("a < b")
    svg = as_svg(axes, "f9")
    assert "currentColor" in svg and INK not in svg and svg.startswith("<svg ") and "&lt;" in svg
    assert all(name.startswith("f9-") for name in re.findall(r'\bid="([^"]+)"', svg))
    page = Page("A & B")
    page.section("One <two>")
    page.figure(axes, 'says "what"', pandas.DataFrame({"x": [1.0, np.nan], "y": [True, "<z>"]}))
    text = page.render()
    assert "A &amp; B" in text and "One &lt;two&gt;" in text and "&quot;what&quot;" in text and "<td>&lt;z&gt;" in text
    assert place_map(np.eye(2), "img", "synergy").get_title() == "img, synergy"
