"""Everything that was found about one sample, as a file that a report is made of.

A sample is a folder with ``record.npz``, which is written in one step: a sample is done or not, and an older record
stays until the one that replaces it is complete, also when the process is killed.
"""

from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import pandas
import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.files import read_arrays, replacing
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.pipeline.explain import Explanation, explain
from flmoe_fast.pipeline.faithful.curves import DEFAULT_PERCENTS, Faithfulness, faithfulness
from flmoe_fast.pipeline.faithful.masking import DEFAULT_BUDGETS, MaskedPairs, mask_pairs
from flmoe_fast.pipeline.show.views import View, player_labels
from flmoe_fast.probes.result import InteractionResult

FORMAT = 2
#: Rankings of pairs that are masked, and how :meth:`InteractionResult.order` calls them.
RANKINGS = {"SII": "sii", "gap": "gap"}
_INTERACTIONS = "interactions."  # how the names of their arrays begin


@dataclass(frozen=True)
class SampleRecord:
    """One explained sample.

    Attributes
    ----------
    id : str
    truth : tuple of int, or of float for a regression
        True class or classes.
    target : tuple of int
        The explained class or classes.
    full, empty : float
        The mixture's value with all players and with none.
    experts : tuple of E str
    expert_logits, weights : float64 (E, C) and (E,)
    views : tuple of M View
    groups : modality and its players, as ``game.groups``
    places : (modality, position) of every player
    importance : DataFrame
        See :meth:`Explanation.importance_dataframe`.
    interactions : InteractionResult
    faithfulness : Faithfulness, or None
    masked : dict from "SII" and "gap" to MaskedPairs
    seconds : float
    folder : str
        Name of the folder that the record was read from, if it was.
    made_by : dict of JSON types
        Settings and model of the run that it belongs to; empty for a sample by itself.
    """

    id: str
    truth: tuple
    target: tuple[int, ...]
    full: float
    empty: float
    experts: tuple[str, ...]
    expert_logits: np.ndarray
    weights: np.ndarray
    views: tuple[View, ...]
    groups: tuple[tuple[str, tuple[int, ...]], ...]
    places: tuple[tuple[int, int], ...]
    importance: pandas.DataFrame
    interactions: InteractionResult
    faithfulness: Faithfulness | None
    masked: dict[str, MaskedPairs]
    seconds: float
    folder: str = ""
    made_by: dict[str, Any] = dataclasses.field(default_factory=dict)

    def save(self, folder: str | os.PathLike) -> None:
        """Write the sample into ``folder``, which is made where it does not exist."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        arrays: dict[str, Any] = {"expert_logits": self.expert_logits, "weights": self.weights}
        found, rest = self.interactions.parts()
        arrays |= {f"{_INTERACTIONS}{name}": array for name, array in found.items()}
        arrays["importance"] = self.importance.drop(columns=["player", "name"]).to_numpy(float)
        about: dict[str, Any] = {"format": FORMAT, "made_by": self.made_by, "interactions": rest}
        about["columns"] = [str(c) for c in self.importance.columns[2:]]
        about["names"] = self.importance["name"].tolist()
        for name in ("id", "truth", "target", "full", "empty", "experts", "groups", "places", "seconds"):
            about[name] = getattr(self, name)
        about["views"] = []
        for m, view in enumerate(self.views):
            about["views"].append({"name": view.name, "kind": view.kind, "tokens": view.tokens, "grid": view.grid})
            if view.image is not None:
                arrays[f"view.{m}"] = view.image
        parts = {"faithfulness": self.faithfulness, **{f"masked.{k}": v for k, v in self.masked.items()}}
        about["parts"] = {}
        for prefix, part in parts.items():
            if part is not None:
                about["parts"][prefix] = plain_fields(part, prefix, arrays)
        memory = io.BytesIO()
        np.savez(memory, _json=np.array(json.dumps(about)), **arrays)
        with replacing(folder / "record.npz") as file:
            file.write(memory.getvalue())

    @classmethod
    def load(cls, folder: str | os.PathLike) -> SampleRecord:
        """Read what :meth:`save` wrote. Nothing in the files is executed."""
        folder = Path(folder)
        try:
            arrays = read_arrays(folder / "record.npz")
            about = json.loads(str(arrays.pop("_json")))
            if about["format"] != FORMAT:
                raise ArgumentError("folder", f"{folder}, of another format", f"format {FORMAT}")
            found = {k.removeprefix(_INTERACTIONS): v for k, v in arrays.items() if k.startswith(_INTERACTIONS)}
            frame = pandas.DataFrame(arrays["importance"], columns=about["columns"])
            frame.insert(0, "name", about["names"])
            frame.insert(0, "player", range(len(frame)))
            views = tuple(
                View(
                    view["name"],
                    view["kind"],
                    tuple(view["tokens"]),
                    arrays.get(f"view.{m}"),
                    None if view["grid"] is None else tuple(view["grid"]),
                )
                for m, view in enumerate(about["views"])
            )
            parts = {}
            for prefix, plain in about["parts"].items():
                kind = Faithfulness if prefix == "faithfulness" else MaskedPairs
                parts[prefix] = rebuilt(kind, plain, prefix, arrays)
            return cls(
                **{name: about[name] for name in ("id", "full", "empty", "seconds", "made_by")},
                truth=tuple(about["truth"]),
                target=tuple(about["target"]),
                experts=tuple(about["experts"]),
                expert_logits=arrays["expert_logits"],
                weights=arrays["weights"],
                views=views,
                groups=tuple((name, tuple(players)) for name, players in about["groups"]),
                places=tuple(map(tuple, about["places"])),
                importance=frame,
                interactions=InteractionResult.from_parts(found, about["interactions"]),
                faithfulness=parts.pop("faithfulness", None),
                masked={prefix.removeprefix("masked."): part for prefix, part in parts.items()},
                folder=folder.name,
            )
        except ArgumentError:
            raise
        except (OSError, KeyError, TypeError, ValueError, AttributeError, RecursionError) as problem:
            raise ArgumentError("folder", f"{folder} ({problem})", "a folder written by SampleRecord.save") from problem


def read_records(run: str | os.PathLike) -> list[SampleRecord]:
    """The explained samples of a run's folder (``out`` of its settings), in order.

    Raises
    ------
    ArgumentError
        A record that cannot be read.
    """
    return [SampleRecord.load(folder) for folder in sorted((Path(run) / "samples").glob("*-*")) if is_done(folder)]


def is_done(folder: str | os.PathLike) -> bool:
    """Whether a sample's folder is complete."""
    return (Path(folder) / "record.npz").is_file()


