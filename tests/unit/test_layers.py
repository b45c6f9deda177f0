"""Layers of real model families, found by structure and by hand; the order check; freezing on the side of the modules."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from smartfrz_ds.model.freeze_modules import check_tied, freeze_modules, leaving_params, thaw_modules
from smartfrz_ds.model.layers import Layer, find_layers
from smartfrz_ds.model.order_check import OrderCheck

TEXT: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


class Net(nn.Module):
    """A plain module with the given children and parameters, which run one after the other."""

    def __init__(self, run: str = "", **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run.split() or [name for name, part in parts.items() if isinstance(part, nn.Module)]

    def forward(self, x: Tensor) -> Tensor:
        for name in self.run:
            part = self.get_submodule(name)
            for step in part if isinstance(part, nn.ModuleList) else [part]:
                x = step(x)
        return x


class Residual(nn.Module):
    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.lin = nn.Linear(width, width)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.lin(self.norm(x)))


def gpt2(**more: Any) -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=more.pop("n_layer", 3), n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, **more
    )
    return transformers.GPT2LMHeadModel(config)


def llama(tied: bool) -> nn.Module:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(num_key_value_heads=1, tie_word_embeddings=tied, **TEXT))


def vit() -> nn.Module:
    config = transformers.ViTConfig(**{k: v for k, v in TEXT.items() if k != "vocab_size"}, image_size=8, patch_size=4)
    return transformers.ViTForImageClassification(config)


def resnet() -> nn.Module:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    return transformers.ResNetForImageClassification(config)


def t5() -> nn.Module:
    return transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in (("layers", 2), ("attention_heads", 2), ("ffn_dim", 32))}
    return transformers.BartForConditionalGeneration(transformers.BartConfig(vocab_size=40, d_model=16, **sizes))


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 40, shape)


def text() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 6)}


def pair() -> dict[str, Tensor]:
    return {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 4)}


def image() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 32, 32)}


Family = tuple[Callable[[], nn.Module], Callable[[], dict[str, Tensor]], str]
# the layers' names, and for each layer the modules in it where they are not just the one of its name
FAMILIES: dict[str, Family] = {
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(**TEXT)),
        text,
        "embeddings(bert.embeddings) bert.encoder.layer.0 bert.encoder.layer.1 bert.encoder.layer.2 head(bert.pooler,classifier)",
    ),
    "bert-mlm": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(**TEXT)),
        text,
        "embeddings(bert.embeddings)* bert.encoder.layer.0 bert.encoder.layer.1 bert.encoder.layer.2 head(cls)",
    ),
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(**TEXT)),
        text,
        "embeddings(roberta.embeddings) roberta.encoder.layer.0 roberta.encoder.layer.1 roberta.encoder.layer.2 head(classifier)",
    ),
    "gpt2": (
        gpt2,
        text,
        "embeddings(transformer.wte,transformer.wpe,transformer.drop)* transformer.h.0 transformer.h.1 transformer.h.2 "
        "head(transformer.ln_f,lm_head)",
    ),
    "llama": (
        lambda: llama(False),
        text,
        "embeddings(model.embed_tokens) model.layers.0 model.layers.1 model.layers.2 head(model.norm,lm_head)",
    ),
    "llama-tied": (
        lambda: llama(True),
        text,
        "embeddings(model.embed_tokens)* model.layers.0 model.layers.1 model.layers.2 head(model.norm,lm_head)",
    ),
    "vit": (
        vit,
        lambda: {"pixel_values": torch.randn(2, 3, 8, 8)},
        "embeddings(vit.embeddings) vit.layers.0 vit.layers.1 vit.layers.2 head(vit.layernorm,classifier)",
    ),
    "resnet": (
        resnet,
        image,
        "embeddings(resnet.embedder) resnet.encoder.stages.0.layers.0 resnet.encoder.stages.0.layers.1 resnet.encoder.stages.1.layers.0 "
        "resnet.encoder.stages.1.layers.1 head(classifier)",
    ),
    "convnext": (
        lambda: transformers.ConvNextForImageClassification(
            transformers.ConvNextConfig(patch_size=2, hidden_sizes=[8, 16], depths=[2, 1], num_stages=2)
        ),
        image,
        "embeddings(convnext.embeddings,convnext.encoder.stages.0.downsampling_layer) "
        "convnext.encoder.stages.0.layers.0 convnext.encoder.stages.0.layers.1 "
        "convnext.encoder.stages.1.layers.0(convnext.encoder.stages.1.layers.0,convnext.encoder.stages.1.downsampling_layer) "
        "head(convnext.layernorm,classifier)",
    ),
    "t5": (
        t5,
        pair,
        "embeddings(shared,encoder.embed_tokens,decoder.embed_tokens)* encoder.block.0 "
        "encoder.block.1(encoder.block.1,encoder.final_layer_norm) decoder.block.0 decoder.block.1 head(decoder.final_layer_norm,lm_head)",
    ),
    "bart": (
        bart,
        pair,
        "embeddings(model.shared,model.encoder.embed_tokens,model.encoder.embed_positions,model.encoder.layernorm_embedding)* "
        "model.encoder.layers.0 model.encoder.layers.1 "
        "model.decoder.embeddings(model.decoder.embed_tokens,model.decoder.embed_positions,model.decoder.layernorm_embedding) "
        "model.decoder.layers.0 model.decoder.layers.1 head(lm_head)",
    ),
}


def described(model: nn.Module, layers: Sequence[Layer]) -> str:
    """name(modules where they are not just the one of the name), * for a layer with shared weights."""
    path = {m: name for name, m in model.named_modules()}
    words = []
    for layer in layers:
        modules = ",".join(path[m] for m in layer.modules)
        words.append(layer.name + (f"({modules})" if modules != layer.name else "") + "*" * bool(layer.tied))
    return " ".join(words)


def names(layers: Sequence[Layer]) -> list[str]:
    return [layer.name for layer in layers]


def assert_whole(model: nn.Module, layers: Sequence[Layer]) -> None:
    """Every trainable parameter in exactly one layer, and nothing else; positions, kinds and the shared ones as they should be."""
    owned = [p for layer in layers for p in layer.params]
    assert sorted(map(id, owned)) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    assert [layer.position for layer in layers] == list(range(len(layers)))
    assert [layer.kind for layer in layers].count("head") == 1 and layers[-1].kind == "head"
    for layer in layers:
        behind = {id(p) for other in layers[layer.position + 1 :] for p in other.borrowed}
        assert {id(p) for p in layer.tied} == {id(p) for p in layer.params} & behind
        assert layer.numel == sum(p.numel() for p in layer.params)
    assert sum(layer.numel for layer in layers) == sum(p.numel() for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("name", list(FAMILIES))
def test_families(name: str) -> None:
    make, feed, expected = FAMILIES[name]
    model = make()
    layers = find_layers(model)
    assert described(model, layers) == expected
    assert_whole(model, layers)
    assert [layer.kind for layer in layers] == [
        "embedding" if n.endswith("embeddings") else "head" if n == "head" else "block" for n in names(layers)
    ]
    check = OrderCheck(model, layers)
    model(**feed())  # raises, and warnings are errors, if the order is wrong
    assert check.done
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())


def test_tied_weights_belong_to_the_front() -> None:
    model = gpt2()
    embeddings, *_, head = find_layers(model)
    assert embeddings.tied == head.borrowed == (model.lm_head.weight,)
    assert head.params == (model.transformer.ln_f.weight, model.transformer.ln_f.bias)
    model = bart()  # the decoder's own embedding layer uses it too
    layers = find_layers(model)
    assert [layer.borrowed for layer in layers if layer.borrowed] == [(model.lm_head.weight,)] * 2


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (
            lambda: nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.LayerNorm(4), nn.Linear(4, 4), nn.Dropout(), nn.Linear(4, 2)),
            "0(0,1,2) 3(3,4) 5",
        ),
        (
            lambda: nn.Sequential(
                nn.Embedding(40, 4), nn.Dropout(), Residual(), nn.Dropout(), Residual(), nn.LayerNorm(4), nn.Linear(4, 2)
            ),
            "embeddings(0,1) 2(2,3) 4 head(5,6)",
        ),
        (
            lambda: Net(embed=nn.Embedding(40, 4), blocks=nn.ModuleList(Residual() for _ in range(12)), out=nn.Linear(4, 2)),
            f"embeddings(embed) {' '.join(f'blocks.{i}' for i in range(12))} head(out)",
        ),
        (
            lambda: Net(fc1=nn.Linear(4, 4), bn=nn.BatchNorm1d(4), fc2=nn.Linear(4, 4), out=nn.Linear(4, 2)),
            "fc1(fc1,bn) fc2 out",
        ),
        (
            lambda: Net(
                features=nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten()),
                classifier=nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 2)),
            ),
            "features.0(features.0,features.1) features.2(features.2,features.3) classifier.0(classifier.0,classifier.1) classifier.2",
        ),
        (
            lambda: Net(wrapped=Net(a=nn.Linear(4, 9), b=nn.Linear(9, 9), c=nn.Linear(9, 4)), out=nn.Linear(4, 2)),
            "wrapped.a wrapped.b wrapped.c out",
        ),
        (  # one block a stage
            lambda: Net(layer1=nn.Sequential(Residual()), layer2=nn.Sequential(Residual()), fc=nn.Linear(4, 2)),
            "layer1.0 layer2.0 head(fc)",
        ),
        (  # stages that are lists themselves
            lambda: Net(stages=nn.Sequential(*(nn.Sequential(Residual(), Residual()) for _ in range(2))), fc=nn.Linear(4, 2)),
            "stages.0.0 stages.0.1 stages.1.0 stages.1.1 head(fc)",
        ),
        (  # no head of its own: the last block is it
            lambda: Net(embed=nn.Embedding(40, 4), blocks=nn.ModuleList([Residual(), Residual()])),
            "embeddings(embed) blocks.0 blocks.1",
        ),
    ],
)
def test_plain_models(model: Callable[[], nn.Module], expected: str) -> None:
    net = model()
    layers = find_layers(net)
    assert described(net, layers) == expected
    assert_whole(net, layers)
    first = next(net.parameters())
    feed = ids(2, 3) if first.shape[0] == 40 else torch.randn(2, 3, 8, 8) if first.dim() == 4 else torch.randn(2, 4)
    check = OrderCheck(net, layers)
    net(feed)
    assert check.done


def test_parameters_directly_on_the_model_are_embeddings() -> None:
    net = Net(blocks=nn.ModuleList([Residual(), Residual()]), cls_token=nn.Parameter(torch.zeros(4)), out=nn.Linear(4, 2), run="blocks out")
    layers = find_layers(net)
    assert layers[0].kind == "embedding" and layers[0].params == (net.cls_token,) and layers[0].modules == ()
    assert_whole(net, layers)


def test_an_output_projection_called_embed_is_the_head() -> None:
    net = Net(embed_in=nn.Embedding(40, 4), blocks=nn.ModuleList([Residual(), Residual()]), embed_out=nn.Linear(4, 40))
    assert described(net, find_layers(net)) == "embeddings(embed_in) blocks.0 blocks.1 head(embed_out)"


def test_parameters_that_the_user_froze_are_left_out() -> None:
    model = gpt2()
    model.transformer.h[1].requires_grad_(False)
    model.transformer.h[2].ln_1.requires_grad_(False)
    model.transformer.wte.weight.requires_grad_(False)
    layers = find_layers(model)
    assert names(layers) == names(find_layers(gpt2()))
    assert layers[2].params == () and layers[2].numel == 0
    assert not {id(p) for p in model.transformer.h[2].ln_1.parameters()} & {id(p) for p in layers[3].params}
    assert layers[0].tied == layers[-1].borrowed == ()
    assert_whole(model, layers)


def test_a_shared_module_is_one_layer() -> None:
    block = Residual()
    net = Net(embed=nn.Embedding(40, 4), blocks=nn.ModuleList([block, Residual(), block, Residual()]), again=block, out=nn.Linear(4, 2))
    layers = find_layers(net)
    assert described(net, layers) == "embeddings(embed) blocks.0 blocks.1 blocks.3 head(out)"
    assert_whole(net, layers)
    check = OrderCheck(net, layers)
    net(ids(2, 3))
    assert check.done
    listed = find_layers(net, ["embed", "blocks.*"])
    assert names(listed) == ["embed", "blocks.0", "blocks.1", "blocks.3", "head"]
    assert_whole(net, listed)


def test_a_module_inside_two_blocks_belongs_to_the_front_one() -> None:
    blocks = [Residual(), Residual()]
    blocks[1].norm = blocks[0].norm
    net = Net(blocks=nn.ModuleList(blocks), out=nn.Linear(4, 2))
    layers = find_layers(net)
    shared = (blocks[0].norm.weight, blocks[0].norm.bias)
    assert layers[0].tied == layers[1].borrowed == shared
    assert_whole(net, layers)
    with pytest.raises(ValueError, match=r"smartfrz\.tied: got 'train', but layer 'blocks\.0' shares a weight of shape \(4,\).*'freeze'"):
        check_tied(layers, "train")
    check_tied(layers, "freeze")


# ---- layers listed by hand -------------------------------------------------------------------------------------------------------


def test_patterns() -> None:
    model = gpt2(n_layer=12)
    layers = find_layers(model, ["transformer.w?e", "transformer.h.*"])
    assert names(layers) == ["transformer.wte", "transformer.wpe", *(f"transformer.h.{i}" for i in range(12)), "head"]
    assert [layer.kind for layer in layers] == ["embedding"] * 2 + ["block"] * 12 + ["head"]
    assert described(model, layers[-1:]) == "head(transformer.ln_f,lm_head)"
    assert_whole(model, layers)
    # the order of the patterns is the order of the layers; parts of blocks and single parameters are fine
    layers = find_layers(model, ["transformer.h.1", "transformer.h.0.mlp", "transformer.wte.weight", "transformer.ln_f"])
    assert names(layers) == ["transformer.h.1", "transformer.h.0.mlp", "transformer.wte.weight", "transformer.ln_f", "head"]
    assert_whole(model, layers)


def test_when_everything_is_listed_the_last_is_the_head() -> None:
    net = Net(fc1=nn.Linear(4, 4), fc2=nn.Linear(4, 4), out=nn.Linear(4, 2))
    layers = find_layers(net, ["fc?", "out"])
    assert names(layers) == ["fc1", "fc2", "out"] and layers[-1].kind == "head"
    assert_whole(net, layers)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["transformer.h.*", "encoder.layer"], r"smartfrz\.layers: 'encoder\.layer' matches no module .* nearest names are '"),
        (["h.*"], r"smartfrz\.layers: 'h\.\*' matches no module"),
        (["transformer.h.1.*.*.*.*"], r"matches no module"),
        (["transformer.hh.0"], r"nearest names are 'transformer\.h\.0'"),
        (["transformer.drop"], r"'transformer\.drop' matches no module or parameter with weights"),
        (["transformer.h.*", "transformer.h.1"], r"'transformer\.h\.1' matches 'transformer\.h\.1', but 'transformer\.h\.\*' has already"),
        (["transformer.h.1.mlp", "*.h.1.mlp"], r"matches 'transformer\.h\.1\.mlp', but 'transformer\.h\.1\.mlp' has already taken"),
        (["transformer.h.*", "transformer.h.*.*"], r"makes 'transformer\.h\.0' a layer, but all its weights are taken by 'transformer\.h"),
        ([], r"smartfrz\.layers: got \[\]"),
        ("transformer.h.*", r"smartfrz\.layers: got 'transformer\.h\.\*'; allowed: 'auto' or a list"),
    ],
)
def test_bad_patterns(patterns: str | list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_layers(gpt2(), patterns)


class Loose(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w_in = nn.Parameter(torch.randn(4, 4))
        self.w_out = nn.Parameter(torch.randn(4, 2))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Loose, "1 part"),
        (lambda: nn.Linear(4, 2), "1 part"),
        (lambda: Net(body=nn.LSTM(4, 4)), "1 part"),
        (lambda: Net(parts=nn.ModuleDict({"b": nn.Linear(4, 4), "a": nn.Linear(4, 4)})), "parts is a ModuleDict"),
    ],
)
def test_what_has_no_order_says_how_to_list_it(model: Callable[[], nn.Module], reason: str) -> None:
    net = model()
    with pytest.raises(ValueError, match=reason) as caught:
        find_layers(net)
    example = str(caught.value).split('"layers": [')[1].split("]")[0]
    listed = find_layers(net, [word.strip().strip('"') for word in example.split(",")])  # the example works as it stands
    assert_whole(net, listed)


def test_nothing_to_freeze() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        find_layers(gpt2().requires_grad_(False))


# ---- the order check -------------------------------------------------------------------------------------------------------------


def test_order_check_catches_another_order() -> None:
    net = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4), run="b a c")
    check = OrderCheck(net, find_layers(net))
    with pytest.raises(ValueError, match=r"structure: a, b, c\n  forward:   b, a, c\n.*\"layers\""):
        net(torch.randn(2, 4))
    assert check.done
    net(torch.randn(2, 4))  # once only
    OrderCheck(net, find_layers(net, ["b", "a", "c"]))
    net(torch.randn(2, 4))


def test_order_check_can_warn() -> None:
    net = Net(out=nn.Linear(4, 4), blocks=nn.ModuleList([Residual(), Residual()]), tail=nn.Linear(4, 4), run="tail blocks out")
    OrderCheck(net, find_layers(net), strict=False)
    with pytest.warns(UserWarning, match=r"forward:   head, embeddings, blocks\.0|forward:   head, blocks\.0, blocks\.1, embeddings"):
        net(torch.randn(2, 4))


def test_order_check_tells_of_a_head_that_begins_early() -> None:
    net = Net(blocks=nn.ModuleList([Residual(), Residual()]), stem=nn.Linear(4, 4), out=nn.Linear(4, 4), run="stem blocks out")
    layers = find_layers(net)
    assert described(net, layers) == "blocks.0 blocks.1 head(stem,out)"
    OrderCheck(net, layers)
    with pytest.warns(UserWarning, match="a part of layer 'head' runs before"):
        net(torch.randn(2, 4))


class Checkpointed(Net):
    def forward(self, x: Tensor) -> Tensor:
        for block in self.get_submodule("blocks").children():
            x = checkpoint(block, x, use_reentrant=False)
        return self.get_submodule("out")(x)


def test_order_check_sees_first_uses_only_and_forgets_a_forward_that_failed() -> None:
    net = Checkpointed(blocks=nn.ModuleList([Residual(), Residual()]), out=nn.Linear(4, 2))
    check = OrderCheck(net, find_layers(net))
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 7))  # stops in the first block
    net.get_submodule("out")(torch.randn(2, 4))  # a part alone is not a forward
    assert not check.done
    out = net(torch.randn(2, 4))
    assert check.done
    out.sum().backward()  # runs the blocks again
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in net.modules())
    looped = Net(blocks=nn.ModuleList([Residual(), Residual()]), out=nn.Linear(4, 4), run="blocks blocks out")
    OrderCheck(looped, find_layers(looped))
    looped(torch.randn(2, 4))


def test_order_check_survives_a_copy_of_the_model() -> None:
    net = Net(a=nn.Linear(4, 4), b=nn.Linear(4, 4), run="b a")
    check = OrderCheck(net, find_layers(net))
    copy.deepcopy(net)(torch.randn(2, 4))  # a copy is not looked at, and its forward is not the model's first
    assert not check.done
    with pytest.raises(ValueError, match="different order"):
        net(torch.randn(2, 4))


# ---- freezing on the side of the modules -----------------------------------------------------------------------------------------


class Noisy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(4, 4)
        self.bn = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.bn(self.lin(x)))


def noisy() -> tuple[nn.Module, tuple[Layer, ...]]:
    torch.manual_seed(0)
    net = nn.Sequential(Noisy(), Noisy(), nn.Linear(4, 2))
    return net, find_layers(net)


def statistics(module: nn.Module) -> list[Tensor]:
    return [b.clone() for b in module.buffers()]


def equal(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_eval_mode_stands_still_after_model_train() -> None:
    net, layers = noisy()
    net.train()
    before, x = statistics(net[0]), torch.randn(8, 4)
    freeze_modules(layers[0], "eval")
    assert not any(m.training for m in net[0].modules()) and net[1].training  # at once, before any forward
    reference = copy.deepcopy(net[0]).eval()(x)
    for _ in range(2):
        net.train()
        seen: list[Tensor] = []
        handle = net[1].register_forward_pre_hook(lambda module, args, seen=seen: seen.append(args[0]))
        other = statistics(net[1])
        net(x)
        handle.remove()
        assert torch.equal(seen[0], reference)  # no dropout, bit for bit
        assert equal(statistics(net[0]), before)
        assert not equal(statistics(net[1]), other)  # the active one goes on
    net.train()
    net[0].drop(x)  # a part called on its own stays in eval too
    assert not net[0].drop.training


def test_train_mode_leaves_the_modules_alone() -> None:
    net, layers = noisy()
    before, x = statistics(net[0]), torch.randn(8, 4)
    freeze_modules(layers[0], "train")
    assert not torch.equal(net[0](x), net[0](x)) and not equal(statistics(net[0]), before)
    assert all(m.training for m in net.modules())


def test_thaw_gives_the_flags_back() -> None:
    net, layers = noisy()
    net[0].bn.eval()  # the user's own wish
    freeze_modules(layers[0], "eval")
    freeze_modules(layers[0], "eval")  # twice is once
    assert not any(m._forward_pre_hooks for m in net.modules()), "a forward pays nothing for it"
    net.train()
    thaw_modules(layers[0], net.training)
    assert [m.training for m in net[0].modules()] == [True, True, False, True]
    assert not any("train" in vars(m) for m in net.modules())
    x, other = torch.randn(8, 4), statistics(net[1])
    assert not torch.equal(net[0](x), net[0](x))  # dropout is back
    freeze_modules(layers[1], "eval")
    net.eval()
    thaw_modules(layers[1], net.training)
    assert not any(m.training for m in net.modules()) and equal(statistics(net[1]), other)


def test_freezing_survives_copy_and_pickle_and_adds_no_key() -> None:
    net, layers = noisy()
    keys = list(net.state_dict())
    freeze_modules(layers[0], "eval")
    assert list(net.state_dict()) == keys
    x = torch.randn(8, 4)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):  # our own bytes
        assert list(twin.state_dict()) == keys
        before = statistics(twin[0])
        twin.train()
        twin(x)
        assert equal(statistics(twin[0]), before) and not twin[0].training
        thaw_modules(find_layers(twin)[0])
        assert twin[0].training and twin[0].drop.training and "train" not in vars(twin[0].drop)
        assert net[0].drop.train() is net[0].drop and not net[0].drop.training  # the original is another model
    model = gpt2()
    freeze_modules(find_layers(model)[0], "eval", "train")
    twin = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    assert list(twin.state_dict()) == list(gpt2().state_dict())
    assert twin.lm_head.weight is twin.transformer.wte.weight
    assert not twin.transformer.wte(ids(2)).requires_grad


def grads(model: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    model(**batch).logits.float().square().mean().backward()
    return {name: p.grad for name, p in model.named_parameters()}


def untied_grad(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """The oracle: the gradient of the shared weight through the head alone, from a model in which the head has a copy of its own."""
    twin = copy.deepcopy(model)
    twin.lm_head.weight = nn.Parameter(twin.lm_head.weight.detach().clone())
    twin(**batch).logits.float().square().mean().backward()
    grad = twin.lm_head.weight.grad
    assert grad is not None
    return grad


@pytest.mark.parametrize(
    ("make", "feed", "shared"),
    [(gpt2, text, "transformer.wte.weight"), (lambda: llama(True), text, "model.embed_tokens.weight"), (t5, pair, "shared.weight")],
)
def test_tied_train_cuts_the_front_use_only(make: Callable[[], nn.Module], feed: Callable[[], dict[str, Tensor]], shared: str) -> None:
    torch.manual_seed(0)
    model, batch = make().eval(), feed()
    layers = find_layers(model)
    check_tied(layers, "train")
    full, oracle = grads(model, batch), untied_grad(model, batch)
    both = full[shared]
    assert both is not None and not torch.equal(both, oracle)  # the front's use does count before
    freeze_modules(layers[0], "eval", "train")
    gone = leaving_params(layers[:1], layers, "train")
    assert model.get_parameter(shared).requires_grad and all(p is not model.get_parameter(shared) for p in gone)
    for p in gone:
        p.requires_grad_(False)
    frozen = grads(model, batch)
    assert torch.equal(frozen[shared], oracle)  # type: ignore[arg-type]
    for name in full:  # whatever is active learns as before, bit for bit
        owner = next(layer for layer in layers if any(p is model.get_parameter(name) for p in layer.params))
        if owner.position > 0:
            assert torch.equal(full[name], frozen[name]), name  # type: ignore[arg-type]
        elif name != shared:
            assert frozen[name] is None
    thaw_modules(layers[0])
    for p in gone:
        p.requires_grad_(True)
    model.eval()
    assert all(torch.equal(a, b) for a, b in zip(full.values(), grads(model, batch).values(), strict=True))  # type: ignore[arg-type]


def test_tied_cut_in_the_middle_loses_nothing_in_front() -> None:
    """order "any": BART's decoder embeddings freeze while the encoder in front of them is active."""
    torch.manual_seed(0)
    model, batch = bart().eval(), pair()
    layers = find_layers(model)
    check_tied(layers, "train")
    full = grads(model, batch)
    decoder = next(layer for layer in layers if layer.name == "model.decoder.embeddings")
    freeze_modules(decoder, "eval", "train")
    for p in leaving_params([decoder], layers, "train"):
        p.requires_grad_(False)
    frozen = grads(model, batch)
    changed = {name for name in full if frozen[name] is None or not torch.equal(full[name], frozen[name])}  # type: ignore[arg-type]
    own = {f"model.decoder.{part}" for part in ("embed_positions.weight", "layernorm_embedding.weight", "layernorm_embedding.bias")}
    assert changed == own | {"model.shared.weight"}


