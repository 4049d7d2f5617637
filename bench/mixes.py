"""Which operands need a second fp16 term: rounding noise of second differences when only some are split.

    python -m bench.mixes [--epochs 8 1] [--samples 2] [--contexts 8]

Emulated in float64 on the CPU, on a trained model of 256 tokens whose matrices are already rounded to fp16: every
activation that enters a matrix product is rounded to fp16 (11 bits), or, where it is split, to two fp16 terms (22
bits). Noise is relative to the variance of the second differences over contexts and pairs. A model that was stopped
early, whose interactions are smaller, shows how far the figures depend on the model.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from bench.baselines import BatchedSDPA
from bench.cells import Table
from bench.cpu import trained_model
from bench.timing import write
from flmoe_fast import TokenGame
from flmoe_fast.engines.problem import Logits
from flmoe_fast.probes.grid import CornerGrid

#: Where an activation enters a product: after a LayerNorm, after attention, after GELU; and those of attention itself.
SITES = ("normalised", "attended", "hidden", "queries", "keys", "weights", "values")
MIXES = {
    "all split": SITES,
    "none split": (),
    **{f"all split but {site}": tuple(s for s in SITES if s != site) for site in SITES},
    "all split but queries and weights": ("normalised", "attended", "hidden", "keys", "values"),
    "linear layers split": ("normalised", "attended", "hidden"),
    "attention split": ("queries", "keys", "weights", "values"),
    "linear layers and values split": ("normalised", "attended", "hidden", "weights", "values"),
}


def rounded(x: torch.Tensor, split: bool) -> torch.Tensor:
    """A float64 tensor as one fp16 term, or two."""
    high = x.half().double()
    return high + (x - high).half().double() if split else high


class Mix(TorchFunctionMode):
    """Rounds the activations of :class:`BatchedSDPA`'s experts; the ones named are split."""

    def __init__(self, split: tuple[str, ...], hidden: int):
        super().__init__()
        self.split, self.hidden = split, hidden

    def at(self, site: str, x: torch.Tensor) -> torch.Tensor:
        return rounded(x, site in self.split)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and args[0].dim() == 3:  # (C, L, ...): a layer's, neither the head's nor the routing's
            x, weight, bias = (*args, None)[:3]
            out, into = weight.shape
            site = "hidden" if into > self.hidden else "attended" if out == into and bias is not None else "normalised"
            return F.linear(self.at(site, x), weight, bias)
        if function is F.scaled_dot_product_attention:
            q, k, v = args
            score = self.at("queries", q) @ self.at("keys", k).mT * q.shape[-1] ** -0.5
            weights = (score - score.amax(-1, keepdim=True)).exp()
            return self.at("weights", weights) @ self.at("values", v) / weights.sum(-1, keepdim=True)
        return function(*args, **(kwargs or {}))


def noise(epochs: int, samples: int, contexts: int) -> list[dict]:
    """A row per mix."""
    model, features, accuracy = trained_model(epochs)
    with torch.no_grad():
        for name, parameter in model.interaction_experts.named_parameters():
            if parameter.dim() == 2 and ".network." in name:
                parameter.copy_(parameter.half())
    generator = torch.Generator().manual_seed(0)
    errors, total = dict.fromkeys(MIXES, 0.0), 0.0
    tokens = features[0].shape[1]
    for index in range(samples):
        game = TokenGame(
            model, [f[index] for f in features], masks=[torch.ones(tokens)] * 2, heads=("mixture",), backend="torch"
        )
        middle = torch.arange(tokens // 4, 3 * tokens // 4, tokens // 8)
        corners = CornerGrid.of(torch.cartesian_prod(middle, tokens + middle), game.n)
        drawn = torch.rand(contexts, game.n, generator=generator) < torch.rand(contexts, 1, generator=generator)
        every = (drawn[:, None] ^ corners.toggled).flatten(0, 1)
        batched = BatchedSDPA(game, torch.float64)

        def second(program=batched, every=every, game=game, corners=corners, drawn=drawn) -> torch.Tensor:
            parts = [program(part) for part in every.split(16)]
            logits = Logits(torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts]))
            v11, v10, v01, v00 = corners.corners(drawn, game._heads.values(logits).unflatten(0, (len(drawn), -1)))
            return v11 - v10 - v01 + v00

        truth = second()
        total += float(truth.var(correction=0))
        for name, split in MIXES.items():
            with Mix(split, model.config.hidden):
                errors[name] += float((second() - truth).square().mean())
        model.float()
    facts = {"model": f"digits, {2 * tokens} tokens", "epochs": epochs, "accuracy": accuracy}
    facts |= {"samples": samples, "contexts": contexts}
    return [{"mix": name, "noise_share": error / total, **facts} for name, error in errors.items()]


def main() -> None:
    """Measure, print, and write bench/results/mixes.jsonl."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, nargs="+", default=[8, 1], help="of training, a model each")
    parser.add_argument("--samples", type=int, default=2)
    parser.add_argument("--contexts", type=int, default=8)
    parser.add_argument("--dry", action="store_true", help="write no file")
    options = parser.parse_args()
    rows = [row for epochs in options.epochs for row in noise(epochs, options.samples, options.contexts)]
    for row in rows:
        print(f"{row['mix']:34} noise share {row['noise_share']:.1e}  (accuracy {row['accuracy']:.3f})")
    if not options.dry:
        print("wrote", write("mixes", rows))


def table(rows: list[dict]) -> Table:
    """Noise share by which activations have a second fp16 term, a column a model."""
    models = sorted({(-row["accuracy"], row["epochs"]) for row in rows})
    shares = {(row["mix"], row["epochs"]): row["noise_share"] for row in rows}
    names = sorted({row["mix"] for row in rows}, key=lambda name: shares[name, models[0][1]])
    lines = [[name, *(f"{shares[name, epochs]:.1e}" for _, epochs in models)] for name in names]
    columns = ["activations in two float16 terms", *(f"model at {-100 * found:.1f} %" for found, _ in models)]
    note = f"{rows[0]['model']}; {rows[0]['samples']} samples, {rows[0]['contexts']} contexts each."
    return columns, lines, note


#: Tables of pages: the results file, and what makes the table of it.
TABLES = {"mixes": ("mixes", table)}


if __name__ == "__main__":
    main()
