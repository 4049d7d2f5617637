"""Everything a training run is at a moment, so that a killed run goes on as if nothing had happened."""

from __future__ import annotations

import copy
import os
import pickle
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from flmoe_fast.checks import ArgumentError
from flmoe_fast.files import replacing
from flmoe_fast.model.network import FLI2MoE

FORMAT = 1


class TrainingState:
    """Model, optimiser, position in the data, random states and records of one run.

    Parameters
    ----------
    model : FLI2MoE
        Trained in place.
    optimizer : torch.optim.Optimizer
        Of the model's trainable parameters.
    device : torch.device
        Where the noise is drawn.
    seed : int
        Of the shuffling, the noise and the choices of modalities.
    options : dict from str to Any
        What makes the run this run, plain JSON types; a file of a run with other options is refused. How long it is
        trained is not among them: a finished run may be trained further.
    """

    def __init__(
        self,
        model: FLI2MoE,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        seed: int,
        options: dict[str, Any],
    ):
        self.model, self.optimizer, self.options = model, optimizer, options
        self.device = device
        self.order = torch.Generator().manual_seed(seed)
        self.choice = torch.Generator().manual_seed(seed)
        self.noise = torch.Generator(device).manual_seed(seed)
        self.epoch, self.step, self.seconds = 0, 0, 0.0
        self.sums: Tensor = torch.zeros(())
        self.history: list[dict[str, Any]] = []
        self.best: dict[str, Any] | None = None
        self._epoch_order = self.order.get_state()
        self._feature_sums: list[Tensor] | None = None
        self._feature_count = 0

    def batches(self, count: int, batch_size: int) -> Iterator[Tensor]:
        """Row numbers of the epoch's batches that are still to come."""
        self._epoch_order = self.order.get_state()
        for index in torch.randperm(count, generator=self.order).split(batch_size)[self.step :]:
            self.step += 1
            yield index

    def count(self, sums: Tensor) -> None:
        """Add a batch's sums over samples to the epoch's."""
        self.sums = sums if self.sums.dim() == 0 else self.sums + sums

    def running_means(self, features: Sequence[Tensor]) -> list[Tensor]:
        """Mean of every token position (T_m, H) over this and all earlier batches."""
        sums = [feature.detach().sum(0) for feature in features]
        if self._feature_sums is not None:
            sums = [new + old for new, old in zip(sums, self._feature_sums, strict=True)]
        self._feature_sums = sums
        self._feature_count += len(features[0])
        return [total / self._feature_count for total in sums]

    def finish_epoch(self, record: dict[str, Any], select: str | None) -> None:
        """Keep the record, and the weights if they are the best so far; the first of equals wins."""
        self.history.append(record)
        if select is not None:
            if select not in record["validation"]:
                raise ArgumentError("select", repr(select), f"one of {', '.join(record['validation'])}")
            value = record["validation"][select]
            value = -value if select == "loss" else value
            if self.best is None or value > self.best["value"]:
                state = {key: tensor.detach().clone() for key, tensor in self.model.state_dict().items()}
                self.best = {"value": value, "epoch": self.epoch, "state": state}
        self.epoch, self.step, self.seconds = self.epoch + 1, 0, 0.0
        self.sums = torch.zeros(())
        self._epoch_order = self.order.get_state()

    def stale(self, patience: int | None) -> bool:
        """Whether that many epochs have passed since the best one."""
        return patience is not None and self.best is not None and self.epoch - 1 - self.best["epoch"] >= patience

    def restore_best(self) -> None:
        """Give the model the weights of the selected epoch."""
        if self.best is not None:
            self.model.load_state_dict(self.best["state"])

    def save(self, path: str | os.PathLike) -> None:
        """Write the state; an older file stays until the new one is complete."""
        cuda = self.device.type == "cuda"
        content = {
            "format": FORMAT,
            "options": self.options,
            "epoch": self.epoch,
            "step": self.step,
            "seconds": self.seconds,
            "sums": self.sums,
            "history": self.history,
            "best": self.best,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "order": self._epoch_order,
            "choice": self.choice.get_state(),
            "noise": self.noise.get_state(),
            "dropout": torch.get_rng_state(),
            "dropout_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
            "feature_sums": self._feature_sums,
            "feature_count": self._feature_count,
        }
        with replacing(path) as file:
            torch.save(content, file)

    def load(self, path: str | os.PathLike) -> None:
        """Go back to a written state. Nothing in the file is executed.

        Raises
        ------
        ArgumentError
            A damaged file, or one of a run with other options.
        """
        expected = "a file written by an unfinished training run with the same options"
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as problem:
            got = f"{path} ({str(problem).splitlines()[0] if str(problem) else type(problem).__name__})"
            raise ArgumentError("checkpoint", got, expected) from problem
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise ArgumentError("checkpoint", f"{path}, another kind of file", expected)
        for name, value in self.options.items():
            stored = content["options"].get(name)
            if stored != value:
                raise ArgumentError("checkpoint", f"{path}, of a run with {name} {stored!r}", f"{name} {value!r}")
        self.model.load_state_dict(content["model"])
        self.optimizer.load_state_dict(content["optimizer"])
        for name in ("epoch", "step", "seconds", "history"):
            setattr(self, name, copy.deepcopy(content[name]))
        self.sums = content["sums"].to(self.device) if content["sums"].dim() else content["sums"]
        self.best = content["best"]
        self.order.set_state(content["order"])
        self.choice.set_state(content["choice"])
        self.noise.set_state(content["noise"])
        torch.set_rng_state(content["dropout"])
        if content["dropout_cuda"] is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(content["dropout_cuda"], self.device)
        sums = content["feature_sums"]
        self._feature_sums = None if sums is None else [part.to(self.device) for part in sums]
        self._feature_count = content["feature_count"]
