"""One game in a pool of threads and on a Dask cluster: games are shared by threads and sent to other processes."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import torch
import transformers

import flmoe_fast

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def game_of_a_text() -> flmoe_fast.Game:
    """How much rather a decoder with random weights says one word than another."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=50, **SIZES)).eval()
    ids = torch.tensor([[1, 11, 12, 13, 14, 15, 16, 2]])
    words = flmoe_fast.text_players(ids, special=[1, 2])
    return flmoe_fast.accelerate(model).game({"input_ids": ids}, words, value=flmoe_fast.contrast(7, 8), path="engine")


def probe(game: flmoe_fast.Game, seed: int) -> float:
    """The interaction of the first two words, by one seed's coalitions."""
    found = flmoe_fast.interactions(game, pairs=[(0, 1)], method="grid", contexts=8, seed=seed, progress=False)
    return float(found.sii[0])


def main() -> None:
    """The same numbers three ways."""
    game = game_of_a_text()
    alone = [probe(game, seed) for seed in range(4)]
    with ThreadPoolExecutor(2) as pool:
        threads = list(pool.map(lambda seed: probe(game, seed), range(4)))
    print("threads:", max(abs(a - b) for a, b in zip(alone, threads)) < 1e-5)
    try:
        from dask.distributed import Client, LocalCluster
    except ImportError:
        print("no cluster: dask is not installed (pip install 'flmoe-fast[dask]')")
        return
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        sent = client.scatter(game, broadcast=True)
        workers = client.gather([client.submit(probe, sent, seed) for seed in range(4)])
    print("cluster:", max(abs(a - b) for a, b in zip(alone, workers)) < 1e-5)


if __name__ == "__main__":
    main()
