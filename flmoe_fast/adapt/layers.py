"""Encoder layers of other people's models, recognised by their parts and read into one form.

A plain encoder layer has one self-attention with separate or stacked query, key and value projections, an output
projection, a two-layer feed-forward block and two LayerNorms, before the sub-blocks or after their residuals. What the
parts are called differs from model to model; nothing else may. A layer with any other parameter is refused, and what
has been read is compared with what the layer computes before it is used (:mod:`flmoe_fast.adapt.tower`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.stack import Layer, Norm, Stack

# What each part is called. A layer is read when exactly one name of every role exists in it.
_QUERY = (
    "attention.self.query",
    "attention.attention.query",
    "attention.query",
    "attention.q_proj",
    "self_attn.q_proj",
    "attention.q_lin",
)
_KEY_AFTER = {"query": "key", "q_proj": "k_proj", "q_lin": "k_lin"}
_VALUE_AFTER = {"query": "value", "q_proj": "v_proj", "q_lin": "v_lin"}
_OUT = (
    "attention.output.dense",
    "attention.o_proj",
    "attention.out_proj",
    "self_attn.out_proj",
    "self_attn.o_proj",
    "attention.out_lin",
)
_UP = ("intermediate.dense", "mlp.fc1", "ffn.lin1", "linear1")
_DOWN = ("output.dense", "mlp.fc2", "ffn.lin2", "linear2")
#: The first and second LayerNorm, and whether they come before the sub-blocks (None: the layer's norm_first says so).
_NORMS = (
    ("attention.output.LayerNorm", "output.LayerNorm", False),
    ("sa_layer_norm", "output_layer_norm", False),
    ("attention.LayerNorm", "intermediate.LayerNorm", True),
    ("attention.ln", "ln", True),
    ("layernorm_before", "layernorm_after", True),
    ("layer_norm1", "layer_norm2", True),
    ("norm1", "norm2", None),
)
_ACTIVATION = ("intermediate.intermediate_act_fn", "mlp.activation_fn", "ffn.activation", "activation")
#: Factors (H,) on the output of the attention and of the feed-forward block, where a layer has them.
_SCALES = (("layer_scale1.lambda1", "layer_scale2.lambda1"), ("lambda_1", "lambda_2"))
_HEADS = ("num_attention_heads", "num_heads", "n_heads")


class Unsupported(ArgumentError):
    """A model that the encoder engine cannot take; the message names the layer and says why."""


@dataclass(frozen=True)
class LayerParts:
    """The weights of one encoder layer as ``x @ W.T + b`` has them, detached, in the model's dtype.

    Shapes: query, key and value (D, H) with biases (D,), out (H, D), up (F, H), down (H, F); D = heads * head width.
    Norms are (weight, bias, eps).
    """

    heads: int
    pre: bool  # LayerNorm before each sub-block; otherwise after the residual
    qkv: tuple[tuple[torch.Tensor, torch.Tensor], ...]
    out: tuple[torch.Tensor, torch.Tensor]
    norm1: tuple[torch.Tensor, torch.Tensor, float]
    up: tuple[torch.Tensor, torch.Tensor]
    down: tuple[torch.Tensor, torch.Tensor]
    norm2: tuple[torch.Tensor, torch.Tensor, float]
    activation: Callable[[torch.Tensor], torch.Tensor]

    def attend(self, x: torch.Tensor, allowed: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The layer's output (C, L, H) and its attention (C, h, L, L), written out so that both can be differentiated.

        ``allowed`` (L, L) bool says which query may attend to which key; None: everybody to everybody.
        """

        def norm(x: torch.Tensor, part: tuple[torch.Tensor, torch.Tensor, float]) -> torch.Tensor:
            return F.layer_norm(x, x.shape[-1:], *part[:2], eps=part[2])

        read = norm(x, self.norm1) if self.pre else x
        q, k, v = (F.linear(read, *part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv)
        scores = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if allowed is not None:
            scores = scores.masked_fill(~allowed.to(scores.device), -torch.inf)
        attention = scores.softmax(-1)
        x = x + F.linear((attention @ v).transpose(1, 2).flatten(2), *self.out)
        x = x if self.pre else norm(x, self.norm1)
        read = norm(x, self.norm2) if self.pre else x
        x = x + F.linear(self.activation(F.linear(read, *self.up)), *self.down)
        return x if self.pre else norm(x, self.norm2), attention


def read_layer(layer: nn.Module, name: str) -> LayerParts:
    """The parts of one layer.

    Raises
    ------
    Unsupported
        A part is missing or of another kind, or there are parameters that a plain encoder layer does not have.
    """
    what = f"{name} ({type(layer).__name__})"
    parameters = dict(layer.named_parameters())
    used: set[str] = set()

    def find(role: str, names: tuple[str, ...]) -> str:
        found = [path for path in names if _at(layer, path) is not None]
        if len(found) != 1:
            got = f"no {role}" if not found else f"several candidates for its {role}: {', '.join(found)}"
            raise Unsupported("model", f"{what} with {got}", f"an encoder layer whose {role} is one of {names}")
        return found[0]

    def linear(path: str) -> tuple[torch.Tensor, torch.Tensor]:
        module = _at(layer, path)
        if not isinstance(module, nn.Linear):
            raise Unsupported("model", f"{what} whose {path} is a {type(module).__name__}", "a linear layer")
        used.update({f"{path}.weight", f"{path}.bias"})
        weight = module.weight.detach()
        return weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()

    def norm(path: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        module = _at(layer, path)
        if not isinstance(module, nn.LayerNorm) or len(module.normalized_shape) != 1 or module.weight is None:
            raise Unsupported("model", f"{what} whose {path} is a {type(module).__name__}", "a LayerNorm with a gain")
        used.update({f"{path}.weight", f"{path}.bias"})
        weight = module.weight.detach()
        return weight, torch.zeros_like(weight) if module.bias is None else module.bias.detach(), float(module.eps)

    attention: object = getattr(layer, "self_attn", None)
    if isinstance(attention, nn.MultiheadAttention):
        qkv = _stacked(attention, what)
        used.update({"self_attn.in_proj_weight", "self_attn.in_proj_bias"})
        if not attention.batch_first:
            raise Unsupported("model", f"{what} with batch_first=False", "batch_first=True")
    else:
        query = find("query projection", _QUERY)
        stem, leaf = query.rsplit(".", 1)
        attention = _at(layer, stem)
        paths = (query, f"{stem}.{_KEY_AFTER[leaf]}", f"{stem}.{_VALUE_AFTER[leaf]}")
        for path in paths[1:]:
            find(f"projection {path}", (path,))
        qkv = tuple(linear(path) for path in paths)
    heads = [int(getattr(attention, attribute)) for attribute in _HEADS if hasattr(attention, attribute)]
    if not heads or len(qkv[0][0]) % heads[0]:
        raise Unsupported("model", f"{what} without a number of attention heads", f"one of {_HEADS}")
    first, second, pre = _norms(layer, what)
    out, up, down = (linear(find(role, names)) for role, names in (("output projection", _OUT), *_FEED_FORWARD))
    for scales in _SCALES:
        if all(path in parameters for path in scales):
            out, down = (_scaled(part, parameters[path].detach()) for part, path in zip((out, down), scales))
            used.update(scales)
    activation = _at(layer, find("activation", _ACTIVATION))
    norm1, norm2 = norm(first), norm(second)
    others = sorted(set(parameters) - used)
    if others:
        got = f"{what} with the parameters {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
        raise Unsupported("model", got, "a plain encoder layer, which has no such parameters")
    if not callable(activation):
        raise Unsupported("model", f"{what} whose activation is a {type(activation).__name__}", "a function")
    return LayerParts(heads[0], pre, qkv, out, norm1, up, down, norm2, activation)


_FEED_FORWARD = (("first feed-forward projection", _UP), ("second feed-forward projection", _DOWN))


def _at(module: nn.Module, path: str) -> object | None:
    found: object | None = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def _stacked(attention: nn.MultiheadAttention, what: str) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """Query, key and value of PyTorch's own attention module."""
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise Unsupported("model", f"{what} with an attention of another kind", "one width and no extra keys")
    weight, given = attention.in_proj_weight.detach(), attention.in_proj_bias
    bias = weight.new_zeros(len(weight)) if given is None else given.detach()
    return tuple(zip(weight.chunk(3), bias.chunk(3)))


def _norms(layer: nn.Module, what: str) -> tuple[str, str, bool]:
    found = [names for names in _NORMS if all(_at(layer, path) is not None for path in names[:2])]
    if len(found) != 1:
        raise Unsupported("model", f"{what} with {len(found)} known pairs of norms", "two LayerNorms of known names")
    first, second, pre = found[0]
    return first, second, bool(getattr(layer, "norm_first", True)) if pre is None else pre


def _scaled(part: tuple[torch.Tensor, torch.Tensor], factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return part[0] * factor[:, None], part[1] * factor


def fold(parts: Sequence[LayerParts]) -> Stack:
    """Layers as one stack, for the engines."""
    first = parts[0]
    probe = torch.linspace(-8, 8, 257, dtype=torch.float64)
    with torch.no_grad():
        exact = torch.equal(first.activation(probe), F.gelu(probe))
    layers = tuple(_folded(part) for part in parts)
    return Stack(layers, first.heads, pre=first.pre, activation=None if exact else first.activation)


def _folded(parts: LayerParts) -> Layer:
    def exact(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device="cpu", dtype=torch.float64)

    (q, q_bias), (k, _), (v, v_bias) = ((exact(w), exact(b)) for w, b in parts.qkv)
    scale = (len(q) // parts.heads) ** -0.5
    q, q_bias = q * scale, q_bias * scale
    out, out_bias = (exact(t) for t in parts.out)
    up, up_bias = (exact(t) for t in parts.up)
    (gain1, shift1), (gain2, shift2) = ((exact(gain), exact(shift)) for gain, shift, _ in (parts.norm1, parts.norm2))
    norms = [
        Norm(norm[2]) if parts.pre else Norm(norm[2], gain[None, None], shift[None, None])
        for norm, gain, shift in ((parts.norm1, gain1, shift1), (parts.norm2, gain2, shift2))
    ]
    if parts.pre:
        q_bias, v_bias = q_bias + q @ shift1, v_bias + v @ shift1
        q, k, v = q * gain1, k * gain1, v * gain1
        up_bias = up_bias + up @ shift2
        up = up * gain2
    return Layer(
        qkv=torch.cat([q, k, v]).T[None].contiguous(),
        q_bias=q_bias[None, None],
        out=out.T[None].contiguous(),
        out_bias=(out_bias + out @ v_bias)[None, None],
        up=up.T[None].contiguous(),
        up_bias=up_bias[None, None],
        down=exact(parts.down[0]).T[None].contiguous(),
        down_bias=exact(parts.down[1])[None, None],
        norm1=norms[0],
        norm2=norms[1],
    )
