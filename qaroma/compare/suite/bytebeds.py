"""Beds of the byte model: texts to go on with, and random pairs to memorise.

Dimensions: B rows, L length.
"""

from __future__ import annotations

import math
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from qaroma.compare.suite.beds import PRETRAINING, Bed, Place
from qaroma.compare.suite.bench import Bench, step_generator
from qaroma.compare.suite.bytemodel import LENGTH, next_byte_logits, next_byte_loss, pretrained, read_text, windows
from qaroma.config.decisions import DataFacts
from qaroma.config.presets import BITS_A_TOKEN
from qaroma.method.targets import find_targets
from qaroma.model.facts import facts_of_module
from qaroma.tasks.evaluation import evaluating, standard_error

HELD_OUT = 40_000  # bytes at the end of a text: the last two thirds score, what is before them validates
SCORED, VALIDATED = 256, 64  # windows
QUESTION, ANSWER = 8, 4  # characters of a pair


def set_up_text(bed: Bed, place: Place, seed: int) -> Bench:
    """Windows of a text; the score is the loss on windows of a part that is not trained on."""
    model = pretrained(place.data / PRETRAINING, place.cache)
    tokens = _tokens(place.data / bed.source)
    train, held_out = tokens[:-HELD_OUT], tokens[-HELD_OUT:]
    third = HELD_OUT // 3
    validation = windows(held_out[:third], VALIDATED, torch.Generator().manual_seed(7))
    test = windows(held_out[third:], SCORED, torch.Generator().manual_seed(77))

    def losses_of(rows_BL: Tensor, size: int) -> Tensor:
        with evaluating(model):
            losses = [next_byte_loss(model, rows_BL[i : i + size]) for i in range(0, len(rows_BL), size)]
        return torch.stack(losses).double()

    def validate() -> dict[str, float]:
        losses = losses_of(validation, 8)
        return {"loss": float(losses.mean()), "loss_error": standard_error(losses, torch.ones_like(losses))}

    rows = len(train) // LENGTH
    return Bench(
        model,
        DataFacts(
            rows,
            [LENGTH] * rows,
            LENGTH,
            validation_rows=VALIDATED,
            trained_bits=BITS_A_TOKEN * LENGTH * rows,
            model=facts_of_module(model, find_targets(model)),
        ),
        loss=lambda step: next_byte_loss(model, windows(train, bed.batch, step_generator(seed, step))),
        validate=validate,
        score=lambda: float(losses_of(test, 32).mean()),
    )


@lru_cache(maxsize=3)
def _tokens(file: Path) -> Tensor:
    return read_text(file)


def set_up_ladder(bed: Bed, place: Place, seed: int) -> Bench:
    """Random pairs, 8 letters to 4: nothing to generalise, only so many bits to keep. The score is exact match."""
    model = pretrained(place.data / PRETRAINING, place.cache)
    count = int(bed.source)
    rows = random_pairs(count, seed)
    per_epoch = -(-count // bed.batch)

    def batch(step: int) -> Tensor:
        epoch, position = divmod(step, per_epoch)
        order = torch.randperm(count, generator=step_generator(seed, epoch))
        return rows[order[position * bed.batch : (position + 1) * bed.batch]]

    def look() -> tuple[float, float]:
        losses, right = 0.0, 0
        with evaluating(model):
            for start in range(0, count, 256):
                logits, answers = _answer_logits(model, rows[start : start + 256])
                losses += F.cross_entropy(logits.flatten(0, 1), answers.flatten(), reduction="sum").item()
                # With the right letters before it every letter is the likeliest: so greedy decoding writes the answer.
                right += int((logits.argmax(-1) == answers).all(-1).sum())
        return losses / (ANSWER * count), right / count

    def loss(step: int) -> Tensor:
        logits, answers = _answer_logits(model, batch(step))
        return F.cross_entropy(logits.flatten(0, 1), answers.flatten())

    return Bench(
        model,
        DataFacts(
            count,
            [rows.shape[1]] * count,
            LENGTH,
            trained_bits=BITS_A_TOKEN * ANSWER * count,
            model=facts_of_module(model, find_targets(model)),
        ),
        loss=loss,
        validate=lambda: {"loss": look()[0], "loss_error": math.inf},
        score=lambda: look()[1],
    )


def random_pairs(count: int, seed: int) -> Tensor:
    """(count, 8 + 1 + 4) bytes: different letters for each question, ``=``, random letters as the answer."""
    generator = torch.Generator().manual_seed(31 * seed + count)
    questions = torch.randint(0, 26, (2 * count + 16, QUESTION), generator=generator)
    questions = torch.unique(questions, dim=0)
    questions = questions[torch.randperm(len(questions), generator=generator)[:count]]
    answers = torch.randint(0, 26, (count, ANSWER), generator=generator)
    equals = torch.full((count, 1), ord("="))
    return torch.cat([questions + ord("a"), equals, answers + ord("a")], 1)


def _answer_logits(model: torch.nn.Module, rows_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (B, 4, 256) of the answers' letters, and the letters (B, 4)."""
    return next_byte_logits(model, rows_BL[:, :-1])[:, -ANSWER:], rows_BL[:, -ANSWER:]
