"""Faults beside training: webhooks that are down or slow, steps that are not finite, disks that are full."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from internlm.core.trainer import Hook, StepReport, Trainer
from internlm.monitor import send_alert_message, webhook
from tests.dist.whole_runs import fit, resume, saving
from tests.harness.webhooks import answering, dribbling, silent, webhook_server

TOKEN = "t0ken"


# -- webhooks


@dataclass
class _Alerting(Hook):
    """Send an alert to each address in each step, and assert that the calls take less than 5 % of a run's time."""

    addresses: tuple[str, ...]
    seconds: float = 0.0

    def before_run(self, trainer: Trainer) -> None:
        self.limits = {name: vars(webhook)[name] for name in ("EXCHANGE_SECONDS", "FLUSH_SECONDS")}
        vars(webhook).update(dict.fromkeys(self.limits, 0.2))
        self.start = time.perf_counter()

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        start = time.perf_counter()
        for address in self.addresses:
            send_alert_message(address, message=f"step {report.step}")
        self.seconds += time.perf_counter() - start

    def after_run(self, trainer: Trainer) -> None:
        seconds = time.perf_counter() - self.start
        webhook.SENDER.flush()
        vars(webhook).update(self.limits)
        assert self.seconds < 0.05 * seconds


def test_training_takes_no_notice_of_webhooks_that_are_down_slow_or_fail() -> None:
    with ExitStack() as servers:
        down = servers.enter_context(answering(silent)).replace("127.0.0.1", "127.0.0.2")
        slow, dribbles = (servers.enter_context(answering(answer)) for answer in (silent, dribbling))
        fails = servers.enter_context(webhook_server(500)).address
        addresses = tuple(f"{address}/{TOKEN}" for address in (down, slow, dribbles, fails))
        run = fit(2, ["data.total_steps=20"], hooks=[_Alerting(addresses)])
    assert run.state["step"] == 20
    warnings = [text for rank in run.ranks for text in rank.warnings]
    for reason in ("Connection refused", "no response within 0.2 s", "alerts are dropped"):
        assert any(reason in text for text in warnings), warnings
    assert TOKEN not in "".join(warnings)


def test_no_file_of_a_run_holds_the_token_and_it_resumes(tmp_path: Path) -> None:
    with webhook_server() as hook:
        alert = f"monitor.alert.feishu_alert_address={hook.address}/{TOKEN}"
        run = saving(tmp_path, "monitor.alert.enable_feishu_alert=True", alert)
        assert fit(1, run).state["step"] == 6
        assert len(hook.texts) == 2
        assert resume(1, run).message.startswith("resumed from ")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert [path for path in files if TOKEN.encode() in path.read_bytes()] == []
