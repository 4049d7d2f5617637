"""Pictures say what the numbers say, and are told apart by any eye."""

from __future__ import annotations

import io
import itertools
import math
import warnings

import matplotlib
import numpy as np
import pandas
import pytest
import torch
from matplotlib import font_manager, pyplot
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

from flmoe_fast import ArgumentError, interactions
from flmoe_fast.pipeline.faithful.masking import MaskingCurve
from flmoe_fast.pipeline.show.curves import (
    faithfulness_lines,
    interaction_loss_lines,
    masking_accuracy,
    masking_lines,
)
from flmoe_fast.pipeline.show.data_views import occurrence_bars, place_map
from flmoe_fast.pipeline.show.look import CURVES
from flmoe_fast.pipeline.show.model_views import expert_bars, logit_histogram, routing_violins
from flmoe_fast.pipeline.show.pair_view import pair_view
from flmoe_fast.pipeline.show.player_views import beeswarm, importance_rows, waterfall
from flmoe_fast.pipeline.show.views import View, player_labels, spaced
from flmoe_fast.probes import fonts
from flmoe_fast.probes.colours import BACKUP, FAINTEST, FULL, GROUND, SUBSTITUTION, SYNERGY, fade_of, width_of

matplotlib.use("Agg")
#: What people without one kind of cone see, of linear RGB: Machado, Oliveira and Fernandes 2009, severity 1.
VISION = {
    "all cones": np.eye(3),
    "no long": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "no middle": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "no short": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
TO_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


def linear(colour: str) -> np.ndarray:
    rgb = np.array(to_rgb(colour))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIELAB of a colour as somebody sees it."""
    xyz = TO_XYZ @ np.clip(vision @ linear(colour), 0, 1) / np.array([0.9505, 1.0, 1.089])
    x, y, z = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("vision", VISION)
def test_colours_are_told_apart(vision):
    """20 is about ten times the least difference that can be seen; curves also differ by their markers."""
    seen = VISION[vision]
    for first, second in itertools.combinations((SYNERGY, SUBSTITUTION, BACKUP), 2):
        assert np.linalg.norm(lab(first, seen) - lab(second, seen)) > 20, (first, second)
    for first, second in itertools.combinations([colour for colour, _ in CURVES[:4]], 2):
        assert np.linalg.norm(lab(first, seen) - lab(second, seen)) > 14, (first, second)
    assert len({marker for _, marker in CURVES}) == len(CURVES)


def test_colours_stand_out_in_light_and_dark():
    """3 to 1 is what WCAG asks of graphics; the second ground is that of the dark page."""

    def brightness(colour: str) -> float:
        return float(np.array([0.2126, 0.7152, 0.0722]) @ linear(colour)) + 0.05

    for colour in (SYNERGY, SUBSTITUTION, BACKUP, *(colour for colour, _ in CURVES[:6])):
        for ground in (GROUND, "#15171b"):
            both = sorted((brightness(colour), brightness(ground)))
            assert both[1] / both[0] > 2.9, (colour, ground)


def test_width_is_the_effect_and_fading_the_uncertainty():
    assert width_of(0.5, 1.0) < width_of(-1.0, 1.0) == width_of(3.0, 3.0)
    assert fade_of(1.0, 0.0) == fade_of(1.0, 0.1) == FULL > fade_of(1.0, 1.0) > fade_of(0.1, 1.0) >= FAINTEST
    assert fade_of(1.0, math.nan) == FAINTEST
    assert width_of(0.01, 1.0) == width_of(0.01, 1.0)  # whatever its standard error


def votes(present: torch.Tensor) -> torch.Tensor:
    """0 and 1 need each other, 2 and 3 stand in for each other."""
    return (present[:, 0] & present[:, 1]).double() + (present[:, 2] | present[:, 3]).double()


def test_network_draws_the_pairs():
    result = interactions(votes, n=5, contexts=64, names=list("abcde"), progress=False)
    axes = result.plot(kind="network")
    assert isinstance(axes, Axes)
    lines = [line for line in axes.lines if len(line.get_xdata()) == 2]
    assert sorted(line.get_color() for line in lines) == sorted((SYNERGY, SUBSTITUTION))
    texts = {text.get_text(): text.get_position() for text in axes.texts}
    assert set(texts) == set("abcde")
    red = next(line for line in lines if line.get_color() == SYNERGY)
    ends = np.array([red.get_xdata(), red.get_ydata()]).T
    assert np.allclose(sorted(ends.tolist()), sorted([list(np.array(texts[name]) / 1.08) for name in "ab"]))
    assert result.plot(kind="network", of="gap") is not axes
    with pytest.raises(ArgumentError, match="kind"):
        result.plot(kind="pie")


def test_rounding_is_not_drawn():
    """An effect of 1e-8 beside one of 1 is a line that nobody can tell from an effect."""
    result = interactions(lambda z: votes(z) + 1e-8 * z[:, 0] * z[:, 4], n=5, names=list("abcde"), progress=False)
    assert len([line for line in result.plot(kind="network").lines if len(line.get_xdata()) == 2]) == 2
    dots = result.plot().lines[0]
    assert len(dots.get_xdata()) == 2
    louder = interactions(lambda z: votes(z) + 1e-3 * z[:, 0] * z[:, 4], n=5, names=list("abcde"), progress=False)
    assert len([line for line in louder.plot(kind="network").lines if len(line.get_xdata()) == 2]) == 3


def letter_of(path: str) -> str:
    """A letter that a font has and the default one lacks."""
    return chr(min(fonts.letters_of(path) - fonts.letters_of(font_manager.findfont("DejaVu Sans"))))


def test_letters_come_from_a_font_that_has_them(monkeypatch):
    other = font_manager.findfont("STIXGeneral")
    letter = letter_of(other)
    fonts.family_with.cache_clear()
    monkeypatch.setattr(fonts, "system_fonts", lambda: (other,))
    result = interactions(votes, n=5, names=[letter, *"bcde"], progress=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kind in ("matrix", "network"):
            axes = result.plot(kind=kind)
            drawn = [text for text in axes.findobj(Text) if letter in text.get_text()]
            assert drawn and all(text.get_fontfamily()[-1] == "STIXGeneral" for text in drawn)
            axes.figure.savefig(io.BytesIO(), dpi=20)
    fonts.family_with.cache_clear()


def test_a_letter_that_no_font_has_is_a_box_and_said_once(monkeypatch):
    fonts.family_with.cache_clear()
    monkeypatch.setattr(fonts, "system_fonts", tuple)
    monkeypatch.setattr(fonts, "_SAID", set())
    result = interactions(votes, n=5, names=["\U0001f30a sea", *"bcde"], progress=False)
    with pytest.warns(UserWarning, match=r"no font here has \U0001f30a \(U\+1F30A\)"):
        result.plot()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        axes = result.plot()
        assert f"{fonts.BOX} sea" in [label.get_text() for label in axes.get_yticklabels()]
        axes.figure.savefig(io.BytesIO(), dpi=20)
        with matplotlib.rc_context({"svg.fonttype": "none"}):  # a page's reader may have it
            kept = result.plot(kind="network")
        assert "\U0001f30a sea" in [text.get_text() for text in kept.texts]
    fonts.family_with.cache_clear()
    assert result.player_names[0] == "\U0001f30a sea"


def test_waterfall_ends_at_the_prediction():
    axes = waterfall(["a", "b", "c"], np.array([0.3, -0.1, 0.05]), 0.2, 0.7, errors=np.full(3, 0.01), most=2)
    names = [text.get_text() for text in axes.get_yticklabels()]
    assert names == ["a", "b", "all others"]
    ends = [bar.get_x() + bar.get_width() for bar in axes.patches]
    assert ends == pytest.approx([0.5, 0.4, 0.7])
    with pytest.raises(ArgumentError, match="values"):
        waterfall(["a"], np.zeros(2), 0.0, 1.0)


def test_beeswarm_has_a_point_a_sample():
    rows = [(f"s{n}", "facts", "year", (n - 5) / 10, 1950.0 + n) for n in range(11)]
    rows += [(f"s{n}", "text", "dragon", 0.01, math.nan) for n in range(4)]
    points = pandas.DataFrame(rows, columns=["sample", "modality", "name", "value", "feature"])
    axes = beeswarm(points)
    assert [text.get_text() for text in axes.get_yticklabels()] == ["year (11)", "dragon (4)"]
    assert [len(drawn.get_offsets()) for drawn in axes.collections] == [11, 4]
    assert len({tuple(offset) for offset in axes.collections[1].get_offsets().tolist()}) == 4  # beside each other
    with pytest.raises(ArgumentError, match="points"):
        beeswarm(points[:0])


def test_texts_are_written_as_a_person_writes():
    tokens = ["[CLS]", "the", "brave", "drag", "##on", ",", "in", "the", "東", "[SEP]"]
    assert "".join(spaced(tokens)) == "the brave dragon, in the 東" and len(spaced(tokens)) == len(tokens)
    assert "".join(spaced(["<s>", " the", " drag", "on", "!", "</s>"])) == " the dragon!"


def test_names_of_players_are_unique():
    views = [
        View("plot", "text", ("[CLS]", "the", "dragon", "the", "x")),
        View("poster", "image", ("a", "b"), np.zeros((2, 4)), (1, 2)),
        View("facts", "table", ("year = 1987", "x")),
    ]
    places = [(0, 1), (0, 2), (0, 3), (0, 4), (1, 0), (1, 1), (2, 0), (2, 1)]
    names = ("the #1", "dragon", "the #3", "x (plot)", "poster 1", "poster 2", "year = 1987", "x (facts)")
    assert player_labels(views, places) == names


#: A name that mathtext cannot read, and another script; both are names like any other.
ODD = ("$\\frac{$ <b>&", "$ 東")


def pictures() -> dict:
    """Every picture, with odd names wherever there are names."""
    result = interactions(votes, n=5, contexts=8, names=[*ODD, "c", "d", "e"], progress=False)
    view = View("$m{", "text", (*ODD, "c", "d", "e"))
    logits, weights = np.eye(2), np.full((3, 2), 0.5)
    epochs = [{"epoch": 1, "loss": 1.0, "task_loss": 1.0, "interaction_losses": [0.1, 0.2]}]
    curve = MaskingCurve((1, 2), 3, *np.ones((8, 2)))
    scores = pandas.DataFrame({"pairs": [1], **{f"accuracy_{k}": [0.5] for k in ("top", "random", "random_std")}})
    table = pandas.DataFrame({"K_percent": [10.0]} | {
        f"sufficiency_prob_{part}_{kind}": [0.1] for part in ("mean", "stderr") for kind in ("identified", "random")
    })  # fmt: skip
    counts = pandas.DataFrame({"class": ODD, "synergy": 0.1, "substitution": 0.2, "pairs": 9})
    frame = pandas.DataFrame({"player": [0, 1], "name": ODD, ODD[0]: [1.0, 2.0]})
    points = pandas.DataFrame({"name": ODD, "value": [0.1, 0.2]})
    return {
        "matrix": lambda axes: result.plot(ax=axes),
        "network": lambda axes: result.plot(kind="network", ax=axes),
        "pairs": lambda axes: pair_view(result, [(0, n) for n in range(5)], [view], axes=axes),
        "losses": lambda axes: interaction_loss_lines(epochs, ODD, axes),
        "masking": lambda axes: masking_lines(dict.fromkeys(ODD, curve), unit=ODD[0], axes=axes),
        "accuracy": lambda axes: masking_accuracy(dict.fromkeys(ODD, scores), axes),
        "faithfulness": lambda axes: faithfulness_lines(dict.fromkeys(ODD, table), "sufficiency", axes),
        "occurrence": lambda axes: occurrence_bars(counts, axes),
        "places": lambda axes: place_map(np.eye(2), ODD[0], "synergy", ODD[1], axes),
        "routing": lambda axes: routing_violins(np.random.default_rng(0).random((4, 2)), ODD, axes),
        "histogram": lambda axes: logit_histogram(weights, ODD, ODD[1], axes),
        "experts": lambda axes: expert_bars(logits, weights[0], ODD, ODD, axes=axes),
        "importance": lambda axes: importance_rows(frame, [(ODD[0], [0, 1])], axes),
        "waterfall": lambda axes: waterfall(ODD, np.array([0.1, 0.2]), 0.0, 0.3, unit=ODD[1], axes=axes),
        "beeswarm": lambda axes: beeswarm(points, unit=ODD[1], axes=axes),
    }


@pytest.mark.parametrize("own", (False, True))
def test_any_character_is_a_letter(own):
    """Also on axes that somebody made whose texts are mathematics."""
    for name, draw in pictures().items():
        axes = draw(Figure().subplots() if own else None)
        texts = [text for text in axes.get_figure().findobj(Text) if "$" in text.get_text()]
        assert len(texts) > 0 and not any(text.get_parse_math() for text in texts), name
        if name in ("matrix", "experts"):  # drawing all of them would take a second more
            axes.get_figure().savefig(io.BytesIO(), dpi=20)
        pyplot.close("all")


def test_mathematics_of_a_name_is_seen():
    """Negative control."""
    counts = pandas.DataFrame({"class": ODD, "synergy": 0.1, "substitution": 0.2, "pairs": 9})
    axes = occurrence_bars.__wrapped__(counts)
    assert any(text.get_parse_math() for text in axes.findobj(Text) if "$" in text.get_text())
    with pytest.raises(ValueError, match="frac"):
        axes.get_figure().savefig(io.BytesIO(), dpi=20)
