"""A model around its encoder stack: its own embeddings before, the engine in the middle, its own head after.

Nothing of the embeddings or of the head is written again. The model runs once with a sample and its layers are watched:
what enters the first one, what the attention masks say, what each layer returns. Later the model runs with layers that
hand over the engine's final states, and its own norms, pooling and classifier make the output of them.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.around import count_returned, eager, instead
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.placing import biases_of, places_of, shared
from flmoe_fast.adapt.players import NOBODY, PlayerMap, repeated
from flmoe_fast.adapt.reading import Call, Stack, compare_layers, find_stacks
from flmoe_fast.adapt.steady import steady
from flmoe_fast.engines.choose import choose
from flmoe_fast.engines.engine import Request
from flmoe_fast.engines.places import Places
from flmoe_fast.engines.problem import StackProblem

#: Numbers of inputs, or of final states, to hold at a time.
STATES = 1 << 24
#: Tokens that a head may read before it is taken to read them all.
MOST_READS = 8


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
        self._returned = 0  # how many things a layer returns
        stacks = find_stacks(model) if stacks is None else stacks
        self._entering = torch.ones(players.n, dtype=torch.bool)  # whose tokens go through the stack
        everyone = torch.ones(1, players.n, dtype=torch.bool)
        if like is None:
            self.stack, calls, self.full, biases = self._watch(stacks)
            states = self._states(everyone)
            if states.dim() != 3:
                got = f"{self.stack.name} with an input of shape {tuple(states.shape)}"
                raise Unsupported("model", got, "(1, L, H)")
            each = [
                places_of(layer, parts, call, biases.get(layer), f"{self.stack.name}.{index}")
                for index, (layer, parts, call) in enumerate(zip(self.stack.run, self.stack.parts_run, calls))
            ]
            self.stack.placed = any(not one.masked_only for one in each)
            if not self.stack.compared:
                compare_layers(self.model, self.stack, calls, each)
            places, allowed = shared(each)
            self._length, self._hidden = states.shape[1:]
            self.problem = self._problem(states[0], allowed, places)
        else:
            self.stack = next(stack for stack in stacks if stack.name == like.stack.name)
            self._returned, self.full, self._entering = like._returned, like.full, like._entering
            self._length, self._hidden = like._length, like._hidden
            states, absent = (self._states(coalition)[0].cpu() for coalition in (everyone, ~everyone))
            mixed = None if like.problem.mixed is None else self._mixed_states
            here = replace(like.problem, model=self.stack.prepared, mixed=mixed)
            self.problem = replace(here, present=states, absent=absent)
        device = next(model.parameters()).device
        self.engine, self.reason = choose(Request(dtype, device, self.problem, backend, precision, memory))

    def encode(self, coalitions: torch.Tensor) -> torch.Tensor:
        """What is read of the model's output for coalitions (C, n) bool: (C, ...)."""
        rows, outputs = self._head_rows(), []
        for block in coalitions.split(max(rows, STATES // (len(self.problem.reads) * self._hidden))):
            states = self._final(block)
            outputs += [self._resume(*part) for part in zip(states.split(rows), block.split(rows))]
        return torch.cat(outputs)

    def _final(self, coalitions: torch.Tensor) -> torch.Tensor:
        """Final states (C, R, H); coalitions that differ only in players who do not enter the stack share them."""
        if bool(self._entering.all()):
            return self.engine.evaluate(coalitions)
        mine = coalitions.cpu() | ~self._entering
        distinct, which = mine.unique(dim=0, return_inverse=True)
        return self.engine.evaluate(distinct)[which]

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
        places = self.problem.places or (Places(self.problem.allowed),) * len(self.stack.run)
        for parts, one in zip(self.stack.parts_run, places):
            states, attention = parts.attend(states, one.map(functools.partial(_like, states)))
            maps.append(attention)
        everyone = torch.ones(len(states), self.players.n, dtype=torch.bool)
        graded = torch.is_grad_enabled()
        with steady(self.model), torch.set_grad_enabled(graded), instead(self.stack.layers, states, self._returned):
            return self.read(self.run(**self._head_inputs(everyone))), maps

    # ---- running the model around its layers --------------------------------------------------------------------

    def _watch(self, stacks: list[Stack]) -> tuple[Stack, list[Call], torch.Tensor, dict[nn.Module, torch.Tensor]]:
        """One forward pass of the full sample: its stack, the layers' arguments, what is read, the layers' biases."""
        calls: dict[str, list[Call]] = {}  # in the order in which they run
        outputs: dict[str, list[torch.Tensor]] = {}
        returned: dict[str, int] = {}

        def enters(name: str) -> Callable:
            def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
                calls.setdefault(name, []).append((args, kwargs))

            return keep

        def leaves(name: str) -> Callable:
            def keep(module: nn.Module, args: tuple, output: Any) -> None:
                returned[name] = count_returned(output)
                outputs.setdefault(name, []).append(output[0] if isinstance(output, tuple) else output)

            return keep

        with steady(self.model), eager(self.model), contextlib.ExitStack() as hooks:
            biases = hooks.enter_context(biases_of([layer for stack in stacks for layer in stack.layers]))
            for stack in stacks:
                for layer in stack.layers:
                    hook = layer.register_forward_pre_hook(enters(stack.name), with_kwargs=True)
                    hooks.callback(hook.remove)
                    hooks.callback(layer.register_forward_hook(leaves(stack.name)).remove)
            full = self.read(self.run(**self.inputs))
        stack = self._first_played([next(s for s in stacks if s.name == name) for name in calls], calls)
        self._returned = returned[stack.name]
        times, rest = divmod(len(calls[stack.name]), len(stack.layers))
        again = zip(outputs[stack.name], calls[stack.name][1:])
        if rest or (times != 1 and not all(torch.equal(before, _states_of(call)) for before, call in again)):
            got = f"{stack.name}, which runs {times + bool(rest)} times in one forward pass"
            raise Unsupported("model", got, "a stack that runs once, or over and over on what it returned")
        stack.times = times
        return stack, calls[stack.name], full, biases

    def _first_played(self, used: list[Stack], calls: Mapping[str, list[Call]]) -> Stack:
        """The first stack that players enter; those behind it, and those that nobody enters, belong to the head."""
        if len(used) == 1:
            return used[0]
        seen: dict[str, torch.Tensor] = {}

        def enters(name: str) -> Callable:
            def keep(module: nn.Module, args: tuple, kwargs: dict) -> None:
                seen.setdefault(name, _states_of((args, kwargs)))

            return keep

        nobody = torch.zeros(1, self.players.n, dtype=torch.bool)
        with steady(self.model), contextlib.ExitStack() as hooks:
            for stack in used:
                hook = stack.layers[0].register_forward_pre_hook(enters(stack.name), with_kwargs=True)
                hooks.callback(hook.remove)
            self.run(**self.players.inputs(self.inputs, nobody, fill_removed=True))
        for stack in used:
            if stack.name in seen and not torch.equal(seen[stack.name], _states_of(calls[stack.name][0])):
                return stack
        got = (
            f"{len(used)} encoder stacks in use ({', '.join(s.name for s in used) or 'none'}), none of them by players"
        )
        raise Unsupported("model", got, "one that players' tokens enter")

    def _states(self, coalitions: torch.Tensor) -> torch.Tensor:
        """What enters the stack for coalitions (C, n) by replaced inputs, (C, L, H); the layers do not run."""
        seen: list[torch.Tensor] = []

        def enters(module: nn.Module, args: tuple, kwargs: dict) -> None:
            seen.append(_states_of((args, kwargs)))

        inputs = self.players.inputs(self.inputs, coalitions, fill_removed=True)
        with steady(self.model), eager(self.model), instead(self.stack.layers, None, self._returned):
            hook = self.stack.layers[0].register_forward_pre_hook(enters, with_kwargs=True)
            try:
                self.run(**inputs)
            finally:
                hook.remove()
        if seen[0].is_nested:
            raise Unsupported("model", f"{self.stack.name} with nested tensors", "enable_nested_tensor=False")
        return seen[0].detach().clone()

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
        """The full sample's inputs for the head, with the masks of removed players, by which a head may pool.

        And with what is replaced of inputs that do not enter the stack.
        """
        inputs = {name: repeated(name, value, len(coalitions)) for name, value in self.inputs.items()}
        for part, columns in zip(self.players.parts, self.players.columns):
            name = part.mask if part.removed else part.input
            if name and (part.removed or not bool(self._entering[columns].any())):
                inputs[name] = PlayerMap.of_parts([part]).inputs(self.inputs, coalitions[:, columns])[name]
        return inputs

    def _head_rows(self) -> int:
        """Samples for which the embeddings, which the head's run repeats, are made at a time."""
        elements = sum(v[0].numel() for v in self.inputs.values() if isinstance(v, torch.Tensor) and v.dim() > 1)
        return max(1, STATES // max(elements, self._length * self._hidden))

    # ---- what the engine needs to know --------------------------------------------------------------------------

    def _problem(self, full: torch.Tensor, allowed: torch.Tensor | None, places: tuple[Places, ...]) -> StackProblem:
        nobody = self._states(torch.zeros(1, self.players.n, dtype=torch.bool))
        if nobody.shape[1:] != full.shape:
            raise Unsupported("model", "as many tokens as there are players present", "a fixed number of tokens")
        owner, mixed = self._owners(full, nobody[0])
        removes = torch.tensor([part.removed for part in self.players.parts for _ in range(part.n)])
        if bool(mixed.any()) and bool(removes.any()):
            token = int(mixed.nonzero()[0])
            got = f"token {token} of {self.stack.name}, which depends on several players"
            raise Unsupported("players", got, "removed players that share no token")
        removed = torch.where(owner >= 0, removes[owner], False)
        self._entering = self._who_enters(full)
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
            places=places,
            mixed=self._mixed_states if bool(mixed.any()) else None,
        )

    def _who_enters(self, full: torch.Tensor) -> torch.Tensor:
        """Whose tokens go through the stack (n,), all of a part or none; the others only matter to the head."""
        enters = torch.zeros(self.players.n, dtype=torch.bool)
        for columns in self.players.columns:
            without = torch.ones(1, self.players.n, dtype=torch.bool)
            without[:, columns] = False
            enters[columns] = not torch.equal(self._states(without)[0], full)
        return enters

    def _mixed_states(self, coalitions: torch.Tensor) -> torch.Tensor:
        return self._states(coalitions.cpu())

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
            states = [self._states(coalition[None])[0] for coalition in (ones, ~ones)]
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
        """Tokens whose final state the head reads: NaN put into all others must not reach the output.

        All of them where that depends on who is there: a head may count what a mask shows.
        """
        everyone = torch.ones(1, self.players.n, dtype=torch.bool)
        found = self._reaching(full, everyone)
        if any(part.mask for part in self.players.parts) and len(found) < len(full):
            for coalition in (~everyone, everyone & (torch.arange(self.players.n) > 0)):
                if not torch.equal(self._reaching(full, coalition), found):
                    return torch.arange(len(full))
        return found

    def _reaching(self, full: torch.Tensor, coalition: torch.Tensor) -> torch.Tensor:
        """Tokens whose final state the head reads of one coalition (1, n)."""

        def reads_any(tokens: torch.Tensor) -> bool:
            poisoned = full.clone()
            poisoned[tokens] = torch.nan
            return not bool(self._finish(poisoned[None], coalition).isfinite().all())

        everything = torch.arange(len(full))
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


def _like(states: torch.Tensor, part: torch.Tensor) -> torch.Tensor:
    """Where states are, and in their dtype if it has to do with numbers."""
    return part.to(states.device, states.dtype if part.is_floating_point() else part.dtype)


def _states_of(call: Call) -> torch.Tensor:
    """What enters a layer."""
    return next(value for value in (*call[0], *call[1].values()) if isinstance(value, torch.Tensor))


def _keys_remain(removed: torch.Tensor, allowed: torch.Tensor | None, reads: torch.Tensor) -> None:
    visible = ~removed if allowed is None else ~removed & allowed[reads].any(0)
    if not bool(visible.any()):
        got = "players who own every token that attention can see"
        raise Unsupported("players", got, "at least one token that is never removed, such as a start symbol")
