"""Says in words when a stage learned nothing, and why that is likely."""

from __future__ import annotations

from torchrec_mdr.methods.stage import Stage
from torchrec_mdr.metrics import Metrics
from torchrec_mdr.training.config import StageConfig

FEW_STEPS = 100  # of Adam; fewer move a weight by no more than so many learning rates
LOW_RATE = 3e-4
FEW_ROWS = 500  # of validation, among which small gains drown


def nothing_learned(
    stage: Stage, settings: StageConfig, improved: bool, steps: int, train_rows: int, validation: Metrics
) -> str | None:
    """What to tell somebody whose stage came to nothing; None where it learned something, or was not to.

    Args:
        stage (Stage): which.
        settings (StageConfig): how it was fitted.
        improved (bool): whether a validation was better than the first one.
        steps (int): that were taken.
        train_rows (int): of an epoch.
        validation (Metrics): of what was kept.

    Example::

        >>> import textwrap
        >>> from torchrec_mdr.methods.stage import adapt_stage
        >>> result = Metrics(0.63, 0.63, 0.6, 400, {}, ne=0.95)
        >>> settings = StageConfig(ema_decay=0.99)
        >>> said = nothing_learned(adapt_stage(), settings, improved=False, steps=4, train_rows=4096, validation=result)
        >>> print(textwrap.fill(said, 108))
        stage 'adapt' learned nothing: in 4 steps no validation was better than its start, which is kept; 4 steps
        are few: lower --batch_size, or raise --stages.adapt.epochs and patience
    """
    if not settings.epochs or not steps:
        return None
    name = f"stage '{stage.name}' learned nothing"
    if stage.starts_from_result:
        if improved:
            return None
        found = f"{name}: in {steps:,} steps no validation was better than its start, which is kept"
    elif validation.ne is not None and validation.ne >= 1.0:
        found = (
            f"{name}: after {steps:,} steps its log loss on validation rows is {validation.ne:.3f} times that of a "
            "constant, the share of positives"
        )
    else:
        return None
    return f"{found}; {_reason(stage, settings, steps, train_rows, validation)}"


def _reason(stage: Stage, settings: StageConfig, steps: int, train_rows: int, validation: Metrics) -> str:
    option = f"--stages.{stage.settings}"
    if steps < FEW_STEPS:
        return f"{steps:,} steps are few: lower --batch_size, or raise {option}.epochs and patience"
    if settings.ema_decay and steps < 1.0 / (1.0 - settings.ema_decay):
        return (
            f"the average reaches over more steps than were taken: lower {option}.ema_decay, now {settings.ema_decay:g}"
        )
    if settings.learning_rate < LOW_RATE:
        return f"the learning rate is low: raise {option}.learning_rate, now {settings.learning_rate:g}"
    if validation.rows < FEW_ROWS:
        return f"validation has {validation.rows:,} rows, among which a small gain cannot be seen: give it more"
    if not stage.starts_from_result:
        return "the features may say nothing of the label in these rows, or validation rows are of another kind"
    return (
        f"the domains may not differ in what {train_rows:,} rows can show; --stages.{stage.settings}.learning_rate is "
        f"{settings.learning_rate:g}, and --tune 8 tries others"
    )
