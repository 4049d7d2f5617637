"""The FL-I2MoE network (arXiv 2603.13326) and its ancestor I2MoE (ICML 2025), written out plainly.

This is the reference that everything faster in the package is compared with, so each step is a line of ordinary
tensor algebra and every expert runs on its own. It runs in float32 and, for comparisons, in float64.

Symbols: B samples, M modalities, T_m (padded) tokens of modality m, L = sum of T_m, H hidden width, h heads,
E = M + 2 experts, C classes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from flmoe_fast.checks import LARGEST_FEATURE, ArgumentError, finite, integer, shape
from flmoe_fast.model.blocks import MLP, Attention, ClassificationHead
from flmoe_fast.model.config import TEXT_MODALITIES, FLI2MoEConfig
from flmoe_fast.model.interpretcc import InterpretCC
from flmoe_fast.model.moepp import MoEPlusPlus
from flmoe_fast.model.sparse import LinearGate, SparseMLP


class FLI2MoEOutput(NamedTuple):
    """What one forward returns.

    Attributes
    ----------
    logits : Tensor
        (B, C), the mixture: the experts' logits weighted by ``weights`` and summed.
    expert_logits : Tensor
        (B, E, C), logits of each expert alone.
    weights : Tensor
        (B, E), routing weights, each row summing to 1.
    latents : Tensor
        (B, E, M*H), pooled representation of each expert, modality after modality.
    """

    logits: Tensor
    expert_logits: Tensor
    weights: Tensor
    latents: Tensor


def sinusoid(length: int, hidden: int, *, dtype: torch.dtype, device: torch.device | str = "cpu") -> Tensor:
    """Fixed position encoding (length, hidden): ``[p, 2j] = sin(p / 10000^(2j/H))``, ``[p, 2j+1]`` the cosine.

    Computed in float64 and rounded once to ``dtype``: in float32 the angle itself would lose digits at large p.
    """
    length, hidden = integer("length", length, least=1), integer("hidden", hidden, least=2)
    if hidden % 2:
        raise ArgumentError("hidden", hidden, "an even number")
    position = torch.arange(length, dtype=torch.float64)[:, None]
    exponent = torch.arange(0, hidden, 2, dtype=torch.float64) / hidden
    angle = position / 10000.0**exponent
    return torch.stack((angle.sin(), angle.cos()), dim=-1).reshape(length, hidden).to(device=device, dtype=dtype)


def masked_mean(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """Mean over tokens, (B, T, H) -> (B, H), counting only those whose ``mask`` (B, T) is nonzero.

    A sample without any valid token gets zeros. ``None`` means a plain mean.
    """
    if mask is None:
        return tokens.mean(dim=1)
    valid = mask.bool()
    # masked_fill rather than a product, so that not even an infinity in the padding can reach the sum.
    total = tokens.masked_fill(~valid[:, :, None], 0.0).sum(dim=1)
    return total / valid.sum(dim=1, keepdim=True).clamp(min=1).to(tokens.dtype)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode inside the ``with`` block; each module's own mode is restored afterwards.

    Blocks may be nested, or run in several threads: a module gets its mode back when the last of them ends.
    """
    modules = list(model.modules())
    with _modes_lock:
        for module in modules:
            mode, blocks = _modes.get(module, (module.training, 0))
            _modes[module] = mode, blocks + 1
        model.eval()
    try:
        yield
    finally:
        with _modes_lock:
            for module in modules:
                mode, blocks = _modes.pop(module)
                if blocks > 1:
                    _modes[module] = mode, blocks - 1
                else:
                    module.training = mode


#: Modules that are in eval mode for a while: their own mode, and how many blocks of :func:`eval_mode` they are in.
_modes: dict[nn.Module, tuple[bool, int]] = {}
_modes_lock = threading.Lock()


