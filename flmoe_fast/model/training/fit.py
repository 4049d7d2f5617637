"""A training run: Adam on shuffled batches, judged after every epoch, and able to go on where it was stopped."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import numbers
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from flmoe_fast.checks import LARGEST_FEATURE, ArgumentError, integer, one_of
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.examples import Examples, Rows
from flmoe_fast.model.training.forward import PASSES, TrainingOutput, regularizer_factor, training_forward
from flmoe_fast.model.training.log import write_log
from flmoe_fast.model.training.losses import check_targets
from flmoe_fast.model.training.predict import evaluate
from flmoe_fast.model.training.state import TrainingState

#: What a training run may leave out or do otherwise, to see what it is worth.
ABLATIONS = (
    None,
    "no interaction loss",
    "less perturbed",
    "latent contrastive",
    "zero vector",
    "mean vector",
)
SELECTABLE = ("loss", "accuracy", "micro_f1", "macro_f1")
_LARGEST_LR = 1e37  # Adam's first step is ten times as large, and has to be a float32
_BARLOW_WARM_UP = 4  # epochs of a linear rise from 0 to the full weight


@dataclass(frozen=True)
class FitSettings:
    """How a model is trained.

    Attributes
    ----------
    epochs : int
        Passes over the data.
    batch_size : int
        Samples per step; the last batch of an epoch may be smaller.
    lr : float
        Learning rate of Adam.
    seed : int
        Fixes shuffling, noise and dropout; the global random state is left as it was.
    regularizer : str, optional
        See :func:`~flmoe_fast.model.training.forward.training_forward`. The weight of rep-barlow rises linearly over
        the first 5 epochs, from 0.
    regularizer_weight : float, optional
        See there.
    ablation : str, optional
        ``"no interaction loss"`` (one pass a step, as for an interaction weight of 0), ``"less perturbed"`` (two
        modalities, drawn anew for every step, are replaced), ``"latent contrastive"`` (interaction losses without a
        gradient), ``"zero vector"`` or ``"mean vector"`` (what replaces a modality instead of noise; the mean is a
        running one over the steps so far). Other ablations are configurations: ``roles``, ``routing``.
    gate_gradient, passes
        See :func:`~flmoe_fast.model.training.forward.training_forward`.
    select : str, optional
        A number of the validation (``"loss"``, ``"accuracy"``, ``"micro_f1"``, ``"macro_f1"``): the model ends with the
        weights of the best epoch instead of the last.
    patience : int, optional
        Training ends after so many epochs in a row that were no better than the best before them, by ``select``. More
        patience, given later, lets a run go on from its checkpoint.
    checkpoint_steps : int, optional
        Write the checkpoint also after this many steps within an epoch.

    Raises
    ------
    ArgumentError
        A value that is none of these.
    """

    epochs: int
    batch_size: int = 32
    lr: float = 1e-4
    seed: int = 0
    regularizer: str | None = None
    regularizer_weight: float | None = None
    ablation: str | None = None
    gate_gradient: bool = True
    passes: str = "auto"
    select: str | None = None
    patience: int | None = None
    checkpoint_steps: int | None = None

    def __post_init__(self) -> None:
        integer("epochs", self.epochs, least=1)
        integer("batch_size", self.batch_size, least=1)
        integer("seed", self.seed, least=0)
        if isinstance(self.lr, bool) or not isinstance(self.lr, numbers.Real) or not (0 < self.lr < _LARGEST_LR):
            raise ArgumentError("lr", repr(self.lr), f"a number > 0 and < {_LARGEST_LR:g}")
        regularizer_factor(self.regularizer, self.regularizer_weight)
        one_of("ablation", self.ablation, ABLATIONS)
        one_of("passes", self.passes, PASSES)
        one_of("select", self.select, (None, *SELECTABLE))
        if self.patience is not None:
            integer("patience", self.patience, least=1)
            if self.select is None:
                raise ArgumentError("patience", self.patience, f"select, one of {', '.join(SELECTABLE)}, beside it")
        if self.checkpoint_steps is not None:
            integer("checkpoint_steps", self.checkpoint_steps, least=1)

    def weight(self, epoch: int) -> float:
        """The regulariser's weight in an epoch."""
        warm = min(1.0, epoch / _BARLOW_WARM_UP) if self.regularizer == "rep-barlow" else 1.0
        return warm * regularizer_factor(self.regularizer, self.regularizer_weight)

    def identity(self) -> dict[str, Any]:
        """What makes a run this run, as JSON types. How long it is trained is not among it: it may be trained on."""
        kept = dataclasses.asdict(self)
        for name in ("epochs", "patience", "passes", "checkpoint_steps"):
            del kept[name]
        weight = regularizer_factor(self.regularizer, self.regularizer_weight)
        return {**kept, "lr": float(self.lr), "regularizer_weight": weight}


