"""The prefix cache on small versions of many kinds of models: cached, or off for the reason given here; always with equal bits."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from reference.cached_runs import ROWS, both
from torch import Tensor, nn

from smartfrz_ds.model.layers import find_layers

SIZES = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32}
TEXT_SIZES = SIZES | {"vocab_size": 50}
DECODER = TEXT_SIZES | {"num_key_value_heads": 2, "use_cache": False}
GPT2 = {"n_embd": 16, "n_layer": 4, "n_head": 2, "vocab_size": 50, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
T5 = {
    "d_model": 16,
    "d_kv": 8,
    "d_ff": 32,
    "num_layers": 4,
    "num_heads": 2,
    "vocab_size": 50,
    "use_cache": False,
    "decoder_start_token_id": 0,
}
BART = {"d_model": 16, "vocab_size": 50, "max_position_embeddings": 32, "use_cache": False} | {
    f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (("layers", 4), ("attention_heads", 2), ("ffn_dim", 32))
}
WAV2VEC2 = SIZES | {
    "conv_dim": (8, 8),
    "conv_stride": (4, 4),
    "conv_kernel": (4, 4),
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_prob": 0.0,
}
NO_DROPOUT = ("hidden_dropout", "activation_dropout", "attention_dropout", "feat_proj_dropout", "layerdrop")
WHISPER = {
    "d_model": 16,
    "vocab_size": 50,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "max_target_positions": 16,
    "use_cache": False,
    "decoder_start_token_id": 1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
} | {f"{part}_{what}": value for part in ("encoder", "decoder") for what, value in (("layers", 4), ("attention_heads", 2), ("ffn_dim", 32))}
AST = {"patch_size": 4, "frequency_stride": 4, "time_stride": 4, "max_length": 16, "num_mel_bins": 8}
IMAGE = 45  # the token in whose place an image's features go
LLAVA = {
    "vision_config": SIZES | {"model_type": "clip_vision_model", "image_size": 16, "patch_size": 8, "projection_dim": 8},
    "text_config": DECODER | {"model_type": "llama"},
    "image_token_id": IMAGE,
    "vision_feature_layer": -1,
    "image_seq_length": 4,
}
IDEFICS3 = {
    "vision_config": SIZES | {"image_size": 16, "patch_size": 4},
    "text_config": DECODER | {"model_type": "llama", "pad_token_id": 0},
    "image_token_id": IMAGE,
    "scale_factor": 2,
    "pad_token_id": 0,
}
QWEN2_VL = {
    "vision_config": {"depth": 4, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2}
    | {"patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3},
    "text_config": DECODER
    | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}, "max_position_embeddings": 64}
    | {"bos_token_id": 1, "eos_token_id": 2},
    "image_token_id": IMAGE,
    "vision_start_token_id": 46,
    "vision_end_token_id": 47,
    "video_token_id": 48,
}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1], "layer_type": "basic"}
FREEZE = {"tied": "freeze"}

CACHED, TRAINS, RANDOM = "", "of a frozen layer still trains", "random numbers are drawn in front of the first active layer"
READS, RAISES = "reads what a skipped layer returned", "without the frozen layers the model raises"
COLLECTS, BATCH_NORM = "collects something from each layer", "computes statistics over the batch"

# name -> class and configuration of transformers, its settings, data, this package's settings, why it is not cached
KINDS: dict[str, tuple[str, str, dict[str, Any], str, dict[str, Any], str]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"use_cache": False}, "text", FREEZE, CACHED),
    "gpt2-tied": ("GPT2LMHeadModel", "GPT2Config", GPT2 | {"use_cache": False}, "text", {}, TRAINS),
    "gpt2-key-value-cache": ("GPT2LMHeadModel", "GPT2Config", GPT2, "text", FREEZE, COLLECTS),
    "bert": ("BertForSequenceClassification", "BertConfig", TEXT_SIZES, "classes", {}, CACHED),
    "bert-train-mode": ("BertForSequenceClassification", "BertConfig", TEXT_SIZES, "classes", {"frozen_mode": "train"}, RANDOM),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", TEXT_SIZES, "classes", {}, CACHED),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "n_layers": 4, "n_heads": 2, "hidden_dim": 32, "vocab_size": 50},
        "classes",
        {},
        CACHED,
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", TEXT_SIZES | {"embedding_size": 16}, "classes", {}, CACHED),
    "albert": ("AlbertForSequenceClassification", "AlbertConfig", TEXT_SIZES | {"embedding_size": 16}, "classes", {}, CACHED),
    "deberta": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        TEXT_SIZES | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"]},
        "classes",
        {},
        CACHED,
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, "text", {}, CACHED),
    "mistral": ("MistralForCausalLM", "MistralConfig", DECODER, "text", {}, CACHED),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", DECODER | {"head_dim": 8}, "text", {}, CACHED),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, "text", {}, CACHED),
    "gemma2": ("Gemma2ForCausalLM", "Gemma2Config", DECODER | {"head_dim": 8}, "text", FREEZE, CACHED),
    "phi": ("PhiForCausalLM", "PhiConfig", TEXT_SIZES | {"use_cache": False}, "text", {}, CACHED),
    "gpt-neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", TEXT_SIZES | {"use_cache": False}, "text", {}, CACHED),
    "opt": (
        "OPTForCausalLM",
        "OPTConfig",
        {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "ffn_dim": 32, "vocab_size": 50}
        | {"word_embed_proj_dim": 16, "max_position_embeddings": 32, "use_cache": False},
        "text",
        FREEZE,
        CACHED,
    ),
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 50, "use_cache": False},
        "text",
        FREEZE,
        CACHED,
    ),
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", DECODER | {"num_local_experts": 4}, "text", {}, CACHED),
    "qwen3-moe": (
        "Qwen3MoeForCausalLM",
        "Qwen3MoeConfig",
        DECODER | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        "text",
        {},
        CACHED,
    ),
    "mixtral-router-logits": (
        "MixtralForCausalLM",
        "MixtralConfig",
        DECODER | {"num_local_experts": 4, "output_router_logits": True},
        "text",
        {},
        COLLECTS,
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", T5 | {"dropout_rate": 0.0}, "text", FREEZE, CACHED),
    "t5-dropout": ("T5ForConditionalGeneration", "T5Config", T5, "text", FREEZE, RANDOM),
    "bart": ("BartForConditionalGeneration", "BartConfig", BART, "text", FREEZE, RANDOM),
    "vit": ("ViTForImageClassification", "ViTConfig", SIZES | {"image_size": 16, "patch_size": 4}, "images", {}, CACHED),
    "deit": ("DeiTForImageClassification", "DeiTConfig", SIZES | {"image_size": 16, "patch_size": 4}, "images", {}, CACHED),
    "clip-vision": (
        "CLIPVisionModelWithProjection",
        "CLIPVisionConfig",
        SIZES | {"image_size": 16, "patch_size": 4, "projection_dim": 8},
        "bare-images",
        {},
        CACHED,
    ),
    "swin": (
        "SwinForImageClassification",
        "SwinConfig",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4, "drop_path_rate": 0.0},
        "images",
        {},
        CACHED,
    ),
    "convnext": (
        "ConvNextForImageClassification",
        "ConvNextConfig",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [2, 2, 2, 2], "patch_size": 2},
        "images",
        {},
        CACHED,
    ),
    "resnet": ("ResNetForImageClassification", "ResNetConfig", RESNET, "images", {}, CACHED),
    "resnet-train-mode": ("ResNetForImageClassification", "ResNetConfig", RESNET, "images", {"frozen_mode": "train"}, BATCH_NORM),
    "wav2vec2": ("Wav2Vec2ForSequenceClassification", "Wav2Vec2Config", WAV2VEC2, "audio", {}, RANDOM),
    "wav2vec2-no-dropout": (
        "Wav2Vec2ForSequenceClassification",
        "Wav2Vec2Config",
        WAV2VEC2 | dict.fromkeys(NO_DROPOUT, 0.0) | {"apply_spec_augment": False},
        "audio",
        {},
        CACHED,
    ),
    "audio-spectrogram": ("ASTForAudioClassification", "ASTConfig", SIZES | AST, "spectrograms", {}, CACHED),
    "whisper": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER | {"dropout": 0.0}, "speech", FREEZE, CACHED),
    "whisper-dropout": ("WhisperForConditionalGeneration", "WhisperConfig", WHISPER | {"dropout": 0.1}, "speech", FREEZE, RANDOM),
    "idefics3-tower": ("Idefics3ForConditionalGeneration", "Idefics3Config", IDEFICS3, "images-in-text", {}, CACHED),
    "idefics3": ("Idefics3ForConditionalGeneration", "Idefics3Config", IDEFICS3, "images-in-text", {}, READS),
    "qwen2-vl": ("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", QWEN2_VL, "patches-in-text", {}, CACHED),
    "llava": ("LlavaForConditionalGeneration", "LlavaConfig", LLAVA, "image-in-text", {}, RAISES),
    "lora-llama": ("LlamaForCausalLM", "LlamaConfig", DECODER, "text", {}, CACHED),
    "lora-bert": ("BertForSequenceClassification", "BertConfig", TEXT_SIZES, "classes", {}, RANDOM),
}
# Within the image tower, or within the language model; Whisper's whole encoder: behind its decoder's embeddings, the model itself adds
# positions to their output.
DEPTHS = {"idefics3-tower": 3, "idefics3": 9, "qwen2-vl": 9, "llava": 9, "whisper": 5}
LORA = {"lora-llama": ["q_proj"], "lora-bert": ["query"]}


def data(kind: str) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    classes = {"labels": torch.arange(ROWS) % 2}
    if kind == "audio":
        return {"input_values": torch.randn(ROWS, 400, generator=generator), **classes}
    if kind == "spectrograms":
        return {"input_values": torch.randn(ROWS, 16, 8, generator=generator), **classes}
    if kind == "speech":
        ids = torch.randint(3, 50, (ROWS, 8), generator=generator)
        return {"input_features": torch.randn(ROWS, 8, 16, generator=generator), "labels": ids}
    if kind.endswith("-in-text"):
        ids = torch.randint(3, IMAGE, (ROWS, 8), generator=generator)
        ids[:, 0], ids[:, 1:5] = IMAGE + 1, IMAGE
        text = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids.clone()}
        if kind == "patches-in-text":
            grids = {"image_grid_thw": torch.tensor([[1, 4, 4]]).repeat(ROWS, 1), "mm_token_type_ids": (ids == IMAGE).long()}
            return text | grids | {"pixel_values": torch.randn(ROWS, 16, 3 * 4 * 4, generator=generator)}
        images = torch.randn(ROWS, 3, 16, 16, generator=generator)
        return text | {"pixel_values": images if kind == "image-in-text" else images[:, None], "use_cache": False}
    if "images" in kind:
        pixels = {"pixel_values": torch.randn(ROWS, 3, 16, 16, generator=generator)}
        return pixels if kind == "bare-images" else pixels | classes
    ids = torch.randint(3, 50, (ROWS, 8), generator=generator)
    mask = (torch.arange(8)[None] < (8 - torch.arange(ROWS) % 3)[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, **({"labels": ids.clone()} if kind == "text" else classes)}


def maker(name: str) -> Callable[[], nn.Module]:
    model, config, sizes, *_ = KINDS[name]

    def make() -> nn.Module:
        transformers = importlib.import_module("transformers")
        made = getattr(transformers, model)(getattr(transformers, config)(**sizes))
        if name in LORA:
            from peft import LoraConfig, get_peft_model

            return get_peft_model(made, LoraConfig(r=2, target_modules=LORA[name], lora_dropout=0.1))
        return made

    return make


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_cached_exactly_or_off(name: str) -> None:
    *_, inputs, settings, reason = KINDS[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        depth = DEPTHS.get(name) or max(1, len(find_layers(maker(name)())) * 3 // 5)
        mode = "auto" if reason in (TRAINS, BATCH_NORM) else "on"
        # the patches of all images are one long tensor without rows: only the same batches hit
        apart = inputs == "patches-in-text"

        def alter(step: int, batch: dict[str, Any]) -> dict[str, Any]:
            return batch | ({"pixel_values": batch["pixel_values"].flatten(0, 1)} if apart else {})

        shuffle = not apart
        run = both(maker(name), data(inputs), mode=mode, frozen=depth, settings=settings, alter=alter, shuffle=shuffle)
    assert reason in run.note and bool(run.hits) == (reason == CACHED), run.note
    assert reason or "not used" not in run.note
