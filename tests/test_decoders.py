"""Decoders as prefix trees: the model itself, one masked prompt at a time, is the truth."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import pickle
import warnings
from concurrent.futures import ThreadPoolExecutor

import captum.attr
import pytest
import shapiq
import torch
import transformers as hf
from decoders import IMAGE, PICTURES, TEXTS, VISION_START, AllDouble, picture, prompt, ready
from torch import nn

from flmoe_fast import ArgumentError, accelerate, exact_interactions, image_players, interactions, text_players
from flmoe_fast.adapt.causal.engine import CausalEngine
from flmoe_fast.adapt.causal.game import DecoderGame, decoder_module_game
from flmoe_fast.adapt.causal.players import grid_players, image_token_players
from flmoe_fast.adapt.causal.questions import Question, answer_logprob, contrast, next_token, own_answer
from flmoe_fast.adapt.causal.tree import beginnings, blocks, paths
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import ModuleGame
from flmoe_fast.explainers.shapiq import ShapiqApproximator, ShapiqGame

FP64 = 1e-10
ANSWER = (5, 7, 9)


def words(ids: torch.Tensor, absent: int | str = "remove"):
    """Players are the words of the question; the last two tokens and what is around a picture stay."""
    around = [IMAGE, VISION_START, 42, *ids[0, [0, 1, -1, -2]].tolist()]
    return text_players(ids, special=around, absent=absent)


def coalitions(n: int, count: int = 10) -> torch.Tensor:
    return torch.rand(count, n) < torch.linspace(0, 1, count)[:, None]


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


@torch.no_grad()
def by_hand(model: nn.Module, inputs: dict, owners: torch.Tensor, z: torch.Tensor):
    """Log-probability of the answer, one coalition after another: keys masked, positions as in the full prompt."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([ANSWER[:-1]])], 1)
    full = torch.ones_like(ids)
    more = {}
    if "mm_token_type_ids" in inputs:
        more["mm_token_type_ids"] = torch.cat([inputs["mm_token_type_ids"], torch.zeros(1, 2).long()], 1)
        rows = {"image_grid_thw": inputs["image_grid_thw"], "attention_mask": full, **more}
        more["position_ids"] = model.model.get_rope_index(ids, **rows)[0]
    if "token_type_ids" in inputs:
        behind = torch.full((1, 2), int("Pali" in type(model).__name__))
        more["token_type_ids"] = torch.cat([inputs["token_type_ids"], behind], 1)
    model.set_experts_implementation("eager")
    found = []
    for coalition in z:
        mask = full.clone()
        for position, owner in enumerate(owners.tolist()):
            if owner >= 0 and not coalition[owner]:
                mask[0, position] = 0
        given = {**inputs, "input_ids": ids, "attention_mask": mask, **more}
        logits = model(**given).logits[0, -len(ANSWER) :].log_softmax(-1)
        found.append(sum(logits[i, token] for i, token in enumerate(ANSWER)))
    return torch.stack(found)


@pytest.mark.parametrize("name", [*TEXTS, *PICTURES])
def test_removed_words_and_patches(name):
    with AllDouble(), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        make, inputs = PICTURES.get(name, (TEXTS.get(name), lambda: {"input_ids": prompt(0, 8)}))
        model, inputs = make(), inputs()
        players = [words(inputs["input_ids"])]
        if name in PICTURES:
            players.append(image_token_players(inputs["input_ids"], IMAGE, block=2))
        game = accelerate(model).game(inputs, players, value=answer_logprob(ANSWER))
        assert isinstance(game, DecoderGame)
        owners = torch.full_like(inputs["input_ids"][0], -1)
        for part, columns in zip(game.players.parts, game.players.columns):
            mine = part.owner[: len(owners)] >= 0
            owners[mine] = part.owner[: len(owners)][mine] + columns.start
        z = coalitions(game.n)
        truth = by_hand(model, inputs, owners, z)
        assert relative(game(z), truth) <= FP64
        assert relative(game(z.flip(0)), truth) > 1e-3  # coalitions matter
        assert game.tokens < (len(z) + 3) * game.inputs["input_ids"].shape[1] or name == "PaliGemma"


