"""The probe in one process: it sees each layer's output, and the model is afterwards as if nothing had been."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from smartfrz_ds.model.activation_checkpointing import RecomputeBoundary
from smartfrz_ds.model.flops import FlopMeter
from smartfrz_ds.model.forward_mode import ForwardMode
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.model.order_check import OrderCheck
from smartfrz_ds.predictor.similarity import centered_gram, probe_rows
from smartfrz_ds.signals.probe import Probe

CPU = torch.device("cpu")


class Restless(nn.Module):
    """Running statistics, dropout as a module and as a function that ignores the mode, and random numbers of all three kinds."""

    def __init__(self, breaks: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.breaks = breaks
        self.inp = nn.Linear(5, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)) for _ in range(3))
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inp(x) + random.random() + np.random.rand()
        for block in self.blocks:
            x = nn.functional.dropout(block(x), 0.1, training=True)
        if self.breaks:
            raise RuntimeError("broken")
        return self.head(x)


def snapshot(model: nn.Module) -> tuple[Any, ...]:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    numbers = np.random.get_state()
    return (
        state,
        [m.training for m in model.modules()],
        torch.get_rng_state(),
        random.getstate(),
        (numbers[0], numbers[1].tolist(), *numbers[2:]),
    )  # type: ignore[index,union-attr]


@pytest.mark.parametrize("breaks", [False, True])
def test_the_model_and_all_random_numbers_are_as_before(breaks: bool) -> None:
    model = Restless(breaks)
    model.blocks[1].eval()  # the user's own wish
    layers = find_layers(model)
    before = snapshot(model)
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    probe = Probe(model, layers, torch.randn(6, 5, generator=torch.Generator().manual_seed(1)), 4, CPU)
    if breaks:
        with pytest.raises(RuntimeError, match="broken"):
            probe.grams(keep=True)
    else:
        assert probe.grams(keep=True).keys() == {"embeddings", "blocks.0", "blocks.1", "blocks.2", "head"}
        assert probe.grams(keep=False) == {}
    after = snapshot(model)
    assert all(torch.equal(before[0][k], after[0][k]) for k in before[0])
    assert before[1] == after[1] and torch.equal(before[2], after[2]) and before[3:] == after[3:]
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert all(p.grad is None for p in model.parameters())


def test_matrices_are_those_of_the_layers_outputs_in_eval_mode() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Dropout(0.5)) for _ in range(3)), nn.Linear(5, 2)).train()
    layers, x = find_layers(model), torch.randn(7, 5)
    grams = Probe(model, layers, x, 4, CPU).grams(keep=True)
    with torch.no_grad():
        out = x[:4]
        for layer, part in zip(layers, model, strict=True):
            out = part[0](out) if isinstance(part, nn.Sequential) else part(out)
            assert torch.equal(grams[layer.name], centered_gram(out)) and grams[layer.name].shape == (4, 4)


def test_a_batch_may_be_a_tensor_a_tuple_or_a_dict() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor, factor: Tensor | float = 1.0, *, mask: Tensor | None = None) -> Tensor:
            x = x * (factor[:, None] if isinstance(factor, Tensor) else factor)
            for block in self.blocks:
                x = block(x if mask is None else x * mask)
            return self.head(x)

    model = Two()
    layers, x, factor = find_layers(model), torch.randn(5, 3), torch.arange(5.0)
    plain = Probe(model, layers, x, 3, CPU).grams(keep=True)
    assert torch.equal(Probe(model, layers, {"x": x, "mask": torch.ones(5, 3)}, 3, CPU).grams(keep=True)["head"], plain["head"])
    assert torch.equal(Probe(model, layers, (x, 1.0), 3, CPU).grams(keep=True)["head"], plain["head"])
    assert not torch.equal(Probe(model, layers, [x, factor], 3, CPU).grams(keep=True)["head"], plain["head"])


def test_a_bert_is_probed_with_what_its_tokenizer_gives() -> None:
    from transformers import BatchEncoding

    config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    model = BertForSequenceClassification(config)
    layers = find_layers(model)
    batch = BatchEncoding({"input_ids": torch.randint(0, 50, (6, 9)), "attention_mask": torch.ones(6, 9, dtype=torch.long)})
    grams = Probe(model, layers, batch, 4, CPU).grams(keep=True)
    assert list(grams) == [layer.name for layer in layers]
    with torch.no_grad():
        hidden = model.eval()(**{k: v[:4] for k, v in batch.items()}, output_hidden_states=True).hidden_states
    for layer, state in zip(layers, hidden, strict=False):
        assert torch.equal(grams[layer.name], centered_gram(probe_rows(state)))


def test_an_output_without_a_row_for_each_input_is_left_out() -> None:
    class Turned(nn.Module):
        """Its second block works on (time, batch, features)."""

        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
            self.head = nn.Linear(3, 1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.blocks[0](x)
            x = self.blocks[1](x.transpose(0, 1)).transpose(0, 1)
            return self.head(self.blocks[2](x))

    model = Turned()
    grams = Probe(model, find_layers(model), torch.randn(4, 7, 3), 4, CPU).grams(keep=True)
    assert grams.keys() == {"blocks.0", "blocks.2", "head"}


@pytest.mark.parametrize(
    ("batch", "words"),
    [
        ("text", "probe_batch: got str without a tensor; allowed: a tensor, or a tuple or dict of tensors"),
        ((), "probe_batch: got tuple without a tensor"),
        (
            torch.zeros(3, 5),
            "smartfrz.probe: got 4, but probe_batch contains a tensor of shape (3, 5); allowed: at most its first dimension",
        ),
        ({"a": torch.zeros(9, 5), "b": [torch.zeros(2)]}, "smartfrz.probe: got 4, but probe_batch contains a tensor of shape (2,)"),
    ],
)
def test_a_batch_that_does_not_fit_is_refused(batch: Any, words: str) -> None:
    model = Restless()
    with pytest.raises(ValueError) as error:
        Probe(model, find_layers(model), batch, 4, CPU)
    assert str(error.value).startswith(words)


def test_counting_and_recomputation_do_not_see_the_probe() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(5, 5), nn.Tanh()) for _ in range(3)), nn.Linear(5, 2)).train()
    layers, x = find_layers(model), torch.randn(7, 5)
    meter, order, boundary = (
        FlopMeter(model, layers),
        OrderCheck(model, layers),
        RecomputeBoundary(layers, on_late=lambda module: pytest.fail("late"), mode=ForwardMode(model)),
    )
    probe = Probe(model, layers, x, 4, CPU)
    probe.grams(keep=True)
    assert meter.profile is None, "a forward without gradients is no step"
    assert boundary._under == {}, "a forward without gradients in eval mode is no region that is recomputed"
    model(x).sum().backward()
    assert meter.profile is not None and meter.profile.forward == pytest.approx((350.0, 350.0, 350.0, 140.0))
    assert order.done and boundary._under == dict.fromkeys(range(4), False)
    probe.grams(keep=True)
    assert boundary._under == dict.fromkeys(range(4), False)
