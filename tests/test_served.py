"""A game over a server of prompts, on the loopback interface."""

from __future__ import annotations

import json
import os
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
import torch

from flmoe_fast import ArgumentError, exact_interactions
from flmoe_fast.adapt.served import PromptGame

PIECES = ("The ", "film ", "was ", "not ", "good", ".")


def worth(prompt: str) -> float:
    """Good is good, not good is bad."""
    return (1.0 if "good" in prompt else 0.0) * (-1.0 if "not" in prompt else 1.0) + 0.1 * ("film" in prompt)


@pytest.fixture
def server():
    asked: list[list[str]] = []

    class Scores(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            prompts = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            asked.append(prompts)
            body = json.dumps([worth(prompt) for prompt in prompts]).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Scores) as running:
        thread = threading.Thread(target=running.serve_forever, daemon=True)
        thread.start()

        def score(prompts: list[str]) -> list[float]:
            direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            address = f"http://127.0.0.1:{running.server_port}"
            with direct.open(address, json.dumps(prompts).encode(), timeout=60) as answer:
                return json.load(answer)

        yield score, asked
        running.shutdown()


def test_a_served_model(server):
    score, asked = server
    game = PromptGame(score, PIECES, batch=8)
    found = exact_interactions(game, progress=False)
    assert game.player_names == ("The", "film", "was", "not", "good", ".") and game.places[3] == (13, 17)
    assert float(found.sii[[tuple(pair) for pair in found.pairs.tolist()].index((3, 4))]) == pytest.approx(-2.0)
    others = [v for pair, v in zip(found.pairs.tolist(), found.sii) if tuple(pair) != (3, 4)]
    assert max(map(abs, others)) < 1e-12
    sent = [prompt for prompts in asked for prompt in prompts]
    assert max(map(len, asked)) == 8 and len(sent) == 2**6 == len(set(sent))
    z = torch.rand(9, 6) < 0.5
    assert torch.equal(game(z), torch.tensor([worth(game.prompt(row)) for row in z], dtype=torch.float64))


def test_prompts_that_begin_alike_follow_one_another():
    """Beginnings shared by neighbours, in characters: most in the order sent, fewer in the order asked for."""
    sent: list[str] = []

    def score(prompts: list[str]) -> list[float]:
        sent.extend(prompts)
        return [0.0] * len(prompts)

    game = PromptGame(score, PIECES, players=[4, 0, 3, 1], absent="_")  # named in another order than they stand in
    z = ((torch.randperm(16)[:, None] >> torch.arange(4)) & 1).bool()
    game(z)

    def shared(prompts: list[str]) -> int:
        return sum(len(os.path.commonprefix(pair)) for pair in zip(prompts, prompts[1:]))

    assert shared(sent) > shared([game.prompt(row) for row in z]) and sorted(sent) == sorted(map(game.prompt, z))


def test_bad_input():
    with pytest.raises(ArgumentError, match="pieces: got 'a b'"):
        PromptGame(len, "a b")
    with pytest.raises(ArgumentError, match="players: got 1 players"):
        PromptGame(len, ["a", " "])
    with pytest.raises(ArgumentError, match="players: got a piece twice"):
        PromptGame(len, ["a", "b"], players=[0, 0])
    with pytest.raises(ArgumentError, match=r"score: got numbers of shape \(1,\), expected \(2,\)"):
        PromptGame(lambda prompts: [0.0], ["a", "b"])(torch.eye(2).bool())
