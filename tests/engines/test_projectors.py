"""A projector between a tower and a language model is a layer of its own: where it is found, and that the tower freezes without it."""

from __future__ import annotations

import json
from collections import OrderedDict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from helpers import run_worker
from reference import projector_models as models
from safetensors.torch import load_file
from torch import Tensor, nn

import smartfrz_ds
from smartfrz_ds.model.keep_active import keep_active, names_inside
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.model.order_check import OrderCheck

LLAMA = "model.language_model.embeddings model.language_model.layers.0 model.language_model.layers.1 head"
CLIP = "embeddings model.vision_tower.encoder.layers.0 model.vision_tower.encoder.layers.1"
VISUAL = "embeddings model.visual.blocks.0 model.visual.blocks.1"
AUDIO = "embeddings model.audio_tower.layers.0 model.audio_tower.layers.1"
# kind -> layers, with the projector in brackets and, where it holds more than the module of its name, its modules
FAMILIES = {
    "llava": f"{CLIP} [model.multi_modal_projector] {LLAMA}",
    "llava_next": f"{CLIP} [model.multi_modal_projector] {LLAMA}",
    "paligemma": f"{CLIP} [model.multi_modal_projector] {LLAMA}",
    "internvl": f"{CLIP.replace('layers', 'layer')} [model.multi_modal_projector] {LLAMA}",
    "idefics3": f"{CLIP.replace('tower', 'model')} [model.connector] {LLAMA.replace('language', 'text')}",
    "qwen2_vl_tiny": f"{VISUAL} [model.visual.merger] {LLAMA}",
    "qwen3_vl": f"{VISUAL} [model.visual.merger=model.visual.merger,model.visual.deepstack_merger_list] {LLAMA}",
    "qwen2_audio": f"{AUDIO} [model.multi_modal_projector] {LLAMA}",
    "voxtral": f"{AUDIO} [model.multi_modal_projector] {LLAMA}",  # registered behind the language model
}


def described(model: nn.Module, layers: tuple[Layer, ...]) -> str:
    path = {m: name for name, m in model.named_modules()}
    words = []
    for layer in layers:
        modules = ",".join(path[m] for m in layer.modules)
        words.append(f"[{layer.name}{f'={modules}' if modules != layer.name else ''}]" if layer.projector else layer.name)
    return " ".join(words)


