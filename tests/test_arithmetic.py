"""Arithmetic is chosen by measurement: coarse products are judged first, and where rounding shows a game moves up.

AMX is not needed: its arithmetic, two bfloat16 terms an operand and three products, is that of the reference here.
"""

from __future__ import annotations

import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from edge_shapes import Edge
from parity import SplitProducts, needs_extension

from flmoe_fast import TokenGame, interactions
from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines import levels
from flmoe_fast.engines.cpu import CpuEngine
from flmoe_fast.engines.reference import ReferenceEngine
from flmoe_fast.games.rounding import MARGIN, NOISE_LIMIT, judged
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.pipeline.faithful.curves import faithfulness
from flmoe_fast.pipeline.faithful.masking import mask_pairs

pytestmark = needs_extension

EDGE = Edge("four layers", (4, 4), (4, 4), hidden=16, heads=2, layers=4)
PAIRS = [(0, 4), (1, 5), (2, 6), (3, 7)]
#: Where interactions are those of attention alone.
LOGITS = {"value": "logit", "heads": ("experts",)}


def scaled(names: tuple[str, ...], factor: float, scale: float = 0.05) -> FLI2MoE:
    """A float32 model of four layers whose attention has some weights multiplied."""
    model = EDGE.model(scale=scale).float()
    with torch.no_grad():
        for expert in model.interaction_experts:
            for layer in expert.fusion_model.network[:-1]:
                for name in names:
                    getattr(layer.attn, name).weight *= factor
    return model


def plain() -> FLI2MoE:
    """Nothing out of the ordinary."""
    return scaled((), 1.0)


def stopped_early() -> FLI2MoE:
    """Attention that has hardly begun to say anything: interactions are next to nothing beside the logits."""
    return scaled(("proj",), 1e-3)


def steep() -> FLI2MoE:
    """Attention 30 times as sharp: small errors of a layer move the next one's weights."""
    return scaled(("q", "kv"), 30.0, scale=0.3)


def hopeless() -> FLI2MoE:
    """Interactions below the rounding of float32."""
    return scaled(("proj",), 1e-5)


def game_of(model: FLI2MoE, fill: float | None = None, **options) -> TokenGame:
    """A sample of the model; ``fill`` replaces tokens by themselves times so much more."""
    features, masks, fills = EDGE.sample()
    features = [f.float() for f in features]
    fills = [f.float() for f in fills] if fill is None else [f * (1 + fill) for f in features]
    return TokenGame(model, features, masks=masks, **{"fill": fills, "target": 1, **options})


def corners() -> torch.Tensor:
    """Four corners of the first pair in each of four contexts, (16, 8)."""
    contexts = EDGE.coalitions(8, count=6)[1:5]
    contexts[:, list(PAIRS[0])] = False
    toggled = torch.zeros(4, 8, dtype=torch.bool)
    toggled[1, PAIRS[0][0]] = toggled[2, PAIRS[0][1]] = toggled[3, list(PAIRS[0])] = True
    return (contexts[:, None] ^ toggled).flatten(0, 1)


@pytest.fixture
def amx(monkeypatch):
    """A machine with an amx level, in the arithmetic of one."""
    known = levels.levels()
    with_amx = {"amx": ("bf16x3", "")} | {name: known[name] for name in known if name != "amx"}
    monkeypatch.setattr(levels, "levels", lambda: with_amx)
    native = CpuEngine.evaluate

    def evaluate(self, coalitions):
        if self.level != "amx":
            return native(self, coalitions)
        with SplitProducts():
            return ReferenceEngine(self.problem, dtype=torch.float32).evaluate(coalitions)

    monkeypatch.setattr(CpuEngine, "evaluate", evaluate)
    monkeypatch.setattr(CpuEngine, "evaluate_toggles", lambda self, c, t: self.evaluate((c[:, None] ^ t).flatten(0, 1)))


def true_share(game: TokenGame) -> float:
    """Share of noise of the second differences at those corners against float64, of the worst head."""
    ours, truth = (
        values[:, 3] - values[:, 2] - values[:, 1] + values[:, 0]
        for values in (each(corners()).unflatten(0, (4, 4)) for each in (game, game.precise()))
    )
    return float(((ours - truth).square().mean(0) / truth.square().mean(0)).max())


def test_threads_wait_for_the_judgement(amx, monkeypatch):
    """Whoever calls a game between what is found of its arithmetic and the move gets values of the one it moves to."""
    expected = game_of(steep(), precision="fp32")(corners())
    game, judged_coarse = game_of(steep()), threading.Event()
    assert game.arithmetic == "bf16x3"
    moves = TokenGame._begin_finer

    def slowly(self: TokenGame) -> None:
        judged_coarse.set()
        time.sleep(0.5)
        moves(self)

    monkeypatch.setattr(TokenGame, "_begin_finer", slowly)
    with warnings.catch_warnings(), ThreadPoolExecutor(2) as pool:
        warnings.simplefilter("ignore")
        first = pool.submit(game, corners())
        assert judged_coarse.wait(60)
        second = pool.submit(game, corners())
        found = first.result(), second.result()
    assert game.arithmetic == "fp32" and all(torch.equal(one, expected) for one in found)


