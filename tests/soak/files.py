"""Files as they should be, files that are not, and a process of its own that reads them.

``python -m tests.soak.files FOLDER`` reads lines ``kind<tab>path`` from its input and answers each with a line of JSON:
what became of the file, and the most memory the process has had.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import resource
import select
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
#: Bytes of address space a reader may take beyond what it has after its imports, and seconds for a file.
MEMORY, SECONDS = 3 << 30, 60


def write_bases(folder: Path) -> dict[str, Path]:
    """One small file of every kind that is read, as the package or a data set's authors write it."""
    import h5py
    import torch
    from PIL import Image

    import flmoe_fast
    from flmoe_fast.data.sample import save_sample
    from flmoe_fast.model.encoders import ProjectionEncoder, TabularTokenEncoder

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    found = {}

    def at(kind: str, name: str) -> Path:
        (folder / kind).mkdir(exist_ok=True)
        found[kind] = folder / kind / name
        return found[kind]

    parts = {}
    for part in ("train", "valid", "test"):
        arrays = {name: rng.normal(size=(3, 2, f)) for name, f in (("vision", 2), ("audio", 2), ("text", 3))}
        parts[part] = {**arrays, "labels": rng.normal(size=(3, 1, 1)), "id": np.array([[b"a"], [b"b"], [b"c"]])}
    at("mosi", "mosi_data.pkl").write_bytes(pickle.dumps(parts, protocol=2))
    vectors = {p: {"0": list(rng.normal(size=(4, 3))), "1": list(rng.normal(size=(4, 2))), "label": np.arange(4) % 2}
               for p in parts}  # fmt: skip
    at("hdxor", "VEC2XOR_DATA_synergy.pickle").write_bytes(pickle.dumps(vectors))
    torch.save(np.arange(6.0).reshape(2, 3), at("matrix", "lab_x.pt"))
    with h5py.File(at("genome", "genomic_merged.h5ad"), "w") as file:
        file.create_group("obs")["names"] = np.array(["a", "b", "c"], dtype="S")
        file["obs"].attrs["_index"] = "names"
        node = file.create_group("X")
        node.attrs["encoding-type"], node.attrs["shape"] = "csr_matrix", [3, 2]
        node["data"], node["indices"], node["indptr"] = np.ones(3), np.array([0, 1, 0]), np.array([0, 1, 2, 3])
    config = flmoe_fast.FLI2MoEConfig(("img", "tab"), 8, 2, 1, 3, reweight_hidden=8, temperature=2.0)
    torch.manual_seed(0)
    model = flmoe_fast.FLI2MoE(config, {"img": ProjectionEncoder(5, 8), "tab": TabularTokenEncoder(3, 8)}).eval()
    model.set_feature_means([torch.randn(6, t, 8) for t in (4, 3)])
    flmoe_fast.save_checkpoint(model, at("safetensors", "model.safetensors"))
    flmoe_fast.save_checkpoint(model, at("checkpoint", "model.pth"))
    features = {"img": torch.randn(4, 8), "tab": torch.randn(3, 8)}
    save_sample(at("sample", "x.npz"), features=features, masks={n: torch.ones(len(f)) for n, f in features.items()})
    save_sample(at("tensors", "x.safetensors"), features=features)
    game = flmoe_fast.TokenGame(model, list(features.values()), fill="zero")
    flmoe_fast.interactions(game, rows=[0, 1], cols=[4, 5], contexts=4, progress=False).save(at("result", "x.npz"))
    Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(at("image", "x.png"))
    lines = [f"t{n},{n}.5,{'cat' if n % 2 else 'dog'}" for n in range(8)]
    at("table", "x.csv").write_text("\n".join(["words,size,label", *lines]) + "\n")
    at("json", "x.json").write_text(json.dumps({"plot": ["a film"], "genres": ["Drama"], "more": [1, 2.5, None]}))
    settings = (
        '[data]\nkind = "digits"\n[model]\nhidden = 8\n[training]\nepochs = 2\nlr = 1e-3\n[explain]\nalso = ["SV"]\n'
    )
    at("settings", "run.toml").write_text(settings)
    flmoe_fast.save_checkpoint(model, folder / "model.safetensors")
    return found


def readers(folder: Path) -> dict:
    """What reads each kind, the way the product does."""
    import flmoe_fast
    from flmoe_fast.data import adni
    from flmoe_fast.data.hdxor import read_hd_xor
    from flmoe_fast.data.mosi import read_mosi
    from flmoe_fast.data.own import read_own
    from flmoe_fast.data.pickles import read_matrix, read_pickle
    from flmoe_fast.data.raw import read_json
    from flmoe_fast.data.sample import load_sample
    from flmoe_fast.model.backbones import open_image
    from flmoe_fast.runs.settings import read_settings

    model = flmoe_fast.load_checkpoint(folder / "model.safetensors")
    facts = {"words": {"text": "words"}, "facts": {"table": ["size"]}}
    return {
        "mosi": read_mosi,
        "hdxor": read_hd_xor,
        "pickle": read_pickle,
        "matrix": read_matrix,
        "genome": adni.read_genome,
        "safetensors": flmoe_fast.load_checkpoint,
        "checkpoint": flmoe_fast.load_checkpoint,
        "sample": lambda path: load_sample(path, model),
        "tensors": lambda path: load_sample(path, model),
        "result": flmoe_fast.InteractionResult.load,
        "image": open_image,
        "table": lambda path: read_own(path, facts, target="label"),
        "json": read_json,
        "settings": read_settings,
    }


