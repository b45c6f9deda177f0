"""The prefix cache in one process: with it and without it, all losses and weights are equal bit for bit; or it is off, and says why.

Each test is one of the ways in which stored outputs of frozen layers could be wrong: the same rows with another function, other rows with
the same keys, something behind the frozen layers that reads what a skipped layer returned, random numbers.
"""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from reference import cached_runs
from reference.cached_runs import BATCH, EPOCHS, ROWS, both, threads, train
from reference.oracle import INPUTS, Net
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import smartfrz_ds
from smartfrz_ds import read_events, write_report

STEPS = ROWS // BATCH

# transformers' own names, which peft and older versions have
pytestmark = pytest.mark.filterwarnings("ignore:`.*gradient_checkpointing.*` is deprecated:FutureWarning")


def text(rows: int = ROWS, length: int = 8) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 50, (rows, length), generator=generator)
    mask = torch.ones(rows, length, dtype=torch.long)
    for row in range(rows):
        mask[row, length - row % 3 :] = 0 if row % 3 else 1
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.clone()}


def vectors(rows: int = ROWS) -> dict[str, Tensor]:
    return {"x": torch.randn(rows, INPUTS, generator=torch.Generator().manual_seed(3))}


def gpt2(**more: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_embd": 16, "n_layer": 4, "n_head": 2, "vocab_size": 50, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 2}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"use_cache": False, "loss_type": "ForCausalLM"} | more)))


def bert(**more: Any) -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return BertForMaskedLM(BertConfig(**(sizes | {"tie_word_embeddings": False} | more)))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, use_cache=False))


# --- where it is used -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shuffle", [True, False], ids=["shuffled", "same-batches"])
@pytest.mark.parametrize("kind", ["net", "bert", "llama"])
def test_equal_and_all_later_epochs_hit(kind: str, shuffle: bool) -> None:
    make, data = {"net": (Net, vectors()), "bert": (bert, text()), "llama": (llama, text())}[kind]
    run = both(make, data, frozen=4, shuffle=shuffle)
    # One batch of the second epoch is compared instead. The first epoch never hits.
    assert run.hits == STEPS * (EPOCHS - 1) - 1, run.note
    assert f"{ROWS} rows" in run.note


def test_dropout_behind_the_border_draws_the_same_numbers() -> None:
    run = both(bert, text(), frozen=3)
    assert run.hits and bert().bert.encoder.layer[3].output.dropout.p > 0


def test_last_short_batch_is_a_class_of_its_own() -> None:
    """14 rows in batches of 4: the last one has 2, other ones in each epoch. Between batch sizes rows need not have the same bits, so a row
    of the short batch is stored again when it comes in a full one."""
    run = both(bert, text(14), frozen=4, epochs=4)
    assert run.hits >= 4, run.note
    assert int(run.note.split(" rows of")[0].split()[-1]) > 14  # rows of both classes


