"""The demonstration: train a model on real digits, explain one image, check the probe against the naive one, mask pairs.

Everything printed is measured in the same run and kept in ``report.txt``.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
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
from flmoe_fast.model.training import fit, predict
from flmoe_fast.pipeline.explain import Explanation, explain
from flmoe_fast.pipeline.masking import MaskingCurve, mask_pairs, masking_curve
from flmoe_fast.pipeline.report import GAP_MEANING, report, table
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.probes.naive import four_corner_loop

HIDDEN, ATTENTION_HEADS, LAYERS = 64, 4, 2
LEARNING_RATE, SETTLING_RATE, BATCH = 2e-3, 5e-4, 32
#: Share of the epochs that runs at the lower rate, which steadies the result.
SETTLING = 0.2
GAP = "strict"


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
        Held-out images whose pairs are ranked and masked, and contexts for ranking those of one image.
    """

    epochs: int = 10
    contexts: int = 256
    naive_pairs: int = 4
    naive_samples: int = 64
    masked_images: int = 40
    masking_contexts: int = 16

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            least = 2 if field.name in ("naive_samples", "masked_images") else 1
            integer(field.name, getattr(self, field.name), least=least)


class _Log:
    """Prints, and remembers what was printed."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def __call__(self, text: str = "") -> None:
        self.lines.append(text)
        tqdm.write(text)

    def facts(self, *rows: tuple[str, str]) -> None:
        for name, text in rows:
            self(f"  {name:<12} {text}")


def run(out: str | os.PathLike, *, seed: int = 0, size: Size | None = None, progress: bool = True) -> dict[str, float]:
    """Run the demonstration and write its files into ``out``.

    ``model.safetensors`` and ``sample.npz`` (input of ``flmoe-fast explain``), ``interactions.csv``,
    ``interactions.npz``, ``importance.csv``, ``masking.csv``, ``report.txt`` and ``picture.png``.

    Parameters
    ----------
    out
        Folder; made where it does not exist.
    seed : int
        Of the split, the initial weights, training and all draws.
    size : Size, optional
    progress : bool
        Show progress bars.

    Returns
    -------
    dict
        ``accuracy`` (held out), ``speedup`` (naive over shared time per pair and sample) and ``seconds``.
    """
    started = time.perf_counter()
    size = size or Size()
    seed = integer("seed", seed, least=0, most=2**32 - 1)
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    say = _Log()
    machine = environment()
    say(f"Digits as two modalities, on {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}, seed {seed}")
    say()
    training, held_out = two_view_digits(seed)
    model, accuracy = _model(say, training, held_out, seed, size.epochs, progress)
    save_checkpoint(model, out / "model.safetensors")

    image, explanation = _explain(say, model, held_out, seed, size.contexts, progress)
    explanation.save(out)
    inputs = {name: half[image] for name, half in zip(MODALITIES, held_out.inputs)}
    save_sample(out / "sample.npz", inputs=inputs, masks=dict(zip(MODALITIES, [m[image] for m in held_out.masks])))

    speedup = _compare(say, model, held_out, image, explanation, seed, size)
    curves = _mask(say, model, held_out, seed, size, progress)
    frames = [curve.to_dataframe().assign(ranking=name) for name, curve in curves.items()]
    pandas.concat(frames).set_index("ranking").to_csv(out / "masking.csv")
    target = explanation.prediction["target"]
    title = f"Held-out image of a {int(held_out.labels[image])}, predicted {target} (p = {explanation.prediction['full']:.2f})"
    draw(out / "picture.png", explanation, tuple(inputs.values()), title, curves)

    seconds = time.perf_counter() - started
    say(f"All of it took {seconds:.0f} s. In {out}: picture.png, report.txt, interactions.csv, importance.csv, masking.csv")
    say(f"The same explanation again:  flmoe-fast explain {out / 'model.safetensors'} {out / 'sample.npz'} --out {out / 'explain'}")
    (out / "report.txt").write_text("\n".join(say.lines) + "\n")
    return {"accuracy": accuracy, "speedup": speedup, "seconds": seconds}


def _model(
    say: _Log, training: Digits, held_out: Digits, seed: int, epochs: int, progress: bool
) -> tuple[FLI2MoE, float]:
    """A trained model that carries its mean tokens, and its held-out accuracy."""
    started = time.perf_counter()
    config = FLI2MoEConfig(
        MODALITIES, HIDDEN, ATTENTION_HEADS, LAYERS, CLASSES, dropout=0.0, interaction_weight=0.1, reweight_hidden=HIDDEN
    )
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = FLI2MoE(config, {name: ProjectionEncoder(PIXELS, HIDDEN) for name in MODALITIES})
    settling = round(SETTLING * epochs)
    for count, rate in ((epochs - settling, LEARNING_RATE), (settling, SETTLING_RATE)):
        if count:
            history = fit(
                model, training.inputs, training.masks, training.labels,
                epochs=count, batch_size=BATCH, lr=rate, seed=seed, progress=progress,
            )
    with torch.no_grad():
        model.set_feature_means(model.encode(training.inputs), training.masks)
    seconds = time.perf_counter() - started

    found = predict(model, held_out.inputs, held_out.masks)
    right = found.logits.argmax(-1) == held_out.labels
    accuracy, count = float(right.double().mean()), len(right)
    error = math.sqrt(accuracy * (1 - accuracy) / count)
    alone = (found.expert_logits.argmax(-1) == held_out.labels[:, None]).double().mean(0).tolist()
    routed = found.weights.double().mean(0).tolist()
    parameters = sum(p.numel() for p in model.parameters())
    say("1  Model")
    say.facts(
        ("data", f"{len(training.labels):,} training and {count} held-out images; {TOKENS} + {TOKENS} tokens of {PIXELS} pixels"),
        ("network", f"FL-I2MoE, {config.experts} experts of {LAYERS} layers, width {HIDDEN}, {parameters:,} parameters"),
        ("training", f"{epochs} epochs in {seconds:.1f} s, interaction losses on; training accuracy {history[-1]['accuracy']:.1%}"),
        ("held out", f"accuracy {accuracy:.1%} ± {error:.1%} s.e. ({int(right.sum())} of {count})"),
    )
    rows = [[name, f"{a:.1%}", f"{w:.2f}"] for name, a, w in zip(config.expert_names, alone, routed)]
    say(table(["expert", "held-out accuracy alone", "mean routing weight"], rows))
    say()
    return model, accuracy


def _explain(
    say: _Log, model: FLI2MoE, held_out: Digits, seed: int, contexts: int, progress: bool
) -> tuple[int, Explanation]:
    """Explain the first held-out image that the model gets right (any image of a model that gets none right)."""
    right = predict(model, held_out.inputs, held_out.masks).logits.argmax(-1) == held_out.labels
    image = int(right.int().argmax())
    features, masks = _sample(model, held_out, image)
    found = explain(
        model, features, masks=masks, candidates=TOKENS, contexts=contexts, seed=seed, gap=GAP, progress=progress
    )
    say(f"2  Explanation of held-out image {image}, a {int(held_out.labels[image])}")
    say(report(found))
    say()
    return image, found


def _compare(
    say: _Log, model: FLI2MoE, held_out: Digits, image: int, explanation: Explanation, seed: int, size: Size
) -> float:
    """The naive probe on some of the pairs: how long it takes, and whether both say the same."""
    result = explanation.interactions
    count = min(size.naive_pairs, len(result.pairs))
    # Evenly spaced in the order of the candidates. Choosing by the estimates would favour pairs that were overestimated.
    chosen = np.linspace(0, len(result.pairs) - 1, count).round().astype(int)
    pairs = [tuple(pair) for pair in result.pairs[chosen].tolist()]
    features, masks = _sample(model, held_out, image)
    game = TokenGame(model, features, masks=masks, target=explanation.game.target, backend="reference", dtype=torch.float32)
    started = time.perf_counter()
    sii, sii_error, gap, gap_error = (
        part.numpy() for part in four_corner_loop(game, pairs, size.naive_samples, seed=seed + 1, gap=GAP)
    )
    naive_seconds = time.perf_counter() - started
    naive = 1e3 * naive_seconds / (count * size.naive_samples)
    samples = int(result.contexts.sum())
    shared = 1e3 * explanation.seconds / samples

    z = np.stack([
        _z(result.sii[chosen], result.sii_stderr[chosen], sii, sii_error),
        _z(result.gap[chosen], result.gap_stderr[chosen], gap, gap_error),
    ])  # (2, pairs, heads)
    far = int((np.abs(z) > 3).sum())
    # Variance times time does not depend on how long either ran.
    effort = naive * size.naive_samples * np.mean(sii_error[:, 0] ** 2)
    ours = shared * np.mean(result.contexts[chosen] * result.sii_stderr[chosen, 0] ** 2)
    per_sample = result.evaluations / samples
    say(f"3  The same probe without sharing: one coalition at a time, four for every sample of a pair ({count} of the pairs)")
    rows = [
        [
            " x ".join(result.player_names[p] for p in pair),
            f"{sii[r, 0]:+.4f} ± {sii_error[r, 0]:.4f}",
            f"{result.sii[at, 0]:+.4f} ± {result.sii_stderr[at, 0]:.4f}",
            f"{z[0, r, 0]:+.1f}",
            f"{gap[r, 0]:.4f} ± {gap_error[r, 0]:.4f}",
            f"{result.gap[at, 0]:.4f} ± {result.gap_stderr[at, 0]:.4f}",
            f"{z[1, r, 0]:+.1f}",
        ]
        for r, (pair, at) in enumerate(zip(pairs, chosen))
    ]
    say(table(["pair (mixture)", "naive SII ± s.e.", "shared SII ± s.e.", "z", f"naive {GAP} gap ± s.e.", "shared gap ± s.e.", "z"], rows))
    say.facts(
        ("agreement", f"{z.size - far} of {z.size} differences (SII and gap, {z.shape[2]} heads) within 3 standard errors; "
                      f"root mean square z {math.sqrt(np.nanmean(z**2)):.2f}"),
        ("evaluations", f"4 per pair and sample without sharing, {per_sample:.2f} with"),
        ("time", f"{naive:.2f} ms per pair and sample without sharing ({count} x {size.naive_samples} in {naive_seconds:.1f} s), "
                 f"{shared:.3f} ms with ({samples:,} in {explanation.seconds:.1f} s, the whole explanation): {naive / shared:.0f} times faster"),
        ("precision", f"for the same standard error of the SII (mixture, these pairs): {effort / ours:.0f} times faster"),
    )
    say()
    return naive / shared


def _mask(
    say: _Log, model: FLI2MoE, held_out: Digits, seed: int, size: Size, progress: bool
) -> dict[str, MaskingCurve]:
    """Masking curves of the pairs ranked by SII and by redundancy gap."""
    started = time.perf_counter()
    masked: dict[str, list] = {"SII": [], f"{GAP} gap": []}
    images = min(size.masked_images, len(held_out.labels))
    evaluations = 0
    for image in tqdm(range(images), desc="masking", unit="image", disable=not progress, leave=False):
        features, masks = _sample(model, held_out, image)
        game = TokenGame(model, features, masks=masks, heads=("mixture",))
        # A seed of its own for every image: with the same random tokens everywhere, the images' controls would not be
        # independent and their standard error too small.
        own = seed + image
        result = interactions(game, contexts=size.masking_contexts, seed=own, gap=GAP, progress=False)
        evaluations += result.evaluations
        for ranked, by in zip(masked.values(), ("sii", "gap")):
            ranked.append(mask_pairs(game, result.pairs[result.order(by)], seed=own))
    curves = {name: masking_curve(samples) for name, samples in masked.items()}
    seconds = time.perf_counter() - started
    say(f"4  Masking the tokens of the top pairs, or as many random tokens of each modality ({images} held-out images)")
    rows = [
        [
            f"{name}, top {curve.most[b]}",
            f"{curve.tokens[b]:.1f}",
            f"{curve.top[b]:.3f} ± {curve.top_stderr[b]:.3f}",
            f"{curve.random[b]:.3f} ± {curve.random_stderr[b]:.3f}",
            f"{curve.difference[b]:+.3f} ± {curve.difference_stderr[b]:.3f}",
            f"{round(curve.share[b] * images)} of {images}",
        ]
        for name, curve in curves.items()
        for b in range(len(curve.most))
    ]
    say(table(["pairs", "tokens", "drop, top pairs", "drop, random", "difference", "top drops more"], rows))
    say.facts(
        ("drop", "loss of the predicted class's probability, mean over images ± standard error; random: mean of 10 draws"),
        ("ranking", f"{size.masking_contexts} contexts an image, {evaluations:,} evaluations in {seconds:.1f} s; gap: {GAP_MEANING[GAP]}"),
    )
    say()
    return curves


@torch.no_grad()
def _sample(model: FLI2MoE, digits: Digits, image: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Features (T, H) and masks (T,) of one image."""
    features = model.encode([half[image : image + 1] for half in digits.inputs])
    return [f[0] for f in features], [mask[image] for mask in digits.masks]


def _z(a: np.ndarray, a_error: np.ndarray, b: np.ndarray, b_error: np.ndarray) -> np.ndarray:
    """Difference over its standard error; 0 where both are exactly equal."""
    error = np.sqrt(a_error**2 + b_error**2)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(a == b, 0.0, (a - b) / error)