def made_by(folder: str | os.PathLike) -> dict[str, Any] | None:
    """The settings and the model that a sample was explained with; None where there is no record that can be read."""
    try:
        with np.load(Path(folder) / "record.npz", allow_pickle=False) as archive:
            about = json.loads(str(archive["_json"]))
        return about["made_by"] if about["format"] == FORMAT else None
    except (OSError, EOFError, KeyError, TypeError, ValueError, BadZipFile):
        return None


def record_sample(
    model: FLI2MoE,
    features: Sequence[torch.Tensor],
    *,
    id: str,
    truth: Sequence,
    views: Sequence[View],
    masks: Sequence[torch.Tensor] | None = None,
    percents: Sequence[float] | None = DEFAULT_PERCENTS,
    most: Sequence[int] | None = DEFAULT_BUDGETS,
    repeats: int = 10,
    universe: str = "players",
    seed: int = 0,
    **options: Any,
) -> tuple[SampleRecord, Explanation]:
    """Explain one sample, and measure how faithful the explanation is, on one game.

    Parameters
    ----------
    model, features, masks
        As for :func:`explain`.
    id, truth, views
        What the record says about the sample.
    percents : sequence of float, or None
        See :func:`faithfulness`; None leaves it out.
    most : sequence of int, or None
        Numbers of pairs to mask (those beyond the number of probed pairs are left out); None leaves it out.
    repeats, universe
        See :func:`mask_pairs`.
    seed : int
        Of all draws.
    **options
        Of :func:`explain`.
    """
    if len(views) != len(model.config.modalities):
        raise ArgumentError(
            "views", f"{len(views)} views", f"one for each of {len(model.config.modalities)} modalities"
        )
    found = explain(model, features, masks=masks, seed=seed, **options)
    game = found.game
    if not isinstance(game, TokenGame):
        raise ArgumentError("model", type(model).__name__, "an ensemble of interaction experts")
    names = player_labels(views, game.positions)
    found = dataclasses.replace(found, interactions=found.interactions.named(names))
    scores = found.importance["mixture"]
    faithful = None if percents is None else faithfulness(game, scores, percents=percents, repeats=repeats, seed=seed)
    masked = {}
    budgets = [count for count in most or () if count <= len(found.interactions.pairs)]
    for name, by in RANKINGS.items():
        if budgets:
            ranked = found.interactions.pairs[found.interactions.order(by)]
            masked[name] = mask_pairs(game, ranked, most=budgets, repeats=repeats, seed=seed, universe=universe)
    logits = game.engine.evaluate(torch.ones(1, game.n, dtype=torch.bool))
    record = SampleRecord(
        id=id,
        truth=tuple(truth),
        target=(game.target,) if isinstance(game.target, int) else game.target,
        full=found.prediction["full"],
        empty=found.prediction["empty"],
        experts=model.config.expert_names,
        expert_logits=logits.experts[0].cpu().numpy(),
        weights=logits.weights[0].cpu().numpy(),
        views=tuple(views),
        groups=game.groups or (),
        places=game.positions,
        importance=found.importance_dataframe().assign(name=names),
        interactions=found.interactions,
        faithfulness=faithful,
        masked=masked,
        seconds=found.seconds,
    )
    return record, found


def plain_fields(part: Faithfulness | MaskedPairs, prefix: str, arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of a result that are no arrays; the arrays are put aside."""
    rest = {}
    for field in dataclasses.fields(part):
        value = getattr(part, field.name)
        if isinstance(value, np.ndarray):
            arrays[f"{prefix}.{field.name}"] = value
        else:
            rest[field.name] = value
    return rest


def rebuilt(kind: type, plain: dict[str, Any], prefix: str, arrays: dict[str, np.ndarray]) -> Any:
    own = {f.name: arrays[f"{prefix}.{f.name}"] for f in dataclasses.fields(kind) if f"{prefix}.{f.name}" in arrays}
    return kind(**own, **{name: tuple(value) if isinstance(value, list) else value for name, value in plain.items()})
