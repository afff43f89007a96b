"""Loss and perplexity over the trained tokens of a data set, and the KL divergence between two models on them."""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel

from entrenar.data.batches import micro_batches
from entrenar.data.dataset import Dataset
from entrenar.models.forward import target_logits
from entrenar.models.head import refuse_foreign
from entrenar.models.isolation import isolates_branches
from entrenar.objectives.objective import mean_loss
from entrenar.objectives.supervised import SUPERVISED


@dataclass(frozen=True)
class Perplexity:
    """Mean loss in nats per token, over `tokens` target tokens."""

    loss: float
    tokens: int

    @property
    def perplexity(self) -> float:
        """exp(loss)."""
        return math.exp(self.loss)


@torch.no_grad()
def perplexity(model: PreTrainedModel, dataset: Dataset, micro_batch: int, pad_id: int) -> Perplexity:
    """Mean loss of `model` over the target tokens of `dataset`; InputError for a token that the model lacks."""
    for example, row in zip(dataset.examples, dataset.rows, strict=True):
        refuse_foreign(example.ids, model, f"the row at {row.file}:{row.line}")
    examples = separated(dataset, model).examples
    return Perplexity(*mean_loss(SUPERVISED, model, micro_batches(examples, micro_batch, pad_id)))


@torch.no_grad()
def kl_divergence(
    model: PreTrainedModel, other: PreTrainedModel, dataset: Dataset, micro_batch: int, pad_id: int
) -> float:
    """Mean KL(other ‖ model) in nats per target token: what is lost by using `model` in place of `other`."""
    total, count = 0.0, 0
    for batch in micro_batches(separated(dataset, model, other).examples, micro_batch, pad_id):
        logits, _ = target_logits(model, batch.ids, batch.positions, batch.targets)
        reference, _ = target_logits(other, batch.ids, batch.positions, batch.targets)
        log_p, log_q = F.log_softmax(reference.float(), -1), F.log_softmax(logits.float(), -1)
        total += F.kl_div(log_q, log_p, reduction="sum", log_target=True).item()
        count += batch.target_count
    return total / count


def separated(dataset: Dataset, *models: PreTrainedModel) -> Dataset:
    """The rows as the models take them: where one of them would mix branches (data/tree.py), each is a row."""
    return dataset.expanded() if dataset.has_trees and not all(map(isolates_branches, models)) else dataset
