"""A run's data, model and samples, made from its settings."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch

from flmoe_fast.checks import ArgumentError, device
from flmoe_fast.data.digits import CLASSES, MODALITIES, PIXELS, TOKENS, two_view_digits
from flmoe_fast.data.hdxor import hd_xor, read_hd_xor
from flmoe_fast.data.prepare import Prepared, prepare
from flmoe_fast.data.raw import RawData
from flmoe_fast.data.splits import Part, Splits
from flmoe_fast.model.backbones import TextBackbone, VisionBackbone, open_image
from flmoe_fast.model.checkpoint import load_weights
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.encoders import ColumnGroupEncoder, ProjectionEncoder, TabularTokenEncoder
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.pipeline.show.views import View
from flmoe_fast.runs.settings import READERS, RunSettings

HELD_BACK = 0.15


@dataclass(frozen=True)
class Sample:
    """One sample as the game and the report need it: M features (T_m, H), masks and players, and what it looks like."""

    id: str
    features: list[torch.Tensor]
    masks: list[torch.Tensor] | None
    players: list[list[int]]
    truth: tuple
    views: tuple[View, ...]


class Study:
    """Data and encoders of a run; reading raw data and encoding it with frozen backbones happens here.

    Parameters
    ----------
    settings : RunSettings
    progress : bool
        Show progress bars.
    """

    def __init__(self, settings: RunSettings, progress: bool = True):
        self.settings = settings
        self.raw: RawData | None = None
        self.backbones: dict[str, TextBackbone | VisionBackbone] = {}
        hidden = settings.model.get("hidden")
        if not isinstance(hidden, int):
            raise ArgumentError("model.hidden", repr(hidden), "the token width")
        kind = settings.data["kind"]
        torch.manual_seed(settings.training.seed)
        if kind in READERS:
            self.prepared = self._read(hidden, progress)
        else:
            self.prepared = self._digits(hidden) if kind == "digits" else self._hd_xor(hidden)
        self.splits = self.prepared.splits

    def _read(self, hidden: int, progress: bool) -> Prepared:
        options = dict(self.settings.data)
        kind, path = options.pop("kind"), options.pop("path")
        caching = {name: options.pop(name) for name in ("dtype", "batch_size") if name in options}
        # Some readers choose by themselves which modalities they read.
        own = "modalities" in inspect.signature(READERS[kind]).parameters
        wanted = None if own else options.pop("modalities", None)
        self.raw = READERS[kind](path, **options)
        if wanted is not None:
            self.raw = self.raw.only(wanted)
        for name, modality_kind in self.raw.kinds.items():
            if modality_kind not in ("text", "image"):
                continue
            if name not in self.settings.encoders:
                raise ArgumentError(
                    f"encoders.{name}", "no such section", f"[encoders.{name}] for this {modality_kind}"
                )
            backbone = TextBackbone if modality_kind == "text" else VisionBackbone
            self.backbones[name] = backbone(**self.settings.encoders[name])
        return prepare(
            self.raw,
            hidden,
            backbones=self.backbones,
            cache=self.settings.out / "features",
            patches=self.settings.model.get("patches"),
            groups=self.settings.model.get("groups"),
            progress=progress,
            **caching,
        )

    def _digits(self, hidden: int) -> Prepared:
        training, test = two_view_digits(self.settings.data.get("seed", 0))
        kept = round((1 - HELD_BACK) * len(training.labels))

        def part(digits, rows: slice, name: str) -> Part:
            masks = [mask[rows].bool() for mask in digits.masks]
            inputs = [half[rows] for half in digits.inputs]
            labels = digits.labels[rows]
            return Part(inputs, masks, labels, tuple(f"{name}-{n}" for n in range(len(labels))))

        parts = part(training, slice(kept), "train"), part(training, slice(kept, None), "valid")
        classes = tuple(str(digit) for digit in range(CLASSES))
        splits = Splits("digits", MODALITIES, "multiclass", classes, *parts, part(test, slice(None), "test"))
        encoders: dict[str, torch.nn.Module] = {name: ProjectionEncoder(PIXELS, hidden) for name in MODALITIES}
        return Prepared(splits, encoders, (TOKENS, TOKENS))

    def _hd_xor(self, hidden: int) -> Prepared:
        options = {name: value for name, value in self.settings.data.items() if name != "kind"}
        splits = read_hd_xor(options["path"]) if "path" in options else hd_xor(**options)
        groups = self.settings.model.get("groups")
        encoders: dict[str, torch.nn.Module] = {}
        tokens = []
        for name, values in zip(splits.modalities, splits.train.inputs):
            columns = values.shape[1]
            tokens.append(groups or columns)
            encoders[name] = (
                ColumnGroupEncoder(columns, groups, hidden) if groups else TabularTokenEncoder(columns, hidden)
            )
        masked = {}
        for name in ("train", "valid", "test"):
            part = splits.part(name)
            masks = [torch.ones(len(part), count, dtype=torch.bool) for count in tokens]
            masked[name] = Part(part.inputs, masks, part.targets, part.ids)
        splits = Splits(splits.name, splits.modalities, splits.task, splits.classes, **masked)
        return Prepared(splits, encoders, tuple(tokens))

    def model(self) -> FLI2MoE:
        """The untrained model: the same for the same settings."""
        fields = {name: value for name, value in self.settings.model.items() if name not in ("patches", "groups")}
        original = fields.get("generation") == "original"
        torch.manual_seed(self.settings.training.seed)
        config = FLI2MoEConfig(
            modalities=self.splits.modalities,
            classes=len(self.splits.classes),
            task=self.splits.task,
            num_tokens=self.prepared.tokens if original else None,
            **{"heads": 4, "layers": 2, **fields},
        )
        return FLI2MoE(config, self.prepared.encoders).to(device("training.device", self.settings.training.device))

    def trained(self) -> FLI2MoE:
        """The trained model of the run's folder."""
        model, path = self.model(), self.settings.out / "model.safetensors"
        if not path.is_file():
            raise ArgumentError("out", f"no {path}", "a trained run: flmoe-fast train comes first")
        load_weights(model, path)
        return model.eval()

    def held(self, part: str) -> Examples:
        """Inputs, masks and targets of a part."""
        data = self.splits.part(part)
        return Examples(data.inputs, data.masks, data.targets)

    @torch.no_grad()
    def sample(self, model: FLI2MoE, part: str, row: int, views: bool = True) -> Sample:
        """One sample of a part."""
        data = self.splits.part(part)
        device = next(model.parameters()).device
        inputs = [column[torch.tensor([row])].to(device) for column in data.inputs]
        features = [feature[0] for feature in model.encode(inputs)]
        masks = None if data.masks is None else [mask[row] for mask in data.masks]
        players = []
        for m, name in enumerate(self.splits.modalities):
            valid = range(len(features[m])) if masks is None else masks[m].nonzero()[:, 0].tolist()
            start = 1 if self.raw is not None and self.raw.kinds[name] == "text" else 0
            players.append([position for position in valid if position >= start])
        shown = tuple(self._view(name, m, data, row) for m, name in enumerate(self.splits.modalities)) if views else ()
        return Sample(data.ids[row], features, masks, players, self._truth(data.targets[row]), shown)

    def _truth(self, target: torch.Tensor) -> tuple:
        if self.splits.task == "multilabel":
            return tuple(target.nonzero()[:, 0].tolist())
        return tuple(target.reshape(-1).tolist())

    def _view(self, name: str, m: int, data: Part, row: int) -> View:
        column: Any = data.inputs[m]
        kind = "table" if self.raw is None else self.raw.kinds[name]
        if self.settings.data["kind"] == "digits":
            return View(name, "image", tuple(f"row {n}" for n in range(TOKENS)), column[row].numpy(), (TOKENS, 1))
        if kind == "text":
            return View(name, "text", tuple(column.names(row)))
        if kind == "image" and self.raw is not None:
            backbone = cast(VisionBackbone, self.backbones[name])
            place = self.raw.ids.index(data.ids[row])
            image = _seen(backbone, self.raw.values[name][place])
            return View(name, "image", tuple(column.names(row)), image, backbone.grid)
        values = column[torch.tensor([row])][0]
        count = self.prepared.tokens[m]
        if values.dim() == 2:
            return View(name, "table", tuple(f"step {n}" for n in range(count)))
        if count != len(values):
            edges = np.arange(count + 1) * len(values) // count
            return View(name, "table", tuple(f"columns {a} to {b - 1}" for a, b in zip(edges, edges[1:])))
        titles = self.raw.columns.get(name, ()) if self.raw is not None else ()
        if titles:  # as they were written, not as the model takes them
            assert self.raw is not None
            values = self.raw.values[name][self.raw.ids.index(data.ids[row])]
        titles = titles or tuple(f"{name} {n}" for n in range(count))
        return View(name, "table", tuple(f"{title} = {value:.5g}" for title, value in zip(titles, values.tolist())))


