import base64
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smartfrz_ds.config.problems import section_of
from smartfrz_ds.config.schedule import PhaseSettings
from smartfrz_ds.config.settings import FreezeConfig, digest
from smartfrz_ds.config.table import to_markdown, update_docs

DOC = Path(__file__).parents[2] / "docs" / "configuration.md"
# The last block is generated: all defaults.
*EXAMPLES, DEFAULTS = re.findall(r"```json\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL)


def problems(section: object) -> list[str]:
    with pytest.raises(ValueError) as caught:
        FreezeConfig.load({"smartfrz": section})
    assert type(caught.value) is ValueError  # ours, not pydantic's
    return str(caught.value).splitlines()


# ---- where the section comes from


def test_no_section_means_all_defaults(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{"train_batch_size": 8, "enabled": 3, "seed": "another tool\'s"}')
    sources: tuple[Any, ...] = (
        None,
        {},
        {"smartfrz": {}},
        {"train_batch_size": 8},
        {"zero_optimization": {"stage": 2}},
        file,
        str(file),
        FreezeConfig(),
    )
    for source in sources:
        assert FreezeConfig.load(source) == FreezeConfig()


def test_whole_config_and_section_alone_give_the_same(tmp_path: Path) -> None:
    section = {"policy": "linear", "layers": ["emb", "block.*"], "linear": {"start_step": 5, "end_step": 9}}
    text = json.dumps({"train_batch_size": 8, "smartfrz": section})
    file = tmp_path / "ds.json"
    file.write_text("\ufeff" + text, encoding="utf-8")  # with a byte order mark, as some Windows editors write
    padding = {"x": "y" * 4000}  # longer than any file name may be
    encoded = base64.urlsafe_b64encode(json.dumps({"smartfrz": section, **padding}).encode()).decode()
    configs = [FreezeConfig.load(source) for source in (section, {"smartfrz": section}, json.loads(text), file, str(file), encoded)]
    assert all(config == configs[0] for config in configs)
    assert configs[0].layers == ("emb", "block.*")
    assert configs[0].chosen_settings == {"start_step": 5, "end_step": 9}


def test_file_may_have_comments_as_deepspeed_allows(tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text('{\n  # said by DeepSpeed\'s own reader\n  "smartfrz": {"window": 7 /* snapshots */}\n}')
    assert FreezeConfig.load(file).window == 7


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ('{"smartfrz": {"window": 3, "window": 4}}', "duplicate keys: window"),
        ('{"smartfrz": {}, "smartfrz": {}}', "duplicate keys: smartfrz"),
        ('{"smartfrz": ', "not a readable DeepSpeed JSON"),
        ("[1]", r"got \[1\]; allowed: a JSON object"),
        ("\udcff\udcfe", "utf-8"),
        ('{"smartfrs": {"window": 3}}', "smartfrs: unknown key; did you mean 'smartfrz'"),
        ('{"smartfrz_ds": {"window": 3}}', "did you mean 'smartfrz'"),
        ('{"fp16": {}, "policy": "linear", "window": 3}', "policy, window: a setting of smartfrz outside its section"),
    ],
)
def test_bad_file_is_named(tmp_path: Path, text: str, why: str) -> None:
    file = tmp_path / "ds.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=why) as caught:
        FreezeConfig.load(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize("source", ["no/such.json", "nope", Path("nope.json"), "."])
def test_missing_file_is_named(source: str | Path) -> None:
    with pytest.raises(ValueError, match=re.escape(f"{source}: not a readable DeepSpeed JSON")):
        FreezeConfig.load(source)


def test_other_sources_are_refused() -> None:
    with pytest.raises(ValueError, match="config: got int; allowed"):
        FreezeConfig.load(7)  # type: ignore[arg-type]


# ---- what is allowed


def test_all_problems_at_once_with_key_value_and_what_is_allowed() -> None:
    lines = problems(
        {
            "policy": "Attenton",
            "freez_interval": 5,
            "window": "50",
            "max_frozen_fraction": float("nan"),
            "attention": {"threshold": 1.7, "patience": True, "thresold": 0.5},
        }
    )
    assert set(lines[:-1]) == {
        "smartfrz.policy: got \"Attenton\"; did you mean 'attention'? allowed: 'attention', 'linear', 'late', 'band', 'random', "
        "'freezeout', 'autofreeze', 'egeria', 'pipetransformer', 'weight_drift', 'schedule', 'manual', "
        "'package.module:Class', or the name of a policy of an installed package",
        'smartfrz.window: got "50"; allowed: an integer >= 2',
        "smartfrz.max_frozen_fraction: got NaN; allowed: a number in (0, 1]",
        "smartfrz.attention.threshold: got 1.7; allowed: a number in (0, 1), or null",
        "smartfrz.attention.patience: got true; allowed: an integer >= 1",
        "smartfrz.attention.thresold: unknown key; did you mean 'threshold'?",
    }
    assert lines[-1] == "smartfrz.freez_interval: unknown key; did you mean 'freeze_interval'?"


@pytest.mark.parametrize(
    ("section", "line"),
    [
        ({"threshold": 0.5}, "smartfrz.threshold: unknown key; did you mean 'smartfrz.attention.threshold'?"),
        ({"predictor_path": "x"}, "smartfrz.predictor_path: unknown key; did you mean 'smartfrz.attention.predictor'?"),
        ({"linear": {"window": 3}}, "smartfrz.linear.window: unknown key; did you mean 'smartfrz.window'?"),
        ({"manual": {"x": 1}}, "smartfrz.manual.x: unknown key; allowed: none"),
        ({1: 2}, "smartfrz.1: unknown key; allowed: enabled"),
        ({"attention": {1: 2}}, "smartfrz.attention.1: unknown key; allowed: predictor"),
        ({"attention": None}, "smartfrz.attention: got null; allowed: an object with the keys predictor, threshold, patience"),
        ({"manual": 3}, "smartfrz.manual: got 3; allowed: an empty object"),
        ({"total_steps": "atuo"}, "smartfrz.total_steps: got \"atuo\"; did you mean 'auto'? allowed: an integer >= 1, 'auto' or null"),
        (
            {"linear": {"start_step": 10, "end_step": 10}},
            "smartfrz.linear.end_step: got 10; allowed: an integer > start_step (10), or a share of the run such as '10%', or null",
        ),
        ({"linear": {"end_step": 0}}, "smartfrz.linear.end_step: got 0; allowed: an integer > start_step (0), or a share of the run"),
        (
            {"random": {"start_step": "50%", "end_step": "50%"}},
            "smartfrz.random.end_step: got '50%'; allowed: a share > start_step (50%), an integer, or null",
        ),
        (
            {"snapshot_interval": 51, "freeze_interval": 50},
            "smartfrz.freeze_interval: got 50; allowed: an integer >= snapshot_interval (51)",
        ),
        (
            {"snapshot_interval": "5%", "freeze_interval": "3%"},
            "smartfrz.freeze_interval: got '3%'; allowed: a share >= snapshot_interval (5%)",
        ),
        ({"warmup_steps": "ten"}, "smartfrz.warmup_steps: got \"ten\"; allowed: an integer >= 0, or a share of the run such as '10%'"),
        ({"warmup_steps": "101%"}, 'smartfrz.warmup_steps: got "101%"; allowed: an integer >= 0, or a share'),
        ({"warmup_steps": "-1%"}, 'smartfrz.warmup_steps: got "-1%"; allowed: an integer >= 0, or a share'),
        ({"freeze_interval": "0%"}, 'smartfrz.freeze_interval: got "0%"; allowed: an integer >= 1 and >= snapshot_interval, or a share'),
        ({"late": {"start_step": "half"}}, 'smartfrz.late.start_step: got "half"; allowed: an integer >= 0, or a share'),
        ({"late": {"share": "50%"}}, 'smartfrz.late.share: got "50%"; allowed: a number in [0, 1)'),
        ({"window": "10%"}, 'smartfrz.window: got "10%"; allowed: an integer >= 2'),
        ({"keep_active": ["x" * 500, 1]}, 'smartfrz.keep_active: got ["' + "x" * 75 + "...; allowed: a list of name patterns"),
    ],
)
def test_problem_line(section: dict[object, object], line: str) -> None:
    (got,) = problems(section)
    assert got.startswith(line)


@pytest.mark.parametrize("section", [None, [], True, "attention", 3])
def test_section_must_be_an_object(section: object) -> None:
    (line,) = problems(section)
    assert line.startswith("smartfrz: got ") and "allowed: an object with the keys enabled, dry_run" in line


def keys() -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for name, field in FreezeConfig.model_fields.items():
        section = section_of(field)
        found += [(name,)] if field.default is None or section is None else []  # a section that may be null has a row of its own
        found += [(name, key) for key in section.model_fields] if section else []
    return found


def nested(key: tuple[str, ...], value: object) -> dict[str, object]:
    return {key[0]: value} if len(key) == 1 else {key[0]: {key[1]: value}}


@pytest.mark.parametrize("key", [key for key in keys() if key != ("schedule", "phases")], ids=".".join)  # test_phases.py
def test_words_of_the_range_are_the_range(key: tuple[str, ...]) -> None:
    """Each key's `allowed` text is read as a program and compared with what is accepted, type by type and at the ends of the range."""
    model = FreezeConfig if len(key) == 1 else section_of(FreezeConfig.model_fields[key[0]])
    assert model is not None
    extra = model.model_fields[key[-1]].json_schema_extra
    assert isinstance(extra, dict)
    allowed = str(extra["allowed"])
    numbers = [float(text) for text in re.findall(r"(?<!\^)\b\d+\b(?!\^)", allowed.replace("'10%'", ""))]
    low = numbers[0] if numbers else 0.0
    candidates: dict[str, tuple[Any, bool]] = {
        "null": (None, "null" in allowed),
        "true": (True, allowed == "true or false"),
        "text": ("some text", "a path" in allowed or allowed == "a name"),
        "empty text": ("", False),
        "auto": ("auto", "'auto'" in allowed or "a path" in allowed or allowed == "a name"),
        "list": (["a"], "list" in allowed),
        "tuple": (("a",), "list" in allowed),
        "empty list": ([], "list" in allowed and "one or more" not in allowed),
        "list with empty text": ([""], False),
        "object": ({}, "object" in allowed),
        "nan": (float("nan"), False),
        "infinity": (float("inf"), False),
        "text of a number": ("50", "a path" in allowed or allowed == "a name"),
        "whole float": (50.0, "a number >" in allowed),
        "large": (2**40, "integer" in allowed or "a number >" in allowed),
        "share": ("10%", "a share" in allowed or "a path" in allowed or allowed == "a name"),
        "share of nothing": (
            "0%",
            ("a share" in allowed and "integer >= 1" not in allowed and "> start" not in allowed)
            or "a path" in allowed
            or allowed == "a name",
        ),
        "whole run": ("100%", "a share" in allowed or "a path" in allowed or allowed == "a name"),
        "more than the run": ("100.1%", "a path" in allowed or allowed == "a name"),
        "no number": ("x%", "a path" in allowed or allowed == "a name"),
        "half": (0.5, "number in" in allowed or "a number > 0" in allowed),
        "below": (int(low) - 1, False),
        "zero": (0, ("integer" in allowed and low == 0 and "start_step" not in allowed) or "[0, " in allowed),
        "one as float": (1.0, ", 1]" in allowed or "a number >" in allowed),
    }
    if "integer" in allowed and "start_step" not in allowed and ">= snapshot_interval" not in allowed:
        candidates["lowest"] = (int(low), True)
    for words, (value, expected) in candidates.items():
        try:
            FreezeConfig.load(nested(key, value))
            accepted = True
        except ValueError as error:
            accepted = False
            assert f"smartfrz.{'.'.join(key)}: got " in str(error), words
        assert accepted == expected, f"{words}: {value!r} for {'.'.join(key)}, allowed: {allowed}"


def test_seed_fits_torch_generators() -> None:
    assert FreezeConfig.load({"seed": 2**63 - 1}).seed == 2**63 - 1
    assert problems({"seed": 2**63}) == [f"smartfrz.seed: got {2**63}; allowed: an integer from 0 to 2^63 - 1"]


def test_settings_of_a_policy_not_chosen_are_checked_too() -> None:
    assert FreezeConfig.load({"policy": "manual", "attention": {"threshold": 0.5}}).chosen_settings == {}
    assert problems({"policy": "manual", "attention": {"threshold": 5}})


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(list(FreezeConfig.model_fields)) | st.text(max_size=8), JSON_VALUES, max_size=4))
def test_any_section_loads_or_is_one_value_error(section: dict[str, object]) -> None:
    try:
        config = FreezeConfig.load({"smartfrz": section})
    except ValueError as error:
        assert type(error) is ValueError
        assert all(line.startswith("smartfrz") for line in str(error).split("\n") if line)
    else:
        # what loads survives a round trip through JSON
        assert FreezeConfig.load(json.loads(config.model_dump_json())) == config


