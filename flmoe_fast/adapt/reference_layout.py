"""Live modules in the layout of the published I2MoE and FL-I2MoE code, on the engine.

A module is known by its state dict (``reweight.mlp.*`` and ``interaction_experts.{e}.fusion_model.*``), whatever it is
called and wherever it was imported from. Its weights are copied into an :class:`FLI2MoE`, and both run on the same
inputs before the copy is believed: what the state dict does not tell, such as another activation or a changed forward,
then shows up as the layer in which the two part.
"""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from flmoe_fast.checks import ArgumentError
from flmoe_fast.games.token_game import TokenGame
from flmoe_fast.model.checkpoint import CheckpointError, model_from_state
from flmoe_fast.model.network import FLI2MoE, eval_mode

#: Largest relative difference between a module and its copy. Structural differences are far larger.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-3, torch.float16: 5e-2, torch.bfloat16: 2e-1}
#: What implementations call the number of heads of an attention module.
_HEADS = ("num_heads", "n_heads", "heads", "num_attention_heads")
#: Gates of sparse blocks by the names of their published classes.
_GATES = {"NaiveGate": "naive", "GShardGate": "gshard", "SwitchGate": "switch"}
#: Tokens a modality, where a model leaves that open, in the inputs of the comparison.
_TOKENS = (3, 2, 4)


def is_reference_layout(state: Iterable[str]) -> bool:
    """Whether state dict keys are those of an ensemble of interaction experts, of any kind."""
    keys = list(state)
    prefixes = ("interaction_experts.", "interaction_expert.", "reweight.")
    return any(key.startswith(prefixes) for key in keys)


class AcceleratedMoE:
    """An FL-I2MoE or I2MoE whose coalitions run on the engine.

    Where sparse blocks have a limited capacity, ``inference`` respects it, as the module does, over the whole batch. In
    a game every token reaches its networks, unless ``capacity="reference"`` was asked for: what coalitions are worth
    should not depend on each other.

    Attributes
    ----------
    model : FLI2MoE
        A copy of the weights, on the module's device, in its dtype and in eval mode: what
        :func:`flmoe_fast.explain` and :class:`TokenGame` take.
    """

    def __init__(self, model: FLI2MoE):
        self.model = model

    def __repr__(self) -> str:
        config = self.model.config
        return (
            f"AcceleratedMoE({', '.join(config.modalities)}; {config.experts} experts of {config.layers} layers, "
            f"generation {config.generation!r})"
        )

    @torch.no_grad()
    def inference(
        self, inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None = None
    ) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
        """What the module's own ``inference`` returns.

        Parameters
        ----------
        inputs : M tensors (B, T_m, H)
            Encoded modalities.
        masks : M tensors (B, T_m), optional
            1 for valid tokens. None and masks of ones route differently, as in the module.

        Returns
        -------
        E expert logits (B, K), routing weights (B, E), mixture logits (B, K)
        """
        if isinstance(masks, Mapping) or (masks is not None and any(mask is None for mask in masks)):
            got = "a mapping" if isinstance(masks, Mapping) else "masks for some modalities only"
            raise ArgumentError("masks", got, "one mask for every modality, or None")
        model = _limited(self.model)
        with eval_mode(model):
            output = model(list(inputs), None if masks is None else list(masks))
        return list(output.expert_logits.unbind(1)), output.weights, output.logits

    def game(self, inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None = None, **options) -> TokenGame:
        """The game of one sample; ``options`` as for :class:`TokenGame`.

        Warns
        -----
        UserWarning
            The module's own inference leaves out tokens of this sample, for which its sparse blocks have no room, and
            the game does not.
        """
        game = TokenGame(self.model, inputs, masks=masks, **options)
        config = self.model.config
        if config.gate in ("gshard", "switch") and config.capacity == "none":
            self._warn_of_room(inputs, masks)
        return game

    def _warn_of_room(self, inputs: Sequence[torch.Tensor], masks: Sequence[torch.Tensor] | None) -> None:
        parameter = next(self.model.parameters())
        given = [part if part.dim() == 3 else part[None] for part in (torch.as_tensor(i) for i in inputs)]
        given = [part.to(parameter) for part in given]
        valid = None if masks is None else [mask.reshape(1, -1).to(parameter.device) for mask in masks]
        with torch.no_grad(), eval_mode(self.model):
            free = self.model(given, valid).logits
        published = self.inference(given, valid)[2]
        worst = _difference(published, free)
        if worst > TOLERANCE[parameter.dtype]:
            warnings.warn(
                f"inference leaves out tokens beyond the room of sparse blocks, the game does not: logits differ by "
                f"{worst:.1e}; accelerate(..., capacity='reference') makes games that leave them out",
                stacklevel=3,
            )