def test_memory_format_of_a_stored_row() -> None:
    """Background: behind a permute the border tensor of ConvNeXt is channels-last. Restored without its strides, outputs had the same
    bits, and gradients of the active layers others."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.up = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.up(self.norm(self.conv(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)

    class Image(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.blocks, self.head = nn.Conv2d(3, 8, 2, 2), nn.ModuleList(Block() for _ in range(4)), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = self.stem(x)
            for block in self.blocks:
                x = block(x)
            return self.head(x.mean((2, 3)))

    run = both(Image, {"x": torch.randn(ROWS, 3, 16, 16, generator=torch.Generator().manual_seed(3))}, frozen=3)
    assert run.hits


def test_position_bias_of_t5() -> None:
    """Block 0 computes the position bias, all later blocks use it: it leaves the prefix beside the hidden states."""
    from transformers import T5Config, T5ForConditionalGeneration

    def t5() -> nn.Module:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 4, "num_heads": 2, "vocab_size": 50}
        return T5ForConditionalGeneration(
            T5Config(**sizes, use_cache=False, decoder_start_token_id=0, dropout_rate=0.0, loss_type="ForCausalLM")
        )

    for data in (text(), {k: v for k, v in text().items() if k != "attention_mask"}):
        run = both(t5, data, frozen=3, settings={"tied": "freeze"})
        assert run.hits, run.note


def test_two_threads() -> None:
    with threads(2):
        assert both(bert, text(), frozen=4).hits


def test_threads_are_a_part_of_the_key() -> None:
    def change(step: int, model: Any, controller: Any) -> None:
        torch.set_num_threads(1 + step // STEPS % 2)

    with threads(1):
        run = both(bert, text(), frozen=4, between=change)
    assert run.hits and run.hits <= STEPS  # the third epoch has the threads of the first


def test_changed_dtype_of_the_mask() -> None:
    """The same values, but another function: a mask of another dtype may take other kernels."""

    def cast(step: int, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"attention_mask": batch["attention_mask"].to(torch.bool if step // STEPS % 2 else torch.long)}

    run = both(bert, text(), frozen=4, alter=cast, epochs=4)
    assert 0 < run.hits <= 2 * STEPS and f"{2 * ROWS} rows" in run.note


class _Around(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_activation_checkpointing(reentrant: bool) -> None:
    def checkpointed() -> nn.Module:
        model = bert()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        return model

    run = both(checkpointed, text(), frozen=4)
    assert run.hits, run.note


def test_accumulation_of_two_forwards_before_their_backwards() -> None:
    """Two micro-batches are in flight at once: each backward needs the rows of its own forward."""
    results = []
    for mode in ("off", "on"):
        torch.manual_seed(0)
        model = bert(hidden_dropout_prob=0.0)
        model.gradient_checkpointing_enable({"use_reentrant": True})
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "cache": {"mode": mode}})
        controller.freeze(controller.layers[:3])
        model.train()
        feed = list(cached_runs.batches(text()))
        for one, other in zip(feed[::2], feed[1::2], strict=True):
            losses = [model(**one).loss, model(**other).loss]
            optimizer.zero_grad()
            for loss in losses:
                loss.backward()
            optimizer.step()
        results.append(torch.cat([p.detach().reshape(-1) for p in model.parameters()]))
        assert mode == "off" or cached_runs.hits_of(controller)
        controller.detach()
    assert torch.equal(*results)


def test_full_store_lets_the_oldest_rows_go() -> None:
    run = both(bert, text(), mode="auto", frozen=4, cache={"memory": 8 * 8 * 16 * 4, "spot_check": 1000}, epochs=4)
    assert int(run.note.split(" rows of")[0].split()[-1]) <= 8
    assert run.note.startswith("0 of") and "the store is full" in run.note  # auto: off


def test_rows_that_do_not_fit_go_to_disk(tmp_path: Any) -> None:
    run = both(bert, text(), frozen=4, cache={"memory": 8 * 8 * 16 * 4, "path": str(tmp_path), "disk": "1MiB"})
    assert run.hits == STEPS * (EPOCHS - 1) - 1 and f"{ROWS} rows" in run.note
    assert not os.listdir(tmp_path)  # the file has no name


def test_more_layers_freeze_and_thaw() -> None:
    """Behind the old border nothing is computed from the start: its rows are carried to the new one as they come by."""
    carried = []

    def change(step: int, model: Any, controller: Any) -> None:
        if step == 2 * STEPS:
            controller.freeze(controller.layers[:4])
        if step == 4 * STEPS:
            carried.append(controller._cache._cache.gain.carried if controller._cache else 0)
            controller.thaw([controller.layers[3], controller.layers[2]])

    run = both(bert, text(), frozen=3, between=change, epochs=6)
    assert carried == [0, STEPS]
    # two epochs at each depth: the second one hits, but for the batch that is compared
    assert run.hits == 3 * (STEPS - 1), run.note


# --- other functions of the same rows ---------------------------------------------------------------------------------------------


def test_evaluation_and_generation_neither_fill_nor_hit() -> None:
    held: list[list[Tensor]] = []

    def evaluate(step: int, model: Any, controller: Any) -> None:
        before = controller.report().cache_note
        model.eval()
        with torch.no_grad():
            outputs = [model(**{k: v[:4] for k, v in text().items()}).logits]
            outputs.append(model.generate(text()["input_ids"][:2], max_new_tokens=3, do_sample=False, use_cache=True))
        model.train()
        with torch.no_grad():  # a reference pass in training mode
            outputs.append(model(**{k: v[:4] for k, v in text().items()}).logits)
        held.append(outputs)
        assert controller.report().cache_note == before

    run = both(llama, text(), frozen=4, between=evaluate)
    assert run.hits == STEPS * (EPOCHS - 1) - 1
    half = len(held) // 2
    assert all(torch.equal(x, y) for off, on in zip(held[:half], held[half:], strict=True) for x, y in zip(off, on, strict=True))


@pytest.mark.filterwarnings("ignore:smartfrz. other code has set requires_grad:RuntimeWarning")  # PEFT does, at the end of the block
@pytest.mark.parametrize("gradients", [False, True], ids=["no-grad", "with-gradients"])
def test_reference_pass_without_the_adapter(gradients: bool) -> None:
    """DPO: the same rows go through the model with the adapter disabled, before and after the trained forward."""
    from peft import LoraConfig, get_peft_model

    seen: list[Tensor] = []

    def adapted() -> nn.Module:
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))

    def reference(step: int, model: Any, controller: Any) -> None:
        batch = {k: v[step % 4 : step % 4 + 4] for k, v in text().items()}
        with torch.set_grad_enabled(gradients), model.disable_adapter():
            seen.append(model(**batch).logits.detach())

    run = both(adapted, text(), frozen=4, between=reference)
    assert run.hits, run.note
    half = len(seen) // 2
    assert all(torch.equal(x, y) for x, y in zip(seen[:half], seen[half:], strict=True))
    assert len({x.sum().item() for x in seen[:half]}) > 1


def test_an_adapter_that_is_merged_is_another_function() -> None:
    from peft import LoraConfig, get_peft_model

    def adapted() -> nn.Module:
        return get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))

    def merge(step: int, model: Any, controller: Any) -> None:
        if step == 2 * STEPS:
            model.base_model.model.model.layers[0].self_attn.q_proj.merge()

    run = both(adapted, text(), frozen=4, between=merge, epochs=4)
    assert STEPS <= run.hits < 3 * STEPS, run.note


def test_autocast_is_another_function() -> None:
    class Cast(_Around):
        def forward(self, **inputs: Any) -> Any:
            return self.inner(**inputs)

    def outer() -> nn.Module:
        return Cast(bert())

    def between(step: int, model: Any, controller: Any) -> None:
        context = torch.autocast("cpu", torch.bfloat16)
        if step == STEPS:
            context.__enter__()
            model.context = context
        if step == 2 * STEPS:
            model.context.__exit__(None, None, None)

    run = both(outer, text(), frozen=4, between=between, epochs=4)
    assert run.hits, run.note


# --- stale rows -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["load_state_dict", "data", "swap"])
def test_changed_weights(how: str) -> None:
    """load_best_model in mid-run, an EMA that writes through .data, and one that puts other tensors in the parameters' place."""
    best: list[Any] = []

    def change(step: int, model: Any, controller: Any) -> None:
        if step == 0:
            torch.manual_seed(7)
            best[:] = [{k: v + 0.01 * torch.randn_like(v) if v.is_floating_point() else v for k, v in model.state_dict().items()}]
            torch.manual_seed(1)
        if step != 2 * STEPS - 1:
            return
        if how == "load_state_dict":
            model.load_state_dict(best[0])
        for name, p in model.named_parameters() if how != "load_state_dict" else ():
            if how == "data":
                p.data.copy_(best[0][name])
            else:
                p.data = best[0][name].clone()

    run = both(bert, text(), frozen=4, between=change, epochs=5)
    assert run.hits > 2 * STEPS, run.note


