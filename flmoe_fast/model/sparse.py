"""Sparse feed-forward blocks, written out plainly: a gate sends every token to a few of X small networks.

A block sees the tokens of one modality at a time. Everything it decides together (which tokens find room, how evenly
they spread) it decides over those tokens, N = B T of them, padding included. A batch may hold several passes of the
training forward, one after another; then every pass is routed as if it were alone.

Symbols: P passes, N tokens of a pass, H hidden width, F feed-forward width, X networks, k slots of a token.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flmoe_fast.model.config import FLI2MoEConfig

#: Room of a capacity-limited gate, as a multiple of what an even spread needs (switch) or of N (gshard).
TRAIN_CAPACITY, EVAL_CAPACITY = 1.2, 2.4
#: Half width of the uniform noise on a switch gate's logits in training.
SWITCH_NOISE = 0.1


class Routing(NamedTuple):
    """Where tokens go.

    Attributes
    ----------
    chosen : Tensor
        (P, N, k) int64, the network of every slot, or -1 where the slot was dropped.
    scores : Tensor
        (P, N, k), what each network's output is multiplied by. Not rescaled where slots are dropped.
    balance : Tensor
        (P,), the load-balancing loss of every pass.
    """

    chosen: Tensor
    scores: Tensor
    balance: Tensor


def largest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` largest values along the last axis, in falling order, and their indices; ties to the lower index.

    (``torch.topk`` promises no order among equal values.)
    """
    ordered, index = values.sort(dim=-1, descending=True, stable=True)
    return ordered[..., :count], index[..., :count]


def slots_per_network(gate: str, tokens: int, networks: int, training: bool) -> int:
    """Slots that each network of a capacity-limited gate may fill from ``tokens`` tokens of one pass and modality."""
    factor = TRAIN_CAPACITY if training else EVAL_CAPACITY
    if gate == "gshard":  # both slots of a token count
        return math.ceil(factor * tokens) * 2 // networks
    return math.ceil(factor * tokens / networks)


def first_come(chosen: Tensor, networks: int, room: int) -> Tensor:
    """Drop all but the first ``room`` slots of every network: (P, N, k) -> (P, N, k) with -1 for dropped slots.

    The published kernels let threads race for the slots; here they are given out in the order token, then slot.
    """
    queue = chosen.flatten(1)
    place = functional.one_hot(queue, networks).cumsum(dim=1).gather(2, queue[:, :, None])[:, :, 0]
    return queue.masked_fill(place > room, -1).reshape(chosen.shape)


def _sizes(config: FLI2MoEConfig) -> tuple[int, int]:
    """Networks of a sparse block, and how many of them a token uses: a configuration that has such blocks has both."""
    assert config.ffn_experts is not None and config.top_k is not None
    return config.ffn_experts, config.top_k


class LinearGate(nn.Module):
    """Gates whose logits are one linear layer of the token: ``"naive"``, ``"gshard"`` and ``"switch"``."""

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.kind, (self.networks, self.slots) = str(config.gate), _sizes(config)
        self.limited, self.random = config.slots_limit, config.random_routing
        self.gate = nn.Linear(config.hidden, self.networks)

    def forward(self, tokens: Tensor) -> Routing:
        """(P, N, H) -> :class:`Routing`."""
        logits = self.gate(tokens)
        return self._switch(logits) if self.kind == "switch" else self._largest_logits(logits)

    def _largest_logits(self, logits: Tensor) -> Routing:
        values, chosen = largest(logits, self.slots)
        scores = values.softmax(dim=-1)
        balance = logits.new_zeros(len(logits))
        if self.kind == "gshard":
            first = functional.one_hot(chosen[..., 0], self.networks).to(logits.dtype).mean(dim=1)  # (P, X)
            mean = logits.softmax(dim=-1).mean(dim=1)
            balance = (first * mean).mean(dim=-1) * self.networks**2
            chosen = self._limit(chosen)
            if self.random and self.training:
                unlucky = 2 * scores[..., 1] < torch.rand_like(scores[..., 1])
                chosen = torch.stack((chosen[..., 0], chosen[..., 1].masked_fill(unlucky, -1)), dim=-1)
        return Routing(chosen, scores, balance)

    def _switch(self, logits: Tensor) -> Routing:
        if self.training:
            logits = logits + 1.0 + SWITCH_NOISE * (2 * torch.rand_like(logits) - 1)
        wide = torch.promote_types(logits.dtype, torch.float32)
        probabilities = logits.softmax(dim=-1, dtype=wide)
        scores, chosen = largest(probabilities, 1)
        chosen = self._limit(chosen)
        kept = chosen[..., None] == torch.arange(self.networks, device=chosen.device)
        kept = kept.sum(dim=(1, 2)).to(wide)  # (P, X)
        total = kept.sum(dim=-1, keepdim=True)
        balance = self.networks * (kept / total * probabilities.sum(dim=1) / total).sum(dim=-1)
        return Routing(chosen, scores.to(logits.dtype), balance.to(logits.dtype))

    def _limit(self, chosen: Tensor) -> Tensor:
        if not self.limited:
            return chosen
        room = slots_per_network(self.kind, chosen.shape[1], self.networks, self.training)
        return first_come(chosen, self.networks, room)


