"""The command line: ``flmoe-fast demo | explain | doctor``.

Bad input is answered by one line on stderr that names the argument or the file, and exit code 2.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import sys
import warnings
from pathlib import Path
from typing import NoReturn

import torch

from flmoe_fast.checks import ArgumentError
from flmoe_fast.data.sample import load_sample
from flmoe_fast.environment import doctor
from flmoe_fast.games.token_game import BACKENDS
from flmoe_fast.model.checkpoint import CheckpointError, load_checkpoint
from flmoe_fast.model.config import CAPACITIES, GATES, TASKS
from flmoe_fast.pipeline.explain import DEFAULT_CANDIDATES, Explanation, explain
from flmoe_fast.pipeline.report import report
from flmoe_fast.probes.gap import GAPS

BAD_INPUT, INTERRUPTED = 2, 130


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    arguments = _parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_, **__: print(f"flmoe-fast: warning: {message}", file=sys.stderr)
        try:
            arguments.run(arguments)
        except (ArgumentError, CheckpointError, OSError) as problem:
            print(f"flmoe-fast: error: {' '.join(str(problem).split())}", file=sys.stderr)
            return BAD_INPUT
        except KeyboardInterrupt:
            return INTERRUPTED
    return 0


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
    commands = parser.add_subparsers(title="commands", required=True, metavar="demo | explain | doctor")

    demo = commands.add_parser("demo", help="train on real digits, explain one, check and mask: everything in a minute")
    demo.add_argument("--out", required=True, metavar="DIR", help="folder for the picture, the tables and the model")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument("--epochs", type=int, metavar="N", help="passes over the training images")
    demo.add_argument("--no-progress", dest="progress", action="store_false", help="no progress bars")
    demo.set_defaults(run=_demo)

    one = commands.add_parser("explain", help="explain one sample of a saved model")
    one.add_argument("model", metavar="MODEL", help="a .safetensors, .pth or .pt checkpoint")
    one.add_argument(
        "sample",
        metavar="SAMPLE",
        help="a .npz or .safetensors file with features.<modality> (T, H), or inputs.<modality> for the model's "
        "encoders, and optionally masks.<modality> (T,)",
    )
    one.add_argument("--out", required=True, metavar="DIR", help="folder for the tables and the heat maps")
    one.add_argument(
        "--candidates",
        type=int,
        default=DEFAULT_CANDIDATES,
        metavar="N",
        help="most important tokens of each modality whose pairs are probed (%(default)s)",
    )
    spend = one.add_mutually_exclusive_group()
    spend.add_argument("--contexts", type=int, metavar="K", help="contexts, each one sample of every pair (64)")
    spend.add_argument("--budget", type=int, metavar="B", help="model evaluations, part of them spent where it pays")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--gap", choices=GAPS, default="max", help="kind of redundancy gap (%(default)s)")
    one.add_argument("--value", choices=("prob", "logit"), default="prob", help="what is explained (%(default)s)")
    one.add_argument("--target", type=int, nargs="+", metavar="C", help="class or classes (the predicted ones)")
    one.add_argument("--fill", choices=("mean", "zero"), default="mean", help="what absent tokens become (%(default)s)")
    one.add_argument("--backend", choices=BACKENDS, default="auto")
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
    one.set_defaults(run=_explain)

    commands.add_parser("doctor", help="what can run here, and why not").set_defaults(run=lambda _: print(doctor()))
    return parser


def _demo(arguments: argparse.Namespace) -> None:
    # Only this command needs scikit-learn, pandas and matplotlib at once.
    from flmoe_fast.demo.run import Size, run

    size = Size() if arguments.epochs is None else dataclasses.replace(Size(), epochs=arguments.epochs)
    run(arguments.out, seed=arguments.seed, size=size, progress=arguments.progress)


def _explain(arguments: argparse.Namespace) -> None:
    model = load_checkpoint(
        arguments.model,
        modalities=arguments.modalities,
        heads=arguments.heads,
        temperature=arguments.temperature,
        task=arguments.task,
        gate=arguments.gate,
        top_k=arguments.top_k,
        capacity=arguments.capacity,
        gumbel_temperature=arguments.gumbel_temperature,
        gate_threshold=arguments.gate_threshold,
    )
    features, masks = load_sample(arguments.sample, model)
    target = arguments.target
    found = explain(
        model,
        features,
        masks=masks,
        candidates=arguments.candidates,
        contexts=arguments.contexts,
        budget=arguments.budget,
        seed=arguments.seed,
        gap=arguments.gap,
        progress=arguments.progress,
        value=arguments.value,
        target=target[0] if target and len(target) == 1 else target,
        fill=arguments.fill,
        backend=arguments.backend,
        dtype=arguments.dtype and getattr(torch, arguments.dtype),
        device=_device(arguments.device),
    )
    out = Path(arguments.out)
    found.save(out)
    text = f"{arguments.sample} in {arguments.model}\n{report(found)}"
    (out / "report.txt").write_text(text + "\n")
    _heat_maps(found, out / "heatmap.png")
    print(f"{text}\n\nWritten to {out}: report.txt, heatmap.png, interactions.csv, interactions.npz, importance.csv")


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return None
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as problem:
        got = f"{name!r} ({str(problem).splitlines()[0]})"
        raise ArgumentError("device", got, "a device that torch can use here") from None


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
