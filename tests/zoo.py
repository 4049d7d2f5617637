"""Models of transformers that people run, from tiny configurations with random weights: a case for each.

A case makes a model in float64, the inputs of a sample, its players, and further options of a game.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers as hf
from decoders import EXPERTS, PICTURES, TEXTS, blip2, picture, prompt, text_of, with_picture
from encoders import IDS, IMAGE, TEXT, patches, pixels, ready, text_inputs, words
from torch import nn

from flmoe_fast import image_players, image_token_players, next_token, text_players
from flmoe_fast.adapt.players import Players

IMAGE_TOKEN, VISION_START = 41, 40
ANSWER = 4


@dataclass(frozen=True)
class Case:
    """A kind of model."""

    group: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], dict[str, torch.Tensor]]
    players: Callable[[dict[str, torch.Tensor]], list]
    options: dict[str, Any] = field(default_factory=dict)


def _of(config: str, model: str, sizes: dict[str, Any]) -> nn.Module:
    return ready(getattr(hf, model)(getattr(hf, config)(**sizes)))


def text(name: str, model: str = "", **changes: object) -> Case:
    """A classifier of text; absent words are removed where there is a mask for it."""
    absent = changes.pop("absent", "remove")
    make = functools.partial(
        _of, f"{name}Config", model or f"{name}ForSequenceClassification", {**TEXT, "pad_token_id": 0, **changes}
    )
    return Case("text", make, text_inputs, lambda _: [words(absent)])


def image(name: str, model: str = "", side: int = 12, **changes: object) -> Case:
    """A classifier of images; absent patches are black."""
    make = functools.partial(_of, f"{name}Config", model or f"{name}ForImageClassification", {**IMAGE, **changes})

    def inputs() -> dict[str, torch.Tensor]:
        given = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        return {"pixel_values": given}

    return Case("image", make, inputs, lambda given: [image_players(given["pixel_values"], patch=side // 3)])


def decoder(make: Callable[[], nn.Module]) -> Case:
    """A decoder of text; absent words are removed."""
    return Case("decoder", make, lambda: {"input_ids": prompt(0, 8)}, _question, {"value": next_token(ANSWER)})


def causal(name: str, model: str = "", **changes: object) -> Case:
    """A decoder of text by the name of its configuration."""
    if not model:
        return decoder(text_of(name, **changes))
    sizes = {"vocab_size": 50, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes}
    return decoder(functools.partial(_of, f"{name}Config", model, sizes))


def seeing(name: str) -> Case:
    """A decoder with a picture: absent words and places of the picture are removed."""
    make, inputs = PICTURES[name]

    def players(given: dict[str, torch.Tensor]) -> list:
        return [*_question(given), image_token_players(given["input_ids"], IMAGE_TOKEN, block=2)]

    return Case("decoder with pictures", make, inputs, players, {"value": next_token(ANSWER)})


def numbered_by_mask() -> Case:
    """One that numbers tokens by what its mask shows: words and patches are replaced."""

    def players(given: dict[str, torch.Tensor]) -> list:
        [question] = _question(given)
        absent = torch.where(question.owner >= 0, 3, given["input_ids"][0])
        words = replace(question, absent=absent, mask=None)
        return [words, image_players(given["pixel_values"], patch=4, absent=0.0)]

    def inputs() -> dict[str, torch.Tensor]:
        return with_picture(4, pixel_values=picture(1, 3, 12, 12))

    return Case("decoder with pictures", blip2, inputs, players, {"value": next_token(ANSWER)})


def both(make: Callable[[], nn.Module], absent: int | str = "remove", **more: torch.Tensor) -> Case:
    """Words and patches of a classifier, or of a dual encoder."""
    return Case(
        "text and image",
        make,
        lambda: {**text_inputs(), "pixel_values": pixels(), **more},
        lambda _: [words(absent), patches()],
        {"value": "logit"},
    )


def _question(given: dict[str, torch.Tensor]) -> list:
    ids = given["input_ids"]
    around = [IMAGE_TOKEN, VISION_START, 42, *ids[0, [0, 1, -1, -2]].tolist()]
    return [text_players(ids, special=around)]


def _dual(name: str, **changes: object) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        ends = {"eos_token_id": 3, "bos_token_id": 2, "pad_token_id": 0}
        config = getattr(hf, f"{name}Config")(
            text_config={**TEXT, **ends, "projection_size": 24, **changes}, vision_config=IMAGE, projection_dim=16
        )
        return ready(getattr(hf, f"{name}Model")(config))

    return make


def _layout() -> dict[str, torch.Tensor]:
    boxes = torch.arange(IDS.shape[1] * 4).reshape(1, -1, 4) % 8
    return {**text_inputs(), "bbox": boxes}


def _visual_bert() -> dict[str, torch.Tensor]:
    seen = torch.randn(1, 5, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return {**text_inputs(), "visual_embeds": seen, "visual_attention_mask": torch.ones(1, 5).long()}


def _lxmert() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    seen = torch.randn(1, 5, 16, generator=generator, dtype=torch.float64)
    boxes = torch.rand(1, 5, 4, generator=generator, dtype=torch.float64)
    return {**text_inputs(), "visual_feats": seen, "visual_pos": boxes}


def _pooled(output: Any) -> torch.Tensor:
    return output.pooler_output[:, :3]


def _answers(output: Any) -> torch.Tensor:
    return output.question_answering_score


def _documents() -> dict[str, torch.Tensor]:
    return {**_layout(), "pixel_values": pixels()}


def _sound() -> dict[str, torch.Tensor]:
    features = torch.randn(1, 8, 24, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    return {"input_features": features, "decoder_input_ids": torch.tensor([[1, 7, 9, 5, 3]])}


def _sound_players(given: dict[str, torch.Tensor]) -> list:
    """Four stretches of sound, and two words of what has been said so far."""
    features, ids = given["input_features"][0], given["decoder_input_ids"]
    owner = torch.arange(24) // 6
    names, places = tuple(f"sound {k}" for k in range(4)), tuple((6 * k, 6 * k + 6) for k in range(4))
    sound = Players("input_features", "sound", names, places, owner, torch.zeros_like(features))
    return [sound, text_players(ids, special=[1, 3, 5], absent=4, input="decoder_input_ids", mask="")]


def _patches_in_rows() -> dict[str, torch.Tensor]:
    """Nine flattened patches, as models of pictures of any size take them."""
    rows = pixels().unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    mask = torch.ones(1, 9, dtype=torch.long)
    return {"pixel_values": rows, "pixel_attention_mask": mask, "spatial_shapes": torch.tensor([[3, 3]])}


def _row_players(given: dict[str, torch.Tensor]) -> list:
    rows = given["pixel_values"][0]
    names, places = tuple(f"patch {k}" for k in range(9)), tuple((k // 3, k % 3) for k in range(9))
    return [Players("pixel_values", "image", names, places, torch.arange(9)[:, None], torch.zeros_like(rows))]


def _spoken(output: Any) -> torch.Tensor:
    return output.logits[:, -1, 6].double()


def _matched(output: Any) -> torch.Tensor:
    return output.itm_score


def _first_token(output: Any) -> torch.Tensor:
    return output.multimodal_output.last_hidden_state[:, 0, :3]


_SEEING = {**IMAGE, "num_hidden_layers": 2}
_LAYOUT = {"max_2d_position_embeddings": 16, "coordinate_size": 4, "shape_size": 4}
_LINEAR = {
    "linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"], "head_dim": 8,
}  # fmt: skip

CASES: dict[str, Case] = {
    "BERT": text("Bert"),
    "RoBERTa": text("Roberta", pad_token_id=1),
    "XLM-R": text("XLMRoberta", pad_token_id=1),
    "XLM-R XL": text("XLMRobertaXL", pad_token_id=1),
    "CamemBERT": text("Camembert", pad_token_id=1),
    "ELECTRA": text("Electra", embedding_size=24),
    "DistilBERT": text("DistilBert", dim=24, n_layers=2, n_heads=3, hidden_dim=40),
    "RoBERTa, pre-norm": text("RobertaPreLayerNorm", pad_token_id=1),
    "Megatron-BERT": text("MegatronBert"),
    "ERNIE": text("Ernie"),
    "data2vec text": text("Data2VecText", pad_token_id=1),
    "RoCBert": text("RoCBert", enable_pronunciation=False, enable_shape=False),
    "LayoutLM": Case("text", text("LayoutLM", **_LAYOUT).make, _layout, lambda _: [words("remove")]),
    "RemBERT": text("RemBert", input_embedding_size=24),
    "ALBERT": text("Albert", embedding_size=16),
    "DeBERTa": text("Deberta"),
    "DeBERTa-v2": text("DebertaV2", relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"]),
    "MPNet": text("MPNet", pad_token_id=1),
    "ModernBERT": text("ModernBert", local_attention=4, global_attn_every_n_layers=2),
    "ConvBERT": text("ConvBert", num_attention_heads=4, embedding_size=24),
    "BigBird": text("BigBird", attention_type="original_full"),
    "SqueezeBERT": text("SqueezeBert", num_attention_heads=4, embedding_size=24),
    "FNet": text("FNet", absent=4),
    "T5, classifier": text(
        "T5", d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, eos_token_id=3
    ),
    "BART, classifier": text(
        "Bart", d_model=24, encoder_layers=2, decoder_layers=2, encoder_attention_heads=3, decoder_attention_heads=3,
        encoder_ffn_dim=40, decoder_ffn_dim=40, eos_token_id=3, bos_token_id=2, decoder_start_token_id=3,
    ),
    "mT5, classifier": text(
        "MT5", d_model=24, d_kv=8, d_ff=40, num_layers=2, num_heads=3, decoder_start_token_id=0, eos_token_id=3,
        feed_forward_proj="gated-gelu",
    ),
    "NomicBERT": text("NomicBert"),
    "EuroBERT": text("EuroBert", num_attention_heads=4, num_key_value_heads=2),
    "ESM": text("Esm", pad_token_id=0, position_embedding_type="rotary", mask_token_id=4),
    "RoFormer": text("RoFormer", num_attention_heads=4, embedding_size=24),
    "Llama, classifier": text("Llama", num_attention_heads=4, num_key_value_heads=2),
    "PyTorch's encoder": Case("text", lambda: _torch(), text_inputs, lambda _: [words("remove")]),
    "ViT": image("ViT"),
    "DeiT": image("DeiT", "DeiTForImageClassificationWithTeacher"),
    "DINOv2": image("Dinov2"),
    "DINOv2 with registers": image("Dinov2WithRegisters", num_register_tokens=2),
    "DINOv2, SwiGLU": image("Dinov2", use_swiglu_ffn=True),
    "DINOv3": Case("image", image("DINOv3ViT", "DINOv3ViTModel", num_register_tokens=2).make,
                   lambda: {"pixel_values": pixels()}, lambda _: [patches()], {"value": _pooled}),
    "BEiT": image("Beit", use_absolute_position_embeddings=True),
    "BEiT, relative": image("Beit", use_relative_position_bias=True),
    "data2vec vision": image("Data2VecVision", use_relative_position_bias=True),
    "I-JEPA": image("IJepa"),
    "ViT-MSN": image("ViTMSN"),
    "CLIP, classifier": Case(
        "image", lambda: _tower("CLIP"), lambda: {"pixel_values": pixels()}, lambda _: [patches()]
    ),
    "SigLIP, classifier": Case(
        "image", lambda: _tower("Siglip"), lambda: {"pixel_values": pixels()}, lambda _: [patches()]
    ),
    "SigLIP2, any size": Case(
        "image",
        lambda: _of("Siglip2Config", "Siglip2ForImageClassification", {
            "vision_config": {**IMAGE, "num_patches": 9}, "num_labels": 4}),
        _patches_in_rows, _row_players),
    "DINOv3, gated": Case(
        "image", image("DINOv3ViT", "DINOv3ViTModel", use_gated_mlp=True, num_register_tokens=1).make,
        lambda: {"pixel_values": pixels()}, lambda _: [patches()], {"value": _pooled}),
    "Swin": Case("image", lambda: _of("SwinConfig", "SwinForImageClassification", {
        "image_size": 12, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 3, "patch_size": 2}),
        lambda: {"pixel_values": pixels()}, lambda _: [patches()]),
    "ConvNeXt": image("ConvNext", hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=2),
    "ResNet": image("ResNet", side=33, hidden_sizes=[8, 16], depths=[1, 1], embedding_size=8),
    "CLIP": both(_dual("CLIP", hidden_act="quick_gelu")),
    "SigLIP": both(_dual("Siglip"), absent=4),
    "Chinese-CLIP": both(_dual("ChineseCLIP")),
    "AltCLIP": both(_dual("AltCLIP", project_dim=16)),
    "ViLT": both(lambda: _vilt()),
    "VisualBERT": Case(
        "text and image", lambda: _of("VisualBertConfig", "VisualBertForQuestionAnswering",
                                      {**TEXT, "visual_embedding_dim": 16}),
        _visual_bert, lambda _: [words("remove")]),
    "LXMERT": Case(
        "text and image",
        lambda: _of("LxmertConfig", "LxmertForQuestionAnswering", {
            **TEXT, "num_qa_labels": 4, "visual_feat_dim": 16, "l_layers": 1, "x_layers": 1, "r_layers": 1}),
        _lxmert, lambda _: [words("remove")], {"value": _answers}),
    "LayoutLMv3": Case(
        "text and image",
        text("LayoutLMv3", **_LAYOUT, input_size=12, patch_size=4, pad_token_id=1, has_relative_attention_bias=True,
             has_spatial_attention_bias=True, rel_pos_bins=8, rel_2d_pos_bins=8).make,
        _documents, lambda _: [words("remove"), patches()], {"value": "logit"}),
    "BLIP, matching": Case(
        "text and image",
        lambda: _of("BlipConfig", "BlipForImageTextRetrieval", {
            "text_config": {**TEXT, "projection_dim": 16, "encoder_hidden_size": 24, "bos_token_id": 2,
                            "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0},
            "vision_config": _SEEING, "projection_dim": 16, "image_text_hidden_size": 16}),
        lambda: {**text_inputs(), "pixel_values": pixels()}, lambda _: [words(), patches()], {"value": _matched}),
    "FLAVA": Case(
        "text and image",
        lambda: _of("FlavaConfig", "FlavaModel", {
            "text_config": {**TEXT, "pad_token_id": 0}, "image_config": _SEEING,
            "multimodal_config": {**TEXT, "num_hidden_layers": 2}, "projection_dim": 16, "hidden_size": 24}),
        lambda: {**text_inputs(), "pixel_values": pixels()}, lambda _: [words(), patches()], {"value": _first_token}),
    "Whisper": Case(
        "sound and text",
        lambda: _of("WhisperConfig", "WhisperForConditionalGeneration", {
            "vocab_size": 40, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 3,
            "decoder_attention_heads": 3, "encoder_ffn_dim": 40, "decoder_ffn_dim": 40, "num_mel_bins": 8,
            "max_source_positions": 12, "max_target_positions": 12, "decoder_start_token_id": 1, "pad_token_id": 0,
            "bos_token_id": 1, "eos_token_id": 2, "suppress_tokens": [], "begin_suppress_tokens": []}),
        _sound, _sound_players, {"value": _spoken}),
    **{name: decoder(make) for name, make in TEXTS.items()},
    "Gemma": causal("Gemma", head_dim=8),
    "OPT": causal("OPT", "OPTForCausalLM", hidden_size=24, ffn_dim=40, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=24, max_position_embeddings=64),
    "Falcon": causal("Falcon", "FalconForCausalLM", hidden_size=24, num_hidden_layers=2, num_attention_heads=4),
    "BLOOM": causal("Bloom", "BloomForCausalLM", hidden_size=24, n_layer=2, n_head=4),
    "MPT": causal("Mpt", "MptForCausalLM", d_model=24, n_layers=2, n_heads=4, max_seq_len=64),
    "StableLM": causal("StableLm", hidden_size=32),
    "StarCoder2": causal("Starcoder2"),
    "Cohere": causal("Cohere"),
    "Granite": causal("Granite"),
    "OLMo 2": causal("Olmo2"),
    "OLMo": causal("Olmo"),
    "GLM": causal("Glm", head_dim=8),
    "Nemotron": causal("Nemotron", hidden_size=32),
    "SmolLM3": causal("SmolLM3"),
    "Helium": causal("Helium", hidden_size=32, head_dim=8),
    "GPT-J": causal("GPTJ", "GPTJForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "CodeGen": causal("CodeGen", "CodeGenForCausalLM", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64),
    "Qwen2-MoE": causal("Qwen2Moe", shared_expert_intermediate_size=16, **EXPERTS),
    "PhiMoE": causal("Phimoe", hidden_size=32, **EXPERTS),
    "GraniteMoE": causal("GraniteMoe", **EXPERTS),
    "Qwen3-Next": causal("Qwen3Next", **{**EXPERTS, **_LINEAR}, shared_expert_intermediate_size=16),
    "Mamba": causal("Mamba", "MambaForCausalLM", hidden_size=24, num_hidden_layers=2, state_size=4),
    **{name: seeing(name) for name in PICTURES},
    "BLIP-2": numbered_by_mask(),
}  # fmt: skip


def _torch() -> nn.Module:
    import encoders

    return ready(encoders.Torch(norm_first=True))


def _tower(name: str) -> nn.Module:
    sizes = {"vision_config": IMAGE, "num_labels": 4}
    return ready(getattr(hf, f"{name}ForImageClassification")(getattr(hf, f"{name}Config")(**sizes)))


def _vilt() -> nn.Module:
    return ready(hf.ViltForQuestionAnswering(hf.ViltConfig(**{**TEXT, **IMAGE}, max_image_length=-1)))
