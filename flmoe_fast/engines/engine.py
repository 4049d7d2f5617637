"""What an engine is: something that evaluates coalitions of one problem, and says beforehand why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

import flmoe_fast.engines.forks  # noqa: F401 - what engines need in forked processes
from flmoe_fast.checks import ArgumentError
from flmoe_fast.engines.problem import Logits, TokenProblem

#: Tokens worth evaluating per call: enough to keep the machine busy, few enough for a moving progress bar.
BLOCK_TOKENS = 1 << 16
#: Bytes of activations to hold at a time unless told otherwise; the GPU engines have their own.
DEFAULT_MEMORY = 1 << 27


@dataclass(frozen=True)
class Request:
    """What a game asks of an engine.

    Attributes
    ----------
    dtype : torch.float32 or torch.float64
    device : torch.device
    problem : TokenProblem, optional
        None asks about the machine alone.
    backend : str
        One of :data:`flmoe_fast.engines.choose.BACKENDS`.
    precision : str
        Operands of the GPU engines' matrix products; "auto" elsewhere.
    memory : int, optional
        Bytes of activations to hold at a time; the engine's own default where None.
    """

    dtype: torch.dtype
    device: torch.device
    problem: TokenProblem | None = None
    backend: str = "auto"
    precision: str = "auto"
    memory: int | None = None

    @property
    def known_problem(self) -> TokenProblem:
        """The problem, where the request is of a game."""
        if self.problem is None:
            raise ArgumentError("problem", None, "a TokenProblem")
        return self.problem


@dataclass(frozen=True)
class Corners:
    """Corners of K contexts, reduced per pair and output; everything float64 on the engine's device.

    Attributes
    ----------
    second : Tensor (K, P, O)
        Second differences.
    gap : Tensor (K, P, O)
        Redundancy gaps of the kind asked for; an undefined ratio is zero.
    defined : Tensor (K, P, O) bool, or None
        Where the ratio is defined; None for the other kinds.
    """

    second: torch.Tensor
    gap: torch.Tensor
    defined: torch.Tensor | None


class Engine(ABC):
    """Evaluates coalitions of one :class:`TokenProblem`; any number of threads may share it.

    Attributes
    ----------
    name : str
        The backend it is asked for by.
    reduces : bool
        Whether :meth:`reduce_corners` is there.
    """

    name: ClassVar[str]
    block_tokens: ClassVar[int] = BLOCK_TOKENS
    reduces: ClassVar[bool] = False
    problem: TokenProblem

    @classmethod
    @abstractmethod
    def missing(cls, request: Request) -> str:
        """What machine, installation, device or dtype lack for this engine; empty if nothing."""

    @classmethod
    @abstractmethod
    def unfit(cls, request: Request) -> str:
        """What about the model or the sample keeps this engine from running it; empty if nothing."""

    @classmethod
    @abstractmethod
    def make(cls, request: Request) -> Engine:
        """The engine of a request.

        Raises
        ------
        ArgumentError
            The engine cannot run it: what :meth:`unfit` or :meth:`missing` say.
        """

    @classmethod
    def why_not(cls, request: Request) -> str:
        """What keeps this engine from a request; empty if nothing does."""
        return cls.unfit(request) or cls.missing(request)

    @abstractmethod
    def evaluate(self, coalitions: torch.Tensor) -> Logits:
        """Logits and routing of arbitrary coalitions (C, n) bool."""

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        """Logits and routing of ``contexts[k] ^ toggled[g]`` for all k, g, in the order (k, g).

        ``contexts`` (K, n) bool and ``toggled`` (G, n) bool.
        """
        return self.evaluate((contexts[:, None] ^ toggled).flatten(0, 1))

    def reduce_corners(
        self,
        values: torch.Tensor,
        contexts: torch.Tensor,
        pairs: torch.Tensor,
        single: torch.Tensor,
        kind: str,
        least: float,
    ) -> Corners:
        """Second differences and gaps of the ``values`` (K, G, O) that a corner grid's coalitions have.

        ``contexts`` (K, n) bool, ``pairs`` (P, 2) players and ``single`` (P, 2), the corners in which one of them is
        toggled; corner 0 is the context, the last P toggle both. ``kind`` is "max", "sum", "strict" or "ratio"; joint
        costs up to ``least`` define no ratio.
        """
        raise NotImplementedError(f"the {self.name} engine leaves it to its caller to reduce corners")

    def about(self) -> dict[str, Any]:
        """What a result should remember about the engine; JSON types only."""
        return {}

    @property
    def more_exact(self) -> str:
        """How to get the same game with less rounding, for a person to read."""
        return "dtype=torch.float64"

    @property
    def block(self) -> int:
        """Coalitions worth asking for at a time."""
        return max(1, self.block_tokens // self.problem.length)
