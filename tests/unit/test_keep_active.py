"""What the patterns of keep_active pick: layers by their names, or the layers that contain a module or parameter."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import smartfrz_ds
from smartfrz_ds.cli.doctor_config import check_model
from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.keep_active import KeptActive, keep_active, names_inside
from smartfrz_ds.model.layers import find_layers

H = ["transformer.h.0", "transformer.h.1", "transformer.h.2"]


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=3, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0)
    return transformers.GPT2LMHeadModel(config)


def kept(model: nn.Module, *patterns: str, layers: Any = "auto") -> KeptActive:
    found = find_layers(model, layers)
    return keep_active(patterns, found, names_inside(model, found), "smartfrz.keep_active")


def test_a_pattern_that_names_layers_picks_no_others() -> None:
    found = kept(gpt2(), "*.h.2", "embeddings", "*h.2")
    assert found.names == {"embeddings", "transformer.h.2"} and found.inside == {} and found.describe("smartfrz.keep_active") == ""
    assert kept(gpt2()).names == frozenset()


@pytest.mark.parametrize(
    ("pattern", "names", "first"),
    [
        ("*ln_2*", H, "transformer.h.0.ln_2"),  # the usual wish: no norm ever freezes
        ("transformer.h.1.attn", ["transformer.h.1"], "transformer.h.1.attn"),
        ("*.wpe", ["embeddings"], "transformer.wpe"),  # a module of a layer that gathers several
        ("*.h.[01].mlp.c_fc", H[:2], "transformer.h.0.mlp.c_fc"),
        ("*.h.2.attn.c_attn.bias", ["transformer.h.2"], "transformer.h.2.attn.c_attn.bias"),  # a parameter
        ("transformer.ln_f", ["head"], "transformer.ln_f"),
        ("lm_head*", ["head"], "lm_head"),
        ("transformer.h.?.*", H, "transformer.h.0.ln_1"),
    ],
)
def test_a_pattern_may_name_what_is_inside_of_layers(pattern: str, names: list[str], first: str) -> None:
    found = kept(gpt2(), pattern)
    assert found.names == set(names) and list(found.inside[pattern]) == names and found.inside[pattern][names[0]] == first
    line = found.describe("smartfrz.keep_active")
    many = f"{len(names)} layers, which stay" if len(names) > 1 else "a layer, which stays"
    assert line.startswith(f"smartfrz.keep_active: {pattern!r} matches modules inside {many} active as a whole: ")
    assert all(f"{name} (" in line for name in names) and "\n" not in line
    assert found.reason(names[0]) == f"{pattern!r} names {first} in it" and found.reason("nothing") == ""


def test_modules_of_shared_listed_and_user_frozen_layers() -> None:
    model = gpt2()
    model.get_submodule("transformer.h.1").requires_grad_(False)
    assert kept(model, "*.attn").names == set(H)  # it may be thawed later
    assert kept(model, "*.attn", layers=["transformer.w?e", "transformer.h.0.attn", "transformer.h.2"]).names == {
        "transformer.h.0.attn"  # a layer's own name: nothing else is looked for
    }
    assert kept(model, "*.c_attn", layers=["transformer.w?e", "transformer.h.0.attn", "transformer.h.2"]).names == {
        "transformer.h.0.attn", "transformer.h.2", "head",
    }  # fmt: skip
    block = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    other = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    shared = nn.Sequential(block, other, block, nn.Linear(4, 2))
    assert kept(shared, "2.0").names == kept(shared, "0.0").names == {"0"}  # one module under two names


def test_what_matches_nothing_is_an_error_with_near_names() -> None:
    with pytest.raises(ValueError, match=r"smartfrz\.keep_active: 'embedings' matches no layer and no module .* are 'embeddings'"):
        kept(gpt2(), "embedings")
    with pytest.raises(ValueError, match=r"'transformer\.h\.1\.atn' matches no layer and no module .*'transformer\.h\.1\.attn'"):
        kept(gpt2(), "*", "transformer.h.1.atn")
    with pytest.raises(ValueError, match=r"'transformer\.h\.7\.attn' matches no layer"):
        kept(gpt2(), "transformer.h.7.attn")


def test_long_lists_are_cut() -> None:
    net = nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4)) for _ in range(20)), nn.Linear(4, 2))
    line = kept(net, "*.1").describe("key")
    assert "inside 20 layers" in line and line.endswith("7 (7.1), 12 more")


def test_a_run_says_it_once_and_holds_to_it(caplog: pytest.LogCaptureFixture) -> None:
    model = gpt2()
    optimizer = torch.optim.AdamW(model.parameters())
    with caplog.at_level(logging.INFO, logger="smartfrz_ds"):
        controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "keep_active": ["*.h.1.mlp"]})
    lines = [r.getMessage() for r in caplog.records if "keep_active" in r.getMessage()]
    assert len(lines) == 1 and "'*.h.1.mlp'" in lines[0] and "transformer.h.1 (transformer.h.1.mlp)" in lines[0]
    with pytest.raises(ValueError, match=r"\['transformer\.h\.1'\] stay active by smartfrz\.keep_active"):
        controller.freeze(["embeddings", "transformer.h.0", "transformer.h.1"])
    controller.freeze(["embeddings", "transformer.h.0"])
    assert controller.frozen == ("embeddings", "transformer.h.0")
    with pytest.raises(ValueError, match="'nothing' matches no layer"):
        smartfrz_ds.attach_torch(other := gpt2(), torch.optim.AdamW(other.parameters()), {"policy": "manual", "keep_active": ["nothing"]})


def test_the_doctor_says_which_module_keeps_a_layer_active() -> None:
    found, facts = check_model(gpt2(), None, FreezeConfig.load({"keep_active": ["*.h.1.attn", "*.h.2"]}))
    reasons = {fact.name: fact.reason for fact in facts}
    assert reasons["transformer.h.1"] == "smartfrz.keep_active: '*.h.1.attn' names transformer.h.1.attn in it"
    assert reasons["transformer.h.2"] == "smartfrz.keep_active"
    assert any("'*.h.1.attn' matches modules inside a layer, which stays active" in x.text for x in found)
