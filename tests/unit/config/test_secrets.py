"""Secrets in a config: webhook tokens and credentials in paths reach no log, no file and no error."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from internlm.cli.main import main
from internlm.config import check_runnable, config_hash, load_config, masked_dict, resolve, to_json
from internlm.config.keys import fields
from internlm.config.schema.fields import mask_of
from internlm.utils.errors import ConfigError, UserError
from internlm.utils.secrets import is_web_address, mask_credentials, mask_url, mask_urls_in
from tests.unit.config.samples import SMALLEST

TOKEN = "5f3a-t0ken"
WEBHOOK = f"https://open.feishu.cn/open-apis/bot/v2/hook/{TOKEN}"
ALERTS = {"enable_feishu_alert": True, "feishu_alert_address": WEBHOOK, "light_monitor_address": WEBHOOK}
PATHS = {"load_ckpt_info": {"path": f"s3://key:{TOKEN}/+x@bucket/step-1?signature={TOKEN}"}}


def config_with(**alert: Any) -> dict[str, Any]:
    return {**SMALLEST, "monitor": {"alert": {**ALERTS, **alert}}, "ckpt": PATHS}


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        (WEBHOOK, "https://open.feishu.cn/***"),
        ("http://127.0.0.1:80", "http://127.0.0.1:80"),
        ("https://user:pass@host/x", "https://***@host/***"),
        ("http://[::1]:80/x?y", "http://[::1]:80/***"),
        ("HTTPS://host?token", "HTTPS://host/***"),
        ("token alone", "***"),
    ],
)
def test_a_masked_url_keeps_scheme_and_host(url: str, masked: str) -> None:
    assert mask_url(url) == masked


@pytest.mark.parametrize(
    ("path", "masked"),
    [
        ("s3://key:secret@bucket/a/b", "s3://***@bucket/a/b"),
        ("boto3:s3://key:sec/ret+@bucket/a?sig=1", "boto3:s3://***@bucket/a?***"),
        ("https://token@host/a", "https://***@host/a"),
        ("s3://bucket/a@b", "s3://bucket/a@b"),
        ("local:/a:b@c?d", "local:/a:b@c?d"),
    ],
)
def test_a_masked_path_keeps_everything_but_credentials(path: str, masked: str) -> None:
    assert mask_credentials(path) == masked


def test_urls_are_masked_within_a_text() -> None:
    assert mask_urls_in(f"cannot reach '{WEBHOOK}' (/tmp/x)") == "cannot reach 'https://open.feishu.cn/***' (/tmp/x)"


def test_what_is_saved_and_shown_has_no_secret() -> None:
    config = load_config(config_with())
    for text in (repr(config), str(config), f"{config.monitor!r}", json.dumps(masked_dict(config))):
        assert TOKEN not in text
        assert "https://open.feishu.cn/***" in text
    assert masked_dict(config)["ckpt"]["load_ckpt_info"]["path"] == "s3://***@bucket/step-1?***"
    assert config.monitor.alert.feishu_alert_address == WEBHOOK, "the run itself has the true value"


def test_ranks_compare_the_true_values_and_checkpoints_the_masked_ones() -> None:
    one, other = load_config(config_with()), load_config(config_with(feishu_alert_address=f"{WEBHOOK}2"))
    assert TOKEN in to_json(one)
    assert config_hash(one) != config_hash(other)
    assert masked_dict(one) == masked_dict(other)


def test_the_printed_config_has_no_secret(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "config.py"
    file.write_text("\n".join(f"{name} = {value!r}" for name, value in {**config_with(), "ckpt": {}}.items()))
    main(["config", str(file)])
    printed = capsys.readouterr()
    assert TOKEN not in printed.out + printed.err
    value = json.loads(printed.out)["monitor"]["alert"]["feishu_alert_address"]
    assert value == {"value": "https://open.feishu.cn/***", "source": "file"}


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (f"ftp://host/{TOKEN}", "'ftp://host/***' is not an http or https URL. Set it to the http or https URL"),
        (f"file:///{TOKEN}", "'file:///***' is not an http or https URL"),
        (f"http:///{TOKEN}", "'http:///***' is not an http or https URL"),
        (f"http://host:port/{TOKEN}", "'http://host:port/***' is not an http or https URL"),
        (TOKEN, "'***' is not an http or https URL"),
        ([WEBHOOK], "is of type list"),
    ],
    ids=str,
)
def test_an_address_that_is_no_web_address_is_refused_without_being_shown(given: Any, shown: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(config_with(feishu_alert_address=given))
    (problem,) = raised.value.problems
    assert str(problem).startswith("monitor.alert.feishu_alert_address: ")
    assert shown in str(problem)
    assert TOKEN not in str(problem)


def test_other_errors_about_a_secret_do_not_show_it(tmp_path: Path) -> None:
    texts = []
    config = load_config(config_with())
    broken, raising = tmp_path / "broken.py", tmp_path / "raising.py"
    broken.write_text(f"monitor = dict(alert=dict(feishu_alert_address='{WEBHOOK}' 1)")
    raising.write_text(f"raise ValueError('no {WEBHOOK}')")
    for action in (
        lambda: setattr(config.monitor.alert, "feishu_alert_address", WEBHOOK),
        lambda: config.monitor.alert.update(feishu_alert_address=WEBHOOK),
        lambda: config.monitor.alert.setdefault("webhook", WEBHOOK),
        lambda: load_config({**SMALLEST, "monitor": {"alert": WEBHOOK}}),
        lambda: load_config({**SMALLEST, "ckpt": {"save_ckpt_folder": f"s3://k:{TOKEN}@b/$UNSET_VARIABLE"}}),
        lambda: check_runnable(load_config({**SMALLEST, "ckpt": {"save_ckpt_folder": f"s3://k:{TOKEN}@b/x"}})),
        lambda: resolve(SMALLEST, [f"monitor.alert..feishu_alert_address={WEBHOOK}"]),
        lambda: resolve(SMALLEST, [f"monitor.alert.feishu={WEBHOOK}"]),
        lambda: load_config(broken),
        lambda: load_config(raising),
    ):
        with pytest.raises(UserError) as raised:
            action()
        texts.append(str(raised.value))
    assert [text for text in texts if TOKEN in text] == []


@pytest.mark.parametrize("address", ["http://h", "https://h:80/x?y=z", "http://[::1]/x", "HTTP://h"])
def test_web_addresses(address: str) -> None:
    assert is_web_address(address)


@pytest.mark.parametrize(
    "address", ["", "h/x", "http:h", "http://", "http://a b/c", "http://[", "http://h\n", "ws://h"]
)
def test_what_is_no_web_address(address: str) -> None:
    assert not is_web_address(address)


def test_every_key_that_may_hold_a_secret_is_marked() -> None:
    named = [key for key in fields() if key.endswith(("_address", "_folder", "_path", ".path"))]
    assert len(named) > 10
    assert [key for key in named if mask_of(fields()[key]) is None] == []
