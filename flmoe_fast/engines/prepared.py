"""What engines compute of a model once, and of a sample once: everything about a coalition that no coalition changes.

A :class:`PreparedModel` is kept with its model, in float64 on the CPU, together with what every engine has laid out of
it: a second sample of the model folds, casts and packs nothing. It is dropped when the model's weights have changed,
see :func:`prepared`. A :class:`PreparedSample` is made for every sample.
"""

from __future__ import annotations

import dataclasses
import functools
import threading
import weakref

import torch
from torch import nn

from flmoe_fast.engines.fold import Weights, fold
from flmoe_fast.engines.problem import TokenProblem
from flmoe_fast.engines.stack import PreparedStack
from flmoe_fast.model.network import FLI2MoE, sinusoid
from flmoe_fast.model.sparse import slots_per_network


class PreparedModel(PreparedStack):
    """A model's experts as stacks, its heads and its routing; everything float64 on the CPU.

    Attributes
    ----------
    stack : Stack
        The E experts side by side.
    head : Tensor (E, M, H, K)
        The classifier on the mean of every modality's final states.
    head_bias : Tensor (E, K)
    routing : tuple of (weight (in, out), bias (out,))
        Linear layers of the routing network.
    temperature : float
    """

    def __init__(self, model: FLI2MoE):
        config, weights = model.config, Weights(model)
        super().__init__(fold(weights))
        name = "classification_head.fc" if config.fusion == "moepp" else f"network.{config.layers}.fc"
        head, self.head_bias = weights.pair(name)
        self.head = head.mT.unflatten(1, (len(config.modalities), -1)).contiguous()
        linears = range(0, 3 * config.reweight_layers, 3)
        names = [f"reweight.mlp.network.{i}" for i in linears]
        # Everything else is stacked, and thereby a copy; these may be the model's own parameters.
        self.routing = tuple(
            (weights.state[f"{name}.weight"].T.clone(), weights.state[f"{name}.bias"].clone()) for name in names
        )
        self.temperature = float(config.temperature)
        self._learned = weights("pos_embed")[:, 0] if config.generation == "original" else None

    def positions(self, length: int) -> torch.Tensor:
        """What is added to each of ``length`` positions: (1, length, H), or learned per expert (E, length, H)."""
        if self._learned is not None:
            return self._learned
        width = self.stack.width
        return self.kept(("positions", length), lambda: sinusoid(length, width, dtype=torch.float64)[None])

    @functools.cached_property
    def wide_head(self) -> torch.Tensor:
        """The classifier behind the last layer's down-projections (E, M, X, F, K); X = 1 where that block is dense."""
        last = self.stack.layers[-1]
        down = last.down if last.networks is None else last.networks.down
        return torch.einsum("exfh,emhk->emxfk", down.unflatten(0, (len(self.head), -1)), self.head)

    @functools.cached_property
    def shift_head(self) -> torch.Tensor:
        """The classifier on the biases of the last layer's down-projections (E, M, X, K)."""
        last = self.stack.layers[-1]
        shift = last.down_bias if last.networks is None else last.networks.down_bias
        return torch.einsum("exh,emhk->emxk", shift[:, 0].unflatten(0, (len(self.head), -1)), self.head)


