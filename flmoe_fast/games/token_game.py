"""The game of a model and one sample: players are tokens, absent ones are replaced by a fill."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, finite, integer, one_of, shape
from flmoe_fast.engines import cpu_engine, torch_engine
from flmoe_fast.engines.cpu_engine import CpuEngine
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.gated_engine import GatedEngine
from flmoe_fast.engines.gpu.cuda import CudaEngine
from flmoe_fast.engines.gpu.fastest import fastest
from flmoe_fast.engines.gpu.kernels.precision import PRECISIONS
from flmoe_fast.engines.gpu.triton import AUTO_PRECISION, TritonEngine
from flmoe_fast.engines.problem import TokenProblem
from flmoe_fast.engines.reference import ReferenceEngine
from flmoe_fast.engines.torch_engine import TorchEngine
from flmoe_fast.games.game import Game
from flmoe_fast.games.heads import Heads, predicted_target
from flmoe_fast.model.config import TEXT_MODALITIES
from flmoe_fast.model.network import FLI2MoE

#: Tokens evaluated per call, see :attr:`Game.block`.
BLOCK_TOKENS = 1 << 16
#: The same on a GPU, where a call has to keep every multiprocessor busy for long.
GPU_BLOCK_TOKENS = 1 << 22
#: Bytes of activations unless told otherwise; the Triton engine has its own.
DEFAULT_MEMORY = 1 << 27
HEAD_GROUPS = ("mixture", "experts", "weighted")
BACKENDS = ("auto", "cpu", "torch", "triton", "cuda", "reference")
#: Backends whose engine is a :class:`TritonEngine`, on a GPU.
ON_GPU = ("triton", "cuda")


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
        why where the model is the reason, and :func:`flmoe_fast.environment.backends` what is missing on a machine.
        Asked for by name, a backend that cannot run is an error.
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
        one_of("backend", backend, BACKENDS)
        parameter = next(model.reweight.parameters())
        self.dtype = one_of("dtype", dtype or parameter.dtype, (torch.float32, torch.float64))
        self.device = torch.device(device) if device is not None else parameter.device
        self.memory = None if memory is None else integer("memory", memory, least=1)
        self.problem = _problem(model, features, masks, fill, players, padded_lengths)
        self.n = self.problem.n
        if self.n < 2:
            raise ArgumentError("players", f"{self.n} players", "at least two")
        self.precision = one_of("precision", precision, ("auto", *PRECISIONS))
        self.backend, self.reason = self._choose(backend)
        if self.backend not in ON_GPU and precision != "auto":
            got = f"{precision!r} with backend {self.backend!r}"
            raise ArgumentError("precision", got, "'auto', or backend 'triton' or 'cuda'")
        tokens = GPU_BLOCK_TOKENS if self.backend in ON_GPU else BLOCK_TOKENS
        self.block = max(1, tokens // self.problem.length)
        self.engine = self._make_engine(self.backend, self.dtype)
        self.more_exact = "dtype=torch.float64"
        if isinstance(self.engine, CpuEngine) and self.engine.arithmetic != "fp32":
            self.more_exact = "backend='torch', or dtype=torch.float64"
        if isinstance(self.engine, TritonEngine):
            self.more_exact = "precision='fp16x2' or 'fp32', or dtype=torch.float64"
        groups = tuple(g for g in HEAD_GROUPS if g in _head_groups(heads))
        value = "logit" if model.config.task == "regression" else value
        self._heads = Heads(groups, value, self._target(target))
        self.heads = self._heads.names(model.config.expert_names)
        self.groups, self.player_names, self.positions = _name_players(self.problem)

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
    def corner_samples(
        self,
        contexts: torch.Tensor,
        toggled: torch.Tensor,
        pairs: torch.Tensor,
        single: torch.Tensor,
        kind: str,
        least: float,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None] | None:
        if not isinstance(self.engine, TritonEngine):
            return None
        values = self._heads.values(self.engine.evaluate_toggles(contexts, toggled))
        values = values.unflatten(0, (contexts.shape[0], toggled.shape[0]))
        found = self.engine.reduce_corners(values, contexts, pairs, single, kind, least)
        return found.second.cpu(), found.gap.cpu(), None if found.defined is None else found.defined.cpu()

    def precise(self) -> TokenGame | None:
        """This game in float64 on the torch engine, or the reference where that cannot run; None if it already is."""
        if self.dtype == torch.float64:
            return None
        twin = object.__new__(TokenGame)
        twin.__dict__.update(self.__dict__)
        twin.dtype = torch.float64
        twin.backend, twin.reason = twin._choose("auto")
        twin.engine = twin._make_engine(twin.backend, torch.float64)
        return twin

    def about(self) -> dict[str, Any]:
        target = self.target if isinstance(self.target, int) else list(self.target)
        dtype = str(self.dtype).removeprefix("torch.")
        about = {"target": target, "value": self.value, "dtype": dtype, "device": str(self.device)}
        if isinstance(self.engine, CpuEngine):
            about |= {"level": self.engine.level, "arithmetic": self.engine.arithmetic}
        if isinstance(self.engine, TritonEngine):
            about |= {"precision": self.engine.precision, "configurations": self.engine.target}
        if self.reason:
            about |= {"backend": self.backend, "reason": self.reason}
        return about

    def _choose(self, backend: str) -> tuple[str, str]:
        """The backend to use, and what about the model, not the machine, keeps a faster one from it."""
        if backend != "auto":
            return backend, ""
        config = self.problem.model.config
        if config.fusion != "interpretcc" and torch_engine.why_not(self.problem):
            return "reference", torch_engine.why_not(self.problem)
        if self.device.type == "cuda":
            if not TritonEngine.why_not(self._request()):
                return self._fastest_on_gpu(), ""
            return "torch", TritonEngine.unfit(self._request())
        if not cpu_engine.why_not(self.dtype, self.device, config):
            return "cpu", ""
        return "torch", cpu_engine.model_reason(config)

    def _request(self) -> Request:
        return Request(self.dtype, self.device, self.problem, precision=self.precision)

    def _fastest_on_gpu(self) -> str:
        """The GPU backend that was measured to be the faster one on this device and shape."""
        config = self.problem.model.config
        precision = AUTO_PRECISION if self.precision == "auto" else self.precision
        name = torch.cuda.get_device_name(self.device)
        best = fastest(name, config.hidden, config.heads, self.problem.length, precision)
        if best == "cuda" and CudaEngine.why_not(self._request()):
            return "triton"
        return best

    def _make_engine(
        self, backend: str, dtype: torch.dtype
    ) -> TorchEngine | TritonEngine | GatedEngine | ReferenceEngine:
        where = {"dtype": dtype, "device": self.device}
        if backend == "reference":
            return ReferenceEngine(self.problem, **where)
        if backend in ON_GPU:
            engine = CudaEngine if backend == "cuda" else TritonEngine
            return engine(self.problem, **where, memory=self.memory, precision=self.precision)
        engine = CpuEngine if backend == "cpu" else TorchEngine
        if backend == "torch" and self.problem.model.config.fusion == "interpretcc":
            engine = GatedEngine
        return engine(self.problem, **where, memory=DEFAULT_MEMORY if self.memory is None else self.memory)

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


def _problem(
    model: FLI2MoE,
    features: Sequence[torch.Tensor],
    masks: Sequence[torch.Tensor] | None,
    fill: str | Sequence[torch.Tensor],
    players: Sequence[Sequence[int]] | None,
    padded_lengths: Sequence[int] | None,
) -> TokenProblem:
    """Check a sample and lay it out as a padded concatenation, on the CPU."""
    config = model.config
    names = config.modalities
    features = [_one_sample(f"features[{m}]", f, 2) for m, f in enumerate(_per_modality("features", features, names))]
    for m, tokens in enumerate(features):
        shape(f"features[{m}]", tokens, (None, config.hidden), "(T, H)")
        if not tokens.is_floating_point():
            raise ArgumentError(f"features[{m}]", tokens.dtype, "floating point numbers")
    lengths = [len(tokens) for tokens in features]
    if padded_lengths is None:
        padded_lengths = lengths
    padded = tuple(
        integer(f"padded_lengths[{m}]", length, least=lengths[m])
        for m, length in enumerate(_per_modality("padded_lengths", padded_lengths, names))
    )
    if config.num_tokens is not None and padded != tuple(config.num_tokens):
        raise ArgumentError(
            "features", f"{padded} tokens per modality", f"{tuple(config.num_tokens)}, the model's num_tokens"
        )
    if masks is None and padded != tuple(lengths):
        raise ArgumentError("masks", None, "masks, since padded_lengths exceed the features' lengths")
    if masks is not None and config.generation == "original":
        raise ArgumentError("masks", "masks", "None: generation 'original' has no key masks")
    valid = _valid_tokens(masks, lengths, names)
    for m, tokens in enumerate(features):
        finite(f"features[{m}]", tokens[valid[m]])
    fills = _fills(fill, model, lengths, names)

    def padded_concatenation(parts: list[torch.Tensor]) -> torch.Tensor:
        # Padding is never read; zeros keep stray NaNs of the input out.
        rows = []
        for part, keep, length in zip(parts, valid, padded):
            block = torch.zeros(length, config.hidden, dtype=torch.float64)
            block[: len(part)][keep] = part[keep].double()
            rows.append(block)
        return torch.cat(rows)

    keep = torch.cat([torch.cat([v, v.new_zeros(length - len(v))]) for v, length in zip(valid, padded)])
    position = keep.nonzero()[:, 0]
    rank = torch.full((sum(padded),), -1)
    rank[position] = torch.arange(len(position))
    starts = [sum(padded[:m]) for m in range(len(names))]
    counts = [int(v.sum()) for v in valid]
    edges = [sum(counts[:m]) for m in range(len(names) + 1)]
    chosen = _players(players, valid, names)
    return TokenProblem(
        model=model,
        features=padded_concatenation(features),
        fills=padded_concatenation(fills),
        valid=position,
        segments=tuple(zip(edges[:-1], edges[1:])),
        players=torch.cat([rank[starts[m] + chosen[m]] for m in range(len(names))]),
        padded_lengths=padded,
        masked=masks is not None,
    )


def _per_modality(name: str, values: Sequence, names: tuple[str, ...]) -> Sequence:
    if isinstance(values, (torch.Tensor, str)) or not hasattr(values, "__len__") or len(values) != len(names):
        got = f"{len(values)} items" if hasattr(values, "__len__") else type(values).__name__
        raise ArgumentError(name, got, f"one entry for each of the {len(names)} modalities {names}")
    return values


def _one_sample(name: str, tensor: torch.Tensor, dims: int) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor):
        raise ArgumentError(name, type(tensor).__name__, "a torch.Tensor")
    tensor = tensor.detach().cpu()
    return tensor[0] if tensor.dim() == dims + 1 and len(tensor) == 1 else tensor


def _valid_tokens(
    masks: Sequence[torch.Tensor] | None, lengths: list[int], names: tuple[str, ...]
) -> list[torch.Tensor]:
    if masks is None:
        return [torch.ones(length, dtype=torch.bool) for length in lengths]
    valid = []
    for m, mask in enumerate(_per_modality("masks", masks, names)):
        mask = _one_sample(f"masks[{m}]", mask, 1)
        shape(f"masks[{m}]", mask, (lengths[m],), "(T,)")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise ArgumentError(f"masks[{m}]", "values other than 0 and 1", "1 for valid tokens and 0 for padding")
        valid.append(mask.bool())
    if not any(bool(v.any()) for v in valid):
        raise ArgumentError("masks", "padding only", "at least one valid token")
    return valid


def _fills(
    fill: str | Sequence[torch.Tensor], model: FLI2MoE, lengths: list[int], names: tuple[str, ...]
) -> list[torch.Tensor]:
    hidden = model.config.hidden
    if isinstance(fill, str):
        if one_of("fill", fill, ("mean", "zero")) == "zero":
            return [torch.zeros(length, hidden) for length in lengths]
        if model.feature_means is None:
            raise ArgumentError(
                "fill",
                "'mean' with a model that carries no feature means",
                "model.set_feature_means(...) beforehand, fill='zero', or one (H,) tensor per modality",
            )
        fill = list(model.feature_means)
    vectors = []
    for m, vector in enumerate(_per_modality("fill", fill, names)):
        if not isinstance(vector, torch.Tensor):
            raise ArgumentError(f"fill[{m}]", type(vector).__name__, "a torch.Tensor")
        vector = vector.detach().cpu()
        if vector.dim() == 1:
            shape(f"fill[{m}]", vector, (hidden,), "(H,)")
            vector = vector.expand(lengths[m], hidden)
        shape(f"fill[{m}]", vector, (lengths[m], hidden), "(T, H)")
        finite(f"fill[{m}]", vector)
        vectors.append(vector)
    return vectors


def _players(
    players: Sequence[Sequence[int]] | None, valid: list[torch.Tensor], names: tuple[str, ...]
) -> list[torch.Tensor]:
    """Positions of the players within each modality."""
    if players is None:
        chosen = []
        for name, keep in zip(names, valid):
            keep = keep.clone()
            if name in TEXT_MODALITIES:
                keep[:1] = False
            chosen.append(keep.nonzero()[:, 0])
        return chosen
    chosen = []
    for m, positions in enumerate(_per_modality("players", players, names)):
        seen = [integer(f"players[{m}]", int(p), least=0, most=len(valid[m]) - 1) for p in positions]
        if len(set(seen)) < len(seen):
            raise ArgumentError(f"players[{m}]", "a position twice", "distinct positions")
        padding = [p for p in seen if not bool(valid[m][p])]
        if padding:
            raise ArgumentError(f"players[{m}]", f"position {padding[0]}, which is padding", "valid tokens")
        chosen.append(torch.tensor(sorted(seen), dtype=torch.long))
    return chosen


def _name_players(problem: TokenProblem) -> tuple[tuple, tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Groups of players by modality, a name for each player, and each player's (modality, position)."""
    starts = [sum(problem.padded_lengths[:m]) for m in range(len(problem.padded_lengths))]
    groups, names, places = [], [], []
    players = problem.players.tolist()
    for m, (modality, (start, stop)) in enumerate(zip(problem.model.config.modalities, problem.segments)):
        members = tuple(i for i, token in enumerate(players) if start <= token < stop)
        groups.append((modality, members))
        for i in members:
            position = int(problem.valid[players[i]]) - starts[m]
            names.append(f"{modality} {position}")
            places.append((m, position))
    return tuple(groups), tuple(names), tuple(places)
