"""The differences between releases that backends/deepspeed/names.py and backends/torch/fsdp2.py bridge, on objects with the old and the
new names. That the real releases have them as expected is what `./tests/run.sh --versions` shows."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import deepspeed
import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from smartfrz_ds.backends.deepspeed import names
from smartfrz_ds.backends.deepspeed.compat import recomputes_without_reentry
from smartfrz_ds.backends.torch.fsdp2 import param_groups_of


def test_a_feature_is_asked_for_from_its_release_on(monkeypatch: pytest.MonkeyPatch) -> None:
    for release, known in (("0.17.4", False), ("0.17.5", True), ("0.17.5+git1", True), ("0.19.8", True), ("1.0.0rc1", True)):
        monkeypatch.setattr(deepspeed, "__version__", release)
        assert names.knows("zenflow") is known, release
        assert names.knows("moe")  # in every release


def test_flat_groups_without_offsets_have_no_padding_between_parameters() -> None:
    calls: list[tuple[object, ...]] = []
    old = SimpleNamespace(get_partition_info=lambda *args: calls.append(args))
    names.set_offsets(old, 0, [1], [0])
    names.set_padding_between(old, 0, [1])
    names.partition_info(old, ["p"], 4, 1, [1])
    assert not names.parameter_alignment(old) and names.padding_between(old, 0) == [] and set(vars(old)) == {"get_partition_info"}
    new = SimpleNamespace(
        get_partition_info=lambda *args: calls.append(args),
        parameter_alignment=True,
        round_robin_bit16_padding=[[]],
        round_robin_bit16_offsets=[[]],
    )
    names.set_offsets(new, 0, (1, 0), [0, 3])
    names.partition_info(new, ["p"], 4, 1, (1, 0))
    assert names.parameter_alignment(new) and names.padding_between(new, 0) == [1, 0] and new.round_robin_bit16_offsets == [[0, 3]]
    assert calls == [(["p"], 4, 1), (["p"], 4, 1, [1, 0])]


def test_reduced_gradients_are_released_in_both_forms() -> None:
    old = SimpleNamespace(previous_reduced_grads=["p"], extra_large_param_to_reduce="q")
    names.clear_reduced_gradients(old)
    assert old.previous_reduced_grads is None and old.extra_large_param_to_reduce is None
    held = defaultdict(list, {"bf16": ["p"]})
    new = SimpleNamespace(previous_reduced_grads=held, extra_large_param_to_reduce={"bf16": "q"})
    names.clear_reduced_gradients(new)
    assert new.previous_reduced_grads is held and not held and not new.extra_large_param_to_reduce


def test_an_engine_without_the_switch_counts_its_micro_batches() -> None:
    class Old:
        def __getattr__(self, name: str) -> object:  # as DeepSpeedEngine: unknown names are the user's model's
            return lambda: False

    class New:
        def managed_gradient_accumulation(self) -> bool:
            return False

    assert names.managed_accumulation(Old()) and not names.managed_accumulation(New())


def test_non_reentrant_checkpointing_of_a_hugging_face_model_is_seen() -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    model = LlamaForCausalLM(config)
    assert not recomputes_without_reentry(model)
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)  # the new name of transformers 5
    enable({"use_reentrant": True})
    assert not recomputes_without_reentry(model)
    enable({"use_reentrant": False})
    assert recomputes_without_reentry(model)


def test_fsdp2_units_have_a_list_of_groups_or_one() -> None:
    assert param_groups_of(SimpleNamespace(_fsdp_param_groups=["a", "b"])) == ["a", "b"]
    assert param_groups_of(SimpleNamespace(_fsdp_param_group="a")) == ["a"]
    assert param_groups_of(SimpleNamespace(_fsdp_param_group=None)) == []