#: Numbers that lengths and offsets do not like.
EVIL = (b"\xff" * 8, b"\0" * 8, b"\xff\xff\xff\x7f" * 2, b"\0\0\0\0\0\0\0\x80", b"-1", b"1e999", b"nan", b"9" * 20)


def mutated(content: bytes, rng: np.random.Generator) -> bytes:
    """The same file with a little of it changed; of an archive mostly its parts, so that its checksums are right."""
    if zipfile.is_zipfile(io.BytesIO(content)) and rng.random() < 0.8:
        made = io.BytesIO()
        with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(made, "w") as new:
            names = old.namelist()
            chosen = names[int(rng.integers(len(names)))]
            for name in names:
                part = old.read(name)
                new.writestr(name, _changed(part, rng) if name == chosen else part)
        return made.getvalue()
    return _changed(content, rng)


def _changed(content: bytes, rng: np.random.Generator) -> bytes:
    changed = bytearray(content)
    if rng.random() < 0.05:
        return bytes(changed[: int(rng.integers(len(changed) + 1))])
    for _ in range(int(rng.integers(1, 3))):
        at = int(rng.integers(len(changed) + 1))
        match int(rng.integers(5)):
            case 0:
                changed[at : at + 1] = bytes([int(rng.integers(256))])
            case 1:
                changed[at : at + 1] = bytes([int(rng.choice(list(b"0123456789-.,;:=[]{}\"'() aN\n")))])
            case 2:
                changed[at:at] = changed[at : at + int(rng.integers(1, 64))]
            case 3:
                evil = EVIL[int(rng.integers(len(EVIL)))]
                changed[at : at + len(evil)] = evil
            case _:
                del changed[at : at + int(rng.integers(1, 9))]
    return bytes(changed)


#: Readers that do what none should: for tests of this file.
PLANTED = {
    "dies": lambda path: os.kill(os.getpid(), signal.SIGSEGV),
    "raises": lambda path: [][0],
    "eats": lambda path: bytearray(2 * MEMORY),
}


class Reader:
    """A process that reads files, and is started again when it is lost."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.process: subprocess.Popen | None = None

    def _start(self) -> subprocess.Popen:
        command = [sys.executable, "-m", "tests.soak.files", str(self.folder)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
        )  # fmt: skip
        self.process.stdout.readline()  # ready
        return self.process

    def read(self, kind: str, path: Path) -> dict:
        """What became of a file: ``fine``, ``refused``, or what should not be."""
        process = self.process if self.process and self.process.poll() is None else self._start()
        process.stdin.write(f"{kind}\t{path}\n")
        answered = select.select([process.stdout], [], [], SECONDS + 30)[0]
        line = process.stdout.readline() if answered else ""
        if not line:
            process.kill()
            return {"outcome": f"the process ended with {process.wait()}", "seconds": 0.0, "mib": 0}
        return json.loads(line)

    def close(self) -> None:
        if self.process:
            self.process.stdin.close()
            self.process.wait()


def _answer(read, path: Path) -> str:
    from flmoe_fast.checks import ArgumentError
    from flmoe_fast.data.errors import DataError
    from flmoe_fast.environment import MissingExtra
    from flmoe_fast.model.checkpoint import CheckpointError

    try:
        read(path)
    except (ArgumentError, CheckpointError, DataError, MissingExtra, FileNotFoundError):
        return "refused"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:200]}"
    return "fine"


def main(folder: Path) -> None:
    """Answer until the input ends."""
    import warnings

    warnings.simplefilter("ignore")
    read = {**readers(folder), **PLANTED}
    with open("/proc/self/statm") as file:
        have = int(file.read().split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (have + MEMORY, have + MEMORY))
    print("ready", flush=True)
    for line in sys.stdin:
        kind, path = line.rstrip("\n").split("\t")
        signal.alarm(SECONDS)
        begin = time.perf_counter()
        outcome = _answer(read[kind], Path(path))
        signal.alarm(0)
        seconds = time.perf_counter() - begin
        print(json.dumps({"outcome": outcome, "seconds": seconds, "mib": _peak()}), flush=True)


def _peak() -> int:
    """Most memory that this process held so far, in MiB; getrusage begins with what its parent held."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) >> 10


def run(seed: int, folder: Path, count: int = 100) -> dict:
    """Read ``count`` mutated files; whatever is neither fine nor refused is kept beside the soak's results."""
    rng = np.random.default_rng(seed)
    own = folder / str(seed)
    bases = write_bases(own)
    reader, wrong, outcomes, slowest, most = Reader(own), [], {"fine": 0, "refused": 0}, 0.0, 0
    for number in range(count):
        kind = sorted(bases)[number % len(bases)]
        path = own / f"{number}-{bases[kind].name}"
        path.write_bytes(mutated(bases[kind].read_bytes(), rng))
        found = reader.read(kind, path)
        slowest, most = max(slowest, found["seconds"]), max(most, found["mib"])
        if found["outcome"] in outcomes:
            outcomes[found["outcome"]] += 1
            path.unlink()
        else:
            wrong.append(f"{kind}, {path}: {found['outcome']}")
    reader.close()
    return {"cases": count, "wrong": wrong, "outcomes": outcomes, "worst": {"seconds": slowest, "MiB": float(most)}}


if __name__ == "__main__":
    main(Path(sys.argv[1]))