def _seen(backbone: VisionBackbone, path) -> np.ndarray:
    """An image as the backbone sees it, in colours a person can see."""
    pixels = backbone.pixels([open_image(path)])[0]
    mean, spread = (getattr(backbone.processor, name, None) for name in ("image_mean", "image_std"))
    if getattr(backbone.processor, "do_normalize", False) and mean and spread:
        pixels = pixels * torch.tensor(spread)[:, None, None] + torch.tensor(mean)[:, None, None]
    return (255 * pixels.clamp(0, 1)).round().byte().permute(1, 2, 0).numpy()


def mean_features(model: FLI2MoE, part: Part, batch_size: int = 256) -> None:
    """Give the model the mean token of every modality over a part, in batches."""
    parameter = next(model.parameters())
    sums = [torch.zeros(model.config.hidden, dtype=torch.float64, device=parameter.device) for _ in part.inputs]
    counts = [0] * len(sums)
    with torch.no_grad():
        for index in torch.arange(len(part)).split(batch_size):
            features = model.encode([column[index].to(parameter.device) for column in part.inputs])
            for m, feature in enumerate(features):
                tokens = model.tokens_in_play(m, feature, None if part.masks is None else part.masks[m][index])
                sums[m] += tokens.double().sum(0)
                counts[m] += len(tokens)
    model.feature_means = [(total / max(count, 1)).to(parameter.dtype) for total, count in zip(sums, counts)]
