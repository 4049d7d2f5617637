"""One sample of an FL-I2MoE, checked and laid out for the engines."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from flmoe_fast.checks import LARGEST_FEATURE, ArgumentError, finite, integer, one_of, shape
from flmoe_fast.engines.problem import TokenProblem
from flmoe_fast.model.config import TEXT_MODALITIES
from flmoe_fast.model.network import FLI2MoE


def lay_out(
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
        finite(f"features[{m}]", tokens[valid[m]], LARGEST_FEATURE)
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
        finite(f"fill[{m}]", vector, LARGEST_FEATURE)
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
        seen = [int(p) for p in positions]
        for position in (min(seen), max(seen)) if seen else ():
            integer(f"players[{m}]", position, least=0, most=len(valid[m]) - 1)
        if len(set(seen)) < len(seen):
            raise ArgumentError(f"players[{m}]", "a position twice", "distinct positions")
        is_valid = valid[m].tolist()
        padding = [p for p in seen if not is_valid[p]]
        if padding:
            raise ArgumentError(f"players[{m}]", f"position {padding[0]}, which is padding", "valid tokens")
        chosen.append(torch.tensor(sorted(seen), dtype=torch.long))
    return chosen


def name_players(problem: TokenProblem) -> tuple[tuple, tuple[str, ...], tuple[tuple[int, int], ...]]:
    """Groups of players by modality, a name for each player, and each player's (modality, position)."""
    starts = [sum(problem.padded_lengths[:m]) for m in range(len(problem.padded_lengths))]
    groups, names, places = [], [], []
    players, valid = problem.players.tolist(), problem.valid.tolist()
    for m, (modality, (start, stop)) in enumerate(zip(problem.model.config.modalities, problem.segments)):
        members = tuple(i for i, token in enumerate(players) if start <= token < stop)
        groups.append((modality, members))
        for i in members:
            position = valid[players[i]] - starts[m]
            names.append(f"{modality} {position}")
            places.append((m, position))
    return tuple(groups), tuple(names), tuple(places)
