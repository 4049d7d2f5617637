"""Readers of published layouts, each on a small set in the same layout, with every kind of broken row."""

from __future__ import annotations

import json
import pickle
import random
import zipfile

import h5py
import numpy as np
import pytest
import torch
from PIL import Image

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data import adni as adni_files
from flmoe_fast.data.adni import read_adni
from flmoe_fast.data.enrico import read_enrico
from flmoe_fast.data.errors import DataError
from flmoe_fast.data.hdxor import DIMENSIONS, LATENT, hd_xor, read_hd_xor, settings
from flmoe_fast.data.mimic import read_mimic
from flmoe_fast.data.mmhs150k import read_mmhs150k
from flmoe_fast.data.mmimdb import GENRES, read_mmimdb
from flmoe_fast.data.mosi import read_mosi
from flmoe_fast.data.own import read_own
from flmoe_fast.data.pickles import read_matrix, read_pickle
from flmoe_fast.data.prepare import prepare
from flmoe_fast.runs.settings import read_settings
from flmoe_fast.runs.study import Study


def picture(path, shade=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 6), (shade, 0, 0)).save(path)


def rows_of(raw):
    """Every row number once."""
    return sorted(np.concatenate(list(raw.parts.values())).tolist())


def dropped(reader, *arguments, **options):
    """What is left when broken samples are dropped, and the warning."""
    with pytest.warns(UserWarning) as caught:
        return reader(*arguments, broken="drop", **options), str(caught[0].message)


@pytest.fixture
def mmimdb(tmp_path):
    for n in range(20):
        film = {"plot": [f"plot {n}", "longer"], "genres": ["Drama", "Sci-Fi", "News"] if n % 2 else ["Western"]}
        picture(tmp_path / "dataset" / f"{n:07d}.jpeg")
        (tmp_path / "dataset" / f"{n:07d}.json").write_text(json.dumps(film))
    return tmp_path


def test_mmimdb(mmimdb):
    raw = read_mmimdb(mmimdb)
    assert raw.kinds == {"language": "text", "img": "image"} and raw.task == "multilabel"
    assert raw.values["language"][3] == "plot 3" and raw.values["img"][3].name == "0000003.jpeg"
    assert [GENRES[c] for c in raw.targets[1].nonzero().flatten()] == ["drama", "sci-fi"]
    assert {part: len(rows) for part, rows in raw.parts.items()} == {"train": 12, "valid": 2, "test": 6}
    assert rows_of(raw) == list(range(20)) and raw.parts["valid"].tolist() == [12, 13]
    split = {"train": ["0000004"], "dev": ["0000001"], "test": ["0000000", "0000003"]}
    (mmimdb / "split.json").write_text(json.dumps(split))
    official = read_mmimdb(mmimdb, split="official")
    assert [official.ids[row] for row in official.parts["test"]] == split["test"]


def test_mmimdb_broken(mmimdb):
    folder = mmimdb / "dataset"
    (folder / "0000002.json").write_text('{\n"plot": [\n')
    (folder / "0000005.json").write_text('{"plot": [], "genres": []}')
    (folder / "0000007.jpeg").unlink()
    (folder / "0000009.jpeg").write_bytes(b"")
    with pytest.raises(DataError) as caught:
        read_mmimdb(mmimdb)
    message = str(caught.value)
    for part in ("0000002.json:3: got", "0000005.json: got no plot", "no image", "an empty image"):
        assert part in message
    assert len(caught.value.problems) == 4
    raw, warning = dropped(read_mmimdb, mmimdb)
    assert len(raw.ids) == 16 and "left out 4 samples" in warning
    # Films keep their part when another is left out.
    assert [raw.ids[row] for row in raw.parts["valid"]] == ["0000012", "0000013"]
    with pytest.raises(DataError, match="no .json file"):
        read_mmimdb(mmimdb / "dataset")


@pytest.fixture
def enrico(tmp_path):
    lines = ["screen_id,topic"]
    for n in range(20):
        name = str(50100 + n)
        lines.append(f"{name},{('login', 'news', 'menu')[n % 3]}")
        picture(tmp_path / "screenshots" / f"{name}.jpg")
        picture(tmp_path / "wireframes" / f"{name}.png")
    (tmp_path / "design_topics.csv").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_enrico(enrico):
    raw = read_enrico(enrico)
    names = [str(50100 + n) for n in range(20) if 50100 + n not in (50105, 50109)]
    random.Random(42).shuffle(names)  # a shuffle depends on the length only
    assert list(raw.ids) == names and raw.classes == ("login", "menu", "news")
    assert {part: len(rows) for part, rows in raw.parts.items()} == {"train": 11, "valid": 3, "test": 4}
    assert raw.classes[raw.targets[names.index("50101")]] == "news"
    assert raw.values["wireframe"][0].name == f"{names[0]}.png"


