"""Error and coverage at equal evaluations against every estimator of the SII that shapiq has, on several games.

    python -m bench.peers [--kinds digits-prob digits-logit vit soum large] [--budgets 1024 2048 4096]
                          [--games 2] [--seeds 3] [--coverage-seeds 100] [--coverage-only]

- ``digits-prob``, ``digits-logit``: held-out digits seen by the demonstration's model (run make demo first), 16 tokens.
- ``vit``: a vision transformer of Hugging Face's library, trained here on the same images as 16 patches of 2 x 2
  pixels; absent patches are black; the value is the probability of the predicted digit. Pairs of the upper and the
  lower half.
- ``soum``: sums of 200 unanimity games of up to five of 32 players; the truth has a closed form.
- ``large``: the same with 500 players; what every estimator does, including to refuse. Stopped after two minutes
  of processor time.

Truth is by enumeration but for ``soum`` and ``large``. Every kind is asked for 64 pairs. Results are appended to
bench/results/peers.jsonl as they come, one line a kind, estimator and budget; what is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import resource
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from bench import accuracy
from bench.timing import RESULTS, read, write
from flmoe_fast import exact_interactions, interactions, load_checkpoint
from flmoe_fast.games.game import as_game
from flmoe_fast.probes.exact import enumerate_values

BUDGETS = (1024, 2048, 4096)
COVERAGE_BUDGETS = (512, 1024)
KINDS = ("digits-prob", "digits-logit", "vit", "soum", "large")
PATIENCE = 120
#: Children begin as copies, with the games in memory.
PROCESSES = multiprocessing.get_context("fork")


class Soum:
    """A sum of unanimity games: each term is worth its weight where all its members are present."""

    def __init__(self, n: int, terms: int, seed: int):
        rng = np.random.default_rng(seed)
        self.n, self.asked = n, 0
        self.members = [rng.choice(n, rng.integers(1, 6), replace=False) for _ in range(terms)]
        self.weights = torch.from_numpy(rng.uniform(-1, 1, terms))
        self.incidence = torch.zeros(terms, n, dtype=torch.float64)
        for row, some in enumerate(self.members):
            self.incidence[row, some] = 1.0
        self.size = self.incidence.sum(1)

    def __call__(self, coalitions) -> torch.Tensor:
        rows = torch.as_tensor(np.atleast_2d(coalitions)).double()
        self.asked += len(rows)
        return (rows @ self.incidence.T == self.size).double() @ self.weights

    def truth(self, pairs: list[tuple[int, int]]) -> np.ndarray:
        """SII: a term of t members gives weight / (t - 1) to each of its pairs."""
        both = torch.stack([self.incidence[:, i] * self.incidence[:, j] for i, j in pairs])
        return (both @ (self.weights / (self.size - 1).clamp(min=1))).numpy()


def busy_pairs(game: Soum, count: int = 64) -> list[tuple[int, int]]:
    """Pairs (i, j) of the eight players of the lower half and the eight of the upper half with most terms."""
    terms = game.incidence.sum(0)
    half = game.n // 2
    low, high = terms[:half].topk(8).indices.sort().values, half + terms[half:].topk(8).indices.sort().values
    return [(int(i), int(j)) for i in low for j in high][:count]


def vit_games(count: int) -> list[accuracy.Table]:
    """Games of a small vision transformer on held-out digits, every coalition of patches evaluated."""
    from transformers import ViTConfig, ViTForImageClassification

    from flmoe_fast.data.digits import two_view_digits

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=8,
                       patch_size=2, num_channels=1, num_labels=10, hidden_dropout_prob=0.1)  # fmt: skip
    model = ViTForImageClassification(config)
    train, held_out = two_view_digits()
    images, unseen = (torch.cat(part.inputs, dim=2)[:, None] for part in (train, held_out))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for step in range(600):
        batch = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))
        keep = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(step)) > 0.15
        masked = images[batch] * keep.repeat_interleave(2, 2).repeat_interleave(2, 3)
        loss = torch.nn.functional.cross_entropy(model(masked).logits, train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        share = float((model(unseen).logits.argmax(1) == held_out.labels).double().mean())
        print(f"vit: {share:.1%} of the held-out digits are right", flush=True)
        games = []
        for image in unseen[:count]:
            target = int(model(image[None]).logits.argmax())

            def value(z: torch.Tensor, image: torch.Tensor = image, target: int = target) -> torch.Tensor:
                keep = z.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
                return model(image * keep).logits.double().softmax(1)[:, target]

            games.append(accuracy.Table(enumerate_values(as_game(value, 16))))
    return games


def games_of(kind: str, count: int, model: Path) -> tuple[list, list[tuple[int, int]], list[np.ndarray]]:
    """Games, the pairs asked for, and their true SII."""
    if kind in ("soum", "large"):
        n, terms = (32, 200) if kind == "soum" else (500, 2000)
        games = [Soum(n, terms, seed) for seed in range(count)]
        pairs = busy_pairs(games[0])
        return games, pairs, [game.truth(pairs) for game in games]
    if kind == "vit":
        games = vit_games(count)
    else:
        games = accuracy.tables(load_checkpoint(model), count)[kind.partition("-")[2]]
    return games, accuracy.PAIRS, [exact_interactions(g, pairs=accuracy.PAIRS, progress=False).sii for g in games]


def ours(**options):
    """Our estimators."""

    def estimate(game, pairs, budget: int, seed: int) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return interactions(game, n=game.n, pairs=pairs, budget=budget, seed=seed, progress=False, **options).sii

    return estimate


def theirs(name: str, **options):
    """One of shapiq's approximators of all pairs, read at our pairs."""

    def estimate(game, pairs, budget: int, seed: int) -> np.ndarray:
        import shapiq

        approximator = getattr(shapiq, name)(n=game.n, max_order=2, index="SII", random_state=seed, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            values = approximator.approximate(budget, lambda rows: game(rows).numpy())
        return np.array([values[pair] for pair in pairs])

    return estimate


ESTIMATORS: dict[str, Callable] = {
    "surrogate": ours(method="surrogate"),
    "auto": ours(method="auto"),
    "corner grid": ours(),
    "shapiq KernelSHAP-IQ": theirs("KernelSHAPIQ"),
    "shapiq KernelSHAP-IQ, pairing": theirs("KernelSHAPIQ", pairing_trick=True),
    "shapiq Inconsistent KernelSHAP-IQ": theirs("InconsistentKernelSHAPIQ"),
    "shapiq Inconsistent KernelSHAP-IQ, pairing": theirs("InconsistentKernelSHAPIQ", pairing_trick=True),
    "shapiq SVARM-IQ": theirs("SVARMIQ"),
    "shapiq SHAP-IQ": theirs("SHAPIQ"),
    "shapiq permutation sampling": theirs("PermutationSamplingSII"),
    "shapiq ProxySPEX": theirs("ProxySPEX"),
    "shapiq SPEX": theirs("SPEX"),
}


def attempt(estimator: Callable, game, pairs, budget: int, seed: int) -> tuple[np.ndarray, int] | str:
    """An estimate and the evaluations it took, or one line on why there is none.

    In a process of its own, which the system stops when its processor time is up, in whatever library it then is.
    """

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_CPU, (PATIENCE, PATIENCE))
        game.asked = 0
        try:
            sender.send((estimator(game, pairs, budget, seed), game.asked))
        except Exception as problem:
            sender.send(f"{type(problem).__name__}: {problem}".splitlines()[0][:160])

    receiver, sender = PROCESSES.Pipe(duplex=False)
    process = PROCESSES.Process(target=work)
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return f"stopped after {PATIENCE} s of processor time"
    finally:
        process.join()


