"""What is trained on: one sequence of tokens, or two answers to the same question."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from qaroma.data.turns import Message

IGNORED = -100
UNKNOWN = (math.nan, math.nan)


@dataclass(frozen=True)
class Example:
    """One training sequence.

    Attributes:
        input_ids: Token ids, of length L.
        labels: Aligned with ``input_ids``: the same id where the loss counts the token, else -100.
            The first is always -100, since nothing predicts it.
        origin: ``file:line`` of its row (of plain text: of the document that it begins in).
        conversation: The turns in it, the last one the assistant's; empty for plain text.
        weight: How often it appears in an epoch.
        loss_weights: Aligned with ``labels``, the factor of each token's loss; empty where all are 1.
        lengths: Of the sequences packed into it; empty where it is one.
    """

    input_ids: list[int]
    labels: list[int]
    origin: str = ""
    conversation: tuple[Message, ...] = ()
    weight: float = 1.0
    loss_weights: tuple[float, ...] = ()
    lengths: tuple[int, ...] = ()

    @property
    def sequences(self) -> Mapping[str, Example]:
        """The sequences by their names; of one alone it is empty."""
        return {"": self}

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.input_ids)

    @property
    def trained(self) -> int:
        """Number of tokens that the loss counts."""
        return len(self.labels) - self.labels.count(IGNORED)

    def cut(self, length: int) -> Example | None:
        """Its first tokens; None where none of them is trained."""
        shorter = replace(
            self,
            input_ids=self.input_ids[:length],
            labels=self.labels[:length],
            loss_weights=self.loss_weights[:length],
        )
        return shorter if shorter.trained else None


@dataclass(frozen=True)
class Pair:
    """A better and a worse answer to the same question.

    Attributes:
        chosen, rejected: The question with either answer; what they share is not trained.
        weight: How often it appears in an epoch.
        reference: Log-probabilities of the two answers by the model that the run starts from, in nats; not a
            number until they are known.
    """

    chosen: Example
    rejected: Example
    weight: float = 1.0
    reference: tuple[float, float] = UNKNOWN

    @property
    def sequences(self) -> Mapping[str, Example]:
        """The sequences by their names."""
        return {"chosen": self.chosen, "rejected": self.rejected}

    @property
    def origin(self) -> str:
        """``file:line`` of its row."""
        return self.chosen.origin

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The turns with the better answer."""
        return self.chosen.conversation

    @property
    def tokens(self) -> int:
        """Number of tokens of both."""
        return self.chosen.tokens + self.rejected.tokens

    @property
    def trained(self) -> int:
        """Number of tokens of both that the loss counts."""
        return self.chosen.trained + self.rejected.trained

    def cut(self, length: int) -> Pair | None:
        """The first tokens of both; None where one is left without an answer, or nothing tells them apart."""
        chosen, rejected = self.chosen.cut(length), self.rejected.cut(length)
        if chosen is None or rejected is None or chosen.input_ids == rejected.input_ids:
            return None
        return replace(self, chosen=chosen, rejected=rejected)