@pytest.mark.parametrize("name", ["Llama", "Mistral", "GPT-2", "Mixtral", "LLaVA", "Qwen2.5-VL", "Gemma 3 + pictures"])
def test_replaced_words_and_pixels(name):
    """Against the slow path, which test_removed_words_and_patches does not use."""
    with AllDouble():
        make, inputs = PICTURES.get(name, (TEXTS.get(name), lambda: {"input_ids": prompt(0, 8)}))
        model, inputs = make(), inputs()
        players = [words(inputs["input_ids"], absent=3)]
        if name == "Qwen2.5-VL":
            players.append(grid_players(inputs["pixel_values"], inputs["image_grid_thw"], absent=0.3))
        elif name in PICTURES:
            players.append(image_players(inputs["pixel_values"], patch=6, absent=0.3))
        question = next_token([4, 6], kind="logprob")
        game = DecoderGame(model, inputs, players, question=question)
        slow = decoder_module_game(model, inputs, players, question, batch=4)
        z = coalitions(game.n)
        assert relative(game(z), slow(z)) <= FP64 and game.heads == slow.heads == ("token 4", "token 6")
        assert float(slow(z).std(0).min()) > 1e-4
        if name in PICTURES:  # and by a single pass of the model with pixels replaced by hand
            given = {**inputs, "pixel_values": torch.full_like(inputs["pixel_values"], 0.3)}
            none = torch.arange(game.n)[None] < game.players.parts[0].n
            logits = model(**given).logits[0, -1].log_softmax(-1).detach()
            assert relative(game(none)[0], logits[[4, 6]]) <= FP64


def test_values_of_questions():
    model, ids = TEXTS["Llama"](), prompt(0, 8)
    inputs = {"input_ids": ids}
    everyone = torch.ones(1, 8, dtype=torch.bool)

    def value(question: Question) -> torch.Tensor:
        both = [make(model, inputs, words(ids), question=question) for make in (DecoderGame, decoder_module_game)]
        assert relative(both[0](everyone), both[1](everyone)) <= 1e-6  # the model's norms are in float32
        assert both[0].heads == both[1].heads and both[0].about()["value"] == both[1].about()["value"] == question.name
        return both[0](everyone)[0]

    longer = torch.cat([ids, torch.tensor([ANSWER])], 1)
    with torch.no_grad():
        logits = model(longer).logits[0]
    last = logits[ids.shape[1] - 1]
    each = torch.stack([logits[ids.shape[1] - 1 + i].log_softmax(-1)[token] for i, token in enumerate(ANSWER)])
    assert torch.allclose(value(answer_logprob(torch.tensor(ANSWER))), each.sum(), rtol=1e-6)
    assert torch.allclose(value(answer_logprob(ANSWER, each=True)), each, rtol=1e-6)
    assert torch.allclose(value(next_token(4)), last[4], rtol=1e-6)
    assert torch.allclose(value(next_token([4, 6], kind="prob")), last.softmax(-1)[[4, 6]], rtol=1e-6)
    assert torch.allclose(value(contrast(4, 6)), last[4] - last[6], rtol=1e-6)
    token = accelerate(model).game(inputs, words(ids), target=4)
    assert torch.allclose(token(everyone)[0], last[4], rtol=1e-6)


def test_the_default_is_the_models_own_answer():
    model, ids = TEXTS["Llama"](), prompt(0, 8)
    made = model.generate(ids, do_sample=False, max_new_tokens=8)[0, ids.shape[1] :].tolist()
    made = made[:-1] if made[-1] == 2 and len(made) > 1 else made
    game = accelerate(model).game({"input_ids": ids}, words(ids))
    assert game.question.name == answer_logprob(made).name == own_answer(model, {"input_ids": ids}).name


