"""flmoe_fast: Shapley-interaction probes of multimodal mixture-of-experts transformers, fast and with error bars."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. Names are loaded on first use, so that `import flmoe_fast` costs next to nothing.
_PUBLIC = {
    "ArgumentError": "flmoe_fast.checks",
    "CheckpointError": "flmoe_fast.model.checkpoint",
    "Explanation": "flmoe_fast.pipeline.explain",
    "FLI2MoE": "flmoe_fast.model.network",
    "FLI2MoEConfig": "flmoe_fast.model.config",
    "Game": "flmoe_fast.games.game",
    "InteractionResult": "flmoe_fast.probes.result",
    "TokenGame": "flmoe_fast.games.token_game",
    "backends": "flmoe_fast.environment",
    "exact_interactions": "flmoe_fast.probes.exact",
    "explain": "flmoe_fast.pipeline.explain",
    "interactions": "flmoe_fast.probes.interactions",
    "load_checkpoint": "flmoe_fast.model.checkpoint",
    "save_checkpoint": "flmoe_fast.model.checkpoint",
}
__all__ = [
    "ArgumentError",
    "CheckpointError",
    "Explanation",
    "FLI2MoE",
    "FLI2MoEConfig",
    "Game",
    "InteractionResult",
    "TokenGame",
    "backends",
    "exact_interactions",
    "explain",
    "interactions",
    "load_checkpoint",
    "save_checkpoint",
]

if TYPE_CHECKING:
    from flmoe_fast.checks import ArgumentError
    from flmoe_fast.environment import backends
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
