"""The command line: ``flmoe-fast demo | train | explain | faithfulness | report | doctor``.

Bad input is answered by one line on stderr that names the argument or the file, and exit code 2. With ``--json`` a
command prints one JSON object, and what else it has to say on stderr.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import json
import signal
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch

from flmoe_fast.checks import ArgumentError, device
from flmoe_fast.data.errors import DataError
from flmoe_fast.data.sample import load_sample
from flmoe_fast.engines.backends import backends, doctor
from flmoe_fast.engines.choose import BACKENDS
from flmoe_fast.environment import MissingExtra, environment
from flmoe_fast.model.checkpoint import CheckpointError, load_checkpoint
from flmoe_fast.model.config import CAPACITIES, GATES, TASKS
from flmoe_fast.pipeline.explain import DEFAULT_CANDIDATES, Explanation, explain
from flmoe_fast.pipeline.show.text import report
from flmoe_fast.probes.gap import DEFAULT_GAP, GAPS
from flmoe_fast.probes.indices import ORDERS
from flmoe_fast.probes.interactions import METHODS

BAD_INPUT, INTERRUPTED = 2, 130
#: What a command says to a person, and the same for a program.
Answer = tuple[str, Any]
#: What explains a sample where nothing else is given.
_EXPLAIN: dict[str, Any] = {
    **dict.fromkeys(("sample", "out", "contexts", "budget", "target", "dtype", "device")),
    "candidates": DEFAULT_CANDIDATES,
    "method": "auto",
    "also": (),
    "seed": 0,
    "gap": DEFAULT_GAP,
    "value": "prob",
    "fill": "mean",
    "backend": "auto",
    "progress": True,
}
_GOES_ON = "what is finished stays, and the same command goes on from there"
_STORED = tuple("modalities heads temperature task gate top_k capacity gumbel_temperature gate_threshold".split())


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings(), _Interrupts() as interrupts:
        warnings.showwarning = lambda message, *_, **__: print(f"flmoe-fast: warning: {message}", file=sys.stderr)
        try:
            text, found = arguments.run(arguments)
            print(json.dumps(found, default=str) if arguments.json else text)
        except KeyboardInterrupt:
            return _stopped(arguments)
        except Exception as problem:
            if interrupts.asked:
                return _stopped(arguments)
            if isinstance(problem, _EXPECTED):
                print(f"flmoe-fast: error: {' '.join(str(problem).split())}", file=sys.stderr)
            elif _is_of_memory(problem):
                print(f"flmoe-fast: error: not enough memory; {arguments.stopped}", file=sys.stderr)
            else:
                raise
            return BAD_INPUT
    return 0


#: What a command raises for input that is not as it should be, and for a system that does not let it go on.
_EXPECTED = (ArgumentError, CheckpointError, DataError, MissingExtra, OSError, FloatingPointError)


class _Interrupts:
    """Remembers Ctrl-C: extensions that call back into Python may turn what it raises into errors of their own."""

    asked = False

    def __enter__(self) -> _Interrupts:
        self._before = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
            if before is signal.default_int_handler:  # else somebody has decided otherwise
                self._before = signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _note(self, *_: object) -> NoReturn:
        self.asked = True
        raise KeyboardInterrupt


def _stopped(arguments: argparse.Namespace) -> int:
    print(f"\nflmoe-fast: stopped; {arguments.stopped}", file=sys.stderr)
    return INTERRUPTED


def _is_of_memory(problem: Exception) -> bool:
    # PyTorch has no class of its own for the memory of CPUs.
    return isinstance(problem, MemoryError | torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(problem)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """One line instead of the usage."""
        self.exit(BAD_INPUT, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="flmoe-fast",
        description="Which tokens of different modalities work together or back each other up in an FL-I2MoE model.",
    )
    version = importlib.import_module(__package__).__version__
    parser.add_argument("--version", action="version", version=f"flmoe-fast {version}")
    commands = parser.add_subparsers(
        title="commands", required=True, metavar="demo | train | explain | faithfulness | report | doctor"
    )

    demo = commands.add_parser("demo", help="train on real digits, explain one, check and mask: everything in a minute")
    demo.add_argument("--out", required=True, metavar="DIR", help="folder for the picture, the tables and the model")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    demo.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    demo.set_defaults(run=_demo, stopped="it starts anew each time")

    steps = {
        "train": (_train, "train a model on a data set, or go on where a run was stopped"),
        "faithfulness": (_faithfulness, "drop curves and AOPC of a trained run's importance maps"),
        "report": (_report, "one HTML page about a run"),
    }
    for name, (run, text) in steps.items():
        step = commands.add_parser(name, help=text)
        step.add_argument("settings", metavar="RUN.toml", help="what the run is, see the README")
        step.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
        step.set_defaults(run=run, stopped=_GOES_ON)

    # What is not given is left out, so that what is given is known; _EXPLAIN says what stands for the rest.
    one = commands.add_parser(
        "explain",
        help="explain one sample of a saved model, or the samples of a run",
        argument_default=argparse.SUPPRESS,
    )
    one.add_argument("model", metavar="MODEL", help="a .safetensors, .pth or .pt checkpoint, or a RUN.toml alone")
    one.add_argument(
        "sample",
        metavar="SAMPLE",
        nargs="?",
        help="a .npz or .safetensors file with features.<modality> (T, H), or inputs.<modality> for the model's "
        "encoders, and optionally masks.<modality> (T,)",
    )
    one.add_argument("--out", metavar="DIR", help="folder for the tables and the heat maps")
    one.add_argument(
        "--candidates",
        type=int,
        metavar="N",
        help=f"most important tokens of each modality whose pairs are probed ({_EXPLAIN['candidates']})",
    )
    spend = one.add_mutually_exclusive_group()
    spend.add_argument("--contexts", type=int, metavar="K", help="contexts, each one sample of every pair (64)")
    spend.add_argument("--budget", type=int, metavar="B", help="model evaluations, part of them spent where it pays")
    one.add_argument("--method", choices=METHODS, help=f"how interactions are estimated ({_EXPLAIN['method']})")
    one.add_argument("--also", nargs="+", choices=ORDERS, metavar="INDEX", help=f"of {', '.join(ORDERS)}")
    one.add_argument("--seed", type=int)
    one.add_argument("--gap", choices=GAPS, help=f"kind of redundancy gap ({_EXPLAIN['gap']})")
    one.add_argument("--value", choices=("prob", "logit"), help=f"what is explained ({_EXPLAIN['value']})")
    one.add_argument("--target", type=int, nargs="+", metavar="C", help="class or classes (the predicted ones)")
    one.add_argument("--fill", choices=("mean", "zero"), help=f"what absent tokens become ({_EXPLAIN['fill']})")
    one.add_argument("--backend", choices=BACKENDS, help=f"what evaluates the model ({_EXPLAIN['backend']})")
    one.add_argument("--dtype", choices=("float32", "float64"), help="arithmetic (the model's)")
    one.add_argument("--device", help="where to evaluate, such as cuda (the CPU)")
    one.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bar")
    stored = one.add_argument_group("what a checkpoint without a configuration does not tell")
    stored.add_argument("--modalities", nargs="+", metavar="NAME", help="in the order of the sequence")
    stored.add_argument("--heads", type=int, metavar="N", help="attention heads")
    stored.add_argument("--temperature", type=float, help="of the routing")
    stored.add_argument("--task", choices=TASKS)
    stored.add_argument("--gate", choices=[g for g in GATES if g], help="of sparse feed-forward blocks")
    stored.add_argument("--top-k", type=int, metavar="N", help="networks a token uses in sparse blocks")
    stored.add_argument("--capacity", choices=CAPACITIES, help="whether a network's tokens are limited (none)")
    stored.add_argument("--gumbel-temperature", type=float, help="of InterpretCC gates")
    stored.add_argument("--gate-threshold", type=float, help="of InterpretCC gates")
    one.set_defaults(run=_explain, parser=one, stopped=_GOES_ON)

    commands.add_parser("doctor", help="what can run here, and why not").set_defaults(run=_doctor, stopped="")
    for command in commands.choices.values():
        command.add_argument("--json", action="store_true", default=False, help="print what was found as JSON")
    return parser


def _doctor(_: argparse.Namespace) -> Answer:
    return doctor(), {"environment": environment(), "backends": [dataclasses.asdict(one) for one in backends()]}


def _demo(arguments: argparse.Namespace) -> Answer:
    # Only this command needs scikit-learn, pandas and matplotlib at once.
    from flmoe_fast.demo.run import Size, run

    size = Size() if arguments.epochs is None else dataclasses.replace(Size(), epochs=arguments.epochs)
    with contextlib.redirect_stdout(sys.stderr if arguments.json else sys.stdout):
        found = run(arguments.out, seed=arguments.seed, size=size, progress=arguments.progress)
    return "", found


def _train(arguments: argparse.Namespace) -> Answer:
    from flmoe_fast.runs.settings import read_settings
    from flmoe_fast.runs.train import train

    settings = read_settings(arguments.settings)
    metrics = train(settings, arguments.progress)
    lines = [
        f"{part:6}" + "  ".join(f"{name} {value:.4f}" for name, value in metrics[part].items())
        for part in ("valid", "test")
        if part in metrics
    ]
    files = "model.safetensors, metrics.json, predictions.npz, training.jsonl, training.csv"
    return "\n".join([*lines, f"Written to {settings.out}: {files}"]), {"out": settings.out, **metrics}


def _faithfulness(arguments: argparse.Namespace) -> Answer:
    from flmoe_fast.runs.faithfulness import measure_faithfulness, read_patterns
    from flmoe_fast.runs.page_patterns import specificity_line
    from flmoe_fast.runs.settings import read_settings

    settings = read_settings(arguments.settings)
    tables = measure_faithfulness(settings, arguments.progress)
    lines = []
    for method, table in tables.items():
        first = table.iloc[0]
        gaps = [f"{name} gap {first[f'aopc_{name}_prob_gap']:+.4f}" for name in ("comprehensiveness", "sufficiency")]
        lines.append(f"{method:10} AOPC " + "  ".join(gaps))
    lines += [specificity_line(method, patterns) for method, patterns in read_patterns(settings.out).items()]
    found = {method: json.loads(table.to_json(orient="records")) for method, table in tables.items()}
    return "\n".join([*lines, f"Written to {settings.out / 'faithfulness'}"]), found


def _report(arguments: argparse.Namespace) -> Answer:
    from flmoe_fast.runs.page import report_run
    from flmoe_fast.runs.settings import read_settings

    path = report_run(read_settings(arguments.settings))
    return f"Written to {path}", {"report": path}


def _explain(given: argparse.Namespace) -> Answer:
    arguments = argparse.Namespace(**{**_EXPLAIN, **dict.fromkeys(_STORED), **vars(given)})
    if Path(arguments.model).suffix == ".toml" and arguments.sample is None:
        from flmoe_fast.runs.explain import explain_samples
        from flmoe_fast.runs.settings import read_settings

        useless = [
            f"--{name.replace('_', '-')}" for name in vars(given) if name in {*_EXPLAIN, *_STORED} - {"progress"}
        ]
        if useless:
            arguments.parser.error(f"{', '.join(useless)} beside {arguments.model}: its section [explain] says this")
        settings = read_settings(arguments.model)
        folders = explain_samples(settings, arguments.progress)
        return f"{len(folders)} samples in {settings.out / 'samples'}", {"samples": folders}
    missing = [label for label, name in (("SAMPLE", "sample"), ("--out", "out")) if getattr(arguments, name) is None]
    if missing:
        arguments.parser.error(f"the following arguments are required: {', '.join(missing)} (or a RUN.toml alone)")
    model = load_checkpoint(arguments.model, **{name: getattr(arguments, name) for name in _STORED})
    features, masks = load_sample(arguments.sample, model)
    target = arguments.target
    found = explain(
        model,
        features,
        masks=masks,
        candidates=arguments.candidates,
        contexts=arguments.contexts,
        budget=arguments.budget,
        method=arguments.method,
        also=arguments.also,
        seed=arguments.seed,
        gap=arguments.gap,
        progress=arguments.progress,
        value=arguments.value,
        target=target[0] if target and len(target) == 1 else target,
        fill=arguments.fill,
        backend=arguments.backend,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        device=None if arguments.device is None else device("device", arguments.device),
    )
    out = Path(arguments.out)
    found.save(out)
    text = f"{arguments.sample} in {arguments.model}\n{report(found)}"
    (out / "report.txt").write_text(text + "\n")
    _heat_maps(found, out / "heatmap.png")
    files = "report.txt, heatmap.png, interactions.csv, interactions.npz, importance.csv"
    written = f"Written to {out}: {files}{', indices.csv' if arguments.also else ''}"
    return f"{text}\n\n{written}", {"out": out, **found.prediction, "result": json.loads(found.interactions.to_json())}


def _heat_maps(found: Explanation, path: Path) -> None:
    """Interactions and redundancy gaps of the mixture, side by side."""
    from matplotlib.figure import Figure

    pairs = found.interactions.pairs
    rows, columns = (len(set(side.tolist())) for side in pairs.T)
    figure = Figure(figsize=(4.0 + 0.9 * columns, 1.6 + 0.4 * rows), dpi=150, layout="constrained")
    for axes, of in zip(figure.subplots(1, 2), ("sii", "gap")):
        found.interactions.plot(of=of, ax=axes)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
