"""One call for a model one already has: on the engine where that is possible, and a word on why where it is not."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flmoe_fast.adapt.causal.game import DecoderGame, decoder_module_game, is_decoder
from flmoe_fast.adapt.causal.questions import Question, next_token, own_answer
from flmoe_fast.adapt.choice import slower_than
from flmoe_fast.adapt.dual_game import DualEncoderGame, is_dual_encoder
from flmoe_fast.adapt.encoder_game import EncoderGame
from flmoe_fast.adapt.layers import Unsupported
from flmoe_fast.adapt.module_game import ModuleGame, floating
from flmoe_fast.adapt.players import NOBODY, Players
from flmoe_fast.adapt.reading import Stack, find_stacks
from flmoe_fast.adapt.reference_layout import AcceleratedMoE, accelerate_module, is_reference_layout
from flmoe_fast.checks import ArgumentError, one_of
from flmoe_fast.games.game import Game
from flmoe_fast.model.checkpoint import load_checkpoint
from flmoe_fast.model.network import FLI2MoE

PATHS = ("auto", "engine", "module")


def accelerate(
    module: nn.Module | str | os.PathLike,
    *,
    modalities: Sequence[str] | None = None,
    heads: int | None = None,
    temperature: float | None = None,
    task: str | None = None,
    gate: str | None = None,
    top_k: int | None = None,
    capacity: str | None = None,
) -> AcceleratedMoE | AcceleratedModel:
    """Take a model as it is and make its coalition evaluations fast. The model itself is left alone.

    * A live ``InteractionMoE`` of either generation (known by its state dict, not by its name), an :class:`FLI2MoE`,
      or the path of a checkpoint: an :class:`AcceleratedMoE` with the same ``inference(inputs, masks)`` and a ``game``
      on the engine. The weights are copied; changes of the module afterwards are not seen.
    * Any other module: an :class:`AcceleratedModel`, whose ``game`` runs plain encoder stacks (BERT, RoBERTa, ViT,
      CLIP, ViLT and others) on the encoder engine, decoders (Llama, Mixtral, LLaVA, Qwen-VL and others) by the prefix
      tree of their coalitions, and everything else in batches.

    Parameters
    ----------
    module : nn.Module or path
    modalities : names, optional
        Of the first kind, in the order of its inputs; by default m0, m1, ... for a live module.
    heads, temperature : optional
        Where a live module does not say them itself (``attn.num_heads``, ``reweight.temperature``) and for
        checkpoints without a configuration.
    task : "multiclass", "multilabel" or "regression"
        By default what a checkpoint's configuration says; for a live module "multiclass", or "regression" if it has a
        single output.
    gate, top_k : optional
        Of sparse blocks, where the module does not say them (by its gates' classes and ``top_k``); see
        :class:`FLI2MoEConfig`.
    capacity : "none" or "reference"
        Whether tokens compete for the networks of sparse blocks in games, too; "none" by default.

    Raises
    ------
    ArgumentError
        A module in the reference layout that cannot be taken: which layer, and why.
    CheckpointError
        The same for a file.
    """
    given: dict[str, Any] = {"modalities": modalities, "heads": heads, "temperature": temperature, "task": task}
    given |= {"gate": gate, "top_k": top_k, "capacity": capacity}
    given = {name: value for name, value in given.items() if value is not None}
    if isinstance(module, (str, os.PathLike)):
        return AcceleratedMoE(load_checkpoint(Path(module), **given))
    if not isinstance(module, nn.Module):
        raise ArgumentError("module", type(module).__name__, "a torch.nn.Module, or the path of a checkpoint")
    if isinstance(module, FLI2MoE) or is_reference_layout(module.state_dict()):
        if not isinstance(module, FLI2MoE):
            return accelerate_module(module, **given)
        if given:
            raise ArgumentError(next(iter(given)), "a value", "nothing, since an FLI2MoE has its configuration")
        return AcceleratedMoE(module)
    if given:
        name = next(iter(given))
        raise ArgumentError(name, repr(given[name]), f"nothing: a {type(module).__name__} is no InteractionMoE")
    return AcceleratedModel(module)


class AcceleratedModel:
    """A transformer of somebody else's, whose games run on the fastest path that is exact for it.

    Its encoder layers are read, and compared with what was read of them, for the first game; later changes of the
    weights are not seen.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._stacks: list[Stack] | None = None

    def __repr__(self) -> str:
        return f"AcceleratedModel({type(self.model).__name__})"

    def game(
        self,
        inputs: Mapping[str, torch.Tensor],
        players: Players | Sequence[Players],
        *,
        target: int | None = None,
        value: str | Question | Callable[[object], torch.Tensor] | None = None,
        heads: Sequence[str] | None = None,
        path: str = "auto",
        backend: str = "auto",
        dtype: torch.dtype | None = None,
        memory: int = 1 << 28,
        batch: int = 32,
    ) -> Game:
        """The game of one sample.

        Parameters
        ----------
        inputs : mapping of str to Tensor
            What a tokenizer or processor makes, with a batch axis of 1.
        players : Players or sequence of Players
            See :func:`text_players` and :func:`image_players`.
        target, value, heads
            As for :class:`ModuleGame`; for dual encoders as for :class:`DualEncoderGame`. By default the probability
            of the predicted class, or the similarity of image and text. Of a decoder a :class:`Question` as value, see
            :func:`answer_logprob`, :func:`next_token` and :func:`contrast`, or a token as target; by default how
            likely its own answer is.
        path : "auto", "engine" or "module"
            "auto" takes the engine where it can, else the module in batches, and then warns and says why. Where a
            forward pass takes next to no time both are tried, and the faster one is taken; "engine" does not try.
        backend, dtype, memory
            Of the engine, see :class:`EncoderGame`.
        batch : int
            Coalitions a forward pass of the module.

        Returns
        -------
        DualEncoderGame, EncoderGame, DecoderGame or ModuleGame

        Warns
        -----
        UserWarning
            The slow path was taken, or placeholders of a picture are players of the text.
        """
        one_of("path", path, PATHS)
        _say_placeholders(self.model, inputs, players)
        if is_decoder(self.model) and (value is None or isinstance(value, Question)):
            question = self._question(inputs, value, target)
            return self._chosen(
                path,
                lambda: DecoderGame(self.model, inputs, players, question=question, dtype=dtype, memory=memory),
                lambda why: decoder_module_game(self.model, inputs, players, question, batch=batch, why=why),
            )
        dual = is_dual_encoder(self.model) and not callable(value)

        def on_engine() -> Game:
            self._stacks = find_stacks(self.model) if self._stacks is None else self._stacks
            options: dict[str, Any] = {"backend": backend, "dtype": dtype, "memory": memory, "stacks": self._stacks}
            if dual:
                scored: dict[str, Any] = {"target": target or 0, "value": value or "logit"}
                return DualEncoderGame(self.model, inputs, players, **scored, **options)
            return EncoderGame(
                self.model, inputs, players, target=target, value=value or "prob", heads=heads, **options
            )

        def in_batches(why: str) -> ModuleGame:
            scored: dict[str, Any] = {"target": target, "value": value or ("logit" if dual else "prob"), "heads": heads}
            return ModuleGame(self.model, inputs, players, batch=batch, why=why, **scored)

        measured = backend == "auto" and (dtype is None or dtype == floating(self.model))
        return self._chosen(path, on_engine, in_batches, measured=measured)

    def _question(self, inputs: Mapping[str, torch.Tensor], value: Question | None, target: int | None) -> Question:
        if value is None:
            return own_answer(self.model, inputs) if target is None else next_token(target)
        if target is not None:
            raise ArgumentError("target", target, "None, since the question says what is asked")
        return value

    def _chosen(
        self, path: str, on_engine: Callable[[], Game], in_batches: Callable[[str], ModuleGame], measured: bool = True
    ) -> Game:
        """The game on the engine where that can be and is no slower, else the module's."""
        if path == "module":
            return in_batches("it was asked for")
        try:
            game = on_engine()
        except Exception as problem:
            # What is wrong with the arguments is wrong on either path; whatever else a model raises when it is taken
            # apart (its own errors above all) says nothing about a plain forward pass.
            if path == "engine" or (isinstance(problem, ArgumentError) and not isinstance(problem, Unsupported)):
                raise
            why = _reason(problem)
            warnings.warn(f"slow path: a forward pass for every coalition, because {why}", stacklevel=3)
            return in_batches(why)
        if path == "engine" or not measured:
            return game
        other, why = slower_than(game, lambda: in_batches(""))
        if other is None:
            return game
        other.slower, other.why = game, why
        return other


def _reason(problem: Exception) -> str:
    """Why a model could not be taken apart, for a person to read."""
    if isinstance(problem, Unsupported):
        return str(problem)
    return f"taking it apart raised {type(problem).__name__}: {str(problem).partition(chr(10))[0]}"


def _say_placeholders(
    model: nn.Module, inputs: Mapping[str, torch.Tensor], players: Players | Sequence[Players]
) -> None:
    """Warn where some players of a text are nothing but tokens that stand for a picture: easily done, rarely meant."""
    config = getattr(model, "config", None)
    token = getattr(config, "image_token_id", getattr(config, "image_token_index", None))
    ids = inputs.get("input_ids")
    if token is None or not isinstance(ids, torch.Tensor) or ids.dim() != 2:
        return
    pictured = (ids[0] == token).cpu()
    for part in [players] if isinstance(players, Players) else players:
        if not isinstance(part, Players) or part.input != "input_ids" or part.owner.shape != pictured.shape:
            continue
        of_text = set(part.owner[~pictured].tolist()) - {NOBODY}
        of_picture = set(part.owner[pictured].tolist()) - {NOBODY} - of_text
        if of_text and of_picture:
            warnings.warn(
                f"{len(of_picture)} of the {part.group} players are placeholders of a picture (token {token}): "
                f"text_players(..., special=[{token}, ...]) or tokenizer= leaves them out",
                stacklevel=4,
            )