class PreparedSample:
    """One sample of a prepared model; everything float64 on the CPU.

    Attributes
    ----------
    model : PreparedModel
    problem : TokenProblem
    shares : Tensor (M,)
        One over each modality's number of valid tokens, zero where it has none.
    tokens : Tensor (1 or E, 2, L, H)
        Both states of every valid token as they enter the first layer; state 1 is the token itself, state 0 its fill.
    absent : Tensor (M, H)
        Mean features of every modality with all players absent, for the routing.
    step : Tensor (L, H)
        What the presence of each token adds to its modality's mean; zero for a token that is no player.
    room : tuple of M ints, or None
        How many slots of a modality each network of a sparse block takes; None: any number.
    """

    def __init__(self, problem: TokenProblem):
        self.problem = problem
        self.model = prepared(problem.model)
        config = problem.model.config
        counts = torch.tensor([stop - start for start, stop in problem.segments])
        self.shares = torch.where(counts > 0, 1 / counts.double().clamp(min=1), 0.0)
        self.room: tuple[int, ...] | None = None
        if config.gate is not None and config.slots_limit:
            gate, networks = config.gate, self.model.stack.networks
            self.room = tuple(slots_per_network(gate, t, networks, False) for t in problem.padded_lengths)

    # Not before somebody evaluates: a game is made in a few milliseconds.

    @functools.cached_property
    def tokens(self) -> torch.Tensor:
        """Both states of every token (1 or E, 2, L, H)."""
        problem = self.problem
        positions = self.model.positions(sum(problem.padded_lengths))[:, None, problem.valid]
        return torch.stack([problem.fills[problem.valid], problem.features[problem.valid]]) + positions

    @functools.cached_property
    def absent(self) -> torch.Tensor:
        """Mean features (M, H) with all players absent."""
        means = [part.sum(0) for part in self._without.split([stop - start for start, stop in self.problem.segments])]
        return torch.stack(means) * self.shares[:, None]

    @functools.cached_property
    def step(self) -> torch.Tensor:
        """What each token's presence adds to a mean (L, H)."""
        counts = torch.tensor([stop - start for start, stop in self.problem.segments])
        features = self.problem.features[self.problem.valid]
        return (features - self._without) * self.shares.repeat_interleave(counts)[:, None]

    @property
    def _without(self) -> torch.Tensor:
        """Features (L, H) with all players absent."""
        problem = self.problem
        without = problem.features[problem.valid]
        without[problem.players] = problem.fills[problem.valid][problem.players]
        return without

    @property
    def stream_head(self) -> torch.Tensor:
        """The classifier on sums of final streams over each modality's tokens (E, M, H, K)."""
        return self.model.head * self.shares[:, None, None]

    @property
    def wide_head(self) -> torch.Tensor:
        """The classifier on sums of the last hidden activations over each modality's tokens (E, M, X, F, K)."""
        return self.model.wide_head * self.shares[:, None, None, None]

    @property
    def score_head(self) -> torch.Tensor:
        """The classifier on sums of scores over each modality's tokens (E, M, X, K), of a sparse last block."""
        return self.model.shift_head * self.shares[:, None, None]

    @property
    def head_bias(self) -> torch.Tensor:
        """Logits' constants (E, K), with the last block's bias where that is dense and there is something to pool."""
        if self.model.stack.layers[-1].networks is not None:
            return self.model.head_bias
        occupied = (self.shares > 0).double()
        return self.model.head_bias + torch.einsum("emk,m->ek", self.model.shift_head[:, :, 0], occupied)


def prepared(model: FLI2MoE) -> PreparedModel:
    """The prepared model, made anew when the weights have changed since it was made.

    A change is noticed when a parameter or buffer is another tensor or lies elsewhere (``to``, assignment), was written
    in place (its version: optimizers, ``load_state_dict``, ``copy_``), or has another sum (writes through ``.data`` and
    NumPy, which count no version), and when the configuration is another. Values exchanged within one tensor through
    ``.data`` alone are not noticed; :func:`forget` drops what is kept.
    """
    mark = _mark(model)
    with _lock:
        found = _prepared.get(model)
        if found is None or found[0] != mark:
            found = _prepared[model] = (mark, PreparedModel(model))
        return found[1]


def prepared_sample(problem: TokenProblem) -> PreparedSample:
    """The prepared sample of a problem, one for all engines that hold it: an engine is checked on its own weights."""
    found = _samples.get(id(problem))  # the sample holds its problem, so nothing else has this number
    if found is None:
        found = _samples[id(problem)] = PreparedSample(problem)
    return found


def forget(model: FLI2MoE) -> None:
    """Drop what was prepared of a model. Engines and games that exist keep what they have."""
    with _lock:
        _prepared.pop(model, None)


@torch.no_grad()
def _mark(model: FLI2MoE) -> tuple:
    """What is compared to see whether a model is still the one that was prepared."""
    tensors: list[torch.Tensor] = []
    modules: list[nn.Module | None] = [model]
    while modules:  # a fifth of the time that model.modules() takes, which every game would pay
        module = modules.pop()
        if module is not None:
            modules += module._modules.values()
            held = (*module._parameters.values(), *module._buffers.values())
            tensors += [tensor for tensor in held if tensor is not None]
    places = tuple((t.data_ptr(), 0 if t.is_inference() else t._version) for t in tensors)
    kinds: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in tensors:
        kinds.setdefault(tensor.dtype, []).append(tensor.sum())
    sums = tuple(total for same in kinds.values() for total in torch.stack(same).tolist())
    # The capacity is a sample's matter: it is not folded into anything.
    return dataclasses.replace(model.config, capacity="none"), places, sums


_prepared: weakref.WeakKeyDictionary[FLI2MoE, tuple[tuple, PreparedModel]] = weakref.WeakKeyDictionary()
_samples: weakref.WeakValueDictionary[int, PreparedSample] = weakref.WeakValueDictionary()
_lock = threading.Lock()
