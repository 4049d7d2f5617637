"""Models as transformers makes them, with random weights: a picture and a question, an answer, a choice, a class."""

from __future__ import annotations

import torch
import transformers as hf
from tokenizers import Tokenizer, models, pre_tokenizers

import flmoe_fast

QUESTION = "what does the brave dragon guard ?"
IMAGE, START, END = 40, 41, 42
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {**SIZES, "vocab_size": 50, "num_key_value_heads": 2, "initializer_range": 0.3}


def encoding():
    """A question's tokens, with the characters of each: what a fast tokenizer returns."""
    words = {word: number for number, word in enumerate(["[UNK]", *QUESTION.split()], start=3)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer.encode(QUESTION)


def asked(model: torch.nn.Module, pixels: dict[str, torch.Tensor], places: int) -> None:
    """Which words and which places of the picture work together for the model's own answer."""
    said = encoding()
    before = [1, START, *[IMAGE] * places, END]
    ids = torch.tensor([[*before, *said.ids, 2]])  # the last token ends the question and stays
    words = torch.full((ids.shape[1],), -1)
    words[len(before) : -1] = torch.arange(len(said.ids))
    offsets = [(0, 0)] * len(before) + said.offsets + [(0, 0)]
    kinds = {"mm_token_type_ids": (ids == IMAGE).long()} if "image_grid_thw" in pixels else {}
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **pixels, **kinds}
    found = flmoe_fast.explain(
        model,
        inputs,
        [
            flmoe_fast.text_players(ids, by=words, offsets=offsets, text=QUESTION),
            flmoe_fast.image_token_players(ids, IMAGE),
        ],
        importance="drop",
        candidates=2,
        contexts=4,
        progress=False,
    )
    best = found.interactions.top(1).iloc[0]
    print(f"{type(model).__name__}: {best['name_i']} x {best['name_j']}, SII {best['sii']:+.4f}")


def pictures() -> None:
    """LLaVA, and Qwen2-VL with its flattened patches."""
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = hf.LlavaConfig(
        vision_config=hf.CLIPVisionConfig(**vision, image_size=12, patch_size=4),
        text_config=hf.LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    asked(hf.LlavaForConditionalGeneration(config).eval(), {"pixel_values": torch.randn(1, 3, 12, 12)}, 9)
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 2, "mlp_ratio": 2}
    config = hf.Qwen2VLConfig(
        text_config={**TEXT, "rope_parameters": rope},
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=43,
    )
    pixels = {"pixel_values": torch.randn(16, 24), "image_grid_thw": torch.tensor([[1, 4, 4]])}
    asked(hf.Qwen2VLForConditionalGeneration(config).eval(), pixels, 4)


def texts() -> None:
    """How likely an answer is, one word rather than another, and a class."""
    ids = torch.tensor([[1, *encoding().ids, 2]])
    words = flmoe_fast.text_players(ids, special=[1, 2])
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    llama = hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT)).eval()
    mixtral = hf.MixtralForCausalLM(hf.MixtralConfig(**TEXT, **experts)).eval()
    config = hf.ModernBertConfig(
        **SIZES, vocab_size=50, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2,
        local_attention=4, global_attn_every_n_layers=2, num_labels=3,
    )  # fmt: skip
    modern = hf.ModernBertForSequenceClassification(config).eval()
    for model, question in (
        (llama, {"value": flmoe_fast.answer_logprob([7, 8])}),
        (mixtral, {"value": flmoe_fast.contrast(7, 8)}),
        (modern, {"value": "logit"}),
    ):
        game = flmoe_fast.accelerate(model).game({"input_ids": ids}, words, path="engine", **question)
        found = flmoe_fast.interactions(game, contexts=4, progress=False)
        best = found.top(1).iloc[0]
        print(f"{type(model).__name__}: {game.backend}, {best['name_i']} x {best['name_j']} {best['sii']:+.4f}")


if __name__ == "__main__":
    torch.manual_seed(0)
    pictures()
    texts()