def accelerate_module(module: nn.Module, **given: object) -> AcceleratedMoE:
    """Take a live module in the reference layout, see :func:`flmoe_fast.accelerate`."""
    state = {key: value.detach() for key, value in module.state_dict().items()}
    try:
        model = model_from_state(
            {key: value.cpu() for key, value in state.items()}, type(module).__name__, **_facts(module, state, given)
        )
    except CheckpointError as problem:
        got = f"{type(module).__name__} with {problem.found} at {problem.key}"
        raise ArgumentError("module", got, problem.expected) from problem
    model = model.to(next(module.parameters()).device)
    _compare(module, model)
    return AcceleratedMoE(model)


def _facts(module: nn.Module, state: Mapping[str, torch.Tensor], given: Mapping[str, object]) -> dict[str, object]:
    """What the state dict does not tell: given, or read off the module."""
    facts = {"task": "regression" if _outputs(state) == 1 else "multiclass", **given}
    if any(".modality_gates." in key for key in state):
        got = f"a {type(module).__name__} with InterpretCC experts, whose gates draw random numbers in evaluation too"
        raise ArgumentError("module", got, "an inference that is a function of its inputs (its checkpoint does load)")
    experts = {key.split(".")[1] for key in state if key.startswith("interaction_experts.")}
    facts.setdefault("modalities", tuple(f"m{m}" for m in range(min(max(len(experts) - 2, 2), 8))))
    if "heads" not in facts:
        facts["heads"] = _number_of_heads(module)
    if "temperature" not in facts:
        facts["temperature"] = _temperature(module)
    gates = {name: part for name, part in module.named_modules() if name.endswith(".mlp.gate")}
    if any(".mlp.gate." in key for key in state):
        facts.update({name: value for name, value in _gate(gates, state).items() if name not in facts})
    return facts


def _outputs(state: Mapping[str, torch.Tensor]) -> int | None:
    """How many numbers an expert returns; None where its last layer is not where the published ones have it."""
    head = re.compile(
        r"interaction_experts\.0\.fusion_model\.(network\.\d+\.fc|classification_head\.fc|classifier\.2)\.weight"
    )
    return next((len(weight) for key, weight in state.items() if head.fullmatch(key)), None)


def _number_of_heads(module: nn.Module) -> int:
    found: dict[int, str] = {}
    for name, part in module.named_modules():
        if name.endswith(".attn"):
            number = next((getattr(part, a) for a in _HEADS if isinstance(getattr(part, a, None), int)), None)
            if number is not None:
                found.setdefault(number, name)
    if not found:
        raise ArgumentError("heads", None, f"the number of attention heads: no attn module has any of {_HEADS}")
    if len(found) > 1:
        got = " and ".join(f"{number} at {name}" for number, name in found.items())
        raise ArgumentError("module", f"different numbers of attention heads, {got}", "one number for all layers")
    return next(iter(found))


def _temperature(module: nn.Module) -> float:
    value = getattr(getattr(module, "reweight", None), "temperature", None)
    if value is None:
        raise ArgumentError("temperature", None, "the routing's temperature: the module has no reweight.temperature")
    return float(value)


def _gate(gates: Mapping[str, nn.Module], state: Mapping[str, torch.Tensor]) -> dict[str, object]:
    """Kind of the sparse blocks' gates, by the names of their classes, and how many networks a token uses."""
    if any(key.endswith(".mlp.gate.w_gate") for key in state):
        kinds = {"noisy"}
    else:
        kinds = {_GATES.get(type(gate).__name__, "") for gate in gates.values()}
    if len(kinds) != 1 or "" in kinds:
        names = ", ".join(sorted({type(gate).__name__ for gate in gates.values()}))
        raise ArgumentError("gate", None, f"the kind of the sparse blocks' gates, whose classes are {names or 'none'}")
    kind = kinds.pop()
    for name, gate in gates.items():
        if kind == "gshard" and getattr(gate, "random_routing", False):
            got = f"{name} with random_routing, which drops second choices at random in evaluation too"
            raise ArgumentError("module", got, "an inference that is a function of its inputs")
    facts: dict[str, object] = {"gate": kind}
    said = [getattr(gate, "top_k", None) for gate in gates.values()]
    slots = {int(top_k) for top_k in said if isinstance(top_k, int)}
    if kind in ("naive", "noisy") and len(slots) == 1:
        facts["top_k"] = slots.pop()
    return facts


