"""The command line: what it writes, that its numbers are the library's, and how it answers bad input."""

from __future__ import annotations

import json
import subprocess
import sys

import matplotlib.image
import numpy as np
import pandas
import pytest
import torch
from safetensors.torch import save_file

import flmoe_fast
from flmoe_fast.checks import ArgumentError
from flmoe_fast.cli import main
from flmoe_fast.data.digits import two_view_digits
from flmoe_fast.data.sample import load_sample, save_sample
from flmoe_fast.demo.run import Size, run
from flmoe_fast.model.encoders import ProjectionEncoder, TabularTokenEncoder
from flmoe_fast.model.training.predict import predict

TOKENS, WIDTH, HIDDEN = (4, 3), 5, 8
FILES = {"interactions.npz", "interactions.csv", "importance.csv", "report.txt", "heatmap.png"}


def make_model(task="multiclass"):
    config = flmoe_fast.FLI2MoEConfig(("img", "tab"), HIDDEN, 2, 2, 3, task=task, reweight_hidden=8, temperature=2.0)
    encoders = {"img": ProjectionEncoder(WIDTH, HIDDEN), "tab": TabularTokenEncoder(TOKENS[1], HIDDEN)}
    model = flmoe_fast.FLI2MoE(config, encoders).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator)
    model.set_feature_means([torch.randn(6, t, HIDDEN, generator=generator) for t in TOKENS])
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A small model with encoders and a sample for it, raw and encoded."""
    folder = tmp_path_factory.mktemp("cli")
    model = make_model()
    flmoe_fast.save_checkpoint(model, folder / "model.safetensors")
    generator = torch.Generator().manual_seed(1)
    inputs = {
        "img": torch.randn(TOKENS[0], WIDTH, generator=generator),
        "tab": torch.randn(TOKENS[1], generator=generator),
    }
    masks = {"img": torch.tensor([1.0, 1.0, 1.0, 0.0]), "tab": torch.ones(3)}
    with torch.no_grad():
        encoded = model.encode([inputs["img"][None], inputs["tab"][None]])
    features = dict(zip(("img", "tab"), [f[0] for f in encoded]))
    save_sample(folder / "raw.npz", inputs=inputs, masks=masks)
    save_sample(folder / "encoded.npz", features=features, masks=masks)
    save_sample(folder / "encoded.safetensors", features=features, masks=masks)
    return folder


def explain(folder, out, *extra, model="model.safetensors", sample="encoded.npz"):
    return main(["explain", str(folder / model), str(folder / sample), "--out", str(out), "--no-progress", *extra])


def test_explain_writes_what_the_library_finds(folder, tmp_path, capsys):
    out = tmp_path / "new" / "folder"
    assert explain(folder, out, "--candidates", "2", "--contexts", "8", "--seed", "3", "--gap", "strict") == 0
    printed = capsys.readouterr()
    assert {file.name for file in out.iterdir()} == FILES and printed.err == ""
    model = flmoe_fast.load_checkpoint(folder / "model.safetensors")
    features, masks = load_sample(folder / "encoded.npz", model)
    expected = flmoe_fast.explain(
        model, features, masks=masks, candidates=2, contexts=8, seed=3, gap="strict", progress=False
    )
    found = flmoe_fast.InteractionResult.load(out / "interactions.npz")
    for name in ("pairs", "sii", "sii_stderr", "gap", "gap_stderr"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected.interactions, name))
    assert found.gap_kind == "strict" and found.evaluations == 64  # every coalition, fewer than eight contexts of nine
    table = pandas.read_csv(out / "interactions.csv")
    assert len(table) == 4 * len(found.heads)
    np.testing.assert_allclose(table.loc[table["head"] == "mixture", "sii"], found.column("sii"))
    importance = pandas.read_csv(out / "importance.csv")
    assert list(importance["name"]) == list(found.player_names) and len(importance) == 6  # one img token is padding
    best = expected.top(1).iloc[0]
    assert f"{best['name_i']} x {best['name_j']}" in printed.out
    assert (out / "report.txt").read_text().strip() in printed.out
    assert matplotlib.image.imread(out / "heatmap.png").std() > 0.01


@pytest.mark.parametrize("sample", ["raw.npz", "encoded.safetensors"])
def test_every_kind_of_sample_gives_the_same(folder, tmp_path, sample):
    results = []
    for name in ("encoded.npz", sample):
        assert explain(folder, tmp_path / name, "--contexts", "4", sample=name) == 0
        results.append(flmoe_fast.InteractionResult.load(tmp_path / name / "interactions.npz"))
    np.testing.assert_allclose(results[0].sii, results[1].sii, atol=1e-6)


def test_options_reach_the_probe(folder, tmp_path):
    options = [
        "--budget",
        "90",
        "--method",
        "grid",
        "--value",
        "logit",
        "--target",
        "1",
        "--fill",
        "zero",
        "--dtype",
        "float64",
    ]
    assert explain(folder, tmp_path, *options, "--backend", "reference") == 0
    found = flmoe_fast.InteractionResult.load(tmp_path / "interactions.npz")
    expected = {"target": 1, "value": "logit", "dtype": "float64", "device": "cpu", "method": "grid"}
    assert found.about == expected
    assert 0 < found.evaluations <= 90 and found.backend == "reference"


def test_method_and_other_indices(folder, tmp_path, capsys):
    assert explain(folder, tmp_path, "--budget", "80", "--method", "surrogate", "--also", "SV", "BII") == 0
    found = flmoe_fast.InteractionResult.load(tmp_path / "interactions.npz")
    assert found.about["method"] == "surrogate"
    text = capsys.readouterr().out
    assert "pairs by a surrogate;" in text and "indices.csv" in text
    table = pandas.read_csv(tmp_path / "indices.csv")
    assert {(row["index"], row["order"]) for _, row in table.iterrows()} == {("SV", 1), ("BII", 2)}
    one = table[(table["index"] == "BII") & (table["head"] == "synergy")]
    np.testing.assert_allclose(one["value"], found.index("BII", 2, "synergy")["value"])
    assert table.loc[table["index"] == "SV", "j"].isna().all() and one["j"].notna().all()
    assert explain(folder, tmp_path / "plain", "--contexts", "4") == 0
    assert not (tmp_path / "plain" / "indices.csv").exists()


def test_json_is_one_object(folder, tmp_path, capsys):
    assert explain(folder, tmp_path, "--contexts", "4", "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    found = flmoe_fast.InteractionResult.load(tmp_path / "interactions.npz")
    assert printed["result"]["sii"] == found.sii.tolist() and 0 < printed["full"] < 1
    assert main(["doctor", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["environment"]["torch"] == torch.__version__
    assert {backend["name"] for backend in printed["backends"]} >= {"cpu", "torch", "reference"}


def test_interrupted_says_how_to_go_on(monkeypatch, capsys, tmp_path):
    (tmp_path / "run.toml").write_text('[data]\nkind = "digits"\n[model]\nhidden = 8\n')

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("flmoe_fast.runs.train.train", stop)
    assert main(["train", str(tmp_path / "run.toml")]) == 130
    assert "the same command goes on from there" in capsys.readouterr().err


def test_several_targets_of_a_multilabel_model(folder, tmp_path):
    flmoe_fast.save_checkpoint(make_model("multilabel"), tmp_path / "model.pth")
    options = ["--target", "0", "2", "--contexts", "4"]
    assert explain(folder, tmp_path, *options, model=tmp_path / "model.pth", sample="raw.npz") == 0
    assert flmoe_fast.InteractionResult.load(tmp_path / "interactions.npz").about["target"] == [0, 2]


@pytest.fixture
def published(folder, tmp_path):
    """The same model as published code stores it: nothing but state dicts."""
    model = flmoe_fast.load_checkpoint(folder / "model.safetensors")
    encoders = {name: encoder.state_dict() for name, encoder in model.encoders.items()}
    path = tmp_path / "published.pth"
    torch.save({"ensemble_model": model.ensemble_state_dict(), "encoder_dict": encoders}, path)
    return path


def test_published_layout_needs_what_it_does_not_store(folder, published, tmp_path, capsys):
    command = ["explain", str(published), str(folder / "raw.npz"), "--out", str(tmp_path / "out"), "--no-progress"]
    command += ["--contexts", "4", "--fill", "zero"]
    assert main(command) == 2
    assert "modalities, heads, temperature, task" in one_line(capsys)
    told = ["--modalities", "img", "tab", "--heads", "2", "--temperature", "2.0", "--task", "multiclass"]
    assert main(command + told) == 0
    assert explain(folder, tmp_path / "own", "--contexts", "4", "--fill", "zero", sample="raw.npz") == 0
    found, own = (flmoe_fast.InteractionResult.load(tmp_path / at / "interactions.npz") for at in ("out", "own"))
    np.testing.assert_array_equal(found.sii, own.sii)
    assert main([*command[:-2], *told]) == 2  # no feature means in such a file
    assert one_line(capsys).startswith("flmoe-fast: error: fill: ")


def one_line(capsys) -> str:
    """The error message, after checking that it is a single line and nothing else was printed."""
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert len(lines) == 1 and "Traceback" not in printed.err, printed.err
    return lines[0]


def arrays(**changes):
    """Encoded sample with some arrays replaced or, if None, left out."""
    found = {"features.img": np.ones((4, HIDDEN), "f"), "features.tab": np.ones((3, HIDDEN), "f"), **changes}
    return {key: value for key, value in found.items() if value is not None}


WITH_NAN = np.ones((4, HIDDEN), "f")
WITH_NAN[2, 1] = np.nan
RAW = {"features.img": None, "features.tab": None, "inputs.tab": np.ones(3, "f")}


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ({"features.img": WITH_NAN}, "features[0]: got nan at index (2, 1)"),
        ({"features.img": np.ones((4, 7), "f")}, "features[0]: got shape (4, 7)"),
        ({"features.tab": None}, "features.tab: got nothing"),
        ({"features.img": None, "features.tab": None}, "sample: got neither features nor inputs"),
        ({"inputs.img": np.ones((4, WIDTH), "f"), "inputs.tab": np.ones(3, "f")}, "sample: got both"),
        ({"features.text": np.ones((4, HIDDEN), "f")}, "sample: got an array 'features.text'"),
        ({"features.img": np.array(["a", "b"])}, "features.img: got <U1"),
        ({"features.img": np.ones((4, HIDDEN), int)}, "features[0]: got torch.int64"),
        ({"masks.img": np.ones(4, "f")}, "masks.tab: got nothing"),
        ({"masks.img": np.ones(5, "f"), "masks.tab": np.ones(3, "f")}, "masks[0]: got shape (5,)"),
        ({"masks.img": 2 * np.ones(4, "f"), "masks.tab": np.ones(3, "f")}, "masks[0]: got values other"),
        ({**RAW, "inputs.img": np.ones((4, WIDTH + 1), "f")}, "inputs.img: got shape (4, 6)"),
        ({**RAW, "inputs.img": np.full((4, WIDTH), np.inf, "f")}, "inputs.img: got inf"),
    ],
)
def test_bad_samples(folder, tmp_path, capsys, content, named):
    np.savez(tmp_path / "bad.npz", **arrays(**content))
    assert explain(folder, tmp_path / "out", sample=tmp_path / "bad.npz") == 2
    assert one_line(capsys).startswith(f"flmoe-fast: error: {named}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"model": "missing.safetensors"}, "missing.safetensors: file: found nothing"),
        ({"sample": "missing.npz"}, "missing.npz: no such file"),
        ({"sample": "model.txt"}, "sample: got"),
        ({"model": "half.safetensors"}, "half.safetensors: file: found a damaged or truncated file"),
        ({"model": "half.pth"}, "half.pth: file: found a damaged or truncated file"),
        ({"sample": "half.npz"}, "sample: got"),
        ({"sample": "half.safetensors"}, "sample: got"),
        ({"sample": "pickled.npz"}, "sample: got"),
        ({"extra": ["--target", "3"]}, "target: got 3"),
        ({"extra": ["--candidates", "0"]}, "candidates[0]: got 0"),
        ({"extra": ["--contexts", "0"]}, "contexts: got 0"),
        ({"extra": ["--budget", "10"]}, "budget: got 10"),
        ({"extra": ["--seed", "-1"]}, "seed: got -1"),
        ({"extra": ["--heads", "3"]}, "heads: got 3"),
        ({"extra": ["--device", "nowhere"]}, "device: got 'nowhere'"),
    ],
)
def test_bad_arguments_and_damaged_files(folder, tmp_path, capsys, arguments, named):
    for name in ("model.safetensors", "encoded.npz", "encoded.safetensors"):
        content = (folder / name).read_bytes()
        half = name.replace("model", "half") if name.startswith("model") else name.replace("encoded", "half")
        if name != "encoded.safetensors" or arguments.get("sample") == "half.safetensors":
            (tmp_path / half).write_bytes(content[: len(content) // 2])
    flmoe_fast.save_checkpoint(make_model(), tmp_path / "half.pth")
    content = (tmp_path / "half.pth").read_bytes()
    (tmp_path / "half.pth").write_bytes(content[: len(content) // 2])
    np.savez(tmp_path / "pickled.npz", **{"features.img": np.array([{}], dtype=object)})
    model, sample = (arguments.get(name) for name in ("model", "sample"))
    code = explain(
        folder,
        tmp_path / "out",
        *arguments.get("extra", ()),
        model=tmp_path / model if model else "model.safetensors",
        sample=tmp_path / sample if sample else "encoded.npz",
    )
    assert code == 2
    assert named in one_line(capsys)
    assert not (tmp_path / "out").exists()


def test_folder_that_cannot_be_made(folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert explain(folder, tmp_path / "file", "--contexts", "2") == 2
    assert "file" in one_line(capsys)


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (["explain", "a", "b"], "--out"),
        (["explain", "a", "b", "--out", "c", "--contexts", "x"], "--contexts"),
        (["explain", "a", "b", "--out", "c", "--contexts", "4", "--budget", "9"], "--budget"),
        (["explain", "a", "b", "--out", "c", "--gap", "other"], "--gap"),
        (["other"], "other"),
    ],
)
def test_bad_command_lines(capsys, command, named):
    with pytest.raises(SystemExit) as stop:
        main(command)
    assert stop.value.code == 2 and named in one_line(capsys)


def test_process_ends_with_code_2_and_no_traceback(tmp_path):
    command = [sys.executable, "-m", "flmoe_fast.cli", "explain", "missing.pth", "sample.npz", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "flmoe-fast: error: missing.pth: file: found nothing, expected a checkpoint\n"


def test_version_and_doctor(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"flmoe-fast {flmoe_fast.__version__}\n"
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert torch.__version__ in printed and "reference" in printed


def test_warnings_are_one_line(folder, tmp_path, capsys):
    # Means and encoders of a kind that is not known: a model without encoders, and a warning.
    model = make_model()
    tensors = {f"ensemble_model.{key}": value for key, value in model.ensemble_state_dict().items()}
    tensors |= {f"encoder_dict.{name}.odd": torch.ones(2) for name in model.config.modalities}
    save_file(tensors, tmp_path / "odd.safetensors", {"config": json.dumps(model.config.to_dict())})
    assert explain(folder, tmp_path, "--contexts", "2", "--fill", "zero", model=tmp_path / "odd.safetensors") == 0
    assert one_line_of(capsys.readouterr().err).startswith("flmoe-fast: warning: ")
    code = explain(folder, tmp_path, "--fill", "zero", model=tmp_path / "odd.safetensors", sample="raw.npz")
    assert code == 2 and "inputs: got raw inputs" in capsys.readouterr().err


def one_line_of(text: str) -> str:
    (line,) = text.splitlines()
    return line


def test_save_sample_refuses_other_kinds(tmp_path):
    with pytest.raises(ArgumentError, match="^kinds"):
        save_sample(tmp_path / "a.npz", labels={"img": torch.ones(2)})
    with pytest.raises(ArgumentError, match="^sample"):
        save_sample(tmp_path / "a.csv", inputs={"img": torch.ones(2)})


@pytest.mark.parametrize("arguments", [["--epochs", "0"], ["--seed", "-1"]])
def test_demo_refuses(tmp_path, capsys, arguments):
    assert main(["demo", "--out", str(tmp_path), *arguments]) == 2
    assert arguments[0].strip("-") in one_line(capsys)


def test_demo(tmp_path, capsys):
    """Everything once, as little of it as possible; the numbers are recomputed from the files it wrote."""
    out = tmp_path / "demo"
    size = Size(epochs=1, contexts=4, naive_pairs=2, naive_samples=4, masked_images=3, masking_contexts=4)
    found = run(out, seed=1, size=size, progress=False)
    printed = capsys.readouterr().out
    assert (out / "report.txt").read_text() == printed

    training, held_out = two_view_digits(1)
    model = flmoe_fast.load_checkpoint(out / "model.safetensors")
    with torch.no_grad():
        means, encoded = (model.encode(part.inputs) for part in (training, held_out))
    for mean, remembered in zip(means, model.feature_means):
        torch.testing.assert_close(mean.mean((0, 1)), remembered)
    right = predict(model, held_out.inputs, held_out.masks).logits.argmax(-1) == held_out.labels
    assert found["accuracy"] == right.double().mean() > 0.3  # ten classes; one epoch
    assert f"accuracy {found['accuracy']:.1%} " in printed and f"({int(right.sum())} of 360)" in printed

    masking = pandas.read_csv(out / "masking.csv")
    assert list(masking["ranking"]) == ["SII"] * 4 + ["strict gap"] * 4
    assert list(masking["pairs"]) == [1, 2, 4, 8] * 2 and (masking["samples"] == 3).all()
    np.testing.assert_allclose(masking["difference"], masking["top"] - masking["random"], atol=1e-12)
    for ranking, by in (("SII", "sii"), ("strict gap", "gap")):
        drops = []
        for image in range(3):
            game = flmoe_fast.TokenGame(model, [f[image] for f in encoded], masks=[m[image] for m in held_out.masks])
            pairs = flmoe_fast.interactions(game, contexts=4, seed=1 + image, gap="strict", progress=False)
            gone = torch.ones(2, 16, dtype=torch.bool)
            gone[1, pairs.pairs[pairs.order(by)[:2]].ravel()] = False
            drops.append(-game(gone)[:, 0].diff().item())
        np.testing.assert_allclose(masking[masking["ranking"] == ranking]["top"].iloc[1], np.mean(drops), rtol=1e-4)
    assert len(pandas.read_csv(out / "importance.csv")) == 16
    picture = matplotlib.image.imread(out / "picture.png")
    assert picture.shape[0] > 700 and picture.shape[1] > 2000 and picture[..., :3].std() > 0.1

    again = printed.splitlines()[-1].partition("flmoe-fast ")[2].split()
    assert main([*again, "--no-progress"]) == 0
    first, second = (pandas.read_csv(at / "interactions.csv") for at in (out, out / "explain"))
    assert len(first) == 64 * 9
    pandas.testing.assert_frame_equal(first, second)


def test_flags_without_effect_are_refused(folder, tmp_path, capsys):
    (tmp_path / "run.toml").write_text("[data]\n[model]\n")
    for flags in (["--contexts", "8"], ["--out", "x"], ["--target", "1"], ["--seed", "0"], ["--heads", "2"]):
        with pytest.raises(SystemExit) as ended:
            main(["explain", str(tmp_path / "run.toml"), *flags])
        assert ended.value.code == 2 and f"{flags[0]} beside" in capsys.readouterr().err
    assert main(["explain", str(tmp_path / "run.toml"), "--no-progress"]) == 2  # the settings are read, and refused
    assert "data.kind" in capsys.readouterr().err


def test_an_argument_that_contradicts_the_file_is_said(folder, tmp_path, capsys):
    assert explain(folder, tmp_path / "same", "--contexts", "2", "--heads", "2") == 0
    assert capsys.readouterr().err == ""
    assert explain(folder, tmp_path / "other", "--contexts", "2", "--heads", "4") == 0
    assert "was saved with heads 2; with 4 it is another model" in capsys.readouterr().err
