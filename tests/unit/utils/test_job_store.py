"""The job's store: no call blocks, whatever its server does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator

import pytest
import torch.distributed as dist

from internlm.utils import job_store
from internlm.utils.job_store import JobStore, StoreError, count_in_store, first_on_host, has_first_on_host
from internlm.utils.torch_private import default_store


@pytest.fixture
def store() -> Iterator[JobStore]:
    store = JobStore(dist.HashStore())
    yield store
    store.close()


def test_calls_return_what_the_store_answers(store: JobStore) -> None:
    store.call(lambda client: client.set("key", "value"))
    assert store.call(lambda client: client.get("key")) == b"value"


def test_a_call_without_an_answer_ends_and_so_do_those_after_it(store: JobStore) -> None:
    """Until the store answers again."""
    answers = threading.Event()
    start = time.monotonic()
    for function in (lambda client: answers.wait(), lambda client: client.num_keys()):
        with pytest.raises(StoreError, match="does not answer") as caught:
            store.call(function, 0.05)
        assert caught.value.silent
    assert time.monotonic() - start < 1
    answers.set()
    assert store.call(lambda client: client.check(["key"]), 5) is False


def test_a_server_that_is_gone_is_reported_at_once_and_without_stack_traces(capfd: pytest.CaptureFixture[str]) -> None:
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    client = dist.TCPStore("127.0.0.1", server.port, is_master=False, wait_for_workers=False)
    store = JobStore(dist.PrefixStore("prefix", client))
    store.call(lambda client: client.set("key", "value"))
    assert client.get("prefix/key") == b"value"
    del server
    with pytest.raises(StoreError, match="is gone") as caught:
        store.call(lambda client: client.get("key"))
    assert not caught.value.silent
    store.close()
    assert capfd.readouterr().err == ""


def test_the_client_belongs_to_the_process_group_of_the_moment() -> None:
    assert job_store.job_store() is None
    assert count_in_store("topic", 1) == 1
    assert count_in_store("topic", 1) == 1  # nothing counts
    for _ in range(2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            assert [count_in_store("topic", 1) for _ in range(2)] == [1, 2]
            assert count_in_store(os.fsdecode(b"\xe9t\xe9"), 1) == 1  # a path that is not in UTF-8
            client = job_store.job_store()
            assert client is not None
            assert client.source is default_store()
            assert job_store.job_store() is client
        finally:
            dist.destroy_process_group()
            job_store.close_job_store()


@pytest.mark.skipif(not os.path.exists("/proc/self/ns"), reason="names without files exist on Linux only")
def test_one_process_of_a_host_is_the_first() -> None:
    """Each topic has another."""
    topics = [f"{os.getpid()} {path}" for path in ("/runs/1", os.fsdecode(b"/runs/\xe9t\xe9"))]
    assert not has_first_on_host(topics[0])
    assert [first_on_host(topic) for topic in (*topics, *topics)] == [True, True, False, False]
    assert has_first_on_host(topics[0])