class EncoderLayer(nn.Module):
    """Attention and feed-forward block.

    ``input_residual=True`` is the usual pre-norm block, ``x + attn(norm1(x))``. ``False`` is the block of the
    original I2MoE, whose residual adds the attention output to itself: ``a + dropout(a)`` with
    ``a = attn(norm1(x))``, that is ``2 a`` in eval mode. Both then add ``mlp(norm2(y))`` to ``y``.
    """

    def __init__(self, config: FLI2MoEConfig, layer: int):
        super().__init__()
        hidden, wide, dropout = config.hidden, config.ffn_multiple * config.hidden, config.dropout
        self.input_residual = config.generation == "fl"
        self.norm1 = nn.LayerNorm(hidden, eps=1e-5)
        self.norm2 = nn.LayerNorm(hidden, eps=1e-5)
        self.dropout1 = nn.Dropout(dropout)
        self.dropout2 = nn.Dropout(dropout)
        self.attn = Attention(hidden, config.heads, dropout)
        self.mlp: SparseMLP | MLP
        if layer in config.sparse_layers:
            self.mlp = SparseMLP(config)
        else:
            self.mlp = MLP((hidden, wide, hidden), nn.GELU, dropout)  # nn.GELU() is the exact erf form

    def forward(
        self,
        x: Tensor,
        key_mask: Tensor | None,
        lengths: Sequence[int] | None = None,
        balance: list | None = None,
        passes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """(B, L, H) -> (B, L, H) and the attention (B, h, L, L). Only sparse blocks read the other arguments."""
        attended, attention = self.attn(self.norm1(x), key_mask)
        x = (x if self.input_residual else attended) + self.dropout1(attended)
        return x + self.dropout2(self.feed_forward(self.norm2(x), lengths, balance, passes)), attention

    def feed_forward(self, x: Tensor, lengths: Sequence[int] | None, balance: list | None, passes: int) -> Tensor:
        """The feed-forward block alone, on normalised tokens (B, L, H)."""
        if not isinstance(self.mlp, SparseMLP):
            # One shared feed-forward for all modalities acts on each token by itself, so no split is needed.
            return self.mlp(x)
        # Tokens compete and are balanced within their modality, so here the split matters.
        parts = [self.mlp(part, passes) for part in x.split(list(lengths or x.shape[1:2]), dim=1)]
        if balance is not None:
            # A linear gate keeps the loss of its last call only; a noisy gate adds up.
            losses = [loss for _, loss in parts]
            balance.append(torch.stack(losses).sum(dim=0) if self.mlp.adds_losses else losses[-1])
        return torch.cat([part for part, _ in parts], dim=1)


class FusionTransformer(nn.Module):
    """Joint encoder over the concatenated tokens of all modalities, pooled per modality and classified."""

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.generation = config.generation
        if config.generation == "original":
            self.pos_embed = nn.Parameter(torch.zeros(1, sum(config.num_tokens or ()), config.hidden))
        self.network = nn.ModuleList(EncoderLayer(config, layer) for layer in range(config.layers))
        self.network.append(ClassificationHead(len(config.modalities) * config.hidden, config.classes))

    def forward(
        self,
        features: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        attention: list | None = None,
        balance: list | None = None,
        passes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`InteractionExpert.forward`."""
        lengths = [f.shape[1] for f in features]
        x = torch.cat(tuple(features), dim=1)
        # A token's position counts the padding before it, so it depends on how far earlier modalities are padded.
        if self.generation == "original":
            x = x + self.pos_embed
        else:
            x = x + sinusoid(x.shape[1], x.shape[2], dtype=x.dtype, device=x.device)
        key_mask = None
        if masks is not None:
            key_mask = torch.cat(tuple(mask.bool() for mask in masks), dim=1)
            x = x.masked_fill(~key_mask[:, :, None], 0.0)
        *layers, head = self.network
        for layer in layers:
            x, softmax = layer(x, key_mask, lengths, balance, passes)
            if attention is not None:
                attention.append(softmax)
        segments = x.split(lengths, dim=1)
        pooled = [masked_mean(segment, None if masks is None else masks[m]) for m, segment in enumerate(segments)]
        latent = torch.cat(pooled, dim=-1)
        return head(latent), latent


#: What an expert is made of, by the configuration's ``fusion``.
FUSION_MODELS = {"transformer": FusionTransformer, "interpretcc": InterpretCC, "moepp": MoEPlusPlus}


class InteractionExpert(nn.Module):
    """One expert: its own copy of the fusion model."""

    def __init__(self, fusion_model: nn.Module):
        super().__init__()
        self.fusion_model = fusion_model

    def forward(
        self,
        features: Sequence[Tensor],
        masks: Sequence[Tensor] | None = None,
        attention: list | None = None,
        balance: list | None = None,
        passes: int = 1,
    ) -> tuple[Tensor, Tensor]:
        """Run this expert alone.

        Parameters
        ----------
        features : sequence of Tensor
            M tensors (B, T_m, H).
        masks : sequence of Tensor, optional
            M masks (B, T_m), nonzero for valid tokens, or ``None``.
        attention : list, optional
            A list to which every layer appends its softmax (B, h, L, L), part of the graph. Only the last layer of a
            MoE++ expert, and none of an InterpretCC expert.
        balance : list, optional
            A list to which every sparse layer appends its load-balancing losses (P,), part of the graph.
        passes : int
            P, where the batch is that many batches one after another. Tokens of different passes neither compete for
            capacity nor are balanced together; nothing else depends on it.

        Returns
        -------
        tuple[Tensor, Tensor]
            Logits (B, C) and the pooled latent (B, M*H). Inputs are not checked here but in
            :meth:`FLI2MoE.check_inputs`; the attention of a sample whose keys are all masked is NaN.
        """
        return self.fusion_model(features, masks, attention, balance, passes)


class Reweighting(nn.Module):
    """Routing weights from the modalities' mean features."""

    def __init__(self, config: FLI2MoEConfig):
        super().__init__()
        self.temperature = config.temperature
        hidden = (config.reweight_hidden,) * (config.reweight_layers - 1)
        self.mlp = MLP((len(config.modalities) * config.hidden, *hidden, config.experts), nn.ReLU, config.dropout)
        if config.routing == "average":
            # A layer that ignores its input leaves its bias: the softmax of E free numbers, and one kind of network.
            (linear,) = self.mlp.network
            assert isinstance(linear, nn.Linear)
            nn.init.zeros_(linear.weight).requires_grad_(False)
            nn.init.zeros_(linear.bias)

    def forward(self, features: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> Tensor:
        """(B, T_m, H) features without position encoding, and masks (B, T_m) or ``None`` -> weights (B, E).

        With masks each modality's mean is scaled to unit length; without masks it is not. Masks of ones therefore
        route differently from no masks.
        """
        means = [masked_mean(f, None if masks is None else masks[m]) for m, f in enumerate(features)]
        if masks is not None:
            means = [functional.normalize(mean, dim=-1, eps=1e-12) for mean in means]
        return (self.mlp(torch.cat(means, dim=-1)) / self.temperature).softmax(dim=-1)


class FLI2MoE(nn.Module):
    """Interaction mixture of experts over token sequences: M uniqueness experts, one synergy, one redundancy expert.

    All experts start as copies of one fusion model. Without the encoders, the names and the order of
    ``state_dict()`` are those of the published checkpoints (see :meth:`ensemble_state_dict`).

    Parameters
    ----------
    config : FLI2MoEConfig
        Shapes and hyper-parameters.
    encoders : Mapping[str, nn.Module], optional
        One module per modality name, mapping that modality's raw input to (B, T_m, H); ``None`` or empty for a model
        that is fed features directly.

    Source: arXiv 2603.13326 (generation ``"fl"``); I2MoE, ICML 2025 (generation ``"original"``).
    """

    def __init__(self, config: FLI2MoEConfig, encoders: Mapping[str, nn.Module] | None = None):
        super().__init__()
        if not isinstance(config, FLI2MoEConfig):
            raise ArgumentError("config", type(config).__name__, "an FLI2MoEConfig")
        self.config = config
        fusion = FUSION_MODELS[config.fusion](config)
        self.reweight = Reweighting(config)
        self.interaction_experts = nn.ModuleList(
            InteractionExpert(copy.deepcopy(fusion)) for _ in range(config.experts)
        )
        self.encoders = nn.ModuleDict(_ordered_encoders(config, encoders or {}))
        self.feature_means: list[Tensor] | None = None  # no buffer: published state dicts have no such key

    def ensemble_state_dict(self) -> dict[str, Tensor]:
        """State dict without the encoders: ``reweight.*`` first, then ``interaction_experts.{e}.*``."""
        return {key: value for key, value in self.state_dict().items() if not key.startswith("encoders.")}

    def set_capacity(self, capacity: str) -> None:
        """Change ``config.capacity``: whether the gates of sparse feed-forward blocks limit how many tokens they serve.

        With ``"reference"`` the result for a sample depends on the other samples of its batch, as in the published
        code; probes evaluate every coalition as a batch of one.
        """
        self.config = dataclasses.replace(self.config, capacity=capacity)
        for module in self.modules():
            if isinstance(module, LinearGate):
                module.limited = self.config.slots_limit

    def encode(self, inputs: Sequence | Mapping) -> list[Tensor]:
        """Apply the encoders.

        Parameters
        ----------
        inputs : Sequence | Mapping
            One raw input per modality, in the order of ``config.modalities`` or keyed by their names.

        Returns
        -------
        list of Tensor
            M features (B, T_m, H).

        Raises
        ------
        ArgumentError
            The model has no encoders, or an input is missing or unknown.
        """
        names = self.config.modalities
        if not self.encoders:
            raise ArgumentError("encoders", "a model without encoders", f"an encoder for each of {names}")
        if isinstance(inputs, Mapping):
            if set(inputs) != set(names):
                raise ArgumentError("inputs", f"keys {sorted(map(str, inputs))}", f"exactly the keys {names}")
            inputs = [inputs[name] for name in names]
        if not isinstance(inputs, (list, tuple)) or len(inputs) != len(names):
            raise ArgumentError("inputs", _describe(inputs), f"one input for each of {names}")
        return [self.encoders[name](value) for name, value in zip(names, inputs, strict=True)]

    def set_feature_means(self, features: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> None:
        """Remember the mean valid token (H,) of each modality, which stands for an absent token in probes.

        The start symbol of a text, which is never absent, does not count.

        Parameters
        ----------
        features : sequence of Tensor
            M encoded modalities (N, T_m, H), of the training set.
        masks : sequence of Tensor, optional
            M masks (N, T_m), nonzero for valid tokens, or ``None``.

        Raises
        ------
        ArgumentError
            As :meth:`forward`, or a modality without any valid token.
        """
        self.check_inputs(features, masks)
        means = []
        for m, feature in enumerate(features):
            tokens = self.tokens_in_play(m, feature.detach(), None if masks is None else masks[m])
            if not len(tokens):
                raise ArgumentError(f"masks[{m}]", "no valid token in any sample", "at least one valid token")
            means.append(tokens.double().mean(dim=0).to(tokens.dtype))
        self.feature_means = means

    def tokens_in_play(self, modality: int, feature: Tensor, mask: Tensor | None) -> Tensor:
        """The tokens (S, H) of a modality (N, T, H) that probes may make absent: valid, and no start of a text."""
        if self.config.modalities[modality] in TEXT_MODALITIES and feature.shape[1] > 1:
            feature, mask = feature[:, 1:], None if mask is None else mask[:, 1:]
        return feature.flatten(0, 1) if mask is None else feature[mask.bool()]

    def check_inputs(self, features: Sequence[Tensor], masks: Sequence[Tensor] | None = None) -> None:
        """Raise :class:`ArgumentError` unless :meth:`forward` can run on these arguments and give finite numbers."""
        names, parameter = self.config.modalities, next(self.reweight.parameters())
        _check_list("features", features, names)
        batch = features[0].shape[0] if features[0].dim() else None
        for m, feature in enumerate(features):
            shape(f"features[{m}]", feature, (batch, self._tokens(m), self.config.hidden), "(B, T, H)")
            if 0 in feature.shape:
                raise ArgumentError(f"features[{m}]", f"shape {tuple(feature.shape)}", "at least one sample and token")
            if feature.dtype != parameter.dtype:
                raise ArgumentError(f"features[{m}]", feature.dtype, f"the model's dtype {parameter.dtype}")
            _check_device(f"features[{m}]", feature, parameter)
        if masks is None:
            for m, feature in enumerate(features):
                finite(f"features[{m}]", feature.detach(), LARGEST_FEATURE)
            return
        if self.config.generation == "original":
            raise ArgumentError("masks", "masks", "None: generation 'original' has no key masks")
        _check_list("masks", masks, names)
        for m, (feature, mask) in enumerate(zip(features, masks, strict=True)):
            shape(f"masks[{m}]", mask, tuple(feature.shape[:2]), "(B, T)")
            _check_device(f"masks[{m}]", mask, parameter)
            if not bool(((mask == 0) | (mask == 1)).all()):
                raise ArgumentError(f"masks[{m}]", "values other than 0 and 1", "1 for valid tokens and 0 for padding")
            finite(f"features[{m}]", feature.detach().masked_fill(~mask.bool()[:, :, None], 0.0), LARGEST_FEATURE)
        empty = ~torch.cat([mask.bool() for mask in masks], dim=1).any(dim=1)
        if bool(empty.any()):
            first = int(empty.nonzero()[0])
            raise ArgumentError("masks", f"no valid token in sample {first}", "at least one valid token per sample")

    def _tokens(self, m: int) -> int | None:
        return None if self.config.num_tokens is None else self.config.num_tokens[m]

    def forward(
        self, features: Sequence[Tensor], masks: Sequence[Tensor] | None = None, passes: int = 1
    ) -> FLI2MoEOutput:
        """Run all experts and mix them.

        Parameters
        ----------
        features : sequence of Tensor
            M encoded modalities (B, T_m, H) in the model's dtype. Padding counts in positions: padding a modality
            further moves the tokens of the modalities after it.
        masks : sequence of Tensor, optional
            M masks (B, T_m) of any dtype with 1 for valid tokens and 0 for padding, or ``None`` (generation
            ``"original"`` takes only ``None``). What the features hold at padded tokens has no effect.
        passes : int
            How many batches, one after another, B stands for: 1 for one batch, B for samples on their own. It matters
            where tokens compete for capacity, see :attr:`FLI2MoEConfig.slots_limit`, and nowhere else.

        Returns
        -------
        FLI2MoEOutput
            :class:`FLI2MoEOutput`.

        Raises
        ------
        ArgumentError
            Wrong number, shape, dtype or device of tensors, non-finite valid features, mask values other than 0 and 1,
            or a sample without any valid token.
        """
        self.check_inputs(features, masks)
        integer("passes", passes, least=1)
        if features[0].shape[0] % passes:
            raise ArgumentError("passes", passes, f"a divisor of the {features[0].shape[0]} samples")
        runs = [expert(features, masks, passes=passes) for expert in self.interaction_experts]
        expert_logits = torch.stack([logits for logits, _ in runs], dim=1)
        latents = torch.stack([latent for _, latent in runs], dim=1)
        weights = self.reweight(features, masks)
        logits = (weights[:, :, None] * expert_logits).sum(dim=1)
        return FLI2MoEOutput(logits, expert_logits, weights, latents)


def _ordered_encoders(config: FLI2MoEConfig, encoders: Mapping[str, nn.Module]) -> dict[str, nn.Module]:
    if not encoders:
        return {}
    if set(encoders) != set(config.modalities):
        raise ArgumentError("encoders", f"keys {sorted(map(str, encoders))}", f"exactly the keys {config.modalities}")
    for name in config.modalities:
        if not isinstance(encoders[name], nn.Module):
            raise ArgumentError(f"encoders[{name!r}]", type(encoders[name]).__name__, "a torch.nn.Module")
        if hasattr(nn.ModuleDict(), name):
            raise ArgumentError("modalities", repr(name), "a name that is no attribute of torch.nn.ModuleDict")
    return {name: encoders[name] for name in config.modalities}


def _describe(value: object) -> str:
    if isinstance(value, Tensor):
        return f"one tensor of shape {tuple(value.shape)}"
    return f"{len(value)} items" if hasattr(value, "__len__") else type(value).__name__


def _check_list(name: str, tensors: Sequence[Tensor], modalities: tuple[str, ...]) -> None:
    if not isinstance(tensors, (list, tuple)) or len(tensors) != len(modalities):
        raise ArgumentError(name, _describe(tensors), f"a list of {len(modalities)} tensors, for {modalities}")
    for m, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor):
            raise ArgumentError(f"{name}[{m}]", type(tensor).__name__, "a torch.Tensor")


def _check_device(name: str, tensor: Tensor, parameter: Tensor) -> None:
    if tensor.device != parameter.device:
        raise ArgumentError(name, f"device {tensor.device}", f"the model's device {parameter.device}")
