"""Small decoders of transformers with random weights, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.overrides import TorchFunctionMode

IMAGE, VISION_START = 41, 40
VOCABULARY = 50
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 24, "intermediate_size": 36, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": False,
}  # fmt: skip
EXPERTS = {"num_experts": 4, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
WINDOW = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
LATENT = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 6,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1,
    "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip
CLIP = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 12,
    "patch_size": 4,
}  # fmt: skip
ROTARY = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 1]}}


class AllDouble(TorchFunctionMode):
    """Casts of float64 to float32, as norms, softmaxes and rotary positions have them, do nothing inside."""

    def __torch_function__(
        self, function: Callable, types: object, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> object:
        given = dict(kwargs or {})
        first = args[0] if args else None
        if isinstance(first, torch.Tensor) and first.dtype == torch.float64:
            if function is torch.Tensor.float:
                return first
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
            given = {name: torch.float64 if value is torch.float32 else value for name, value in given.items()}
        return function(*args, **given)


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, eval mode, and weights large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def text_of(name: str, **changes: object) -> Callable[[], nn.Module]:
    """A constructor of a model of text."""

    def make() -> nn.Module:
        config = getattr(hf, f"{name}Config")(**{**TEXT, **changes})
        return ready(getattr(hf, f"{name}ForCausalLM", None)(config))

    return make


def gpt2() -> nn.Module:
    sizes = {"n_embd": 24, "n_layer": 3, "n_head": 4, "n_positions": 64, "vocab_size": VOCABULARY}
    return ready(hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)))


TEXTS: dict[str, Callable[[], nn.Module]] = {
    "Llama": text_of("Llama"),
    "Mistral": text_of("Mistral", sliding_window=4),
    "Qwen2": text_of("Qwen2"),
    "Qwen3": text_of("Qwen3", head_dim=8),
    "Gemma 2": text_of("Gemma2", head_dim=8, **WINDOW, final_logit_softcapping=3.0, attn_logit_softcapping=2.0),
    "Gemma 3": (
        lambda: ready(hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**{**TEXT, "head_dim": 8, **WINDOW})))
    ),
    "Phi": text_of("Phi", hidden_size=32),
    "Phi-3": text_of("Phi3"),
    "GPT-2": gpt2,
    "GPT-NeoX": text_of("GPTNeoX"),
    "gpt-oss": text_of("GptOss", head_dim=8, **{**EXPERTS, **WINDOW}),
    "Mixtral": text_of("Mixtral", **EXPERTS),
    "Qwen3-MoE": text_of("Qwen3Moe", head_dim=8, **EXPERTS),
    "OLMoE": text_of("Olmoe", **EXPERTS),
    "DeepSeek-V3": text_of("DeepseekV3", **{**LATENT, "num_key_value_heads": 4}),
}  # fmt: skip


def llava() -> nn.Module:
    text, vision = hf.LlamaConfig(**TEXT), hf.CLIPVisionConfig(**CLIP)
    config = hf.LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, vision_feature_layer=-2)
    return ready(hf.LlavaForConditionalGeneration(config))


def onevision() -> nn.Module:
    text, vision = hf.Qwen2Config(**TEXT), hf.SiglipVisionConfig(**CLIP)
    pinpoints = [[12, 12], [12, 24]]
    config = hf.LlavaOnevisionConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=IMAGE,
        image_grid_pinpoints=pinpoints,
        vision_feature_layer=-1,
    )
    return ready(hf.LlavaOnevisionForConditionalGeneration(config))


def qwen(name: str, mixture: bool = False) -> Callable[[], nn.Module]:
    """Qwen2-VL and those after it: pictures of two by two grids of merged patches."""

    def make() -> nn.Module:
        text = {**TEXT, **ROTARY, "hidden_size": 24, **(EXPERTS | {"head_dim": 6} if mixture else {})}
        vision = {
            "depth": 2, "embed_dim": 16, "hidden_size": 24 if name == "Qwen2VL" else 16, "num_heads": 2,
            "patch_size": 2, "temporal_patch_size": 2, "spatial_merge_size": 2, "in_channels": 3, "mlp_ratio": 2,
            "intermediate_size": 24, "out_hidden_size": 24, "fullatt_block_indexes": [1], "window_size": 8,
            "deepstack_visual_indexes": [0, 1], "num_position_embeddings": 16,
        }  # fmt: skip
        config = getattr(hf, f"{name}Config")(
            text_config=text, vision_config=vision, image_token_id=IMAGE, vision_start_token_id=VISION_START,
            video_token_id=43, vision_end_token_id=42,
        )  # fmt: skip
        return ready(getattr(hf, f"{name}ForConditionalGeneration")(config))

    return make


def internvl() -> nn.Module:
    vision = {**CLIP, "image_size": [12, 12], "patch_size": [3, 3]}
    config = hf.InternVLConfig(
        vision_config=vision, text_config={**TEXT, "model_type": "qwen2"}, image_token_id=IMAGE, downsample_ratio=0.5
    )
    return ready(hf.InternVLForConditionalGeneration(config))


def idefics3(name: str = "Idefics3") -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        vision = {**CLIP, "patch_size": 3}
        config = getattr(hf, f"{name}Config")(
            vision_config=vision, text_config={**TEXT, "model_type": "llama"}, image_token_id=IMAGE, scale_factor=2
        )
        return ready(getattr(hf, f"{name}ForConditionalGeneration")(config))

    return make


def paligemma() -> nn.Module:
    vision = {**CLIP, "model_type": "siglip_vision_model", "projection_dim": 24, "vision_use_head": False}
    text = {**TEXT, "model_type": "gemma", "head_dim": 8}
    config = hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=24)
    return ready(hf.PaliGemmaForConditionalGeneration(config))


def gemma3() -> nn.Module:
    vision = {**CLIP, "model_type": "siglip_vision_model", "vision_use_head": False, "patch_size": 3}
    text = {**TEXT, "head_dim": 8, **WINDOW}
    config = hf.Gemma3Config(
        text_config=text, vision_config=vision, image_token_index=IMAGE, mm_tokens_per_image=4,
    )  # fmt: skip
    return ready(hf.Gemma3ForConditionalGeneration(config))


def blip2() -> nn.Module:
    former = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 36,
              "encoder_hidden_size": 16, "cross_attention_frequency": 2}  # fmt: skip
    text = {
        "model_type": "opt", "vocab_size": VOCABULARY, "hidden_size": 24, "ffn_dim": 40, "num_hidden_layers": 2,
        "num_attention_heads": 4, "word_embed_proj_dim": 24, "max_position_embeddings": 64, "pad_token_id": 0,
        "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    config = hf.Blip2Config(
        vision_config=CLIP, qformer_config=former, text_config=text, num_query_tokens=4, image_token_id=IMAGE
    )
    return ready(hf.Blip2ForConditionalGeneration(config))


def prompt(image_tokens: int = 0, question: int = 6, seed: int = 0) -> torch.Tensor:
    """Tokens (1, T): two of a system prompt, an image's, and a question's with two at its end that are no words."""
    words = torch.randint(3, 40, (question + 4,), generator=torch.Generator().manual_seed(seed))
    image = [VISION_START, *[IMAGE] * image_tokens, 42] if image_tokens else []
    return torch.tensor([[*words[:2].tolist(), *image, *words[2:].tolist()]])


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def with_picture(tokens: int, kinds: str = "", **more: torch.Tensor) -> dict[str, torch.Tensor]:
    ids = prompt(tokens)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}
    return inputs | ({kinds: (ids == IMAGE).long()} if kinds else {})


GRID = torch.tensor([[1, 4, 4]])
#: A model, and a prompt with a picture of two by two or three by three image tokens.
PICTURES: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]] = {
    "LLaVA": (llava, lambda: with_picture(9, pixel_values=picture(1, 3, 12, 12))),
    "LLaVA-OneVision": (onevision, lambda: with_picture(
        9 + 3 * 7, pixel_values=picture(1, 3, 3, 12, 12), image_sizes=torch.tensor([[12, 24]]))),
    **{
        name: (qwen(kind, mixture), lambda: with_picture(
            4, "mm_token_type_ids", pixel_values=picture(16, 24), image_grid_thw=GRID))
        for name, kind, mixture in (
            ("Qwen2-VL", "Qwen2VL", False), ("Qwen2.5-VL", "Qwen2_5_VL", False), ("Qwen3-VL", "Qwen3VL", False),
            ("Qwen3-VL-MoE", "Qwen3VLMoe", True))
    },
    "InternVL": (internvl, lambda: with_picture(4, pixel_values=picture(1, 3, 12, 12))),
    "Idefics3": (idefics3(), lambda: with_picture(4, pixel_values=picture(1, 1, 3, 12, 12))),
    "SmolVLM": (idefics3("SmolVLM"), lambda: with_picture(4, pixel_values=picture(1, 1, 3, 12, 12))),
    "PaliGemma": (paligemma, lambda: with_picture(9, "token_type_ids", pixel_values=picture(1, 3, 12, 12))),
    "Gemma 3 + pictures": (gemma3, lambda: with_picture(4, "token_type_ids", pixel_values=picture(1, 3, 12, 12))),
}  # fmt: skip
