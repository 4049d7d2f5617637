"""One game shared by threads: every call returns what it returns alone."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable

import pytest
import torch
from edge_shapes import SPARSE_EDGES, Edge
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, CLIPConfig, CLIPModel, ViTConfig
from transformers import ViTForImageClassification as ViT

from flmoe_fast import accelerate
from flmoe_fast.adapt.players import Players, image_players, text_players
from flmoe_fast.adapt.reference_layout import AcceleratedMoE
from flmoe_fast.engines.scratch import Scratch
from flmoe_fast.games.game import Game
from flmoe_fast.games.grouped import GroupedGame
from flmoe_fast.model.network import eval_mode
from flmoe_fast.native import extension

EXTENSION, MISSING = extension()
THREADS, CALLS = 4, 24
START = 2
DENSE = Edge("two modalities", (20, 13), (18, 13), hidden=32, heads=2)
SPARSE = next(edge for edge in SPARSE_EDGES if edge.capacity == "reference" and edge.generation == "fl")
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


@pytest.fixture(autouse=True)
def switching():
    """Threads that take turns a hundred times as often as usual."""
    usual = sys.getswitchinterval()
    sys.setswitchinterval(usual / 100)
    yield
    sys.setswitchinterval(usual)


def at_once(work: Callable[[int], None]) -> None:
    """Run ``work`` in every thread, started together; what one of them raises is raised here."""
    start, raised = threading.Barrier(THREADS), []

    def run(thread: int) -> None:
        torch.set_num_threads(1)
        try:
            start.wait()
            work(thread)
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=run, args=(thread,)) for thread in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if raised:
        raise raised[0]


def wrong(game: Callable[[torch.Tensor], torch.Tensor], n: int, calls: int = CALLS, rows: int = 24) -> int:
    """Calls from several threads whose values are not, bit for bit, those of a call alone."""
    blocks = [torch.rand(rows + thread, n) < 0.5 for thread in range(calls)]
    alone = [game(block) for block in blocks]
    found: list[int] = []

    def work(thread: int) -> None:
        for turn in range(thread, len(blocks), THREADS):
            if not torch.equal(game(blocks[turn]), alone[turn]):
                found.append(turn)

    at_once(work)
    return len(found)


def fresh(game: Game) -> Game:
    """A game that does not remember values, so that every call computes."""
    for remembered in game._encoders.values() if hasattr(game, "_encoders") else [game._values]:
        remembered._rows = _Forgetful()
    return game


class _Forgetful(dict):
    def get(self, key, default=None):
        return default


@pytest.mark.parametrize("edge", [DENSE, SPARSE], ids=["dense", "sparse"])
@pytest.mark.parametrize("backend", ["cpu", "torch", "reference"])
def test_token_games(edge: Edge, backend: str):
    if backend == "cpu" and EXTENSION is None:
        pytest.skip(MISSING)
    dtype = torch.float32 if backend == "cpu" else torch.float64
    game = edge.game(backend=backend, dtype=dtype)
    assert wrong(game, game.n, *((4, 3) if backend == "reference" else ())) == 0


class Shared:
    """Memory that all threads compute in."""

    def __init__(self):
        self._kept = {}

    tensor = Scratch.tensor


def test_memory_that_threads_share_is_seen(monkeypatch):
    """Negative control."""
    monkeypatch.setattr("flmoe_fast.engines.portable.Scratch", Shared)
    game = DENSE.game(backend="torch", dtype=torch.float64)
    assert any(wrong(game, game.n) for _ in range(10))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is for machines without a GPU")
def test_token_games_in_the_triton_interpreter():
    edge = Edge("small", (2, 1), (2, 1), hidden=16, heads=1, layers=1)
    game = edge.game(backend="triton", dtype=torch.float32)
    assert wrong(game, game.n, calls=2, rows=2) == 0


def test_grouped_games():
    game = DENSE.game(dtype=torch.float32)
    grouped = GroupedGame(game, {"first": range(10), "second": range(10, 30), "third": [30]})
    assert wrong(grouped, 3) == 0


def bert() -> tuple[nn.Module, dict, Players]:
    model = BertForSequenceClassification(BertConfig(vocab_size=40, **SMALL)).eval()
    tokens = torch.randint(5, 40, (1, 14))
    tokens[0, 0] = START
    inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return model, inputs, text_players(tokens, special=(START,))


def vit() -> tuple[nn.Module, dict, Players]:
    model = ViT(ViTConfig(image_size=32, patch_size=8, **SMALL)).eval()
    inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    return model, inputs, image_players(inputs["pixel_values"], patch=8)


@pytest.mark.parametrize("path", ["engine", "module"])
@pytest.mark.parametrize("make", [bert, vit])
def test_games_of_transformers(make, path: str):
    model, inputs, players = make()
    game = fresh(accelerate(model).game(inputs, players, path=path))
    assert wrong(game, game.n, calls=16, rows=12) == 0


def test_dual_encoders():
    text = {"vocab_size": 40, "bos_token_id": 0, "eos_token_id": START, **SMALL}
    vision = {"image_size": 32, "patch_size": 8, **SMALL}
    config = CLIPConfig(text_config=text, vision_config=vision)
    model = CLIPModel(config).eval()
    _, inputs, _ = bert()
    tokens, inputs = inputs["input_ids"], {**inputs, "pixel_values": torch.randn(1, 3, 32, 32)}
    players = [image_players(inputs["pixel_values"], patch=8), text_players(tokens, special=(START,))]
    game = fresh(accelerate(model).game(inputs, players))
    assert wrong(game, game.n, calls=16, rows=12) == 0


def test_games_of_one_model_in_several_threads():
    """Each thread makes games of its own of a shared model, whose embeddings and head run in all of them."""
    model, inputs, players = vit()
    shared, everyone = accelerate(model), torch.rand(20, 16) < 0.5
    expected = shared.game(inputs, players)(everyone)
    shared = accelerate(model)
    found = []

    def work(thread: int) -> None:
        for _ in range(2):
            found.append(torch.equal(shared.game(inputs, players)(everyone), expected))

    at_once(work)
    assert found == [True] * 2 * THREADS


def test_a_module_stays_in_eval_mode_until_the_last_thread_is_done():
    """Dropout would show at once: a thread that leaves first must not switch it on for the others."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5))
    model.train()
    model[0].eval()
    x, inside = torch.randn(4, 8), threading.Barrier(2)
    expected = model[0](x)
    values = []

    def first() -> None:
        with eval_mode(model):
            inside.wait()

    def second() -> None:
        with eval_mode(model):
            inside.wait()
            one.join()
            values.append(model(x))

    one, two = threading.Thread(target=first), threading.Thread(target=second)
    one.start(), two.start()
    two.join()
    assert torch.equal(values[0], expected)
    assert model.training and model[1].training and not model[0].training


def test_inference_leaves_the_capacity_of_games_alone():
    model = SPARSE.model()
    model.set_capacity("none")
    features, masks, _ = SPARSE.sample()
    accelerated, seen = AcceleratedMoE(model), set()
    forward = type(model).forward

    def watched(self, *args, **kwargs):
        seen.add((self.config.capacity, model.config.capacity))
        return forward(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(model), "forward", watched)
        accelerated.inference([f[None] for f in features], None if masks is None else [m[None] for m in masks])
    assert seen == {("reference", "none")}