def test_enrico_broken(enrico):
    table = enrico / "design_topics.csv"
    (enrico / "wireframes" / "50101.png").unlink()
    table.write_text(table.read_text().replace("50102,menu", "50102,"))
    with pytest.raises(DataError) as caught:
        read_enrico(enrico)
    assert len(caught.value.problems) == 2
    for part in (f"{table}:3: got no image", f"{table}:4: got no topic"):
        assert part in str(caught.value)
    table.write_text(table.read_text() + "50120\n")
    with pytest.raises(DataError, match="design_topics.csv:22: got 1 fields, expected 2"):
        read_enrico(enrico)
    table.write_text("id,topic\n")
    with pytest.raises(DataError, match=":1: got no column 'screen_id'"):
        read_enrico(enrico)


@pytest.fixture
def mmhs(tmp_path):
    labels = {"11": [0, 0, 1], "12": [1, 2, 1], "13": [5, 2, 0], "14": [0, 0, 0]}
    tweets = {name: {"tweet_text": f"tweet {name}", "labels": found} for name, found in labels.items()}
    (tmp_path / "MMHS150K_GT.json").write_text(json.dumps(tweets))
    for name in labels:
        picture(tmp_path / "img_resized" / f"{name}.jpg")
    (tmp_path / "splits").mkdir()
    for part, names in (("train", "12\n11\n"), ("val", "14\n"), ("test", "13\n")):
        (tmp_path / "splits" / f"{part}_ids.txt").write_text(names)
    (tmp_path / "img_txt").mkdir()
    (tmp_path / "img_txt" / "11.json").write_text('{"img_text": "written"}')
    return tmp_path


def test_mmhs150k(mmhs):
    raw = read_mmhs150k(mmhs, image_text=True)
    assert raw.ids == ("12", "11", "14", "13") and raw.targets.tolist() == [1, 0, 0, 1]
    assert raw.values["text"][:2] == ["tweet 12", "tweet 11 written"]
    assert raw.parts["train"].tolist() == [0, 1] and raw.parts["test"].tolist() == [3]
    with pytest.raises(DataError, match=r"test_ids.txt:1: got labels \[5, 2, 0\]"):
        read_mmhs150k(mmhs, labels="kind")
    raw, _ = dropped(read_mmhs150k, mmhs, labels="kind")
    assert raw.targets.tolist() == [1, 0, 0] and raw.parts["test"].tolist() == []


def test_mmhs150k_broken(mmhs):
    with open(mmhs / "splits" / "train_ids.txt", "a") as file:
        file.write("\n99\n")
    (mmhs / "img_resized" / "14.jpg").unlink()
    with pytest.raises(DataError) as caught:
        read_mmhs150k(mmhs)
    assert "train_ids.txt:4: got the id 99" in str(caught.value) and "val_ids.txt:1: got no image" in str(caught.value)


@pytest.fixture
def mimic(tmp_path):
    (tmp_path / "labels.csv").write_text("subject_id,one_year_mortality\n7,0\n8,1\n9,0\n")
    lab = torch.arange(12.0).reshape(3, 4)
    lab[1, 2] = float("nan")
    torch.save(lab, tmp_path / "lab_x.pt")
    torch.save(np.arange(6.0).reshape(3, 2), tmp_path / "code_x.pt")
    (tmp_path / "note_texts_last256tok.csv").write_text('subject_id,text\n9,"a note, of nine"\n7,seven\n8,eight\n')
    splits = {"training": [9, 7], "validation": [8], "testing": []}
    (tmp_path / "PTID_splits_mimic_processed.json").write_text(json.dumps(splits))
    return tmp_path


def test_mimic(mimic):
    raw = read_mimic(mimic)
    assert raw.ids == ("7", "8", "9") and raw.targets.tolist() == [0, 1, 0]
    assert raw.values["note"] == ["seven", "eight", "a note, of nine"]
    assert raw.values["lab"][1].tolist() == [4.0, 5.0, 0.0, 7.0] and raw.values["code"].shape == (3, 2)
    assert raw.parts["train"].tolist() == [2, 0] and raw.kinds == {"lab": "table", "note": "text", "code": "table"}


