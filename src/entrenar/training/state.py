"""Where a run stands, and what it was asked to do."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from entrenar.optim.schedule import ScheduleName


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Everything the loop needs to know; steps are optimiser updates.

    `batch_size` counts documents, `micro_batch` rows; a row holds the documents that fit into `pack_to` tokens, 0: one.
    `eval_every` and `checkpoint_every` count steps, 0 means never; `patience`: evaluations without a better loss
    before the run ends early, 0 means never.
    """

    total_steps: int
    batch_size: int
    micro_batch: int
    pack_to: int
    seed: int
    lr: float
    schedule: ScheduleName
    warmup_steps: int
    max_grad_norm: float
    eval_every: int
    patience: int
    checkpoint_every: int
    keep_checkpoints: int


@dataclass(frozen=True, kw_only=True)
class Update:
    """What one update was made with: mean loss (nats per target token in supervised training), gradient norm before
    clipping, rate, and the objective's own figures."""

    loss: float
    grad_norm: float
    lr: float
    figures: dict[str, float] = field(default_factory=dict)


@dataclass
class State:
    """Counters of a run; with the adapter and the optimiser they are all that a resumed run needs.

    `fingerprint` is of the data, `base` of the weights below the adapter. `micro_batch`: rows at a time, which decide
    the order of sums. `step`: updates made. `batch`: batches consumed, more than `step` when batches were skipped for a
    non-finite loss. `loss_scale`, `steps_at_scale`: see training/loss_scale.py. `seconds` of all `sessions`. `pending`:
    the newest update, if a stop broke off the evaluation after it, so that nothing is logged of it yet.
    """

    fingerprint: str
    base: str = ""
    micro_batch: int = 0
    step: int = 0
    batch: int = 0
    tokens: int = 0
    skipped_in_a_row: int = 0
    best_loss: float | None = None
    best_step: int = 0
    evaluations_since_best: int = 0
    train_loss: float | None = None
    eval_loss: float | None = None
    loss_scale: float = 1.0
    steps_at_scale: int = 0
    seconds: float = 0.0
    sessions: int = 0
    pending: Update | None = None


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """What the loop tells after each step; loss in nats per target token, memory in bytes."""

    step: int
    total_steps: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_s: float
    seconds_left: float
    memory_bytes: int
    eval_loss: float | None = None
    figures: Mapping[str, float] = field(default_factory=dict)
