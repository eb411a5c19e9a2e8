"""Slurm host lists."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from internlm.initialize.environment import expand_host_list

LISTS = {
    "login": ["login"],
    "a,b": ["a", "b"],
    " a , b ": ["a", "b"],
    "gpu[003-005,9]": ["gpu003", "gpu004", "gpu005", "gpu9"],
    "gpu[8-11]": ["gpu8", "gpu9", "gpu10", "gpu11"],
    "gpu[098-101]": ["gpu098", "gpu099", "gpu100", "gpu101"],
    "gpu[1-2],login,cpu[7]": ["gpu1", "gpu2", "login", "cpu7"],
    "rack[1-2]node[01-02]": ["rack1node01", "rack1node02", "rack2node01", "rack2node02"],
    "gpu[1-2]-ib.cluster": ["gpu1-ib.cluster", "gpu2-ib.cluster"],
    "host-10-0-[1,3-4]": ["host-10-0-1", "host-10-0-3", "host-10-0-4"],
    "gpu[5-5]": ["gpu5"],
}


@pytest.mark.parametrize("text", LISTS)
def test_lists(text: str) -> None:
    assert expand_host_list(text) == LISTS[text]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not a host list such as 'gpu[003-005,9]'"),
        ("gpu1,", "'gpu1,' is not a host list"),
        ("gpu 1", "'gpu 1' is not a host list"),
        ("gpu]1[", "'gpu]1[' is not a host list"),
        ("gpu[1-2", "'gpu[1-2' has unbalanced brackets"),
        ("gpu1-2]", "'gpu1-2]' has unbalanced brackets"),
        ("gpu[]", "'' is not an integer or a range such as '003-005'"),
        ("gpu[1,]", "'' is not an integer or a range"),
        ("gpu[a-b]", "'a-b' is not an integer or a range"),
        ("gpu[1-2-3]", "'1-2-3' is not an integer or a range"),
        ("gpu[1-[2]]", "'1-[2' is not an integer or a range"),
        ("gpu[5-3]", "the range '5-3' is empty: its end is less than its start"),
    ],
)
def test_what_is_no_list(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        expand_host_list(text)


@given(st.integers(0, 10**6), st.integers(0, 50), st.integers(1, 8))
def test_a_range_keeps_its_width(first: int, more: int, width: int) -> None:
    hosts = expand_host_list(f"n[{first:0{width}}-{first + more:0{width}}]")
    assert hosts == [f"n{number:0{width}}" for number in range(first, first + more + 1)]