class NoisyGate(nn.Module):
    """Noisy top-k gate: logits without bias, in training with normal noise of a learned size."""

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.networks, self.slots = _sizes(config)
        self.w_gate = nn.Parameter(torch.empty(config.hidden, self.networks))
        self.w_noise = nn.Parameter(torch.empty(config.hidden, self.networks))
        for weight in (self.w_gate, self.w_noise):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))

    def forward(self, tokens: Tensor) -> Routing:
        """(P, N, H) -> :class:`Routing`."""
        clean = tokens @ self.w_gate
        logits, spread = clean, None
        if self.training:
            spread = functional.softplus(tokens @ self.w_noise) + 0.01
            logits = clean + spread * torch.randn_like(clean)
        top, order = largest(logits, self.networks)
        chosen = order[..., : self.slots]
        scores = top[..., : self.slots].softmax(dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, scores)  # (P, N, X)
        if spread is not None and self.slots < self.networks:
            load = self._chance(clean, logits, spread, top).sum(dim=1)
        else:
            load = (gates > 0).sum(dim=1).to(logits.dtype)
        return Routing(chosen, scores, _unevenness(gates.sum(dim=1)) + _unevenness(load))

    def _chance(self, clean: Tensor, noisy: Tensor, spread: Tensor, top: Tensor) -> Tensor:
        """Probability (P, N, X) that each network is among the k largest when its own noise is drawn again."""
        if_in, if_out = top[..., self.slots : self.slots + 1], top[..., self.slots - 1 : self.slots]
        threshold = torch.where(noisy > if_in, if_in, if_out)
        return torch.special.ndtr((clean - threshold) / spread)


def _unevenness(load: Tensor) -> Tensor:
    """Squared coefficient of variation of (P, X) over X."""
    return load.var(dim=-1) / (load.mean(dim=-1) ** 2 + 1e-10)


class StackedLinear(nn.Module):
    """X linear layers in one pair of parameters."""

    def __init__(self, count: int, before: int, after: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, after, before))
        self.bias = nn.Parameter(torch.zeros(count, after))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x: Tensor, index: int) -> Tensor:
        """(N, before) -> (N, after) by the layer ``index``."""
        return functional.linear(x, self.weight[index], self.bias[index])


class Networks(nn.Module):
    """X feed-forward networks H -> F -> H with exact GELU."""

    def __init__(self, count: int, hidden: int, wide: int):
        super().__init__()
        self.htoh4 = StackedLinear(count, hidden, wide)
        self.h4toh = StackedLinear(count, wide, hidden)

    def forward(self, x: Tensor, index: int) -> Tensor:
        """(N, H) -> (N, H) by the network ``index``."""
        return self.h4toh(functional.gelu(self.htoh4(x, index)), index)


class SparseMLP(nn.Module):
    """A gate and its networks: ``out_n = sum over slots j of score_nj * network_chosen_nj(x_n)``.

    Dropped slots contribute nothing. Names of parameters are those of the published checkpoints, which list the gate
    twice (``gate`` and ``all_gates.0``).
    """

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.gate = NoisyGate(config) if config.gate == "noisy" else LinearGate(config)
        self.networks, _ = _sizes(config)
        self.experts = Networks(self.networks, config.hidden, config.ffn_multiple * config.hidden)
        self.all_gates = nn.ModuleDict({"0": self.gate})
        self.adds_losses = config.gate == "noisy"

    def forward(self, x: Tensor, passes: int = 1) -> tuple[Tensor, Tensor]:
        """(P B, T, H), tokens of one modality -> the same shape, and the balancing losses (P,)."""
        tokens = x.reshape(passes, -1, x.shape[-1])
        routing = self.gate(tokens)
        rows, chosen, scores = tokens.flatten(0, 1), routing.chosen.flatten(0, 1), routing.scores.flatten(0, 1)
        out = torch.zeros_like(rows)
        for network in range(self.networks):
            token, slot = (chosen == network).nonzero(as_tuple=True)
            served = scores[token, slot][:, None] * self.experts(rows[token], network)
            out = out.index_add(0, token, served.to(out.dtype))  # under autocast products come in half precision
        return out.reshape(x.shape), routing.balance