def test_what_is_computed():
    """Two words near the end of a long prompt: the prompt once, then only what follows them."""
    model, ids = TEXTS["Llama"](), prompt(0, 30)
    players = text_players(ids, by=torch.tensor([-1] * 28 + [0, 1] + [-1] * (ids.shape[1] - 30)))
    game = DecoderGame(model, {"input_ids": ids}, players, question=next_token(4))
    before = game.tokens
    game(torch.tensor([[0, 0], [0, 1], [1, 0], [1, 1]]).bool())
    rest = ids.shape[1] - 30
    # With both: all. Without the second: what follows it. Without the first: the second and the rest, or the rest.
    assert game.tokens - before == ids.shape[1] + rest + (1 + rest) + rest


def test_trees():
    """Paths put together again are the sequences, in logarithmic depth; a beginning ends where nothing looks beyond."""
    generator = torch.Generator().manual_seed(3)
    for length, count, kinds in itertools.product((1, 5, 12), (1, 2, 40), (2, 3)):
        variants = torch.randint(0, kinds, (count, length), generator=generator).unique(dim=0)
        variants = variants[torch.randperm(len(variants), generator=generator)]
        closed = torch.rand(length + 1, generator=generator) < 0.7
        closed[0] = True
        tree = paths(variants, closed)
        assert sorted(path.row for path in tree) == list(range(len(variants)))
        for path in tree:
            assert closed[path.start] and path.level <= max(1, len(variants)).bit_length()
            if path.parent >= 0:
                parent = tree[path.parent]
                assert parent.level == path.level - 1 and parent.start <= path.start
                assert torch.equal(variants[parent.row, : path.start], variants[path.row, : path.start])
        order, common = beginnings(variants, closed)
        own = [int((variants[row, start:] > 0).sum()) for row, start in zip(order, common)]
        assert sum(own) == sum(int((variants[path.row, path.start :] > 0).sum()) for path in tree)
        runs = blocks(common, own, 9)
        assert [low for low, _ in runs] == [0, *(high for _, high in runs[:-1])] and runs[-1][1] == len(variants)
        assert all(sum(own[low:high]) <= 9 or high == low + 1 for low, high in runs)


def test_little_memory_and_small_pieces_change_nothing(monkeypatch):
    with AllDouble():
        model, inputs = PICTURES["Qwen2-VL"][0](), PICTURES["Qwen2-VL"][1]()
        players = [image_token_players(inputs["input_ids"], IMAGE), words(inputs["input_ids"])]
        games = [DecoderGame(model, inputs, players, question=answer_logprob(ANSWER), memory=m) for m in (1, 1 << 28)]
        z = coalitions(games[0].n, 30)
        whole = games[1](z)
        monkeypatch.setattr("flmoe_fast.adapt.causal.engine.CHUNK", 5)
        assert relative(games[0](z), whole) <= FP64


def test_a_wrong_tree_is_noticed(monkeypatch):
    """A mask that lets a branch see another one's tokens: the comparison with the model refuses it."""
    masks = CausalEngine._masks

    def leaky(self, together, sizes, positions, before, hidden):
        return [mask.clamp(min=0) for mask in masks(self, together, sizes, positions, before, hidden)]

    monkeypatch.setattr(CausalEngine, "_masks", leaky)
    ids = prompt(0, 8)
    with pytest.raises(Unsupported, match="logits that differ by"):
        DecoderGame(TEXTS["Llama"](), {"input_ids": ids}, words(ids), question=next_token(4))


def hybrid() -> nn.Module:
    config = hf.Qwen3NextConfig(
        vocab_size=50, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8,
        linear_value_head_dim=8, num_experts=0, layer_types=["linear_attention", "full_attention"], pad_token_id=0,
    )  # fmt: skip
    return hf.Qwen3NextForCausalLM(config).eval()


