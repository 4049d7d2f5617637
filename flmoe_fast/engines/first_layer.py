"""What the coalitions of a sample share: two states of every token, layer-1 attention weights, the routing.

* A token has two possible inputs (its features or its fill), so layer-1 LayerNorm, Q, K and V are ``2 L`` rows.
* Layer-1 attention is a ratio of sums over keys. With the score maximum fixed per query over *all* states, numerator
  and denominator are sums of one term per key, and a key's term has two possible values. (:class:`FirstWeights`)
* Routing reads mean features, which are affine in the coalition.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from flmoe_fast.engines.prepared import PreparedSample

#: exp(-limit) is still a normal number with full relative precision. Beyond it, fixed maxima could underflow.
SCORE_SPREAD = {torch.float32: 60.0, torch.float64: 500.0}


@dataclass(frozen=True)
class FirstWeights:
    """Layer-1 attention weights of J varying and L - J other tokens as keys, not divided by their sum.

    The Q = L + J query rows are every token in its base state, the varying ones present, then the varying tokens once
    more as they ask when absent. Keys and values of the varying tokens are first all absent, then all present.
    """

    rest: torch.Tensor  # (E, h, Q, L - J)
    vary: torch.Tensor  # (E, h, Q, 2J)
    values_rest: torch.Tensor  # (E, h, L - J, d)
    values_vary: torch.Tensor  # (E, h, 2J, d)


class Latest:
    """The latest result of a computation, for as long as its input stays the same.

    Samples of one model are mostly filled alike, so what is computed of absent tokens is there already. Threads may
    share one: input and result are replaced together.
    """

    def __init__(self) -> None:
        self._kept: tuple[torch.Tensor, torch.Tensor] | None = None

    def __call__(self, given: torch.Tensor, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        kept = self._kept
        if kept is None or not torch.equal(kept[0], given):
            self._kept = kept = given.clone(), compute()
        return kept[1]


@dataclass(frozen=True)
class TwoStates:
    """Layer-1 quantities of both states of every valid token; state 1 is the token itself, state 0 its fill."""

    residual: torch.Tensor  # (E, 2, L, H) what the attention's projection is added to, its bias included
    q: torch.Tensor  # (E, h, 2, L, d)
    k: torch.Tensor  # (E, h, 2, L, d)
    v: torch.Tensor  # (E, h, 2, L, d)

    @staticmethod
    def of(sample: PreparedSample, dtype: torch.dtype, device: torch.device) -> TwoStates:
        """Computed in ``dtype``, from tokens that are rounded to it once."""
        stack, layer = sample.model.stack, sample.model.stack.layers[0]

        def cast(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device=device, dtype=dtype).contiguous()

        weights, bias, out_bias = sample.model.kept(
            ("first layer", dtype, str(device)),
            lambda: tuple(cast(part) for part in (layer.projections()[0], layer.q_bias, layer.out_bias)),
        )
        filled = sample.model.kept(("filled", dtype, str(device)), Latest)

        def project(tokens: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            rows = F.layer_norm(tokens, tokens.shape[-1:], eps=layer.norm1.epsilon)
            torch.bmm(rows.expand(stack.count, -1, -1), weights, out=out)
            out[..., : stack.attended] += bias
            return out

        x = cast(sample.tokens)
        absent, present = x.unbind(1)  # (1 or E, L, H)
        qkv = x.new_empty(2, stack.count, x.shape[2], weights.shape[2])
        project(present, qkv[1])
        qkv[0] = filled(absent, lambda: project(absent, qkv[0]).clone())
        q, k, v = qkv.unflatten(3, (3, stack.heads, -1)).permute(3, 1, 4, 0, 2, 5)
        residual = x if stack.residual else torch.zeros_like(x)
        return TwoStates(residual + out_bias[:, None], q, k, v)

    @property
    def length(self) -> int:
        """L, the number of tokens."""
        return self.q.shape[3]

    def weights(self, base: torch.Tensor, varying: torch.Tensor) -> FirstWeights | None:
        """Unnormalised layer-1 attention weights for coalitions equal to ``base`` (L,) bool outside ``varying`` (J,).

        None when some query's scores spread so far that a coalition's largest score could underflow against the
        fixed maximum.
        """
        device = self.q.device
        rest = torch.ones(self.length, dtype=torch.bool, device=device)
        rest[varying] = False
        rest = rest.nonzero()[:, 0]
        # Index pairs (state, token) of the query and key rows.
        state = base.long()
        state[varying] = 1
        queries = torch.cat(
            [self.q[:, :, state, torch.arange(self.length, device=device)], self.q[:, :, 0, varying]], dim=2
        )  # (E, h, Q, d)
        key_vary = torch.cat([self.k[:, :, 0, varying], self.k[:, :, 1, varying]], dim=2)  # (E, h, 2J, d)
        value_vary = torch.cat([self.v[:, :, 0, varying], self.v[:, :, 1, varying]], dim=2)
        score_rest = queries @ self.k[:, :, state[rest], rest].transpose(-1, -2)  # (E, h, Q, L - J)
        score_vary = queries @ key_vary.transpose(-1, -2)  # (E, h, Q, 2J)
        top = torch.cat([score_rest, score_vary], dim=-1).amax(-1, keepdim=True)
        # The smallest "largest score" any coalition can have: constant keys, and each varying key in its worse state.
        surely = torch.cat([score_rest, torch.minimum(*score_vary.chunk(2, dim=-1))], dim=-1).amax(-1, keepdim=True)
        if float((top - surely).max()) > SCORE_SPREAD[self.q.dtype]:
            return None
        values_rest = self.v[:, :, state[rest], rest]
        return FirstWeights(score_rest.sub_(top).exp_(), score_vary.sub_(top).exp_(), values_rest, value_vary)


@dataclass(frozen=True)
class Routing:
    """Routing weights of coalitions, in float64."""

    absent: torch.Tensor  # (M, H) mean features with every player absent
    step: torch.Tensor  # (n, M, H) what each player's presence adds
    network: tuple[tuple[torch.Tensor, torch.Tensor], ...]  # (in, out), (out,)
    temperature: float
    normalised: bool

    @staticmethod
    def of(sample: PreparedSample, device: torch.device) -> Routing:
        """The routing of a sample."""
        problem, model = sample.problem, sample.model
        step = torch.zeros(problem.n, *sample.absent.shape, dtype=torch.float64)
        edges = torch.tensor([start for start, _ in problem.segments])
        own = torch.bucketize(problem.players, edges, right=True) - 1
        step[torch.arange(problem.n), own] = sample.step[problem.players]
        network = model.kept(
            ("routing", str(device)), lambda: tuple((w.to(device), b.to(device)) for w, b in model.routing)
        )
        return Routing(sample.absent.to(device), step.to(device), network, model.temperature, problem.masked)

    def weights(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Routing weights (C, E) of coalitions (C, n)."""
        pooled = self.absent + torch.einsum("cn,nmh->cmh", coalitions.to(torch.float64), self.step)
        if self.normalised:
            pooled = F.normalize(pooled, dim=-1, eps=1e-12)
        hidden = pooled.flatten(1)
        for depth, (weight, bias) in enumerate(self.network):
            hidden = (F.relu(hidden) if depth else hidden) @ weight + bias
        return torch.softmax(hidden / self.temperature, dim=-1)
