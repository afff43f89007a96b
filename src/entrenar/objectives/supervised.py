"""Supervised fine-tuning: cross-entropy of the target tokens."""

from transformers import PreTrainedModel

from entrenar.data.batches import Batch
from entrenar.models.forward import target_loss
from entrenar.objectives.objective import Loss, Objective


class Supervised(Objective):
    """Nats per target token."""

    def count(self, batch: Batch) -> int:
        """Target tokens."""
        return batch.target_count

    def loss(self, model: PreTrainedModel, batch: Batch) -> Loss:
        """Cross-entropy in nats, summed over the target tokens."""
        return Loss(target_loss(model, batch.ids, batch.positions, batch.targets))


SUPERVISED = Supervised()