# ---- what holds afterwards


@pytest.mark.parametrize(
    ("written", "size"), [("12GiB", 12 * 2**30), ("900MB", 9e8), ("1.5 kib", 1536), ("7B", 7), (10**9, 1e9), (None, None)]
)
def test_sizes_of_memory(written: Any, size: float | None) -> None:
    assert FreezeConfig.load({"pipeline": {"memory_limit": written}}).pipeline.memory_bytes == size


def test_settings_are_immutable() -> None:
    with pytest.raises(ValueError, match="frozen"):
        FreezeConfig().window = 3


def test_digest_sees_every_setting_but_the_log_path() -> None:
    changed: list[dict[str, Any]] = [
        {"enabled": False}, {"dry_run": True}, {"policy": "manual"}, {"layers": ["a"]}, {"keep_active": ["a"]}, {"order": "any"},
        {"tied": "freeze"}, {"frozen_mode": "train"}, {"max_frozen_fraction": 0.5}, {"warmup_steps": 1}, {"freeze_interval": 60},
        {"cooldown": 2}, {"snapshot_interval": 5}, {"window": 3}, {"sample_size": 2}, {"total_steps": 4}, {"keep_state": 1}, {"seed": 1},
        {"untested_versions": "allow"}, {"attention": {"predictor": "p"}}, {"attention": {"threshold": 0.5}},
        {"attention": {"patience": 3}}, {"attention": {"mode": "budget"}}, {"attention": {"budget": 0.2}},
            {"linear": {"start_step": 1}}, {"linear": {"end_step": 2}},
        {"zero3": {"frozen": "auto"}}, {"guard": {}}, {"guard": {"metric": "x"}}, {"guard": {"tolerance": 0.5}}, {"guard": {"window": 3}},
        {"guard": {"smoothing": 0.5}}, {"probe": 2}, {"late": {"start_step": 1}}, {"late": {"share": 0.5}},
        {"band": {"width": 0.5}}, {"band": {"center": 0.1}}, {"band": {"start_step": 1}}, {"band": {"share": 0.5}},
        {"random": {"ratio": 0.5}},
        {"random": {"start_step": 1}}, {"random": {"end_step": 2}}, {"random": {"seed": 1}}, {"freezeout": {"t0": 0.5}},
        {"freezeout": {"growth": "linear"}}, {"freezeout": {"scale_lr": False}}, {"autofreeze": {"quantile": 0.25}},
        {"egeria": {"window": 2}}, {"egeria": {"tolerance": 0.5}}, {"egeria": {"refresh": 1}}, {"pipetransformer": {"alpha": 0.5}},
        {"pipetransformer": {"interval": 5}}, {"pipetransformer": {"gradients": False}}, {"weight_drift": {"threshold": 0.5}},
        {"weight_drift": {"start_step": 1}}, {"weight_drift": {"share": 0.25}}, {"pipeline": {"rebalance": "on_freeze"}},
        {"pipeline": {"min_gain": 1.5}}, {"pipeline": {"memory_limit": "1GB"}}, {"status_interval": 5},
        {"policy": "a.b:C", "policy_settings": {"x": 1}}, {"fsdp": {"frozen": "unsharded"}}, {"gradient_check": "off"},
            {"schedule": {"phases": [{"begin": 1, "freeze": ["a"]}]}}, {"schedule": {"from_log": "x"}}, {"schedule": {"epochs": 2.0}},
            {"cache": {"mode": "auto"}}, {"cache": {"memory": "1GB"}},
            {"cache": {"path": "x"}}, {"cache": {"disk": "1GB"}}, {"cache": {"min_gain": 2.0}}, {"cache": {"spot_check": 5}},
    ]  # fmt: skip
    assert len(changed) == len(keys()) - 1  # all but log_path
    digests = {digest(FreezeConfig.load(section)) for section in [{}, *changed]}
    assert len(digests) == len(changed) + 1
    assert digest(FreezeConfig.load({"log_path": "here"})) == digest(FreezeConfig())
    assert digest(FreezeConfig.load({"max_frozen_fraction": 1})) == digest(FreezeConfig.load({"max_frozen_fraction": 1.0}))


