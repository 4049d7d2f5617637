"""The game of a dual encoder, such as CLIP or SigLIP: a similarity of two towers that never see each other.

An image and a text coalition are encoded apart, each distinct one once, and every pair of them is a dot product. On a
corner grid of a text and b image players a context costs (1 + a) + (1 + b) encodings instead of (1 + a)(1 + b) pairs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from flmoe_fast.adapt.encoder_game import MODEL_TOLERANCE, check_with_model, in_dtype, more_exact
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import VALUES, PlacedGame, name_players
from flmoe_fast.adapt.players import PlayerMap, Players
from flmoe_fast.adapt.reading import Stack
from flmoe_fast.adapt.remember import Remembered
from flmoe_fast.adapt.tower import Tower
from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.engines.choose import STACK_BACKENDS
from flmoe_fast.games.rounding import too_coarse

#: Keywords that belong to the text; all others are the image's.
TEXT_INPUTS = frozenset({"input_ids", "attention_mask", "position_ids", "token_type_ids"})
#: Coalitions per call; what repeats among them is encoded once.
BLOCK = 1 << 14


def is_dual_encoder(model: nn.Module) -> bool:
    """Whether a model scores pairs by the similarity of separately encoded images and texts."""
    methods = ("get_text_features", "get_image_features")
    return all(callable(getattr(model, name, None)) for name in methods) and hasattr(model, "logit_scale")


class DualEncoderGame(PlacedGame):
    """A dual encoder, one image and one text as a cooperative game.

    Parameters
    ----------
    model : nn.Module
        With ``get_text_features``, ``get_image_features`` and ``logit_scale``, and plain encoder stacks.
    inputs : mapping of str to Tensor
        One image; one text, or several of which one is explained and the others are what it is told apart from.
    players : Players or sequence of Players
        Of the image, of the text, or both.
    target : int
        The explained text.
    value : "logit" or "prob"
        The scaled similarity; or its probability: softmax over the texts, or for models that score every pair by
        itself (with a ``logit_bias``) the sigmoid.
    backend, dtype, memory, stacks
        As for :class:`EncoderGame`.
    """

    backend = "dual encoder"
    dtype: torch.dtype
    more_exact = "dtype=torch.float64"
    block = BLOCK
    model: Any  # with methods and parameters that not every module has

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        players: Players | Sequence[Players],
        *,
        target: int = 0,
        value: str = "logit",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        memory: int = 1 << 28,
        stacks: list[Stack] | None = None,
    ):
        one_of("value", value, VALUES)
        self._backend = one_of("backend", backend, STACK_BACKENDS)
        self.free, self._precision = backend == "auto" and dtype is None, "auto"
        self.value, self.memory = value, integer("memory", memory, least=1)
        self.model, inputs, self.dtype = in_dtype(model, inputs, dtype)
        self._stacks = stacks if self.model is model else None
        if not is_dual_encoder(model):
            got = f"a {type(model).__name__} without get_text_features, get_image_features and logit_scale"
            raise Unsupported("model", got, "a dual encoder")
        if "pixel_values" not in inputs or "input_ids" not in inputs:
            raise ArgumentError("inputs", f"keys {sorted(inputs)}", "input_ids and pixel_values among them")
        texts = inputs["input_ids"].shape[0]
        self.target = integer("target", target, least=0, most=texts - 1)
        if value == "prob" and texts == 1 and not hasattr(model, "logit_bias"):
            raise ArgumentError("value", "'prob' with a single text", "several texts to tell apart, or 'logit'")
        self.inputs = inputs
        self.players = PlayerMap(players, self._sample())
        name_players(self, self.players)
        self._make_towers()
        towers = [tower for _, tower in self._towers.values() if tower is not None]
        for tower in towers:
            check_with_model(tower)
        self.more_exact = more_exact(*towers)
        self._compare()
        finer = self.finer() if any(tower.engine.coarse for tower in towers) else None
        if finer is not None and too_coarse(self, finer):
            self._precision = finer._precision
            self._make_towers(like=self._towers)

    @property
    def encodings(self) -> dict[str, int]:
        """How many image and text coalitions have been encoded so far."""
        return {side: encoder.computed for side, encoder in self._encoders.items()}

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        if not len(coalitions):
            return torch.zeros(0, dtype=torch.float64)
        coalitions = coalitions.bool().cpu()
        image, text = (self._features(side, coalitions) for side in ("image", "text"))
        return self._values((image * text).sum(1), image)

    @torch.no_grad()
    def product(self, images: torch.Tensor, texts: torch.Tensor) -> torch.Tensor:
        """Values (A, B) of every image coalition (A, n) with every text coalition (B, n), for A + B encodings.

        Of the image coalitions only the image's players count, of the text coalitions only the text's.
        """
        for name, coalitions in (("images", images), ("texts", texts)):
            shape(name, coalitions, (None, self.n), "(A, n)" if name == "images" else "(B, n)")
        image, text = self._features("image", images.bool().cpu()), self._features("text", texts.bool().cpu())
        similarity = (image @ text.T).flatten()
        values = self._values(similarity, image.repeat_interleave(len(text), 0))
        return values.unflatten(0, (len(image), len(text)))

    def towers(self) -> list[tuple[torch.Tensor, Tower, Callable[[torch.Tensor], torch.Tensor]]]:
        """Each side's players, its tower, and the logit (C,) of what is read of it where the other side is full."""
        everyone = torch.ones(1, self.n, dtype=torch.bool)
        scale = self.model.logit_scale.detach().exp()
        found: list[tuple[torch.Tensor, Tower, Callable[[torch.Tensor], torch.Tensor]]] = []
        for side, other in (("image", "text"), ("text", "image")):
            players, tower = self._towers[side]
            if tower is not None:
                fixed = self._features(other, everyone)

                def explained(features: torch.Tensor, fixed: torch.Tensor = fixed) -> torch.Tensor:
                    return scale * F.normalize(features, dim=1) @ fixed[0].to(features)

                found.append((players, tower, explained))
        return found

    def precise(self) -> DualEncoderGame | None:
        """This game in float64; None if it already is."""
        if self.dtype == torch.float64:
            return None
        twin = copy.copy(self)
        twin.model, twin.inputs, twin.dtype = in_dtype(self.model, self.inputs, torch.float64)
        twin._stacks, twin._backend, twin._precision = None, "auto", "auto"
        twin._make_towers(like=self._towers)
        return twin

    def finer(self) -> DualEncoderGame | None:
        """This game in the next more exact arithmetic; None if dtype or backend were asked for, or in float64."""
        requests = [tower.engine.finer() for _, tower in self._towers.values() if tower is not None]
        asked = next((r for r in requests if r is not None and r.dtype == self.dtype), None)
        if not self.free or asked is None:
            return self.precise() if self.free else None
        twin = copy.copy(self)
        twin._precision = asked.precision
        twin._make_towers(like=self._towers)
        return twin

    @property
    def arithmetic(self) -> str:
        return min(tower.engine.arithmetic for _, tower in self._towers.values() if tower is not None)

    def about(self) -> dict[str, Any]:
        return {
            "target": self.target,
            "value": self.value,
            "dtype": str(self.dtype).removeprefix("torch."),
            "places": [list(place) for place in self.places],
            "path": "engine: two towers, every distinct half of a coalition encoded once",
        }

    def _features(self, side: str, coalitions: torch.Tensor) -> torch.Tensor:
        """Unit features (C, D), float64, of one side of coalitions (C, n)."""
        columns, tower = self._towers[side]
        if tower is None:
            return self._constant[side].expand(len(coalitions), -1)
        return self._encoders[side](coalitions[:, columns])

    def _values(self, similarity: torch.Tensor, image: torch.Tensor) -> torch.Tensor:
        """Values (C,) of similarities (C,) of the explained text and unit image features (C, D)."""
        scale = float(self.model.logit_scale.detach().double().exp())
        bias = float(getattr(self.model, "logit_bias", torch.zeros(())).detach().double())
        logit = scale * similarity + bias
        if self.value == "logit":
            return logit
        if hasattr(self.model, "logit_bias"):
            return logit.sigmoid()
        others = scale * image @ self._others.T
        return torch.cat([logit[:, None], others], dim=1).softmax(1)[:, 0]

    # ---- towers ---------------------------------------------------------------------------------------------------

    def _sample(self) -> dict[str, torch.Tensor]:
        """The inputs with the explained text alone."""
        texts = self.inputs["input_ids"].shape[0]
        one = slice(self.target, self.target + 1)
        return {
            name: value[one] if _is_text(name) and value.shape[0] == texts else value
            for name, value in self.inputs.items()
        }

    def _make_towers(self, like: Mapping[str, tuple[torch.Tensor, Tower | None]] | None = None) -> None:
        sample = self._sample()
        runs = {"image": self.model.get_image_features, "text": self.model.get_text_features}
        self._towers: dict[str, tuple[torch.Tensor, Tower | None]] = {}
        self._encoders: dict[str, Remembered] = {}
        self._constant: dict[str, torch.Tensor] = {}
        for side, run in runs.items():
            inputs = {name: value for name, value in sample.items() if _is_text(name) == (side == "text")}
            mine = [p for p, part in enumerate(self.players.parts) if part.input in inputs]
            if not mine:
                self._towers[side] = (torch.zeros(0, dtype=torch.long), None)
                self._constant[side] = self._plain(run, inputs)
                continue
            columns = torch.cat([torch.arange(self.n)[self.players.columns[p]] for p in mine])
            part = PlayerMap.of_parts([self.players.parts[p] for p in mine])
            known = {"stacks": self._stacks, "like": None if like is None else like[side][1], "backend": self._backend}
            known["precision"] = self._precision
            tower = Tower(self.model, run, _pooled, inputs, part, self.dtype, self.memory, **known)
            self._towers[side] = (columns, tower)
            self._encoders[side] = Remembered(functools.partial(_unit_features, tower))
        texts = {name: value for name, value in self.inputs.items() if _is_text(name)}
        everyone = self._plain(runs["text"], texts)
        self._others = torch.cat([everyone[: self.target], everyone[self.target + 1 :]])

    @torch.no_grad()
    def _plain(self, run, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Unit features (C, D), float64, of full inputs."""
        return F.normalize(_pooled(run(**inputs)).to(torch.float64), dim=1).cpu()

    @torch.no_grad()
    def _compare(self) -> None:
        """The full sample's score against the model's own."""
        truth = float(self.model(**self._sample()).logits_per_image[0, 0])
        value, self.value = self.value, "logit"
        ours = float(self(torch.ones(1, self.n, dtype=torch.bool)))
        self.value = value
        if not abs(ours - truth) <= MODEL_TOLERANCE[self.dtype] * max(abs(truth), 1.0):
            got = f"a {type(self.model).__name__} that scores {truth:.6g} where scaled similarity is {ours:.6g}"
            raise Unsupported("model", got, "logits_per_image = exp(logit_scale) * cosine (+ logit_bias)")


def _is_text(name: str) -> bool:
    return name in TEXT_INPUTS


def _unit_features(tower: Tower, coalitions: torch.Tensor) -> torch.Tensor:
    """Unit features (C, D), float64, of coalitions (C, k)."""
    return F.normalize(tower.encode(coalitions).to(torch.float64), dim=1).cpu()


def _pooled(output: Any) -> torch.Tensor:
    """Features (C, D): some versions return them as they are, others inside an output."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