def test_mimic_broken(mimic):
    notes = mimic / "note_texts_last256tok.csv"
    notes.write_text("subject_id,text\n9,nine\n7,\n")
    with pytest.raises(DataError) as caught:
        read_mimic(mimic)
    assert f"{notes}:3: got no note of subject 7" in str(caught.value) and "subject 8" in str(caught.value)
    raw, _ = dropped(read_mimic, mimic)
    assert raw.ids == ("9",) and raw.values["lab"].tolist() == [[8.0, 9.0, 10.0, 11.0]]
    torch.save(torch.zeros(2, 4), mimic / "lab_x.pt")
    with pytest.raises(DataError, match="lab_x.pt: got 2 rows, expected 3"):
        read_mimic(mimic)
    torch.save({"a": print}, mimic / "lab_x.pt")
    with pytest.raises(DataError, match="lab_x.pt"):
        read_mimic(mimic)


@pytest.fixture
def mosi(tmp_path):
    rng = np.random.default_rng(0)
    content = {}
    for part, count in (("train", 4), ("valid", 2), ("test", 3)):
        content[part] = {
            "vision": rng.normal(size=(count, 5, 4)),
            "audio": rng.normal(size=(count, 5, 2)),
            "text": rng.normal(size=(count, 5, 6)),
            "labels": rng.normal(size=(count, 1, 1)),
            "id": np.array([[f"{part}{n}".encode()] for n in range(count)]),
        }
    content["train"]["audio"][1, 0, 0] = -np.inf
    (tmp_path / "mosi_data.pkl").write_bytes(pickle.dumps(content))
    return tmp_path, content


def test_mosi(mosi):
    root, content = mosi
    raw = read_mosi(root)
    assert raw.ids[:2] == ("train0", "train1") and raw.values["audio"][1, 0, 0] == 0.0
    assert raw.parts["test"].tolist() == [6, 7, 8] and raw.values["text"].shape == (9, 5, 6)
    np.testing.assert_allclose(raw.targets[:4, 0], content["train"]["labels"][:, 0, 0], rtol=1e-6)
    sign = read_mosi(root / "mosi_data.pkl", task="multiclass")
    assert sign.targets.tolist() == (raw.targets[:, 0] > 0).long().tolist()
    content["valid"]["text"][1] = 0
    (root / "mosi_data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match=r"no word in valid\[1\]"):
        read_mosi(root)
    raw, _ = dropped(read_mosi, root)
    assert raw.parts["valid"].tolist() == [4] and len(raw.ids) == 8
    del content["test"]["audio"]
    (root / "mosi_data.pkl").write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="no audio under test"):
        read_mosi(root)


class Attack:
    def __reduce__(self):
        return exec, ("raise SystemExit('executed')",)


def test_pickles_execute_nothing(tmp_path):
    path = tmp_path / "x.pkl"
    for protocol in (2, 4, 5):
        path.write_bytes(pickle.dumps({"a": np.arange(3.0), "b": np.float32(2), "c": ["x", b"y"]}, protocol=protocol))
        found = read_pickle(path)
        assert found["a"].tolist() == [0.0, 1.0, 2.0] and found["b"] == 2 and found["c"] == ["x", b"y"]
        path.write_bytes(pickle.dumps({"a": Attack()}, protocol=protocol))
        with pytest.raises(DataError, match="exec"):
            read_pickle(path)
    path.write_bytes(b"\x80\x04nothing")
    with pytest.raises(DataError, match="x.pkl"):
        read_pickle(path)


def arrays():
    matrix = np.arange(6.0).reshape(2, 3)
    found = [matrix, np.asfortranarray(matrix.astype(np.int32)), np.array(["ab", "c"]), np.array([b"x"])]
    found += [np.array([["text", None]], object), np.arange(3, dtype=">f4"), np.zeros((0, 3)), np.ones((2, 1), bool)]
    return [*found, np.float64(1), np.bool_(True), np.str_("long"), matrix[:, ::2]]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_gives_the_arrays_that_were_written(protocol, tmp_path):
    kept = arrays()
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"a": (kept, [kept[0]]), 1: -(2**70)}, protocol=protocol))
    found = read_pickle(tmp_path / "x.pkl")
    assert found[1] == -(2**70) and found["a"][1][0] is found["a"][0][0]
    for own, expected in zip(found["a"][0], kept, strict=True):
        assert type(own) is type(expected) and own.dtype == expected.dtype and np.array_equal(own, expected)
        assert not isinstance(own, np.ndarray) or own.flags.writeable


class Forged:
    """An array of one object whose pointer is eight letters."""

    def __reduce__(self):
        return np.ndarray, ((1,), "O", b"AAAAAAAA")


RECONSTRUCT = b"cnumpy.core.multiarray\n_reconstruct\n"
FLOAT = b"cnumpy\ndtype\n\x8c\x02f8\x89\x88\x87R(K\x03\x8c\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"


