"""Configs that users bring: dense families resolve with one warning; others are refused for what is missing."""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

import pytest

from internlm.config import check_registered, check_runnable, keys, resolve
from internlm.config.support import MODEL_TYPES
from internlm.model.families import FAMILIES
from internlm.utils.errors import ConfigError
from tests.unit.config.published_sections import DENSE, REFUSED, published
from tests.unit.config.samples import config_of, found, problems_of


@pytest.mark.parametrize("family", DENSE)
def test_dense_families_resolve_with_warnings_only(family: str) -> None:
    resolved = resolve(published(DENSE[family]), world_size=8, device_type="cuda")
    check_runnable(resolved.config)
    check_registered(resolved.config)
    warning, *others = resolved.warnings
    off = "model.sliding_window: no effect, since model.use_sliding_window is False"
    assert others == [off] * bool(DENSE[family].get("model.sliding_window"))
    assert "ckpt.load_ckpt_info (its path 'local:llm_ckpts/xxxx' is a placeholder)" in warning
    assert ("generation (settings of text generation" in warning) == ("generation" in DENSE[family])
    assert ("ckpt.load_ckpt_folder (a run continues" in warning) == ("ckpt.load_ckpt_folder" in DENSE[family])
    assert resolved.config.ckpt.load_ckpt_info is None
    assert not resolved.config.ckpt.enable_save_ckpt


@pytest.mark.parametrize("family", REFUSED)
def test_other_families_are_refused_for_what_is_missing_only(family: str) -> None:
    changes, expected = REFUSED[family]
    with pytest.raises(ConfigError) as caught:
        check_runnable(resolve(published({**changes, "model.unknown_key": 1, "adam.lr": "x"})).config)
    texts = list(map(str, caught.value.problems))
    assert texts[0].startswith(expected)
    assert all("not available in this version" in text for text in texts)


@pytest.mark.parametrize(("family", "value"), [("LLAMA2", True), ("GEMMA", False)])
def test_the_offset_of_norms_is_that_of_the_family(family: str, value: bool) -> None:
    changes = {"model_type": family, "model.add_unit_offset": value}
    with pytest.raises(ConfigError, match=r"^model\.add_unit_offset: .*1 \+ weight in GEMMA, GEMMA3 and in no other"):
        resolve(published(changes))


def test_the_first_layers_without_window_are_global() -> None:
    changes = {"model_type": "QWEN2", "model.use_sliding_window": True, "model.sliding_window": 64}
    model = resolve(published({**changes, "model.max_window_layers": 3, "model.num_layers": 5})).config.model
    assert [model.window(layer) for layer in range(5)] == [None, None, None, 64, 64]


def test_the_list_of_model_types_is_that_of_the_families() -> None:
    assert sorted(MODEL_TYPES) == sorted([*FAMILIES, "hf"])


@pytest.mark.parametrize(
    ("given", "key", "expected"),
    [
        ({"hybrid_zero_optimizer.zero_overlap_communication": True}, "hybrid_zero_optimizer.overlap_sync_grad", True),
        ({"model.adapt_hf": True}, "model.qk_interleaved", False),
        ({"model.adapt_hf": False}, "model.qk_interleaved", True),
        ({"data.gradient_accumulation": 3}, "data.micro_num", 3),
        ({"ckpt.load_ckpt_info": {"path": None, "content": ("model",)}}, "ckpt.load_ckpt_info", None),
        ({"ckpt.checkpoint_every": math.inf}, "ckpt.checkpoint_every", 0),
        ({"model.dtype": "bf16"}, "model.dtype", "torch.bfloat16"),
        ({"model.dtype": "bfloat16"}, "model.dtype", "torch.bfloat16"),
        ({"model.dtype": "fp32"}, "model.dtype", "torch.float32"),
        ({"model.dtype": "half"}, "model.dtype", "torch.float16"),
        ({"reduce_comm_dtype": "fp32"}, "reduce_comm_dtype", "torch.float32"),
        ({"ckpt": {"save_ckpt_folder": "x", "checkpoint_every": 5}}, "ckpt.enable_save_ckpt", True),
        ({"ckpt": {"save_ckpt_folder": "x"}}, "ckpt.enable_save_ckpt", False),
        (
            {"ckpt": {"save_ckpt_folder": "x", "checkpoint_every": 5, "enable_save_ckpt": False}},
            "ckpt.enable_save_ckpt",
            False,
        ),
    ],
)
def test_other_spellings(given: dict[str, Any], key: str, expected: Any) -> None:
    config = config_of(given)
    if key == "data.micro_num":
        del config["data"]["micro_num"]
    value: Any = resolve(config, device_type="cpu").config
    for name in key.split("."):
        value = getattr(value, name)
    assert value == expected


@pytest.mark.parametrize(
    "asks_nothing",
    [
        {"hybrid_zero_optimizer.use_apex_adam": False},
        {"ckpt.load_optimizer": True},
        {"ckpt.snapshot_ckpt_folder": None},
        {"model.attn_drop_rate": 0},
        {"model.use_swiglu": True},
        {"model.init_type": "normal"},
        {"selective_checkpoint": False},
        {"selective_checkpoint_offload": False},
        {"parallel.weight.early_reduce_scatter_release": False},
        {"data.valid_micro_num": 0},
        {"model.num_experts": 0},
    ],
)
def test_keys_that_ask_for_nothing_neither_refuse_nor_warn(asks_nothing: dict[str, Any]) -> None:
    assert resolve(config_of(asks_nothing)).warnings == []


