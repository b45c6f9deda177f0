"""The count of `flops` against torch's own count of a real forward and a real backward."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from smartfrz_ds.model.flops import FlopMeter, FlopProfile, chain_profile, estimate_profile, saved_fraction, step_flops
from smartfrz_ds.model.freeze_modules import TiedMode, freeze_modules, leaving_params
from smartfrz_ds.model.layers import Layer, find_layers

aten = torch.ops.aten
# torch does not count the CPU's fused attention; the same formulas as for the GPU's
FUSED = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda g, q, k, v, *_, **__: sdpa_backward_flop_count(g, q, k, v),
}


def ids(*shape: int) -> Tensor:
    return torch.randint(0, 40, shape)


def gpt2(attention: str = "eager") -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=40, n_embd=16, n_layer=4, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0, attn_pdrop=0.0
    )  # the CPU's fused attention knows no dropout
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, num_key_value_heads=1, intermediate_size=32
    )
    return transformers.LlamaForCausalLM._from_config(config, attn_implementation="eager")


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=32, max_position_embeddings=16
    )
    return transformers.BertForSequenceClassification._from_config(config, attn_implementation="eager")


def t5() -> nn.Module:
    config = transformers.T5Config(vocab_size=40, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    return transformers.T5ForConditionalGeneration(config)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))


def cnn() -> nn.Module:
    def block(a: int, b: int, stride: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(a, b, 3, stride, 1), nn.BatchNorm2d(b), nn.ReLU())

    return nn.Sequential(block(3, 4, 1), block(4, 6, 2), block(6, 6, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 2))


def loss_of(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> Tensor:
    out = model(**batch) if isinstance(batch, dict) else model(batch)
    return (out if isinstance(out, Tensor) else out.logits).square().mean()


def counted(model: nn.Module, batch: Tensor | dict[str, Tensor]) -> tuple[int, int]:
    """torch's count of a real forward and of its backward."""
    forward = FlopCounterMode(display=False, custom_mapping=FUSED)
    with forward:
        loss = loss_of(model, batch)
    backward = FlopCounterMode(display=False, custom_mapping=FUSED)
    with backward:
        loss.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def measured(model: nn.Module, layers: tuple[Layer, ...], batch: Tensor | dict[str, Tensor], tied: TiedMode = "train") -> FlopProfile:
    meter = FlopMeter(model, layers, tied)
    loss_of(model, batch).backward()
    assert meter.profile is not None
    return meter.profile


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor | dict[str, Tensor]]]] = {
    "mlp": (mlp, lambda: torch.randn(7, 5)),
    "cnn": (cnn, lambda: torch.randn(2, 3, 8, 8)),
    "bert": (bert, lambda: {"input_ids": ids(2, 6)}),
    "gpt2": (gpt2, lambda: {"input_ids": ids(2, 6)}),
    "gpt2-sdpa": (lambda: gpt2("sdpa"), lambda: {"input_ids": ids(2, 6)}),
    "llama": (llama, lambda: {"input_ids": ids(2, 6)}),
    "t5": (t5, lambda: {"input_ids": ids(2, 6), "decoder_input_ids": ids(2, 4)}),
}


@pytest.mark.parametrize("tied", ["train", "freeze"])
@pytest.mark.parametrize("name", list(MODELS))
def test_equals_torch_on_a_real_backward(name: str, tied: TiedMode) -> None:
    torch.manual_seed(0)
    make, feed = MODELS[name]
    model, batch = make(), feed()
    layers = find_layers(model)
    profile = measured(model, layers, batch, tied)
    last = len(layers) - 1
    costs = []
    for frozen in [(), (0,), (0, 1), tuple(range(last)), (1,), (1, 2), (last - 1,), (0, 2), (last,)]:
        # The frozen head of a tied model still uses the weight that the front trains; there "frozen" says nothing of that use.
        if frozen == (last,) and layers[last].borrowed:
            continue
        model = make()
        layers = find_layers(model)
        gone = leaving_params([layers[i] for i in frozen], layers, tied)
        for p in gone:
            p.requires_grad_(False)
        for i in frozen:
            freeze_modules(layers[i], "train", tied)
        forward, backward = counted(model, batch)
        cost = step_flops(profile, frozen)
        assert (cost.forward, cost.backward_input + cost.backward_weight) == (forward, backward), frozen
        costs.append(cost.total)
    assert costs[0] > costs[2] > costs[3]  # freezing really changes what was compared
    assert saved_fraction(profile, (0, 1)) == pytest.approx(1 - costs[2] / costs[0])