def whole(model: nn.Module, layers: tuple[Layer, ...]) -> bool:
    owned = [id(p) for layer in layers for p in layer.params]
    return sorted(owned) == sorted(id(p) for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", list(FAMILIES))
def test_families(kind: str) -> None:
    model = models.made(kind)
    layers = find_layers(model)
    assert described(model, layers) == FAMILIES[kind] and whole(model, layers)
    projector = next(layer for layer in layers if layer.projector)
    assert projector.kind == "block" and projector.numel > 0
    if kind == "llava_next":
        assert any(p is model.get_parameter("model.image_newline") for p in projector.params)
    check = OrderCheck(model, layers)
    model(**models.feed(kind))  # warnings are errors
    assert check.done
    pattern = projector.name.rpartition(".")[2][1:]
    assert keep_active([f"*{pattern}"], layers, names_inside(model, layers), "key").names == {projector.name}


# --- structures -------------------------------------------------------------------------------------------------------------------


class VisionBlock(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.norm, self.lin, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(3 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(torch.tanh(self.lin(self.norm(x))))


class TextBlock(VisionBlock):
    pass


class Tower(nn.Module):
    def __init__(self, block: type[VisionBlock], width: int, *, embeds: bool, **more: nn.Module) -> None:
        super().__init__()
        self.stem = nn.Embedding(40, width) if embeds else nn.Linear(5, width)
        self.blocks = nn.ModuleList(block(width) for _ in range(2))
        self.norm = nn.LayerNorm(width)
        for name, module in more.items():
            setattr(self, name, module)


def vision(width: int = 8, block: type[VisionBlock] = VisionBlock, **more: nn.Module) -> Tower:
    return Tower(block, width, embeds=False, **more)


def text(width: int = 16, block: type[VisionBlock] = TextBlock) -> Tower:
    return Tower(block, width, embeds=True)


def net(**parts: nn.Module) -> nn.Module:
    made = nn.Module()
    for name, part in parts.items():
        setattr(made, name, part)
    return made


def mlp(*widths: int) -> nn.Sequential:
    return nn.Sequential(nn.LayerNorm(widths[0]), *(nn.Linear(a, b) for a, b in pairwise(widths)))


VIS, LM = "embeddings vision.blocks.0 vision.blocks.1", "lm.embeddings lm.blocks.0 lm.blocks.1 head"
FOUND: dict[str, tuple[Any, str]] = {
    "any name": (lambda: net(vision=vision(), carry=nn.Linear(8, 16), lm=text()), f"{VIS} [carry] {LM}"),
    "mlp1, registered last, four features as one": (lambda: net(vision=vision(), lm=text(), mlp1=mlp(32, 16, 16)), f"{VIS} [mlp1] {LM}"),
    "registered last by widths alone": (lambda: net(vision=vision(), lm=text(), carry=nn.Linear(8, 16)), f"{VIS} [carry] {LM}"),
    "registered first": (lambda: net(projector=nn.Linear(8, 16), vision=vision(), lm=text()), f"{VIS} [projector] {LM}"),
    "inside of the tower by widths": (lambda: net(vision=vision(up=nn.Linear(8, 16)), lm=text()), f"{VIS} [vision.up] {LM}"),
    "inside of the tower by name": (
        lambda: net(vision=vision(16, merger=mlp(64, 16)), lm=text()),
        f"{VIS} [vision.merger] {LM}",
    ),
    "two matrices at the tower's end": (
        lambda: net(vision=vision(proj1=nn.Linear(8, 8), proj2=nn.Linear(8, 16)), lm=text()),
        f"{VIS} [vision.proj1=vision.proj1,vision.proj2] {LM}",
    ),
    "a norm around it": (
        lambda: net(vision=vision(), mm_norm=nn.LayerNorm(8), mm_projector=nn.Linear(8, 16), mm_out=nn.LayerNorm(16), lm=text()),
        f"{VIS} [mm_projector=mm_projector,mm_out,mm_norm] {LM}",
    ),
    "two towers, each with its own": (
        lambda: net(vision=vision(), vp=nn.Linear(8, 16), audio=vision(12), ap=nn.Linear(12, 16), lm=text()),
        f"{VIS} [vp] audio.blocks.0 audio.blocks.1 [ap] {LM}",
    ),
    "towers of one class of block": (
        lambda: net(vision=vision(16), projector=nn.Linear(16, 16), lm=text(block=VisionBlock)),
        f"{VIS} [projector] {LM}",
    ),
    "lists of blocks without towers": (
        lambda: net(
            a=nn.ModuleList(VisionBlock(8) for _ in range(2)), carry=nn.Linear(8, 16), b=nn.ModuleList(TextBlock(16) for _ in range(2))
        ),
        "a.0 a.1 [carry] b.0 b.1",
    ),
    "a ModuleDict of parts": (
        lambda: nn.ModuleDict(OrderedDict(vision=vision(), projector=nn.Linear(8, 16), lm=text())),
        f"{VIS} [projector] {LM}",
    ),
}  # fmt: skip
# what is none: a pooler, a tower's last norm, an output layer, stages' down-sampling, projections of a contrastive model
NONE: dict[str, tuple[Any, str]] = {
    "a pooler": (lambda: net(vision=vision(pooler=nn.Linear(8, 8)), lm=text()), f"{VIS} {LM}"),
    "an output layer of the tower": (lambda: net(vision=vision(classes=nn.Linear(8, 40)), lm=text()), f"{VIS} {LM}"),
    "an output layer behind": (lambda: net(vision=vision(), lm=text(), lm_head=nn.Linear(16, 40)), f"{VIS} {LM}"),
    "as many classes as both widths": (lambda: net(vision=vision(), lm=text(), out=nn.Linear(16, 16)), f"{VIS} {LM}"),
    "a contrastive pair": (
        lambda: net(vision=vision(), lm=text(), vision_projection=nn.Linear(8, 16), text_projection=nn.Linear(16, 16)),
        f"{VIS} {LM}",
    ),
    "a contrastive pair of one width": (
        lambda: net(vision=vision(16), lm=text(), vision_projection=nn.Linear(16, 16), text_projection=nn.Linear(16, 16)),
        f"{VIS} {LM}",
    ),
    "stages of one class": (
        lambda: net(a=vision(8), down=nn.Linear(8, 16), b=vision(16), fc=nn.Linear(16, 2)),
        "embeddings a.blocks.0 a.blocks.1 b.blocks.0 b.blocks.1 head",
    ),
    "lists of one class": (
        lambda: net(
            a=nn.Sequential(VisionBlock(8), VisionBlock(8)), down=nn.Linear(8, 16), b=nn.Sequential(VisionBlock(16)), fc=mlp(16, 2)
        ),
        "a.0 a.1 b.0 head",
    ),
}


@pytest.mark.parametrize("name", [*FOUND, *NONE])
def test_structures(name: str) -> None:
    make, expected = (FOUND | NONE)[name]
    model = make()
    layers = find_layers(model)
    assert described(model, layers) == expected and whole(model, layers)


def test_clip_keeps_its_projections_in_the_head() -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    for width in (16, 32):  # of the vision tower, and of what both are projected to
        vision = sizes | {"image_size": 8, "patch_size": 4, "hidden_size": width}
        config = transformers.CLIPConfig(text_config=sizes | {"vocab_size": 40}, vision_config=vision, projection_dim=width)
        layers = find_layers(transformers.CLIPModel(config))
        assert not any(layer.projector for layer in layers) and len(layers) == 7


def test_a_projector_that_runs_elsewhere_is_a_warning() -> None:
    class Late(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision, self.carry, self.lm = vision(), nn.Linear(8, 16), text()

        def forward(self, x: Tensor) -> Tensor:
            for tower in (self.vision, self.lm):
                x = tower.stem(x) if tower is self.vision else torch.zeros(2, 16)
                for block in tower.blocks:
                    x = block(x)
            return self.carry(torch.zeros(2, 8))

    model = Late()
    OrderCheck(model, find_layers(model))
    with pytest.warns(UserWarning, match=r"forward: .*vision\.blocks\.1, lm\.blocks\.0, lm\.blocks\.1, carry"):
        model(torch.randn(2, 5))


def test_qwen3_vls_mergers_may_run_between_the_blocks() -> None:
    """They feed layers of the language model from blocks in the middle of the tower."""
    model = models.qwen2_vl(
        "Qwen3VL", depth=4, hidden_size=16, intermediate_size=24, out_hidden_size=32, deepstack_visual_indexes=[0, 2],
        num_position_embeddings=16,
    )  # fmt: skip
    check = OrderCheck(model, find_layers(model))
    model(**models.feed("qwen3_vl"))
    assert check.done


# --- freezing the tower -----------------------------------------------------------------------------------------------------------


def expected(kind: str, world: int) -> tuple[dict[str, Tensor], list[str]]:
    model = models.made(kind)
    layers = find_layers(model)
    tower = models.in_front_of_projector(layers)
    frozen = [p for layer in layers if layer.name in tower for p in layer.params]
    return models.reference(kind, frozen, model, world), tower


@pytest.mark.parametrize("kind", ["llava", "qwen2_audio", "voxtral", "qwen3_vl"])
def test_the_tower_freezes_and_the_projector_trains_in_one_process(kind: str) -> None:
    want, tower = expected(kind, 1)
    model = models.made(kind)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=models.LR, weight_decay=models.DECAY)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual"})
    projector = next(layer for layer in find_layers(model) if layer.projector)
    for step in range(models.STEPS):
        if step == models.FREEZE:
            controller.freeze(tower)
            before = {name: p.detach().clone() for name, p in model.named_parameters()}
        loss = models.loss_of(model, kind, step, 0)
        optimizer.zero_grad()
        loss.backward()
        if kind == "llava" and step < models.FREEZE:  # as the engines do: what this model never uses has a gradient of zero
            for p in model.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        optimizer.step()
    assert list(controller.frozen) == tower and projector.name not in tower
    got = dict(model.named_parameters())
    assert all(torch.equal(got[name], want[name]) for name in want)
    names = {p: name for name, p in model.named_parameters()}
    changed = {name for name, p in got.items() if not torch.equal(p, before[name])}
    assert {names[p] for p in projector.params} <= changed
    assert not any(p.grad is not None for name, p in got.items() if name not in changed)


@pytest.mark.distributed(2)
def test_the_tower_freezes_and_the_projector_trains_under_zero2(tmp_path: Path) -> None:
    kinds = ["llava", "qwen2_vl_tiny", "qwen2_audio"]
    folder = run_worker("projector", kinds, tmp_path)
    for kind in kinds:
        want, tower = expected(kind, 2)
        got = load_file(folder / f"{kind}.safetensors")
        worst = max(float((got[name] - want[name]).abs().max()) for name in want)
        assert worst == 0.0, (kind, worst)
        for rank in (0, 1):
            assert json.loads((folder / f"{kind}.{rank}.json").read_text())["frozen"] == tower
        control = models.reference(kind, [], models.made(kind), 2)  # a run that freezes nothing is elsewhere
        assert max(float((got[name] - control[name]).abs().max()) for name in want) > 1e-3