def test_digest_is_the_same_in_another_process() -> None:
    code = (
        "from smartfrz_ds.config import FreezeConfig, digest; "
        "print(digest(FreezeConfig.load({'linear': {'start_step': 3}, 'keep_active': ['b', 'a']})))"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}).stdout
    assert out.strip().splitlines()[-1] == digest(FreezeConfig.load({"keep_active": ["b", "a"], "linear": {"start_step": 3}}))


# ---- the documentation


def test_docs_defaults_are_what_the_code_says() -> None:
    text = DOC.read_text(encoding="utf-8")
    assert update_docs(text) == text, "run: python -m smartfrz_ds.config docs/configuration.md"
    assert to_markdown().count("\n| `") == len(keys()) + len(PhaseSettings.model_fields)
    named = json.loads(DEFAULTS)
    assert FreezeConfig.load(named) == FreezeConfig() and named["smartfrz"].keys() == FreezeConfig.model_fields.keys()


def test_docs_without_markers_are_refused() -> None:
    with pytest.raises(ValueError, match="defaults: end"):
        update_docs("no markers here")


@pytest.mark.parametrize("example", EXAMPLES)
def test_docs_example_loads(example: str, tmp_path: Path) -> None:
    file = tmp_path / "ds.json"
    file.write_text(example)
    assert FreezeConfig.load(file) != FreezeConfig()
    json.loads(example)  # plain JSON, without DeepSpeed's extras
    from deepspeed.runtime.config import DeepSpeedConfig

    assert DeepSpeedConfig(json.loads(example)).train_micro_batch_size_per_gpu == 8


def test_docs_have_examples() -> None:
    assert len(EXAMPLES) >= 3
