"""``flmoe-fast train``: from settings to a trained model, its predictions and its scores."""

from __future__ import annotations

import dataclasses
import json
import warnings
from typing import Any

import numpy as np
import torch

from flmoe_fast.checks import device
from flmoe_fast.files import replacing, writing_to
from flmoe_fast.model.checkpoint import save_checkpoint
from flmoe_fast.model.metrics import score
from flmoe_fast.model.training.chance import against_chance, chance_warning
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import FitSettings, fit
from flmoe_fast.model.training.log import write_log
from flmoe_fast.model.training.predict import predict
from flmoe_fast.runs.settings import RunSettings, keep_settings
from flmoe_fast.runs.study import Study, mean_features


def train(settings: RunSettings, progress: bool = True) -> dict[str, Any]:
    """Train, or go on where an earlier call was stopped.

    Writes into the run's folder: ``settings.json`` (every setting as it took effect), ``training.pt`` (to go on from),
    ``training.jsonl`` and ``training.csv``, ``model.safetensors`` (with ``training.reference_layout`` also
    ``model.pth``), ``predictions.npz`` of the test part (``expert_logits`` (N, E, C), ``weights`` (N, E), ``logits``
    (N, C), ``targets``, ``ids``) and ``metrics.json``.

    Returns
    -------
    dict
        Scores of the validation and the test part, and the number of epochs.

    Raises
    ------
    BusyError
        Somebody else writes to the run's folder.
    StorageError
        A file could not be written; what was there before is intact.
    FloatingPointError
        Training diverged.
    """
    with writing_to(settings.out, "flmoe-fast train"):
        return _train(settings, progress)


def _train(settings: RunSettings, progress: bool) -> dict[str, Any]:
    options, out = settings.training, settings.out
    device("training.device", options.device)  # before anything is read or encoded
    if options.threads:
        torch.set_num_threads(options.threads)
    keep_settings(settings)
    study = Study(settings, progress)
    model = study.model()
    about = {"name": study.splits.name, "task": study.splits.task, "classes": study.splits.classes}
    with replacing(out / "study.json", "w") as file:
        json.dump({**about, "modalities": study.splits.modalities, "experts": model.config.expert_names}, file)
    data = study.splits.train
    validation = study.held("valid") if len(study.splits.valid) else None
    given = {f.name for f in dataclasses.fields(FitSettings)} & {f.name for f in dataclasses.fields(options)}
    history = fit(
        model,
        Examples(data.inputs, data.masks, data.targets),
        FitSettings(**{name: getattr(options, name) for name in given}),
        validation=validation,
        checkpoint=out / "training.pt",
        log=out / "training.jsonl",
        progress=progress,
    )
    write_log(out / "training.csv", history, model.config.expert_names)
    mean_features(model, data)
    save_checkpoint(model, out / "model.safetensors")
    if options.reference_layout:
        save_checkpoint(model, out / "model.pth")
    metrics: dict[str, Any] = {"epochs": len(history), "samples": len(data), "parameters": _parameters(model)}
    for part in ("valid", "test"):
        held = study.held(part)
        if not len(held.targets):
            continue
        found = predict(model, held.inputs, held.masks)
        metrics[part] = score(found.logits, held.targets, study.splits.task)
        experts = found.expert_logits.unbind(1)
        metrics[f"{part}_experts"] = {
            name: score(logits, held.targets, study.splits.task)["accuracy"]
            for name, logits in zip(model.config.expert_names, experts)
        }
        weights = found.weights.double().mean(0).tolist()
        metrics[f"{part}_routing"] = dict(zip(model.config.expert_names, weights))
        if part == "valid":
            judged = against_chance(found.logits, held.targets, data.targets, study.splits.task)
            metrics["chance"] = judged.to_dict()
            if text := chance_warning(judged):
                warnings.warn(text, stacklevel=2)
        if part == "test":
            with replacing(out / "predictions.npz") as file:
                np.savez(
                    file,
                    expert_logits=found.expert_logits.cpu().numpy(),
                    weights=found.weights.cpu().numpy(),
                    logits=found.logits.cpu().numpy(),
                    targets=held.targets.numpy(),
                    ids=np.array(study.splits.test.ids),
                )
    with replacing(out / "metrics.json", "w") as file:
        json.dump(metrics, file, indent=1)
    return metrics


def _parameters(model: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
