"""HD-XOR: high-dimensional synthetic data whose modalities are known to interact in one way (InterSHAP).

Two fair bits decide the label, which is 1 where exactly one of them is set. How the bits are hidden in the modalities
is the setting: all modalities carry both bits (redundancy), one modality carries both (uniqueness), or each modality
carries a bit of its own and none says anything alone (synergy).
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, integer, one_of
from flmoe_fast.data.errors import DataError, problem
from flmoe_fast.data.pickles import read_pickle
from flmoe_fast.data.splits import PARTS, Part, Splits

#: Observed dimensions of the published files, by number of modalities.
DIMENSIONS = {2: (200, 100), 3: (200, 100, 150), 4: (200, 100, 150, 100), 5: (200, 100, 150, 100, 150)}
LATENT = 200
SHIFT = {"redundancy": 0.25, "uniqueness": 0.35, "synergy": 0.35}
SYNERGY_SPREAD = 2.0


def settings(modalities: int) -> tuple[str, ...]:
    """Settings for M modalities: ``"redundancy"``, ``"synergy"``, ``"uniqueness0"`` ... and ``"random"``."""
    return ("redundancy", "synergy", *(f"uniqueness{m}" for m in range(modalities)), "random")


def hd_xor(
    setting: str,
    modalities: int = 2,
    *,
    samples: int = 20_000,
    seed: int = 0,
    dimensions: tuple[int, ...] | None = None,
) -> Splits:
    """Generate one data set.

    Parameters
    ----------
    setting : str
        One of :func:`settings`.
    modalities : int
        M, from 2 to 5.
    samples : int
        N in all; 70 % are for training and 15 % each for validation and test, with the same share of both labels.
    seed : int
    dimensions : M ints, optional
        Length of each observed vector; the published ones by default.

    Returns
    -------
    Splits
        Modalities ``m0``, ``m1``, ... with inputs (N, dimension) float32, and labels 0 and 1.

    Source: the generator of LauraWenderoth/InterSHAP. The paper's appendix gives other means, spreads and dimensions
    than the code that made the published data; this follows the code.
    """
    count = integer("modalities", modalities, least=2, most=5)
    one_of("setting", setting, settings(count))
    samples = integer("samples", samples, least=20)
    dimensions = DIMENSIONS[count] if dimensions is None else dimensions
    if not isinstance(dimensions, Sequence) or len(dimensions) != count:
        raise ArgumentError("dimensions", dimensions, f"{count} lengths, one per modality")
    dimensions = tuple(integer(f"dimensions[{m}]", d, least=1) for m, d in enumerate(dimensions))
    random = np.random.default_rng(integer("seed", seed, least=0))
    bits = synergy_bits(count if setting == "synergy" else 2, samples, random)
    labels = (bits.sum(1) == 1).astype(np.int64)
    if setting == "random":
        observed = [random.normal(0.5, 1.0, (samples, d)) for d in dimensions]
    else:
        mixing = [random.uniform(-0.5, 0.5, (d, LATENT)) for d in dimensions]
        observed = [latent @ a.T for a, latent in zip(mixing, _latents(setting, count, bits, random))]
    return _split(f"VEC{count} XOR {setting}", [x.astype(np.float32) for x in observed], labels, seed)


def read_hd_xor(path: str | os.PathLike) -> Splits:
    """Read a published file ``VEC<M>XOR_DATA_<setting>.pickle``; nothing in it is executed.

    It holds ``train``, ``valid`` and ``test``, each with lists of vectors under ``"0"``, ``"1"``, ... and ``label``.

    Raises
    ------
    DataError
        Another kind of file, or parts whose lengths do not match.
    """
    content = read_pickle(path)
    if not isinstance(content, dict) or set(content) != set(PARTS):
        raise DataError([problem(path, None, "another content", f"a dict of {', '.join(PARTS)}")])
    keys = sorted((key for key in content["train"] if key != "label"), key=int)
    parts = []
    for name in PARTS:
        found = content[name]
        if set(found) != {*keys, "label"}:
            raise DataError([problem(path, None, f"{sorted(found)} under {name}", f"{[*keys, 'label']}")])
        inputs = [torch.from_numpy(np.stack(found[key]).astype(np.float32)) for key in keys]
        labels = torch.from_numpy(np.asarray(found["label"]).astype(np.int64))
        if any(len(values) != len(labels) for values in inputs):
            raise DataError([problem(path, None, f"vectors and labels of {name} of other lengths", "a label a vector")])
        parts.append(Part(inputs, None, labels, tuple(f"{name}[{row}]" for row in range(len(labels)))))
    names = tuple(f"m{key}" for key in keys)
    return Splits(Path(path).stem, names, "multiclass", ("0", "1"), *parts)


def synergy_bits(count: int, samples: int, random: np.random.Generator) -> np.ndarray:
    """The bits (N, M) behind synergetic data, one a modality.

    With more than two bits exactly one is set less often than not, and rows are chosen so that it is in half of them.
    That lets a single bit say something: of three, where one is set exactly one is in 36 %, otherwise in 62 %.
    """
    if count == 2:
        return random.integers(0, 2, (samples, 2))
    bits = random.integers(0, 2, (samples * (count - 1), count))
    one = bits.sum(1) == 1
    positives = min(int(one.sum()), samples // 2)
    chosen = np.concatenate([bits[~one][: samples - positives], bits[one][:positives]])
    return random.permutation(chosen)


def _latents(setting: str, count: int, bits: np.ndarray, random: np.random.Generator) -> list[np.ndarray]:
    """The latent vector (N, 200) of each modality."""
    samples = len(bits)
    signs = 2.0 * bits - 1.0
    if setting == "synergy":
        spread = (samples, LATENT)
        return [SHIFT["synergy"] * signs[:, m : m + 1] + random.normal(0, SYNERGY_SPREAD, spread) for m in range(count)]
    kind = setting.rstrip("0123456789")
    both = np.repeat(SHIFT[kind] * signs, LATENT // 2, axis=1) + random.normal(0, 1, (samples, LATENT))
    if kind == "redundancy":
        return [both] * count
    latents = [random.normal(0, 1, (samples, LATENT)) for _ in range(count)]
    latents[int(setting[-1])] = both
    return latents


def _split(name: str, observed: list[np.ndarray], labels: np.ndarray, seed: int) -> Splits:
    from sklearn.model_selection import train_test_split

    rows = np.arange(len(labels))
    train, rest = train_test_split(rows, test_size=0.3, random_state=seed, stratify=labels)
    valid, test = train_test_split(rest, test_size=0.5, random_state=seed, stratify=labels[rest])

    def part(index: np.ndarray) -> Part:
        inputs = [torch.from_numpy(x[index]) for x in observed]
        return Part(inputs, None, torch.from_numpy(labels[index]), tuple(map(str, index)))

    names = tuple(f"m{m}" for m in range(len(observed)))
    return Splits(name, names, "multiclass", ("0", "1"), part(train), part(valid), part(test))
