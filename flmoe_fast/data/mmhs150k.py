"""MMHS150K: tweets with an image, judged by three annotators.

Layout: ``MMHS150K_GT.json`` (tweet id to ``tweet_text`` and ``labels``, three numbers from 0, no hate, to 5),
``img_resized/<id>.jpg``, ``splits/train_ids.txt``, ``val_ids.txt`` and ``test_ids.txt`` with an id a line, and
``img_txt/<id>.json`` with ``img_text`` where an image has text.
"""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from flmoe_fast.checks import one_of
from flmoe_fast.data.errors import DataError, Problems, problem
from flmoe_fast.data.raw import RawData, by_part, existing, read_json, usable_image

KINDS_OF_HATE = ("not hate", "racist", "sexist", "homophobe", "religion", "other hate")


def read_mmhs150k(
    root: str | os.PathLike, *, labels: str = "hate", image_text: bool = False, broken: str = "raise"
) -> RawData:
    """Read the data set.

    Parameters
    ----------
    root
        Folder that holds ``MMHS150K_GT.json``.
    labels : "hate" or "kind"
        Whether most annotators saw hate, or which of the six kinds most of them saw. Tweets with three different
        kinds count as broken.
    image_text : bool
        Append the text in the image to the tweet.
    broken : "raise" or "drop"
        What to do with tweets without a text, an image, three labels or a majority.
    """
    one_of("labels", labels, ("hate", "kind"))
    root, problems = Path(root), Problems(broken)
    source = root / "MMHS150K_GT.json"
    tweets = read_json(source)
    if not isinstance(tweets, dict):
        raise DataError([problem(source, None, type(tweets).__name__, "an object with a tweet under each id")])
    ids: list[str] = []
    texts, images, targets = [], [], []
    parts: dict[str, list[int]] = {}
    for part, name in (("train", "train_ids.txt"), ("valid", "val_ids.txt"), ("test", "test_ids.txt")):
        listing = existing(root / "splits" / name)
        parts[part] = []
        for line, text in enumerate(listing.read_text(encoding="utf-8").splitlines(), start=1):
            tweet_id = text.strip()
            if not tweet_id:
                continue
            tweet = tweets.get(tweet_id)
            if not isinstance(tweet, dict):
                problems.add(listing, line, f"the id {tweet_id}", f"an id of {source.name}")
                continue
            target = _target(tweet.get("labels"), labels)
            words = tweet.get("tweet_text")
            if target is None:
                problems.add(listing, line, f"labels {tweet.get('labels')}", "three from 0 to 5 with a majority")
            elif not isinstance(words, str) or not words.strip():
                problems.add(listing, line, "no tweet_text", "a text")
            elif usable_image(root / "img_resized" / f"{tweet_id}.jpg", problems, listing, line):
                parts[part].append(len(ids))
                ids.append(tweet_id)
                texts.append(words + _image_text(root, tweet_id) if image_text else words)
                images.append(root / "img_resized" / f"{tweet_id}.jpg")
                targets.append(target)
    problems.settle()
    return RawData(
        "mmhs150k",
        {"text": "text", "img": "image"},
        {"text": texts, "img": images},
        torch.tensor(targets, dtype=torch.int64),
        "multiclass",
        ("not hate", "hate") if labels == "hate" else KINDS_OF_HATE,
        tuple(ids),
        by_part(parts),
    )


def _target(found: object, labels: str) -> int | None:
    if not isinstance(found, list) or len(found) != 3 or any(label not in range(6) for label in found):
        return None
    if labels == "hate":
        return int(sum(label > 0 for label in found) >= 2)
    (kind, votes), *_ = Counter(found).most_common()
    return kind if votes > 1 else None


def _image_text(root: Path, tweet_id: str) -> str:
    path = root / "img_txt" / f"{tweet_id}.json"
    text = read_json(path).get("img_text", "") if path.is_file() else ""
    return f" {text}" if text else ""
