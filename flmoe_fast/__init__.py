"""flmoe_fast: Shapley-interaction probes of multimodal mixture-of-experts transformers, fast and with error bars.

probe: any function or game: which pairs of its players work together.
    interactions, exact_interactions, screen, player_values, InteractionResult, PlayerValues, Screening, Game,
    GroupedGame

explain: one call from a model and a sample to ranked pairs, and its steps one by one.
    explain, Explanation, text_players, image_players, image_token_players, grid_players, player_scores,
    candidate_players, cross_pairs

ask: what a prompt is worth, to a decoder or a served model.
    answer_logprob, next_token, contrast, Question, PromptGame

adapt: models: those one already has, and FL-I2MoE.
    accelerate, AcceleratedModel, AcceleratedMoE, FLI2MoE, FLI2MoEConfig, TokenGame, load_checkpoint,
    save_checkpoint, load_sample, ModelForward

measure: how faithful an explanation is, and what runs on this machine.
    faithfulness, faithfulness_table, paired_gaps, mask_pairs, masking_curve, masking_scores, backends

scale: many samples, many processes; what a model does over them, and two models side by side.
    explain_many, ExplanationSet, summarize, compare, read_records, SampleRecord

errors: what is raised.
    ArgumentError, CheckpointError

For the explainers of shapiq, captum and shap see ``flmoe_fast.explainers``, which need those packages.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

#: Where each public name lives, by group. Names are loaded on first use: `import flmoe_fast` costs next to nothing.
GROUPS = {
    "probe": {
        "interactions": "flmoe_fast.probes.interactions",
        "exact_interactions": "flmoe_fast.probes.exact",
        "screen": "flmoe_fast.probes.screening",
        "player_values": "flmoe_fast.probes.values",
        "InteractionResult": "flmoe_fast.probes.result",
        "PlayerValues": "flmoe_fast.probes.value_result",
        "Screening": "flmoe_fast.probes.screening",
        "Game": "flmoe_fast.games.game",
        "GroupedGame": "flmoe_fast.games.grouped",
    },
    "explain": {
        "explain": "flmoe_fast.pipeline.explain",
        "Explanation": "flmoe_fast.pipeline.explain",
        "text_players": "flmoe_fast.adapt.players",
        "image_players": "flmoe_fast.adapt.players",
        "image_token_players": "flmoe_fast.adapt.causal.players",
        "grid_players": "flmoe_fast.adapt.causal.players",
        "player_scores": "flmoe_fast.pipeline.importance.scores",
        "candidate_players": "flmoe_fast.pipeline.importance.candidates",
        "cross_pairs": "flmoe_fast.pipeline.importance.candidates",
    },
    "ask": {
        "answer_logprob": "flmoe_fast.adapt.causal.questions",
        "next_token": "flmoe_fast.adapt.causal.questions",
        "contrast": "flmoe_fast.adapt.causal.questions",
        "Question": "flmoe_fast.adapt.causal.questions",
        "PromptGame": "flmoe_fast.adapt.served",
    },
    "adapt": {
        "accelerate": "flmoe_fast.adapt.accelerate",
        "AcceleratedModel": "flmoe_fast.adapt.accelerate",
        "AcceleratedMoE": "flmoe_fast.adapt.reference_layout",
        "FLI2MoE": "flmoe_fast.model.network",
        "FLI2MoEConfig": "flmoe_fast.model.config",
        "TokenGame": "flmoe_fast.games.token_game",
        "load_checkpoint": "flmoe_fast.model.checkpoint",
        "save_checkpoint": "flmoe_fast.model.checkpoint",
        "load_sample": "flmoe_fast.data.sample",
        "ModelForward": "flmoe_fast.explainers.model_forward",
    },
    "measure": {
        "faithfulness": "flmoe_fast.pipeline.faithful.curves",
        "faithfulness_table": "flmoe_fast.pipeline.faithful.curves",
        "paired_gaps": "flmoe_fast.pipeline.faithful.curves",
        "mask_pairs": "flmoe_fast.pipeline.faithful.masking",
        "masking_curve": "flmoe_fast.pipeline.faithful.masking",
        "masking_scores": "flmoe_fast.pipeline.faithful.masking",
        "backends": "flmoe_fast.engines.backends",
    },
    "scale": {
        "explain_many": "flmoe_fast.scale.explain_many",
        "ExplanationSet": "flmoe_fast.scale.dataset",
        "summarize": "flmoe_fast.pipeline.summary",
        "compare": "flmoe_fast.pipeline.summary",
        "read_records": "flmoe_fast.pipeline.records",
        "SampleRecord": "flmoe_fast.pipeline.records",
    },
    "errors": {
        "ArgumentError": "flmoe_fast.checks",
        "CheckpointError": "flmoe_fast.model.checkpoint",
    },
}
_PUBLIC = {name: module for group in GROUPS.values() for name, module in group.items()}
__all__ = list(_PUBLIC)

if TYPE_CHECKING:
    from flmoe_fast.adapt.accelerate import AcceleratedModel as AcceleratedModel
    from flmoe_fast.adapt.accelerate import accelerate as accelerate
    from flmoe_fast.adapt.causal.players import grid_players as grid_players
    from flmoe_fast.adapt.causal.players import image_token_players as image_token_players
    from flmoe_fast.adapt.causal.questions import Question as Question
    from flmoe_fast.adapt.causal.questions import answer_logprob as answer_logprob
    from flmoe_fast.adapt.causal.questions import contrast as contrast
    from flmoe_fast.adapt.causal.questions import next_token as next_token
    from flmoe_fast.adapt.players import image_players as image_players
    from flmoe_fast.adapt.players import text_players as text_players
    from flmoe_fast.adapt.reference_layout import AcceleratedMoE as AcceleratedMoE
    from flmoe_fast.adapt.served import PromptGame as PromptGame
    from flmoe_fast.checks import ArgumentError as ArgumentError
    from flmoe_fast.data.sample import load_sample as load_sample
    from flmoe_fast.engines.backends import backends as backends
    from flmoe_fast.explainers.model_forward import ModelForward as ModelForward
    from flmoe_fast.games.game import Game as Game
    from flmoe_fast.games.grouped import GroupedGame as GroupedGame
    from flmoe_fast.games.token_game import TokenGame as TokenGame
    from flmoe_fast.model.checkpoint import CheckpointError as CheckpointError
    from flmoe_fast.model.checkpoint import load_checkpoint as load_checkpoint
    from flmoe_fast.model.checkpoint import save_checkpoint as save_checkpoint
    from flmoe_fast.model.config import FLI2MoEConfig as FLI2MoEConfig
    from flmoe_fast.model.network import FLI2MoE as FLI2MoE
    from flmoe_fast.pipeline.explain import Explanation as Explanation
    from flmoe_fast.pipeline.explain import explain as explain
    from flmoe_fast.pipeline.faithful.curves import faithfulness as faithfulness
    from flmoe_fast.pipeline.faithful.curves import faithfulness_table as faithfulness_table
    from flmoe_fast.pipeline.faithful.curves import paired_gaps as paired_gaps
    from flmoe_fast.pipeline.faithful.masking import mask_pairs as mask_pairs
    from flmoe_fast.pipeline.faithful.masking import masking_curve as masking_curve
    from flmoe_fast.pipeline.faithful.masking import masking_scores as masking_scores
    from flmoe_fast.pipeline.importance.candidates import candidate_players as candidate_players
    from flmoe_fast.pipeline.importance.candidates import cross_pairs as cross_pairs
    from flmoe_fast.pipeline.importance.scores import player_scores as player_scores
    from flmoe_fast.pipeline.records import SampleRecord as SampleRecord
    from flmoe_fast.pipeline.records import read_records as read_records
    from flmoe_fast.pipeline.summary import compare as compare
    from flmoe_fast.pipeline.summary import summarize as summarize
    from flmoe_fast.probes.exact import exact_interactions as exact_interactions
    from flmoe_fast.probes.interactions import interactions as interactions
    from flmoe_fast.probes.result import InteractionResult as InteractionResult
    from flmoe_fast.probes.screening import Screening as Screening
    from flmoe_fast.probes.screening import screen as screen
    from flmoe_fast.probes.value_result import PlayerValues as PlayerValues
    from flmoe_fast.probes.values import player_values as player_values
    from flmoe_fast.scale.dataset import ExplanationSet as ExplanationSet
    from flmoe_fast.scale.explain_many import explain_many as explain_many


if not TYPE_CHECKING:  # a checker takes the imports above, and knows which names there are not

    def __getattr__(name: str) -> object:
        if name not in _PUBLIC:
            raise AttributeError(f"module 'flmoe_fast' has no attribute {name!r}")
        value = getattr(importlib.import_module(_PUBLIC[name]), name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
