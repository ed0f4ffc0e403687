"""Architectures of transformers with small random configurations, on plain tensors."""

import torch
import transformers as hf
from torch import nn
from transformers.cache_utils import DynamicCache, EncoderDecoderCache

SMALL = {
    "vocab_size": 50,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
VISION = {k: SMALL[k] for k in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
SPEECH = {
    **SMALL,
    "conv_dim": [32, 32, 32],
    "conv_stride": [5, 2, 2],
    "conv_kernel": [10, 3, 3],
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
    "mask_time_prob": 0.0,
}
T5 = {"vocab_size": 50, "d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": 50,
    "num_mel_bins": 16,
    "d_model": 64,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "max_source_positions": 20,
    "max_target_positions": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
}


class Plain(nn.Module):
    """What a model of transformers returns on named tensors, without its output class."""

    def __init__(self, inner: nn.Module, *names: str) -> None:
        super().__init__()
        self.inner, self.names = inner, names

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return self.inner(**dict(zip(self.names, args, strict=True)), return_dict=False)


class CachedDecoder(nn.Module):
    """One call of a decoder: tokens, encoder states, then key and value of each layer -> logits and the caches grown."""

    def __init__(self, decoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.decoder, self.head = decoder, head

    def forward(self, ids: torch.Tensor, encoded: torch.Tensor, *cached: torch.Tensor) -> tuple[torch.Tensor, ...]:
        pairs = list(zip(cached[::2], cached[1::2], strict=True))
        cache = EncoderDecoderCache(DynamicCache(pairs), DynamicCache())
        hidden = self.decoder(ids, encoder_hidden_states=encoded, cache=cache, use_cache=True).last_hidden_state
        grown = [side for layer in cache.self_attention_cache.layers for side in (layer.keys, layer.values)]
        return self.head(hidden), *grown


def text(config: type, model: type, **options: object) -> nn.Module:
    return Plain(model(config(**{**SMALL, **options})), "input_ids", "attention_mask")


def bert() -> nn.Module:
    return text(hf.BertConfig, hf.BertModel)


def albert() -> nn.Module:
    return text(hf.AlbertConfig, hf.AlbertModel, embedding_size=32)


def distilbert() -> nn.Module:
    return text(hf.DistilBertConfig, hf.DistilBertModel, dim=64, n_layers=2, n_heads=4, hidden_dim=128)


def roberta() -> nn.Module:
    return text(hf.RobertaConfig, hf.RobertaModel)


def t5_encoder() -> nn.Module:
    return Plain(hf.T5EncoderModel(hf.T5Config(**T5)), "input_ids", "attention_mask")


def t5_decoder() -> nn.Module:
    model = hf.T5ForConditionalGeneration(hf.T5Config(**T5))
    return CachedDecoder(model.decoder, model.lm_head)


def whisper_encoder() -> nn.Module:
    return Plain(hf.WhisperModel(hf.WhisperConfig(**WHISPER)).encoder, "input_features")


def whisper_decoder() -> nn.Module:
    model = hf.WhisperForConditionalGeneration(hf.WhisperConfig(**WHISPER))
    return CachedDecoder(model.model.decoder, model.proj_out)


def wav2vec2() -> nn.Module:
    return Plain(hf.Wav2Vec2Model(hf.Wav2Vec2Config(**SPEECH)), "input_values")


def wav2vec2_conformer() -> nn.Module:
    config = hf.Wav2Vec2ConformerConfig(**SPEECH, position_embeddings_type="relative", conv_depthwise_kernel_size=7)
    return Plain(hf.Wav2Vec2ConformerModel(config), "input_values")


def clip_vision() -> nn.Module:
    return Plain(hf.CLIPVisionModel(hf.CLIPVisionConfig(**VISION, image_size=32, patch_size=8)), "pixel_values")


def clip_text() -> nn.Module:
    special = {"eos_token_id": 49, "bos_token_id": 1, "pad_token_id": 0}
    return Plain(hf.CLIPTextModel(hf.CLIPTextConfig(**SMALL, **special)), "input_ids", "attention_mask")


def vit() -> nn.Module:
    return Plain(hf.ViTModel(hf.ViTConfig(**VISION, image_size=32, patch_size=8)), "pixel_values")


def deit() -> nn.Module:
    return Plain(hf.DeiTModel(hf.DeiTConfig(**VISION, image_size=32, patch_size=8)), "pixel_values")
