"""Small models of transformers with random weights, and samples for them."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

from flmoe_fast import image_players, text_players

CLS, END, PAD, MASK = 2, 3, 0, 4
IDS = torch.tensor([[CLS, 9, 11, 7, 30, END, PAD, PAD]])
VALID = (IDS != PAD).long()
SIDE, PATCH = 12, 4
TEXT = {
    "vocab_size": 40, "hidden_size": 24, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 40,
    "max_position_embeddings": 24, "num_labels": 4,
}  # fmt: skip
IMAGE = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 40, "image_size": SIDE,
    "patch_size": PATCH, "num_labels": 4,
}  # fmt: skip


def ready(model: nn.Module, seed: int = 0) -> nn.Module:
    """Float64, eval mode, and weights large enough that every part matters."""
    generator = torch.Generator().manual_seed(seed)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def pixels() -> torch.Tensor:
    return torch.randn(1, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def bert() -> nn.Module:
    return ready(hf.BertForSequenceClassification(hf.BertConfig(**TEXT)))


def bert_of(layers: int) -> nn.Module:
    return ready(hf.BertForSequenceClassification(hf.BertConfig(**{**TEXT, "num_hidden_layers": layers})))


def roberta() -> nn.Module:
    return ready(hf.RobertaForSequenceClassification(hf.RobertaConfig(**TEXT, pad_token_id=1)))


def distilbert() -> nn.Module:
    config = hf.DistilBertConfig(vocab_size=40, dim=24, n_layers=2, n_heads=3, hidden_dim=40, num_labels=4)
    return ready(hf.DistilBertForSequenceClassification(config))


def prelayernorm() -> nn.Module:
    config = hf.RobertaPreLayerNormConfig(**TEXT, pad_token_id=1)
    return ready(hf.RobertaPreLayerNormForSequenceClassification(config))


def vit() -> nn.Module:
    return ready(hf.ViTForImageClassification(hf.ViTConfig(**IMAGE)))


def deit() -> nn.Module:
    config = hf.DeiTConfig(**IMAGE, layer_norm_eps=1e-3)
    return ready(hf.DeiTForImageClassificationWithTeacher(config))


def dinov2() -> nn.Module:
    return ready(hf.Dinov2ForImageClassification(hf.Dinov2Config(**IMAGE)))


def vilt() -> nn.Module:
    return ready(hf.ViltForQuestionAnswering(hf.ViltConfig(**{**TEXT, **IMAGE}, max_image_length=-1)))


def clip() -> nn.Module:
    text = {**TEXT, "hidden_act": "quick_gelu", "eos_token_id": END, "bos_token_id": CLS, "pad_token_id": PAD}
    return ready(hf.CLIPModel(hf.CLIPConfig(text_config=text, vision_config=IMAGE, projection_dim=16)))


def siglip() -> nn.Module:
    text = {**TEXT, "projection_size": 24, "eos_token_id": END, "bos_token_id": CLS, "pad_token_id": PAD}
    return ready(hf.SiglipModel(hf.SiglipConfig(text_config=text, vision_config=IMAGE)))


def clip_tower() -> nn.Module:
    return ready(hf.CLIPForImageClassification(hf.CLIPConfig(vision_config=IMAGE, num_labels=4)))


def siglip_tower() -> nn.Module:
    return ready(hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=IMAGE, num_labels=4)))


class Pooled(nn.Module):
    """Mean over tokens, by the attention mask or regardless of it, and a classifier."""

    def __init__(self, masked: bool):
        super().__init__()
        self.encoder = hf.BertModel(hf.BertConfig(**TEXT), add_pooling_layer=False)
        self.classifier, self.masked = nn.Linear(24, 4), masked

    def forward(self, input_ids, attention_mask):
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        if not self.masked:
            return self.classifier(states.mean(1))
        weights = attention_mask[..., None].to(states)
        return self.classifier((states * weights).sum(1) / weights.sum(1))


class Torch(nn.Module):
    """PyTorch's own encoder layers."""

    def __init__(self, norm_first: bool):
        super().__init__()
        self.embedding = nn.Embedding(40, 24)
        layer = nn.TransformerEncoderLayer(24, 3, 40, 0.1, batch_first=True, norm_first=norm_first, activation="gelu")
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.classifier = nn.Linear(24, 4)

    def forward(self, input_ids, attention_mask):
        x = self.embedding(input_ids) + torch.arange(input_ids.shape[1]).sin()[:, None]
        return self.classifier(self.encoder(x, src_key_padding_mask=attention_mask == 0)[:, 0])


def text_inputs() -> dict[str, torch.Tensor]:
    return {"input_ids": IDS, "attention_mask": VALID}


def words(absent: int | str = MASK, **options):
    """Players are the four tokens that are not special."""
    return text_players(IDS, special=[CLS, END, PAD], absent=absent, **options)


def patches(absent: float | str = 0.0):
    """Players are the nine patches."""
    return image_players(pixels(), patch=PATCH, absent=absent)
