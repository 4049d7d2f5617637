"""Files made to harm, read in a process of its own: no signal, only the package's errors, little memory and time."""

from __future__ import annotations

import zipfile
import zlib

import pytest
import torch

from tests.soak import files

#: MiB that the process may have had in the end, and seconds for a file; without reading anything it has about 400.
MEMORY, SECONDS = 1500, 20.0


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Every kind of file, and a process that reads them."""
    folder = tmp_path_factory.mktemp("corpus")
    bases = files.write_bases(folder)
    reader = files.Reader(folder)
    yield folder, bases, reader
    reader.close()


def archive(path, *parts, packed=True):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED if packed else zipfile.ZIP_STORED) as made:
        for name, content in parts:
            made.writestr(name, content)


def npy(shape, kind="<f4", content=b""):
    header = f"{{'descr': {kind!r}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(len(header) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def hostile(folder):
    """Kind and path of every file; each must be refused."""
    made = []

    def add(kind, name, content=None):
        path = folder / name
        if content is not None:
            path.write_bytes(content)
        made.append((kind, path))
        return path

    forged = b"\x80\x04cnumpy\nndarray\n(K\x01\x85\x8c\x01OC\x08AAAAAAAAtR."
    add("pickle", "forged.pkl", forged)
    add("mosi", "forged-mosi.pkl", forged)
    add("hdxor", "forged-hdxor.pkl", forged)
    add("pickle", "deep.pkl", b"\x80\x04" + b"]" * 100_000 + b"a" * 99_999 + b".")
    add("pickle", "system.pkl", b"cposix\nsystem\n(S'true'\ntR.")
    bits = b"cnumpy\ndtype\n\x8c\x08f1048576\x89\x88\x87R."
    add("pickle", "long-double.pkl", b"\x80\x04" + bits)
    torch.save(torch.zeros(1).expand(10**6, 10**6), add("matrix", "expanded.pt"))
    for kind, suffix in (("sample", ".npz"), ("result", ".npz")):
        archive(add(kind, f"shape-{kind}{suffix}"), ("features.img.npy", npy((2**40, 2**20))))
        archive(add(kind, f"header-{kind}{suffix}"), ("features.img.npy", npy("((((((1,")))
        archive(add(kind, f"pickled-{kind}{suffix}"), ("features.img.npy", npy((1,), "|O", b"cposix\nsystem\n.")))
        add(kind, f"empty-{kind}{suffix}", b"")
    with zipfile.ZipFile(folder / "bomb.npz", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as bomb:
        with bomb.open("features.img.npy", "w", force_zip64=True) as part:  # two gigabytes of array
            part.write(npy((2**26, 8)))
            for _ in range(2**5):
                part.write(bytes(2**26))
    add("sample", "bomb.npz")
    add("result", "bomb.npz")
    twice = ("features.img.npy", npy((1, 8), content=bytes(32)))
    archive(add("sample", "twice.npz"), twice, twice)
    head = (2**62).to_bytes(8, "little")
    for kind in ("safetensors", "tensors"):
        add(kind, f"long-{kind}.safetensors", head + b"{}")
        text = b'{"a":{"dtype":"F32","shape":[1152921504606846976,8],"data_offsets":[0,0]}}'
        add(kind, f"shape-{kind}.safetensors", len(text).to_bytes(8, "little") + text)
    add("json", "deep.json", b"[" * 100_000 + b"]" * 100_000)
    add("json", "digits.json", b"1" * 100_000)
    add("settings", "deep.toml", b"a = " + b"[" * 100_000 + b"]" * 100_000)
    add("settings", "dots.toml", b".".join([b"a"] * 5000) + b" = 1\n")
    add("table", "wide.csv", b"words,size,label\n" + b'"' + b"a" * 10_000_000)
    add("table", "twice.csv", b"words,size,size,label\na,1,2,cat\nb,2,3,dog\n")
    add("table", "nul.csv", b"words,size,label\n\x00,1e999,cat\n")
    width = (60_000).to_bytes(4, "big")
    header = b"IHDR" + width + width + b"\x08\x02\x00\x00\x00"
    chunks = len(header[4:]).to_bytes(4, "big") + header + zlib.crc32(header).to_bytes(4, "big")
    add("image", "bomb.png", b"\x89PNG\r\n\x1a\n" + chunks + b"\0\0\0\0IEND\xaeB`\x82")
    return made


def test_files_that_are_as_they_should_be_are_read(corpus):
    _, bases, reader = corpus
    for kind, path in bases.items():
        assert reader.read(kind, path)["outcome"] == "fine", kind
        cut = path.with_name("cut-" + path.name)
        cut.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
        assert reader.read(kind, cut)["outcome"] in ("refused", *(["fine"] if kind == "table" else [])), kind


def test_hostile_files_are_refused(corpus):
    folder, _, reader = corpus
    for kind, path in hostile(folder):
        found = reader.read(kind, path)
        assert found["outcome"] == "refused", f"{path.name}: {found}"
        assert found["mib"] < MEMORY and found["seconds"] < SECONDS, f"{path.name}: {found}"


def test_mutated_files_are_read_or_refused(tmp_path):
    found = files.run(0, tmp_path, count=104)
    assert not found["wrong"] and sum(found["outcomes"].values()) == 104
    assert found["outcomes"]["fine"] > 5 and found["outcomes"]["refused"] > 5  # neither harmless nor hopeless


def test_what_should_not_be_is_seen(corpus):
    """Negative control: a reader that dies, one that raises something else, and one that takes too much."""
    folder, bases, _ = corpus
    reader = files.Reader(folder)
    assert "ended with -11" in reader.read("dies", bases["json"])["outcome"]
    assert reader.read("raises", bases["json"])["outcome"].startswith("IndexError")
    assert reader.read("eats", bases["json"])["outcome"].startswith("MemoryError")
    reader.close()
