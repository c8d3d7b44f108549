"""Classification and regression of texts and pairs of texts.

Dimensions: B examples, L sequence length, C outputs, S examples of a whole data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qaroma.config.metrics import metrics_of
from qaroma.data.labelled import LabelledExample
from qaroma.engine.placement import ids_at_hand
from qaroma.errors import QaromaError
from qaroma.model.devices import to_device
from qaroma.tasks.evaluation import evaluating, standard_error
from qaroma.tasks.metrics import accuracy, confusion, f1, matthews, pearson, spearman


@dataclass(frozen=True)
class LabelledBatch:
    """One micro-batch, padded on the right.

    Attributes:
        input_ids, attention_mask: (B, L) int64.
        token_type_ids: (B, L) int64, or None where the base has none.
        labels: (B,), int64 class indices or fp32 figures.
        tokens: without padding.
        ids_on_host: ``input_ids`` of a batch that was brought to a card, as they were before.
    """

    input_ids: Tensor
    attention_mask: Tensor
    token_type_ids: Tensor | None
    labels: Tensor
    tokens: int
    ids_on_host: Tensor | None = None

    @property
    def counted(self) -> int:
        return self.labels.shape[0]

    def to(self, device: torch.device) -> LabelledBatch:
        return replace(
            self,
            input_ids=to_device(self.input_ids, device),
            attention_mask=to_device(self.attention_mask, device),
            token_type_ids=None if self.token_type_ids is None else to_device(self.token_type_ids, device),
            labels=to_device(self.labels, device),
            ids_on_host=None if device.type == "cpu" else self.input_ids,
        )


class _Labelled:
    """What both tasks do alike."""

    labels_dtype: torch.dtype
    told: tuple[str, ...] = ()

    def __init__(self, pad_token_id: int = 0) -> None:
        self.pad_token_id = pad_token_id

    def collate(self, examples: Sequence[LabelledExample]) -> LabelledBatch:
        """Pads on the right to the longest example."""
        length = max(len(e.input_ids) for e in examples)
        rows = [e.input_ids + [self.pad_token_id] * (length - len(e.input_ids)) for e in examples]
        mask = [[1] * len(e.input_ids) + [0] * (length - len(e.input_ids)) for e in examples]
        types = [(e.token_type_ids or []) + [0] * (length - len(e.token_type_ids or [])) for e in examples]
        return LabelledBatch(
            input_ids=torch.tensor(rows),
            attention_mask=torch.tensor(mask),
            token_type_ids=None if examples[0].token_type_ids is None else torch.tensor(types),
            labels=torch.tensor([e.label for e in examples]).to(self.labels_dtype),
            tokens=sum(len(e.input_ids) for e in examples),
        )

    def logits(self, model: nn.Module, batch: LabelledBatch) -> Tensor:
        """The head's outputs, (B, C) fp32."""
        inputs: dict[str, Any] = {"input_ids": batch.input_ids, "attention_mask": batch.attention_mask}
        if batch.token_type_ids is not None:
            inputs["token_type_ids"] = batch.token_type_ids
        with ids_at_hand(model, batch.ids_on_host):
            return model(**inputs).logits.float()  # type: ignore[no-any-return]

    def loss(self, model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, int]:
        return self.losses(self.logits(model, batch), batch.labels).sum(), batch.counted

    def step(self, model: nn.Module, batch: LabelledBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss; nothing is told beside it."""
        return self.loss(model, batch)[0], {}

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        """The loss of each example, (B,)."""
        raise NotImplementedError

    def figures(self, logits_SC: Tensor, labels_S: Tensor) -> dict[str, float]:
        """What the task is judged by, over a whole set."""
        raise NotImplementedError

    def evaluate(self, model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device) -> dict[str, Any]:
        """Loss, figures and number of examples over the whole set."""
        logits_SC, labels_S = self.predict(model, batches, device)
        losses_S = self.losses(logits_SC, labels_S).double()
        return {
            "loss": losses_S.mean().item(),
            "loss_error": standard_error(losses_S, torch.ones_like(losses_S)),
            **self.figures(logits_SC, labels_S),
            "examples": len(labels_S),
        }

    def predict(
        self, model: nn.Module, batches: Iterable[LabelledBatch], device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Outputs (S, C) and labels (S,) of every example, on the CPU, in the order of the batches."""
        logits, labels = [], []
        with evaluating(model):
            for batch in batches:
                logits.append(self.logits(model, batch.to(device)))
                labels.append(batch.labels)
        return torch.cat(logits).cpu(), torch.cat(labels)


class Classification(_Labelled):
    """Task ``classification``: cross-entropy over classes.

    Args:
        classes: number C of classes.
        metric: by which the best adapter is chosen: accuracy, f1 or matthews.
        pad_token_id: fills short rows, which attention does not look at.
    """

    name = "classification"
    labels_dtype = torch.int64

    def __init__(self, classes: int, *, metric: str = "accuracy", pad_token_id: int = 0) -> None:
        super().__init__(pad_token_id)
        self.classes, self.metric = classes, metric

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return F.cross_entropy(logits_BC, labels_B, reduction="none")

    def figures(self, logits_SC: Tensor, labels_S: Tensor) -> dict[str, float]:
        """Accuracy, F1 and Matthews correlation."""
        counts = confusion(logits_SC.argmax(-1), labels_S, self.classes)
        return {"accuracy": accuracy(counts), "f1": f1(counts), "matthews": matthews(counts)}


class Regression(_Labelled):
    """Task ``regression``: squared error of one output.

    Args:
        metric: by which the best adapter is chosen: pearson or spearman.
        pad_token_id: fills short rows, which attention does not look at.
    """

    name = "regression"
    labels_dtype = torch.float32

    def __init__(self, *, metric: str = "pearson", pad_token_id: int = 0) -> None:
        super().__init__(pad_token_id)
        self.metric = metric

    def losses(self, logits_BC: Tensor, labels_B: Tensor) -> Tensor:
        return F.mse_loss(logits_BC[:, 0], labels_B, reduction="none")

    def figures(self, logits_SC: Tensor, labels_S: Tensor) -> dict[str, float]:
        """Pearson and Spearman correlation; the loss beside them is the mean squared error."""
        return {"pearson": pearson(logits_SC[:, 0], labels_S), "spearman": spearman(logits_SC[:, 0], labels_S)}


def labelled_task(kind: str, labels: Sequence[str], metric: str, pad_token_id: int) -> Classification | Regression:
    """The task of that name.

    Raises:
        QaromaError: A metric that is not the task's.
    """
    if metric not in metrics_of(kind):
        raise QaromaError(
            f"evaluation.metric is {metric}; expected one of {', '.join(metrics_of(kind))} for --task {kind}"
        )
    if kind == "classification":
        return Classification(len(labels), metric=metric, pad_token_id=pad_token_id)
    return Regression(metric=metric, pad_token_id=pad_token_id)
