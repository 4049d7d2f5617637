"""Killed runs: what is left is usable, and going on ends with the numbers of an unbroken run."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import textwrap

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flmoe_fast.checks import ArgumentError
from flmoe_fast.cli import main
from flmoe_fast.files import replacing
from flmoe_fast.model.config import FLI2MoEConfig
from flmoe_fast.model.encoders import ProjectionEncoder
from flmoe_fast.model.network import FLI2MoE
from flmoe_fast.model.training.examples import Examples
from flmoe_fast.model.training.fit import ABLATIONS
from flmoe_fast.model.training.predict import evaluate
from flmoe_fast.pipeline.records import SampleRecord
from flmoe_fast.runs.settings import read_settings
from tests.commands import Commands
from tests.fitting import fitted

SETTINGS = """
    out = "run"
    [data]
    kind = "digits"
    [model]
    hidden = 8
    heads = 2
    layers = 1
    reweight_hidden = 8
    dropout = 0.2
    [training]
    epochs = 2
    batch_size = 256
    lr = 1e-2
    select = "loss"
    regularizer = "rep-cos"
    checkpoint_steps = 1
    threads = 1
    [explain]
    samples = 2
    candidates = 3
    contexts = 4
    most = [1, 2]
    repeats = 3
    [faithfulness]
    part = "test"
    samples = 20
    repeats = 3