def test_what_cannot_be_shared_is_batched_and_says_why():
    ids = prompt(0, 8)
    with pytest.warns(UserWarning, match="slow path: .* because .*layers"):
        game = accelerate(hybrid()).game({"input_ids": ids}, words(ids, absent=3), value=next_token(4))
    assert isinstance(game, ModuleGame) and game(coalitions(8)).isfinite().all()
    with pytest.warns(UserWarning, match="at the end of the prompt, where the value is read"):
        accelerate(TEXTS["Llama"]()).game({"input_ids": ids}, text_players(ids), value=next_token(4))


def test_bad_input():
    model, ids = TEXTS["Llama"](), prompt(0, 8)
    fast, players = accelerate(model), words(ids)
    with pytest.raises(ArgumentError, match=r"inputs\['input_ids'\]"):
        fast.game({"input_ids": ids}, words(torch.cat([ids, ids], 1)), value=next_token(4))
    with pytest.raises(ArgumentError, match="tokens: got .*, expected ids of at least one token"):
        answer_logprob([])
    with pytest.raises(ArgumentError, match="ids below 50"):
        fast.game({"input_ids": ids}, players, value=next_token(50))
    with pytest.raises(ArgumentError, match="another token than the first"):
        contrast(3, 3)
    with pytest.raises(ArgumentError, match="grids: got 6 tokens in all, expected 4"):
        image_token_players(prompt(4), IMAGE, grids=[(2, 3)])
    with pytest.raises(ArgumentError, match=r"owner: got the players \[8\], who have no name or own nothing"):
        dataclasses.replace(players, places=(*players.places, (99, 100)), names=(*players.names, "beyond"))
    with pytest.raises(ArgumentError, match=r"owner: got the players \[9\]"):
        dataclasses.replace(players, owner=players.owner.index_fill(0, torch.tensor([0]), 9))
    with pytest.raises(ArgumentError, match="image_token: got 41"):
        image_token_players(ids, IMAGE)
    with pytest.raises(ArgumentError, match="grids: got 16 patches in all, expected 12"):
        grid_players(picture(12, 24), torch.tensor([[1, 4, 4]]))
    with pytest.raises(ArgumentError, match="input_ids among"):
        fast.game({}, players, value=next_token(4))
    seeing, given = PICTURES["LLaVA"]
    short = {**given(), "input_ids": prompt(8), "attention_mask": torch.ones_like(prompt(8))}
    with pytest.warns(UserWarning, match="slow path"), pytest.raises(ValueError, match="tokens: 8, features"):
        accelerate(seeing()).game(short, words(prompt(8)), value=next_token(4))


def test_a_model_in_training_mode():
    ids = prompt(0, 8)
    config = hf.GPT2Config(n_embd=24, n_layer=2, n_head=4, n_positions=64, vocab_size=50, resid_pdrop=0.5)
    model = ready(hf.GPT2LMHeadModel(config))
    truth = DecoderGame(model, {"input_ids": ids}, words(ids), question=next_token(4))(coalitions(8))
    model.train()
    torch.manual_seed(0)
    again = DecoderGame(model, {"input_ids": ids}, words(ids), question=next_token(4))
    assert model.training and relative(again(coalitions(8)), again(coalitions(8))) <= 2 and truth.isfinite().all()
    z = torch.ones(1, 8, dtype=torch.bool)
    with torch.no_grad():
        assert relative(again(z), model.eval()(ids).logits[0, -1, 4][None]) <= FP64


def test_rounding_is_measured():
    """Of a mixture in float32: its float64 twin agrees, and the share of rounding is small."""
    ids = prompt(0, 8)
    game = DecoderGame(TEXTS["Mixtral"]().float(), {"input_ids": ids}, words(ids), question=next_token(4))
    twin = game.precise()
    z = coalitions(8)
    assert twin.precise() is None and 0 < relative(game(z), twin(z)) < 1e-4
    found = interactions(game, contexts=4, progress=False)
    assert float(found.noise_share) < 0.01 and found.check_evaluations


