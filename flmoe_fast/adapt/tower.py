"""A model around its encoder stack: its own embeddings before, the engine in the middle, its own head after.

Nothing of the embeddings or of the head is written again. The model runs once with a sample and its layers are watched:
what enters the first one, what the attention masks say, what each layer returns. Later the model runs with layers that
hand over the engine's final states, and its own norms, pooling and classifier make the output of them.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from flmoe_fast.adapt.around import eager, instead, torch_mask, visible_keys
from flmoe_fast.adapt.layers import LayerParts, Unsupported, fold, read_layer
from flmoe_fast.adapt.players import NOBODY, PlayerMap, repeated
from flmoe_fast.adapt.steady import steady
from flmoe_fast.engines.choose import choose
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.problem import StackProblem
from flmoe_fast.engines.stack import PreparedStack
from flmoe_fast.engines.torch_stack import TorchStack

#: Largest relative difference between a layer and what was read of it, both in float64. Anything a layer does beside
#: what a plain one does is far larger; some models take the softmax in float32 whatever the rest is in.
LAYER_TOLERANCE = 1e-6
#: Numbers of inputs, or of final states, to hold at a time.
STATES = 1 << 24
#: Tokens that a head may read before it is taken to read them all.
MOST_READS = 8


@dataclass
class Stack:
    """The encoder layers of a model: a list of modules, where they are, and what has been read of them.

    One that is kept serves any number of samples: engines lay out its weights once, and its layers are compared with
    what was read of them once.
    """

    name: str
    layers: list[nn.Module]
    parts: list[LayerParts] = field(default_factory=list)
    compared: bool = False

    @functools.cached_property
    def prepared(self) -> PreparedStack:
        """The layers as engines take them."""
        return PreparedStack(fold(self.parts))


def find_stacks(model: nn.Module) -> list[Stack]:
    """All lists of plain encoder layers in a model.

    Raises
    ------
    Unsupported
        There is none; the message says why the layers of the longest list of equal modules are not plain.
    """
    lists = [
        Stack(name, list(module))
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential)) and len(module) and len({type(m) for m in module}) == 1
    ]
    lists = [stack for stack in lists if any(True for _ in stack.layers[0].parameters())]
    found, reasons = [], []
    for stack in lists:
        try:
            stack.parts = [read_layer(layer, f"{stack.name}.{i}") for i, layer in enumerate(stack.layers)]
            found.append(stack)
        except Unsupported as reason:
            reasons.append((len(stack.layers) * sum(p.numel() for p in stack.layers[0].parameters()), reason))
    if found:
        return found
    if reasons:
        raise max(reasons, key=lambda pair: pair[0])[1]
    raise Unsupported("model", f"a {type(model).__name__} without a list of equal layers", "a stack of encoder layers")


@dataclass
class _Seen:
    """What a forward pass showed of a stack."""

    entering: torch.Tensor | None = None
    mask: torch.Tensor | None = None  # (1, 1, 1 or L, L)


class Tower:
    """One encoder stack of a model, for one sample and its players.

    Parameters
    ----------
    model : nn.Module
        Left as it is.
    run : function
        Calls the model, or a method of it, with keyword inputs.
    read : function
        Takes the wanted tensor (C, ...) from what ``run`` returns.
    inputs : mapping
        The sample; tensors with a batch axis of 1.
    players : PlayerMap
    dtype : torch.float32 or torch.float64
    memory : int
    stacks : list of Stack, optional
        Those of the model, where it has been looked at before.
    like : Tower, optional
        The same tower in another arithmetic: what it found out about the model is taken over.
    backend : "auto", "cpu" or "torch"
        "cpu" is the native engine, which "auto" takes where it can.
    precision : str
        Operands of the native engine's products, where it has a choice.

    Attributes
    ----------
    full : Tensor (1, ...)
        What is read of the model's own output for the full sample.
    engine, reason
        What evaluates coalitions, and what about the model keeps a faster one from it.

    Raises
    ------
    Unsupported
        The model is no plain encoder stack, for the reason that the message gives.
    """

    def __init__(
        self,
        model: nn.Module,
        run: Callable[..., object],
        read: Callable[[object], torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        players: PlayerMap,
        dtype: torch.dtype,
        memory: int,
        *,
        stacks: list[Stack] | None = None,
        like: Tower | None = None,
        backend: str = "auto",
        precision: str = "auto",
    ):
        self.model, self.run, self.read, self.inputs, self.players = model, run, read, dict(inputs), players
        self._returned: type = torch.Tensor  # what a layer returns
        stacks = find_stacks(model) if stacks is None else stacks
        everyone = torch.ones(1, players.n, dtype=torch.bool)
        if like is None:
            self.stack, calls, self.full = self._watch(stacks)
            states, seen = self._states(everyone)
            if states.dim() != 3:
                got = f"{self.stack.name} with an input of shape {tuple(states.shape)}"
                raise Unsupported("model", got, "(1, L, H)")
            allowed = visible_keys(seen.mask, states.shape[1], self.stack.name)
            if not self.stack.compared:
                for index, (args, kwargs) in enumerate(calls):
                    self._compare_layer(index, args, kwargs, allowed)
                self.stack.compared = True
            self._length, self._hidden = states.shape[1:]
            self.problem = self._problem(states[0], allowed)
        else:
            self.stack = next(stack for stack in stacks if stack.name == like.stack.name)
            self._returned, self.full = like._returned, like.full
            self._length, self._hidden = like._length, like._hidden
            states, absent = (self._states(coalition)[0][0].cpu() for coalition in (everyone, ~everyone))
            mixed = None if like.problem.mixed is None else self._mixed_states
            here = replace(like.problem, model=self.stack.prepared, mixed=mixed)
            self.problem = replace(here, present=states, absent=absent)
        device = next(model.parameters()).device
        self.engine, self.reason = choose(Request(dtype, device, self.problem, backend, precision, memory))

    def encode(self, coalitions: torch.Tensor) -> torch.Tensor:
        """What is read of the model's output for coalitions (C, n) bool: (C, ...)."""
        rows, outputs = self._head_rows(), []
        for block in coalitions.split(max(rows, STATES // (len(self.problem.reads) * self._hidden))):
            states = self.engine.evaluate(block)
            outputs += [self._resume(*part) for part in zip(states.split(rows), block.split(rows))]
        return torch.cat(outputs)

    def plainly(self, coalitions: torch.Tensor) -> torch.Tensor:
        """The same through the model itself, one coalition at a time. Nothing can be removed that has no mask."""
        parts = []
        for coalition in coalitions:
            with steady(self.model):
                parts.append(self.read(self.run(**self.players.inputs(self.inputs, coalition[None]))))
        return torch.cat(parts)

    def attended(self, states: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """What is read of the output (C, ...) for states (C, L, H) that enter the first layer, all players present.

        And every layer's attention (C, h, L, L). All of it can be differentiated, if gradients are enabled.
        """
        maps = []
        for parts in self.stack.parts:
            states, attention = parts.attend(states, self.problem.allowed)
            maps.append(attention)
        everyone = torch.ones(len(states), self.players.n, dtype=torch.bool)
        graded = torch.is_grad_enabled()
        with steady(self.model), torch.set_grad_enabled(graded), instead(self.stack.layers, states, self._returned):
            return self.read(self.run(**self._head_inputs(everyone))), maps

    # ---- running the model around its layers --------------------------------------------------------------------

    def _watch(self, stacks: list[Stack]) -> tuple[Stack, list[tuple[tuple, dict]], torch.Tensor]:
        """One forward pass of the full sample: the stack it goes through, its layers' arguments, what is read."""
        calls: dict[str, list[tuple[tuple, dict]]] = {stack.name: [] for stack in stacks}

        def enters(name: str) -> Callable:
            def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
                calls[name].append((args, kwargs))

            return keep

        def leaves(module: nn.Module, args: tuple, output: object) -> None:
            self._returned = type(output)

        with steady(self.model), eager(self.model), contextlib.ExitStack() as hooks:
            for stack in stacks:
                for layer in stack.layers:
                    hook = layer.register_forward_pre_hook(enters(stack.name), with_kwargs=True)
                    hooks.callback(hook.remove)
                hooks.callback(stack.layers[0].register_forward_hook(leaves).remove)
            full = self.read(self.run(**self.inputs))
        used = [stack for stack in stacks if calls[stack.name]]
        if len(used) != 1:
            got = f"{len(used)} encoder stacks in use ({', '.join(s.name for s in used) or 'none'})"
            raise Unsupported("model", got, "one (models with two towers are taken by similarity of their features)")
        times, rest = divmod(len(calls[used[0].name]), len(used[0].layers))
        if times != 1 or rest:
            got = f"{used[0].name}, which runs {times + bool(rest)} times in one forward pass"
            raise Unsupported("model", got, "a stack that runs once")
        return used[0], calls[used[0].name], full

    def _states(self, coalitions: torch.Tensor) -> tuple[torch.Tensor, _Seen]:
        """What enters the stack for coalitions (C, n) by replaced inputs, (C, L, H); the layers do not run."""
        seen = _Seen()

        def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
            tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
            seen.entering = tensors[0]
            seen.mask = next((t for t in tensors[1:] if t.dim() == 4), None)
            if isinstance(module, nn.TransformerEncoderLayer):
                seen.mask = torch_mask(kwargs)

        inputs = self.players.inputs(self.inputs, coalitions, fill_removed=True)
        with steady(self.model), eager(self.model), instead(self.stack.layers, None, self._returned):
            hook = self.stack.layers[0].register_forward_pre_hook(enters, with_kwargs=True)
            try:
                self.run(**inputs)
            finally:
                hook.remove()
        assert seen.entering is not None  # the stack is one that runs
        if seen.entering.is_nested:
            raise Unsupported("model", f"{self.stack.name} with nested tensors", "enable_nested_tensor=False")
        return seen.entering.detach().clone(), seen

    def _resume(self, states: torch.Tensor, coalitions: torch.Tensor) -> torch.Tensor:
        """What is read of the model's output, from final states (C, R, H) of the tokens its head reads."""
        full = torch.zeros(len(states), self._length, self._hidden, dtype=states.dtype, device=states.device)
        full[:, self.problem.reads.to(states.device)] = states
        parameter = next(self.model.parameters())
        return self._finish(full.to(parameter.dtype), coalitions)

    def _finish(self, full: torch.Tensor, coalitions: torch.Tensor) -> torch.Tensor:
        with steady(self.model), instead(self.stack.layers, full, self._returned):
            return self.read(self.run(**self._head_inputs(coalitions)))

    def _head_inputs(self, coalitions: torch.Tensor) -> dict[str, torch.Tensor]:
        """The full sample's inputs for the head, with the masks of removed players, by which a head may pool."""
        inputs = {name: repeated(name, value, len(coalitions)) for name, value in self.inputs.items()}
        for part, columns in zip(self.players.parts, self.players.columns):
            if part.mask:
                alone = PlayerMap.of_parts([part]).inputs(self.inputs, coalitions[:, columns])
                inputs[part.mask] = alone[part.mask]
        return inputs

    def _head_rows(self) -> int:
        """Samples for which the embeddings, which the head's run repeats, are made at a time."""
        elements = sum(v[0].numel() for v in self.inputs.values() if isinstance(v, torch.Tensor) and v.dim() > 1)
        return max(1, STATES // max(elements, self._length * self._hidden))

    # ---- what the engine needs to know --------------------------------------------------------------------------

    def _problem(self, full: torch.Tensor, allowed: torch.Tensor | None) -> StackProblem:
        nobody, _ = self._states(torch.zeros(1, self.players.n, dtype=torch.bool))
        if nobody.shape[1:] != full.shape:
            raise Unsupported("model", "as many tokens as there are players present", "a fixed number of tokens")
        owner, mixed = self._owners(full, nobody[0])
        removes = torch.tensor([part.removed for part in self.players.parts for _ in range(part.n)])
        if bool(mixed.any()) and bool(removes.any()):
            token = int(mixed.nonzero()[0])
            got = f"token {token} of {self.stack.name}, which depends on several players"
            raise Unsupported("players", got, "removed players that share no token")
        removed = torch.where(owner >= 0, removes[owner], False)
        reads = self._read_tokens(full)
        if bool(removes.any()):
            _keys_remain(removed, allowed, reads)
        return StackProblem(
            self.stack.prepared,
            present=full.cpu(),
            absent=nobody[0].cpu(),
            owner=owner,
            removed=removed,
            allowed=allowed,
            reads=reads,
            mixed=self._mixed_states if bool(mixed.any()) else None,
        )

    def _mixed_states(self, coalitions: torch.Tensor) -> torch.Tensor:
        return self._states(coalitions.cpu())[0]

    def _owners(self, full: torch.Tensor, nobody: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The player on whom each token's state depends (L,), and which tokens depend on several (L,).

        Players are numbered in binary, and for each digit the players with a one are present, then those with a zero:
        2 log2(n) runs of the embeddings tell the owner of every token, wherever the model has put it.
        """
        n = self.players.n
        step = (full - nobody).abs().amax(1)
        varies = step > 0
        owner, mixed = torch.zeros(len(full), dtype=torch.long), torch.zeros(len(full), dtype=torch.bool)
        digits = max(1, (n - 1).bit_length())
        numbers = torch.arange(n)
        for digit in range(digits):
            ones = (numbers >> digit & 1).bool()
            states = [self._states(coalition[None])[0][0] for coalition in (ones, ~ones)]
            near = [
                ((s - full).abs().amax(1) <= 1e-3 * step, (s - nobody).abs().amax(1) <= 1e-3 * step) for s in states
            ]
            (one_here, one_gone), (zero_here, zero_gone) = near
            is_one, is_zero = one_here & zero_gone, one_gone & zero_here
            owner += (is_one & varies).cpu().long() << digit
            mixed |= (varies & ~(is_one ^ is_zero)).cpu()
        mixed |= varies.cpu() & (owner >= n)
        return torch.where(varies.cpu() & ~mixed, owner.clamp(max=n - 1), NOBODY), mixed

    def _read_tokens(self, full: torch.Tensor) -> torch.Tensor:
        """Tokens whose final state the head reads: NaN put into all others must not reach the output."""
        length = len(full)
        everyone = torch.ones(1, self.players.n, dtype=torch.bool)

        def reads_any(tokens: torch.Tensor) -> bool:
            poisoned = full.clone()
            poisoned[tokens] = torch.nan
            return not bool(self._finish(poisoned[None], everyone).isfinite().all())

        everything = torch.arange(length)
        pending, found = [everything], list[int]()
        while pending and len(found) <= MOST_READS:
            tokens = pending.pop()
            if not reads_any(tokens):
                continue
            if len(tokens) == 1:
                found.append(int(tokens))
            else:
                pending += tokens.chunk(2)
        if not found and not pending:
            raise Unsupported("model", f"an output that does not depend on {self.stack.name}", "one that does")
        return everything if len(found) > MOST_READS or pending else torch.tensor(sorted(found))

    def _compare_layer(self, index: int, args: tuple, kwargs: dict, allowed: torch.Tensor | None) -> None:
        """One layer as it was read against what it returns for the full sample, both in float64."""
        layer = self.stack.layers[index]
        name = f"{self.stack.name}.{index} ({type(layer).__name__})"
        double = torch.float64
        args, kwargs = tuple(_cast(a, double) for a in args), {k: _cast(v, double) for k, v in kwargs.items()}
        before = next(value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        with steady(self.model), eager(self.model):
            after = copy.deepcopy(layer).double()(*args, **kwargs)
        after = after[0] if isinstance(after, tuple) else after
        everyone = torch.arange(before.shape[1])
        nobody = torch.full_like(everyone, NOBODY)
        stack = self.stack.prepared.stack
        alone = PreparedStack(replace(stack, layers=(stack.layers[index],)))
        problem = StackProblem(alone, before[0], before[0], nobody, nobody >= 0, allowed, everyone)
        engine = TorchStack(problem, dtype=double, device=before.device, memory=1 << 30)
        ours = engine.evaluate(torch.ones(1, 1, dtype=torch.bool))
        # Nobody ever sees what a model makes of padding.
        seen = slice(None) if allowed is None else allowed.any(0).to(before.device)
        error = float((ours - after).abs()[:, seen].max() / after.abs()[:, seen].max())
        if not error <= LAYER_TOLERANCE:
            got = f"{name}, whose output differs from a plain encoder layer's by {error:.1e}"
            raise Unsupported("model", got, f"the same output within {LAYER_TOLERANCE:.0e}")


def _cast(value: object, dtype: torch.dtype) -> object:
    """Floating point tensors, also inside tuples, in another dtype."""
    if isinstance(value, tuple):
        return tuple(_cast(part, dtype) for part in value)
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def _keys_remain(removed: torch.Tensor, allowed: torch.Tensor | None, reads: torch.Tensor) -> None:
    visible = ~removed if allowed is None else ~removed & allowed[reads].any(0)
    if not bool(visible.any()):
        got = "players who own every token that attention can see"
        raise Unsupported("players", got, "at least one token that is never removed, such as a start symbol")
