"""The game of a model and one sample: players are tokens, absent ones are replaced by a fill."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, integer, one_of, shape
from flmoe_fast.engines.choose import choose
from flmoe_fast.engines.engine import Corners, Reduction, Request
from flmoe_fast.games.game import Game
from flmoe_fast.games.heads import Heads, predicted_target
from flmoe_fast.games.sample import lay_out, name_players
from flmoe_fast.model.network import FLI2MoE

HEAD_GROUPS = ("mixture", "experts", "weighted")


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
    precision : "auto", "fp16x2", "mixed", "fp16", "tf32", "fp32" or "bf16"
        Operands of the GPU engines' matrix products, see :class:`TritonEngine`; "cuda" has the first four. Other
        backends take only "auto".
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
        dtype = dtype or parameter.dtype
        one_of("dtype", dtype, (torch.float32, torch.float64))
        self.device = torch.device(device) if device is not None else parameter.device
        self.memory = None if memory is None else integer("memory", memory, least=1)
        self.problem = lay_out(model, features, masks, fill, players, padded_lengths)
        self.n = self.problem.n
        if self.n < 2:
            raise ArgumentError("players", f"{self.n} players", "at least two")
        self._run_on(Request(dtype, self.device, self.problem, backend, precision, self.memory))
        groups = tuple(g for g in HEAD_GROUPS if g in _head_groups(heads))
        value = "logit" if model.config.task == "regression" else value
        self._heads = Heads(groups, value, self._target(target))
        self.heads = self._heads.names(model.config.expert_names)
        self.groups, self.player_names, self.positions = name_players(self.problem)

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
        return self._heads.values(self.engine.evaluate(coalitions.bool())).cpu()

    @torch.no_grad()
    def outputs(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Values (C, O), and the mixture's logits (C, K)."""
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        logits = self.engine.evaluate(coalitions.bool())
        return self._heads.values(logits).cpu(), logits.mixed().cpu()

    @torch.no_grad()
    def corner_values(self, contexts: torch.Tensor, toggled: torch.Tensor) -> torch.Tensor:
        logits = self.engine.evaluate_toggles(contexts, toggled)
        return self._heads.values(logits).cpu().unflatten(0, (contexts.shape[0], toggled.shape[0]))

    @torch.no_grad()
    def corner_samples(self, contexts: torch.Tensor, toggled: torch.Tensor, reduction: Reduction) -> Corners | None:
        if not self.engine.reduces:
            return None
        values = self._heads.values(self.engine.evaluate_toggles(contexts, toggled))
        values = values.unflatten(0, (contexts.shape[0], toggled.shape[0]))
        found = self.engine.reduce_corners(values, contexts, reduction)
        return Corners(found.second.cpu(), found.gap.cpu(), None if found.defined is None else found.defined.cpu())

    def precise(self) -> TokenGame | None:
        """This game in float64 on the torch engine, or the reference where that cannot run; None if it already is."""
        if self.dtype == torch.float64:
            return None
        twin = copy.copy(self)
        twin._run_on(Request(torch.float64, self.device, self.problem, memory=self.memory))
        return twin

    def about(self) -> dict[str, Any]:
        target = self.target if isinstance(self.target, int) else list(self.target)
        dtype = str(self.dtype).removeprefix("torch.")
        about = {"target": target, "value": self.value, "dtype": dtype, "device": str(self.device)}
        about |= self.engine.about()
        if self.reason:
            about |= {"backend": self.backend, "reason": self.reason}
        return about

    def _run_on(self, request: Request) -> None:
        """Let an engine evaluate the game."""
        self.engine, self.reason = choose(request)
        self.dtype, self.backend = request.dtype, self.engine.name
        self.block, self.more_exact = self.engine.block, self.engine.more_exact

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
