"""A model as captum calls one, ``forward(*inputs, *further)``, whose features an engine can switch on and off.

captum sees a function of tensors and nothing else; to evaluate its coalitions on an engine, the model behind the
function has to be known, and which of its tensors are which.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.accelerate import AcceleratedModel, accelerate
from flmoe_fast.adapt.dual_game import is_dual_encoder
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import VALUES, Score
from flmoe_fast.adapt.players import Players
from flmoe_fast.adapt.reading import find_stacks
from flmoe_fast.adapt.reference_layout import AcceleratedMoE, is_reference_layout
from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.games.game import Game
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model.network import FLI2MoE, eval_mode


class ModelForward:
    """A model as a function of tensors, for any method of captum; :class:`ShapleyInteractions` runs it on an engine.

    Parameters
    ----------
    model : FLI2MoE, InteractionMoE, transformer or other nn.Module, or what :func:`flmoe_fast.accelerate` returns
        Mixtures are called with their M encoded modalities (B, T_m, H) as inputs, and with M masks (B, T_m), or none,
        as additional arguments.
    names : sequence of str, optional
        Of any other model: the keywords of its inputs and then of the additional arguments, as in
        ``("input_ids", "pixel_values", "attention_mask")``; the leading parameters of its ``forward`` by default.
    value : "logit" or "prob"
        What is explained of every class; ``target`` chooses the class.
    """

    def __init__(self, model: Any, names: Sequence[str] | None = None, *, value: str = "logit"):
        self.value: str = one_of("value", value, VALUES)
        if not isinstance(model, (AcceleratedMoE, AcceleratedModel)):
            model = accelerate(model)
        self.accelerated = model
        self.names = () if names is None else tuple(names)
        if isinstance(model, AcceleratedMoE):
            if names is not None:
                raise ArgumentError("names", names, "None: a mixture takes its modalities and masks in their order")
            self._independent = model.model.config.task == "multilabel"
            if value == "prob" and model.model.config.task == "regression":
                raise ArgumentError("value", "'prob' of a regression model", "'logit', which is its output")
            return
        if is_dual_encoder(model.model) and value == "prob":
            raise ArgumentError("value", "'prob' of a dual encoder", "'logit', the scaled similarity")
        self._score = Score(model.model, None, value, None)
        self._independent = self._score.independent
        if names is None:
            kinds = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.POSITIONAL_ONLY)
            parameters = inspect.signature(model.model.forward).parameters.values()
            self.names = tuple(parameter.name for parameter in parameters if parameter.kind in kinds)

    def __call__(self, *tensors: Any) -> torch.Tensor:
        """Logits or probabilities (B, K) of a batch, by the model itself in eval mode; (B,) of a dual encoder.

        Models that draw random numbers even in evaluation, as some do to shuffle patches, draw the same ones each time.
        """
        model = self.accelerated.model
        parameter = next(model.parameters())
        devices = [parameter.device] if parameter.device.type == "cuda" else []
        with eval_mode(model), torch.random.fork_rng(devices):
            torch.manual_seed(0)
            if isinstance(self.accelerated, AcceleratedMoE):
                return self._values(model(*self._modalities(tensors)).logits)
            numbers = self._score.read(model(**self._named(tensors)))
        return numbers[:, 0] if is_dual_encoder(model) else self._values(numbers)

    def game(
        self,
        inputs: Sequence[torch.Tensor],
        baselines: Sequence[torch.Tensor],
        features: Sequence[torch.Tensor],
        count: int,
        further: Sequence[Any] = (),
        target: int | None = None,
    ) -> FeatureCoalitions:
        """The features of one example as players on the model's engine.

        Parameters
        ----------
        inputs, baselines : tensors (1, ...)
            Baselines broadcast to their inputs.
        features : integer tensors (1, ...)
            The feature that every element belongs to, broadcasting to the inputs.
        count : int
            How many features there are.
        further : sequence
            Additional arguments, with a batch axis of 1.
        target : int, optional
            The class that will be asked for: corners of a grid then share their work.

        Raises
        ------
        Unsupported, ArgumentError
            The engine cannot take it; the message says why.
        """
        inputs = [tensor.detach() for tensor in inputs]
        blank = [torch.as_tensor(base).to(tensor).expand_as(tensor) for base, tensor in zip(baselines, inputs)]
        if isinstance(self.accelerated, AcceleratedMoE):
            return self._mixture(inputs, blank, features, count, further, target)
        given = self._named([*inputs, *further])
        parts, owner = [], []
        for name, base, feature in zip(self.names, blank, features):
            numbers, local = _trimmed(feature)[0].unique(return_inverse=True)
            players = tuple(f"{name} {number}" for number in numbers.tolist())
            parts.append(Players(name, name, players, ((),) * len(players), local.cpu(), base[0]))
            owner.append(numbers.cpu())
        if sum(part.n for part in parts) < 2:
            raise Unsupported("feature_mask", "a single feature", "at least two")
        given = {name: value for name, value in given.items() if value is not None}
        options = {} if is_dual_encoder(self.accelerated.model) else {"value": self._score.read}
        game = self.accelerated.game(given, parts, path="engine", **options)
        return FeatureCoalitions(game, torch.cat(owner), count, self._values)

    def _mixture(self, inputs, blank, features, count: int, further, target: int | None) -> FeatureCoalitions:
        model = self.accelerated.model
        tokens, masks = self._modalities([*inputs, *further])
        owner, players = [], []
        for m, (feature, tensor) in enumerate(zip(features, inputs)):
            whole = feature.expand_as(tensor)[0]  # (T, H)
            if not bool((whole == whole[:, :1]).all()):
                raise Unsupported("feature_mask", f"features of modality {m} that divide a token", "whole tokens")
            valid = torch.ones(len(whole), dtype=torch.bool) if masks is None else masks[m][0].bool().cpu()
            players.append(valid.nonzero()[:, 0].tolist())  # what padding holds changes nothing
            owner.append(whole[:, 0].cpu()[valid])
        game = TokenGame(
            model, tokens, masks=masks, fill=[base[0] for base in blank], players=players, value=self.value,
            target=target or 0, heads=("mixture",),
        )  # fmt: skip
        return FeatureCoalitions(game, torch.cat(owner), count, self._values, target)

    def _modalities(self, tensors: Sequence[Any]) -> tuple[list[torch.Tensor], list[torch.Tensor] | None]:
        """Features and masks of a mixture."""
        count = len(self.accelerated.model.config.modalities)
        features, masks = list(tensors[:count]), [mask for mask in tensors[count:] if mask is not None]
        if len(features) != count or len(masks) not in (0, count):
            got = f"{len(tensors)} tensors"
            raise ArgumentError("inputs", got, f"{count} modalities, and {count} masks as additional arguments or none")
        return features, masks or None

    def _named(self, tensors: Sequence[Any]) -> dict[str, Any]:
        if len(tensors) > len(self.names):
            raise ArgumentError("names", f"{self.names} for {len(tensors)} tensors", "a keyword for each")
        return dict(zip(self.names, tensors))

    def _values(self, logits: torch.Tensor) -> torch.Tensor:
        """Values (C, K) of logits (C, K)."""
        if self.value == "logit":
            return logits
        return logits.sigmoid() if self._independent or logits.shape[1] == 1 else logits.softmax(1)


class FeatureCoalitions(Game):
    """Features of captum as the players of a game whose own players are tokens or pixels.

    Attributes
    ----------
    owner : LongTensor (n of the inner game,)
        The feature that each of the inner game's players belongs to.
    target : int or None
        The inner game's class, where its own values are those of one class.
    """

    def __init__(self, game: Game, owner: torch.Tensor, n: int, values: Callable, target: int | None = None):
        self.inner, self.owner, self.n, self._values, self.target = game, owner, n, values, target
        self.backend, self.more_exact, self.block = game.backend, game.more_exact, game.block
        self.player_names = tuple(f"feature {player}" for player in range(n))

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Values (C, K), or (C,), float64, of coalitions (C, n)."""
        rows = coalitions.bool().cpu()[:, self.owner]
        values, logits = self.inner.outputs(rows)
        if logits is None and values.dim() == 1:
            return values
        return self._values((values if logits is None else logits).double())

    def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        """Values (K, G) of the target, where there is one, with the inner game's sharing among corners."""
        if self.target is None:
            return super().corner_values(contexts, toggled)
        return self.inner.corner_values(contexts[:, self.owner], toggled[:, self.owner])[..., 0]

    def precise(self) -> FeatureCoalitions | None:
        precise = self.inner.precise()
        if precise is None:
            return None
        return FeatureCoalitions(precise, self.owner, self.n, self._values, self.target)

    def about(self) -> dict[str, Any]:
        return self.inner.about()


def _trimmed(feature: torch.Tensor) -> torch.Tensor:
    """A feature mask without the axes it is constant along because it broadcasts there; the batch axis stays."""
    while feature.dim() > 2 and feature.shape[1] == 1:
        feature = feature[:, 0]
    return feature


def is_model(forward: Any) -> bool:
    """Whether a forward function is a model that only :class:`ModelForward` can call with captum's arguments."""
    if isinstance(forward, (AcceleratedMoE, AcceleratedModel, FLI2MoE)):
        return True
    if not isinstance(forward, nn.Module):
        return False
    return is_reference_layout(forward.state_dict()) or hasattr(getattr(forward, "config", None), "to_dict")


def has_stack(forward: Any) -> bool:
    """Whether a forward function is any other module with encoder layers that an engine can run."""
    if not isinstance(forward, nn.Module):
        return False
    try:
        return bool(find_stacks(forward))
    except Unsupported:
        return False
