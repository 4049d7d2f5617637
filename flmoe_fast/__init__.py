"""flmoe_fast: Shapley-interaction probes of multimodal mixture-of-experts transformers, fast and with error bars."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. Names are loaded on first use, so that `import flmoe_fast` costs next to nothing.
_PUBLIC = {
    "AcceleratedMoE": "flmoe_fast.adapt.reference_layout",
    "AcceleratedModel": "flmoe_fast.adapt.accelerate",
    "ArgumentError": "flmoe_fast.checks",
    "CheckpointError": "flmoe_fast.model.checkpoint",
    "Explanation": "flmoe_fast.pipeline.explain",
    "FLI2MoE": "flmoe_fast.model.network",
    "FLI2MoEConfig": "flmoe_fast.model.config",
    "Game": "flmoe_fast.games.game",
    "InteractionResult": "flmoe_fast.probes.result",
    "TokenGame": "flmoe_fast.games.token_game",
    "accelerate": "flmoe_fast.adapt.accelerate",
    "backends": "flmoe_fast.engines.backends",
    "exact_interactions": "flmoe_fast.probes.exact",
    "explain": "flmoe_fast.pipeline.explain",
    "image_players": "flmoe_fast.adapt.players",
    "interactions": "flmoe_fast.probes.interactions",
    "load_checkpoint": "flmoe_fast.model.checkpoint",
    "save_checkpoint": "flmoe_fast.model.checkpoint",
    "text_players": "flmoe_fast.adapt.players",
}
__all__ = [
    "AcceleratedMoE",
    "AcceleratedModel",
    "ArgumentError",
    "CheckpointError",
    "Explanation",
    "FLI2MoE",
    "FLI2MoEConfig",
    "Game",
    "InteractionResult",
    "TokenGame",
    "accelerate",
    "backends",
    "exact_interactions",
    "explain",
    "image_players",
    "interactions",
    "load_checkpoint",
    "save_checkpoint",
    "text_players",
]

if TYPE_CHECKING:
    from flmoe_fast.adapt.accelerate import AcceleratedModel, accelerate
    from flmoe_fast.adapt.players import image_players, text_players
    from flmoe_fast.adapt.reference_layout import AcceleratedMoE
    from flmoe_fast.checks import ArgumentError
    from flmoe_fast.engines.backends import backends
    from flmoe_fast.games.game import Game
    from flmoe_fast.games.token_game import TokenGame
    from flmoe_fast.model.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
    from flmoe_fast.model.config import FLI2MoEConfig
    from flmoe_fast.model.network import FLI2MoE
    from flmoe_fast.pipeline.explain import Explanation, explain
    from flmoe_fast.probes.exact import exact_interactions
    from flmoe_fast.probes.interactions import interactions
    from flmoe_fast.probes.result import InteractionResult


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'flmoe_fast' has no attribute {name!r}")
    value = getattr(importlib.import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
