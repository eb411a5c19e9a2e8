"""Location of a step in the data, for commands that read it again: what is known of it, and the loader's plan."""

from __future__ import annotations

from internlm.checkpoint.compatibility import other_samples
from internlm.checkpoint.data_position import LocatedStep, StepEvidence, find_evidence, locate_step
from internlm.checkpoint.locations import open_storage
from internlm.checkpoint.saved_checkpoint import find_checkpoints
from internlm.config import Config, masked_dict
from internlm.data.loader import TrainLoader
from internlm.utils.errors import CheckpointError
from internlm.utils.logger import get_logger

log = get_logger()


def evidence_of(config: Config, location: str | None, step: int) -> StepEvidence:
    """Return what the checkpoints of a run show of ``step``.

    Args:
        config: Config of the run.
        location: Folder of its checkpoints, or one of them; None: ``ckpt.save_ckpt_folder``, if it has checkpoints.
        step: Index of the step.

    Raises:
        CheckpointError: There is no checkpoint at ``location``, or it cannot be read.
    """
    if location is not None:
        return find_evidence(location, step)
    folder = config.ckpt.save_ckpt_folder
    if folder is None or not find_checkpoints(open_storage(folder)):
        return StepEvidence()
    return find_evidence(folder, step)


def locate(config: Config, seed: int, step: int, loader: TrainLoader, evidence: StepEvidence) -> LocatedStep:
    """Let ``loader`` read ``step`` as the run has read it, and return how its rows were found.

    Raises:
        CheckpointError: The rows have changed since the checkpoint was saved.
    """
    checkpoint, problems = evidence.before or evidence.after, []
    if checkpoint is not None:
        now = {"config": masked_dict(config), "data": loader.fingerprint(), "data_files": loader.files(), "seed": seed}
        problems = list(other_samples(checkpoint.where, checkpoint.state.model_dump(), now))
        if problems and not config.ckpt.allow_data_changes:
            raise CheckpointError(*problems)
        for problem in problems:
            log.warning(problem)
    located = locate_step(loader.plan, step, evidence)
    if located.contradiction:
        log.warning(f"{located.contradiction}. Pass the config and --world of the run that read step {step}")
    # Rows that are not found from their index alone, such as streamed ones, are read on from the saved position.
    if evidence.before is not None:
        loader.resume(evidence.before.state.position, has_changed=bool(problems))
    if config.data.weight_changes and loader.plan.rows_of_step(step) != located.plan.rows_of_step(step):
        message = (
            "the batch size differs from that of this config, by which the rows are found where the weights change"
        )
        log.warning(f"data.weight_changes: {message}. Pass the config of the run that read step {step}")
    loader.plan = located.plan
    return located