def errors(kind: str, name: str, budget: int, games: list, pairs: list, truths: list, seeds: int) -> dict:
    """nMSE of one estimator at one budget over games and seeds; the first refusal ends it."""
    found, most = [], 0
    row = {"kind": kind, "estimator": name, "budget": budget, "games": len(games), "seeds": seeds}
    for game, truth in zip(games, truths):
        for seed in range(seeds):
            found_or_not = attempt(ESTIMATORS[name], game, pairs, budget, seed)
            if isinstance(found_or_not, str):
                return {**row, "refuses": found_or_not}
            estimate, asked = found_or_not
            found.append(accuracy.nmse(estimate, truth))
            most = max(most, asked)
    spread = float(np.std(found, ddof=1) / len(found) ** 0.5) if len(found) > 1 else None
    return {**row, "most_evaluations": most, "nmse": float(np.mean(found)), "nmse_median": float(np.median(found)),
            "nmse_stderr": spread}  # fmt: skip


def coverage(kind: str, method: str, budget: int, games: list, pairs: list, truths: list, seeds: int) -> dict:
    """Share of 95 % intervals that contain the truth, over all pairs, games and seeds."""
    inside: dict[str, list[float]] = {"sii": [], "max": [], "strict": []}
    width, error = 0.0, 0.0
    for game, truth in zip(games, truths):
        for gap in ("max", "strict"):
            exact = None
            if game.n <= 16:
                exact = exact_interactions(game, pairs=pairs, gap=gap, progress=False).gap
            elif gap == "strict":
                continue  # its truth is not known, and the index is the same
            for seed in range(1000, 1000 + seeds):
                found = interactions(
                    game, n=game.n, pairs=pairs, budget=budget, seed=seed, method=method, gap=gap, progress=False
                )
                low, high = found.interval()
                if gap == "max":
                    inside["sii"].append(float(((low <= truth) & (truth <= high)).mean()))
                    width, error = width + (found.sii_stderr**2).sum(), error + ((found.sii - truth) ** 2).sum()
                if exact is not None:
                    low, high = found.interval(of="gap")
                    inside[gap].append(float(((low <= exact) & (exact <= high)).mean()))
    shares = {f"coverage_{of}": float(np.mean(some)) for of, some in inside.items() if some}
    row = {"kind": kind, "method": method, "coverage_budget": budget, "games": len(games), "seeds": seeds}
    return {**row, **shares, "claimed_over_actual_variance": float(width / error)}


