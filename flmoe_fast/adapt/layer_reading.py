"""Finding the parts of an encoder layer in somebody else's module, by what they are called.

What the parts are called differs from model to model. A layer with any parameter that has no role is refused.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.layers import LayerParts, NormParts, Unsupported

# What each part is called. A layer is read when exactly one name of every role exists in it.
_QUERY = (
    "attention.self.query",
    "attention.self.query_proj",
    "attention.attention.query",
    "attention.query",
    "attention.q_proj",
    "self_attn.q_proj",
    "attention.q_lin",
    "attention.attn.q",
    "layer.0.SelfAttention.q",
)
#: Query, key and value in one projection, and whether those of a head lie together.
_STACKED = (("attn.Wqkv", False), ("self_attn.qkv", False), ("attention.self.in_proj", True))
_OUT = (
    "attention.output.dense",
    "attention.o_proj",
    "attention.out_proj",
    "self_attn.out_proj",
    "self_attn.o_proj",
    "attention.out_lin",
    "attention.attn.o",
    "attention.dense",
    "attn.Wo",
    "self_attn.projection",
    "layer.0.SelfAttention.o",
)
_UP = (
    "intermediate.dense",
    "mlp.fc1",
    "ffn.lin1",
    "linear1",
    "mlp.Wi",
    "mlp.up_proj",
    "ffn",
    "fc1",
    "layer.1.DenseReluDense.wi",
    "layer.1.DenseReluDense.wi_1",
)
#: What goes through the activation where the first projection multiplies it; "" is its own first half.
_GATES = {"mlp.up_proj": "mlp.gate_proj", "layer.1.DenseReluDense.wi_1": "layer.1.DenseReluDense.wi_0", "mlp.Wi": ""}
_DOWN = (
    "output.dense",
    "mlp.fc2",
    "ffn.lin2",
    "linear2",
    "mlp.Wo",
    "mlp.down_proj",
    "ffn_output",
    "fc2",
    "layer.1.DenseReluDense.wo",
)
#: The first and second norm, and whether they come before the sub-blocks; "?" where their names do not tell.
_NORMS: tuple[tuple[str, str, bool | str], ...] = (
    ("attention.output.LayerNorm", "output.LayerNorm", False),
    ("attention.LayerNorm", "output.LayerNorm", False),
    ("attention.LayerNorm", "full_layer_layer_norm", False),
    ("sa_layer_norm", "output_layer_norm", False),
    ("post_attention_layernorm", "post_mlp_layernorm", False),
    ("attention.LayerNorm", "intermediate.LayerNorm", True),
    ("attention.self_attn_layer_norm", "LayerNorm", True),
    ("attention.ln", "ln", True),
    ("layernorm_before", "layernorm_after", True),
    ("layer_norm1", "layer_norm2", True),
    ("attn_norm", "mlp_norm", True),
    ("input_layernorm", "post_attention_layernorm", True),
    ("layer.0.layer_norm", "layer.1.layer_norm", True),
    ("norm1", "norm2", "norm_first"),
    ("self_attn_layer_norm", "final_layer_norm", "?"),
)
_ACTIVATION = (
    "intermediate.intermediate_act_fn",
    "mlp.activation_fn",
    "ffn.activation",
    "activation",
    "mlp.act",
    "mlp.act_fn",
    "activation_fn",
    "layer.1.DenseReluDense.act",
)
#: Factors (H,) on the output of the attention and of the feed-forward block, where a layer has them.
_SCALES = (("layer_scale1.lambda1", "layer_scale2.lambda1"), ("lambda_1", "lambda_2"))
_HEADS = ("num_attention_heads", "num_heads", "n_heads")
#: Parameters of what depends on tokens' places, which flmoe_fast.adapt.placing reads for a sample.
_PLACED = (
    "relative_position_bias_table", "relative_attention_bias", "pos_key_proj", "pos_query_proj", "pos_proj",
    "pos_q_proj",
)  # fmt: skip

Weights = tuple[torch.Tensor, torch.Tensor]


def read_layer(layer: nn.Module, name: str) -> LayerParts:
    """The parts of one layer.

    Raises
    ------
    Unsupported
        A part is missing or of another kind, or there are parameters that a plain encoder layer does not have.
    """
    found = _Found(layer, f"{name} ({type(layer).__name__})")
    attention, qkv = _queries_keys_values(found)
    heads, width = _heads(found, attention, len(qkv[0][0]))
    qkv = tuple(_for_every_head(found, part, heads, width) for part in qkv)
    scale = _scale(attention, width)
    first, second, order = _norms(found)
    pre = bool(getattr(layer, "norm_first", True)) if isinstance(order, str) else order
    out = found.linear(found.name_of("output projection", _OUT))
    up, gated = _up(found)
    down = found.linear(found.name_of("second feed-forward projection", _DOWN))
    for scales in _SCALES:
        if all(path in found.parameters for path in scales):
            out, down = (_scaled(part, found.parameters[path].detach()) for part, path in zip((out, down), scales))
            found.used.update(scales)
    activation = at(layer, found.name_of("activation", _ACTIVATION, callables=True))
    norm1, norm2 = (found.norm(path, qkv[0][0][0]) for path in (first, second))
    found.check_nothing_else()
    assert callable(activation)
    return LayerParts(heads, scale, pre, order == "?", qkv, out, norm1, up, down, norm2, activation, gated)


def at(module: nn.Module, path: str) -> Any:
    """What is found in a module under a dotted name; None where there is nothing."""
    found: Any = module
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


def attention_of(layer: nn.Module) -> nn.Module | None:
    """The module that makes queries, of a layer that can be read."""
    stems = [path.rpartition(".")[0] for path in _QUERY + tuple(path for path, _ in _STACKED) if at(layer, path)]
    found = at(layer, stems[0]) if stems else None
    return found if isinstance(found, nn.Module) else None


class _Found:
    """A layer, and which of its parameters have got a role."""

    def __init__(self, layer: nn.Module, what: str):
        self.layer, self.what = layer, what
        self.parameters = dict(layer.named_parameters())
        self.used = {name for name in self.parameters if any(part in name.split(".") for part in _PLACED)}

    def name_of(self, role: str, names: tuple[str, ...], callables: bool = False) -> str:
        """The only one of some names that there is."""

        def fits(part: Any) -> bool:
            return callable(part) if callables else hasattr(part, "weight")

        found = [path for path in names if fits(at(self.layer, path))]
        if len(found) != 1:
            got = f"no {role}" if not found else f"several candidates for its {role}: {', '.join(found)}"
            known = ", ".join(names[:2])
            raise Unsupported("model", f"{self.what} with {got}", f"one under a name that is known ({known}, ...)")
        return found[0]

    def linear(self, path: str) -> Weights:
        """Weight and bias of a linear layer."""
        module = at(self.layer, path)
        if not isinstance(module, nn.Linear):
            raise Unsupported("model", f"{self.what} whose {path} is a {type(module).__name__}", "a linear layer")
        if not module.weight.is_floating_point():
            raise Unsupported(
                "model", f"{self.what} whose {path} is of {module.weight.dtype}", "floating point weights"
            )
        self.used.update({f"{path}.weight", f"{path}.bias"})
        weight = module.weight.detach()
        return weight, weight.new_zeros(len(weight)) if module.bias is None else module.bias.detach()

    def norm(self, path: str, like: torch.Tensor) -> NormParts:
        """A LayerNorm, one without a mean (known by how transformers calls its epsilon), or none at all.

        ``like`` (H,) is of the dtype and width that one has where there is none.
        """
        module = at(self.layer, path)
        if isinstance(module, nn.Identity):
            return NormParts("none", torch.ones_like(like), torch.zeros_like(like), 0.0)
        weight, epsilon = getattr(module, "weight", None), getattr(module, "variance_epsilon", 0.0)
        plain = isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 1
        if not isinstance(weight, torch.Tensor) or weight.dim() != 1 or not (plain or epsilon):
            got = f"{self.what} whose {path} is a {type(module).__name__}"
            raise Unsupported("model", got, "a LayerNorm or RMSNorm with a gain")
        self.used.update({f"{path}.weight", f"{path}.bias"})
        gain, bias = weight.detach(), getattr(module, "bias", None)
        shift = torch.zeros_like(gain) if bias is None else bias.detach()
        rule = "layer" if plain or bias is not None else "rms"
        return NormParts(rule, gain, shift, float(module.eps if plain else epsilon))

    def check_nothing_else(self) -> None:
        """All parameters have a role."""
        others = sorted(set(self.parameters) - self.used)
        if not others:
            return
        if any("conv" in name for name in others):
            expected = "no convolution over neighbouring tokens, which sees tokens that attention does not"
        else:
            expected = "a plain encoder layer, which has no such parameters"
        got = f"{self.what} with the parameters {', '.join(others[:3])}{', ...' if len(others) > 3 else ''}"
        raise Unsupported("model", got, expected)


def _queries_keys_values(found: _Found) -> tuple[Any, tuple[Weights, ...]]:
    attention: Any = getattr(found.layer, "self_attn", None)
    if isinstance(attention, nn.MultiheadAttention):
        found.used.update({"self_attn.in_proj_weight", "self_attn.in_proj_bias"})
        if not attention.batch_first:
            raise Unsupported("model", f"{found.what} with batch_first=False", "batch_first=True")
        return attention, _of_torch(attention, found.what)
    for path, by_head in _STACKED:
        if isinstance(at(found.layer, path), nn.Linear):
            return _of_one_projection(found, path, by_head)
    query = found.name_of("query projection", _QUERY)
    stem, leaf = query.rsplit(".", 1)
    # What keys and values are called follows from what queries are: query, q_proj, q_lin, q, query_proj.
    key, value = (leaf.replace("query", n) if "query" in leaf else n[0] + leaf[1:] for n in ("key", "value"))
    paths = (query, f"{stem}.{key}", f"{stem}.{value}")
    for path in paths[1:]:
        found.name_of(f"projection {path}", (path,))
    return at(found.layer, stem), tuple(found.linear(path) for path in paths)


def _of_one_projection(found: _Found, path: str, by_head: bool) -> tuple[Any, tuple[Weights, ...]]:
    weight, bias = found.linear(path)
    attention = at(found.layer, path.rpartition(".")[0])
    if not by_head:
        return attention, tuple(zip(weight.chunk(3), bias.chunk(3)))
    heads = int(attention.num_attention_heads)
    biases = dict.fromkeys(range(3), bias.new_zeros(len(bias) // 3))
    for number, name in ((0, "q_bias"), (2, "v_bias")):
        if isinstance(getattr(attention, name, None), torch.Tensor):
            biases[number] = getattr(attention, name).detach()
            found.used.add(f"{path.rpartition('.')[0]}.{name}")
    parts = [weight.unflatten(0, (heads, 3, -1))[:, number].flatten(0, 1) for number in range(3)]
    own = [bias.unflatten(0, (heads, 3, -1))[:, number].flatten() for number in range(3)]
    return attention, tuple((part, mine + biases[number]) for number, (part, mine) in enumerate(zip(parts, own)))


def _of_torch(attention: nn.MultiheadAttention, what: str) -> tuple[Weights, ...]:
    """Query, key and value of PyTorch's own attention module."""
    if attention.in_proj_weight is None or attention.bias_k is not None or attention.add_zero_attn:
        raise Unsupported("model", f"{what} with an attention of another kind", "one width and no extra keys")
    weight, given = attention.in_proj_weight.detach(), attention.in_proj_bias
    bias = weight.new_zeros(len(weight)) if given is None else given.detach()
    return tuple(zip(weight.chunk(3), bias.chunk(3)))


