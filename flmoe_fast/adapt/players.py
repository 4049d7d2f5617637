"""Player maps: which elements of a model's input tensors come and go together, and where they lie in the text or image.

A map covers one input tensor. Every element has an owner, a player or nobody; a coalition keeps the elements of its
players and replaces the others, or hides them from attention. Tokens, words, patches, superpixels and whole modalities
differ only in who owns what.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from flmoe_fast.checks import ArgumentError, integer, shape

NOBODY = -1


@dataclass(frozen=True)
class Players:
    """The players of one modality, as a map on one input tensor of one sample.

    Attributes
    ----------
    input : str
        Keyword under which the model takes the tensor.
    group : str
        Name of the modality.
    names : tuple of k str
    places : tuple of k tuples
        Where each player lies: ``(start, stop)`` characters of a text (tokens where no offsets were given), or
        ``(top, left, bottom, right)`` pixels, ends excluded.
    owner : LongTensor
        Owner of every element, 0..k-1 or -1 for nobody; its shape is that of the trailing axes of the input.
    absent : Tensor
        The sample without the batch axis, as it is when every player is absent.
    mask : str or None
        With a name, absent elements are hidden from attention instead of replaced: this 0/1 input of the same shape
        is set to 0 there. "" where the model has no such input and only an engine can hide them.
    flat : bool
        The input has no batch axis: the rows of a batch's samples follow one another.
    """

    input: str
    group: str
    names: tuple[str, ...]
    places: tuple[tuple[int, ...], ...]
    owner: torch.Tensor
    absent: torch.Tensor
    mask: str | None = None
    flat: bool = False

    def __post_init__(self) -> None:
        if len(self.places) != self.n:
            raise ArgumentError("places", f"{len(self.places)} of them", f"one for each of {self.n} players")
        owns = set(self.owner.unique().tolist()) - {NOBODY}
        if owns != set(range(self.n)):
            got = f"the players {sorted(owns ^ set(range(self.n)))[:3]}, who have no name or own nothing"
            raise ArgumentError("owner", got, f"each of the {self.n} players, and {NOBODY} for nobody")

    @property
    def n(self) -> int:
        return len(self.names)

    @property
    def removed(self) -> bool:
        """Whether absent elements are hidden from attention rather than replaced."""
        return self.mask is not None

    def kept(self, present: torch.Tensor) -> torch.Tensor:
        """Coalitions (C, k) bool to (C, *owner.shape): the elements that keep their value."""
        always = torch.cat([present, present.new_ones(len(present), 1)], dim=1)
        return always[:, self.owner.to(present.device)]  # owner -1 is the last column

    def fill(self, value: torch.Tensor, present: torch.Tensor) -> torch.Tensor:
        """The input (1 or C, ...) for coalitions (C, k) with absent elements replaced: (C, ...), or all their rows."""
        value = value.unflatten(0, (-1, len(self.absent))) if self.flat else value
        kept = self.kept(present)
        kept = kept.reshape(len(present), *(1,) * (value.dim() - kept.dim()), *kept.shape[1:])
        filled = torch.where(kept, value, self.absent.to(value)[None])
        return filled.flatten(0, 1) if self.flat else filled


class PlayerMap:
    """All players of a game: one or several :class:`Players`, numbered through.

    Parameters
    ----------
    parts : Players or sequence of Players
    inputs : mapping of str to Tensor
        The sample, every tensor with a batch axis of 1.
    """

    def __init__(self, parts: Players | Sequence[Players], inputs: Mapping[str, torch.Tensor]):
        parts = (parts,) if isinstance(parts, Players) else tuple(parts)
        if not parts or not all(isinstance(part, Players) for part in parts):
            raise ArgumentError("players", f"{parts!r:.60}", "Players, as text_players and image_players make them")
        self._number(parts)
        if self.n < 2:
            raise ArgumentError("players", f"{self.n} players", "at least two")
        for p, part in enumerate(self.parts):
            if not isinstance(inputs.get(part.input), torch.Tensor):
                raise ArgumentError(f"inputs[{part.input!r}]", "nothing", f"the tensor of the {part.group} players")
            value = inputs[part.input]
            expected = part.absent.shape if part.flat else (1, *part.absent.shape)
            shape(f"inputs[{part.input!r}]", value, tuple(expected), f"one sample, as players[{p}] has it")

    def _number(self, parts: Sequence[Players]) -> None:
        self.parts = tuple(parts)
        self.n = sum(part.n for part in self.parts)
        self.names = tuple(name for part in self.parts for name in part.names)
        self.places = tuple(place for part in self.parts for place in part.places)
        edges = [sum(part.n for part in self.parts[:p]) for p in range(len(self.parts) + 1)]
        self.columns = tuple(slice(a, b) for a, b in zip(edges, edges[1:]))
        self.groups = tuple((part.group, tuple(range(c.start, c.stop))) for part, c in zip(self.parts, self.columns))

    @classmethod
    def of_parts(cls, parts: Sequence[Players]) -> PlayerMap:
        """Some of a map's parts, numbered from zero; unlike a game's map it may have a single player."""
        some = object.__new__(cls)
        some._number(parts)
        return some

    def inputs(
        self, inputs: Mapping[str, torch.Tensor], coalitions: torch.Tensor, *, fill_removed: bool = False
    ) -> dict[str, torch.Tensor]:
        """Inputs of coalitions (C, n) bool: every tensor with a batch axis of C.

        ``fill_removed`` replaces also what would be hidden, and leaves the masks as they are.
        """
        count = len(coalitions)
        made = dict(inputs)
        varied = set()
        for part, columns in zip(self.parts, self.columns):
            present = coalitions[:, columns].to(inputs[part.input].device)
            if not part.removed or fill_removed:
                made[part.input] = part.fill(made[part.input], present)
                varied.add(part.input)
                continue
            if not part.mask:
                if bool(present.all()):
                    continue
                expected = "absent elements that are replaced: this model has no mask that hides them"
                raise ArgumentError("players", f"{part.group} players that are removed", expected)
            mask = made.get(part.mask)
            if mask is None:
                mask = torch.ones((1, *part.owner.shape), dtype=torch.long, device=present.device)
            made[part.mask] = torch.where(part.kept(present), mask, torch.zeros_like(mask))
            varied.add(part.mask)
        return {name: value if name in varied else repeated(name, value, count) for name, value in made.items()}


def repeated(name: str, value: Any, count: int) -> Any:
    """An input of one sample for ``count`` of them: a batch axis of 1 grows, rows of one sample follow one another."""
    if not isinstance(value, torch.Tensor) or not value.dim() or count == 1:
        return value
    if name == "position_ids" and value.dim() == 3:  # one for each axis of space and time, then the batch
        return value.expand(-1, count, -1)
    return value.expand(count, *value.shape[1:]) if len(value) == 1 else value.repeat(count, *[1] * (value.dim() - 1))


def text_players(
    input_ids: torch.Tensor,
    *,
    by: str | torch.Tensor = "token",
    absent: int | str = "remove",
    special: Sequence[int] | None = None,
    tokenizer: Any = None,
    attention_mask: torch.Tensor | None = None,
    word_ids: Sequence[int | None] | None = None,
    offsets: Sequence[tuple[int, int]] | None = None,
    text: str | None = None,
    group: str = "text",
    input: str = "input_ids",
    mask: str = "attention_mask",
) -> Players:
    """Players of a tokenised text.

    Parameters
    ----------
    input_ids : integer Tensor (T,) or (1, T)
    by : "token", "word", "all" or integer Tensor (T,)
        What a player is; "all" makes the whole text one player, numbers make what has the same number one (a sentence,
        a turn of a dialogue), and negative ones nobody.
    absent : "remove" or int
        "remove" hides absent tokens from attention through the attention mask; positions stay as they are. An integer
        is the token that replaces them (a tokenizer's ``mask_token_id``, ``unk_token_id``, ...).
    special : token ids, optional
        Tokens that are never players; those of ``tokenizer`` unless given, and none without one.
    tokenizer : optional
        A tokenizer of transformers, or a processor that has one. Players are named by what their tokens decode to, and
        its special tokens, placeholders of pictures among them, are no players. Words are what a token that begins with
        a space begins, unless ``word_ids`` says what is one.
    attention_mask : Tensor (T,) or (1, T), optional
        Tokens with 0 are never players.
    word_ids : sequence of T ints or None, optional
        Word of every token, as ``BatchEncoding.word_ids()`` gives it; needed for words. Tokens with None are no
        players.
    offsets : sequence of T (start, stop), optional
        Characters of every token, as a tokenizer's ``offset_mapping``. Without them places count tokens.
    text : str, optional
        With offsets, players are named by their text.

    Returns
    -------
    Players

    Raises
    ------
    ArgumentError
    """
    ids = _flat("input_ids", input_ids)
    length = len(ids)
    if isinstance(by, torch.Tensor):
        shape("by", by, (length,), "a number for every token (T,)")
        word_ids, by = [None if number < 0 else number for number in by.tolist()], "word"
    if by not in ("token", "word", "all"):
        raise ArgumentError("by", repr(by), "'token', 'word', 'all' or the number of every token's player")
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)  # a processor's
    if special is None:
        special = () if tokenizer is None else tokenizer.all_special_ids
    if by == "word" and word_ids is None:
        if tokenizer is None:
            expected = "the word of every token, or a tokenizer, for players that are words"
            raise ArgumentError("word_ids", None, expected)
        word_ids = _words(tokenizer.convert_ids_to_tokens(ids.tolist()), [id in special for id in ids.tolist()])
    for name, values in (("word_ids", word_ids), ("offsets", offsets)):
        if values is not None and len(values) != length:
            raise ArgumentError(name, f"{len(values)} entries", f"one for each of the {length} tokens")
    keep = ~torch.isin(ids, torch.as_tensor(list(special), dtype=ids.dtype, device=ids.device)).cpu()
    if attention_mask is not None:
        valid = _flat("attention_mask", attention_mask)
        shape("attention_mask", valid, (length,), "(T,)")
        keep &= valid.bool().cpu()
    if word_ids is not None:
        keep &= torch.tensor([word is not None for word in word_ids])
    positions = keep.nonzero()[:, 0].tolist()
    if not positions:
        raise ArgumentError("input_ids", "no token that could be a player", "tokens that are not special or padding")
    if by == "token":
        members = [[position] for position in positions]
    elif by == "all":
        members = [positions]
    else:
        words: dict[int, list[int]] = {}
        for position, word in enumerate(word_ids or ()):
            if word is not None and keep[position]:
                words.setdefault(int(word), []).append(position)
        members = list(words.values())
    owner = torch.full((length,), NOBODY)
    for player, tokens in enumerate(members):
        owner[tokens] = player
    spans = [_span(tokens, offsets) for tokens in members]
    if text is not None and offsets is not None and by != "all":
        names = tuple(text[start:stop] for start, stop in spans)
    elif tokenizer is not None and by != "all":
        names = tuple(_decoded(tokenizer, ids[tokens].tolist()) for tokens in members)
    else:
        names = (group,) if by == "all" else tuple(f"{group} {tokens[0]}" for tokens in members)
    removed = absent == "remove"
    if not removed:
        absent = integer("absent", absent, least=0)
    owned = (owner >= 0).to(ids.device)
    blank = torch.where(owned, _other_tokens(ids, owned) if removed else torch.as_tensor(absent).to(ids), ids)
    return Players(input, group, names, tuple(spans), owner, blank, mask if removed else None)


#: What tokens begin with that begin a word: GPT-2's and SentencePiece's marks of a space.
SPACES = ("\u0120", "\u2581", " ")


def _words(pieces: Sequence[str], apart: Sequence[bool]) -> list[int]:
    """The word of every token, by marks of spaces or, where there are none, by marks of what continues a word.

    Tokens that stand ``apart`` are words of their own.
    """
    marked = any(piece.startswith(SPACES) for piece in pieces)
    words = [0]
    for piece, alone, was_alone in zip(pieces[1:], apart[1:], apart):
        goes_on = not piece.startswith(SPACES) if marked else piece.startswith("##")
        words.append(words[-1] + (alone or was_alone or not goes_on))
    return words


def _decoded(tokenizer: Any, tokens: list[int]) -> str:
    """What tokens say; their own spelling where that is nothing to see."""
    said = tokenizer.decode(tokens, skip_special_tokens=False).strip()
    return said or " ".join(tokenizer.convert_ids_to_tokens(tokens))


def image_players(
    pixel_values: torch.Tensor,
    *,
    by: str | torch.Tensor = "patch",
    patch: int | tuple[int, int] | None = None,
    absent: float | str | torch.Tensor = 0.0,
    group: str = "image",
    input: str = "pixel_values",
) -> Players:
    """Players of an image.

    Parameters
    ----------
    pixel_values : Tensor (channels, H, W) or (1, channels, H, W)
    by : "patch", "all" or integer Tensor (H, W)
        What a player is: a patch, the whole image, or a superpixel of a segmentation (negative numbers are nobody's).
    patch : int or (height, width)
        Size of a patch in pixels; needed for patches. With a segmentation, every patch goes to the superpixel that
        covers most of it, so that no token of the model belongs to two players.
    absent : number, Tensor, "mean" or "remove"
        What replaces absent pixels: a number (0 is the mean of normalised images), a tensor that broadcasts to
        (channels, H, W), or the image's own mean colour. "remove" hides the patches from attention, which only an
        encoder engine can do.

    Returns
    -------
    Players

    Raises
    ------
    ArgumentError
    """
    if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
        raise ArgumentError("pixel_values", type(pixel_values).__name__, "a floating point tensor (channels, H, W)")
    image = pixel_values[0] if pixel_values.dim() == 4 and len(pixel_values) == 1 else pixel_values
    shape("pixel_values", image, (None, None, None), "(channels, H, W)")
    height, width = image.shape[1:]
    rows, columns = _patch_size(patch, height, width)
    if isinstance(by, torch.Tensor):
        owner = _superpixels(by, rows, columns, height, width, snapped=patch is not None)
    elif by == "patch":
        if patch is None:
            raise ArgumentError("patch", None, "the size of a patch in pixels, for players that are patches")
        down, across = height // rows, width // columns
        grid = torch.arange(down * across).reshape(down, across)
        owner = torch.full((height, width), NOBODY)
        whole = grid.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        owner[: down * rows, : across * columns] = whole
    elif by == "all":
        owner = torch.zeros(height, width, dtype=torch.long)
    else:
        raise ArgumentError("by", repr(by), "'patch', 'all' or a segmentation (H, W)")
    count = int(owner.max()) + 1
    if count < 1:
        raise ArgumentError("by", "a segmentation without superpixels", "at least one non-negative number")
    boxes = tuple(_box(owner == player) for player in range(count))
    names: tuple[str, ...]
    if isinstance(by, str) and by == "all":
        names = (group,)
    elif isinstance(by, str):
        names = tuple(f"{group} {top // rows},{left // columns}" for top, left, _, _ in boxes)
    else:
        names = tuple(f"{group} {player}" for player in range(count))
    removed = isinstance(absent, str) and absent == "remove"
    blank = _blank(image, absent)
    blank = torch.where((owner >= 0).to(image.device), blank.expand_as(image), image)
    return Players(input, group, names, boxes, owner, blank, "" if removed else None)


def _blank(image: torch.Tensor, absent: float | str | torch.Tensor) -> torch.Tensor:
    """What replaces absent pixels, broadcasting to (channels, H, W)."""
    if isinstance(absent, str):
        if absent == "mean":
            return image.mean((1, 2), keepdim=True)
        if absent == "remove":
            return image + 1.0  # never looked at but to find out which tokens a player owns
        raise ArgumentError("absent", repr(absent), "a number, a tensor, 'mean' or 'remove'")
    blank = torch.as_tensor(absent, dtype=image.dtype, device=image.device)
    try:
        return blank.expand_as(image)
    except RuntimeError:
        raise ArgumentError(
            "absent", f"shape {tuple(blank.shape)}", f"(channels, H, W) = {tuple(image.shape)}"
        ) from None


def _flat(name: str, tensor: torch.Tensor) -> torch.Tensor:
    if not isinstance(tensor, torch.Tensor) or tensor.is_floating_point():
        raise ArgumentError(name, getattr(tensor, "dtype", type(tensor).__name__), "an integer tensor (T,)")
    tensor = tensor[0] if tensor.dim() == 2 and len(tensor) == 1 else tensor
    shape(name, tensor, (None,), "(T,)")
    return tensor.detach()


def _other_tokens(ids: torch.Tensor, owned: torch.Tensor) -> torch.Tensor:
    """For every token another one of the same text: what replaces a hidden token only has to differ from it.

    No token from outside, since a model may count the positions of padding in another way than those of words.
    """
    first = ids[owned][0]
    others = torch.cat([ids[owned], ids[~owned], first[None] + 1])
    return torch.where(ids == first, others[others != first][0], first)


def _span(tokens: Sequence[int], offsets: Sequence[tuple[int, int]] | None) -> tuple[int, int]:
    if offsets is None:
        return tokens[0], tokens[-1] + 1
    return min(int(offsets[t][0]) for t in tokens), max(int(offsets[t][1]) for t in tokens)


def _patch_size(patch: int | tuple[int, int] | None, height: int, width: int) -> tuple[int, int]:
    if patch is None:
        return 1, 1
    rows, columns = (patch, patch) if isinstance(patch, int) else patch
    return integer("patch", rows, least=1, most=height), integer("patch", columns, least=1, most=width)


def _superpixels(
    segments: torch.Tensor, rows: int, columns: int, height: int, width: int, snapped: bool
) -> torch.Tensor:
    """Owners (H, W) numbered 0..k-1, by whole patches where asked for."""
    shape("by", segments, (height, width), "a segmentation (H, W)")
    if segments.is_floating_point():
        raise ArgumentError("by", segments.dtype, "integers")
    segments = segments.detach().cpu().long()
    if snapped:
        down, across = height // rows, width // columns
        blocks = segments[: down * rows, : across * columns].reshape(down, rows, across, columns)
        most = blocks.transpose(1, 2).flatten(2).mode(dim=2).values  # (down, across)
        snapped_to = torch.full_like(segments, NOBODY)
        snapped_to[: down * rows, : across * columns] = most.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
        segments = snapped_to
    numbers = segments[segments >= 0].unique()
    owner = torch.full_like(segments, NOBODY)
    for player, number in enumerate(numbers.tolist()):
        owner[segments == number] = player
    return owner


def _box(where: torch.Tensor) -> tuple[int, int, int, int]:
    """Bounding box (top, left, bottom, right) of a mask (H, W)."""
    down, across = where.any(1).nonzero()[:, 0], where.any(0).nonzero()[:, 0]
    return int(down[0]), int(across[0]), int(down[-1]) + 1, int(across[-1]) + 1
