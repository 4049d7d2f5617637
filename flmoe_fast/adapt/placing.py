"""What a layer's attention makes of tokens' places, from what the layer is called with.

Rotations and biases come as arguments, or from modules of the layer's own; all of them are tables over the tokens of a
sample. What is misread shows when the layer is compared with what it computes.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.around import HIDDEN, torch_mask
from flmoe_fast.adapt.layer_reading import at, attention_of
from flmoe_fast.adapt.layers import LayerParts, Unsupported
from flmoe_fast.engines.places import Places, Relative

#: Arguments that are added to scores as they are, and those that are scaled as scores are.
BIASES, SCALED_BIASES = ("position_bias", "relative_position_bias"), ("rel_pos", "rel_2d_pos")
#: A module of a layer that makes such a bias.
BIAS_MODULE = "relative_position_bias"


@contextlib.contextmanager
def biases_of(layers: Sequence[nn.Module]) -> Iterator[dict[nn.Module, torch.Tensor]]:
    """What the layers' own modules make to be added to scores, layer by layer, once a model has run."""
    found: dict[nn.Module, torch.Tensor] = {}

    def keep(layer: nn.Module):
        def made(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
            found[layer] = output.detach()

        return made

    with contextlib.ExitStack() as hooks:
        for layer in layers:
            for name, module in layer.named_modules():
                if name.rpartition(".")[2] == BIAS_MODULE:
                    hooks.callback(module.register_forward_hook(keep(layer)).remove)
        yield found


def places_of(
    layer: nn.Module,
    parts: LayerParts,
    call: tuple[tuple, dict[str, Any]],
    own: torch.Tensor | None,
    name: str,
) -> Places:
    """The tables of one layer for the sample that it was called with, on the CPU.

    Parameters
    ----------
    layer : nn.Module
    parts : LayerParts
    call : its arguments and keywords
    own : Tensor or None
        What a module of its own adds to scores.
    name : str
        For what is said about it.
    """
    args, kwargs = call
    given = dict(zip(inspect.signature(layer.forward).parameters, args)) | kwargs
    states = next(value for value in given.values() if isinstance(value, torch.Tensor))
    length = states.shape[1]
    if isinstance(layer, nn.TransformerEncoderLayer):
        mask = torch_mask(kwargs)
    else:
        named = given.get("attention_mask")
        others = [v for n, v in given.items() if v is not states and n not in (*BIASES, *SCALED_BIASES, "relative_pos")]
        mask = named if _is_mask(named) else next((value for value in others if _is_mask(value)), None)
    allowed, bias = _of_mask(mask, length, name)
    extra = [bias, own, *(given.get(n) for n in BIASES), _computed(layer, given, length)]
    width = parts.qkv[0][0].shape[0] // parts.heads
    extra += [None if given.get(n) is None else given[n] * width**-0.5 for n in SCALED_BIASES]
    total = [_square(part, length, name) for part in extra if isinstance(part, torch.Tensor)]
    cos, sin = _rotation(given.get("position_embeddings"), length)
    relative = _relative(layer, parts, given)
    return Places(allowed, cos, sin, sum(total[1:], total[0]) if total else None, relative)


def shared(places: Sequence[Places]) -> tuple[tuple[Places, ...], torch.Tensor | None]:
    """Equal tables of different layers as one, and what any layer allows.

    Empty where no layer has more than what all of them allow.
    """
    kinds: list[Places] = []
    which = []
    for one in places:
        same = next((number for number, kind in enumerate(kinds) if _equal(kind, one)), len(kinds))
        kinds += [one] if same == len(kinds) else []
        which.append(same)
    masks = [kind.allowed for kind in kinds]
    anybody = None
    if all(mask is not None for mask in masks):
        anybody = torch.stack([mask for mask in masks if mask is not None]).any(0)
    if len(kinds) == 1 and kinds[0].masked_only:
        return (), anybody
    return tuple(kinds[number] for number in which), anybody


def _is_mask(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dim() == 4


def _of_mask(mask: torch.Tensor | None, length: int, name: str) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Who may look at whom (L, L), and what is added besides (h, L, L), of a mask (1, 1 or h, 1 or L, L)."""
    if mask is None:
        return None, None
    if mask.shape[0] != 1 or mask.shape[3] != length:
        got = f"{name} with an attention mask of shape {tuple(mask.shape)}"
        raise Unsupported("model", got, "one for the sample (1, h, 1 or L, L)")
    mask = mask[0].detach().cpu().expand(-1, length, length)
    if not mask.is_floating_point():  # ones show
        shows, bias = mask != 0, None
    else:
        shows = mask > HIDDEN
        bias = mask.masked_fill(~shows, 0.0)
        bias = bias if bool(bias.any()) else None
    if bool((shows != shows[:1]).any()):
        raise Unsupported("model", f"{name} with an attention mask for every head", "one mask for all heads")
    # A query that sees nothing, as padding does in some models, would be NaN, and spread; nobody sees what it makes.
    blind = ~shows[0].any(1, keepdim=True)
    return None if bool(shows.all()) else shows[0] | (blind & torch.eye(length, dtype=torch.bool)), bias


def _square(bias: torch.Tensor, length: int, name: str) -> torch.Tensor:
    bias = bias.detach().cpu()
    bias = bias[0] if bias.dim() == 4 and len(bias) == 1 else bias
    if bias.dim() != 3 or bias.shape[1:] != (length, length):
        got = f"{name} with a bias of shape {tuple(bias.shape)} on its scores"
        raise Unsupported("model", got, f"(heads, {length}, {length})")
    return bias


def _computed(layer: nn.Module, given: Mapping[str, Any], length: int) -> torch.Tensor | None:
    """The bias of a layer that makes it for itself and those behind it."""
    attention: Any = attention_of(layer)
    if given.get("position_bias") is not None or not getattr(attention, "has_relative_attention_bias", False):
        return None
    compute = getattr(attention, "compute_bias", None)
    return None if compute is None else compute(length, length).detach()


def _rotation(given: Any, length: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cosines and sines (L, r); tokens in front of those that have any are not rotated."""
    if not isinstance(given, tuple) or len(given) != 2:
        return None, None
    cos, sin = (part.detach().cpu().reshape(-1, part.shape[-1]) for part in given)
    before = length - len(cos)
    if before < 0:
        return None, None
    return torch.cat([cos.new_ones(before, cos.shape[1]), cos]), torch.cat([sin.new_zeros(before, sin.shape[1]), sin])


def _relative(layer: nn.Module, parts: LayerParts, given: Mapping[str, Any]) -> Relative | None:
    """Tables of disentangled attention."""
    embeddings, distance = given.get("rel_embeddings"), given.get("relative_pos")
    attention: Any = attention_of(layer)
    kinds = getattr(attention, "pos_att_type", None)
    if embeddings is None or distance is None or not kinds:
        return None
    distance = distance.detach().cpu().long().reshape(distance.shape[-2:])
    length, span = len(distance), len(embeddings) // 2
    if hasattr(attention, "pos_ebd_size"):
        embeddings, span = embeddings[: 2 * attention.pos_ebd_size], attention.pos_ebd_size
    else:  # as many as the text is long, around the middle
        half = min(length, attention.max_relative_positions)
        embeddings = embeddings[attention.max_relative_positions - half : attention.max_relative_positions + half]
        span = half
    made = []
    for kind, names in (("c2p", ("pos_key_proj", "pos_proj", "key_proj")), ("p2c", _QUERIES)):
        project = next(at(attention, n) for n in names if at(attention, n) is not None)
        rows = project(embeddings).detach().cpu().unflatten(-1, (parts.heads, -1)).transpose(0, 1)
        made.append(rows if kind in kinds else torch.zeros_like(rows))
    last = 2 * span - 1
    # Keys meet queries of the distance the other way round.
    of_queries = (span - distance).clamp(0, last).T
    return Relative(made[0], made[1] * parts.scale, (distance + span).clamp(0, last), of_queries)


_QUERIES = ("pos_query_proj", "pos_q_proj", "query_proj")


def _equal(one: Places, other: Places) -> bool:
    def same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
        return a is b if a is None or b is None else a.shape == b.shape and torch.equal(a, b)

    if one.relative is not None or other.relative is not None:
        return False
    return all(same(getattr(one, part), getattr(other, part)) for part in ("allowed", "cos", "sin", "bias"))