def main() -> None:
    """Measure what is missing and append it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("out/demo/model.safetensors"))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--estimators", nargs="+", choices=ESTIMATORS, default=list(ESTIMATORS))
    parser.add_argument("--budgets", type=int, nargs="+", default=BUDGETS)
    parser.add_argument("--games", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--coverage-seeds", type=int, default=100)
    parser.add_argument("--coverage-only", action="store_true")
    options = parser.parse_args()
    path = RESULTS / "peers.jsonl"
    if read("peers") is None:
        write("peers", [])
    done = read("peers")[1]

    def add(row: dict) -> None:
        with open(path, "a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)

    def missing(**key: object) -> bool:
        return not any(all(row.get(k) == v for k, v in key.items()) for row in done)

    for kind in options.kinds:
        games, pairs, truths = games_of(kind, 1 if kind == "large" else options.games, options.model)
        for budget in () if options.coverage_only else options.budgets:
            for name in options.estimators:
                if missing(kind=kind, estimator=name, budget=budget):
                    seeds = 1 if kind == "large" else options.seeds
                    add(errors(kind, name, budget, games, pairs, truths, seeds))
        for budget in COVERAGE_BUDGETS if kind != "large" and options.coverage_seeds else ():
            for method in ("surrogate",):
                if missing(kind=kind, method=method, coverage_budget=budget):
                    add(coverage(kind, method, budget, games[:1], pairs, truths[:1], options.coverage_seeds))


if __name__ == "__main__":
    main()
