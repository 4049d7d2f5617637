"""Other people's models: their own forward passes against the engine, side by side on the same coalitions.

    python -m bench.adapt [--cases moe bert vit vilt clip] [--rounds 5] [--threads 2] [--layers 12]

Every case runs the model one coalition at a time (what most explainers do), in batches (the slow path of
``accelerate``), and on the engine, for the same corner grid. First a few coalitions are compared in float64, and the
largest difference relative to the largest value is written beside the times. Models have the sizes of their published
base versions and random weights.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable, Iterator

import torch
import transformers as hf

from bench.cells import Table, quartiles
from bench.timing import interleave, spread, write
from flmoe_fast import accelerate, image_players, text_players
from flmoe_fast.games.game import Game
from flmoe_fast.probes.grid import CornerGrid
from tests.reference_modules import InteractionMoE

TEXT = {"hidden_size": 768, "num_attention_heads": 12, "intermediate_size": 3072}


def _words(tokens: int, valid: int, vocabulary: int = 1000) -> dict[str, torch.Tensor]:
    """A text of ``valid`` tokens between a start and an end symbol, padded to ``tokens``."""
    ids = torch.zeros(1, tokens, dtype=torch.long)
    ids[0, :valid] = torch.randint(5, vocabulary, (valid,))
    ids[0, 0], ids[0, valid - 1] = 2, 3
    return {"input_ids": ids, "attention_mask": (ids != 0).long()}


def bert(layers: int):
    """A sentence of 48 tokens padded to 64; absent tokens are removed."""
    model = hf.BertForSequenceClassification(hf.BertConfig(**TEXT, vocab_size=1000, num_hidden_layers=layers))
    inputs = _words(64, 48)
    return model, inputs, [text_players(inputs["input_ids"], special=(0, 2, 3))], {"value": "logit"}


def vit(layers: int, absent: float | str = 0.0):
    """An image of 14 x 14 patches of 16 pixels."""
    config = hf.ViTConfig(**TEXT, num_hidden_layers=layers, image_size=224, patch_size=16, num_labels=10)
    pixels = torch.randn(1, 3, 224, 224)
    return (
        hf.ViTForImageClassification(config),
        {"pixel_values": pixels},
        [image_players(pixels, patch=16, absent=absent)],
        {"value": "logit"},
    )


def vilt(layers: int):
    """A question of 16 tokens padded to 40, and 12 x 12 patches of 32 pixels."""
    config = hf.ViltConfig(
        **TEXT, vocab_size=1000, num_hidden_layers=layers, image_size=384, patch_size=32, max_image_length=-1,
        num_labels=10,
    )  # fmt: skip
    inputs = {**_words(40, 16), "pixel_values": torch.randn(1, 3, 384, 384)}
    players = [
        text_players(inputs["input_ids"], special=(0, 2, 3)),
        image_players(inputs["pixel_values"], patch=32),
    ]
    return hf.ViltForQuestionAnswering(config), inputs, players, {"value": "logit"}


def clip(layers: int):
    """A caption of 12 tokens padded to 77, and 7 x 7 patches of 32 pixels."""
    text = {"vocab_size": 1000, "num_hidden_layers": layers, "eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
    image = {**TEXT, "num_hidden_layers": layers, "image_size": 224, "patch_size": 32}
    inputs = {**_words(77, 12), "pixel_values": torch.randn(1, 3, 224, 224)}
    players = [
        text_players(inputs["input_ids"], special=(0, 2, 3), absent=4),
        image_players(inputs["pixel_values"], patch=32),
    ]
    return hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=image)), inputs, players, {}


def vit_removed(layers: int):
    """The same image; absent patches are removed, which ViT's own interface cannot do."""
    return vit(layers, "remove")


MODELS = {"bert": bert, "vit": vit, "vit_removed": vit_removed, "vilt": vilt, "clip": clip}


def _grid(game: Game, rows: int = 4, cols: int = 5) -> CornerGrid:
    """A corner grid between the first two modalities, or between the first players of one."""
    if game.groups:
        first, second = (torch.tensor(players) for _, players in game.groups[:2])
    else:
        first, second = torch.arange(rows), rows + torch.arange(cols)
    return CornerGrid.of(torch.cartesian_prod(first[:rows], second[:cols]), game.n)