def fit(
    model: FLI2MoE,
    data: Examples,
    settings: FitSettings,
    *,
    validation: Examples | None = None,
    checkpoint: str | os.PathLike | None = None,
    log: str | os.PathLike | None = None,
    callback: Callable[[dict[str, Any]], object] | None = None,
    progress: bool = True,
) -> list[dict[str, Any]]:
    """Train with Adam on shuffled batches; encoders with trainable parameters are trained too.

    Parameters
    ----------
    model : FLI2MoE
        Trained in place and left in eval mode.
    data : Examples
        What it is trained on. Batches are moved to the model's device.
    settings : FitSettings
    validation : Examples, optional
        Judged after every epoch, in eval mode; adds ``validation`` to the records.
    checkpoint : path, optional
        File with everything needed to go on. It is written after every epoch, and where it exists the run continues
        from it and ends with the numbers of an unbroken run.
    log : path, optional
        ``.jsonl`` or ``.csv`` file with one record per epoch so far, rewritten after every epoch.
    callback : function of a dict, optional
        Called with an epoch's record when the epoch is over and written, for a logger. What it returns is not read;
        what it raises ends the training, which can go on from the checkpoint.
    progress : bool
        Show a progress bar over the epochs.

    Returns
    -------
    list of dict
        One per epoch: ``epoch`` (from 0), ``loss``, ``task_loss``, ``interaction_losses`` (list of E),
        ``regularization``, ``gate_loss``, ``accuracy`` (share of correct training predictions, for ``"multilabel"`` of
        correct labels, for ``"regression"`` of correct signs, in train mode), each the mean over samples, ``seconds``,
        and ``validation``, a dict of its numbers, where there is one.

    Raises
    ------
    ArgumentError
        Data that do not match the model, the same target for every sample, or a checkpoint of another run.
    FloatingPointError
        Training diverged: the loss or a weight is not finite. The checkpoint is that of the last epoch before.
    """
    if settings.select is not None and validation is None:
        raise ArgumentError("validation", None, f"held-out data to select by {settings.select}")
    if log is not None and Path(log).suffix not in (".jsonl", ".csv"):
        raise ArgumentError("log", str(log), "a name ending in .jsonl or .csv")
    rows = Rows(model, data.inputs, data.masks)
    check_targets(model, data.targets, len(rows))
    _refuse_one_target(data.targets)
    run = _Run(model, rows, data.targets, settings)
    with _seeded(settings.seed, run.device):
        if checkpoint is not None and Path(checkpoint).exists():
            run.state.load(checkpoint)
        begun = min(run.state.epoch, settings.epochs)
        steps = math.ceil(len(rows) / settings.batch_size)
        shown = {"desc": f"training {settings.epochs} epochs", "unit": "step", "disable": not progress}
        with tqdm(total=settings.epochs * steps, initial=begun * steps, **shown) as bar:
            while run.state.epoch < settings.epochs and not run.state.stale(settings.patience):
                record = run.epoch(checkpoint, bar.update)
                if validation is not None:
                    record["validation"] = evaluate(model, validation, batch_size=max(settings.batch_size, 64))
                run.state.finish_epoch(record, settings.select)
                if checkpoint is not None:
                    run.state.save(checkpoint)
                if log is not None:
                    write_log(log, run.state.history, model.config.expert_names)
                bar.set_postfix(
                    epoch=run.state.epoch, loss=f"{record['loss']:.4f}", accuracy=f"{record['accuracy']:.4f}"
                )
                if callback is not None:
                    callback(copy.deepcopy(record))
    if settings.select is not None:
        run.state.restore_best()
    model.eval()
    return run.state.history


