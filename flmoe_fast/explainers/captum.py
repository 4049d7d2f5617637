"""captum: a drop-in for ``ShapleyValueSampling`` that evaluates no coalition twice, and pairs, which captum has not.

Needs the extra ``captum``. Written against 0.9.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from tqdm.auto import tqdm

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.coalitions import pack, unpack
from flmoe_fast.environment import require
from flmoe_fast.explainers.model_forward import FeatureCoalitions, ModelForward, has_stack, is_model
from flmoe_fast.games.game import Game
from flmoe_fast.probes.interactions import interactions
from flmoe_fast.probes.result import InteractionResult

captum: Any = require("captum.attr", "captum")
common: Any = require("captum._utils.common", "captum")
attributions: Any = require("captum.attr._utils.common", "captum")


class FeatureGame(Game):
    """The features of one or several examples as players: absent ones take their baselines.

    Attributes
    ----------
    examples : int
        Heads are the outputs of all examples, example-major.
    engines : list of FeatureCoalitions, one an example
        What evaluates the coalitions; empty where the forward function does, ``rows`` coalitions at a time.
    """

    backend = "captum"

    def __init__(
        self,
        forward_func: Callable,
        inputs: tuple[torch.Tensor, ...],
        baselines: tuple[Any, ...],
        masks: tuple[torch.Tensor, ...],
        target: Any,
        additional_forward_args: Any,
        rows: int,
    ):
        self.forward_func, self.inputs, self.target, self.rows = forward_func, inputs, target, rows
        self.baselines = attributions._tensorize_baseline(inputs, baselines)
        self.masks = masks
        self.additional = additional_forward_args
        self.examples = inputs[0].shape[0]
        self.n = int(max(int(mask.max()) for mask in masks)) + 1
        self.block = 64 * rows
        self.player_names = tuple(f"feature {p}" for p in range(self.n))
        self.engines: list[FeatureCoalitions] = []

    def run_on(self, model: ModelForward, target: int | None) -> None:
        """Evaluate on the model's engine from now on; ArgumentError where it cannot be."""
        engines = []
        for b in range(self.examples):
            inputs, baselines, masks, further = (
                [part[b : b + 1] if _an_example_a_row(part, self.examples) else part for part in parts]
                for parts in (self.inputs, self.baselines, self.masks, self.additional or ())
            )
            engines.append(model.game(inputs, baselines, masks, self.n, further, target))
        self.engines, self.rows, self.block = engines, engines[0].block, engines[0].block
        self.backend, self.more_exact = engines[0].backend, engines[0].more_exact

    def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        """Values (K, G) or (K, G, O); an engine that is asked for one class shares work among corners."""
        if len(self.engines) == 1 and self.engines[0].target is not None:
            return self.engines[0].corner_values(contexts, toggled)
        return super().corner_values(contexts, toggled)

    def precise(self) -> FeatureGame | None:
        """The same game on the engines of float64; None where the forward function evaluates."""
        engines = [twin for twin in (engine.precise() for engine in self.engines) if twin is not None]
        if not engines or len(engines) < len(self.engines):
            return None
        twin = copy.copy(self)
        twin.engines = engines
        return twin

    def about(self) -> dict[str, Any]:
        return self.engines[0].about() if len(self.engines) == 1 else {}

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Values (C,) or (C, O) float64 of coalitions (C, n)."""
        values = torch.cat([self.forward(rows).double().cpu().flatten(1) for rows in coalitions.split(self.rows)])
        if values.shape[1] == 1:
            return values[:, 0]
        self.heads = tuple(f"output {o}" for o in range(values.shape[1]))
        return values

    @torch.no_grad()
    def forward(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Output of the forward function, (C, B, *shape of an example's output), for coalitions (C, n)."""
        count = len(coalitions)
        if self.engines:
            output = torch.stack([engine(coalitions) for engine in self.engines], 1).flatten(0, 1)
            target = _expanded(common._expand_target, self.target, count)
            target = target.cpu() if isinstance(target, torch.Tensor) else target  # where engines leave their values
            return common._select_targets(output, target).unflatten(0, (count, self.examples))
        mixed = []
        for tensor, baseline, mask in zip(self.inputs, self.baselines, self.masks):
            present = coalitions.to(tensor.device)[:, mask]  # (C, 1 or B, ...)
            mixed.append(torch.where(present, tensor, baseline).flatten(0, 1))  # captum's order: examples innermost
        output = common._run_forward(
            self.forward_func,
            tuple(mixed),
            _expanded(common._expand_target, self.target, count),
            _expanded(common._expand_additional_forward_args, self.additional, count),
        )
        if not isinstance(output, torch.Tensor) or output.dim() == 0 or output.shape[0] != count * self.examples:
            shape = tuple(output.shape) if isinstance(output, torch.Tensor) else type(output).__name__
            raise ArgumentError("forward_func", f"an output {shape}", f"{count * self.examples} rows, one an example")
        return output.unflatten(0, (count, self.examples))


