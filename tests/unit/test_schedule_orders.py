"""The order in which layers freeze, and the policy `band`: pure functions of the layers."""

from __future__ import annotations

import pytest
from reference.oracle import Net

from smartfrz_ds.config.settings import FreezeConfig
from smartfrz_ds.model.layers import find_layers
from smartfrz_ds.model.view import LayerInfo, View
from smartfrz_ds.policies import POLICIES, BandPolicy, LinearPolicy, RandomPolicy, check_order_of
from smartfrz_ds.runtime.rules.eligibility import allowed, check_order

LAYERS = find_layers(Net())  # embeddings, blocks.0 to blocks.4, head
NAMES = [layer.name for layer in LAYERS]
INFOS = tuple(LayerInfo(name=x.name, kind=x.kind, numel=x.numel) for x in LAYERS)


def test_from_the_back_a_layer_freezes_only_behind_frozen_ones() -> None:
    kept = {"order": "back_to_front", "max_frozen_fraction": 1.0}
    assert allowed(LAYERS, (), NAMES[:-1], **kept) == set(NAMES[:-1])  # type: ignore[arg-type]
    assert allowed(LAYERS, (), ["blocks.4", "blocks.2"], **kept) == {"blocks.4"}  # type: ignore[arg-type]
    assert allowed(LAYERS, ["blocks.4"], ["blocks.3", "embeddings"], **kept) == {"blocks.3"}  # type: ignore[arg-type]
    assert allowed(LAYERS, (), ["blocks.3"], **kept) == frozenset()  # type: ignore[arg-type]
    assert allowed(LAYERS, (), NAMES[:-1], order="back_to_front", max_frozen_fraction=0.3) == {"blocks.3", "blocks.4"}


def test_a_gap_is_refused_by_the_order() -> None:
    check_order(LAYERS, ["blocks.3", "blocks.4"], "back_to_front")
    check_order(LAYERS, ["embeddings", "blocks.4"], "any")
    with pytest.raises(ValueError, match=r"'blocks.2' can't be frozen while 'blocks.3' behind it is active .*\"back_to_front\""):
        check_order(LAYERS, ["blocks.2", "blocks.4"], "back_to_front")
    with pytest.raises(ValueError, match=r"'blocks.4' can't be frozen while 'embeddings' in front of it is active .*\"front_to_back\""):
        check_order(LAYERS, ["blocks.4"], "front_to_back")


@pytest.mark.parametrize(
    ("width", "center", "band"),
    [
        (0.34, 0.5, ["blocks.1", "blocks.2"]),
        (0.34, 0.0, ["embeddings", "blocks.0"]),
        (0.34, 1.0, ["blocks.3", "blocks.4"]),
        (0.01, 0.5, ["blocks.1"]),
        (0.99, 0.5, ["embeddings", "blocks.0", "blocks.1", "blocks.2", "blocks.3", "blocks.4"]),
    ],
)
def test_the_band_has_its_width_and_place(width: float, center: float, band: list[str]) -> None:
    policy = BandPolicy(width=width, center=center)
    assert list(policy.band(INFOS)) == band


def test_layers_without_weights_of_their_own_are_not_counted() -> None:
    infos = tuple(LayerInfo(name=x.name, kind=x.kind, numel=0 if x.name == "embeddings" else x.numel) for x in LAYERS)
    assert BandPolicy(width=0.2).band(infos) == ("blocks.2",)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"width": 1.0}, "smartfrz.band.width: got 1.0; allowed: a number in (0, 1)"),
        ({"center": -0.1}, "smartfrz.band.center: got -0.1; allowed: a number in [0, 1]"),
        ({"start_step": -1}, "smartfrz.band.start_step: got -1; allowed: an integer >= 0"),
    ],
)
def test_a_wrong_setting_of_the_band_is_named(settings: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=r".") as error:
        BandPolicy(**settings)  # type: ignore[arg-type]
    assert words in str(error.value)


def test_a_limit_that_leaves_a_part_active_is_refused_at_the_start() -> None:
    BandPolicy(width=0.34, max_frozen_fraction=0.6).check_start(10, INFOS)  # 4 of 7
    with pytest.raises(
        ValueError, match=r"max_frozen_fraction: got 0.5; allowed with smartfrz.band.width 0.34: at least 0.571, for 4 of 7"
    ):
        BandPolicy(width=0.34, max_frozen_fraction=0.5).check_start(10, INFOS)


def test_the_settings_of_the_file_reach_the_policy() -> None:
    config = FreezeConfig.load({"smartfrz": {"policy": "band", "order": "any", "band": {"width": 0.2, "start_step": "20%"}}})
    assert config.band.width == 0.2
    assert FreezeConfig.load({"smartfrz": {"order": "back_to_front"}}).order == "back_to_front"


def test_policies_that_name_the_front_are_refused_from_the_back() -> None:
    for name in POLICIES:
        if name in ("attention", "freezeout", "autofreeze", "egeria", "pipetransformer"):
            with pytest.raises(ValueError, match=rf"order: got 'back_to_front'; allowed with policy '{name}': 'front_to_back', 'any'"):
                check_order_of(name, "back_to_front")
        elif name != "band":
            check_order_of(name, "back_to_front")
        check_order_of(name, "any")
    for order in ("front_to_back", "back_to_front"):
        with pytest.raises(ValueError, match=rf"smartfrz.order: got '{order}'; allowed with policy 'band': 'any'"):
            check_order_of("band", order)


def test_random_and_linear_take_the_order() -> None:
    assert LinearPolicy(1, 5, order="back_to_front").order == "back_to_front"
    back, front = (RandomPolicy(0.5, 1, 9, seed=3, order=order) for order in ("back_to_front", "front_to_back"))  # type: ignore[arg-type]
    view = View(
        step=1,
        total_steps=10,
        lr_spent=0.0,
        lr_remaining=None,
        layers=INFOS,
        frozen=(),
        candidates=tuple(NAMES[:-1]),
        windows={},
        window_size=2,
    )
    drawn = [policy._draw(view) for policy in (back, front)]
    assert list(drawn[0]) == ["blocks.4", "blocks.3", "blocks.2"] and list(drawn[1]) == ["embeddings", "blocks.0", "blocks.1"]
    assert list(drawn[0].values()) == list(drawn[1].values()) == sorted(drawn[0].values())
