"""A decoder that answers a question about a picture: its prefix tree against its own forward passes.

    OMP_NUM_THREADS=2 python -m bench.decoders [--rounds 5] [--widths 256 512] [--append]

LLaVA with random weights: 576 image tokens, 44 of prompt and question, an answer of four, eight layers. The vision
tower is kept small, because only the batches pay for it again and again. One corner grid a context, of 10 x 10 pairs
of words and places of the picture. The model's own passes are timed on some of the coalitions and counted as often as
a grid takes them: 121 in batches of 32, or the four corners of 100 pairs one at a time.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Callable, Iterator

import torch
import transformers as hf

from bench.cells import Table
from bench.cells import times as in_times
from bench.timing import interleave, read, spread, write
from flmoe_fast import answer_logprob, image_token_players, text_players
from flmoe_fast.adapt.causal.game import DecoderGame, decoder_module_game
from flmoe_fast.adapt.remember import forget
from flmoe_fast.coalitions import sample_contexts, unpack
from flmoe_fast.probes.grid import CornerGrid

LAYERS, PATCHES, PROMPT, ANSWER, SIDE = 8, 576, 44, (5, 6, 7, 8), 10
IMAGE, VOCABULARY = 1999, 2000
#: Coalitions of a batch, and how many are taken one at a time.
BATCH, ALONE = 32, 4


def llava(width: int) -> torch.nn.Module:
    """A decoder of this width behind a small vision tower."""
    text = hf.LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=LAYERS,
        num_attention_heads=width // 64, num_key_value_heads=width // 64, max_position_embeddings=1024,
    )  # fmt: skip
    vision = hf.CLIPVisionConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=1, num_attention_heads=2, image_size=336, patch_size=14
    )
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-1)
    return hf.LlavaForConditionalGeneration(config).eval()


def sample() -> dict[str, torch.Tensor]:
    """A prompt of four words, the picture, and a question."""
    generator = torch.Generator().manual_seed(1)
    words = torch.randint(10, VOCABULARY - 10, (PROMPT,), generator=generator)
    ids = torch.cat([words[:4], torch.full((PATCHES,), IMAGE), words[4:]])[None]
    pixels = torch.randn(1, 3, 336, 336, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def grids(n: int) -> Iterator[torch.Tensor]:
    """Corner grids (121, n) of evenly spread places and words, in one context after the other."""
    places = torch.linspace(20, PATCHES - 20, SIDE).long()
    words = PATCHES + torch.linspace(1, PROMPT - 10, SIDE).long()
    grid = CornerGrid.of(torch.cartesian_prod(places, words), n)
    for seed in itertools.count():
        context = unpack(sample_contexts(n, 1, seed=seed, antithetic=False).words, n)
        yield (context[:, None] ^ grid.toggled).flatten(0, 1)


def by_design(length: int) -> int:
    """Tokens through the layers of one grid: every state of the picture once, and what follows it for every cell."""
    after = PROMPT - 4 + len(ANSWER) - 1
    return (1 + SIDE) * (length - after) + (1 + SIDE) ** 2 * after


def measured(width: int, rounds: int) -> dict:
    """The row of one width."""
    torch.manual_seed(0)
    model, inputs = llava(width), sample()
    ids, question = inputs["input_ids"], answer_logprob(ANSWER)
    around = [IMAGE, *ids[0, :4].tolist(), *ids[0, -4:].tolist()]
    players = [image_token_players(ids, IMAGE), text_players(ids, special=around)]
    tree = DecoderGame(model, inputs, players, question=question)
    batches = decoder_module_game(model, inputs, players, question, batch=BATCH)
    alone = decoder_module_game(model, inputs, players, question, batch=1)
    z = next(grids(tree.n))
    length, cells = tree.inputs["input_ids"].shape[1], (1 + SIDE) ** 2
    error = float((tree(z[:BATCH]) - batches(z[:BATCH])).abs().max() / batches(z[:BATCH]).abs().max())
    counted: list[int] = []

    def caller(game, count: int) -> Callable[[], torch.Tensor]:
        coming = grids(tree.n)

        def call() -> torch.Tensor:
            forget(game)
            before = tree.tokens
            values = game(next(coming)[:count])
            counted.extend([tree.tokens - before] if game is tree else [])
            return values

        return call

    runs = {"tree": caller(tree, cells), "batches": caller(batches, BATCH), "alone": caller(alone, ALONE)}
    seconds = interleave(runs, rounds)
    grid_of_batches = [time * cells / BATCH for time in seconds["batches"]]
    corners = [time * 4 * SIDE**2 / ALONE for time in seconds["alone"]]
    return {
        "width": width,
        "tokens": spread([float(count) for count in counted]),
        "tokens_batches": cells * length,
        "tokens_corners": 4 * SIDE**2 * length,
        "tokens_by_design": by_design(length),
        "seconds": spread(seconds["tree"]),
        "times_batches": spread([b / a for a, b in zip(seconds["tree"], grid_of_batches)]),
        "times_corners": spread([b / a for a, b in zip(seconds["tree"], corners)]),
        "error": error,
    }


def table(rows: list[dict]) -> Table:
    """Widths: tokens through the layers, seconds of a grid, and how many times as fast."""
    lines = []
    for row in rows:
        tokens, batches = row["tokens"]["median"], row["tokens_batches"]
        lines.append(
            [
                str(row["width"]),
                f"{tokens:,.0f} ({batches / tokens:.1f} times fewer than batches)",
                f"{row['tokens_by_design']:,}",
                f"{row['seconds']['median']:.2f} s",
                in_times(row["times_batches"]),
                in_times(row["times_corners"]),
                f"{row['error']:.0e}",
            ]
        )
    columns = ["width", "tokens through the layers, a grid", "every state of the picture once, then all cells"]
    columns += ["a grid of 121", "against batches of 32", "against four corners one at a time", "difference"]
    note = (
        f"LLaVA with random weights, {LAYERS} layers, {PATCHES} image tokens, {PROMPT} of prompt and question, an "
        f"answer of {len(ANSWER)}; 10 x 10 pairs of places and words, absent tokens removed, float32. Medians and "
        "quartiles, candidates in turns; the model's own passes timed on 32 and on 4 coalitions. The difference is the "
        "largest one to the model's own batches, relative to the largest value."
    )
    return columns, lines, note


TABLES = {"decoders": ("decoders", table)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--widths", type=int, nargs="*", default=[256, 512])
    parser.add_argument("--append", action="store_true", help="keep the rows of other widths")
    options = parser.parse_args()
    found = read("decoders") if options.append else None
    rows = {row["width"]: row for row in (found[1] if found else [])}
    for width in options.widths:
        rows[width] = measured(width, options.rounds)
        print(rows[width], flush=True)
        write("decoders", [rows[known] for known in sorted(rows)])


if __name__ == "__main__":
    main()
