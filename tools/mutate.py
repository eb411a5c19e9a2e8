"""Plant mistakes in the parallel code, one at a time, and see whether the tests catch each.

Usage: ``python tools/mutate.py [--write] [--only WORD ...]``. Works on a copy of the project in a temporary folder.
With ``--write`` the outcome goes into ``doc/testing.md``.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "doc" / "testing.md"
BEGIN, END = "<!-- mutations: begin -->", "<!-- mutations: end -->"
PIPELINE = ("tests/dist/test_pipeline.py",)
PARALLEL = ("tests/dist/test_parallel.py", "-k", "test_every_layout or test_every_case")


@dataclass(frozen=True, kw_only=True)
class Mistake:
    """``old`` (which occurs once in ``file``, below ``internlm/``) becomes ``new``; ``tests`` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = PARALLEL


MISTAKES = (
    Mistake(
        name="mtp: the output of a row is not summed",
        file="core/parallel/tensor_parallel.py",
        old="return all_reduce(y, self.group)",
        new="return y",
    ),
    Mistake(
        name="mtp: the gradient of a column's input is not summed",
        file="core/parallel/tensor_parallel.py",
        old=(
            "        # It overlaps with the matmul for the weight's gradient.\n"
            "        return begin_all_reduce(dx, self.group)"
        ),
        new="        return Pending(dx)",
    ),
    Mistake(
        name="partial gradients of norms are not summed",
        file="solver/optimizer/grad_reduce.py",
        old="if mode is not None and self._shard.numel()",
        new="if False",
    ),
    Mistake(
        name="fully sharded: partial gradients of norms are not summed",
        file="solver/optimizer/grad_reduce.py",
        old="if group.key.partial_over is not None",
        new="if False",
        tests=("tests/dist/test_fsdp.py", "-k", "test_every_row"),
    ),
    Mistake(
        name="the norm counts whole parameters on every rank",
        file="solver/optimizer/zero_optimizer.py",
        old="squares[modes.index(group.key.split_over)] +=",
        new="squares[-1] +=",
    ),
    Mistake(
        name="the norm leaves split parameters unsummed",
        file="solver/optimizer/zero_optimizer.py",
        old="all_reduce(square.add_(squares[0] * 0), self.process_groups.by_split[mode])",
        new="pass",
    ),
    Mistake(
        name="the loss is divided by this rank's valid tokens",
        file="core/scheduler/loss.py",
        old="all_reduce(valid_tokens.sum(), data_group).clamp",
        new="valid_tokens.sum().clamp",
    ),
    Mistake(
        name="isp: the mean of a micro-batch is that of this rank's tokens",
        file="core/scheduler/loss.py",
        old="whole = all_reduce(valid_tokens.clone(), micro_batch_group)",
        new="whole = valid_tokens",
        tests=("tests/dist/test_parallel.py", "-k", "means_of_micro_batches"),
    ),
    Mistake(
        name="the last micro-batch is dropped",
        file="core/scheduler/micro_batches.py",
        old="return len(self._labels)\n",
        new="return max(len(self._labels) - 1, 1)\n",
    ),
    Mistake(
        name="isp: rotary positions begin anew on every rank",
        file="core/parallel/isp.py",
        old="return all_gather(positions, self.group)",
        new="return positions.repeat(self.group.size)",
    ),
    Mistake(
        name="isp: gradients of a repeated kv head are not summed",
        file="core/parallel/isp.py",
        old="dqkv[:, :, :, -2:].sum(2)",
        new="dqkv[:, :, 0, -2:]",
        tests=("tests/dist/test_parallel.py", "-k", "fewer_kv_heads"),
    ),
    Mistake(
        name="isp: heads come back in the wrong order",
        file="core/parallel/isp.py",
        old="all_to_all(heads.view(self.group.size, tokens, -1), self.group).transpose(0, 1).flatten(1)",
        new="all_to_all(heads.view(self.group.size, tokens, -1), self.group).flip(0).transpose(0, 1).flatten(1)",
    ),
    Mistake(
        name="isp: the gradient of the embedding is not summed",
        file="core/parallel/isp.py",
        old="return reduce_scatter(pad_rows(dw, self.group), self.group)",
        new="return pad_rows(dw, self.group).chunk(self.group.size)[self.group.rank]",
    ),
    Mistake(
        name="isp: with overlap the last gradient is never delivered",
        file="core/parallel/weight_gatherer.py",
        old=(
            "        # Registered several times per backward pass; all calls but the first are no-ops.\n"
            "        self._deliver()\n"
        ),
        new="",
        tests=("tests/dist/test_parallel.py", "-k", "overlap"),
    ),
    Mistake(
        name="isp: with overlap a weight is read before it has arrived",
        file="core/parallel/weight_gatherer.py",
        old="whole = self._gathers.pop(index).wait()",
        new="whole = self._gathers.pop(index)._result",
        tests=("tests/dist/test_parallel.py", "-k", "overlap or every_layout"),
    ),
    Mistake(
        name="isp: every rank reads the first shard of the sequence",
        file="data/loader.py",
        old=".chunk(sequence_shard.size, 1)[sequence_shard.rank]",
        new=".chunk(sequence_shard.size, 1)[0]",
    ),
    Mistake(
        name="msp, fsp: the gradient of a row's bias is that of all tokens",
        file="core/parallel/linear.py",
        old=(
            "        dbs = _grad_biases(dy, ctx.biases, outputs, needs_biases)\n"
            "        dy = outputs.comms[0].gather_grad_output(dy)  # [T, O]\n"
        ),
        new=(
            "        dy = outputs.comms[0].gather_grad_output(dy)  # [T, O]\n"
            "        dbs = _grad_biases(dy, ctx.biases, outputs, needs_biases)\n"
        ),
    ),
    Mistake(
        name="msp, fsp: the gradient of the head's input is sliced, not summed",
        file="core/parallel/tensor_parallel.py",
        old="lambda dx: reduce_scatter(dx, self.group))",
        new="lambda dx: dx.chunk(self.group.size)[self.group.rank].contiguous())",
    ),
    Mistake(
        name="msp, fsp: hidden slices go to the wrong tokens",
        file="core/parallel/tensor_parallel.py",
        old="return received.transpose(0, 1).flatten(1)",
        new="return received.flip(0).transpose(0, 1).flatten(1)",
    ),
    Mistake(
        name="an embedding split by vocabulary looks up the first rank's entries",
        file="core/parallel/tensor_parallel.py",
        old="self.first = group.rank * placement.local_shape[0]",
        new="self.first = 0",
    ),
    Mistake(
        name="an embedding split by hidden size takes the first rank's gradient",
        file="core/parallel/tensor_parallel.py",
        old="dx.chunk(group.size, 1)[group.rank]",
        new="dx.chunk(group.size, 1)[0]",
    ),
    Mistake(
        name="padding of the vocabulary is counted as entries",
        file="core/parallel/tensor_parallel.py",
        old="self.columns = min(self.first + rows, self.total) - self.first",
        new="self.columns = rows",
    ),
    Mistake(
        name="label smoothing spreads over this rank's entries alone",
        file="core/parallel/tensor_parallel.py",
        old="self.total = placement.local_shape[0], placement.global_shape[0]",
        new="self.total = placement.local_shape[0], placement.local_shape[0]",
    ),
    Mistake(
        name="gate and up projection are split at the wrong axis",
        file="model/blocks.py",
        old="split_axis=1",
        new="split_axis=0",
    ),
    Mistake(
        name="a padded shard is filled from the wrong rows",
        file="core/parallel/placement.py",
        old="first = min(self.shard.index * size, total)",
        new="first = min(self.shard.index * size // 2, total)",
    ),
    Mistake(
        name="replicated parameters of isp are called complete",
        file="core/parallel/sharding.py",
        old='"isp": ParallelMode.WEIGHT}',
        new='"isp": None}',
    ),
    Mistake(
        name="the ledger forgets the second half of an all-reduce",
        file="core/parallel/collectives.py",
        old="2 * (group.size - 1) * tensor.nbytes // group.size",
        new="(group.size - 1) * tensor.nbytes // group.size",
        tests=("tests/dist/test_traffic.py",),
    ),
    Mistake(
        name="fsp keeps what it gathered",
        file="core/parallel/tensor_parallel.py",
        old=('class FspColumn(Communicator):\n    """'),
        new=('class FspColumn(Communicator):\n    keeps_gathered_input = True\n    """'),
        tests=("tests/dist/test_traffic.py",),
    ),
    Mistake(
        name="a pipeline's norm is that of one stage",
        file="solver/optimizer/zero_optimizer.py",
        old="all_reduce(squares.sum(), self.process_groups.pipeline)",
        new="squares.sum()",
        tests=PIPELINE,
    ),
    Mistake(
        name="the norm counts a tied embedding twice",
        file="solver/optimizer/zero_optimizer.py",
        old="[] if self._is_copy(group) else row_norms(group.grad_shards)",
        new="row_norms(group.grad_shards)",
        tests=PIPELINE,
    ),
    Mistake(
        name="gradients of a tied embedding are not summed",
        file="model/decoder.py",
        old="if c.tie_word_embeddings and stage_layers.has_embedding != stage_layers.has_head:",
        new="if False:",
        tests=PIPELINE,
    ),
    Mistake(
        name="the loss stays on the last stage",
        file="core/scheduler/schedulers.py",
        old="all_reduce(all_reduce(compute.sums, self.data_group), self.pipeline.group)",
        new="all_reduce(compute.sums, self.data_group)",
        tests=PIPELINE,
    ),
    Mistake(
        name="a deferred weight gradient is dropped",
        file="core/scheduler/compute.py",
        old="state.tasks.pop(0)()",
        new="state.tasks.pop(0)",
        tests=PIPELINE,
    ),
    Mistake(
        name="hidden states of one micro-batch are taken for another's",
        file="core/scheduler/plan.py",
        old="receives[bisect_left(ends, time)].append(receive)",
        new="receives[bisect_left(ends, time)].insert(0, receive)",
        tests=PIPELINE,
    ),
    Mistake(
        name="chunks of a V are assigned as if interleaved",
        file="costs/stages.py",
        old="layout.virtual(stage, chunk) for chunk",
        new="chunk * layout.stages + stage for chunk",
        tests=PIPELINE,
    ),
    Mistake(
        name="isp: a weight of the next chunk is prefetched in vain",
        file="core/parallel/weight_gatherer.py",
        old="return 0 <= other < len(self.linears) and self.linears[index].chunk == self.linears[other].chunk",
        new="return 0 <= other < len(self.linears)",
        tests=("tests/dist/test_traffic.py",),
    ),
    Mistake(
        name="fp16: gradients are clipped before they are unscaled",
        file="solver/optimizer/zero_optimizer.py",
        old="((norm + 1e-6) / clip)",
        new="((norm * scale + 1e-6) / clip)",
        tests=("tests/unit/solver/test_zero_optimizer.py",),
    ),
    Mistake(
        name="AdamW decays a group with its own learning rate twice",
        file="solver/optimizer/update_rules.py",
        old="            if double:\n",
        new=(
            '            options["weight_decay"] = group.key.weight_decay * (1 if group.key.lr_scale == 1 else 2)\n'
            "            if double:\n"
        ),
        tests=("tests/unit/solver/test_update_rules.py",),
    ),
    Mistake(
        name="a resumed run draws dropout masks as from its first step",
        file="core/trainer.py",
        old="step=self.state.step, loss_scale=",
        new='step=next(vars(self).setdefault("_steps", iter(range(10**9)))), loss_scale=',
        tests=("tests/dist/test_resume.py", "-k", "data-mid-epoch"),
    ),
    Mistake(
        name="gradients are taken for complete as with the first number of micro-batches",
        file="solver/optimizer/grad_reduce.py",
        old="self._learned.get(micro_batches, {})",
        new="next(iter(self._learned.values()), {})",
        tests=("tests/unit/solver/test_zero_optimizer.py",),
    ),
    Mistake(
        name="dropout of the embedding is not rescaled",
        file="model/decoder.py",
        old='drop_in(None)("embedding", self._embed(input_ids))',
        new='drop_in(None)("embedding", self._embed(input_ids) * (1 - self.spec.config.drop_rate))',
        tests=("tests/unit/model/test_decoder.py",),
    ),
)