class ShapleyInteractions(captum.ShapleyValueSampling):
    """``attribute`` as in captum's ``ShapleyValueSampling``, and :meth:`interactions` of pairs of features.

    With the same torch seed, ``attribute`` walks the same permutations and returns the same numbers to rounding. It
    evaluates every distinct coalition once, and fills every forward pass up to ``perturbations_per_eval``, across the
    ends of permutations.

    Given a model instead of a function, it evaluates on the engine that can run it: a mixture, an ``InteractionMoE``, a
    transformer, what :func:`flmoe_fast.accelerate` returns, or any of these in a :class:`ModelForward`, which says how
    to call it. The engine is checked against the model and bounds its memory by itself, so ``perturbations_per_eval``
    has no effect then. Where features divide the tokens of a mixture, or the engine cannot run the model, the model
    itself is called in batches, with a warning that says why.

    Attributes
    ----------
    path : str
        What evaluated the coalitions of the last call.
    """

    def __init__(self, forward_func: Any):
        wrapped = forward_func if isinstance(forward_func, ModelForward) else None
        if is_model(forward_func):
            forward_func = wrapped = ModelForward(forward_func)
        self._warns = wrapped is not None
        if wrapped is None and has_stack(forward_func):
            wrapped = ModelForward(forward_func)
        self._model, self.path = wrapped, ""
        super().__init__(forward_func)

    def attribute(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        n_samples: int = 25,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
    ) -> Any:
        """Shapley values by permutation sampling, shaped like the inputs; arguments and results are captum's.

        A forward function that returns one number for a whole batch is left to captum's own implementation.
        """
        game, is_tuple = self._game(
            inputs, baselines, target, additional_forward_args, feature_mask, perturbations_per_eval
        )
        try:
            shape = game.forward(torch.zeros(1, game.n, dtype=torch.bool)).shape[2:]
        except ArgumentError:
            return super().attribute(
                inputs, baselines, target, additional_forward_args, feature_mask, n_samples, perturbations_per_eval,
                show_progress,
            )  # fmt: skip
        orders = torch.tensor(list(self.permutation_generator(game.n, integer("n_samples", n_samples, least=1))))
        rank = orders.argsort(1)  # where each feature comes in
        prefixes = (rank[:, None] < torch.arange(game.n + 1)[:, None]).flatten(0, 1)  # (samples * (n + 1), n)
        words, number = pack(prefixes).unique(dim=0, return_inverse=True)
        distinct = unpack(words, game.n)
        with tqdm(total=len(distinct), disable=not show_progress, desc=f"{self.get_name()} attribution") as bar:
            values = []
            for rows in distinct.split(game.rows):
                values.append(game.forward(rows).double())
                bar.update(len(rows))
        value = torch.cat(values)[number.to(values[0].device)].unflatten(0, (len(orders), game.n + 1))
        gain = value.diff(dim=1)  # (samples, n, B, ...): what the k-th feature of each permutation adds
        index = orders.view(*orders.shape, *([1] * (gain.dim() - 2))).expand(gain.shape).to(gain.device)
        mean = torch.zeros(gain.shape[1:], dtype=torch.float64, device=gain.device)
        for sample, where in zip(gain, index):
            mean.scatter_add_(0, where, sample)
        mean /= len(orders)
        spread = [self._spread(mean, mask, tensor, shape) for mask, tensor in zip(game.masks, game.inputs)]
        return common._format_output(is_tuple, tuple(spread))

    def interactions(
        self,
        inputs: Any,
        baselines: Any = None,
        target: Any = None,
        additional_forward_args: Any = None,
        feature_mask: Any = None,
        perturbations_per_eval: int = 1,
        show_progress: bool = False,
        **options: Any,
    ) -> InteractionResult | list[InteractionResult]:
        """SII and redundancy gap of pairs of features; players are the ids of ``feature_mask``.

        ``options`` are those of :func:`flmoe_fast.interactions`: ``pairs``, ``rows`` and ``cols``, ``contexts`` or
        ``budget``, ``method``, ``seed``, ``gap``, ``also``. A batch of several examples gives a list of results; their
        values come from the same forward passes as far as ``perturbations_per_eval`` allows.
        """
        tensors = inputs if isinstance(inputs, tuple) else (inputs,)
        found = []
        for b in range(tensors[0].shape[0]):

            def one(value: Any, b: int = b) -> Any:
                if isinstance(value, tuple):
                    return tuple(one(part, b) for part in value)
                if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == tensors[0].shape[0]:
                    return value[b : b + 1]
                return value

            chosen = [target[b]] if isinstance(target, list) else one(target)
            game, _ = self._game(
                one(inputs), one(baselines), chosen, one(additional_forward_args), one(feature_mask),
                perturbations_per_eval,
            )  # fmt: skip
            found.append(interactions(game, progress=show_progress, **options))
        return found[0] if len(found) == 1 else found

    def _game(self, inputs, baselines, target, additional, feature_mask, rows) -> tuple[FeatureGame, bool]:
        rows = integer("perturbations_per_eval", rows, least=1)
        is_tuple = isinstance(inputs, tuple)
        tensors, baselines = attributions._format_input_baseline(inputs, baselines)
        masks = common._format_feature_mask(feature_mask, tensors)
        shaped = tuple(
            mask.reshape((1,) * (tensor.dim() - mask.dim()) + tuple(mask.shape)).to(tensor.device).long()
            for mask, tensor in zip(masks, tensors)
        )
        additional = common._format_additional_forward_args(additional)
        game = FeatureGame(self.forward_func, tensors, baselines, shaped, target, additional, rows)
        self.path = "forward function in batches"
        if self._model is not None:
            try:
                game.run_on(self._model, _one_class(target) if game.examples == 1 else None)
                self.path = f"engine: {game.backend}"
            except ArgumentError as problem:
                self.path += f", because {problem}"
                if self._warns:
                    warnings.warn(f"slow path: the model runs for every coalition, because {problem}", stacklevel=3)
        return game, is_tuple

    @staticmethod
    def _spread(mean: torch.Tensor, mask: torch.Tensor, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """Values (n, B, *shape) to every element of a feature: (B, *shape, *tensor.shape[1:]), captum's layout."""
        example = torch.arange(tensor.shape[0], device=tensor.device)
        example = example.view(-1, *([1] * (tensor.dim() - 1)))
        values = mean.reshape(*mean.shape[:2], -1).to(tensor.device)[mask.expand_as(tensor), example]  # (B, ..., R)
        return values.movedim(-1, 1).reshape(tensor.shape[0], *shape, *tensor.shape[1:]).float()


def _an_example_a_row(part: Any, examples: int) -> bool:
    return isinstance(part, torch.Tensor) and part.dim() > 0 and part.shape[0] == examples


def _one_class(target: Any) -> int | None:
    """The class that a target names for a single example, if it is one."""
    if isinstance(target, torch.Tensor) and target.numel() == 1:
        target = target.item()
    if isinstance(target, list) and len(target) == 1:
        target = target[0]
    return target if isinstance(target, int) else None


def _expanded(expand: Callable, value: Any, count: int) -> Any:
    """captum's own expansion of targets and further arguments to ``count`` perturbations."""
    if value is None:
        return None
    return expand(value, count, expansion_type=common.ExpansionTypes.repeat)