def test_a_checkpoint_path_that_is_no_placeholder_is_kept() -> None:
    info = resolve(config_of({"ckpt.load_ckpt_info": {"path": "local:llm_ckpts/xxxx5"}})).config.ckpt.load_ckpt_info
    assert info is not None
    assert info.path == "local:llm_ckpts/xxxx5"


def test_an_old_key_that_contradicts_the_new_one_is_refused() -> None:
    assert problems_of({"data.gradient_accumulation": 2}) == [
        "data.gradient_accumulation: contradicts its new name: it means data.micro_num = 2, but data.micro_num = 4. "
        "Remove data.gradient_accumulation"
    ]


@pytest.mark.parametrize(
    ("key", "named"),
    [
        ("batch_size", "data.micro_bsz"),
        ("data.batch_size", "data.micro_bsz"),
        ("model.num_heads", "model.num_attention_heads"),
        ("lr", "adam.lr"),
        ("max_steps", "data.total_steps"),
        ("model.n_layers", "model.num_layers"),
        ("model.hidden_dim", "model.hidden_size"),
        ("lr_scheduler.warmup_steps", "lr_scheduler.warmup_ratio"),
        ("warmup_steps", "lr_scheduler.warmup_ratio"),
        ("num_heads", "model.num_attention_heads"),
        ("n_layers", "model.num_layers"),
        ("hidden_dim", "model.hidden_size"),
        ("global_batch_size", "data.micro_bsz or data.micro_num"),
        ("num_epochs", "data.total_steps"),
        ("tp_size", "parallel.tensor.size"),
    ],
)
def test_names_of_other_programs_suggest_the_key_with_its_meaning(key: str, named: str) -> None:
    (problem,) = problems_of({key: 1})
    (same,) = map(str, found({}, [f"{key}=1"]))
    for text, where in ((problem, key), (same, f"--set {key}")):
        assert text.startswith(f"{where}: unknown key. Set {named} ")
        assert text.index("(") < text.index(")")
        assert "Did you mean" not in text


def test_names_of_options_suggest_the_option() -> None:
    (problem,) = map(str, found({}, ["seed=1"]))
    assert problem == "--set seed: unknown key. Pass --seed on the command line instead"


def test_a_name_like_no_other_lists_the_sections_alone() -> None:
    for name in ("xyzzy", "xyzzy.a"):
        (problem,) = map(str, found({}, [f"{name}=1"]))
        assert problem.startswith(f"--set {name}: unknown key. Known sections: adam, beta2_scheduler, ")
        assert ", parallel. Known keys: JOB_NAME, cudnn_benchmark, " in problem
        assert "adam.lr" not in problem


# -- input ------------------------------------------------------------------------------------------------------------
def test_a_key_that_is_not_a_string_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"^adam: contains the key 5, which is not a string\. Write keys as strings$"):
        resolve({**config_of({}), "adam": {"lr": 1e-3, 5: 6}})


def test_a_dict_that_contains_itself_is_refused() -> None:
    config = config_of({})
    config["model"]["inner"] = config["model"]
    with pytest.raises(
        ConfigError, match=r"^model\.inner: is the dict that contains it\. Remove it, or copy the inner"
    ):
        resolve(config)


def test_lists_are_searched_too() -> None:
    group: dict[Any, Any] = {"pattern": "norm", 5: 6}
    with pytest.raises(ConfigError, match=r"^optimizer\.param_groups: contains the key 5, which is not a string\."):
        resolve(config_of({}) | {"optimizer": {"param_groups": [group]}})
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(
        ConfigError, match=r"^optimizer\.param_groups: is the list that contains it\. Remove it, or copy"
    ):
        resolve(config_of({}) | {"optimizer": {"param_groups": endless}})


@pytest.mark.parametrize("text", ["2026", "1_1", "1e3", "True", "[1]"])
def test_keys_of_text_take_the_text(text: str) -> None:
    assert text == resolve(config_of({}), [f"JOB_NAME={text}"]).config.JOB_NAME


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31m", "a\0"])
def test_job_names_with_control_characters_are_refused(name: str) -> None:
    assert problems_of({"JOB_NAME": name}) == [
        f"JOB_NAME: {name!r} is not a valid folder name. Use letters, digits, '-' and '_'"
    ]


def test_dynamic_ntk_needs_more_than_one_frequency() -> None:
    changes = {"model.head_dim": 2, "model.use_dynamic_ntk_rope": True}
    (problem,) = problems_of(changes)
    assert problem.startswith("model.use_dynamic_ntk_rope: True requires model.head_dim of at least 4, got 2")
    assert not found({"model.head_dim": 4, "model.use_dynamic_ntk_rope": True})


#: Every key whose name says that it is a path.
PATHS = [key for key in keys.fields() if re.search(r"folder$|path$|\.table$", key)]


@pytest.mark.parametrize("key", PATHS)
def test_paths_are_expanded_by_one_rule(key: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RUNS", "/somewhere")
    paths = {"~/x": f"{tmp_path}/x", "local:~/x": f"local:{tmp_path}/x", "${RUNS}/x": "/somewhere/x", "x~": "x~"}
    for given, expected in paths.items():
        value: Any = resolve(config_of({key: given})).config
        for name in key.split("."):
            value = getattr(value, name)
        assert value == expected
    assert problems_of({key: "$NOT_SET_HERE/x"}) == [
        f"{key}: '$NOT_SET_HERE/x': the environment variable NOT_SET_HERE is not set. Correct the path"
    ]