def _limited(model: FLI2MoE) -> FLI2MoE:
    """The model with the capacity of sparse blocks as published: itself, or a twin that shares its weights.

    The model's own capacity is never touched, since games of it may be made in other threads meanwhile.
    """
    if model.config.gate is None or model.config.capacity == "reference":
        return model
    twin = copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})
    twin.set_capacity("reference")
    return twin


# ---- the module and its copy on the same inputs ----------------------------------------------------------------------


@torch.no_grad()
def _compare(module: nn.Module, model: FLI2MoE) -> None:
    """Raise :class:`ArgumentError` unless both give the same numbers, with masks and without; name the layer if not."""
    inference = getattr(module, "inference", None)
    if not callable(inference):
        raise ArgumentError("module", f"a {type(module).__name__} without an inference method", "inference(inputs)")
    config = model.config
    parameter = next(model.parameters())
    generator = torch.Generator().manual_seed(0)
    lengths = config.num_tokens or tuple(_TOKENS[m % len(_TOKENS)] for m in range(len(config.modalities)))
    inputs = [torch.randn(2, t, config.hidden, generator=generator).to(parameter) for t in lengths]
    cases: list[list[torch.Tensor] | None] = [None]
    if config.generation == "fl":
        partial = [torch.ones(2, t).to(parameter) for t in lengths]
        partial[0][1, -1] = 0.0
        cases.append(partial)
    for masks in cases:
        theirs, ours = _Trace(module), _Trace(model)
        with eval_mode(module), theirs, torch.random.fork_rng(devices=_devices(parameter)):
            found = inference(inputs) if masks is None else inference(inputs, masks)
        with ours:
            expected = AcceleratedMoE(model).inference(inputs, masks)
        try:
            experts, weights, mixture = found
            pairs = [*zip(experts, expected[0], strict=True), (weights, expected[1]), (mixture, expected[2])]
        except (TypeError, ValueError) as problem:
            got = f"a {type(module).__name__} whose inference returns {type(found).__name__}"
            raise ArgumentError("module", got, "(list of expert logits, routing weights, mixture logits)") from problem
        worst = max(_difference(a, b) for a, b in pairs)
        if not worst <= TOLERANCE[parameter.dtype]:
            published = _EXPECTED[config.generation]
            if config.gate in ("gshard", "switch"):
                published += "; sparse blocks that serve tokens in their order, as far as their capacity goes"
            raise ArgumentError("module", _where(theirs, ours, worst, parameter.dtype, masks), published)


_EXPECTED = {
    "fl": "the published layer: pre-norm blocks with residuals, exact GELU, LayerNorm eps 1e-5, sinusoidal positions",
    "original": "the published layer: the attention output added to itself, exact GELU, LayerNorm eps 1e-5",
}


class _Trace:
    """Outputs of the experts' layers and of the routing while a module runs, by name, as (B, L, X) or (B, X)."""

    def __init__(self, module: nn.Module):
        self.module = module
        self.seen: dict[str, torch.Tensor] = {}
        self._hooks: list = []

    def __enter__(self) -> _Trace:
        for name, part in self.module.named_modules():
            stem, _, leaf = name.rpartition(".")
            layers = stem.endswith((".fusion_model.network", ".fusion_model.layers")) and leaf.isdigit()
            if name == "reweight" or layers:
                self._hooks.append(part.register_forward_hook(self._keep(name)))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _keep(self, name: str):
        def keep(part: nn.Module, args: tuple, output: object) -> None:
            if isinstance(output, list):  # one tensor a modality
                output = torch.cat(output, dim=1)
            if isinstance(output, tuple):  # a layer's output and its attention
                output = output[0]
            if isinstance(output, torch.Tensor):
                self.seen.setdefault(name, output)

        return keep


def _where(theirs: _Trace, ours: _Trace, worst: float, dtype: torch.dtype, masks: list[torch.Tensor] | None) -> str:
    """Which layer parts first; padded tokens are not compared."""
    valid = None if masks is None else torch.cat(masks, dim=1).bool()
    for name, mine in ours.seen.items():
        other = theirs.seen.get(name)
        if other is None or other.shape != mine.shape:
            continue
        if valid is not None and mine.dim() == 3:
            mine, other = mine[valid], other[valid]
        error = _difference(other, mine)
        if not error <= TOLERANCE[dtype]:
            part = dict(theirs.module.named_modules())[name]
            return f"{name} ({type(part).__name__}), whose output differs from the published layer's by {error:.1e}"
    return f"a {type(theirs.module).__name__} whose results differ by {worst:.1e} although its layers agree"


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference relative to the largest number; infinite for other shapes."""
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))


def _devices(parameter: torch.Tensor) -> list[torch.device]:
    return [parameter.device] if parameter.device.type == "cuda" else []