def array_of(shape=b"K\x01\x85", dtype=FLOAT, raw=b"C\x08AAAAAAAA"):
    """A pickled array of parts that do not have to fit."""
    return RECONSTRUCT + b"cnumpy\nndarray\nK\x00\x85C\x01b\x87R(K\x01" + shape + dtype + b"\x89" + raw + b"tb"


HOSTILE = {
    "a forged object": pickle.dumps(Forged())[:-1],
    "an object of bytes": array_of(dtype=FLOAT.replace(b"\x02f8", b"\x02O8")),
    "a structure": array_of(dtype=b"cnumpy\ndtype\n\x8c\x02V8\x89\x88\x87R"),
    "a million bytes an item": array_of(dtype=FLOAT.replace(b"\x02f8", b"\x08f1048576")),
    "more than there is": array_of(shape=b"K\x02\x85"),
    "a negative size": array_of(shape=b"J\xff\xff\xff\xff\x85"),
    "no items": array_of(shape=b"J\xff\xff\xff\x7fK\x00\x86", dtype=FLOAT.replace(b"\x02f8", b"\x02S0")),
    "built twice": array_of() + b"K\x01\x85b",
    "defaults of a function": RECONSTRUCT + b"N}\x8c\x0c__defaults__K\x01\x85s\x86b",
    "attributes of a dict": b"}}\x8c\x01aK\x01sb",
    "a part by itself": RECONSTRUCT,
    "an array by itself": RECONSTRUCT + b")R",
    "a called array": array_of() + b")R",
    "an array as a key": b"}" + array_of() + b"Ns",
    "a class": b"cnumpy\nndarray\nK\x01\x85\x81",
    "another name": b"cnumpy.core.multiarray\nfromfile\n",
    "a name of a name": b"\x8c\x05numpy\x8c\x0fndarray.tofile\x93",
    "a persistent name": b"\x8c\x01aQ",
    "an extension": b"\x82\x01",
    "nothing to take": b"\x85",
    "one text encoded for ever": b"\x8c\xff" + 255 * b"a" + b"q\x000c_codecs\nencode\nq\x010]"
    + 200 * b"h\x01h\x00\x8c\x06latin1\x86Ra",
    "one array for ever": b"C\xff" + 255 * b"a" + b"q\x000]"
    + 20 * (array_of(b"K\xff\x85", FLOAT.replace(b"f8", b"u1"), b"h\x00") + b"a"),
    "bytes that never come": b"\x8e" + (2**62).to_bytes(8, "little") + b"a",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name, tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x04" + HOSTILE[name] + b".")
    with pytest.raises(DataError, match=r"x\.pkl: got "):
        read_pickle(tmp_path / "x.pkl")


def test_a_memo_costs_no_more_than_it_holds(tmp_path):
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02Nr\xff\xff\xff\x7f.")  # 32 GB where the memo is an array
    assert read_pickle(tmp_path / "x.pkl") is None
    twice = b"]q\x01(h\x00h\x00eq\x00"  # a list of the last one, twice: 2^60 lists if each were made anew
    (tmp_path / "x.pkl").write_bytes(b"\x80\x02]q\x00" + 60 * twice + b".")
    found = read_pickle(tmp_path / "x.pkl")
    assert len(found) == 2 and found[0] is found[1]


def test_matrices_of_torch(tmp_path):
    path, matrix = tmp_path / "x.pt", np.arange(6.0).reshape(2, 3)
    for kept in (matrix, torch.from_numpy(matrix), matrix.astype(np.int32)):
        for zipped in (True, False):
            torch.save(kept, path, _use_new_zipfile_serialization=zipped)
            assert np.array_equal(read_matrix(path), matrix) and read_matrix(path).dtype == np.float32
    hostile = (torch.zeros(1).expand(10**6, 10**6), torch.zeros(2, 3).to_sparse(), torch.zeros(2, 3, device="meta"))
    for wrong in (*hostile, Forged(), {"a": matrix}, matrix[0], torch.zeros(2, 3, dtype=torch.complex64), [matrix]):
        torch.save(wrong, path)
        with pytest.raises(DataError, match=r"x\.pt: got "):
            read_matrix(path)
    torch.save(matrix, path)
    packed = tmp_path / "packed.pt"
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as new:
        for part in old.namelist():
            new.writestr(part, old.read(part) + bytes(2**20))
    with pytest.raises(DataError, match="a compressed archive"):
        read_matrix(packed)


@pytest.fixture
def adni(tmp_path):
    names = [f"001_S_{n:04d}" for n in range(4)]
    (tmp_path / "label.csv").write_text("PTID,DIAGNOSIS\n" + "".join(f"{n},{1 + k % 3}\n" for k, n in enumerate(names)))
    splits = {"training": names[:2], "validation": names[2:3], "testing": names[3:]}
    (tmp_path / "PTID_splits.json").write_text(json.dumps(splits))
    for folder in ("image", "genomic", "clinical", "biospecimen"):
        (tmp_path / folder).mkdir()
    scans = [*(f"{n}_T1_2010-01-01" for n in names), f"{names[0]}_T1_2012-05-01"]
    (tmp_path / "image" / "ADNI_subj.txt").write_text("\n".join(scans) + "\n")
    np.save(tmp_path / "image" / "ADNI_G.npy", np.arange(10.0).reshape(5, 2))
    with h5py.File(tmp_path / "genomic" / "genomic_merged.h5ad", "w") as file:
        file["X"] = np.array([[0.0, 1.0], [2.0, np.nan], [4.0, 1.0], [1.0, 3.0]])
        file.create_group("obs")["names"] = np.array(names[::-1], dtype="S")
        file["obs"].attrs["_index"] = "names"
    lines = [f"{n},{k}.5,{k}\n" for k, n in enumerate(names)]
    (tmp_path / "clinical" / "clinical_merged_mean.csv").write_text("PTID,AGE,PTADDX_1\n" + "".join(lines))
    (tmp_path / "biospecimen" / "biospecimen_merged_mean.csv").write_text("PTID,A,B\n" + "".join(lines))
    return tmp_path


def test_adni(adni):
    raw = read_adni(adni)
    assert raw.targets.tolist() == [0, 1, 2, 0] and raw.parts["train"].tolist() == [0, 1]
    assert raw.values["image"][:, 0].tolist() == [8.0, 2.0, 4.0, 6.0]  # the later of two scans
    assert raw.values["clinical"].tolist() == [[0.5], [1.5], [2.5], [3.5]]  # the diagnosis' date is left out
    assert raw.values["biospecimen"][1].tolist() == [1.5, 1.0]
    # Rows were stored backwards; the gap takes the most frequent value, and training subjects span -1 to 1.
    assert raw.values["genomic"][:2, 0].tolist() == [-1.0, 1.0] and raw.values["genomic"][2, 1] == -1.0
    some = read_adni(adni, modalities=("clinical", "image"))
    assert some.modalities == ("clinical", "image")


def test_adni_broken(adni):
    clinic = adni / "clinical" / "clinical_merged_mean.csv"
    clinic.write_text(clinic.read_text().replace("001_S_0002,2.5,2\n", ""))
    with pytest.raises(DataError, match=r"label.csv:4: got 001_S_0002 without clinical"):
        read_adni(adni)
    raw, _ = dropped(read_adni, adni)
    assert len(raw.ids) == 3 and raw.parts["valid"].tolist() == []
    clinic.write_text(clinic.read_text().replace("1.5", "old"))
    with pytest.raises(DataError, match=r"clinical_merged_mean.csv:3: got 001_S_0001 with a field"):
        read_adni(adni)
    with pytest.raises(ArgumentError, match="modalities"):
        read_adni(adni, modalities=("mri",))


DENSE = np.array([[0.0, 1.0], [2.0, 0.0], [4.0, 1.0], [1.0, 3.0]])


def sparse_genome(root, layout="csr_matrix", **changes):
    """Give the data set a sparse matrix, parts of which may be other than they should be."""
    parts = {"data": [1.0, 2.0, 4.0, 1.0, 1.0, 3.0], "indices": [1, 0, 0, 1, 0, 1], "indptr": [0, 1, 2, 4, 6]}
    parts |= {"shape": [4, 2], **changes}
    with h5py.File(root / "genomic" / "genomic_merged.h5ad", "a") as file:
        del file["X"]
        node = file.create_group("X")
        node.attrs["encoding-type"], node.attrs["shape"] = layout, parts.pop("shape")
        for name, values in parts.items():
            node[name] = np.array(values)


def test_a_sparse_genome_is_the_dense_one(adni):
    with h5py.File(adni / "genomic" / "genomic_merged.h5ad", "a") as file:
        file["X"][...] = DENSE
    expected = read_adni(adni).values["genomic"]
    sparse_genome(adni)
    assert np.array_equal(read_adni(adni).values["genomic"], expected)
    columns = {"data": [2.0, 4.0, 1.0, 1.0, 1.0, 3.0], "indices": [1, 2, 3, 0, 2, 3], "indptr": [0, 3, 6]}
    sparse_genome(adni, "csc_matrix", **columns)
    assert np.array_equal(read_adni(adni).values["genomic"], expected)


@pytest.mark.parametrize(
    "changes",
    (
        {"indices": [1, 0, 0, 1, 0, 2**30]},
        {"indices": [1, 0, 0, 1, 0, -(2**30)]},
        {"indices": [1.0, 0.0, 0.0, 1.0, 0.0, 1.0]},
        {"indices": [1, 0]},
        {"indptr": [0, 1, 2, 4, 2**40]},
        {"indptr": [0, 4, 2, 4, 6]},
        {"indptr": [-(2**30), 1, 2, 4, 6]},
        {"indptr": [0, 1, 6]},
        {"shape": [2**30, 2**30]},
        {"shape": [-4, 2]},
        {"shape": [3, 2], "indptr": [0, 1, 2, 6]},
        {"data": [b"a"] * 6},
    ),
    ids=str,
)
def test_sparse_indices_are_checked(adni, changes):
    sparse_genome(adni, **changes)
    with pytest.raises(DataError, match=r"genomic_merged\.h5ad: got "):
        read_adni(adni)


def test_an_unchecked_index_is_seen(adni, monkeypatch):
    """Negative control: an index one beyond its row, which scipy writes into the next."""
    monkeypatch.setattr("scipy.sparse.csr_matrix.check_format", lambda self, full_check=True: None)
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_sparse_indices_are_checked(adni, {"indices": [2, 0, 0, 1, 0, 1]})


def test_a_matrix_larger_than_any_is_not_read(adni):
    with h5py.File(adni / "genomic" / "genomic_merged.h5ad", "a") as file:
        del file["X"]
        file.create_dataset("X", shape=(2**20, 2**20), dtype="f4", chunks=(64, 64))  # a file of a kilobyte
    with pytest.raises(DataError, match="more than 4 GiB"):
        read_adni(adni)


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("import time; time.sleep(60)", "is not done after 1 s"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", "does not read to its end"),
        ("import numpy, sys; print('{\"arrays\": 1}', flush=True); sys.exit(3)", "does not read to its end"),
    ],
    ids=("hangs", "crashes", "ends early"),
)
def test_a_file_that_the_hdf5_library_cannot_stand_is_refused(adni, tmp_path, monkeypatch, program, said):
    reader = tmp_path / "reader.py"
    reader.write_text(program)
    monkeypatch.setattr(adni_files, "READER", reader)
    monkeypatch.setattr(adni_files, "SECONDS", 0.9)
    with pytest.raises(DataError, match=rf"genomic_merged\.h5ad: got a file .*{said}"):
        read_adni(adni)


