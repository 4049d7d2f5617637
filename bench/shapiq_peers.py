"""Every estimator of the pairwise SII that shapiq has, asked through a worker in an interpreter of its own."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

#: Seconds of processor time that an estimate may take.
PATIENCE = 60
#: Times that, on the clock, after which the worker is ended from here.
HANGING = 10
#: Our name of an estimator, its class and its options.
ESTIMATORS: dict[str, tuple[str, dict]] = {
    "ProxySHAP": ("ProxySHAP", {}),
    "ProxySHAP, MSR": ("ProxySHAP", {"adjustment": True}),
    "ProxySHAP, MSR of 5 folds": ("ProxySHAP", {"adjustment": True, "k_folds": 5}),
    "ProxySHAP, LightGBM": ("ProxySHAP", {"proxy_model": "lightgbm"}),
    "ProxySHAP, LightGBM, MSR": ("ProxySHAP", {"proxy_model": "lightgbm", "adjustment": True}),
    "ProxySHAP, LightGBM, MSR of 5 folds": (
        "ProxySHAP",
        {"proxy_model": "lightgbm", "adjustment": True, "k_folds": 5},
    ),
    "ProxySHAP, one tree": ("ProxySHAP", {"proxy_model": "tree"}),
    "ProxySHAP, one tree, MSR": ("ProxySHAP", {"proxy_model": "tree", "adjustment": True}),
    "ProxySHAP, linear": ("ProxySHAP", {"proxy_model": "linear"}),
    "ProxySHAP, linear, MSR": ("ProxySHAP", {"proxy_model": "linear", "adjustment": True}),
    "ProxySHAP, linear, MSR of 5 folds": ("ProxySHAP", {"proxy_model": "linear", "adjustment": True, "k_folds": 5}),
    "ProxySHAP, searched, MSR": ("ProxySHAP", {"hpo": True, "adjustment": True}),
    "KernelSHAP-IQ": ("KernelSHAPIQ", {}),
    "KernelSHAP-IQ, pairing": ("KernelSHAPIQ", {"pairing_trick": True}),
    "Inconsistent KernelSHAP-IQ": ("InconsistentKernelSHAPIQ", {}),
    "Inconsistent KernelSHAP-IQ, pairing": ("InconsistentKernelSHAPIQ", {"pairing_trick": True}),
    "SVARM-IQ": ("SVARMIQ", {}),
    "SVARM-IQ, pairing": ("SVARMIQ", {"pairing_trick": True}),
    "SHAP-IQ": ("SHAPIQ", {}),
    "SHAP-IQ, pairing": ("SHAPIQ", {"pairing_trick": True}),
    "permutation sampling": ("PermutationSamplingSII", {}),
    "ProxySPEX": ("ProxySPEX", {}),
    "ProxySPEX, pairing": ("ProxySPEX", {"pairing_trick": True}),
    "ProxySPEX, not searched, pairing": ("ProxySPEX", {"hpo": False, "pairing_trick": True}),
    "SPEX": ("SPEX", {}),
    "SPEX, hard decoding": ("SPEX", {"decoder_type": "hard"}),
}
#: Those worth running where every one of them takes its minute.
STRONG = ("ProxySHAP", "ProxySHAP, MSR", "ProxySHAP, one tree", "ProxySHAP, linear, MSR", "KernelSHAP-IQ, pairing")


@dataclass(frozen=True)
class Answer:
    """Values of the sets asked for, and the processor seconds that they took beside the game's."""

    values: np.ndarray
    seconds: float


class Refusal(Exception):
    """An estimator that does not answer, and why, in one line."""


class Shapiq:
    """A worker process with shapiq, started when it is first asked and again after it was stopped."""

    def __init__(self, python: str | os.PathLike):
        self.python = str(python)
        self._process: subprocess.Popen | None = None
        self._connection: Connection | None = None

    def estimate(
        self,
        name: str,
        values: Callable[[np.ndarray], np.ndarray],
        n: int,
        sets: list[tuple[int, ...]],
        budget: int,
        seed: int,
    ) -> Answer:
        """SII of the sets (of two or three players) by one of ESTIMATORS.

        Raises
        ------
        Refusal
            If the estimator raises, or takes longer than PATIENCE or more than 8 GB.
        """
        estimator, options = ESTIMATORS[name]
        request = {"estimator": estimator, "options": options, "n": n, "order": len(sets[0]), "budget": budget,
                   "seed": seed, "sets": [list(map(int, s)) for s in sets], "patience": PATIENCE}  # fmt: skip
        try:
            return self._converse(request, values)
        except (EOFError, OSError):  # the system has stopped it
            self.close()
            raise Refusal(f"stopped after {PATIENCE} s of processor time") from None

    def close(self) -> None:
        """End the worker, if there is one."""
        if self._process is not None and self._connection is not None:
            self._connection.close()
            self._process.kill()
            self._process.wait()
        self._process = self._connection = None

    def _converse(self, request: dict, values: Callable[[np.ndarray], np.ndarray]) -> Answer:
        """Send a request and answer the worker's questions until it has the estimate."""
        connection = self._connection or self._start()
        connection.send_bytes(json.dumps(request).encode())
        end = time.monotonic() + HANGING * PATIENCE
        while True:
            if not connection.poll(max(0.0, end - time.monotonic())):
                raise EOFError
            said, raw = json.loads(connection.recv_bytes()), connection.recv_bytes()
            if "refuses" in said:
                raise Refusal(said["refuses"])
            if "seconds" in said:
                return Answer(np.frombuffer(raw), said["seconds"])
            packed = np.frombuffer(raw, np.uint8).reshape(said["coalitions"], -1)
            rows = np.unpackbits(packed, axis=1, count=request["n"]).astype(bool)
            connection.send_bytes(np.asarray(values(rows), dtype=np.float64).tobytes())

    def _start(self) -> Connection:
        ours, theirs = socket.socketpair()
        alone = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        self._process = subprocess.Popen(
            [self.python, str(Path(__file__).with_name("shapiq_worker.py")), str(theirs.fileno())],
            pass_fds=[theirs.fileno()],
            env=alone | dict.fromkeys(("OMP_NUM_THREADS", "OMP_THREAD_LIMIT", "OPENBLAS_NUM_THREADS"), "1"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        theirs.close()
        self._connection = Connection(ours.detach())
        return self._connection
