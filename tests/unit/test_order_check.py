"""The order check: what it prints, what it asks of models whose modules run more than once, not at all, or beside each other."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import smartfrz_ds
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.model.order_check import OrderCheck

TEXT: dict[str, Any] = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}


class Runs(nn.Module):
    """The given children, called in the order of `run`, which may name one several times."""

    def __init__(self, run: str, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run.split()

    def forward(self, x: Tensor) -> Tensor:
        for name in self.run:
            x = self.get_submodule(name)(x)
        return x


def block() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4))


def checked(model: nn.Module, *inputs: Any, layers: Any = "auto", **more: Any) -> OrderCheck:
    """Warnings are errors here: nothing was told."""
    check = OrderCheck(model, find_layers(model, layers))
    model(*inputs, **more)
    assert check.done and not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    return check


def ids(*shape: int) -> Tensor:
    return torch.randint(3, 40, shape)


# --- the message ------------------------------------------------------------------------------------------------------------------


def test_an_embedding_that_runs_first_is_listed_first() -> None:
    """It used to be listed in front of the layer behind it, wherever that ran: here after the norm."""
    net = Runs("emb norm b a out", norm=nn.LayerNorm(4), emb=nn.Embedding(40, 4), a=nn.Linear(4, 4), b=nn.Linear(4, 4), out=nn.Linear(4, 4))
    OrderCheck(net, find_layers(net, ["norm", "emb", "a", "b"]))
    with pytest.raises(ValueError, match=r"structure: norm, emb, a, b, head\n  forward:   emb, norm, b, a, head\nList the layers"):
        net(ids(2, 3))


def test_a_layer_that_runs_in_several_places_is_listed_at_each() -> None:
    parts = {"embed_a": nn.Embedding(40, 4), "embed_norm": nn.LayerNorm(4), "blocks": nn.ModuleList([block(), block()]), "out": block()}
    net = Runs("embed_a blocks.1 embed_norm blocks.0 out blocks.1", **parts)
    OrderCheck(net, find_layers(net))
    with pytest.raises(ValueError) as told:
        net(ids(2, 3))
    assert "structure: embeddings, blocks.0, blocks.1, head\n" in str(told.value)
    assert "forward:   embeddings (embed_a), blocks.1, embeddings (embed_norm), blocks.0, head\n" in str(told.value)
    assert '"order": "any"' in str(told.value)


def test_a_head_that_runs_early_and_late_is_listed_at_both() -> None:
    net = Runs("stem blocks.1 blocks.0 out", blocks=nn.ModuleList([block(), block()]), stem=nn.Linear(4, 4), out=nn.Linear(4, 4))
    OrderCheck(net, find_layers(net))
    with pytest.raises(
        ValueError, match=r"structure: blocks\.0, blocks\.1, head\n  forward:   head \(stem\), blocks\.1, blocks\.0, head \(out\)"
    ):
        net(torch.randn(2, 4))


def test_what_is_registered_in_front_and_runs_at_the_end() -> None:
    """Background: an output layer that was registered before the blocks froze with the embeddings, and nothing said so."""
    blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
    parts: dict[str, nn.Module] = {"inp": nn.Linear(5, 4), "answer": nn.Linear(4, 3), "norm": nn.LayerNorm(4)}
    layers = find_layers(Runs("inp blocks.0 blocks.1 blocks.2 norm answer", **parts, blocks=blocks))
    assert [layer.name for layer in layers] == ["embeddings", "blocks.0", "blocks.1", "blocks.2", "head"]
    assert layers[-1].params == tuple(parts["answer"].parameters())
    net = Runs("inp blocks.0 blocks.1 blocks.2 norm answer", **parts, blocks=blocks)
    OrderCheck(net, find_layers(net))
    with pytest.warns(UserWarning, match=r"in front of the blocks, but run behind them: norm \(of layer 'embeddings'\)\. "):
        net(torch.randn(2, 5))
    checked(net, torch.randn(2, 5), layers=["inp", "blocks.*"])  # as the warning says
    # a matrix as wide as the blocks could run in front of them: only the forward tells
    net = Runs("inp blocks.0 blocks.1 blocks.2 answer", **(parts | {"answer": nn.Linear(4, 4)}), blocks=blocks)
    OrderCheck(net, find_layers(net))
    with pytest.warns(UserWarning, match=r"run behind them: answer \(of layer 'embeddings'\)"):
        net(torch.randn(2, 5))


def test_opt_registers_its_last_norm_in_front() -> None:
    """Its final_layer_norm used to freeze with the embeddings, as its project_out did."""
    shape = TEXT | {"ffn_dim": 32, "max_position_embeddings": 20, "word_embed_proj_dim": 8}
    model = transformers.OPTForCausalLM(transformers.OPTConfig(**shape))
    last = find_layers(model)[-1]
    names = {p: name for name, p in model.named_parameters()}
    ends = ["model.decoder.final_layer_norm.bias", "model.decoder.final_layer_norm.weight", "model.decoder.project_out.weight"]
    assert last.name == "head" and sorted(names[p] for p in last.params) == ends
    checked(model, ids(2, 6))


def test_a_long_forward_is_cut() -> None:
    net = Runs(" ".join(f"blocks.{i}" for i in reversed(range(80))), blocks=nn.ModuleList(block() for _ in range(80)))
    OrderCheck(net, find_layers(net))
    with pytest.raises(ValueError) as told:
        net(torch.randn(2, 4))
    line = str(told.value).split("forward:   ")[1].split("\n")[0]
    assert line.startswith("blocks.79, blocks.78") and line.endswith("blocks.20, …")


# --- nothing to tell --------------------------------------------------------------------------------------------------------------


def test_order_any_demands_none() -> None:
    def run(**settings: Any) -> None:
        net = Runs("b a c", a=nn.Linear(4, 4), b=nn.Linear(4, 4), c=nn.Linear(4, 4))
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
        controller = smartfrz_ds.attach_torch(net, optimizer, {"policy": "manual"} | settings)
        for _ in range(2):
            optimizer.zero_grad()
            net(torch.randn(2, 4)).sum().backward()
            optimizer.step()
        controller.freeze(["b"])
        assert controller.frozen == ("b",)

    run(order="any")
    with pytest.raises(ValueError, match=r"forward:   b, a, c\n"):
        run()
    run(layers=["b", "a"])


def test_order_any_of_parallel_towers() -> None:
    """CLIP runs its image tower before the text tower, which it registers first; neither is in front of the other."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    text = sizes | {"vocab_size": 40, "eos_token_id": 2, "bos_token_id": 0, "pad_token_id": 1, "max_position_embeddings": 16}
    config = transformers.CLIPConfig(text_config=text, vision_config=sizes | {"image_size": 8, "patch_size": 4}, projection_dim=16)
    model = transformers.CLIPModel(config)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "order": "any"})
    model(input_ids=ids(2, 5), pixel_values=torch.randn(2, 3, 8, 8), return_loss=True).loss.backward()
    optimizer.step()
    controller.freeze([name for name in controller.layers if name.startswith("vision_model")])