@pytest.fixture
def own(tmp_path):
    lines = ["name,caption,photo,age,dose,label,part"]
    for n in range(20):
        picture(tmp_path / "photos" / f"{n}.png", n)
        part = ("train", "valid", "test")[0 if n < 14 else 1 if n < 17 else 2]
        lines.append(f"p{n},caption {n},photos/{n}.png,{n},{n / 2},{('cat', 'dog')[n % 2]},{part}")
    (tmp_path / "table.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "table.csv"


MODALITIES = {"words": {"text": "caption"}, "photo": {"image": "photo"}, "facts": {"table": ["age", "dose"]}}


def test_own_data(own):
    raw = read_own(own, MODALITIES, target="label", split="part", id="name")
    assert raw.kinds == {"words": "text", "photo": "image", "facts": "table"} and raw.classes == ("cat", "dog")
    assert raw.ids[3] == "p3" and raw.values["facts"][3].tolist() == [3.0, 1.5] and raw.targets.tolist() == [0, 1] * 10
    assert raw.values["photo"][3] == own.parent / "photos/3.png" and raw.parts["valid"].tolist() == [14, 15, 16]
    drawn = read_own(own, MODALITIES, target="label")
    assert drawn.ids[0] == "2" and rows_of(drawn) == list(range(20))
    assert [len(rows) for rows in drawn.parts.values()] == [14, 4, 2]
    assert drawn.targets[drawn.parts["train"]].sum() == 7
    other = read_own(own, MODALITIES, target="label", seed=1)
    assert other.parts["train"].tolist() != drawn.parts["train"].tolist()
    age = read_own(own, {"facts": MODALITIES["facts"], "words": MODALITIES["words"]}, target="age", task="regression")
    assert age.targets[:, 0].tolist() == list(range(20)) and age.classes == ("age",)
    table = own.read_text().replace("cat", "cat;brown").replace(",dog,", ",,")
    own.write_text(table)
    many = read_own(own, MODALITIES, target="label", task="multilabel")
    assert many.classes == ("brown", "cat") and many.targets[:2].tolist() == [[1, 1], [0, 0]]


@pytest.mark.parametrize("written", ("nan", "NaN", " ", ""))
def test_a_class_that_is_missing_is_no_class(own, written):
    own.write_text(own.read_text().replace("4,2.0,cat", f"4,2.0,{written}"))
    for task in ("multiclass", "multilabel") if written.strip() else ("multiclass",):
        with pytest.raises(DataError, match=r"table\.csv:6: got label"):
            read_own(own, MODALITIES, target="label", task=task)
        raw, _ = dropped(read_own, own, MODALITIES, target="label", task=task)
        assert raw.classes == ("cat", "dog") and len(raw.ids) == 19


def test_own_data_broken(own):
    lines = own.read_text().splitlines()
    lines[1] = lines[1].replace(",0,0.0", ",old,0.0")
    lines[2] = lines[2].replace("photos/1.png", "photos/none.png")
    lines[3] = lines[3].replace("caption 2", " ")
    lines[4] = lines[4].replace("dog", "")
    lines[5] = lines[5].replace("train", "learn")
    own.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError) as caught:
        read_own(own, MODALITIES, target="label", split="part")
    found = caught.value.problems
    assert [int(text.split(".csv:")[1].split(":")[0]) for text in found] == [2, 3, 4, 5, 6]
    for text, part in zip(found, ("age 'old'", "no image", "no caption", "label ''", "part 'learn'")):
        assert part in text
    raw, warning = dropped(read_own, own, MODALITIES, target="label", split="part")
    assert len(raw.ids) == 15 and "left out 5 samples" in warning
    with pytest.raises(DataError, match="no column 'mood'"):
        read_own(own, MODALITIES, target="mood")
    with pytest.raises(ArgumentError, match=r"modalities\['words'\]"):
        read_own(own, {"words": {"sound": "caption"}}, target="label")


