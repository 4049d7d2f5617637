"""The game of a decoder: what a coalition of words and patches makes of an answer, each prompt's beginning run once."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.causal.engine import CausalEngine
from flmoe_fast.adapt.causal.questions import Question, own_answer
from flmoe_fast.adapt.causal.reading import Reading, entering, head, read_decoder
from flmoe_fast.adapt.encoder_game import MODEL_TOLERANCE, in_dtype
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import ModuleGame, PlacedGame, name_players
from flmoe_fast.adapt.players import NOBODY, PlayerMap, Players
from flmoe_fast.adapt.remember import Remembered
from flmoe_fast.adapt.steady import steady
from flmoe_fast.checks import ArgumentError, integer, shape

IDS, MASK = "input_ids", "attention_mask"
#: Numbers of logits, and of states that enter the layers, to hold at a time.
NUMBERS = 1 << 24
#: Tokens that are worth asking for at a time, were nothing shared.
BLOCK_TOKENS = 1 << 19


def is_decoder(model: nn.Module) -> bool:
    """Whether a model continues a text: it generates, and has no encoder of its own."""
    config = getattr(model, "config", None)
    generates = getattr(model, "can_generate", None)
    return bool(callable(generates) and generates() and not getattr(config, "is_encoder_decoder", False))


class DecoderGame(PlacedGame):
    """A decoder and one prompt as a cooperative game, by the prefix tree of its coalitions.

    Absent tokens are hidden from attention and keep their positions, or are replaced by another token. Absent pixels
    are replaced, and the vision tower runs once for every state of the image. The decoder's own layers run on what is
    new of every coalition; the whole model on three coalitions is compared with it when the game is made.

    Parameters
    ----------
    model : nn.Module
        Of transformers, with a causal stack of layers that keep keys and values: Llama, Mixtral, LLaVA, Qwen2.5-VL and
        their like. Half-precision models are taken in float32.
    inputs : mapping of str to Tensor
        The prompt, as a tokenizer or processor makes it, with a batch axis of 1 and ``input_ids`` among them.
    players : Players or sequence of Players
        See :func:`text_players`, :func:`image_players` and :func:`image_token_players`.
    question : Question, optional
        What a coalition is worth; by default the log-probability of the model's own greedy answer.
    dtype : torch.float32 or torch.float64, optional
        Arithmetic; the model's own by default.
    memory : int
        Bytes of keys and values to hold at a time.

    Raises
    ------
    Unsupported
        What cannot be shared exactly; the message says what and why.
    ArgumentError
    """

    backend = "prefix tree"
    more_exact = "dtype=torch.float64"

    def __init__(
        self,
        model: nn.Module,
        inputs: Mapping[str, torch.Tensor],
        players: Players | Sequence[Players],
        *,
        question: Question | None = None,
        dtype: torch.dtype | None = None,
        memory: int = 1 << 28,
    ):
        prompt_of(inputs)
        self.free = dtype is None
        self.model, given, self.dtype = in_dtype(model, inputs, dtype)
        self.question = own_answer(self.model, given) if question is None else question
        self.memory = integer("memory", memory, least=1)
        self.inputs, self._reading = read_with_answer(self.model, given, self.question)
        self.question.score(self._reading.logits)  # an answer outside the vocabulary shows here
        self.players = PlayerMap(behind(players, given, self.question), self.inputs)
        name_players(self, self.players)
        self._settle()
        self._check()
        self.heads = self.question.heads
        self.block = max(1, BLOCK_TOKENS // self.inputs[IDS].shape[1])

    def __call__(self, coalitions: torch.Tensor) -> torch.Tensor:
        shape("coalitions", coalitions, (None, self.n), "(C, n)")
        if not len(coalitions):
            return torch.zeros((0,) if self.heads is None else (0, len(self.heads)), dtype=torch.float64)
        return self._values(coalitions)

    @property
    def tokens(self) -> int:
        """Tokens that went through the decoder's layers so far."""
        return self._engine.tokens

    def precise(self) -> DecoderGame | None:
        """This game in float64; None if it already is."""
        if self.dtype == torch.float64:
            return None
        twin = copy.copy(self)
        twin.model, twin.inputs, twin.dtype = in_dtype(self.model, self.inputs, torch.float64)
        twin._reading = read_decoder(twin.model, twin.inputs, twin.question.reads)
        twin._settle()
        return twin

    def about(self) -> dict[str, Any]:
        return {
            "value": self.question.name,
            "dtype": str(self.dtype).removeprefix("torch."),
            "places": [list(place) for place in self.players.places],
            "path": f"engine: prefix tree through {len(self._reading.calls)} layers of {self._reading.name}, "
            f"{self.inputs[IDS].shape[1]} tokens",
        }

    # ---- what the model shows -----------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Whose every token is, what may enter the layers, and what nobody looks at."""
        length = self.inputs[IDS].shape[1]
        self._engine = CausalEngine(self.model, self._reading, self.question.reads, self.memory)
        self._owner = torch.full((length,), NOBODY)
        self._removed = torch.zeros(length, dtype=torch.bool)
        self._mixed = torch.zeros(length, dtype=torch.bool)
        self._pixels = torch.zeros(self.n, dtype=torch.bool)
        for part, columns in zip(self.players.parts, self.players.columns):
            if part.input == IDS:
                mine = part.owner >= 0
                self._owner[mine] = part.owner[mine] + columns.start
                self._removed |= mine & part.removed
            elif part.removed:
                got = f"{part.group} players that are removed from {part.input}"
                raise Unsupported("players", got, "removed tokens, or replaced pixels")
            else:
                self._pixels[columns] = True
        full = self._reading.states
        replaced = bool((~self._removed & (self._owner >= 0)).any())
        self._states = torch.stack([full, self._entering(self._pixels) if replaced else full])
        if bool(self._pixels.any()):
            if any(call.added is not None for call in self._reading.calls):
                got = f"pixels that {self._reading.name} is given between its layers too"
                raise Unsupported("players", got, "image tokens that are removed (image_token_players)")
            self._mixed = ((self._entering(~self._pixels) - full).abs().amax(1) > 0).cpu()
        last = torch.zeros(length, dtype=torch.bool)
        last[-self.question.reads :] = True
        if bool((last & (self._removed | ~self._valid())).any()):
            got = "a removed or padded token at the end of the prompt, where the value is read"
            raise Unsupported("players", got, "a last token that stays")
        self._hidden = ~self._valid() | ~(self._reading.seen() | last)
        self._values = Remembered(self._compute)
        self._seen_images: dict[bytes, torch.Tensor] = {}

    def _valid(self) -> torch.Tensor:
        given = self.inputs.get(MASK)
        length = self.inputs[IDS].shape[1]
        return torch.ones(length, dtype=torch.bool) if given is None else given[0].bool().cpu()

    def _entering(self, present: torch.Tensor) -> torch.Tensor:
        """What enters the layers (L, H) for a coalition, nothing hidden."""
        inputs = self.players.inputs(self.inputs, present[None].bool(), fill_removed=False)
        if MASK in self.inputs:  # hidden tokens hide in the layers, not before
            inputs[MASK] = self.inputs[MASK]
        else:
            inputs.pop(MASK, None)
        return entering(self.model, self._reading, self._placed(inputs))

    def _placed(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Inputs with the positions of the full sample, where the model would work others out from a mask."""
        return placed(self.model, self._reading, inputs)

    def _check(self) -> None:
        """Compare with the model itself on the full coalition and without every other player either way."""
        some = torch.ones(3, self.n, dtype=torch.bool)
        some[1, 1::2] = False
        some[2, ::2] = False
        ours = self._logits(some)
        truth = [self._reading.logits]
        for coalition in some[1:]:
            with steady(self.model):
                inputs = self.players.inputs(self._placed(self.inputs), coalition[None])
                truth.append(self.model(**inputs, use_cache=False).logits[:, -self.question.reads :])
        theirs = torch.cat(truth)
        error = float((ours - theirs).abs().max() / theirs.abs().max().clamp(min=torch.finfo(theirs.dtype).tiny))
        tolerance = MODEL_TOLERANCE[theirs.dtype]
        if not error <= tolerance:
            got = f"logits that differ by {error:.1e} from those of {self._reading.name} run as a tree"
            if bool(self._removed.any()) and "position_ids" not in inspect.signature(self.model.forward).parameters:
                got += " (the model takes no position_ids: where tokens are removed it may number the others anew)"
            raise Unsupported("model", got, f"the same within {tolerance:.0e}")

    # ---- evaluation ---------------------------------------------------------------------------------------------

    def _compute(self, coalitions: torch.Tensor) -> torch.Tensor:
        outputs = self._reading.logits[0].numel()
        rows, found = max(1, NUMBERS // outputs), []
        for states in self._final(coalitions).split(rows):
            logits = head(self.model, self._reading, states)
            found.append(self.question.score(logits.to(torch.float64)).detach().cpu())
        return torch.cat(found)

    def _logits(self, coalitions: torch.Tensor) -> torch.Tensor:
        return head(self.model, self._reading, self._final(coalitions))

    def _final(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H) at the positions that are read."""
        if not bool(self._mixed.any()):
            return self._engine.evaluate(self._variants(coalitions), self._states)
        images, which = coalitions[:, self._pixels].unique(dim=0, return_inverse=True)
        most = max(1, NUMBERS // self._reading.states.numel())
        final = self._reading.states.new_empty(len(coalitions), self.question.reads, self._reading.states.shape[1])
        for low in range(0, len(images), most):
            mine = ((which >= low) & (which < low + most)).nonzero()[:, 0]
            table = torch.stack([self._image(image) for image in images[low : low + most]])
            variants = self._variants(coalitions[mine])
            variants[:, self._mixed] = (which[mine] - low + 3)[:, None].to(variants)
            final[mine] = self._engine.evaluate(variants, torch.cat([self._states, table]))
        return final

    def _image(self, present: torch.Tensor) -> torch.Tensor:
        """What enters the layers (L, H) when these players (k,) of the image are present."""
        key = present.numpy().tobytes()
        if key not in self._seen_images:
            if len(self._seen_images) * self._reading.states.numel() > 4 * NUMBERS:
                self._seen_images.clear()
            everyone = torch.ones(self.n, dtype=torch.bool)
            everyone[self._pixels] = present
            self._seen_images[key] = self._entering(everyone)
        return self._seen_images[key]

    def _variants(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Which state every token has (C, L): 0 left out, 1 as it is, 2 replaced."""
        always = torch.cat([coalitions.bool().cpu(), torch.ones(len(coalitions), 1, dtype=torch.bool)], dim=1)
        present = always[:, self._owner]
        absent = torch.where(self._removed, 0, 2)
        return torch.where(present, 1, absent).masked_fill(self._hidden, 0)


def decoder_module_game(
    model: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    players: Players | Sequence[Players],
    question: Question | None,
    **options: Any,
) -> ModuleGame:
    """The same game by a forward pass for every coalition, positions as in the full sample where they can be had."""
    prompt_of(inputs)
    question = own_answer(model, inputs) if question is None else question
    longer: dict[str, Any]
    try:
        whole, reading = read_with_answer(model, inputs, question)
        longer = dict(placed(model, reading, whole))
    except Unsupported:  # positions are then what the model makes of the masks
        longer = with_answer(inputs, question)
    longer["use_cache"] = False
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        longer["logits_to_keep"] = question.reads
    options["heads"] = question.heads
    return ModuleGame(model, longer, behind(players, inputs, question), value=question, **options)


def read_with_answer(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], question: Question
) -> tuple[dict[str, torch.Tensor], Reading]:
    """The prompt followed by the question's tokens, and what a forward pass of both shows.

    Raises
    ------
    ArgumentError
        The model would see the answer that it is asked for.
    """
    ids = inputs[IDS]
    kinds = any(name not in (IDS, MASK) and _along(value, ids) for name, value in inputs.items())
    for kind in (0, 1) if kinds else (0,):  # what comes behind a prompt is of its own kind in some models
        longer = with_answer(inputs, question, kind)
        reading = read_decoder(model, longer, question.reads)
        length = longer[IDS].shape[1]
        reads = range(length - question.reads, length)
        if not any(bool(sees[read, read + 1 :].any()) for sees in reading.visible for read in reads):
            return longer, reading
    got = f"a {type(model).__name__} that sees the answer before it is asked for it"
    raise ArgumentError("model", got, "causal attention behind the prompt; some need token_type_ids for that")


def placed(model: nn.Module, reading: Reading, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Inputs with the positions of the full sample, where the model would work others out from a mask."""
    takes = "position_ids" in inspect.signature(model.forward).parameters
    if not takes or "position_ids" in inputs:
        return dict(inputs)
    if reading.positions is not None:
        return {**inputs, "position_ids": reading.positions}
    if bool(inputs.get(MASK, torch.ones(1)).all()):  # some count what a mask shows, which here is everything
        return {**inputs, "position_ids": torch.arange(len(reading.states), device=reading.states.device)[None]}
    return dict(inputs)


def prompt_of(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The prompt's tokens (1, P)."""
    if not isinstance(inputs, Mapping) or not isinstance(inputs.get(IDS), torch.Tensor):
        got = f"keys {sorted(inputs)}" if isinstance(inputs, Mapping) else type(inputs).__name__
        raise ArgumentError("inputs", got, f"{IDS} among them")
    ids = inputs[IDS]
    shape(f"inputs[{IDS!r}]", ids, (1, None), "one prompt")
    if not ids.shape[1]:
        raise ArgumentError(f"inputs[{IDS!r}]", "no token", "a prompt")
    return ids


def with_answer(inputs: Mapping[str, torch.Tensor], question: Question, kind: int = 0) -> dict[str, Any]:
    """The prompt followed by the question's tokens; masks show them, and other marks of tokens are ``kind``."""
    ids = inputs[IDS]
    more = torch.tensor([question.appended], dtype=ids.dtype, device=ids.device)
    made = dict(inputs)
    for name, value in inputs.items():
        if _along(value, ids):
            tail = more if name == IDS else torch.full_like(more, 1 if name == MASK else kind, dtype=value.dtype)
            made[name] = torch.cat([value, tail], dim=1)
    return made


def _along(value: object, ids: torch.Tensor) -> bool:
    """Whether a tensor says something about every token of a prompt."""
    return isinstance(value, torch.Tensor) and value.shape == ids.shape and not value.is_floating_point()


def behind(
    players: Players | Sequence[Players], inputs: Mapping[str, torch.Tensor], question: Question
) -> tuple[Players, ...]:
    """Players of the prompt in the longer sequence; the answer is nobody's."""
    parts = (players,) if isinstance(players, Players) else tuple(players)
    count, made = len(question.appended), []
    for part in parts:
        if not isinstance(part, Players):
            raise ArgumentError("players", f"{part!r:.60}", "Players, as text_players and image_players make them")
        if part.input == IDS and part.owner.shape == inputs[IDS].shape[1:]:
            more = torch.tensor(question.appended, dtype=part.absent.dtype, device=part.absent.device)
            owner = torch.cat([part.owner, part.owner.new_full((count,), NOBODY)])
            part = replace(part, owner=owner, absent=torch.cat([part.absent, more]))
        made.append(part)
    return tuple(made)
