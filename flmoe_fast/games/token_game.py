"""The game of a model and one sample: players are tokens, absent ones are replaced by a fill."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.engines.choose import choose, why_not
from flmoe_fast.engines.engine import Corners, Reduction, Request, TokenEngine
from flmoe_fast.games.game import Game
from flmoe_fast.games.heads import Heads, predicted_target
from flmoe_fast.games.rounding import MARGIN, NOISE_LIMIT, percent, too_coarse
from flmoe_fast.games.sample import lay_out, name_players
from flmoe_fast.model.network import FLI2MoE

HEAD_GROUPS = ("mixture", "experts", "weighted")
#: Held while an arithmetic is judged. It is no part of a game, which can be copied and pickled.
_judging = threading.RLock()


class TokenGame(Game):
    """Which tokens make the model say what it says about one sample, as a cooperative game.

    The value of a coalition S is the model's output when the tokens of S keep their features and every other player's
    features are replaced by its modality's fill, before positions are added; key masks and positions stay as they are.
    All heads come from the same forward pass.

    Parameters
    ----------
    model : FLI2MoE
    features : sequence of M tensors (T_m, H)
        Encoded tokens of one sample, in the model's modality order; a leading batch axis of 1 is accepted.
    masks : sequence of M tensors (T_m,), optional
        1 for valid tokens, 0 for padding. None and all-ones differ: without masks the routing network reads
        unnormalised means, as in the reference model.
    fill : "mean", "zero" or sequence of M tensors (H,) or (T_m, H)
        What replaces an absent token. "mean" is the training set's mean token of each modality, which the model
        carries once :meth:`FLI2MoE.set_feature_means` was called.
    players : sequence of M sequences of positions, optional
        Tokens that take part; all others stay present. Default: every valid token but the start symbol of a text
        (a modality named language, text, txt, note or notes).
    padded_lengths : sequence of M ints, optional
        Lengths the modalities are padded to where that is longer than T_m. Positions depend on them.
    target : int, sequence of class indices, or None
        Class whose value is explained (several only for multilabel models). None: what the model predicts from the
        full input.
    value : "prob" or "logit"
        The output of a regression model has no probability; it is its own value either way.
    heads : subset of ("mixture", "experts", "weighted")
    backend : "auto", "cpu", "torch", "triton", "cuda" or "reference"
        "cpu" is the native engine: transformers in float32 on the CPU, with the compiled extension. "triton" is float32
        on an NVIDIA GPU, and so is "cuda", for the models and precisions that its fused kernels have. "auto" takes the
        one of the device where it can run, the faster one on a GPU, else "torch", else "reference"; :meth:`about` says
        why where the model is the reason, and :func:`flmoe_fast.backends` what is missing on a machine. Asked for by
        name, a backend that cannot run is an error.
    dtype : torch.float32 or torch.float64, optional
        Arithmetic of the engine; the model's own by default.
    precision : "auto", "fp16x2", "mixed", "fp16", "tf32", "fp32", "bf16" or "bf16x3"
        Operands of matrix products: of the GPU engines' see :class:`TritonEngine`, "cuda" has the first four; "cpu" has
        "fp32", and "bf16x3" on processors with AMX. Other backends take only "auto", which begins with the cheapest
        and moves up where rounding shows (:mod:`flmoe_fast.games.rounding`), to float64 where neither backend nor dtype
        was asked for either.
    device : optional
        Where to evaluate; the model's own device by default.
    memory : int, optional
        Bytes of activations the engine may hold at a time; by default 128 MiB, and 4 GiB for the GPU engines.

    Raises
    ------
    ArgumentError
        Names the argument, what came and what was expected.
    """

    groups: tuple[tuple[str, tuple[int, ...]], ...]

    def __init__(
        self,
        model: FLI2MoE,
        features: Sequence[torch.Tensor],
        *,
        masks: Sequence[torch.Tensor] | None = None,
        fill: str | Sequence[torch.Tensor] = "mean",
        players: Sequence[Sequence[int]] | None = None,
        padded_lengths: Sequence[int] | None = None,
        target: int | Sequence[int] | None = None,
        value: str = "prob",
        heads: Sequence[str] = HEAD_GROUPS,
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        precision: str = "auto",
        device: torch.device | str | None = None,
        memory: int | None = None,
    ):
        if not isinstance(model, FLI2MoE):
            raise ArgumentError("model", type(model).__name__, "an FLI2MoE")
        one_of("value", value, ("prob", "logit"))
        parameter = next(model.parameters())
        given, dtype = dtype, dtype or parameter.dtype
        one_of("dtype", dtype, (torch.float32, torch.float64))
        self.device = torch.device(device) if device is not None else parameter.device
        self.memory = None if memory is None else integer("memory", memory, least=1)
        self.problem = lay_out(model, features, masks, fill, players, padded_lengths)
        self.n = self.problem.n
        if self.n < 2:
            raise ArgumentError("players", f"{self.n} players", "at least two")
        self._asked = Request(dtype, self.device, self.problem, backend, precision, self.memory)
        self._any_dtype, self._judged = given is None, False
        self._run_on(self._asked)
        groups = tuple(g for g in HEAD_GROUPS if g in _head_groups(heads))
        value = "logit" if model.config.task == "regression" else value
        self._heads = Heads(groups, value, self._target(target))
        self.heads = self._heads.names(model.config.expert_names)
        self.groups, self.player_names, self.positions = name_players(self.problem)
        self._begin_finer()

    @property
    def value(self) -> str:
        """What a coalition's value is: ``"prob"`` or ``"logit"`` of the target."""
        return self._heads.value

    @property
    def target(self) -> int | tuple[int, ...]:
        """The explained class, or classes of a multilabel target."""
        target = self._heads.target
        return target if isinstance(target, int) else tuple(target.nonzero()[:, 0].tolist())

    @property
    def tokens(self) -> torch.Tensor:
        """Position (n,) of every player in the padded concatenation of all modalities."""
        return self.problem.valid[self.problem.players]

    @torch.no_grad()
    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        return self._heads.values(self._ready().evaluate(coalitions.bool())).cpu()

    @torch.no_grad()
    def outputs(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (C, O), and the mixture's logits (C, K)."""
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        logits = self._ready().evaluate(coalitions.bool())
        return self._heads.values(logits).cpu(), logits.mixed().cpu()

    @torch.no_grad()
    def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        logits = self._ready().evaluate_toggles(contexts, toggled)
        return self._heads.values(logits).cpu().unflatten(0, (contexts.shape[0], toggled.shape[0]))

    @torch.no_grad()
    def corner_samples(self, contexts: torch.Tensor, toggled: torch.Tensor, reduction: Reduction) -> Corners | None:
        if not self._ready().reduces:
            return None
        values = self._heads.values(self.engine.evaluate_toggles(contexts, toggled))
        values = values.unflatten(0, (contexts.shape[0], toggled.shape[0]))
        found = self.engine.reduce_corners(values, contexts, reduction)
        return Corners(found.second.cpu(), found.gap.cpu(), None if found.defined is None else found.defined.cpu())

    def precise(self) -> TokenGame | None:
        """This game in float64 on the torch engine, or the reference where that cannot run; None if it already is."""
        if self.dtype == torch.float64:
            return None
        return self._on(Request(torch.float64, self.device, self.problem, memory=self.memory))

    def finer(self) -> TokenGame | None:
        """This game in the next more exact arithmetic; None if arithmetic or backend were asked for, or in float64."""
        request = self._next()
        return None if request is None else self._on(request)

    @property
    def arithmetic(self) -> str:
        return self.engine.arithmetic

    @property
    def noise(self) -> dict[str, float]:
        return self.engine.noise

    def about(self) -> dict[str, Any]:
        target = self.target if isinstance(self.target, int) else list(self.target)
        dtype = str(self.dtype).removeprefix("torch.")
        about = {"target": target, "value": self.value, "dtype": dtype, "device": str(self.device)}
        about |= self.engine.about()
        if self.reason:
            about |= {"backend": self.backend, "reason": self.reason}
        return about

    def _run_on(self, request: Request, why: str = "") -> None:
        """Let an engine evaluate the game, and say why where the model is the reason for it."""
        self.engine, reason = choose(request)
        self.reason = why or reason
        self.dtype, self.backend = request.dtype, self.engine.name
        self.block, self.more_exact = self.engine.block, self.engine.more_exact

    def _on(self, request: Request) -> TokenGame:
        """The same game on another engine."""
        twin = copy.copy(self)
        twin._run_on(request)
        return twin

    # ---- the arithmetic ---------------------------------------------------------------------------------------------

    def _next(self) -> Request | None:
        """The next more exact arithmetic that leaves what was asked for as it was."""
        asked, request = self._asked, self.engine.finer()
        if request is None or asked.precision != "auto" or (request.dtype != self.dtype and not self._any_dtype):
            return None
        if asked.backend not in ("auto", request.backend):
            request = replace(request, backend=asked.backend)
            if why_not(request):
                return None
        return replace(request, memory=self.memory)

    def _enough(self) -> float:
        """The share of noise up to which the arithmetic is good enough to begin with."""
        return NOISE_LIMIT / MARGIN if self.engine.coarse else NOISE_LIMIT

    def _begin_finer(self) -> None:
        """Move up as far as what is known of the model says."""
        while self.noise.get(self.arithmetic, 0.0) > self._enough():
            request = self._next()
            if request is None:
                return
            share = percent(self.noise[self.arithmetic])
            self._run_on(request, f"rounding in {self.arithmetic} makes up {share} of what a sample shows")

    def _ready(self) -> TokenEngine:
        """The engine, in an arithmetic that was judged if it is a coarse one; threads wait for the one that judges."""
        if self._judged:
            return self.engine
        with _judging:
            while not self._judged and self.engine.coarse and self.arithmetic not in self.noise:
                finer = self.finer()
                if finer is None:
                    break
                plain = copy.copy(self)
                plain._judged = True
                if too_coarse(plain, finer):
                    self._begin_finer()
            self._judged = True
        return self.engine

    @torch.no_grad()
    def _target(self, target: int | Sequence[int] | None) -> int | torch.Tensor:
        config = self.problem.model.config
        if target is None:
            logits = self.engine.evaluate(torch.ones(1, self.n, dtype=torch.bool))
            return predicted_target(logits.mixed()[0], config.task)
        if config.task != "multilabel":
            return integer("target", target, least=0, most=config.classes - 1)
        chosen = [target] if isinstance(target, int) else list(target)
        if not chosen:
            raise ArgumentError("target", repr(target), "at least one class")
        marked = torch.zeros(config.classes, dtype=torch.bool)
        for index in chosen:
            marked[integer("target", index, least=0, most=config.classes - 1)] = True
        return marked


def _head_groups(heads: Sequence[str]) -> tuple[str, ...]:
    heads = (heads,) if isinstance(heads, str) else tuple(heads)
    if not heads:
        raise ArgumentError("heads", "nothing", f"some of {HEAD_GROUPS}")
    for head in heads:
        one_of("heads", head, HEAD_GROUPS)
    return heads