def test_tables_are_prepared_by_the_training_part(own):
    modalities = {"facts": {"table": ["age", "dose"]}, "more": {"table": ["dose"]}}
    raw = read_own(own, modalities, target="label", split="part")
    made = prepare(raw, 8)
    facts = made.splits.train.inputs[0]
    torch.testing.assert_close(facts.mean(0), torch.zeros(2), atol=1e-6, rtol=0)
    torch.testing.assert_close(facts.std(0, correction=0), torch.ones(2), atol=1e-6, rtol=0)
    assert made.splits.test.inputs[0].mean() > 1 and made.tokens == (2, 1)
    assert made.splits.valid.masks[0].all() and made.splits.valid.ids == ("16", "17", "18")
    patched = prepare(raw, 8, patches=1)
    assert patched.splits.train.masks is None and patched.tokens == (1, 1)
    assert patched.encoders["facts"](facts).shape == (14, 1, 8)
    with pytest.raises(ArgumentError, match="backbones"):
        prepare(read_own(own, MODALITIES, target="label"), 8)


@pytest.mark.parametrize("count", (2, 3, 4, 5))
def test_hd_xor_settings(count):
    for setting in settings(count):
        data = hd_xor(setting, count, samples=400, seed=1)
        assert [x.shape[1] for x in data.train.inputs] == list(DIMENSIONS[count])
        assert [len(part) for part in (data.train, data.valid, data.test)] == [280, 60, 60]
        share = torch.cat([part.targets for part in (data.train, data.valid, data.test)]).double().mean()
        assert 0.4 < share < 0.6
    with pytest.raises(ArgumentError, match="setting"):
        hd_xor(f"uniqueness{count}", count)