def test_tied_weights_that_train() -> None:
    run = both(gpt2, text(), mode="auto", frozen=3)
    assert run.hits == 0 and "transformer.wte.weight" in run.note and "smartfrz.tied 'freeze'" in run.note
    assert both(gpt2, text(), frozen=3, settings={"tied": "freeze"}).hits


def test_poisoned_row_is_found_by_the_spot_check() -> None:
    def poison(step: int, model: Any, controller: Any) -> None:
        if step == 2 * STEPS:
            store = controller._cache._store._stores[0]
            for entry in range(store.rows):
                os.pwrite(store.descriptor, b"\xff\x00\xff", int(store._entries["offset"][entry]) + 5)

    with pytest.raises(RuntimeError, match="a comparison found stored rows that differ from computed ones"):
        train(bert, text(), "on", frozen=4, between=poison, epochs=6, cache={"spot_check": 3})
    with pytest.warns(RuntimeWarning, match="the steps since the last comparison used them"):
        run = train(bert, text(), "auto", frozen=4, between=poison, epochs=6, cache={"spot_check": 3})
    assert "off: a comparison found" in run.note and len(run.losses) == 6 * STEPS


# --- models that are not cached ---------------------------------------------------------------------------------------------------


def test_collected_hidden_states() -> None:
    run = both(bert, text() | {"output_hidden_states": True}, frozen=4)
    assert run.hits == 0 and "collects something from each layer" in run.note