@pytest.mark.parametrize(
    "run",
    [
        "blocks.0 blocks.1 blocks.0 blocks.1 out",  # looped
        "blocks.0 blocks.0 blocks.1 blocks.0 out",
        "blocks.0 out",  # layer drop: a block that the first forward skips
        "blocks.1 out",
        "blocks.0 blocks.1",  # and a head that it does not reach
    ],
)
def test_modules_that_run_again_or_not_at_all(run: str) -> None:
    checked(Runs(run, blocks=nn.ModuleList([block(), block()]), out=nn.Linear(4, 4)), torch.randn(2, 4))


def test_a_head_that_runs_after_each_block_is_no_other_order() -> None:
    """Deep supervision, early exits: the last call of the head counts, and that it begins early is worth a warning."""
    net = Runs("blocks.0 out blocks.1 out", blocks=nn.ModuleList([block(), block()]), out=nn.Linear(4, 4))
    OrderCheck(net, find_layers(net))
    with pytest.warns(UserWarning, match="a part of layer 'head' runs before other layers"):
        net(torch.randn(2, 4))


def test_layer_drop_of_a_real_model() -> None:
    config = transformers.OPTConfig(
        vocab_size=40, hidden_size=16, ffn_dim=32, num_hidden_layers=6, num_attention_heads=2, word_embed_proj_dim=16, layerdrop=0.5
    )
    model = transformers.OPTForCausalLM(config).train()
    for seed in range(4):
        torch.manual_seed(seed)
        checked(model, input_ids=ids(2, 6))


def test_shared_blocks_of_albert() -> None:
    model = transformers.AlbertForMaskedLM(transformers.AlbertConfig(embedding_size=8, **TEXT))
    checked(model, input_ids=ids(2, 6))


def test_encoder_decoder() -> None:
    t5 = transformers.T5ForConditionalGeneration(
        transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    )
    checked(t5, input_ids=ids(2, 6), decoder_input_ids=ids(2, 4))
    checked(t5, input_ids=ids(2, 6), decoder_input_ids=ids(2, 4), layers=["shared", "encoder", "decoder"])
    encoded = t5.get_encoder()(input_ids=ids(2, 6))
    checked(t5, encoder_outputs=encoded, decoder_input_ids=ids(2, 4))  # the first forward of a generation
    OrderCheck(t5, find_layers(t5, ["shared", "decoder.block.*", "encoder.block.*"]))
    with pytest.raises(ValueError) as told:
        t5(input_ids=ids(2, 6), decoder_input_ids=ids(2, 4))
    assert (
        "forward:   head (encoder.embed_tokens), encoder.block.0, encoder.block.1, head (encoder.final_layer_norm), "
        "decoder.block.0, decoder.block.1, head (decoder.final_layer_norm)\n"
    ) in str(told.value)


class Multimodal(nn.Module):
    """The embeddings of the language model run first, as everywhere in transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(block(), block())
        self.lm = nn.ModuleDict({"embed": nn.Embedding(40, 4), "first": block(), "second": block()})
        self.out = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        text = self.lm["embed"](x)
        return self.out(self.lm["second"](self.lm["first"](text + self.tower(torch.ones(4)))))


def test_a_tower_runs_after_the_embeddings_of_the_language_model() -> None:
    for layers in (["tower.*", "lm"], ["tower", "lm.embed", "lm.first", "lm.second"], ["lm.embed", "tower", "lm.first", "lm.second"]):
        checked(Multimodal(), ids(2, 3), layers=layers)
    net = Multimodal()
    OrderCheck(net, find_layers(net, ["lm", "tower"]))
    with pytest.raises(ValueError, match=r"structure: lm, tower, head\n  forward:   lm \(lm\.embed\), tower, lm \(lm\.first\.0\), head\n"):
        net(ids(2, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checked(Multimodal(), ids(2, 3), layers=["tower", "lm"])
