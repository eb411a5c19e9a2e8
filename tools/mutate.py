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


@dataclass(frozen=True)
class Mistake:
    """``old`` (which occurs once in ``file``, below ``internlm/``) becomes ``new``; ``tests`` must then fail."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...] = PARALLEL


TENSOR, ISP = "core/parallel/tensor_parallel.py", "core/parallel/isp.py"
GATHERER, LINEAR = "core/parallel/weight_gatherer.py", "core/parallel/linear.py"
ZERO, SCHEDULER = "solver/optimizer/zero_optimizer.py", "core/scheduler/schedulers.py"

MISTAKES = (
    Mistake("mtp: the output of a row is not summed", TENSOR, "return all_reduce(y, self.group)", "return y"),
    Mistake(
        "mtp: the gradient of a column's input is not summed",
        TENSOR,
        """        # Begun here, it runs under the product for the weight's gradient.
        return begin_all_reduce(dx, self.group)""",
        "        return Pending(dx)",
    ),
    Mistake(
        "partial gradients of norms are not summed",
        ZERO,
        "if group.partial_over is not None:",
        "if False:",
    ),
    Mistake(
        "the norm counts whole parameters on every rank",
        ZERO,
        "squares[modes.index(group.split_over)] +=",
        "squares[-1] +=",
    ),
    Mistake("the norm leaves split parameters unsummed", ZERO, "all_reduce(square, self.split_groups[mode])", "pass"),
    Mistake(
        "the loss is divided by this rank's valid tokens",
        SCHEDULER,
        "int(all_reduce(micro_batches.valid_tokens(), self.data_group))",
        "int(micro_batches.valid_tokens())",
    ),
    Mistake("the last micro-batch is dropped", "core/scheduler/compute.py", "return len(self._labels)\n",
            "return max(len(self._labels) - 1, 1)\n"),
    Mistake(
        "isp: rotary positions begin anew on every rank",
        ISP,
        "return all_gather(positions, self.group)",
        "return positions.repeat(self.group.size)",
    ),
    Mistake("isp: gradients of a repeated kv head are not summed", ISP, "dqkv[:, :, :, -2:].sum(2)",
            "dqkv[:, :, 0, -2:]", ("tests/dist/test_parallel.py", "-k", "fewer_kv_heads")),
    Mistake("isp: heads come back in the wrong order", ISP,
            "all_to_all(heads.view(self.group.size, tokens, -1), self.group).transpose(0, 1).flatten(1)",
            "all_to_all(heads.view(self.group.size, tokens, -1), self.group).flip(0).transpose(0, 1).flatten(1)"),
    Mistake("isp: the gradient of the embedding is not summed", ISP,
            "return reduce_scatter(F.pad(dw, (0, 0, 0, -self.vocab_size % self.group.size)), self.group)",
            "return F.pad(dw, (0, 0, 0, -self.vocab_size % self.group.size)).chunk(self.group.size)[self.group.rank]"),
    Mistake("isp: with overlap the last gradient is never delivered", GATHERER,
            "        self._deliver()\n        self._release_all()\n\n    def",
            "        self._release_all()\n\n    def", ("tests/dist/test_parallel.py", "-k", "overlap")),
    Mistake("isp: with overlap a weight is read before it has arrived", GATHERER,
            "whole = self._gathers.pop(index).wait()", "whole = self._gathers.pop(index)._result",
            ("tests/dist/test_parallel.py", "-k", "overlap or every_layout")),
    Mistake("isp: every rank reads the first part of the row", "data/loader.py",
            ".chunk(sequence_shard.size, 1)[sequence_shard.rank]", ".chunk(sequence_shard.size, 1)[0]"),
    Mistake("msp, fsp: the gradient of a row's bias is that of all tokens", LINEAR,
            '''        db = add_grad(bias, dy.sum(0)) if needs_bias else None
        dy = comm.gather_grad_output(dy)  # [T, O]
''',
            '''        dy = comm.gather_grad_output(dy)  # [T, O]
        db = add_grad(bias, dy.sum(0)) if needs_bias else None
'''),
    Mistake("msp, fsp: the gradient of the head's input is sliced, not summed", TENSOR,
            "lambda dx: reduce_scatter(dx, self.group))",
            "lambda dx: dx.chunk(self.group.size)[self.group.rank].contiguous())"),
    Mistake("msp, fsp: hidden slices go to the wrong tokens", TENSOR, "return received.transpose(0, 1).flatten(1)",
            "return received.flip(0).transpose(0, 1).flatten(1)"),
    Mistake("an embedding split by vocabulary looks up the first rank's entries", TENSOR,
            "self.first = group.rank * placement.local_shape[0]", "self.first = 0"),
    Mistake("an embedding split by hidden size takes the first rank's gradient", TENSOR,
            "dx.chunk(group.size, 1)[group.rank]", "dx.chunk(group.size, 1)[0]"),
    Mistake("padding of the vocabulary is counted as entries", TENSOR,
            "self.columns = min(self.first + rows, self.total) - self.first", "self.columns = rows"),
    Mistake("label smoothing spreads over this rank's entries alone", TENSOR,
            "self.total = placement.local_shape[0], placement.global_shape[0]",
            "self.total = placement.local_shape[0], placement.local_shape[0]"),
    Mistake("gate and up projection are split at the wrong axis", "model/decoder.py", "split_axis=1", "split_axis=0"),
    Mistake("a padded part is filled from the wrong rows", "core/parallel/placement.py",
            "first = min(self.shard.index * size, total)", "first = min(self.shard.index * size // 2, total)"),
    Mistake("replicated parameters of isp are called complete", "core/parallel/sharding.py",
            '"isp": ParallelMode.WEIGHT}', '"isp": None}'),
    Mistake("the ledger forgets the second half of an all-reduce", "core/parallel/collectives.py",
            "2 * (group.size - 1) * tensor.nbytes // group.size", "(group.size - 1) * tensor.nbytes // group.size",
            ("tests/dist/test_traffic.py",)),
    Mistake("fsp keeps what it gathered", TENSOR, '''class FspColumn(Communicator):
    """''', '''class FspColumn(Communicator):
    keeps_gathered_input = True
    """''', ("tests/dist/test_traffic.py",)),
    Mistake("a pipeline's norm is that of one stage", ZERO, "all_reduce(squares.sum(), self.pipeline_group)",
            "squares.sum()", PIPELINE),
    Mistake("the norm counts a tied embedding twice", ZERO, "if not self._is_copy(group):", "if True:", PIPELINE),
    Mistake("gradients of a tied embedding are not summed", "model/decoder.py",
            "if c.tie_word_embeddings and part.has_embedding != part.has_head:", "if False:", PIPELINE),
    Mistake("the loss stays on the last stage", SCHEDULER,
            "all_reduce(all_reduce(compute.sums, self.data_group), self.pipeline.group)",
            "all_reduce(compute.sums, self.data_group)", PIPELINE),
    Mistake("a gradient that was put off is forgotten", "core/scheduler/compute.py", "state.tasks.pop(0)()",
            "state.tasks.pop(0)", PIPELINE),
    Mistake("hidden units of one micro-batch are taken for another's", "core/scheduler/plan.py",
            "receives[bisect_left(ends, time)].append(receive)", "receives[bisect_left(ends, time)].insert(0, receive)",
            PIPELINE),
    Mistake("chunks of a V are cut as if in rounds", "costs/stages.py", "layout.virtual(stage, chunk) for chunk",
            "chunk * layout.stages + stage for chunk", PIPELINE),
    Mistake("isp: a weight of the next chunk is prefetched in vain", GATHERER,
            "return 0 <= other < len(self.linears) and self.linears[index].chunk == self.linears[other].chunk",
            "return 0 <= other < len(self.linears)", ("tests/dist/test_traffic.py",)),
)  # fmt: skip


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
    """The first test that failed; empty where none did."""
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