def test_hd_xor_hides_the_bits_where_it_says():
    """A linear reading of the latent halves recovers the bits; the projection is undone by least squares."""

    def accuracy(setting, modality, dims=(LATENT, LATENT)):
        data = hd_xor(setting, 2, samples=4000, seed=2, dimensions=dims)
        x, y = data.train.inputs[modality].double(), data.train.targets
        # Fisher's rule on products of halves is beyond a line: the label is no linear function of any modality.
        line = torch.linalg.lstsq(
            torch.cat([x, torch.ones(len(x), 1).double()], 1), (2.0 * y - 1).double()[:, None]
        ).solution
        test = data.test.inputs[modality].double()
        guess = torch.cat([test, torch.ones(len(test), 1).double()], 1) @ line
        return float(((guess[:, 0] > 0) == data.test.targets).double().mean())

    for setting in ("redundancy", "uniqueness0", "synergy"):
        assert accuracy(setting, 0) < 0.6
    # With the generator's own projection the latent is recovered, and its halves show both bits.
    for setting, who in (("redundancy", (0, 1)), ("uniqueness1", (1,))):
        random_ = np.random.default_rng(3)
        bits = random_.integers(0, 2, (2000, 2))
        mixing = [random_.uniform(-0.5, 0.5, (LATENT, LATENT)) for _ in range(2)]
        data = hd_xor(setting, 2, samples=2000, seed=3, dimensions=(LATENT, LATENT))
        rows = torch.cat([torch.tensor([int(i) for i in part.ids]) for part in (data.train, data.valid, data.test)])
        for m in who:
            x = torch.cat([part.inputs[m] for part in (data.train, data.valid, data.test)]).double().numpy()
            latent = np.linalg.solve(mixing[m], x.T).T
            halves = np.stack([latent[:, :100].mean(1), latent[:, 100:].mean(1)], 1) > 0
            assert (halves == bits[rows.numpy()]).mean() > 0.98
    other = hd_xor("uniqueness1", 2, samples=2000, seed=3, dimensions=(LATENT, LATENT))
    x = torch.cat([part.inputs[0] for part in (other.train, other.valid, other.test)]).double().numpy()
    rows = torch.cat([torch.tensor([int(i) for i in part.ids]) for part in (other.train, other.valid, other.test)])
    latent = np.linalg.solve(mixing[0], x.T).T
    halves = np.stack([latent[:, :100].mean(1), latent[:, 100:].mean(1)], 1) > 0
    assert 0.45 < (halves == bits[rows.numpy()]).mean() < 0.55