def test_names_and_places():
    ids = prompt(4)
    several = image_token_players(torch.cat([ids, ids], 1), IMAGE)
    assert several.names[:2] == ("image 0 0,0", "image 0 0,1") and several.places[5] == (1, 0, 1, 1, 2)
    assert image_token_players(ids, IMAGE, by="image").names == ("image",)
    merged = grid_players(picture(48, 24), torch.tensor([[1, 6, 8]]), block=2)
    assert merged.n == 4 and merged.places[-1] == (0, 2, 2, 3, 4)
    sentences = text_players(prompt(0, 4), by=torch.tensor([-1, 7, 7, 7, 2, 2, 2, -1]))
    assert sentences.n == 2 and sentences.owner.tolist() == [-1, 0, 0, 0, 1, 1, 1, -1]


def test_games_are_sent_to_other_processes():
    ids = prompt(0, 8)
    z = coalitions(8)
    for make in (DecoderGame, decoder_module_game):
        game = make(TEXTS["Llama"](), {"input_ids": ids}, words(ids), question=answer_logprob(ANSWER))
        for copied in (pickle.loads(pickle.dumps(game)), copy.deepcopy(game)):
            assert torch.equal(copied(z), game(z))


def test_other_peoples_explainers_and_threads():
    with AllDouble():
        model, inputs = PICTURES["LLaVA"][0](), PICTURES["LLaVA"][1]()
        players = [words(inputs["input_ids"]), image_token_players(inputs["input_ids"], IMAGE, by="image")]
        game = DecoderGame(model, inputs, players, question=contrast(4, 6))
        everyone = torch.ones(1, game.n)
        ablation = captum.attr.FeatureAblation(lambda z: game(z.bool())).attribute(everyone, perturbations_per_eval=4)
        without = game(~torch.eye(game.n, dtype=torch.bool))
        assert torch.allclose(ablation[0].double(), game(everyone.bool()) - without)
        exact = shapiq.ExactComputer(ShapiqGame(game, normalize=False), n_players=game.n)("SV", 1)
        assert sum(exact[(i,)] for i in range(game.n)) == pytest.approx(
            float(game(everyone.bool()) - game(~everyone.bool())), abs=1e-9
        )
        for approximator in (ShapiqApproximator(game.n), shapiq.KernelSHAPIQ(n=game.n, index="SII", random_state=0)):
            explainer = shapiq.AgnosticExplainer(ShapiqGame(game), index="SII", approximator=approximator)
            explained = explainer.explain(budget=2**game.n)
            assert explained[(0, 1)] == pytest.approx(
                exact_interactions(game, pairs=[(0, 1)], progress=False).sii[0], abs=1e-6
            )
        found = interactions(game, contexts=4, progress=False)
        assert found.player_names == game.player_names and len(found.pairs) == game.n - 1
    parts = coalitions(game.n, 24).split(6)
    alone = [game(part) for part in parts]
    fresh = DecoderGame(model, inputs, players, question=contrast(4, 6))
    with ThreadPoolExecutor(4) as pool:
        assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(pool.map(fresh, parts), alone))


def test_placeholders_of_a_picture_among_the_words_are_said():
    made, inputs = PICTURES["LLaVA"]
    model, given = accelerate(made()), inputs()
    ids, asked = given["input_ids"], {"value": next_token(3)}
    with pytest.warns(UserWarning, match=f"9 of the text players are placeholders of a picture .token {IMAGE}."):
        model.game(given, [text_players(ids), image_players(given["pixel_values"], patch=4)], **asked)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*placeholders")
        model.game(given, [text_players(ids, special=[IMAGE]), image_token_players(ids, IMAGE)], **asked)