"""


@pytest.fixture(scope="module")
def killed():
    """Run a command that kills itself right after the n-th file of a name is in its place; for -n, right before."""
    with Commands() as commands:

        def kill(name, number, *arguments):
            event = 2 * number - 1 if number > 0 else -2 * number - 2
            ended = commands.run(*arguments, "--no-progress", before=f"die_at({event}, {name!r})")
            assert ended.status == -signal.SIGKILL, ended.said

        yield kill


def settings_in(folder):
    folder.mkdir()
    path = folder / "run.toml"
    path.write_text(textwrap.dedent(SETTINGS))
    return path


def run(command, path):
    assert main([command, str(path), "--no-progress"]) == 0


@pytest.fixture
def undrawn(monkeypatch):
    """Reports without their pictures, which are most of their time: for tests that read the words."""
    monkeypatch.setattr("flmoe_fast.pipeline.show.html.as_svg", lambda axes, prefix: "<svg ></svg>")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    path = settings_in(tmp_path_factory.mktemp("unbroken") / "a")
    for command in ("train", "explain", "faithfulness"):
        run(command, path)
    return path


def without_seconds(path):
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def test_run_killed_again_and_again_ends_the_same(unbroken, killed, tmp_path):
    path = settings_in(tmp_path / "b")
    out, whole = path.parent / "run", unbroken.parent / "run"
    killed("training.pt", 8, "train", path)  # in the second epoch, of five steps each
    assert not (out / "model.safetensors").exists()
    assert len(without_seconds(out / "training.jsonl")) == 1
    run("train", path)
    weights, expected = (load_file(folder / "model.safetensors") for folder in (out, whole))
    assert set(weights) == set(expected) and all(torch.equal(weights[key], expected[key]) for key in weights)
    assert without_seconds(out / "training.jsonl") == without_seconds(whole / "training.jsonl")
    assert len(without_seconds(out / "training.jsonl")) == 2
    assert (out / "metrics.json").read_text() == (whole / "metrics.json").read_text()

    killed("record.npz", 1, "explain", path)
    done = {folder.name: (folder / "record.npz").stat().st_mtime_ns for folder in (out / "samples").glob("test-*")}
    assert len(done) == 1
    run("explain", path)
    for name, at in done.items():
        assert (out / "samples" / name / "record.npz").stat().st_mtime_ns == at  # not done again
    names = sorted(folder.name for folder in (whole / "samples").glob("test-*"))
    assert names == ["test-000000", "test-000001"]
    for name in names:
        a, b = (SampleRecord.load(root / "run" / "samples" / name) for root in (path.parent, unbroken.parent))
        assert np.array_equal(a.interactions.sii, b.interactions.sii) and a.full == b.full
        assert np.array_equal(a.faithfulness.random_only, b.faithfulness.random_only)
        assert np.array_equal(a.masked["gap"].random, b.masked["gap"].random)

    path.write_text(path.read_text().replace("samples = 20", "samples = 16"))
    run("faithfulness", path)
    block = out / "faithfulness" / "attnXgrad" / "block-00000.json"
    at = block.stat().st_mtime_ns
    path.write_text(path.read_text().replace("samples = 16", "samples = 20"))
    run("faithfulness", path)
    assert block.stat().st_mtime_ns == at
    for kind in ("raw", "pretty"):
        name = f"faithfulness/attnXgrad/digits_imoe_masking_per_modality_mean_std_{kind}_test.csv"
        assert (out / name).read_text() == (whole / name).read_text()
    run("report", unbroken)
    killed("report.html", -1, "report", path)
    assert not (out / "report.html").exists()
    run("report", path)
    assert (out / "report.html").read_text() == (whole / "report.html").read_text()


def test_another_model_explains_anew(unbroken, tmp_path):
    path = settings_in(tmp_path / "c")
    path.write_text(path.read_text().replace("epochs = 2", "epochs = 1").replace("samples = 2", "samples = 1"))
    run("train", path)
    run("explain", path)
    record = path.parent / "run" / "samples" / "test-000000"
    before = SampleRecord.load(record)
    path.write_text(path.read_text().replace("epochs = 1", "epochs = 2"))
    run("train", path)  # the finished run is trained further
    run("explain", path)
    after = SampleRecord.load(record)
    assert not np.array_equal(before.interactions.sii, after.interactions.sii)
    whole = SampleRecord.load(unbroken.parent / "run" / "samples" / "test-000000")
    assert np.array_equal(after.interactions.sii, whole.interactions.sii)


def test_finished_records_stay_until_they_are_replaced(unbroken, killed, tmp_path, capsys, undrawn):
    shutil.copytree(unbroken.parent, tmp_path / "f")
    path = tmp_path / "f" / "run.toml"
    samples = path.parent / "run" / "samples"
    before = {folder.name: SampleRecord.load(folder) for folder in sorted(samples.glob("test-*"))}
    assert len(before) == 2
    path.write_text(path.read_text().replace("contexts = 4", "contexts = 5"))
    killed("record.npz", -1, "explain", path)  # the first new record is complete, but not in its place
    for name, record in before.items():
        assert np.array_equal(SampleRecord.load(samples / name).interactions.sii, record.interactions.sii)
    killed("record.npz", 1, "explain", path)
    changed = [name for name in before if SampleRecord.load(samples / name).made_by != before[name].made_by]
    assert changed == ["test-000000"]
    capsys.readouterr()
    run("report", path)
    page = (path.parent / "run" / "report.html").read_text()
    assert page.count("Explained with other settings") == 1
    path.write_text(path.read_text().replace("samples = 2\n", "samples = 1\n", 1))
    run("explain", path)  # done: nothing is explained, and the other sample is kept
    assert "were explained with other settings" in capsys.readouterr().err
    assert SampleRecord.load(samples / "test-000001").made_by == before["test-000001"].made_by
    path.write_text(path.read_text().replace("samples = 1\n", "samples = 2\n", 1))
    run("explain", path)
    for name in before:
        assert SampleRecord.load(samples / name).made_by["contexts"] == 5
    run("report", path)
    assert "Explained with other settings" not in (path.parent / "run" / "report.html").read_text()


def test_a_model_at_chance_is_said_by_every_step(unbroken, tmp_path, capsys, undrawn):
    shutil.copytree(unbroken.parent, tmp_path / "g")
    path = tmp_path / "g" / "run.toml"
    scores = path.parent / "run" / "metrics.json"
    metrics = json.loads(scores.read_text())
    says = "not surely better than the same guess for all"
    for better in (True, False):
        scores.write_text(json.dumps({**metrics, "chance": {**metrics["chance"], "better": better}}))
        capsys.readouterr()
        run("explain", path)
        assert (says in capsys.readouterr().err) == (not better)
        run("report", path)
        assert (says in (path.parent / "run" / "report.html").read_text()) == (not better)
    path.write_text(path.read_text().replace("epochs = 2", "epochs = 1").replace("lr = 1e-2", "lr = 1e-9"))
    (path.parent / "run" / "training.pt").unlink()
    run("train", path)
    assert says in capsys.readouterr().err and not json.loads(scores.read_text())["chance"]["better"]


def test_method_and_indices_of_the_settings_reach_the_report(unbroken, tmp_path, undrawn):
    shutil.copytree(unbroken.parent, tmp_path / "e")
    path = tmp_path / "e" / "run.toml"
    more = 'samples = 1\nbudget = 120\nmethod = "surrogate"\nalso = ["SV", "FSII"]\ncandidates = 3\n'
    path.write_text(path.read_text().replace("samples = 2\ncandidates = 3\ncontexts = 4\n", more))
    run("explain", path)
    run("report", path)
    found = SampleRecord.load(path.parent / "run" / "samples" / "test-000000").interactions
    assert found.about["method"] == "surrogate" and found.evaluations <= 120
    assert list(found.also) == [("SV", 1), ("FSII", 1), ("FSII", 2)]
    before = SampleRecord.load(unbroken.parent / "run" / "samples" / "test-000000").interactions
    assert not before.also and not np.array_equal(before.sii, found.sii)
    page = (path.parent / "run" / "report.html").read_text()
    assert "120 evaluations (surrogate)" in page and "FSII of pairs" in page and "SV of tokens" in page


def small(dropout=0.3, **fields):
    torch.manual_seed(0)
    config = FLI2MoEConfig(("a", "b", "c"), 8, 2, 1, 3, reweight_hidden=8, dropout=dropout, **fields)
    return FLI2MoE(config, {name: ProjectionEncoder(4, 8) for name in "abc"})


def data(samples=20, seed=0):
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(samples, 3, 4, generator=generator) for _ in range(3)]
    return inputs, [torch.ones(samples, 3)] * 3, torch.randint(3, (samples,), generator=generator)


@pytest.mark.parametrize("ablation", ABLATIONS)
def test_every_ablation_resumes_exactly(ablation, tmp_path):
    options = {"batch_size": 6, "lr": 1e-2, "ablation": ablation}
    whole = small()
    history = fitted(whole, *data(), epochs=3, **options)

    class Stop(Exception):
        pass

    def stop_after(calls):
        def check(module, *_):
            calls.append(1)
            if len(calls) == 7:  # in the second epoch, between two checkpoints
                raise Stop

        return check

    broken = small()
    broken.reweight.register_forward_hook(stop_after([]))
    with pytest.raises(Stop):
        fitted(broken, *data(), epochs=3, checkpoint=tmp_path / "t.pt", checkpoint_steps=2, **options)
    again = small()
    resumed = fitted(again, *data(), epochs=3, checkpoint=tmp_path / "t.pt", checkpoint_steps=2, **options)
    assert [r["loss"] for r in resumed] == [r["loss"] for r in history]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    if ablation == "no interaction loss":
        assert history[0]["interaction_losses"] == [0.0] * 5
    else:
        assert any(history[0]["interaction_losses"])


def test_ablations_differ_and_average_routes_alike():
    losses = {}
    for ablation in ABLATIONS:
        losses[ablation] = fitted(small(0.0), *data(), epochs=2, lr=1e-2, ablation=ablation)[-1]["loss"]
    assert len(set(losses.values())) == len(ABLATIONS)
    model = small(0.0, routing="average", reweight_layers=1)
    inputs, masks, targets = data()
    before = model.reweight(model.encode(inputs), masks)
    assert torch.allclose(before, torch.full_like(before, 0.2))
    fitted(model, inputs, masks, targets, epochs=3, lr=1e-2)
    after = model.reweight(model.encode(inputs), masks)
    assert (after - after[0]).abs().max() == 0 and (after[0] - 0.2).abs().max() > 1e-4


def test_best_epoch_and_logs(tmp_path):
    held = Examples(*data(seed=1))
    options = {"batch_size": 5, "lr": 3e-2, "epochs": 5, "validation": held}
    model = small()
    history = fitted(model, *data(), select="loss", log=tmp_path / "log.csv", **options)
    losses = [record["validation"]["loss"] for record in history]
    assert evaluate(model, held)["loss"] == pytest.approx(min(losses), rel=1e-6) and min(losses) < losses[-1]
    with open(tmp_path / "log.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [float(row["validation loss"]) for row in rows] == losses
    assert float(rows[2]["interaction_loss synergy"]) == history[2]["interaction_losses"][3]
    last = small()
    fitted(last, *data(), log=tmp_path / "log.jsonl", **options)
    assert evaluate(last, held)["loss"] == pytest.approx(losses[-1], rel=1e-6)
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["validation"]["loss"] for line in lines] == losses


def test_patience_ends_a_run_that_can_go_on(tmp_path):
    held = Examples(*data(seed=1))
    options = {"batch_size": 5, "lr": 3e-2, "epochs": 8, "validation": held, "select": "loss"}
    whole = fitted(small(), *data(), **options)
    losses = [record["validation"]["loss"] for record in whole]
    best = losses.index(min(losses[:3]))
    assert best + 2 < len(losses) - 1 and min(losses[best + 1 : best + 3]) >= losses[best]  # or there is nothing to see
    told: list[dict] = []
    model = small()
    files = {"checkpoint": tmp_path / "t.pt", "callback": told.append}
    ended = fitted(model, *data(), **options, **files, patience=2)
    assert [r["validation"]["loss"] for r in ended] == losses[: best + 3] and told == ended
    assert evaluate(model, held)["loss"] == pytest.approx(losses[best], rel=1e-6)
    assert fitted(small(), *data(), **options, **files, patience=2) == ended and len(told) == len(ended)  # it is over
    longer = fitted(small(), *data(), **options, **files)
    assert [r["validation"]["loss"] for r in longer] == losses


def test_what_a_callback_raises_ends_a_run_that_can_go_on(tmp_path):
    def stop(record):
        record.clear()  # its own copy
        raise RuntimeError("enough")

    options = {"batch_size": 10, "lr": 1e-2, "checkpoint": tmp_path / "t.pt"}
    with pytest.raises(RuntimeError, match="enough"):
        fitted(small(), *data(), epochs=2, callback=stop, **options)
    again = fitted(small(), *data(), epochs=2, **options)
    assert [r["loss"] for r in again] == [r["loss"] for r in fitted(small(), *data(), epochs=2, batch_size=10, lr=1e-2)]


def test_regression_learns_a_number():
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(60, 3, 4, generator=generator) for _ in range(3)]
    targets = (inputs[0].mean((1, 2)) + inputs[1].mean((1, 2)))[:, None]
    torch.manual_seed(0)
    config = FLI2MoEConfig(
        ("a", "b", "c"), 8, 2, 1, 1, reweight_hidden=8, dropout=0.0, task="regression", interaction_weight=0.0
    )
    model = FLI2MoE(config, {name: ProjectionEncoder(4, 8) for name in "abc"})
    masks = [torch.ones(60, 3)] * 3
    history = fitted(model, inputs, masks, targets, epochs=30, batch_size=20, lr=1e-2)
    assert history[-1]["task_loss"] < 0.3 * history[0]["task_loss"]
    found = evaluate(model, Examples(inputs, masks, targets))
    assert found["mae"] < 0.5 * float(targets.abs().mean()) and found["accuracy"] > 0.8
    with pytest.raises(ArgumentError, match="targets"):
        fitted(model, inputs, masks, targets[:, 0].repeat(2), epochs=1)


def test_checkpoint_of_another_run_is_refused(tmp_path):
    options = {"batch_size": 10, "checkpoint": tmp_path / "t.pt"}
    fitted(small(), *data(), epochs=1, lr=1e-2, **options)
    with pytest.raises(ArgumentError, match="of a run with lr 0.01"):
        fitted(small(), *data(), epochs=2, lr=1e-3, **options)
    with pytest.raises(ArgumentError, match="with config"):
        fitted(small(0.1), *data(), epochs=2, lr=1e-2, **options)
    (tmp_path / "t.pt").write_bytes(b"nothing")
    with pytest.raises(ArgumentError, match="checkpoint: got"):
        fitted(small(), *data(), epochs=1, lr=1e-2, **options)
    for change, argument in (
        ({"select": "loss"}, "validation"),
        ({"select": "best"}, "select"),
        ({"ablation": "nothing"}, "ablation"),
        ({"log": "x.txt"}, "log"),
        ({"checkpoint_steps": 0}, "checkpoint_steps"),
        ({"patience": 2}, "patience"),
        ({"patience": 0, "select": "loss"}, "patience"),
        ({"passes": "fast"}, "passes"),
    ):
        with pytest.raises(ArgumentError) as caught:
            fitted(small(), *data(), epochs=1, **change)
        assert caught.value.argument == argument


def test_replacing_is_all_or_nothing(tmp_path):
    path = tmp_path / "file.txt"
    with replacing(path, "w") as file:
        file.write("old")
    with pytest.raises(RuntimeError), replacing(path, "w") as file:
        file.write("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    (
        ("epochs = 2", "epoch = 2", "training.epoch"),
        ("epochs = 2", 'epochs = "2"', "training.epochs"),
        ('kind = "digits"', 'kind = "letters"', "data.kind"),
        ('kind = "digits"', 'kind = "own"', "data.path"),
        ('kind = "digits"', 'kind = "digits"\nsize = 3', "data.size"),
        ('kind = "digits"', 'kind = "hdxor"', "data.setting"),
        ('kind = "digits"', 'kind = "own"\npath = "x.csv"\nmodalities = {a = {text = "a"}}', "data.target"),
        ("hidden = 8", "width = 8", "model.width"),
        ("[explain]", "[explaining]", "explaining"),
        ("[model]", "[model", "settings"),
        ('part = "test"', 'part = "rest"', "faithfulness.part"),
        ("contexts = 4", 'contexts = 4\nmethod = "lattice"', "explain.method"),
        ("contexts = 4", 'contexts = 4\nalso = ["SV", "SHAP"]', "explain.also"),
        ("contexts = 4", 'contexts = 4\ngap = "wide"', "explain.gap"),
        ('select = "loss"', 'select = "loss"\nablation = "no experts"', "training.ablation"),
    ),
)
def test_bad_settings_name_the_entry(tmp_path, capsys, old, new, name):
    path = tmp_path / "run.toml"
    path.write_text(textwrap.dedent(SETTINGS).replace(old, new, 1))
    with pytest.raises(ArgumentError) as caught:
        read_settings(path)
    assert caught.value.argument == name
    assert main(["train", str(path)]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_steps_before_training_say_so(tmp_path, capsys):
    path = settings_in(tmp_path / "d")
    for command in ("explain", "faithfulness", "report"):
        assert main([command, str(path)]) == 2
        assert "flmoe-fast train comes first" in capsys.readouterr().err
    assert main(["train", str(tmp_path / "none.toml")]) == 2
    assert "no such file" in capsys.readouterr().err
