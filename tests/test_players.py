"""Player maps: who owns what, what it is called, where it lies, and what replaces it."""

from __future__ import annotations

import pytest
import torch

from flmoe_fast import ArgumentError, image_players, text_players
from flmoe_fast.adapt.players import PlayerMap

#               [s] un  believ able  film  .  [e] pad
IDS = torch.tensor([1, 11, 12, 13, 14, 15, 2, 0])
WORDS = [None, 0, 0, 0, 1, 2, None, None]
TEXT = "unbelievable film."
OFFSETS = [(0, 0), (0, 2), (2, 8), (8, 12), (13, 17), (17, 18), (0, 0), (0, 0)]
SPECIAL = [0, 1, 2]


def test_tokens_words_and_whole_texts():
    tokens = text_players(IDS, special=SPECIAL, offsets=OFFSETS, text=TEXT)
    assert tokens.names == ("un", "believ", "able", "film", ".")
    assert tokens.places == ((0, 2), (2, 8), (8, 12), (13, 17), (17, 18))
    assert tokens.owner.tolist() == [-1, 0, 1, 2, 3, 4, -1, -1]
    words = text_players(IDS[None], by="word", word_ids=WORDS, offsets=OFFSETS, text=TEXT)
    assert words.names == ("unbelievable", "film", ".") and words.places == ((0, 12), (13, 17), (17, 18))
    assert [TEXT[start:stop] for start, stop in words.places] == list(words.names)
    assert words.owner.tolist() == [-1, 0, 0, 0, 1, 2, -1, -1]
    whole = text_players(IDS, by="all", special=SPECIAL, offsets=OFFSETS, text=TEXT)
    assert whole.names == ("text",) and whole.places == ((0, 18),)
    plain = text_players(IDS, attention_mask=torch.tensor([0, 1, 1, 0, 0, 0, 0, 0]), group="note")
    assert plain.names == ("note 1", "note 2") and plain.places == ((1, 2), (2, 3))


class Spelling:
    """As much of a tokenizer as names need."""

    def __init__(self, pieces: list[str], mark: str):
        self.pieces, self.mark = pieces, mark
        self.all_special_ids = [n for n, piece in enumerate(pieces) if piece.startswith("<")]

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [self.pieces[n] for n in ids]

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        return "".join(self.pieces[n] for n in ids).replace(self.mark, "" if self.mark == "##" else " ")


@pytest.mark.parametrize(
    ("mark", "pieces"),
    [
        ("\u0120", ["<s>", "What", "\u0120drag", "ons", "<image>", "eat", "\u0120?", "</s>"]),
        ("\u2581", ["<s>", "\u2581What", "\u2581drag", "ons", "<image>", "\u2581eat", "\u2581?", "</s>"]),
        ("##", ["<s>", "What", "drag", "##ons", "<image>", "eat", "?", "</s>"]),
    ],
)
def test_a_tokenizer_names_tokens_and_words(mark, pieces):
    """Special tokens, the picture's placeholder among them, are no players and join no words."""
    ids, spelling = torch.arange(8), Spelling(pieces, mark)
    words = text_players(ids, by="word", tokenizer=spelling)
    assert words.names == ("What", "dragons", "eat", "?")
    assert words.owner.tolist() == [-1, 0, 1, 1, -1, 2, 3, -1]
    processor = type("Processor", (), {"tokenizer": spelling})()
    tokens = text_players(ids, tokenizer=processor)
    assert tokens.names == ("What", "drag", "ons", "eat", "?")
    assert text_players(ids, tokenizer=spelling, special=()).n == 8
    with pytest.raises(ArgumentError, match="word_ids: got None, expected the word of every token, or a tokenizer"):
        text_players(ids, by="word")


