"""Frozen encoders of raw text and images, through the ``transformers`` package (extra ``transformers``).

A backbone turns strings or images into token features. It is never trained and always in eval mode, so its features
can be kept; what is trained on top is a :class:`~flmoe_fast.model.encoders.ProjectionEncoder`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn

from flmoe_fast.checks import ArgumentError, integer
from flmoe_fast.environment import require

if TYPE_CHECKING:
    from PIL import Image


class Encoded(NamedTuple):
    """Token features of N inputs.

    Attributes
    ----------
    features : Tensor
        (N, T, F) float32; rows of padding are zero.
    mask : Tensor
        (N, T) bool, true for tokens and false for padding.
    names : list[list of str]
        For each input the names of its T tokens, "" for padding.
    """

    features: Tensor
    mask: Tensor
    names: list[list[str]]


class TextBackbone:
    """A frozen text encoder and its tokenizer.

    All tokens of the last hidden state are kept, the start symbol (position 0, which is no player of a game) and the
    end symbol among them. Texts are cut to ``max_length`` tokens.

    Parameters
    ----------
    name : path
        Folder written by ``save_pretrained``, or a name on the model hub, of anything ``AutoModel`` and
        ``AutoTokenizer`` read.
    max_length : int
        Most tokens of a text, special ones included.
    device : str
        Where it runs.
    local_only : bool
        Never ask the model hub.

    Raises
    ------
    ArgumentError
        No such folder or model, or one without a tokenizer or a padding token.
    """

    kind = "text"

    def __init__(self, name: str | os.PathLike, *, max_length: int = 320, device: str = "cpu", local_only: bool = True):
        transformers = require("transformers", "transformers")
        self.max_length = integer("max_length", max_length, least=3)
        with _quiet(transformers), _readable(name, "a text encoder with its tokenizer"):
            self.tokenizer = transformers.AutoTokenizer.from_pretrained(name, local_files_only=local_only)
            model = transformers.AutoModel.from_pretrained(name, local_files_only=local_only)
        if self.tokenizer.pad_token is None:
            raise ArgumentError("name", f"{name}, whose tokenizer has no padding token", "a tokenizer with one")
        self.model = _frozen(model).to(device)
        self.device = torch.device(device)
        self.width = int(model.config.hidden_size)
        self.fingerprint = _fingerprint(self.model, self.tokenizer.get_vocab(), self.max_length)

    def lengths(self, texts: Sequence[str]) -> list[int]:
        """Number of tokens of each text."""
        _check_texts(texts)
        return [len(ids) for ids in self._tokens(list(texts))["input_ids"]] if len(texts) else []

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], length: int | None = None) -> Encoded:
        """Encode texts.

        Parameters
        ----------
        texts : sequence of str
            N strings.
        length : int, optional
            Tokens to pad to, at least those of the longest text; by default as many. Positions of the modalities after
            the text depend on it, so a model needs the same one for all its data.
        """
        _check_texts(texts)
        tokens = self._tokens(list(texts))
        longest = max(map(len, tokens["input_ids"]))
        length = longest if length is None else integer("length", length, least=longest)
        batch = self.tokenizer.pad(tokens, padding="max_length", max_length=longest, return_tensors="pt")
        mask = batch["attention_mask"].bool()
        found = self.model(**{key: value.to(self.device) for key, value in batch.items()}).last_hidden_state
        features = found.float().cpu().masked_fill(~mask[:, :, None], 0.0)
        names = [
            [self.tokenizer.decode([token]) if keep else "" for token, keep in zip(ids, kept)]
            + [""] * (length - longest)
            for ids, kept in zip(batch["input_ids"].tolist(), mask.tolist())
        ]
        more = length - longest
        return Encoded(nn.functional.pad(features, (0, 0, 0, more)), nn.functional.pad(mask, (0, more)), names)

    def _tokens(self, texts: list[str]) -> dict[str, list]:
        return self.tokenizer(texts, truncation=True, max_length=self.max_length)


class VisionBackbone:
    """A frozen vision transformer and its image processor.

    The patches of the last hidden state are kept in row-major order; class and register tokens in front of them are
    dropped. Of models with a text tower (CLIP, SigLIP) only the vision tower is read.

    Parameters
    ----------
    name : path
        Folder written by ``save_pretrained``, or a name on the model hub.
    device : str
        Where it runs.
    local_only : bool
        Never ask the model hub.

    Raises
    ------
    ArgumentError
        No such folder or model, one without an image processor, or no vision transformer.
    """

    kind = "image"

    def __init__(self, name: str | os.PathLike, *, device: str = "cpu", local_only: bool = True):
        transformers = require("transformers", "transformers")
        options = {"local_files_only": local_only}
        with _quiet(transformers), _readable(name, "a vision encoder with its image processor"):
            config = transformers.AutoConfig.from_pretrained(name, **options)
            self.processor = transformers.AutoImageProcessor.from_pretrained(name, **options)
            towers = {"clip": "CLIPVisionModel", "siglip": "SiglipVisionModel", "siglip2": "Siglip2VisionModel"}
            model_class = getattr(transformers, towers.get(config.model_type, "AutoModel"))
            model = model_class.from_pretrained(name, **options)
        self.model = _frozen(getattr(model, "vision_model", model)).to(device)
        self.device = torch.device(device)
        vision = getattr(config, "vision_config", config)
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int):
            raise ArgumentError("name", f"{name} ({config.model_type})", "a vision transformer with square patches")
        self.grid = (size // patch, size // patch)
        self.width = int(vision.hidden_size)
        self.fingerprint = _fingerprint(self.model, self.processor.to_dict(), self.grid)

    @property
    def tokens(self) -> int:
        """Patches of an image."""
        return self.grid[0] * self.grid[1]

    def pixels(self, images: Sequence[Image.Image]) -> Tensor:
        """Images as the model sees them (N, 3, height, width)."""
        images = [image.convert("RGB") for image in images]
        return self.processor(images=images, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image]) -> Encoded:
        """Encode N PIL images."""
        pixels = self.pixels(images)
        found = self.model(pixel_values=pixels.to(self.device)).last_hidden_state
        extra = found.shape[1] - self.tokens
        if extra < 0:
            raise ArgumentError("images", f"{found.shape[1]} tokens an image", f"at least {self.tokens} patches")
        features = found[:, extra:].float().cpu()
        rows, columns = self.grid
        names = [f"({row}, {column})" for row in range(rows) for column in range(columns)]
        return Encoded(features, torch.ones(features.shape[:2], dtype=torch.bool), [names] * len(features))


@contextlib.contextmanager
def _quiet(transformers) -> Iterator[None]:
    """No load reports: that a tower has no text model is meant."""
    logging = transformers.utils.logging
    before = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(before)
        if bars:
            logging.enable_progress_bar()


@contextlib.contextmanager
def _readable(name: str | os.PathLike, expected: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, KeyError) as problem:
        missing = os.path.isabs(name) or os.sep in str(name).replace(os.sep, "", 1) or str(name).startswith(".")
        why = "no such folder" if missing and not Path(name).exists() else str(problem).strip().splitlines()[0]
        got = f"{name} ({why})"
        raise ArgumentError("name", got, f"a folder or hub name of {expected}") from problem


def _frozen(model: nn.Module) -> nn.Module:
    return model.eval().requires_grad_(False)


def _check_texts(texts: Sequence[str]) -> None:
    for n, text in enumerate(texts):
        if not isinstance(text, str):
            raise ArgumentError(f"texts[{n}]", type(text).__name__, "a string")


def _fingerprint(model: nn.Module, *more: object) -> str:
    """What features depend on, as 16 hexadecimal digits: weights, and vocabulary or image processing."""
    digest = hashlib.sha256(json.dumps(more, sort_keys=True, default=str).encode())
    for key, tensor in model.state_dict().items():
        digest.update(f"{key} {tuple(tensor.shape)}".encode())
        # A few rows of every tensor tell models apart; hashing gigabytes would take longer than loading them.
        sample = tensor.flatten()[:: max(1, tensor.numel() // 256)].float().cpu().contiguous()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def open_image(path: str | os.PathLike) -> Image.Image:
    """A PIL image of a file, decoded.

    Raises
    ------
    ArgumentError
        No such file, or one that is no image or broken.
    """
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (
        *(UnidentifiedImageError, Image.DecompressionBombError, OSError, SyntaxError, ValueError, TypeError),
        *(LookupError, ArithmeticError, EOFError, MemoryError, RuntimeError, NotImplementedError, struct.error),
    ) as problem:
        first = str(problem).splitlines() or [type(problem).__name__]
        reason = "no such file" if not Path(path).is_file() else first[0]
        raise ArgumentError("image", f"{path} ({reason})", "a readable image") from problem
