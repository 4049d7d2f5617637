"""A process that runs shapiq's estimators for another one, in an interpreter that has shapiq and need not have torch.

    PYTHON bench/shapiq_worker.py FD

It is started by :mod:`bench.shapiq_peers` with one end of a socket as file descriptor FD. A message is JSON, followed
by one message of plain numbers where the JSON says so. A request names an estimator, its options, a budget and the sets
of players asked for; while it works, the estimator asks for the values of coalitions in the other direction, so the
game stays where it is and every evaluation is counted there.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from multiprocessing.connection import Connection

import numpy as np

#: Bytes of address space; a regression over all pairs of 500 players would ask for a hundred gigabytes.
MEMORY = 8 * 2**30


class Remote:
    """A game in the other process."""

    def __init__(self, connection: Connection, n: int):
        self.connection, self.n, self.waited = connection, n, 0.0

    def __call__(self, coalitions: np.ndarray) -> np.ndarray:
        """Values (C,) of coalitions (C, n) or (n,)."""
        started = time.process_time()
        rows = np.atleast_2d(np.asarray(coalitions)).astype(bool)
        self.connection.send_bytes(json.dumps({"coalitions": len(rows)}).encode())
        self.connection.send_bytes(np.packbits(rows, axis=1).tobytes())
        values = np.frombuffer(self.connection.recv_bytes(), dtype=np.float64)
        self.waited += time.process_time() - started
        return values


def answer(connection: Connection, request: dict) -> tuple[dict, np.ndarray]:
    """Values of the sets asked for, and the processor seconds without those that the game took here."""
    import shapiq

    patience = int(time.process_time()) + 1 + request["patience"]  # the system then ends the process, wherever it is
    resource.setrlimit(resource.RLIMIT_CPU, (patience, resource.getrlimit(resource.RLIMIT_CPU)[1]))
    game = Remote(connection, request["n"])
    started = time.process_time()
    approximator = getattr(shapiq.approximator, request["estimator"])(
        n=game.n, max_order=request["order"], index="SII", random_state=request["seed"], **request["options"]
    )
    found = approximator.approximate(request["budget"], game)
    seconds = time.process_time() - started - game.waited
    values = [found.dict_values.get(tuple(members), 0.0) for members in request["sets"]]
    return {"seconds": seconds, "version": shapiq.__version__}, np.array(values, dtype=np.float64)


def main() -> None:
    """Answer requests until the other end is closed."""
    warnings.simplefilter("ignore")
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    connection = Connection(int(sys.argv[1]))
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            said, values = answer(connection, request)
        except Exception as problem:
            line = (str(problem).splitlines() or [""])[0]
            said, values = {"refuses": f"{type(problem).__name__}: {line}"[:160]}, np.empty(0)
        connection.send_bytes(json.dumps(said).encode())
        connection.send_bytes(values.tobytes())


if __name__ == "__main__":
    main()