def test_a_coarse_level_is_used_where_rounding_does_not_show(amx):
    game = game_of(plain())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        game(corners())
        found = interactions(game, pairs=PAIRS, budget=40, progress=False)
    assert game.arithmetic == found.about["arithmetic"] == "bf16x3" and found.about["level"] == "amx"
    assert 0 < game.noise["bf16x3"] <= NOISE_LIMIT / MARGIN and "too_coarse" not in found.about
    assert true_share(game) < NOISE_LIMIT


@pytest.mark.parametrize(("make", "options"), [(stopped_early, LOGITS), (steep, {})], ids=["stopped early", "30 times"])
def test_a_coarse_level_that_shows_is_left_before_it_is_used(make, options, amx):
    model = make()
    asked = game_of(model, precision="bf16x3", **options)
    assert judged(asked, asked.precise()) > NOISE_LIMIT  # or there is nothing to move for
    game = game_of(model, **options)
    assert game.arithmetic == "bf16x3"
    with pytest.warns(RuntimeWarning, match=r"rounding in bf16x3 makes up .* evaluated in fp32 instead"):
        values = game(corners())
    assert game.arithmetic == "fp32" and true_share(game) < NOISE_LIMIT
    assert torch.equal(values, game_of(model, precision="fp32", **options)(corners()))
    assert not torch.equal(values, asked(corners()))
    with warnings.catch_warnings():  # it has been said, and the model is known
        warnings.simplefilter("error")
        second = game_of(model, **options)
        assert second.arithmetic == "fp32" and "bf16x3" in second.about()["reason"]
        assert torch.equal(second(corners()), values)


def test_float32_that_shows_is_left_for_float64():
    model = hopeless()
    game = game_of(model, **LOGITS)
    options = {"pairs": PAIRS, "contexts": 6, "method": "grid", "progress": False}
    with pytest.warns(RuntimeWarning, match=r"rounding in fp32 makes up .* evaluated in fp64 instead"):
        found = interactions(game, **options)
    exact = interactions(game_of(model, dtype=torch.float64, **LOGITS), **options)
    assert found.about["dtype"] == "float64" and np.array_equal(found.sii, exact.sii)
    assert found.about["too_coarse"]["fp32"] > NOISE_LIMIT
    assert found.evaluations == exact.evaluations <= found.check_evaluations
    assert game_of(model, **LOGITS).arithmetic == "fp64"  # the next sample begins there
    with pytest.warns(RuntimeWarning, match="use a more exact arithmetic"):  # float32 was asked for
        asked = interactions(game_of(model, dtype=torch.float32, **LOGITS), **options)
    assert asked.about["dtype"] == "float32"


@pytest.mark.parametrize("way", ["masking", "faithfulness"])
def test_drops_that_rounding_makes_are_computed_again(way: str):
    """Tokens that hardly differ from their fills: what their absence costs is below float32's rounding."""

    def drops(**options) -> np.ndarray:
        game = game_of(model, fill=1e-6, heads=("experts",), value="logit", **options)
        if way == "masking":
            return mask_pairs(game, PAIRS, most=(1, 2), repeats=3).top_drop
        return faithfulness(game, torch.arange(8.0), percents=(50.0,), repeats=3).comprehensiveness

    model = plain()
    with pytest.warns(RuntimeWarning, match="rounding in fp32 makes up .* of what values differ by: "):
        found = drops()
    assert np.array_equal(found, drops(dtype=torch.float64))
    model = plain()
    rounded = drops(dtype=torch.float32)  # asked for
    assert np.abs(rounded - found).max() > 0.01 * np.abs(found).max()


def test_a_known_model_is_not_measured_again_before_masking(monkeypatch):
    model = plain()
    interactions(game_of(model), pairs=PAIRS, budget=40, progress=False)
    monkeypatch.setattr(TokenGame, "precise", lambda self: pytest.fail("float64 is computed"))
    mask_pairs(game_of(model), PAIRS, most=(1, 2), repeats=3)


def test_a_precision_that_is_not_there_is_refused():
    known = levels.arithmetics()
    assert "fp32" in known and game_of(plain(), precision="fp32").arithmetic == "fp32"
    if "bf16x3" not in known:
        with pytest.raises(ArgumentError, match="precision: got 'bf16x3', expected one of 'auto'"):
            game_of(plain(), precision="bf16x3")
