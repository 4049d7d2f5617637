"""The portable engine: coalitions in PyTorch, on CPU or GPU, batched, with everything shared that is exact to share.

Beside what :mod:`flmoe_fast.engines.first_layer` computes once per sample:

* Numerator and denominator of layer-1 attention are sums of one term per key. Tokens that do not vary give a constant;
  the ones that vary are selected by a 0/1 matrix, so the layer-1 attention of all coalitions is one matrix product, and
  its denominators only have positive terms: nothing cancels. (:class:`SharedAttention`)
* The last layer's down-projection is linear, so it is applied after the mean over tokens, on M rows instead of L.
* Padding is never attended to nor pooled, so it is left out and no mask remains in any attention.
* A sparse feed-forward block is as linear in its down-projections as a dense one: in the last layer they too are
  applied after pooling, once per network, modality and coalition instead of once per token.

From the layer-1 output projection on, every token of every coalition is different; that part is only batched.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from flmoe_fast.engines.engine import Request, TokenEngine
from flmoe_fast.engines.first_layer import Routing, TwoStates
from flmoe_fast.engines.prepared import PreparedModel, prepared_sample
from flmoe_fast.engines.problem import Logits, TokenProblem
from flmoe_fast.engines.scratch import Scratch
from flmoe_fast.engines.sparse_rows import Dispatch, choose, combine, dispatch, grouped_matmul, pool
from flmoe_fast.engines.stack import Layer, Networks

#: Largest number of bytes the table of per-key attention terms may take before coalitions are attended one by one.
SHARED_TABLE_BYTES = 1 << 28


@dataclass(frozen=True)
class LaidOut:
    """A prepared model in one dtype on one device."""

    layers: tuple[Layer, ...]
    head: torch.Tensor  # (E, M*H, K)
    head_bias: torch.Tensor  # (E, 1, K)

    @staticmethod
    def of(model: PreparedModel, dtype: torch.dtype, device: torch.device) -> LaidOut:
        """Every number rounded once."""

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype).contiguous()

        layers = tuple(layer.map(cast) for layer in model.stack.layers)
        return LaidOut(layers, cast(model.head.flatten(1, 2)), cast(model.head_bias[:, None]))


@dataclass(frozen=True)
class SharedAttention:
    """Layer-1 attention of every coalition that agrees with ``base`` outside the J ``varying`` tokens.

    Row 0 of ``terms`` is the sum over the tokens that do not vary, rows 1..J the terms of the varying tokens when
    absent, rows J+1..2J when present. Columns are the Q query rows, each with H numerators and h denominators.
    """

    terms: torch.Tensor  # (E, 1 + 2J, Q * (H + h))
    varying: torch.Tensor  # (J,) index into valid


class TorchEngine(TokenEngine):
    """Evaluates coalitions of one :class:`TokenProblem` in chunks of bounded memory.

    Parameters
    ----------
    problem : TokenProblem
    dtype : torch.float32 or torch.float64
        Arithmetic of the experts. Routing and everything after the logits is float64.
    device : torch.device
    memory : int
        Bytes that one chunk's activations may take. Results depend on it by rounding only: matrix products of
        different heights may add in a different order (relative 1e-5 in float32, 1e-12 in float64).

    Raises
    ------
    ArgumentError
        The problem is one that :meth:`unfit` names.
    """

    name = "torch"
    instead = "backend='auto' or 'reference'"

    def __init__(self, problem: TokenProblem, **options: Any):
        super().__init__(problem, **options)
        self.sample = prepared_sample(problem)
        self.stack = self.sample.model.stack
        self.packed = self.sample.model.kept(
            (LaidOut, self.dtype, str(self.device)), lambda: LaidOut.of(self.sample.model, self.dtype, self.device)
        )
        self.states = TwoStates.of(self.sample, self.dtype, self.device)
        self.routing = Routing.of(self.sample, self.device)
        self.players = problem.players.to(self.device)
        self._scratch = Scratch()

    @property
    def noise(self) -> dict[str, float]:
        return self.sample.model.kept("noise", dict)

    @classmethod
    def unfit(cls, request: Request) -> str:
        """InterpretCC, and limited capacity with padding before valid tokens."""
        if request.problem is None:
            return ""
        if request.problem.model.config.fusion == "interpretcc":
            return "InterpretCC has no token sequence"
        return request.problem.misplaced_padding

    # ---- public: two ways to name coalitions ------------------------------------------------------------------

    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of arbitrary coalitions ``(C, n)`` bool."""
        coalitions = coalitions.to(self.device)
        if not len(coalitions):
            classes, experts = self.packed.head.shape[2], self.packed.head.shape[0]
            nothing = torch.zeros(0, experts, classes, dtype=torch.float64, device=self.device)
            return Logits(nothing, nothing.sum(-1))
        varies = coalitions.any(0) & ~coalitions.all(0)
        base = self.problem.presence(coalitions[:1])[0]
        return self._evaluate_sharing(base, self.players[varies], coalitions)

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        """Logits and routing of ``contexts[k] ^ toggled[g]`` for all k, g, in the order (k, g).

        ``contexts`` (K, n) bool and ``toggled`` (G, n) bool. The toggled players are few, so each context's shared
        attention has a small table; it is used when one table for all contexts would be too large.
        """
        contexts, toggled = contexts.to(self.device), toggled.to(self.device)
        everything = contexts[:, None] ^ toggled  # (K, G, n)
        varies = everything.any(0).any(0) & ~everything.all(0).all(0)
        if self._table_bytes(int(varies.sum())) <= SHARED_TABLE_BYTES:
            return self.evaluate(everything.flatten(0, 1))
        few = self.players[toggled.any(0)]
        parts = [
            self._evaluate_sharing(self.problem.presence(context[None])[0], few, coalitions)
            for context, coalitions in zip(contexts, everything)
        ]
        return Logits(torch.cat([p.experts for p in parts]), torch.cat([p.weights for p in parts]))

    # ---- layer-1 attention --------------------------------------------------------------------------------------

    def _table_bytes(self, varying: int) -> int:
        experts, _, _, length, _ = self.states.q.shape
        columns = (length + varying) * (self.stack.attended + self.stack.heads)
        return experts * (1 + 2 * varying) * columns * self.states.q.element_size()

    def _shared_attention(self, base: torch.Tensor, varying: torch.Tensor) -> SharedAttention | None:
        """Terms of layer-1 attention for coalitions equal to ``base`` (L,) bool outside ``varying`` (J,).

        None where :meth:`TwoStates.weights` has none; such samples are attended one coalition at a time.
        """
        weights = self.states.weights(base, varying)
        if weights is None:
            return None
        experts, heads, rows, _ = weights.rest.shape
        depth = weights.values_rest.shape[-1]
        terms = self._buffer("terms", experts, 1 + 2 * len(varying), rows, heads * (depth + 1))
        numerators, denominators = (
            terms[..., : heads * depth].unflatten(-1, (heads, depth)),
            terms[..., heads * depth :],
        )
        numerators[:, 0] = (weights.rest @ weights.values_rest).transpose(1, 2)
        denominators[:, 0] = weights.rest.sum(-1).transpose(1, 2)
        denominators[:, 1:] = weights.vary.permute(0, 3, 2, 1)  # (E, 2J, Q, h)
        values = weights.values_vary.permute(0, 2, 1, 3)[:, :, None]  # (E, 2J, 1, h, d)
        torch.mul(denominators[:, 1:, :, :, None], values, out=numerators[:, 1:])
        return SharedAttention(terms.flatten(2), varying)

    def _attend_shared(self, shared: SharedAttention, tokens: torch.Tensor) -> torch.Tensor:
        """Layer-1 attention output (E, C, L, H) of coalitions given as token states ``tokens`` (C, L)."""
        experts, heads, _, length, depth = self.states.q.shape
        count, hidden = tokens.shape[0], heads * depth
        present = tokens[:, shared.varying]  # (C, J)
        select = torch.cat([present.new_ones(count, 1), ~present, present], dim=1).to(self.dtype)
        sums = self._buffer("sums", experts, count, shared.terms.shape[2])
        torch.bmm(select.expand(experts, -1, -1), shared.terms, out=sums)
        sums = sums.unflatten(2, (-1, hidden + heads))  # (E, C, Q, H + h)
        numerators, denominators = sums[..., :hidden].unflatten(-1, (heads, depth)), sums[..., hidden:, None]
        out = self._buffer("attended", experts, count, length, heads, depth)
        torch.div(numerators[:, :, :length], denominators[:, :, :length], out=out)
        # A varying token that is absent asks with its fill's query row.
        absent = numerators[:, :, length:] / denominators[:, :, length:]
        out[:, :, shared.varying] = torch.where(present[..., None, None], out[:, :, shared.varying], absent)
        return out.flatten(3)

    def _attend_directly(self, tokens: torch.Tensor) -> torch.Tensor:
        """Layer-1 attention output (E, C, L, H) by softmax over each coalition's own keys."""
        experts, heads, _, length, depth = self.states.q.shape
        state, token = tokens.long(), torch.arange(length, device=self.device)
        q, k, v = (  # (E*C, h, L, d)
            part[:, :, state, token].transpose(1, 2).flatten(0, 1)
            for part in (self.states.q, self.states.k, self.states.v)
        )
        out = F.scaled_dot_product_attention(q, k, v, scale=1.0)
        return out.transpose(1, 2).reshape(experts, tokens.shape[0], length, heads * depth)

    # ---- the part that differs per coalition ----------------------------------------------------------------------

    def _evaluate_sharing(self, base: torch.Tensor, varying: torch.Tensor, coalitions: torch.Tensor) -> Logits:
        shared = None
        if self._table_bytes(varying.numel()) <= SHARED_TABLE_BYTES:
            shared = self._shared_attention(base, varying)
        experts = []
        for chunk in self.problem.presence(coalitions).split(self.chunk):
            attended = self._attend_directly(chunk) if shared is None else self._attend_shared(shared, chunk)
            experts.append(self._after_first_attention(chunk, attended))
        return Logits(torch.cat(experts), self.routing.weights(coalitions))

    @property
    def chunk(self) -> int:
        """Coalitions evaluated together: as many as keep the largest live activations within ``memory`` bytes."""
        experts, hidden, wide = self.packed.layers[-1].up.shape
        per_token = 4 * hidden + max(2 * wide, 4 * hidden)
        networks = self.packed.layers[0].networks
        if networks is not None:  # every slot has its own row, hidden activations and result
            wide, choices = networks.up.shape[2], self.stack.networks
            per_token = max(per_token, 5 * hidden + self.stack.slots * (2 * hidden + wide) + 4 * choices)
        return max(1, self.memory // (experts * self.problem.length * per_token * self.states.q.element_size()))

    def _after_first_attention(self, tokens: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """Expert logits (C, E, K) in float64 from the first layer's attention output (E, C, L, H)."""
        layers = self.packed.layers
        experts, count, length, hidden = attended.shape
        stream = self._buffer("stream", experts, count, length, hidden)
        absent, present = (state[:, None] for state in self.states.residual.unbind(1))  # (E, 1, L, H)
        torch.where(tokens[:, :, None], present, absent, out=stream)
        stream = stream.flatten(1, 2)
        stream.baddbmm_(attended.reshape(experts, -1, hidden), layers[0].out)
        for layer, following in zip(layers, layers[1:]):
            self._feed_forward(stream, layer, count)
            self._attend(stream, following, count)
        return self._pool_and_classify(stream, count)

    def _feed_forward(self, stream: torch.Tensor, layer: Layer, count: int) -> None:
        """Feed-forward sub-block of any layer but the last, in place on ``stream`` (E, C L, H)."""
        if layer.networks is None:
            stream.baddbmm_(self._expand(stream, layer), layer.down)
            stream += layer.down_bias
            return
        networks = layer.networks
        sent, scores, wide = self._expand_sparse(stream, networks, count)
        rows = self._buffer("rows", len(wide), stream.shape[2])
        grouped_matmul(wide, networks.down, networks.down_bias, sent.bounds, rows)
        stream += combine(rows, sent, scores).view_as(stream)

    def _expand_sparse(
        self, stream: torch.Tensor, networks: Networks, count: int
    ) -> tuple[Dispatch, torch.Tensor, torch.Tensor]:
        """Where the tokens of ``stream`` (E, C L, H) go, scores (E, C L, k), and hidden activations (A, F)."""
        segments = self.problem.segments
        normalised = F.layer_norm(stream, stream.shape[-1:])
        logits = torch.baddbmm(networks.gate_bias, normalised, networks.gate)
        chosen, scores = choose(logits, self.stack.gate or "", self.stack.slots)
        modality = torch.repeat_interleave(
            torch.arange(len(segments), device=self.device),
            torch.tensor([stop - start for start, stop in segments], device=self.device),
        )
        block = torch.arange(count, device=self.device)[:, None] * len(segments) + modality
        room = None
        if self.sample.room is not None:
            room = torch.tensor(self.sample.room, device=self.device).repeat(count)
        sent = dispatch(chosen, self.stack.networks, block.flatten(), count * len(segments), room)
        rows = self._buffer("rows", len(sent.slot), stream.shape[2])
        torch.index_select(normalised.flatten(0, 1), 0, sent.slot // self.stack.slots, out=rows)
        wide = self._buffer("wide", len(rows), networks.up.shape[2])
        grouped_matmul(rows, networks.up, networks.up_bias, sent.bounds, wide)
        return sent, scores, torch.ops.aten.gelu_(wide)

    def _expand(self, stream: torch.Tensor, layer: Layer) -> torch.Tensor:
        """Hidden activations (E, C L, F) of the feed-forward block."""
        wide = self._buffer("wide", *stream.shape[:2], layer.up.shape[2])
        for rows, weight, out in zip(stream, layer.up, wide):
            torch.mm(F.layer_norm(rows, rows.shape[-1:]), weight, out=out)
        wide += layer.up_bias
        return torch.ops.aten.gelu_(wide)

    def _attend(self, stream: torch.Tensor, layer: Layer, count: int) -> None:
        """Attention sub-block of any later layer, in place on ``stream`` (E, C L, H)."""
        weights = layer.qkv.unflatten(2, (3, self.stack.heads, -1)).permute(2, 0, 3, 1, 4)  # (3, E, h, H, d)
        bias = layer.q_bias.unflatten(2, (self.stack.heads, -1)).transpose(1, 2)  # (E, h, 1, d)
        heads, _, depth = weights.shape[2:]
        qkv = self._buffer("qkv", 3, heads, stream.shape[1], depth)
        # One expert at a time: each head's rows then lie together, which attention reads fastest.
        for expert, rows in enumerate(stream):
            normalised = F.layer_norm(rows, rows.shape[-1:])
            for part, weight in zip(qkv, weights[:, expert]):
                torch.matmul(normalised, weight, out=part)
            qkv[0] += bias[expert]
            q, k, v = qkv.unflatten(2, (count, -1)).transpose(1, 2).unbind(0)  # (C, h, L, d)
            out = F.scaled_dot_product_attention(q, k, v, scale=1.0).transpose(1, 2).reshape(rows.shape)
            if self.stack.residual:
                rows += layer.out_bias[expert]
            else:
                rows.copy_(layer.out_bias[expert].expand_as(rows))
            rows.addmm_(out, layer.out[expert])

    def _pool_and_classify(self, stream: torch.Tensor, count: int) -> torch.Tensor:
        """Last feed-forward block with its down-projection moved behind the pooling, then the classifier."""
        packed, layer = self.packed, self.packed.layers[-1]
        latents = self._pooled(stream, count)
        if layer.networks is None:
            latents = latents + torch.bmm(self._pooled(self._expand(stream, layer), count), layer.down)
            # The shift is pooled too, except where there is nothing to pool.
            occupied = [float(stop > start) for start, stop in self.problem.segments]
            shift = layer.down_bias[:, None] * latents.new_tensor(occupied)[:, None]
            latents = latents.unflatten(1, (count, -1)) + shift
        else:
            latents = (latents + self._pooled_sparse(stream, layer.networks, count)).unflatten(1, (count, -1))
        latents = latents.flatten(2)  # (E, C, M*H)
        logits = torch.baddbmm(packed.head_bias, latents, packed.head)
        return logits.transpose(0, 1).to(torch.float64)

    def _pooled_sparse(self, stream: torch.Tensor, networks: Networks, count: int) -> torch.Tensor:
        """A sparse block's mean output (E, C M, H) over each modality's tokens."""
        sent, scores, wide = self._expand_sparse(stream, networks, count)
        sums, totals = pool(wide, sent, scores)
        sums = torch.bmm(sums, networks.down) + totals * networks.down_bias
        sizes = sums.new_tensor([max(stop - start, 1) for start, stop in self.problem.segments]).repeat(count)
        return sums.unflatten(0, (len(stream), -1)).sum(1) / sizes[:, None]

    def _pooled(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Means (E, C M, X) of ``rows`` (E, C L, X) over each modality's valid tokens."""
        means = [self._mean(rows, m, count) for m in range(len(self.problem.segments))]
        return torch.stack(means, dim=2).flatten(1, 2)

    def _mean(self, rows: torch.Tensor, modality: int, count: int) -> torch.Tensor:
        """Mean (E, C, X) of ``rows`` (E, C L, X) over a modality's valid tokens; zero if it has none."""
        start, stop = self.problem.segments[modality]
        return rows.unflatten(1, (count, -1))[:, :, start:stop].sum(2) / max(stop - start, 1)

    def _buffer(self, name: str, *shape: int) -> torch.Tensor:
        return self._scratch.tensor(name, *shape, dtype=self.dtype, device=self.device)
