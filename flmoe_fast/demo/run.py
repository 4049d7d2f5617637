"""The demonstration: train a model on real digits, explain an image, check against the naive probe, mask pairs.

Everything printed is measured in the same run and kept in ``report.txt``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pandas
import torch
from tqdm.auto import tqdm

from flmoe_fast.checks import integer
from flmoe_fast.data.digits import CLASSES, MODALITIES, PIXELS, TOKENS, Digits, two_view_digits
from flmoe_fast.data.sample import save_sample
from flmoe_fast.demo.picture import draw
from flmoe_fast.environment import environment
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model.checkpoint import save_checkpoint
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.encoders import ProjectionEncoder
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit
from flmoe_fast.model.training.predict import predict
from flmoe_fast.pipeline.explain import Explanation, explain
from flmoe_fast.pipeline.faithful.masking import MaskedPairs, MaskingCurve, mask_pairs, masking_curve
from flmoe_fast.pipeline.show.text import facts, report, table, with_errors
from flmoe_fast.probes.gap import DEFAULT_GAP
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.probes.naive import four_corner_loop
from flmoe_fast.probes.result import InteractionResult

HIDDEN, ATTENTION_HEADS, LAYERS = 64, 4, 2
BATCH, RATE, SETTLING_RATE = 32, 2e-3, 5e-4
#: Share of the epochs that runs at the lower learning rate, which steadies the result.
SETTLING = 0.2
#: Random draws of tokens for every number of masked pairs.
REPEATS = 10


@dataclasses.dataclass(frozen=True)
class Size:
    """How much of everything is done.

    Attributes
    ----------
    epochs : int
        Passes over the training images.
    contexts : int
        Contexts of the explanation.
    naive_pairs, naive_samples : int
        Part of the same work that the naive probe does.
    masked_images, masking_contexts : int
        Held-out images whose pairs are ranked and masked, and contexts for ranking the pairs of one image.
    """

    epochs: int = 10
    contexts: int = 128
    naive_pairs: int = 4
    naive_samples: int = 64
    masked_images: int = 40
    masking_contexts: int = 8

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 2 if field.name in ("naive_samples", "masked_images") else 1
            integer(field.name, getattr(self, field.name), least=least)


@contextlib.contextmanager
def _one_thread() -> Iterator[None]:
    """One thread inside the block.

    All operations here are small: dividing them gains little on idle cores, and on busy ones every division waits for a
    core.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def run(out: str | os.PathLike, *, seed: int = 0, size: Size | None = None, progress: bool = True) -> dict[str, float]:
    """Run the demonstration and write its files into ``out``.

    ``model.safetensors`` and ``sample.npz`` (what ``flmoe-fast explain`` reads), ``interactions.csv`` and ``.npz``,
    ``importance.csv``, ``masking.csv``, ``report.txt`` and ``picture.png``.

    Parameters
    ----------
    out
        Folder; made where it does not exist.
    seed : int
        Of the split, the initial weights, the training and all draws.
    size : Size, optional
    progress : bool
        Show progress bars.

    Returns
    -------
    dict
        ``accuracy`` on held-out images, ``speedup`` (naive over shared time per pair and sample) and ``seconds``.
    """
    started = time.perf_counter()
    size = size or Size()
    seed = integer("seed", seed, least=0, most=2**31)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []

    def say(text: str = "") -> None:
        lines.append(text)
        tqdm.write(text)

    machine = environment()
    versions = f"{machine['cpu']}, one thread, torch {machine['torch']}"
    say(f"Handwritten digits as two modalities. {versions}, seed {seed}")
    training, held_out = two_view_digits(seed)
    begun = time.perf_counter()
    model, last = _train(training, seed, size.epochs, progress)
    accuracy, text = _judge(model, last, training, held_out, size.epochs, time.perf_counter() - begun)
    say(f"\n1  Model\n{text}")
    save_checkpoint(model, out / "model.safetensors")

    image, explanation = _explain(model, held_out, seed, size.contexts, progress)
    say(f"\n2  Explanation of held-out image {image}, a {int(held_out.labels[image])}\n{report(explanation)}")
    explanation.save(out)
    inputs = {name: half[image] for name, half in zip(MODALITIES, held_out.inputs)}
    masks = {name: mask[image] for name, mask in zip(MODALITIES, held_out.masks)}
    save_sample(out / "sample.npz", inputs=inputs, masks=masks)

    speedup, text = _compare(model, held_out, image, explanation, seed, size)
    say(f"\n3  The same probe without sharing: one coalition at a time, four for every sample of a pair\n{text}")

    begun = time.perf_counter()
    curves, evaluations = _mask(model, held_out, seed, size, progress)
    text = _masking_table(curves, size, evaluations, time.perf_counter() - begun)
    say(f"\n4  Masking the tokens of the top pairs, or as many random tokens of each modality\n{text}")
    tables = [curve.to_dataframe().assign(ranking=name) for name, curve in curves.items()]
    pandas.concat(tables).set_index("ranking").to_csv(out / "masking.csv")

    prediction = explanation.prediction
    title = f"Held-out {int(held_out.labels[image])}, predicted {prediction['target']} (p = {prediction['full']:.2f})"
    left, right = inputs.values()
    draw(out / "picture.png", explanation, (left, right), title, curves)
    seconds = time.perf_counter() - started
    names = "picture.png, report.txt, interactions.csv, importance.csv, masking.csv"
    say(f"\n{seconds:.0f} s in all. Written to {out}: {names}")
    again = f"--candidates {TOKENS} --contexts {size.contexts} --seed {seed} --out {out}/explain"
    say(f"Part 2 again: flmoe-fast explain {out}/model.safetensors {out}/sample.npz {again}")
    (out / "report.txt").write_text("\n".join(lines) + "\n")
    return {"accuracy": accuracy, "speedup": speedup, "seconds": seconds}


