"""Locations of checkpoints become storages, or errors of one line."""

from __future__ import annotations

from pathlib import Path

import pytest

from internlm.checkpoint.locations import open_storage, split_checkpoint
from internlm.config.schema.fields import parse_object_address
from internlm.utils.errors import CheckpointError


def problem_of(location: str, split: bool = False) -> str:
    with pytest.raises(CheckpointError) as caught:
        (split_checkpoint if split else open_storage)(location)
    (problem,) = caught.value.problems
    assert "\n" not in str(problem)
    return str(problem)


@pytest.mark.parametrize(
    ("location", "folder"),
    [
        ("local:ckpts/7b", "HERE/ckpts/7b"),
        ("ckpts/7b/", "HERE/ckpts/7b"),
        ("/data/ckpts", "/data/ckpts"),
        ("local:/data", "/data"),
        ("~/a", "HOME/a"),
        ("local:~/a", "HOME/a"),
        ("./a:b", "HERE/a:b"),
        ("c:/ckpts", "HERE/c:/ckpts"),
    ],
)
def test_a_local_folder_may_be_written_in_several_ways(
    location: str, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    expected = folder.replace("HERE", str(tmp_path)).replace("HOME", str(Path.home()))
    assert open_storage(location).location == expected
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("protocol", ["", "boto3:"])
@pytest.mark.parametrize(
    ("rest", "prefix"), [("", ""), ("/", ""), ("/runs", "runs"), ("/runs/7b/", "runs/7b"), ("//runs", "runs")]
)
def test_an_address_has_a_bucket_and_a_prefix(protocol: str, rest: str, prefix: str) -> None:
    assert parse_object_address(f"{protocol}s3://my-bucket{rest}") == ("my-bucket", prefix)


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("hdfs://a/b", "expected local:FOLDER, a plain path or s3://BUCKET/FOLDER, got 'hdfs://a/b'"),
        ("boto3:a/b", "expected local:FOLDER, a plain path or s3://BUCKET/FOLDER, got 'boto3:a/b'"),
        ("s3:bucket/a", "expected local:FOLDER, a plain path or s3://BUCKET/FOLDER, got 's3:bucket/a'"),
        ("s3://", "expected s3://BUCKET/FOLDER with a bucket of letters"),
        ("s3:///a", "expected s3://BUCKET/FOLDER with a bucket of letters"),
        ("s3://host:9000/a", "expected s3://BUCKET/FOLDER with a bucket of letters"),
        ("s3://bucket/a/../b", "expected folder names without '//', '.' and '..', got 's3://bucket/a/../b'"),
        ("s3://bucket/a//b", "expected folder names without '//'"),
        ("", "'': names no folder. Use local:FOLDER or a plain path"),
        ("local:", "'local:': names no folder"),
    ],
)
def test_a_malformed_location_is_an_error_of_one_line(location: str, message: str) -> None:
    assert message in problem_of(location)


@pytest.mark.parametrize("address", ["s3://key:SECRET@bucket/x", "s3://key:SEC/RET@bucket/x", "gs://key:SECRET@b/x"])
def test_the_error_of_a_malformed_address_masks_its_credentials(address: str) -> None:
    for problem in (problem_of(address), problem_of(f"boto3:{address}"), problem_of(address, split=True)):
        assert "://***@b" in problem
        assert "RET" not in problem


@pytest.mark.parametrize(
    ("location", "storage", "name"),
    [
        ("local:x/y/step-40/", "local:x/y", "step-40"),
        ("x/y/step-40", "x/y", "step-40"),
        ("step-40", ".", "step-40"),
        ("local:step-40//", "local:.", "step-40"),
        ("/step-40", "/", "step-40"),
        ("s3://bucket/step-40", "s3://bucket", "step-40"),
        ("boto3:s3://bucket/runs/7b/snapshot-0/", "s3://bucket/runs/7b", "snapshot-0"),
    ],
)
def test_the_location_of_a_checkpoint_has_a_storage_and_a_name(location: str, storage: str, name: str) -> None:
    assert split_checkpoint(location) == (storage, name)


@pytest.mark.parametrize("location", ["", "/", "local:", "s3://bucket", "s3://bucket/"])
def test_the_root_of_a_storage_is_no_checkpoint(location: str) -> None:
    assert "names no checkpoint. Add its folder, such as step-1000" in problem_of(location, split=True)


def test_a_link_that_the_user_names_stands_for_its_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ckpts/step-40").mkdir(parents=True)
    (tmp_path / "latest").symlink_to("ckpts/step-40")
    assert split_checkpoint(f"{tmp_path}/latest/") == (str(tmp_path / "ckpts"), "step-40")
    monkeypatch.chdir(tmp_path / "ckpts/step-40")
    assert split_checkpoint(".") == (str(tmp_path / "ckpts"), "step-40")
    assert split_checkpoint("local:..") == (f"local:{tmp_path}", "ckpts")