def test_forward_of_each_layer() -> None:
    model = mlp()
    profile = measured(model, find_layers(model), torch.randn(7, 5))
    assert profile.forward == (2 * 7 * 5 * 8, 2 * 7 * 8 * 8, 2 * 7 * 8 * 8, 2 * 7 * 8 * 3)
    assert step_flops(profile, ()) == (sum(profile.forward), sum(profile.forward[1:]), sum(profile.forward))
    assert step_flops(profile, (0, 2)) == (sum(profile.forward), sum(profile.forward[2:]), profile.forward[1] + profile.forward[3])
    # the tied head's product is counted where it runs, not where its weight lives
    model = gpt2()
    profile = measured(model, find_layers(model), {"input_ids": ids(2, 6)})
    assert profile.forward[0] == 0 and profile.forward[-1] == 2 * 12 * 16 * 40
    assert len(set(profile.forward[1:-1])) == 1


def test_chain_and_estimate_agree_with_a_measured_chain() -> None:
    model = mlp()
    layers = find_layers(model)
    profile = measured(model, layers, torch.randn(7, 5))
    estimate = estimate_profile(layers, 7)
    for frozen in [(), (0,), (0, 1, 2), (1,), (3,), (0, 1, 2, 3)]:
        assert step_flops(profile.forward, frozen) == step_flops(profile, frozen) == step_flops(estimate, frozen)
        assert step_flops(chain_profile(profile.forward), frozen) == step_flops(profile, frozen)
    assert saved_fraction(profile, (0, 1, 2, 3)) == pytest.approx(1 - sum(profile.forward) / step_flops(profile, ()).total)


def test_estimate_takes_lookups_for_free_and_counts_the_tied_head() -> None:
    layers = find_layers(gpt2())
    estimate = estimate_profile(layers, 12)
    assert estimate.forward[0] == 0
    assert estimate.forward[-1] == 2 * 12 * 16 * 40
    assert estimate.forward[1] == 2 * 12 * (16 * 48 + 16 * 16 + 2 * 16 * 64)
    with pytest.raises(ValueError, match="tokens: got 0"):
        estimate_profile(layers, 0)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_does_not_change_the_count(reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front = nn.Linear(5, 8)
            self.body = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
            self.out = nn.Linear(8, 2)
            self.on = True

        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x)
            for block in self.body:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.on else block(x)
            return self.out(x)

    model = Checkpointed()
    layers = find_layers(model)
    with_it = measured(model, layers, torch.randn(4, 5))
    model.on = False
    assert measured(model, layers, torch.randn(4, 5)) == with_it


def test_fused_attention_is_counted_as_one_operation() -> None:
    seen = FlopCounterMode(display=False, custom_mapping=FUSED)
    with seen:
        loss_of(gpt2("sdpa"), {"input_ids": ids(2, 6)}).backward()
    assert set(FUSED) <= set(seen.get_flop_counts()["Global"])
    one = measured(model := gpt2("sdpa"), find_layers(model), {"input_ids": ids(2, 6)})
    other = measured(model := gpt2("eager"), find_layers(model), {"input_ids": ids(2, 6)})
    assert one.forward == other.forward
    # its backward makes the scores again: a fifth product
    assert step_flops(one, ()).backward_input - step_flops(other, ()).backward_input == 4 * 2 * 12 * 6 * 16