def main() -> int:
    """Try all; 0 where all were caught."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write the outcome into {PAGE.name}")
    parser.add_argument("--only", nargs="+", default=[""], help="try those whose description contains one of these")
    args = parser.parse_args()
    chosen = [mistake for mistake in MISTAKES if any(words in mistake.name for words in args.only)]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "project"
        copy.mkdir()
        for part in ("internlm", "tests", "pyproject.toml", "configs", "bench", "tools", "doc"):
            source = ROOT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / part)
        if failed := _failing(sorted({mistake.tests for mistake in chosen}), copy):
            sys.exit(f"these fail without any mistake, so they can't catch one: {failed}")
        outcomes = {mistake: _caught_by(mistake, copy) for mistake in chosen}
    if args.write:
        _write(outcomes)
    return 0 if all(outcomes.values()) else 1


def _run(tests: tuple[str, ...], copy: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-p", "no:cacheprovider", *tests]
    environment = {**os.environ, "PYTHONPATH": str(copy)}
    return subprocess.run(command, cwd=copy, capture_output=True, text=True, env=environment)


def _failing(selections: list[tuple[str, ...]], copy: Path) -> list[tuple[str, ...]]:
    return [tests for tests in selections if _run(tests, copy).returncode]


def _caught_by(mistake: Mistake, copy: Path) -> str:
    """Return the first test that failed; empty where none did."""
    file = copy / "internlm" / mistake.file
    right = file.read_text()
    assert right.count(mistake.old) == 1, f"{mistake.name}: {right.count(mistake.old)} places in {mistake.file}"
    file.write_text(right.replace(mistake.old, mistake.new))
    run = _run(mistake.tests, copy)
    file.write_text(right)
    found = re.search(r"^(?:FAILED|ERROR) \S*?(\w+\.py::\S.*?)(?: - .*)?$", run.stdout, re.M)
    caught = found[1] if found and run.returncode == 1 else ""
    print(f"{'caught' if caught else 'MISSED'}: {mistake.name} ({caught or run.stdout[-500:]})", flush=True)
    return caught


def _write(outcomes: dict[Mistake, str]) -> None:
    text = PAGE.read_text()
    before, rest = text.split(BEGIN)
    known = {line.split(" | ")[0].removeprefix("| "): line for line in rest.split(END)[0].splitlines()}
    known |= {
        m.name: f"| {m.name} | `{m.file}` | {f'`{caught}`' if caught else '**missed**'} |"
        for m, caught in outcomes.items()
    }
    rows = [known[m.name] for m in MISTAKES if m.name in known]  # of those not tried now, what was found before
    table = "\n".join(["| mistake | planted in | caught first by |", "|---|---|---|", *rows])
    PAGE.write_text(f"{before}{BEGIN}\n{table}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    sys.exit(main())