def _contexts(n: int) -> Iterator[torch.Tensor]:
    """One random context (1, n) after the other, always the same ones."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield torch.rand(1, n, generator=generator) < 0.5


def _difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def transformer(name: str, layers: int, rounds: int) -> list[dict]:
    """Rows of one model of transformers."""
    torch.manual_seed(0)
    model, inputs, players, options = MODELS[name](layers)
    model = model.eval()
    fast = accelerate(model).game(inputs, players, path="engine", **options)
    removed_by_engine = any(part.mask == "" for part in players)
    grid = _grid(fast)
    runs: dict[str, tuple[int, Callable]] = {}
    agreement = None
    if removed_by_engine:  # the model has no such interface: replaced patches cost it the same
        players = [image_players(inputs["pixel_values"], patch=16)]
    one = accelerate(model).game(inputs, players, path="module", batch=1, **options)
    many = accelerate(model).game(inputs, players, path="module", batch=16, **options)
    few = min(4, grid.evaluations)

    def corners(contexts: Iterator[torch.Tensor], count: int) -> torch.Tensor:
        return (next(contexts) ^ grid.toggled)[:count]

    # Games remember what they have computed, so that every round has a context of its own, the same for all.
    a, b, c = (_contexts(fast.n) for _ in range(3))
    runs["module, one at a time"] = (few, lambda: one(corners(a, few)))
    runs["module, in batches"] = (grid.evaluations, lambda: many(corners(b, grid.evaluations)))
    runs["engine"] = (grid.evaluations, lambda: fast.corner_values(next(c), grid.toggled))
    if not removed_by_engine:
        exact = copy.deepcopy(model).double()
        doubled = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
        games = (accelerate(exact).game(doubled, players, path=p, **options) for p in ("engine", "module"))
        compared = corners(_contexts(fast.n), few)
        agreement = _difference(*(game(compared) for game in games))
    return _rows("transformer", {"case": name, "layers": layers, "players": fast.n}, runs, rounds, agreement)


def mixture(rounds: int) -> list[dict]:
    """A live module in the published layout: H 256, 4 heads, 2 layers, 96 + 96 tokens."""
    torch.manual_seed(0)
    module = InteractionMoE(modalities=2, width=256, heads=4, layers=2, classes=10).eval()
    inputs = [torch.randn(1, 96, 256), torch.randn(1, 96, 256)]
    masks = [torch.ones(1, 96), torch.ones(1, 96)]
    options = {"fill": "zero", "target": 0, "value": "logit", "heads": ("mixture",)}
    game = accelerate(module).game(inputs, masks, **options)
    grid = _grid(game)
    contexts = torch.rand(1, game.n) < 0.5
    few = (contexts[:, None] ^ grid.toggled).flatten(0, 1)[:4]

    @torch.no_grad()
    def loop(module: InteractionMoE, dtype: torch.dtype) -> torch.Tensor:
        values = []
        for coalition in few:
            kept = coalition.to(dtype).split(96)
            replaced = [part.to(dtype) * keep[None, :, None] for part, keep in zip(inputs, kept)]
            values.append(module.inference(replaced, [mask.to(dtype) for mask in masks])[2][0, 0])
        return torch.stack(values)

    exact = accelerate(copy.deepcopy(module).double()).game(inputs, masks, **options)
    agreement = _difference(exact(few)[:, 0], loop(copy.deepcopy(module).double(), torch.float64))
    runs = {
        "module, one at a time": (len(few), lambda: loop(module, torch.float32)),
        "engine": (grid.evaluations, lambda: game.corner_values(contexts, grid.toggled)),
    }
    return _rows("published layout", {"case": "moe", "layers": 2, "players": game.n}, runs, rounds, agreement)


def _rows(
    part: str, about: dict, runs: dict[str, tuple[int, Callable]], rounds: int, agreement: float | None
) -> list[dict]:
    seconds = interleave({name: run for name, (_, run) in runs.items()}, rounds)
    per = {name: [1e3 * s / runs[name][0] for s in seconds[name]] for name in runs}
    first = next(iter(runs))
    rows = []
    for name in runs:
        row = {"part": part, **about, "candidate": name, "threads": torch.get_num_threads(), "difference": agreement}
        row |= {"ms": spread(per[name]), "times_first": spread([a / b for a, b in zip(per[first], per[name])])}
        rows.append(row)
        print(
            f"{about['case']:45} {name:24} {row['ms']['median']:10.3f} ms  x{row['times_first']['median']:.2f}",
            flush=True,
        )
    print(f"{'':45} largest relative difference {'not comparable' if agreement is None else f'{agreement:.1e}'}")
    return rows


def main() -> None:
    """Measure, print, and write bench/results/adapt.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    cases = ("moe", *MODELS)
    parser.add_argument("--cases", nargs="+", choices=cases, default=cases)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--no-write", dest="write", action="store_false", help="only print")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in options.cases:
        if case == "moe":
            rows += mixture(options.rounds)
        else:
            rows += transformer(case, options.layers, options.rounds)
    if options.write:
        print("wrote", write("adapt", rows))


def table(rows: list[dict]) -> Table:
    """Other people's models on the engine against themselves."""
    lines = [
        [
            row["case"] + (f", {row['layers']} layers" if "layers" in row else ""),
            row["candidate"],
            quartiles(row["ms"], 2),
            f"{row['times_first']['median']:.1f}x",
            "" if row["difference"] is None else f"{row['difference']:.0e}",
        ]
        for row in rows
    ]
    columns = ["model", "", "ms", "speed", "difference"]
    note = (
        "Milliseconds per coalition, medians and quartiles, speed against the first of each model. Difference: the "
        "largest between engine and model relative to the largest value, in float64."
    )
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"adapt": ("adapt", table)}


if __name__ == "__main__":
    main()