def test_which_parameters_leave_the_optimizer() -> None:
    model = gpt2()
    layers = find_layers(model)
    wte, wpe = model.transformer.wte.weight, model.transformer.wpe.weight
    everything = tuple(p for layer in layers for p in layer.params)

    def leaving(positions: Sequence[int], tied: Any) -> list[int]:
        return [id(p) for p in leaving_params([layers[i] for i in positions], layers, tied)]

    assert leaving([0], "train") == [id(wpe)]
    assert leaving([0], "freeze") == [id(wte), id(wpe)]
    assert leaving([0, 1], "train") == [id(wpe), *map(id, layers[1].params)]
    assert leaving([len(layers) - 1], "train") == list(map(id, layers[-1].params))  # the front still uses it
    assert leaving(range(len(layers)), "train") == leaving(range(len(layers)), "freeze") == list(map(id, everything))
    assert leaving([], "train") == []


def test_tied_freeze_cuts_nothing_by_itself() -> None:
    model, batch = gpt2().eval(), text()
    layers = find_layers(model)
    full = grads(model, batch)
    freeze_modules(layers[0], "eval", "freeze")
    assert torch.equal(full["transformer.wte.weight"], grads(model, batch)["transformer.wte.weight"])  # type: ignore[arg-type]
    for p in leaving_params(layers[:1], layers, "freeze"):
        p.requires_grad_(False)
    assert grads(model, batch)["transformer.wte.weight"] is None


def test_eval_holds_under_gradient_checkpointing() -> None:
    model = gpt2(attn_pdrop=0.5, resid_pdrop=0.5, embd_pdrop=0.5)
    model.activation_checkpointing_enable({"use_reentrant": False})
    layers = find_layers(model)
    batch = text()

    def repeats() -> bool:
        """Whether two steps after model.train() give the same gradients: no dropout anywhere, in the recomputation neither."""
        runs = []
        for _ in range(2):
            model.train()
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # transformers says that it switches its cache off
                runs.append(grads(model, batch))
        return all(torch.equal(a, b) for a, b in zip(runs[0].values(), runs[1].values(), strict=True))  # type: ignore[arg-type]

    assert not repeats()
    for layer in layers[:-1]:
        freeze_modules(layer, "eval", "freeze")
    assert repeats()
