"""Tables of games of models trained here, every coalition evaluated: a folder for python -m bench.peers --tables.

    python -m bench.model_games FOLDER [--model out/demo/model.safetensors] [--games 4]

- ``digits-prob``, ``digits-logit``: held-out digits seen by the demonstration's model (run make demo first), 16 tokens,
  the 64 pairs of the two views; probability and logit of the predicted digit.
- ``vit-digits``: a vision transformer of Hugging Face's library, trained here on the same images as 16 patches of 2 x 2
  pixels; absent patches are black; the probability of the predicted digit; all pairs.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from flmoe_fast import TokenGame, load_checkpoint
from flmoe_fast.data.digits import two_view_digits
from flmoe_fast.games.game import as_game
from flmoe_fast.probes.exact import enumerate_values

#: The demonstration's views have eight tokens each.
CROSS_PAIRS = [(i, j) for i in range(8) for j in range(8, 16)]


def digits(path: Path, count: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Of the first held-out digits, both kinds of value."""
    model = load_checkpoint(path)
    _, held_out = two_view_digits()
    with torch.no_grad():
        features = model.encode(held_out.inputs)
    for sample in range(count):
        for value in ("prob", "logit"):
            game = TokenGame(model, [f[sample] for f in features], masks=[m[sample] for m in held_out.masks],
                             heads=("mixture",), value=value)  # fmt: skip
            values = enumerate_values(game)[:, 0].double().numpy()
            yield f"digits-{value}_{sample + 1}", {"values": values, "pairs": np.array(CROSS_PAIRS)}


def vision(count: int) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Of a vision transformer, of which a part of the patches was black in training too."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    config = ViTConfig(hidden_size=48, num_hidden_layers=2, num_attention_heads=4, intermediate_size=96, image_size=8,
                       patch_size=2, num_channels=1, num_labels=10, hidden_dropout_prob=0.1)  # fmt: skip
    model = ViTForImageClassification(config)
    train, held_out = two_view_digits()
    images, unseen = (torch.cat(part.inputs, dim=2)[:, None] for part in (train, held_out))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3, weight_decay=0.05)
    for step in range(600):
        batch = torch.randint(len(images), (64,), generator=torch.Generator().manual_seed(step))
        keep = torch.rand(64, 1, 4, 4, generator=torch.Generator().manual_seed(step)) > 0.15
        masked = images[batch] * keep.repeat_interleave(2, 2).repeat_interleave(2, 3)
        loss = torch.nn.functional.cross_entropy(model(masked).logits, train.labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        share = float((model(unseen).logits.argmax(1) == held_out.labels).double().mean())
        print(f"vit-digits: {share:.1%} of the held-out digits are right", flush=True)
        for number, image in enumerate(unseen[:count], start=1):
            target = int(model(image[None]).logits.argmax())

            def value(z: torch.Tensor, image: torch.Tensor = image, target: int = target) -> torch.Tensor:
                keep = z.view(-1, 1, 4, 4).repeat_interleave(2, 2).repeat_interleave(2, 3)
                return model(image * keep).logits.double().softmax(1)[:, target]

            yield f"vit-digits_{number}", {"values": enumerate_values(as_game(value, 16)).flatten().numpy()}


def main() -> None:
    """Write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", type=Path, default=Path("out/demo/model.safetensors"))
    parser.add_argument("--games", type=int, default=4)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    for games in (digits(options.model, options.games), vision(options.games)):
        for name, arrays in games:
            np.savez_compressed(options.folder / f"{name}.npz", **arrays)
            print(name, flush=True)


if __name__ == "__main__":
    main()
