"""What an engine is: something that evaluates coalitions of one problem, and says beforehand why it cannot."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import torch

import flmoe_fast.engines.forks  # noqa: F401 - what engines need in forked processes
from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.engines.problem import Logits, StackProblem, TokenProblem

#: What is evaluated, and what comes of it.
Problem = TypeVar("Problem", TokenProblem, StackProblem)
Outcome = TypeVar("Outcome")
#: Tokens worth evaluating per call: enough to keep the machine busy, few enough for a moving progress bar.
BLOCK_TOKENS = 1 << 16
#: Bytes of activations to hold at a time unless told otherwise; the GPU engines have their own.
DEFAULT_MEMORY = 1 << 27


@dataclass(frozen=True)
class Request(Generic[Problem]):
    """What a game asks of an engine.

    Attributes
    ----------
    dtype : torch.float32 or torch.float64
    device : torch.device
    problem : TokenProblem or StackProblem, optional
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
    problem: Problem | None = None
    backend: str = "auto"
    precision: str = "auto"
    memory: int | None = None

    @property
    def known_problem(self) -> Problem:
        """The problem, where the request is of a game."""
        if self.problem is None:
            raise ArgumentError("problem", None, "what is to be evaluated")
        return self.problem


@dataclass(frozen=True)
class Reduction:
    """What is to be made of the values of a corner grid's coalitions in each context.

    Attributes
    ----------
    pairs : LongTensor (P, 2)
        Players.
    single : LongTensor (P, 2)
        The corners in which one of them is toggled; corner 0 is the context, the last P toggle both.
    kind : "max", "sum", "strict" or "ratio"
        Of the redundancy gap.
    least : float
        Joint costs up to this define no ratio.
    """

    pairs: torch.Tensor
    single: torch.Tensor
    kind: str
    least: float


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


class Engine(ABC, Generic[Problem, Outcome]):
    """Evaluates coalitions of one problem; any number of threads may share it.

    Parameters
    ----------
    problem : TokenProblem or StackProblem
    dtype : torch.float32 or torch.float64
        Arithmetic of the layers.
    device : torch.device
    memory : int, optional
        Bytes of activations to hold at a time. Results depend on it by no more than an engine says.

    Attributes
    ----------
    name : str
        The backend it is asked for by.

    Raises
    ------
    ArgumentError
        The engine cannot run the problem: what :meth:`unfit` or :meth:`missing` say.
    """

    name: ClassVar[str]
    block_tokens: ClassVar[int] = BLOCK_TOKENS
    default_memory: ClassVar[int] = DEFAULT_MEMORY
    #: What to ask for where this engine cannot run.
    instead: ClassVar[str] = "another backend, or 'auto' to use what there is"

    def __init__(
        self,
        problem: Problem,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        memory: int | None = None,
    ):
        self.problem: Problem = problem
        self.dtype, self.device = dtype, torch.device(device)
        self.memory = self.default_memory if memory is None else integer("memory", memory, least=1)
        self._noise: dict[str, float] = {}
        reason = self.why_not(Request(dtype, self.device, problem, self.name))
        if reason:
            raise ArgumentError("backend", f"{self.name!r}, but {reason}", self.instead)

    @classmethod
    def make(cls, request: Request[Problem]) -> Engine[Problem, Outcome]:
        """The engine of a request.

        Raises
        ------
        ArgumentError
            The engine cannot run it.
        """
        return cls(request.known_problem, dtype=request.dtype, device=request.device, memory=request.memory)

    @classmethod
    def missing(cls, request: Request[Problem]) -> str:
        """What machine, installation, device or dtype lack for this engine; empty if nothing."""
        return ""

    @classmethod
    def unfit(cls, request: Request[Problem]) -> str:
        """What about the model or the sample keeps this engine from running it; empty if nothing."""
        return ""

    @classmethod
    def slower(cls, request: Request[Problem]) -> str:
        """Why another engine is faster here although this one can run; empty if none is. Only "auto" asks."""
        return ""

    @classmethod
    def why_not(cls, request: Request[Problem]) -> str:
        """What keeps this engine from a request; empty if nothing does."""
        return cls.unfit(request) or cls.missing(request)

    @abstractmethod
    def evaluate(self, coalitions: torch.Tensor) -> Outcome:
        """What comes of arbitrary coalitions (C, n) bool."""

    def about(self) -> dict[str, Any]:
        """What a result should remember about the engine; JSON types only."""
        return {}

    @property
    def arithmetic(self) -> str:
        """What matrix products are computed in, for a person to read."""
        return "fp64" if self.dtype == torch.float64 else "fp32"

    @property
    def coarse(self) -> bool:
        """Whether the arithmetic is coarser than the dtype, so that it has to be judged before it is used."""
        return False

    def finer(self) -> Request[Problem] | None:
        """The same problem in the next more exact arithmetic; None in float64."""
        return None if self.dtype == torch.float64 else Request(torch.float64, self.device, self.problem)

    @property
    def noise(self) -> dict[str, float]:
        """Largest share of rounding noise seen so far, by arithmetic; the model's where engines keep what they know."""
        return self._noise

    @property
    def more_exact(self) -> str:
        """How to get the same game with less rounding, for a person to read."""
        return "dtype=torch.float64"

    @property
    def block(self) -> int:
        """Coalitions worth asking for at a time."""
        return max(1, self.block_tokens // self.problem.length)


class TokenEngine(Engine[TokenProblem, Logits]):
    """Logits and routing of coalitions of a :class:`TokenProblem`.

    Attributes
    ----------
    reduces : bool
        Whether :meth:`reduce_corners` is there.
    """

    reduces: ClassVar[bool] = False

    def evaluate_toggles(self, contexts: torch.Tensor, toggled: torch.Tensor) -> Logits:
        """Logits and routing of ``contexts[k] ^ toggled[g]`` for all k, g, in the order (k, g).

        ``contexts`` (K, n) bool and ``toggled`` (G, n) bool.
        """
        return self.evaluate((contexts[:, None] ^ toggled).flatten(0, 1))

    def reduce_corners(self, values: torch.Tensor, contexts: torch.Tensor, reduction: Reduction) -> Corners:
        """Second differences and gaps of the ``values`` (K, G, O) that a corner grid has in contexts (K, n) bool."""
        raise NotImplementedError(f"the {self.name} engine leaves it to its caller to reduce corners")