def test_hd_xor_file(tmp_path):
    data = hd_xor("synergy", 3, samples=60, seed=0)
    content = {}
    for name in ("train", "valid", "test"):
        part = data.part(name)
        content[name] = {str(m): [row.numpy() for row in x] for m, x in enumerate(part.inputs)}
        content[name]["label"] = part.targets.numpy()
    path = tmp_path / "VEC3XOR_DATA_synergy.pickle"
    path.write_bytes(pickle.dumps(content))
    found = read_hd_xor(path)
    assert found.name == "VEC3XOR_DATA_synergy" and found.modalities == ("m0", "m1", "m2")
    for a, b in zip(found.test.inputs, data.test.inputs):
        assert torch.equal(a, b)
    del content["valid"]["1"]
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(DataError, match="under valid"):
        read_hd_xor(path)


# ---- as a run's settings name them


def study_of(folder, data, model="hidden = 8\nheads = 2\nlayers = 1"):
    path = folder / "run.toml"
    path.write_text(f"[data]\n{data}\n[model]\n{model}\n")
    return Study(read_settings(path), progress=False)


def test_some_modalities_in_another_order(mosi):
    root, content = mosi
    study = study_of(root, 'kind = "mosi"\npath = "."\nmodalities = ["text", "vision"]')
    assert study.splits.modalities == ("text", "vision") == study.model().config.modalities
    assert study.splits.test.inputs[1].shape[-1] == content["test"]["vision"].shape[-1]
    sample = study.sample(study.model(), "test", 0)
    assert len(sample.features) == 2
    for wrong, named in (
        ('["text"]', "at least two of"),
        ('["text", "music"]', "music"),
        ('"text"', "a list of names"),
    ):
        with pytest.raises(ArgumentError, match=f"modalities: got .*{named}"):
            study_of(root, f'kind = "mosi"\npath = "."\nmodalities = {wrong}')


def test_hd_xor_of_a_file_and_made(tmp_path):
    data = hd_xor("synergy", 2, samples=60, seed=0, dimensions=(6, 4))
    content = {}
    for name in ("train", "valid", "test"):
        part = data.part(name)
        content[name] = {str(m): [row.numpy() for row in x] for m, x in enumerate(part.inputs)}
        content[name]["label"] = part.targets.numpy()
    (tmp_path / "xor.pickle").write_bytes(pickle.dumps(content))
    read = study_of(tmp_path, 'kind = "hdxor"\npath = "xor.pickle"')
    made = study_of(tmp_path, 'kind = "hdxor"\nsetting = "synergy"\nsamples = 60\ndimensions = [6, 4]')
    assert all(torch.equal(a, b) for a, b in zip(read.splits.test.inputs, made.splits.test.inputs))
    for extra in ("samples = 60", "batch_size = 3"):
        with pytest.raises(ArgumentError, match=f"data.{extra.split()[0]}: got this key"):
            study_of(tmp_path, f'kind = "hdxor"\npath = "xor.pickle"\n{extra}')