class _Run:
    """Steps and epochs of one run."""

    def __init__(self, model: FLI2MoE, rows: Rows, targets: Tensor, settings: FitSettings):
        self.model, self.rows, self.targets, self.settings = model, rows, targets, settings
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        if not self.parameters:
            raise ArgumentError("model", "a model without trainable parameters", "parameters with requires_grad")
        self.device = self.parameters[0].device
        self.state = TrainingState(
            model,
            torch.optim.Adam(self.parameters, lr=settings.lr),
            self.device,
            settings.seed,
            {"config": model.config.to_dict(), "samples": len(rows), **settings.identity()},
        )

    def epoch(self, checkpoint: str | os.PathLike | None, tick: Callable[[], object]) -> dict[str, Any]:
        """The rest of an epoch, and its record; ``tick`` is called after every step."""
        state, every = self.state, self.settings.checkpoint_steps
        begin = time.perf_counter()
        self.model.train()
        for index in state.batches(len(self.rows), self.settings.batch_size):
            try:
                out, right = self._step(index)
            except ArgumentError as error:
                self._check_weights(error)
                raise
            scalars = [out.loss, out.task_loss, out.regularization, out.gate_loss, right, *out.interaction_losses]
            state.count(torch.stack(scalars).detach().double() * len(index))
            tick()
            if checkpoint is not None and every and state.step % every == 0:
                self._check_weights()
                state.seconds += time.perf_counter() - begin
                state.save(checkpoint)
                begin = time.perf_counter()
        loss, task, regularization, gate, accuracy, *interaction = (state.sums / len(self.rows)).tolist()
        if not math.isfinite(loss):
            raise FloatingPointError(self._diverged(f"the loss became {loss}"))
        self._check_weights()
        state.seconds += time.perf_counter() - begin
        return {
            "epoch": state.epoch,
            "loss": loss,
            "task_loss": task,
            "interaction_losses": interaction,
            "regularization": regularization,
            "gate_loss": gate,
            "accuracy": accuracy,
            "seconds": state.seconds,
        }

    def _step(self, index: Tensor) -> tuple[TrainingOutput, Tensor]:
        model, settings, state = self.model, self.settings, self.state
        features, masks = self.rows.batch(index, self.device)
        targets = self.targets[index.to(self.targets.device)].to(self.device)
        out = training_forward(
            model,
            features,
            masks,
            targets,
            generator=state.noise,
            regularizer=settings.regularizer,
            regularizer_weight=settings.weight(state.epoch),
            gate_gradient=settings.gate_gradient,
            passes=settings.passes,
            **_ablated(settings.ablation, model, features, state),
        )
        state.optimizer.zero_grad(set_to_none=True)
        out.loss.backward()
        state.optimizer.step()
        return out, _share_right(model, out.logits, targets)

    def _check_weights(self, error: ArgumentError | None = None) -> None:
        """Name divergence, which otherwise shows later, as features or logits that nothing can be computed with."""
        if not all(bool((parameter.abs() < LARGEST_FEATURE).all()) for parameter in self.parameters):
            what = f"a weight is no longer a number below {LARGEST_FEATURE:g}"
            raise FloatingPointError(self._diverged(what)) from error

    def _diverged(self, what: str) -> str:
        at = f"in epoch {self.state.epoch}, by step {self.state.step}"
        return f"training diverged {at}: {what}; a smaller lr than {self.settings.lr:g} may help"


def _refuse_one_target(targets: Tensor) -> None:
    """Nothing can be learned, and nothing explained, where every sample has the same target."""
    rows = targets.reshape(len(targets), -1)
    if len(rows) > 1 and bool((rows == rows[0]).all()):
        value = rows[0].tolist()
        got = f"{value[0] if len(value) == 1 else value} for all {len(rows)} samples"
        raise ArgumentError("targets", got, "at least two different ones")


def _ablated(ablation: str | None, model: FLI2MoE, features: Sequence[Tensor], run: TrainingState) -> dict[str, Any]:
    """What an ablation changes in one step."""
    count = len(features)
    if ablation == "no interaction loss" or model.config.interaction_weight == 0:
        return {"perturbed": ()}
    if ablation == "less perturbed":
        return {"perturbed": sorted(torch.randperm(count, generator=run.choice)[:2].tolist())}
    if ablation == "latent contrastive":
        return {"detach": True}
    if ablation == "zero vector":
        return {"replacements": [torch.zeros_like(feature[0]) for feature in features]}
    if ablation == "mean vector":
        return {"replacements": run.running_means(features)}
    return {}


def _share_right(model: FLI2MoE, logits: Tensor, targets: Tensor) -> Tensor:
    if model.config.task == "regression":
        right = (logits >= 0) == (targets.reshape(logits.shape) >= 0)
    elif model.config.task == "multilabel":
        right = (logits > 0) == targets.bool()
    else:
        right = logits.argmax(dim=-1) == targets
    return right.to(logits.dtype).mean()


@contextlib.contextmanager
def _seeded(seed: int, device: torch.device) -> Iterator[None]:
    # Dropout draws from the global generator of its device, and only from there.
    cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if cuda else []):
        torch.default_generator.manual_seed(seed)
        if cuda:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