class Through(torch.autograd.Function):
    """As DeepSpeed's ZeRO-3 hooks: an identity that detaches inside."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


@pytest.mark.parametrize("cut", [False, True])
def test_a_detach_cuts_unless_an_autograd_function_does_it(cut: bool) -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.front, self.middle, self.back = nn.Linear(5, 5), nn.Linear(5, 5), nn.Linear(5, 5)

        def forward(self, x: Tensor) -> Tensor:
            x = self.front(x)
            return self.back(self.middle(x.detach() if cut else Through.apply(x)))

    model, batch = Split(), torch.randn(3, 5)
    profile = measured(model, find_layers(model), batch)
    forward, backward = counted(model, batch)
    cost = step_flops(profile, ())
    assert cost.forward == forward == 3 * 150
    if cut:  # the front gets no gradient at all; its weight's product is noted, for it would be active
        assert (cost.backward_input, backward) == (150, 3 * 150)
    else:
        assert (cost.backward_input, cost.backward_input + cost.backward_weight) == (300, backward)


def test_user_frozen_weights_are_no_ones_gradient() -> None:
    model = mlp()
    model[2].requires_grad_(False)
    layers = find_layers(model)
    batch = torch.randn(7, 5)
    profile = measured(model, layers, batch)
    forward, backward = counted(model, batch)
    cost = step_flops(profile, ())
    assert (cost.forward, cost.backward_input + cost.backward_weight) == (forward, backward)
    assert profile.forward[1] == 2 * 7 * 8 * 8  # its forward is still its own
    assert step_flops(profile, (0,)).backward_input == sum(profile.forward[3:])


def test_the_meter_waits_for_a_forward_with_gradients_and_leaves_no_trace() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = mlp()
            self.fail = True

        def forward(self, x: Tensor) -> Tensor:
            y = self.body(x)
            if self.fail:
                raise RuntimeError("no luck")
            return y

    model = Fails()
    meter = FlopMeter(model, find_layers(model))
    with pytest.raises(RuntimeError, match="no luck"):
        model(torch.randn(7, 5))
    assert meter.profile is None
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    model.fail = False
    with torch.no_grad():
        model(torch.randn(7, 5))
    assert meter.profile is None
    x = torch.randn(7, 5)
    model(x)
    first = meter.profile
    assert first is not None and first.forward[0] == 2 * 7 * 5 * 8
    assert not model._forward_hooks and not model._forward_pre_hooks
    model(torch.randn(14, 5))
    assert meter.profile is first


def test_wrong_position() -> None:
    with pytest.raises(ValueError, match="got position 4; allowed: 0 to 3"):
        step_flops([1.0, 1.0, 1.0, 1.0], (4,))


# --- kernels that cannot be counted -------------------------------------------------------------------------------------------------


class FlexSelfAttention(nn.Module):
    """Self-attention by a kernel. Its inputs require no gradient: FlexAttention has no backward on a CPU."""

    def __init__(self, width: int, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.qkv, self.out, self.attend = nn.Linear(width, 3 * width), nn.Linear(width, width), attend

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).detach().unflatten(-1, (3, 2, -1)).permute(2, 0, 3, 1, 4)
        return x + self.out(self.attend(q, k, v).transpose(1, 2).flatten(2))


class Attending(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], width: int = 8) -> None:
        super().__init__()
        self.stem = nn.Linear(width, width)
        self.blocks = nn.ModuleList(FlexSelfAttention(width, attend) for _ in range(2))
        self.head = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def expected(batch: int, length: int, width: int) -> tuple[float, ...]:
    linear, attention = 2.0 * batch * length * width * width, 4.0 * batch * length * length * width
    return (linear, 4 * linear + attention, 4 * linear + attention, linear)


class Invisible(torch.autograd.Function):
    """As a Triton kernel: an empty tensor is made, and filled outside of torch."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = torch.empty(q.shape)
        made.numpy()[:] = 1.0
        return made


@torch.library.custom_op("smartfrz_tests::attention", mutates_args=())
def custom_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1) @ v


@pytest.mark.parametrize(("attend", "named"), [(Invisible.apply, "outside of torch's dispatcher"), (custom_attention, "smartfrz_tests")])
def test_layers_with_kernels_that_cannot_be_counted_are_estimated_by_the_kinds_of_their_modules(attend: Any, named: str) -> None:
    model = Attending(attend)
    meter = FlopMeter(model, find_layers(model))
    model(torch.randn(3, 5, 8)).sum().backward()
    assert meter.profile is not None and meter.profile.forward == expected(3, 5, 8)
    assert meter.profile.gradients == chain_profile(expected(3, 5, 8)).gradients, "the path of gradients through the kernel is unknown too"
    assert meter.estimated.startswith("2 layers run kernels") and named in meter.estimated


def test_flex_attention_runs_compiled_while_it_is_measured() -> None:
    """Background: below a TorchDispatchMode torch 2.13 compiles nothing, and FlexAttention, which compiles itself, failed in the first
    forward ("found no compiled frames"). Earlier versions ran it in its dense form."""
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    if not hasattr(torch.utils._python_dispatch.TorchDispatchMode, "ignore_compile_internals"):
        pytest.skip("this torch compiles nothing below a mode")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph.code)
        return graph.forward

    model = Attending(torch.compile(flex, backend=backend))
    meter = FlopMeter(model, find_layers(model))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model(torch.randn(2, 128, 8))
    assert len(graphs) == 1 and "flex_attention" in graphs[0], "one compiled graph, for both blocks"
    assert meter.profile is not None and all(a >= b for a, b in zip(meter.profile.forward, expected(2, 128, 8), strict=True))


def test_a_compiled_model_with_flex_attention_is_not_measured() -> None:
    flex = pytest.importorskip("torch.nn.attention.flex_attention").flex_attention
    model = Attending(flex)
    model.blocks[0].compile()
    meter = FlopMeter(model, find_layers(model))
    meter._enter(model, (), {})
    assert meter.profile is None and meter.estimated.startswith("FlexAttention in a compiled model")
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