def _train(training: Digits, seed: int, epochs: int, progress: bool) -> tuple[FLI2MoE, dict]:
    """A trained model that carries its mean tokens, and the record of the last epoch."""
    config = FLI2MoEConfig(
        MODALITIES,
        HIDDEN,
        ATTENTION_HEADS,
        LAYERS,
        CLASSES,
        reweight_hidden=HIDDEN,
        dropout=0.0,
        interaction_weight=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = FLI2MoE(config, {name: ProjectionEncoder(PIXELS, HIDDEN) for name in MODALITIES})
    settling = round(SETTLING * epochs)
    history = []
    for count, rate in ((epochs - settling, RATE), (settling, SETTLING_RATE)):
        if count:
            history += fit(
                model,
                Examples(training.inputs, training.masks, training.labels),
                FitSettings(count, BATCH, rate, seed),
                progress=progress,
            )
    with torch.no_grad():
        model.set_feature_means(model.encode(training.inputs), training.masks)
    return model, history[-1]


def _judge(
    model: FLI2MoE, last: dict, training: Digits, held_out: Digits, epochs: int, seconds: float
) -> tuple[float, str]:
    """Held-out accuracy, and what there is to say about the model."""
    config = model.config
    found = predict(model, held_out.inputs, held_out.masks)
    right = found.logits.argmax(-1) == held_out.labels
    accuracy, count = float(right.double().mean()), len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    images = f"{len(training.labels):,} training and {count} held-out images"
    trained = f"accuracy {last['accuracy']:.1%} on the training images"
    text = facts(
        [
            ("data", f"{images} of {TOKENS} x {2 * PIXELS} pixels"),
            ("modalities", f"left and right half; a token is a row of {PIXELS} pixels, {TOKENS} tokens a half"),
            ("network", f"FL-I2MoE, {config.experts} experts of {LAYERS} layers, {parameters:,} parameters"),
            ("training", f"{epochs} epochs with interaction losses in {seconds:.1f} s, {trained}"),
            ("held out", f"accuracy {accuracy:.1%} ± {error:.1%} s.e. ({int(right.sum())} of {count})"),
        ]
    )
    alone = (found.expert_logits.argmax(-1) == held_out.labels[:, None]).double().mean(0).tolist()
    routed = found.weights.double().mean(0).tolist()
    rows = [[name, f"{a:.1%}", f"{w:.2f}"] for name, a, w in zip(config.expert_names, alone, routed)]
    return accuracy, f"{text}\n{table(['expert', 'held-out accuracy alone', 'mean routing weight'], rows)}"


def _explain(model: FLI2MoE, held_out: Digits, seed: int, contexts: int, progress: bool) -> tuple[int, Explanation]:
    """Explain the first of the held-out images on which the mixture and most experts are right."""
    found = predict(model, held_out.inputs, held_out.masks)
    experts = (found.expert_logits.argmax(-1) == held_out.labels[:, None]).sum(1)
    mixture = found.logits.argmax(-1) == held_out.labels
    image = int((mixture * (1 + experts)).argmax())
    features, masks = _sample(model, held_out, image)
    explanation = explain(
        model,
        features,
        masks=masks,
        candidates=TOKENS,
        contexts=contexts,
        seed=seed,
        progress=progress,
    )
    return image, explanation


def _compare(
    model: FLI2MoE, held_out: Digits, image: int, explanation: Explanation, seed: int, size: Size
) -> tuple[float, str]:
    """The naive probe on some of the pairs: how much longer it takes, and whether both say the same.

    For timing, every naive pair takes turns with a short shared probe of all pairs, so that a machine that slows down
    slows both.
    """
    result = explanation.interactions
    # Pairs of the most important tokens. Choosing by the estimates would favour those that came out large by luck.
    rank = {player: rank for players in explanation.candidates for rank, player in enumerate(players)}
    ranks = [max(rank[i], rank[j]) for i, j in result.pairs.tolist()]
    at = np.argsort(ranks, kind="stable")[: size.naive_pairs]
    count = len(at)
    pairs = [tuple(pair) for pair in result.pairs[at].tolist()]
    features, masks = _sample(model, held_out, image)
    options = {"masks": masks, "target": explanation.prediction["target"]}
    parts, naive_ms, shared_ms = [], [], []
    contexts = max(1, size.contexts // count)
    for turn, pair in enumerate(pairs):
        own = seed + 1 + turn
        begun = time.perf_counter()
        game = TokenGame(model, features, **options, backend="reference", dtype=torch.float32)
        parts.append(four_corner_loop(game, [pair], size.naive_samples, seed=own))
        middle = time.perf_counter()
        game = TokenGame(model, features, **options)
        interactions(game, pairs=result.pairs, contexts=contexts, method="grid", seed=own, progress=False)
        naive_ms.append(1e3 * (middle - begun) / size.naive_samples)
        shared_ms.append(1e3 * (time.perf_counter() - middle) / (contexts * len(result.pairs)))
    naive = [torch.cat(part).numpy() for part in zip(*parts)]
    shared = [part[at] for part in (result.sii, result.sii_stderr, result.gap, result.gap_stderr)]
    speedup = float(np.median(np.array(naive_ms) / np.array(shared_ms)))
    # How much fewer samples the same standard error takes, since a sample of the shared probe says more.
    fewer = np.mean(size.naive_samples * naive[1][:, 0] ** 2) / np.mean(result.contexts[at] * shared[1][:, 0] ** 2)
    return speedup, _comparison_table(result, pairs, naive, shared, naive_ms, shared_ms, fewer)


def _comparison_table(
    result: InteractionResult,
    pairs: list[tuple[int, int]],
    naive: list[np.ndarray],
    shared: list[np.ndarray],
    naive_ms: list[float],
    shared_ms: list[float],
    fewer: float,
) -> str:
    """Both probes' SII, its standard error, gap and its standard error of the pairs, and what they cost."""
    with np.errstate(divide="ignore", invalid="ignore"):
        z_sii, z_gap = (
            (shared[k] - naive[k]) / np.sqrt(shared[k + 1] ** 2 + naive[k + 1] ** 2) for k in (0, 2)
        )  # (pairs, heads)
    columns = [
        [" x ".join(result.player_names[player] for player in pair) for pair in pairs],
        *(with_errors(found[k][:, 0], found[k + 1][:, 0]) for k in (0, 2) for found in (naive, shared)),
    ]
    columns = [*columns[:3], [f"{v:+.1f}" for v in z_sii[:, 0]], *columns[3:], [f"{v:+.1f}" for v in z_gap[:, 0]]]
    header = ["pair (mixture)", "naive SII ± s.e.", "shared SII ± s.e.", "z"]
    header += [f"naive {DEFAULT_GAP} gap ± s.e.", "shared gap ± s.e.", "z"]
    agreement = "; ".join(
        f"{name} {int((np.abs(z) <= 2).sum())} of {z.size} within 2, root mean square {np.sqrt(np.mean(z**2)):.2f}"
        for name, z in (("SII", z_sii[np.isfinite(z_sii)]), ("gap", z_gap[np.isfinite(z_gap)]))
    )
    ratios = np.array(naive_ms) / np.array(shared_ms)
    evaluations = result.evaluations / result.contexts.sum()
    rows = [
        (
            "agreement",
            f"z is the difference in standard errors; {len(pairs)} pairs, {naive[0].shape[1]} heads: {agreement}",
        ),
        ("evaluations", f"per pair and sample 4 naive, {evaluations:.2f} shared"),
        (
            "time",
            f"per pair and sample {np.median(naive_ms):.2f} ms naive, {np.median(shared_ms):.3f} ms shared: "
            f"{np.median(ratios):.0f} times faster (median of {len(ratios)} turns, {ratios.min():.0f} to "
            f"{ratios.max():.0f})",
        ),
        (
            "precision",
            f"a sample of the shared probe is worth about {fewer:.1f} naive ones for the SII of these pairs (mixture)",
        ),
    ]
    return f"{table(header, list(zip(*columns)))}\n{facts(rows)}"


def _mask(
    model: FLI2MoE, held_out: Digits, seed: int, size: Size, progress: bool
) -> tuple[dict[str, MaskingCurve], int]:
    """Masking curves of the pairs ranked by SII and by redundancy gap, and the evaluations spent on the rankings."""
    masked: dict[str, list[MaskedPairs]] = {"SII": [], f"{DEFAULT_GAP} gap": []}
    evaluations = 0
    images = range(min(size.masked_images, len(held_out.labels)))
    for image in tqdm(images, desc="masking", unit="image", disable=not progress, leave=False):
        features, masks = _sample(model, held_out, image)
        game = TokenGame(model, features, masks=masks, heads=("mixture",))
        # Every image has draws of its own. With the same random tokens everywhere, the controls of different images
        # would not be independent, and the standard error over images too small.
        own = seed + image
        result = interactions(game, contexts=size.masking_contexts, seed=own, progress=False)
        evaluations += result.evaluations
        for samples, by in zip(masked.values(), ("sii", "gap")):
            samples.append(mask_pairs(game, result.pairs[result.order(by)], repeats=REPEATS, seed=own))
    return {name: masking_curve(samples) for name, samples in masked.items()}, evaluations


def _masking_table(curves: dict[str, MaskingCurve], size: Size, evaluations: int, seconds: float) -> str:
    rows: list[Sequence[str]] = []
    for name, curve in curves.items():
        numbers = [
            [f"{value:{sign}.3f} ± {error:.3f}" for value, error in zip(values, errors)]
            for values, errors, sign in (
                (curve.top, curve.top_stderr, ""),
                (curve.random, curve.random_stderr, ""),
                (curve.difference, curve.difference_stderr, "+"),
            )
        ]
        more = [f"{round(share * curve.samples)} of {curve.samples}" for share in curve.share]
        names = [f"{name}, top {most}" for most in curve.most]
        rows += zip(names, [f"{tokens:.1f}" for tokens in curve.tokens], *numbers, more)
    header = ["pairs", "tokens masked", "drop, top pairs", "drop, random", "top - random", "top drops more"]
    drop = (
        f"how much of the predicted class's probability is lost, mean over {curve.samples} held-out images ± standard "
        f"error; random: {REPEATS} draws an image, averaged first"
    )
    spent = f"{evaluations:,} evaluations; {seconds:.1f} s with the masking"
    explained = facts([("drop", drop), ("ranking", f"{size.masking_contexts} contexts an image, {spent}")])
    return f"{table(header, rows)}\n{explained}"


@torch.no_grad()
def _sample(model: FLI2MoE, digits: Digits, image: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features (T, H) and masks (T,) of one image."""
    features = model.encode([half[image : image + 1] for half in digits.inputs])
    return [feature[0] for feature in features], [mask[image] for mask in digits.masks]
