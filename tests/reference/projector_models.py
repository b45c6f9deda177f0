"""Tiny models in which a projector stands between a tower and a language model, and what their forward takes."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from reference import oracle
from torch import Tensor, nn

VISION = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
TEXT = {
    "vocab_size": 40,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 48,
}
IMAGE_TOKEN, PATCHES = 39, 4  # of an image of 8 by 8 pixels in patches of 4


def text_config(**more: Any) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(**TEXT, max_position_embeddings=64, tie_word_embeddings=False, **more)


def clip(**more: Any) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(image_size=8, patch_size=4, projection_dim=16, **(VISION | more))


def llava() -> nn.Module:
    config = transformers.LlavaConfig(vision_config=clip(), text_config=text_config(), image_token_index=IMAGE_TOKEN)
    config.vision_feature_layer = -1  # all blocks of the tower are used
    return transformers.LlavaForConditionalGeneration(config)


def llava_next() -> nn.Module:
    config = transformers.LlavaNextConfig(
        vision_config=clip(), text_config=text_config(), image_token_index=IMAGE_TOKEN, image_grid_pinpoints=[[8, 8]]
    )
    return transformers.LlavaNextForConditionalGeneration(config)


def paligemma() -> nn.Module:
    vision = transformers.SiglipVisionConfig(image_size=8, patch_size=4, projection_dim=32, vision_use_head=False, **VISION)
    text = transformers.GemmaConfig(head_dim=16, max_position_embeddings=64, **TEXT)
    return transformers.PaliGemmaForConditionalGeneration(
        transformers.PaliGemmaConfig(vision_config=vision, text_config=text, projection_dim=32, image_token_index=IMAGE_TOKEN)
    )


def internvl() -> nn.Module:
    vision = transformers.InternVLVisionConfig(image_size=[8, 8], patch_size=[4, 4], **VISION)
    config = transformers.InternVLConfig(
        vision_config=vision, text_config=text_config(), image_token_id=IMAGE_TOKEN, downsample_ratio=0.5, vision_feature_layer=-1
    )
    return transformers.InternVLForConditionalGeneration(config)


def idefics3() -> nn.Module:
    vision = transformers.Idefics3VisionConfig(image_size=8, patch_size=4, **VISION)
    config = transformers.Idefics3Config(
        vision_config=vision.to_dict(), text_config=text_config(pad_token_id=0), image_token_id=IMAGE_TOKEN, scale_factor=2, pad_token_id=0
    )
    return transformers.Idefics3ForConditionalGeneration(config)


def qwen2_vl(cls: str = "Qwen2VL", **vision: Any) -> nn.Module:
    text = TEXT | {
        "max_position_embeddings": 64,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]},
    }
    config = getattr(transformers, f"{cls}Config")(
        text_config=text, vision_config={"depth": 2, "num_heads": 2, "patch_size": 4, **vision}, image_token_id=IMAGE_TOKEN,
        video_token_id=38, vision_start_token_id=37, vision_end_token_id=36,
    )  # fmt: skip
    return getattr(transformers, f"{cls}ForConditionalGeneration")(config)


def qwen2_vl_tiny() -> nn.Module:
    return qwen2_vl(embed_dim=16, hidden_size=32, mlp_ratio=2)


def qwen3_vl() -> nn.Module:
    return qwen2_vl(
        "Qwen3VL", hidden_size=16, intermediate_size=24, out_hidden_size=32, deepstack_visual_indexes=[0, 1], num_position_embeddings=16
    )


def qwen2_audio() -> nn.Module:
    audio = {
        "num_mel_bins": 4,
        "encoder_layers": 2,
        "encoder_attention_heads": 2,
        "encoder_ffn_dim": 24,
        "d_model": 16,
        "max_source_positions": 8,
    }
    config = transformers.Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", **audio},
        text_config=TEXT | {"model_type": "qwen2"},
        audio_token_index=IMAGE_TOKEN,
    )
    return transformers.Qwen2AudioForConditionalGeneration(config)


def voxtral() -> nn.Module:
    audio = VISION | {"num_mel_bins": 4, "max_source_positions": 8, "intermediate_size": 64, "head_dim": 8}
    config = transformers.VoxtralConfig(
        audio_config={"model_type": "voxtral_encoder", **audio}, text_config=TEXT | {"model_type": "llama"}, audio_token_id=IMAGE_TOKEN
    )
    return transformers.VoxtralForConditionalGeneration(config)


def ids(images: int = PATCHES, batch: int = 2, *, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 30, (batch, 5), generator=generator)
    return torch.cat([text[:, :2], torch.full((batch, images), IMAGE_TOKEN), text[:, 2:]], dim=1)


def pixels(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def feed(kind: str, seed: int = 0) -> dict[str, Any]:
    """A batch of two: text around an image or a sound."""
    if kind in ("qwen2_vl_tiny", "qwen3_vl"):
        grid = torch.tensor([[1, 4, 4]] * 2)
        text = ids(4, seed=seed)
        image = {"pixel_values": pixels(32, 3 * 2 * 16, seed=seed), "image_grid_thw": grid}
        return {"input_ids": text, "mm_token_type_ids": (text == IMAGE_TOKEN).long()} | image
    if kind in ("qwen2_audio", "voxtral"):
        batch = {"input_ids": ids(4 if kind == "qwen2_audio" else 2, seed=seed), "input_features": pixels(2, 4, 16, seed=seed)}
        if kind == "qwen2_audio":
            batch |= {"feature_attention_mask": torch.ones(2, 16, dtype=torch.long), "attention_mask": torch.ones_like(batch["input_ids"])}
        return batch
    if kind == "internvl":
        return {"input_ids": ids(1, seed=seed), "pixel_values": pixels(2, 3, 8, 8, seed=seed)}
    if kind == "idefics3":
        return {"input_ids": ids(1, seed=seed), "pixel_values": pixels(2, 1, 3, 8, 8, seed=seed)}
    if kind == "llava_next":
        return {
            "input_ids": ids(2 * PATCHES + 2, seed=seed),
            "pixel_values": pixels(2, 2, 3, 8, 8, seed=seed),
            "image_sizes": torch.tensor([[8, 8]] * 2),
        }
    return {"input_ids": ids(seed=seed), "pixel_values": pixels(2, 3, 8, 8, seed=seed)}


# --- the single process -------------------------------------------------------------------------------------------------------------

LR, DECAY, STEPS, FREEZE = 1e-2, 0.1, 5, 2


def made(kind: str) -> nn.Module:
    torch.manual_seed(0)
    return globals()[kind]().train()


def loss_of(model: Any, kind: str, step: int, rank: int) -> Tensor:
    """Of the logits of all positions, for each rank another batch."""
    logits = model(**feed(kind, seed=10 * step + rank)).logits
    return logits.float().logsumexp(-1).square().mean()


def in_front_of_projector(layers: Any) -> list[str]:
    """The whole tower: names of all layers in front of the projector."""
    return [layer.name for layer in layers[: next(layer.position for layer in layers if layer.projector)]]


def reference(kind: str, frozen: list[nn.Parameter], model: nn.Module, world: int) -> dict[str, Tensor]:
    """The weights after STEPS steps of plain torch in which `frozen` stand still from step FREEZE on."""
    torch.set_num_threads(oracle.THREADS)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LR, weight_decay=DECAY)
    for step in range(STEPS):
        if step == FREEZE:
            for p in frozen:
                p.requires_grad_(False)
                p.grad = None
            trained = [p for p in trained if p.requires_grad]
        total = [torch.zeros_like(p) for p in trained]
        for rank in range(world):
            found = torch.autograd.grad(loss_of(model, kind, step, rank), trained, allow_unused=True)
            total = [t if g is None else t + g / world for t, g in zip(total, found, strict=True)]
        for p, g in zip(trained, total, strict=True):
            p.grad = g
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}
