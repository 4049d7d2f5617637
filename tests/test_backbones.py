"""Text and vision encoders through transformers, and the cache of their features."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import textwrap

import numpy as np
import pytest
import torch
import transformers
from PIL import Image

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data import cache as cache_module
from flmoe_fast.data.cache import CachedFeatures, cache_features
from flmoe_fast.data.errors import DataError
from flmoe_fast.model.backbones import TextBackbone, VisionBackbone, open_image
from tests.small_transformers import GRID, WIDTH, save_clip, save_text, save_vit

TEXTS = ["a dog and two cities", "", "a tale of two cities, told by a dog to another dog " * 4, "dog"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("encoders")
    save_text(root / "text", TEXTS)
    save_clip(root / "clip")
    save_vit(root / "vit")
    return root


@pytest.fixture(scope="module")
def text(folder):
    return TextBackbone(folder / "text", max_length=24)


def picture(seed, size=(70, 50)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8))


def test_texts_become_the_last_hidden_state(folder, text):
    found = text(TEXTS, length=30)
    assert text.width == WIDTH and found.features.shape == (4, 30, WIDTH) and found.mask.shape == (4, 30)
    model = transformers.AutoModel.from_pretrained(folder / "text").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "text")
    for row, words in enumerate(TEXTS):
        ids = tokenizer(words, truncation=True, max_length=24)["input_ids"]
        with torch.no_grad():
            alone = model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        assert found.mask[row].tolist() == [True] * len(ids) + [False] * (30 - len(ids))
        torch.testing.assert_close(found.features[row, : len(ids)], alone, rtol=1e-4, atol=1e-5)
        assert (found.features[row, len(ids) :] == 0).all()
        assert found.names[row][0] == "<s>" and found.names[row][len(ids) - 1] == "</s>"
        assert found.names[row][len(ids) :] == [""] * (30 - len(ids))
    assert text.lengths(TEXTS) == found.mask.sum(1).tolist() and found.mask[2].sum() == 24
    assert "".join(found.names[0]).replace("<s>", "").replace("</s>", "").strip() == TEXTS[0]
    # Dropout of the backbone is never live, so features can be kept.
    torch.testing.assert_close(text(TEXTS, length=30).features, found.features)


@pytest.mark.parametrize("name", ("clip", "vit"))
def test_images_become_patches_without_the_class_token(folder, name):
    backbone = VisionBackbone(folder / name)
    images = [picture(0), picture(1, (30, 90)), picture(0).convert("L")]
    found = backbone(images)
    assert backbone.grid == (GRID, GRID) and found.features.shape == (3, GRID * GRID, WIDTH) and found.mask.all()
    processor = transformers.AutoImageProcessor.from_pretrained(folder / name)
    pixels = processor(images=[image.convert("RGB") for image in images], return_tensors="pt")["pixel_values"]
    whole = transformers.AutoModel.from_pretrained(folder / name).eval()
    with torch.no_grad():
        states = getattr(whole, "vision_model", whole)(pixel_values=pixels).last_hidden_state
    assert states.shape[1] == GRID * GRID + 1
    torch.testing.assert_close(found.features, states[:, 1:], rtol=1e-4, atol=1e-5)
    assert found.names[0][:4] == ["(0, 0)", "(0, 1)", "(0, 2)", "(1, 0)"]
    assert not any(parameter.requires_grad for parameter in backbone.model.parameters())


def test_errors_of_backbones(folder, text, tmp_path):
    with pytest.raises(ArgumentError, match="name: got .*nowhere"):
        TextBackbone(tmp_path / "nowhere")
    with pytest.raises(ArgumentError, match="name"):
        VisionBackbone(folder / "text")
    with pytest.raises(ArgumentError, match=r"texts\[1\]: got int"):
        text(["a", 1])
    with pytest.raises(ArgumentError, match="length"):
        text(TEXTS, length=5)
    with pytest.raises(ArgumentError, match="max_length"):
        TextBackbone(folder / "text", max_length=1)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG\r\n\x1a\nnothing")
    for path, reason in ((broken, "broken.png"), (tmp_path / "none.png", "no such file")):
        with pytest.raises(ArgumentError, match=reason):
            open_image(path)


def test_cache_gives_what_the_backbone_gives(text, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PART", 3)
    found = cache_features(tmp_path, text, TEXTS, batch_size=2, progress=False)
    direct = text(TEXTS)
    assert len(found) == 4 and found.length == direct.mask.shape[1] and found.width == WIDTH
    torch.testing.assert_close(found[torch.arange(4)], direct.features, rtol=1e-4, atol=1e-5)
    assert torch.equal(found.masks, direct.mask)
    assert found.names(3) == [name for name in direct.names[3] if name]
    view = found.subset([3, 0])
    assert torch.equal(view[:1], found[[3]]) and torch.equal(view.masks, found.masks[[3, 0]])
    assert view.names(1) == found.names(0)
    again = cache_features(tmp_path, text, TEXTS, batch_size=2, progress=False)
    assert again.folder == found.folder
    longer = CachedFeatures(found.folder, length=40)
    assert longer[[1]].shape == (1, 40, WIDTH) and longer.masks.sum() == found.masks.sum()
    with pytest.raises(ArgumentError, match="length"):
        CachedFeatures(found.folder, length=3)
    with pytest.raises(ArgumentError, match="rows"):
        CachedFeatures(found.folder, rows=[4])


def test_cache_is_used_and_never_mixed_up(folder, text, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_module, "PART", 2)
    first = cache_features(tmp_path / "c", text, TEXTS, progress=False)
    calls = []
    monkeypatch.setattr(type(text), "__call__", lambda self, *a: calls.append(a) or pytest.fail("encoded again"))
    cache_features(tmp_path / "c", text, TEXTS, progress=False)
    monkeypatch.undo()
    changed = cache_features(tmp_path / "c", text, [*TEXTS[:3], "cat"], progress=False)
    other = cache_features(tmp_path / "c", TextBackbone(folder / "text", max_length=9), TEXTS, progress=False)
    half = cache_features(tmp_path / "c", text, TEXTS, dtype="float16", progress=False)
    assert len({first.folder, changed.folder, other.folder, half.folder}) == 4
    torch.testing.assert_close(half[[0]], first[[0]], rtol=2e-3, atol=2e-3)


def test_cached_images_follow_their_files(folder, tmp_path):
    backbone = VisionBackbone(folder / "clip")
    paths = [tmp_path / f"{n}.png" for n in range(3)]
    for n, path in enumerate(paths):
        picture(n).save(path)
    found = cache_features(tmp_path / "c", backbone, paths, progress=False)
    torch.testing.assert_close(found[[2]], backbone([picture(2)]).features, rtol=1e-4, atol=1e-5)
    picture(9).save(paths[2])
    os.utime(paths[2], ns=(1, 1))
    assert cache_features(tmp_path / "c", backbone, paths, progress=False).folder != found.folder
    paths[1].write_bytes(b"no image")
    with pytest.raises(DataError, match=r"1\.png"):
        cache_features(tmp_path / "c", backbone, paths, progress=False)
    with pytest.raises(DataError, match="no such file"):
        cache_features(tmp_path / "c", backbone, [tmp_path / "gone.png"], progress=False)


KILLED = """
    import os, signal, sys
    from flmoe_fast.data import cache
    from flmoe_fast.model.backbones import TextBackbone
    cache.PART = 2
    written, original = [], cache._write_part
    def write(*arguments):
        original(*arguments)
        written.append(1)
        if len(written) == 2:
            os.kill(os.getpid(), signal.SIGKILL)
    cache._write_part = write
    cache.cache_features(sys.argv[2], TextBackbone(sys.argv[1], max_length=24), {texts!r}, progress=False)
"""


def test_killed_cache_goes_on(folder, text, tmp_path, monkeypatch):
    texts = [f"dog {n}" for n in range(7)]
    monkeypatch.setattr(cache_module, "PART", 2)
    program = textwrap.dedent(KILLED).replace("{texts!r}", repr(texts))
    done = subprocess.run([sys.executable, "-c", program, str(folder / "text"), str(tmp_path)], capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    (own,) = tmp_path.iterdir()
    before = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in own.iterdir()}
    assert len(before) == 2
    found = cache_features(tmp_path, text, texts, progress=False)
    after = {path.name: hashlib.sha256(path.read_bytes()).digest() for path in own.iterdir()}
    assert len(after) == 5 and {name: after[name] for name in before} == before
    torch.testing.assert_close(found[:], text(texts).features, rtol=1e-4, atol=1e-5)


def test_damaged_cache_is_named(text, tmp_path):
    found = cache_features(tmp_path, text, ["one dog"], progress=False)
    cache_module._opened.cache_clear()
    (found.folder / "part-00000.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(DataError, match="part-00000.safetensors"):
        CachedFeatures(found.folder)
    with pytest.raises(DataError, match="index.json"):
        CachedFeatures(tmp_path / "nothing")