def test_hidden_states_in_a_net_of_the_users() -> None:
    """The output keeps its structure, but a part of it is a skipped layer's."""

    class Deep(Net):
        def forward(self, x: Tensor) -> Any:
            x = first = self.blocks[0](self.inp(x))
            for block in self.blocks[1:]:
                x = block(x)
            return self.head(x) + first.mean(), first

    run = both(Deep, vectors(), frozen=4)
    assert run.hits == 0 and "reads what a skipped layer returned" in run.note


def test_skip_connection_to_an_active_layer_is_stored() -> None:
    class Joined(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.lin = nn.Linear(16, 16)

        def forward(self, x: Tensor, early: Tensor) -> Tensor:
            return torch.tanh(self.lin(x)) + early

    class Skips(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[4] = Joined()

        def forward(self, x: Tensor) -> Tensor:
            x = early = self.inp(x)
            for block in self.blocks[:4]:
                x = block(x)
            return self.head(self.blocks[4](x, early))

    assert both(Skips, vectors(), frozen=4).hits


@pytest.mark.parametrize("mode", ["eval", "train"])
def test_batch_norm(mode: str) -> None:
    def make() -> nn.Module:
        layers = [nn.Sequential(nn.Linear(INPUTS if i == 0 else 8, 8), nn.BatchNorm1d(8), nn.ReLU()) for i in range(4)]
        return _Named(nn.Sequential(*layers, nn.Linear(8, 3)))

    run = both(make, vectors(), mode="on" if mode == "eval" else "auto", frozen=2, settings={"frozen_mode": mode})
    assert bool(run.hits) == (mode == "eval"), run.note
    assert mode == "eval" or "BatchNorm1d" in run.note


class _Named(nn.Module):
    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


def test_rows_that_depend_on_neighbours_are_found_by_the_proof() -> None:
    """Not by its structure: a layer of the user's that centres the batch."""

    class Centred(Net):
        def __init__(self) -> None:
            super().__init__()
            self.blocks[1] = _Centre(self.blocks[1])

    run = both(Centred, vectors(), frozen=4)
    assert run.hits == 0 and "a row depends on its neighbours" in run.note
    assert both(Centred, vectors(), frozen=4, shuffle=False).hits  # the same batch again has the same bits


class _Centre(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x - x.mean(0))


def test_dropout_that_the_user_left_on() -> None:
    for make, settings in ((bert, {"frozen_mode": "train"}), (_user_frozen_embeddings, {})):
        run = both(make, text(), frozen=4, settings=settings)
        assert run.hits == 0 and "random numbers are drawn in front of the first active layer" in run.note


def _user_frozen_embeddings() -> nn.Module:
    model = bert()
    model.bert.embeddings.requires_grad_(False)
    return model


def test_other_hooks_on_frozen_layers() -> None:
    seen: list[int] = []

    def hooked() -> nn.Module:
        model = Net()
        model.blocks[1].register_forward_hook(lambda module, args, output: seen.append(1))
        return model

    run = both(hooked, vectors(), mode="auto", frozen=4)
    assert run.hits == 0 and "a forward hook of other code on blocks.1" in run.note and len(seen) == 2 * STEPS * EPOCHS

    def prepared() -> nn.Module:
        model = Net()
        model.register_forward_pre_hook(lambda module, args, kwargs: (args, {"x": kwargs["x"] + 1}), with_kwargs=True)
        return model

    run = both(prepared, vectors(), mode="auto", frozen=4)
    assert run.hits == 0 and "a forward hook of other code on the model" in run.note


def test_attributes_that_the_prefix_reads() -> None:
    """A schedule of the user's that is neither a weight nor an argument."""

    class Scaled(Net):
        def __init__(self) -> None:
            super().__init__()
            self.scale = 1.0
            self.blocks[1] = _Scaled(self.blocks[1])

    def schedule(step: int, model: Any, controller: Any) -> None:
        model.blocks[1].scale = 1.0 if step < 3 * STEPS else 0.5

    run = both(Scaled, vectors(), frozen=4, between=schedule, epochs=6)
    assert run.hits >= 3 * STEPS and f"{2 * ROWS} rows" in run.note

    def always(step: int, model: Any, controller: Any) -> None:
        model.blocks[1].scale = 1 / (1 + step)

    with pytest.raises(RuntimeError, match="the attribute 'scale' of a module that the frozen layers may read changes in every forward"):
        train(Scaled, vectors(), "on", frozen=4, between=always, epochs=6)


def test_attribute_that_becomes_an_object_and_a_layer_in_front_of_the_frozen_ones() -> None:
    """Background: Qwen2-VL sets `rope_deltas`, None at first, to a tensor, and comparing two of them raised. It runs the embeddings of its
    text, which come behind the image tower, first: the first active layer was taken for one behind the border."""

    class Deltas(Net):
        def __init__(self) -> None:
            super().__init__()
            self.deltas: Any = None
            self.words = nn.Linear(INPUTS, 16)

        def forward(self, x: Tensor) -> Tensor:
            words = self.words(x)
            self.deltas = x[:, :2].detach().clone()
            for block in [self.inp, *self.blocks]:
                x = block(x)
            return self.head(x + words.mean())

    run = both(Deltas, vectors(), frozen=4, settings={"layers": ["inp", "blocks.*", "words", "head"], "order": "any"})
    assert run.hits >= STEPS - 1, run.note


class _Scaled(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block, self.scale = block, 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.block(self.scale * x)


def test_trained_inputs() -> None:
    """Prompt tuning: the gradient of the input flows through the frozen layers."""

    class Prompt(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.prompt = Net(), nn.Parameter(torch.zeros(INPUTS))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x + self.prompt)

    run = both(Prompt, vectors(), frozen=4, settings={"layers": ["net.inp", "net.blocks.*", "net.head"]})
    assert run.hits == 0 and "a gradient flows into the frozen layers" in run.note


def test_region_of_checkpointing_over_the_border() -> None:
    class Regions(Net):
        def forward(self, x: Tensor) -> Tensor:
            x = self.inp(x)
            for start in (0, 2):
                x = checkpoint(lambda x, a=start: self.blocks[a + 1](self.blocks[a](x)), x, use_reentrant=False)
            return self.head(self.blocks[4](x))

    run = both(Regions, vectors(), mode="auto", frozen=4)
    assert run.hits == 0 and "in one region with active ones" in run.note


def test_arguments_without_bytes() -> None:
    class Opaque(Net):
        def forward(self, x: Tensor, extra: Any) -> Tensor:
            return super().forward(x)

    run = both(Opaque, vectors() | {"extra": object()}, frozen=4)
    assert run.hits == 0 and "is a object, which has no key" in run.note


def test_models_that_are_not_seen() -> None:
    """Compiled as a whole, or trained in eval mode."""

    def evaluated(step: int, model: Any, controller: Any) -> None:
        model.eval()

    def compiled() -> nn.Module:
        model = Net()
        model.compile(backend="eager")
        return model

    for make, between in ((compiled, lambda *_: None), (Net, evaluated)):
        run = both(make, vectors(), mode="auto", frozen=4, between=between)
        assert run.hits == 0 and "no forward of the model was seen that is trained on" in run.note


@pytest.mark.slow
def test_number_of_the_batch_as_an_argument() -> None:
    class Numbered(Net):
        def forward(self, x: Tensor, number: int) -> Tensor:
            return super().forward(x)

    def number(step: int, batch: dict[str, Any]) -> dict[str, Any]:
        return batch | {"number": step}

    run = both(Numbered, vectors(8), mode="auto", frozen=4, alter=number, epochs=140)
    assert run.hits == 0 and "more than 256 kinds of batches" in run.note


def test_log_and_report_say_what_it_brought_or_why_it_is_off(tmp_path: Path) -> None:
    for make, tied, words in (
        (gpt2, "train", "prefix cache: off: the weight transformer.wte.weight"),
        (bert, "freeze", "skipped the frozen layers"),
    ):
        log = tmp_path / tied / "log.jsonl"
        settings = {"tied": tied, "log_path": str(log), "status_interval": 1, "total_steps": STEPS * EPOCHS}
        outcomes: list[str] = []

        def ask(step: int, model: Any, controller: Any, outcomes: list[str] = outcomes) -> None:
            outcomes.append(controller.report().outcome)

        train(make, text(), "auto", frozen=3, settings=settings, between=ask)
        last = json.loads(log.read_text().splitlines()[-1])
        assert words in last["outcome"] and words in outcomes[-1]
        told = [e.message for e in read_events(log) if e.kind == "cache"]
        assert len(told) == (1 if tied == "train" else 2), told
        for text_of_event, begin in zip(
            told, ("off: the weight",) if tied == "train" else ("on for embeddings to", "proven for 4 rows"), strict=True
        ):
            assert text_of_event.startswith(begin)
        page = write_report(log.parent).read_text()
        assert f"The prefix cache: {last['outcome'].partition('; prefix cache: ')[2][:20]}" in page
        assert '<span class="tag cache">prefix cache</span>' in page and told[-1][:60] in page


def test_mode_on_is_an_error_where_it_cannot_be_used() -> None:
    with pytest.raises(RuntimeError, match=r"smartfrz.cache.mode: got 'on'.*wte.weight.*tied 'freeze'"):
        train(gpt2, text(), "on", frozen=3)


def test_auto_is_off_where_it_does_not_pay() -> None:
    run = both(Net, vectors(48), mode="auto", frozen=4, cache={"min_gain": 50})
    assert run.hits == 0 and "smartfrz.cache.min_gain is 50" in run.note


def test_copies_and_detached_models_run_completely() -> None:
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters())
    controller = smartfrz_ds.attach_torch(model, optimizer, {"policy": "manual", "cache": {"mode": "on"}})
    controller.freeze(controller.layers[:4])
    x = vectors()["x"][:4]
    model(x).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    twin.inp.weight.data.zero_()
    assert not torch.equal(twin(x), model(x))
    assert torch.equal(F.linear(x, twin.inp.weight, twin.inp.bias), twin.inp(x))
    optimizer.zero_grad()
    controller.detach()
    assert not any("_call_impl" in vars(m) for m in model.modules())
