"""What to ask a decoder: how likely an answer is, how strongly a token comes next, which of two tokens comes rather."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.steady import steady
from flmoe_fast.checks import ArgumentError, integer, one_of

KINDS = ("logit", "logprob", "prob")
#: Tokens of the model's own answer, unless more are asked for.
ANSWER_TOKENS = 8


@dataclass(frozen=True)
class Question:
    """A number, or several, from the logits at the end of a prompt.

    Made by :func:`answer_logprob`, :func:`next_token` and :func:`contrast`. Called with what a model returns it is a
    value function for any path.

    Attributes
    ----------
    name : str
    appended : tuple of int
        Tokens that stand behind the prompt while the model runs.
    score : function
        Takes logits (C, R, V) of the last R positions to values (C,) or (C, O).
    heads : tuple of O str, or None
    """

    name: str
    appended: tuple[int, ...]
    score: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    heads: tuple[str, ...] | None = None

    @property
    def reads(self) -> int:
        """Positions at the end whose logits count."""
        return len(self.appended) + 1

    def __call__(self, output: object) -> torch.Tensor:
        return self.score(logits_of(output)[:, -self.reads :].to(torch.float64))


def answer_logprob(tokens: int | Sequence[int] | torch.Tensor, *, each: bool = False) -> Question:
    """How likely the model finds an answer: the sum of its tokens' log-probabilities, each after those before it.

    Parameters
    ----------
    tokens : ids of the answer
        As a tokenizer makes them, without special tokens.
    each : bool
        One value for every token of the answer, rather than their sum.
    """
    answer = _ids("tokens", tokens)
    heads = tuple(f"answer {i}: token {token}" for i, token in enumerate(answer)) if each else None
    score = partial(_answer, answer, each)
    return Question(f"log-probability of the answer {list(answer)}", answer[:-1], score, heads)


def next_token(tokens: int | Sequence[int] | torch.Tensor, *, kind: str = "logit") -> Question:
    """How strongly the model expects a token after the prompt; several tokens are several values.

    Parameters
    ----------
    tokens : id or ids
    kind : "logit", "logprob" or "prob"
    """
    wanted = _ids("tokens", tokens)
    one_of("kind", kind, KINDS)
    heads = tuple(f"token {token}" for token in wanted) if len(wanted) > 1 else None
    return Question(f"{kind} of the next token {list(wanted)}", (), partial(_next, wanted, kind), heads)


def contrast(token: int, other: int) -> Question:
    """How much rather the model expects ``token`` after the prompt than ``other``: the difference of their logits."""
    a, b = _ids("token", token) + _ids("other", other)
    if a == b:
        raise ArgumentError("other", b, "another token than the first")
    return Question(f"logit of token {a} less that of token {b}", (), partial(_difference, (a, b)))


def own_answer(model: nn.Module, inputs: Mapping[str, torch.Tensor], most: int = ANSWER_TOKENS) -> Question:
    """How likely the model's own answer is: the tokens it finds most likely one after another, up to an end symbol."""
    language: Any = model
    with steady(model):
        made = language.generate(**inputs, do_sample=False, num_beams=1, max_new_tokens=integer("most", most, least=1))
    answer = made[0, inputs["input_ids"].shape[1] :].tolist()
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = set(ends) if isinstance(ends, (list, tuple)) else {ends}
    while len(answer) > 1 and answer[-1] in ends:
        answer.pop()
    return answer_logprob(answer)


# Scores are functions of the module rather than of a call, so that games can be sent to other processes.


def _answer(answer: tuple[int, ...], each: bool, logits: torch.Tensor) -> torch.Tensor:
    _within(answer, logits)
    wanted = torch.tensor(answer, device=logits.device).expand(len(logits), -1)
    found = logits.log_softmax(-1).gather(2, wanted[..., None])[..., 0]
    return found if each else found.sum(1)


def _next(wanted: tuple[int, ...], kind: str, logits: torch.Tensor) -> torch.Tensor:
    _within(wanted, logits)
    last = logits[:, -1]
    if kind != "logit":
        last = last.log_softmax(-1) if kind == "logprob" else last.softmax(-1)
    found = last[:, list(wanted)]
    return found if len(wanted) > 1 else found[:, 0]


def _difference(pair: tuple[int, int], logits: torch.Tensor) -> torch.Tensor:
    _within(pair, logits)
    return logits[:, -1, pair[0]] - logits[:, -1, pair[1]]


def logits_of(output: object) -> torch.Tensor:
    """Logits (C, T, V) of what a model of language returns."""
    logits = output if isinstance(output, torch.Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 3:
        got = "no logits" if not isinstance(logits, torch.Tensor) else f"logits of shape {tuple(logits.shape)}"
        raise ArgumentError("model", f"one that returns {got}", "logits (C, T, V) of a model of language")
    return logits


def _ids(name: str, tokens: int | Sequence[int] | torch.Tensor) -> tuple[int, ...]:
    flat = torch.as_tensor(tokens).reshape(-1).tolist() if not isinstance(tokens, str) else []
    if not flat:
        raise ArgumentError(name, repr(tokens), "ids of at least one token")
    return tuple(integer(name, token, least=0) for token in flat)


def _within(tokens: Sequence[int], logits: torch.Tensor) -> None:
    if max(tokens) >= logits.shape[-1]:
        raise ArgumentError("tokens", max(tokens), f"ids below {logits.shape[-1]}, the size of the vocabulary")