def test_absent_tokens_are_replaced_or_hidden():
    inputs = {"input_ids": IDS[None], "attention_mask": (IDS[None] != 0).long()}
    coalition = torch.tensor([[True, False, True], [False, False, False]])
    filled = PlayerMap(text_players(IDS, by="word", word_ids=WORDS, absent=9), inputs).inputs(inputs, coalition)
    assert filled["input_ids"].tolist() == [[1, 11, 12, 13, 9, 15, 2, 0], [1, 9, 9, 9, 9, 9, 2, 0]]
    assert filled["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 1, 0]] * 2
    hidden = PlayerMap(text_players(IDS, by="word", word_ids=WORDS), inputs).inputs(inputs, coalition)
    assert hidden["input_ids"].tolist() == [IDS.tolist()] * 2
    assert hidden["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 1, 1, 0], [1, 0, 0, 0, 0, 0, 1, 0]]
    del inputs["attention_mask"]  # everything is valid then
    bare = PlayerMap(text_players(IDS, by="word", word_ids=WORDS), inputs).inputs(inputs, coalition)
    assert bare["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 0, 1, 1]]


def test_hidden_tokens_are_told_from_others_by_tokens_of_the_text():
    """What stands for a hidden token while its place in the model is looked for: never padding, never out of range."""
    blank = text_players(torch.tensor([5, 39, 39, 7, 5]), special=[5]).absent
    assert blank.tolist() == [5, 7, 7, 39, 5]
    assert text_players(torch.tensor([0, 9, 9]), special=[0]).absent.tolist() == [0, 0, 0]
    assert text_players(torch.tensor([9, 9])).absent.tolist() == [10, 10]


def test_patches_and_their_boxes():
    image = torch.arange(2 * 5 * 6).float().reshape(2, 5, 6)  # a row and no column is left over by 2 x 3 patches
    patches = image_players(image, patch=(2, 3), absent=-1.0)
    assert patches.names == ("image 0,0", "image 0,1", "image 1,0", "image 1,1")
    assert patches.places == ((0, 0, 2, 3), (0, 3, 2, 6), (2, 0, 4, 3), (2, 3, 4, 6))
    inputs = {"pixel_values": image[None]}
    made = PlayerMap(patches, inputs).inputs(inputs, torch.tensor([[True, True, False, True]]))["pixel_values"]
    top, left, bottom, right = patches.places[2]
    expected = image.clone()
    expected[:, top:bottom, left:right] = -1.0
    assert torch.equal(made[0], expected)
    mean = image_players(image, by="all", absent="mean")
    assert torch.equal(mean.absent, image.mean((1, 2), keepdim=True).expand(2, 5, 6)) and mean.places == ((0, 0, 5, 6),)
    given = image_players(image, by="all", absent=torch.tensor([1.0, 2.0])[:, None, None])
    assert given.absent[1].unique().tolist() == [2.0]


def test_superpixels():
    segments = torch.tensor([[7, 7, 7, 3], [7, 7, 3, 3], [7, -1, 3, 3], [-1, -1, 3, 3]])
    players = image_players(torch.zeros(3, 4, 4), by=segments)
    assert players.n == 2 and players.names == ("image 0", "image 1")
    assert players.owner.tolist() == [[1, 1, 1, 0], [1, 1, 0, 0], [1, -1, 0, 0], [-1, -1, 0, 0]]
    assert players.places == ((0, 2, 4, 4), (0, 0, 3, 3))
    snapped = image_players(torch.zeros(3, 4, 4), by=segments, patch=2)
    assert snapped.owner.tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [-1, -1, 0, 0], [-1, -1, 0, 0]]


def test_several_modalities_are_numbered_through():
    image = torch.zeros(1, 3, 4, 4)
    inputs = {"input_ids": IDS[None], "pixel_values": image}
    both = PlayerMap([text_players(IDS, special=SPECIAL), image_players(image, patch=2)], inputs)
    assert both.n == 9 and both.groups == (("text", (0, 1, 2, 3, 4)), ("image", (5, 6, 7, 8)))
    assert both.names[4:6] == ("text 5", "image 0,0")
    assert len(both.places) == 9


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: text_players(IDS, by="phrase"), "by: got 'phrase'"),
        (lambda: text_players(IDS, by="word"), "word_ids: got None, expected the word of every token"),
        (lambda: text_players(IDS, offsets=[(0, 1)]), "offsets: got 1 entries, expected one for each of the 8"),
        (lambda: text_players(IDS, special=IDS.tolist()), "input_ids: got no token that could be a player"),
        (lambda: text_players(IDS.float()), "input_ids: got torch.float32, expected an integer tensor"),
        (lambda: text_players(IDS, absent=-3), "absent: got -3"),
        (lambda: text_players(IDS, attention_mask=IDS[:3]), r"attention_mask: got shape \(3,\)"),
        (lambda: image_players(torch.zeros(3, 4, 4)), "patch: got None"),
        (lambda: image_players(torch.zeros(3, 4, 4), patch=5), "patch: got 5"),
        (lambda: image_players(torch.zeros(4, 4), patch=2), "pixel_values: got shape"),
        (lambda: image_players(IDS, patch=2), "pixel_values: got Tensor"),
        (lambda: image_players(torch.zeros(3, 4, 4), by="row", patch=2), "by: got 'row'"),
        (lambda: image_players(torch.zeros(3, 4, 4), by=torch.zeros(3, 3).long()), r"by: got shape \(3, 3\)"),
        (lambda: image_players(torch.zeros(3, 4, 4), by=torch.zeros(4, 4)), "by: got torch.float32"),
        (lambda: image_players(torch.zeros(3, 4, 4), by=-torch.ones(4, 4).long()), "by: got a segmentation without"),
        (lambda: image_players(torch.zeros(3, 4, 4), patch=2, absent="blur"), "absent: got 'blur'"),
        (lambda: image_players(torch.zeros(3, 4, 4), patch=2, absent=torch.zeros(2, 9)), "absent: got shape"),
        (lambda: PlayerMap([], {}), "players: got"),
        (lambda: PlayerMap("words", {}), "players: got"),
        (lambda: PlayerMap(text_players(IDS), {}), r"inputs\['input_ids'\]: got nothing"),
        (lambda: PlayerMap(text_players(IDS), {"input_ids": IDS[None, :4]}), r"inputs\['input_ids'\]: got shape"),
        (
            lambda: PlayerMap(text_players(IDS, by="all"), {"input_ids": IDS[None]}),
            "players: got 1 players, expected at least two",
        ),
    ],
)
def test_bad_input_is_named(make, message):
    with pytest.raises(ArgumentError, match=message):
        make()
