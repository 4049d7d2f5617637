"""The hyper-parameters that fix a model's shape and its training loss."""

from __future__ import annotations

import dataclasses
import math
import numbers
from collections.abc import Mapping
from typing import Any

from flmoe_fast.checks import ArgumentError, integer, one_of

GENERATIONS = ("fl", "original")
#: Smallest divisor of routing and gate logits.
LEAST_TEMPERATURE = 1e-6
TASKS = ("multiclass", "multilabel", "regression")
FUSIONS = ("transformer", "interpretcc", "moepp")
GATES = (None, "naive", "gshard", "switch", "noisy")
CAPACITIES = ("none", "reference")
ROUTINGS = ("features", "average")
#: Role of an expert without an interaction loss: alone, it makes the model a plain dense transformer.
DENSE = "dense"
#: Modalities whose first token is the start symbol of a text, which takes no part in probes.
TEXT_MODALITIES = frozenset({"language", "text", "txt", "note", "notes"})


@dataclasses.dataclass(frozen=True)
class FLI2MoEConfig:
    """Configuration of :class:`~flmoe_fast.model.network.FLI2MoE`.

    Parameters
    ----------
    modalities : tuple of str
        Names of the M modalities in the order of the concatenated sequence, 2 <= M <= 8, no dots.
    hidden : int
        Width H of every token, even and divisible by ``heads``.
    heads : int
        Attention heads h; each is H / h wide.
    layers : int
        Encoder layers of each expert.
    classes : int
        Number C of output logits, 2 or more for ``"multiclass"``.
    generation : str
        ``"fl"`` (arXiv 2603.13326: token sequences with key masks, fixed sinusoid, pre-norm residual blocks,
        interaction losses on latents) or ``"original"`` (I2MoE, ICML 2025: the same number of patches per modality,
        learned positions, no masks, no residual around attention, losses on logits).
    task : str
        ``"multiclass"`` (softmax, cross entropy), ``"multilabel"`` (sigmoid, binary cross entropy) or ``"regression"``
        (the outputs themselves, smooth L1).
    num_tokens : tuple of int, optional
        Tokens per modality, in order. ``"original"`` needs it, with all numbers equal. For ``"fl"`` it is optional;
        where given, inputs must have exactly these (padded) lengths.
    ffn_multiple : int
        Feed-forward width as a multiple of H.
    reweight_hidden : int
        Width of the hidden layers of the reweighting MLP.
    reweight_layers : int
        Linear layers of the reweighting MLP, 1 or more.
    temperature : float
        Divides the routing logits before their softmax, > 0.
    dropout : float
        Probability of every dropout in training, 0 <= p < 1.
    interaction_weight : float
        Factor of the mean interaction loss in the total loss, >= 0.
    class_weights : tuple of float, optional
        C positive weights of the cross entropy (``"multiclass"`` only), or ``None``.
    roles : tuple of str, optional
        The experts there are: ``None`` for all M + 2, or some of their names (:attr:`expert_names`), each once;
        ``"dense"`` is an expert without an interaction loss, and ``("dense",)`` a plain fusion transformer, the
        baseline that mixtures are compared with.
    routing : str
        ``"features"`` (weights from the sample's mean features) or ``"average"`` (one learned weight per expert, the
        same for every sample, all equal at the start).
    fusion : str
        What an expert is. ``"transformer"``; or, for generation ``"original"``, ``"interpretcc"`` (one vector per
        modality, switched on or off by a gate, then an MLP; ``num_tokens`` all 1) or ``"moepp"`` (MoE++, whose
        published code lets only its last layer's attention reach the output).
    gate : str, optional
        ``None`` for dense feed-forward blocks. Otherwise the blocks of layers 0, 2, 4, ... hold ``ffn_experts`` small
        feed-forward networks of which each token uses ``top_k``: ``"naive"`` (largest logits), ``"gshard"`` (the same
        two with a balancing loss and a capacity), ``"switch"`` (one, weighted by its probability) or ``"noisy"``
        (largest logits, with learned noise in training).
    ffn_experts : int, optional
        Number X of networks in a sparse block, or in a MoE++ block. ``None`` without such blocks.
    top_k : int, optional
        Networks a token uses; ``None`` means 1 for ``"switch"`` and 2 otherwise.
    capacity : str
        ``"none"``: a token always reaches its networks. ``"reference"``: as in the published code, a network takes only
        so many tokens of a (batch, modality), padding included, and the rest go without. Only ``"gshard"`` and
        ``"switch"`` have a capacity.
    random_routing : bool
        In training, drop second choices at random (``"gshard"`` only).
    gate_weight : float
        Factor of the load-balancing loss in the total loss, >= 0.
    gumbel_temperature : float
        Of the InterpretCC gates, > 0.
    gate_threshold : float
        Above which an InterpretCC gate is on, between 0 and 1.
    hard_gates : bool
        Whether InterpretCC gates are on or off, or pass their probability.

    Raises
    ------
    ArgumentError
        A field is out of its range; the message names the field.
    """

    modalities: tuple[str, ...]
    hidden: int
    heads: int
    layers: int
    classes: int
    generation: str = "fl"
    task: str = "multiclass"
    num_tokens: tuple[int, ...] | None = None
    ffn_multiple: int = 2
    reweight_hidden: int = 256
    reweight_layers: int = 2
    temperature: float = 1.0
    dropout: float = 0.5
    interaction_weight: float = 0.5
    class_weights: tuple[float, ...] | None = None
    roles: tuple[str, ...] | None = None
    routing: str = "features"
    fusion: str = "transformer"
    gate: str | None = None
    ffn_experts: int | None = None
    top_k: int | None = None
    capacity: str = "none"
    random_routing: bool = False
    gate_weight: float = 0.01
    gumbel_temperature: float = 1.0
    gate_threshold: float = 0.5
    hard_gates: bool = True

    def __post_init__(self) -> None:
        settle = self._settle
        settle("modalities", _names(self.modalities))
        for name in ("hidden", "heads", "layers", "classes", "ffn_multiple", "reweight_hidden", "reweight_layers"):
            settle(name, integer(name, getattr(self, name), least=1))
        if self.hidden % 2:
            raise ArgumentError("hidden", self.hidden, "an even number (the sinusoid pairs sines with cosines)")
        if self.hidden % self.heads:
            raise ArgumentError("heads", self.heads, f"a divisor of hidden = {self.hidden}")
        one_of("generation", self.generation, GENERATIONS)
        one_of("task", self.task, TASKS)
        if self.task == "multiclass" and self.classes == 1:
            # A softmax over one logit is one whatever the logit: every effect on it would be zero.
            expected = "2 or more for task 'multiclass'; a single output is task 'regression', or 'multilabel'"
            raise ArgumentError("classes", 1, expected)
        settle("num_tokens", self._token_counts())
        settle("temperature", _temperature("temperature", self.temperature))
        settle("dropout", _number("dropout", self.dropout, least=0.0, below=1.0))
        settle("interaction_weight", _number("interaction_weight", self.interaction_weight, least=0.0))
        settle("class_weights", self._weights())
        settle("roles", self._roles())
        one_of("routing", self.routing, ROUTINGS)
        if self.routing == "average" and self.reweight_layers != 1:
            raise ArgumentError("reweight_layers", self.reweight_layers, "1 for routing 'average'")
        self._check_fusion()
        settle("ffn_experts", self._sparse_experts())
        settle("top_k", self._choices())
        one_of("capacity", self.capacity, CAPACITIES)
        for name in ("random_routing", "hard_gates"):
            settle(name, bool(one_of(name, getattr(self, name), (False, True))))
        if self.random_routing and self.gate != "gshard":
            raise ArgumentError("random_routing", True, "False, because the gate is not 'gshard'")
        settle("gate_weight", _number("gate_weight", self.gate_weight, least=0.0))
        settle("gumbel_temperature", _temperature("gumbel_temperature", self.gumbel_temperature))
        settle("gate_threshold", _number("gate_threshold", self.gate_threshold, above=0.0, below=1.0))

    def _check_fusion(self) -> None:
        one_of("fusion", self.fusion, FUSIONS)
        one_of("gate", self.gate, GATES)
        if self.fusion == "transformer":
            return
        if self.generation != "original":
            raise ArgumentError("fusion", repr(self.fusion), "'transformer', because the generation is not 'original'")
        if self.gate is not None:
            raise ArgumentError("gate", repr(self.gate), f"None, because the fusion is {self.fusion!r}")
        if self.fusion == "interpretcc" and set(self.num_tokens or ()) != {1}:
            raise ArgumentError("num_tokens", self.num_tokens, "1 for each modality, because the fusion is InterpretCC")

    def _sparse_experts(self) -> int | None:
        # MoE++ has two constant experts, one that copies and one that gives zero beside its networks.
        least = {"moepp": 5}.get(self.fusion, 2)
        if self.gate is not None or self.fusion == "moepp":
            return integer("ffn_experts", self.ffn_experts, least=least)
        if self.ffn_experts is not None:
            raise ArgumentError("ffn_experts", self.ffn_experts, "None, because the feed-forward blocks are dense")
        return None

    def _choices(self) -> int | None:
        fixed = {None: None, "switch": 1, "gshard": 2}
        if self.top_k is None:
            return fixed.get(self.gate, 2)
        if self.gate in fixed and self.top_k != fixed[self.gate]:
            raise ArgumentError("top_k", repr(self.top_k), f"{fixed[self.gate]} for gate {self.gate!r}")
        return integer("top_k", self.top_k, least=1, most=self.ffn_experts)

    def _settle(self, name: str, value: object) -> None:
        # The dataclass is frozen for its users; normalising a field on construction has to go round that.
        object.__setattr__(self, name, value)

    def _token_counts(self) -> tuple[int, ...] | None:
        if self.num_tokens is None:
            if self.generation == "original":
                raise ArgumentError(
                    "num_tokens",
                    None,
                    "the number of tokens of each modality: generation 'original' "
                    "learns one position embedding per token",
                )
            return None
        counts = _tuple("num_tokens", self.num_tokens, len(self.modalities), "one integer per modality")
        counts = tuple(integer(f"num_tokens[{i}]", count, least=1) for i, count in enumerate(counts))
        if self.generation == "original" and len(set(counts)) > 1:
            raise ArgumentError("num_tokens", counts, "equal numbers for generation 'original'")
        return counts

    def _weights(self) -> tuple[float, ...] | None:
        if self.class_weights is None:
            return None
        if self.task != "multiclass":
            raise ArgumentError("class_weights", self.class_weights, "None, because the task is not 'multiclass'")
        weights = _tuple("class_weights", self.class_weights, self.classes, "one number per class")
        return tuple(_number(f"class_weights[{i}]", weight, above=0.0) for i, weight in enumerate(weights))

    def _roles(self) -> tuple[str, ...] | None:
        if self.roles is None:
            return None
        known = (*self._all_names, DENSE)
        expected = f"None, or a tuple of distinct names out of {', '.join(map(repr, known))}"
        if isinstance(self.roles, str) or not isinstance(self.roles, (tuple, list)) or not self.roles:
            raise ArgumentError("roles", repr(self.roles), expected)
        if any(name not in known for name in self.roles) or len(set(self.roles)) < len(self.roles):
            raise ArgumentError("roles", repr(self.roles), expected)
        return None if tuple(self.roles) == self._all_names else tuple(self.roles)

    @property
    def _all_names(self) -> tuple[str, ...]:
        return (*(f"uniqueness: {name}" for name in self.modalities), "synergy", "redundancy")

    @property
    def experts(self) -> int:
        """Number E of experts: M + 2 unless ``roles`` says otherwise."""
        return len(self.expert_names)

    @property
    def sparse_layers(self) -> tuple[int, ...]:
        """Indices of the encoder layers whose feed-forward block is sparse."""
        return () if self.gate is None else tuple(range(0, self.layers, 2))

    @property
    def slots_limit(self) -> bool:
        """Whether a token's result can depend on the other tokens of its batch, because they compete for capacity."""
        return self.capacity == "reference" and self.gate in ("gshard", "switch")

    @property
    def expert_names(self) -> tuple[str, ...]:
        """Names in expert order: ``"uniqueness: <modality>"`` for each modality, ``"synergy"``, ``"redundancy"``."""
        return self._all_names if self.roles is None else self.roles

    @property
    def interactions(self) -> tuple[int | None, ...]:
        """Interaction that each expert is trained for.

        m < M for uniqueness of modality m, M synergy, M + 1 redundancy, ``None`` for a dense expert.
        """
        numbers = {name: number for number, name in enumerate(self._all_names)}
        return tuple(numbers.get(name) for name in self.expert_names)

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict of plain JSON types (lists for tuples)."""
        fields = dataclasses.asdict(self)
        return {name: list(value) if isinstance(value, tuple) else value for name, value in fields.items()}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> FLI2MoEConfig:
        """Inverse of :meth:`to_dict`; unknown or missing fields raise :class:`ArgumentError`."""
        if not isinstance(fields, Mapping):
            raise ArgumentError("fields", type(fields).__name__, "a mapping of field names to values")
        known = {field.name for field in dataclasses.fields(cls)}
        required = {field.name for field in dataclasses.fields(cls) if field.default is dataclasses.MISSING}
        unknown, missing = sorted(set(fields) - known, key=str), sorted(required - set(fields))
        if unknown:
            raise ArgumentError("fields", f"unknown {unknown}", f"only {sorted(known)}")
        if missing:
            raise ArgumentError("fields", f"no {missing}", f"all of {sorted(required)}")
        return cls(**fields)


def _names(modalities: object) -> tuple[str, ...]:
    if isinstance(modalities, str) or not isinstance(modalities, (tuple, list)):
        raise ArgumentError("modalities", repr(modalities), "a tuple of 2 to 8 names")
    if not 2 <= len(modalities) <= 8:
        raise ArgumentError("modalities", f"{len(modalities)} names", "2 to 8 names")
    for i, name in enumerate(modalities):
        # A dot would be read as a level of the state dict where the encoders are stored under these names.
        if not isinstance(name, str) or not name or "." in name:
            raise ArgumentError(f"modalities[{i}]", repr(name), "a non-empty string without dots")
    if len(set(modalities)) < len(modalities):
        raise ArgumentError("modalities", tuple(modalities), "distinct names")
    return tuple(modalities)


def _tuple(name: str, values: object, length: int, meaning: str) -> tuple:
    if not isinstance(values, (tuple, list)) or len(values) != length:
        raise ArgumentError(name, repr(values), f"{meaning} ({length})")
    return tuple(values)


def _temperature(name: str, value: object) -> float:
    """A divisor of logits: smaller ones make float32 logits infinite, and weights that are no numbers."""
    return _number(name, value, least=LEAST_TEMPERATURE)


def _number(
    name: str, value: object, *, least: float | None = None, above: float | None = None, below: float | None = None
) -> float:
    bounds = [f">= {least}"] if least is not None else []
    bounds += [f"> {above}"] if above is not None else []
    bounds += [f"< {below}"] if below is not None else []
    expected = "a finite number " + " and ".join(bounds)
    if isinstance(value, bool) or not isinstance(value, numbers.Real) or not math.isfinite(value):
        raise ArgumentError(name, repr(value), expected)
    number = float(value)
    low = (least is not None and number < least) or (above is not None and number <= above)
    if low or (below is not None and number >= below):
        raise ArgumentError(name, repr(value), expected)
    return number