def _heads(found: _Found, attention: Any, rows: int) -> tuple[int, int]:
    """The number of heads that make so many rows of queries, and their width."""
    said = [int(getattr(attention, name)) for name in _HEADS if hasattr(attention, name)]
    width = getattr(attention, "head_dim", None)
    heads = said[0] if said else rows // int(width) if width else 0
    if not heads or rows % heads:
        raise Unsupported("model", f"{found.what} without a number of attention heads", f"one of {_HEADS}")
    return heads, rows // heads


def _for_every_head(found: _Found, part: Weights, heads: int, width: int) -> Weights:
    """Keys or values that several queries share, once for each."""
    groups = len(part[0]) // width
    if groups * width != len(part[0]) or heads % groups:
        raise Unsupported("model", f"{found.what} with {groups} keys to {heads} queries", "keys shared evenly")
    weight, bias = (
        tensor.unflatten(0, (groups, width)).repeat_interleave(heads // groups, 0).flatten(0, 1) for tensor in part
    )
    return weight, bias


def _scale(attention: Any, width: int) -> float:
    """What scores are multiplied with."""
    for name in ("scaling", "scale"):
        if isinstance(getattr(attention, name, None), float):
            return float(getattr(attention, name))
    kinds = getattr(attention, "pos_att_type", None)
    if kinds is None:
        return float(width**-0.5)
    # A sum of several terms is scaled as a whole, by a root that is taken in single precision whatever the rest is in.
    return 1.0 / float(torch.tensor(width * (1 + len(kinds)), dtype=torch.float32).sqrt())


def _norms(found: _Found) -> tuple[str, str, bool | str]:
    pairs = [names for names in _NORMS if all(at(found.layer, path) is not None for path in names[:2])]
    if len(pairs) != 1:
        got = f"{found.what} with {len(pairs)} known pairs of norms"
        raise Unsupported("model", got, "two norms of known names")
    return pairs[0]


def _up(found: _Found) -> tuple[Weights, bool]:
    """The first projection of the feed-forward block, and whether it holds a second one that multiplies."""
    path = found.name_of("first feed-forward projection", _UP)
    up, gate = found.linear(path), _GATES.get(path)
    if gate is None or (gate and at(found.layer, gate) is None):
        return up, False
    if not gate:
        return up, True
    through = found.linear(gate)
    return (torch.cat([through[0], up[0]]), torch.cat([through[1], up[1]])), True


def _scaled(part: Weights, factor: torch.Tensor) -> Weights:
    return part[0] * factor[:, None], part[1] * factor
