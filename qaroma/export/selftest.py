"""The self-test that ends every export: the files, read in another way, against the live model.

The live model answers the run's sample prompts greedily; its logits at every position of the answers
are kept. What was exported must give the same logits for the same tokens. If it does, its own greedy
answers are the same: each token is the largest logit after those before it.

Dimensions: K positions (the last of the prompt, and the answer's but the last), V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qaroma.data.forms import Message
from qaroma.data.templates import Template
from qaroma.data.tokens import added_bos
from qaroma.engine.placement import compute_device
from qaroma.export.readers import LlamaCpp, Logits, model_logits
from qaroma.export.weights import StoredTensor
from qaroma.method.factors import Factors, Update
from qaroma.tasks.evaluation import evaluating

TOKENS = 32
_TOP = 20
# Largest difference that passes. In fp32 it is rounding of sums. What is stored in 16 or 8 bits is rounded
# weight by weight (SmolLM2: 0.03 in fp16, 0.3 in bf16, 1.1 in q8_0); whether the update itself arrived is
# then told by share_arrived, which rounding does not blur.
LOGIT_TOLERANCE = {
    "fp32": 1e-3,
    "fp16": 0.25,
    "bf16": 2.0,
    "q8_0": 4.0,
    "q6_k": 8.0,
    "q5_k": 8.0,
    "q4_k": 16.0,
    "q4_0": 16.0,
}
LOG_PROBABILITY_TOLERANCE = {**LOGIT_TOLERANCE, "fp32": 1e-2}
SHARE_TOLERANCE = 0.2


@dataclass(frozen=True)
class Answered:
    """One prompt as the live model answers it.

    Attributes:
        prompt: the prompt's text, as rendered for the model.
        ids: tokens of prompt and answer.
        start: index of the answer's first token.
        logits: (K, V).
        answer: the answer's text.
    """

    prompt: str
    ids: list[int]
    start: int
    logits: Tensor
    answer: str


@dataclass(frozen=True)
class SelfTest:
    """What came out.

    Attributes:
        engine: what read the files.
        compared: ``logits``, or ``log-probabilities`` of the likeliest 20 tokens.
        largest: the largest difference.
        tolerance: what passes.
        same_answers: of so many ``prompts``.
        share: for a merge, the share of the update that the written weights hold.
        share_of: which modules' share that is.
    """

    engine: str
    compared: str
    largest: float
    tolerance: float
    same_answers: int
    prompts: int
    share: float = 1.0
    share_of: str = "in the worst module"

    @property
    def passed(self) -> bool:
        return self.largest <= self.tolerance and abs(self.share - 1) <= SHARE_TOLERANCE

    def sentence(self) -> str:
        """For people: what was compared with what, and how it ended."""
        share = "" if self.share == 1.0 else f", {100 * self.share:.1f} % of the update {self.share_of}"
        return (
            f"{'passed' if self.passed else 'FAILED'}: read by {self.engine}, largest difference of {self.compared} "
            f"{self.largest:.2g} (at most {self.tolerance:g}), {self.same_answers} of {self.prompts} greedy answers "
            f"the same{share}"
        )

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


def live_answers(
    model: Any, tokenizer: Any, template: Template, prompts: Sequence[str], *, tokens: int = TOKENS
) -> list[Answered]:
    """Answer prompts greedily with the live model, and keep its logits.

    Args:
        model: the base with the adapter on it, in fp32 arithmetic.
        tokenizer, template: of the run.
        prompts: user texts.
        tokens: longest answer.
    """
    stops = set(template.stop_token_ids(tokenizer))
    logits = model_logits(model)
    found = []
    with evaluating(model):
        for prompt in prompts:
            messages = [Message("user", prompt)]
            ids = template.encode_prompt(tokenizer, messages)
            start = len(ids)
            ids = _greedy(model, ids, tokens, stops)
            answer = tokenizer.decode(ids[start:], skip_special_tokens=True)
            text = template.render_prompt(messages)
            found.append(Answered(text, ids, start, logits(ids[:-1], start - 1), answer))
    return found


def _greedy(model: Any, ids: list[int], tokens: int, stops: set[int]) -> list[int]:
    """Greedy search by hand: no setting of the base's can interfere. With a cache of keys where a family has one."""
    device = compute_device(model)
    cache, fed = None, ids
    ids = list(ids)
    for _ in range(tokens):
        output = model(input_ids=torch.tensor([fed], device=device), past_key_values=cache, use_cache=True)
        cache = getattr(output, "past_key_values", None)
        token = int(output.logits[0, -1].argmax())
        ids.append(token)
        fed = ids if cache is None else [token]
        if token in stops:
            break
    return ids


def compare_logits(logits: Logits, live: Sequence[Answered], *, engine: str, tolerance: float) -> SelfTest:
    """Logits of what was exported against the live model's, for the same tokens.

    Args:
        logits: of what was exported.
        live: from :func:`live_answers`.
        engine: what it is called.
        tolerance: largest difference that passes.
    """
    largest, same = 0.0, 0
    for answered in live:
        found = logits(answered.ids[:-1], answered.start - 1)
        difference = float((found - answered.logits).abs().max())
        largest = max(largest, _nan_as_infinite(difference))
        same += found.argmax(-1).tolist() == answered.ids[answered.start :]
    return SelfTest(engine, "logits", largest, tolerance, same, len(live))


def compare_model(model: Any, live: Sequence[Answered], *, engine: str, tolerance: float) -> SelfTest:
    """:func:`compare_logits` for a transformers model."""
    with evaluating(model):
        return compare_logits(model_logits(model), live, engine=engine, tolerance=tolerance)


def share_arrived(
    written: Sequence[StoredTensor], base: Sequence[StoredTensor], update: Update, *, together: bool = False
) -> float:
    """How much of an update the weights of a merge hold, in the module where that is farthest from 1.

    The share of a module is <W' - W, B^T A> / ||B^T A||^2: 1 where all of it arrived, 2 where it was added
    twice, and near 0 where rounding to W's own 16 bits swallowed it. Rounding noise is not along B^T A, so
    that the share is exact to far below the noise; what chance leaves of it is taken off.

    Args:
        written: the merge's tensors, read back from its files.
        base: the tensors that it was merged into.
        update: the update.
        together: take all modules as one. Rounded to 16 levels, a base that itself came out of 4 bits draws the weights
            to its own levels, so that a single module's share tells how the two grids lie.
    """
    new, old = ({tensor.name: tensor for tensor in each} for each in (written, base))
    measured = []
    for name, factors in update.items():
        if factors.rank:
            tensor = f"{name}.weight"
            measured.append(_along_update(new[tensor], old[tensor], factors))
    if together and measured:
        measured = [torch.stack(measured).sum(0)]
    return max((_share(*one.tolist()) for one in measured), key=lambda share: abs(share - 1), default=1.0)


def _along_update(new: StoredTensor, old: StoredTensor, factors: Factors) -> Tensor:
    """<W' - W, B^T A>, ||B^T A||^2, what of ||W' - W||^2 lies across B^T A, and how many weights there are."""
    along = size = moved = 0.0
    for start, block in old.blocks():
        stop = start + len(block)
        change = new.rows(start, stop).double() - block.double()
        added = (factors.B[:, start:stop].T @ factors.A).double()
        along += float((change * added).sum())
        size += float(added.square().sum())
        moved += float(change.square().sum())
    noise = max(0.0, moved - along**2 / size) if size else 0.0
    return torch.tensor([along, size, noise, old.elements], dtype=torch.float64)


def _share(along: float, size: float, noise: float, elements: float) -> float:
    if size == 0:
        return 1.0
    chance = 6 * math.sqrt(noise / elements / size)
    gap = along / size - 1
    return 1 + max(0.0, abs(gap) - chance) * (1 if gap > 0 else -1)


def compare_llama_cpp(engine: LlamaCpp, live: Sequence[Answered], tokenizer: Any, *, tolerance: float) -> SelfTest:
    """Greedy answers and log-probabilities of llama.cpp, from text through its own tokenizer.

    Compared up to where an answer parts from the live one, whose log-probabilities then no longer apply.
    A prompt that it cuts into another number of tokens counts as an infinite difference, and so does one
    that it has no answer to where the live model has.
    """
    bos = tokenizer.bos_token if added_bos(tokenizer) is not None else ""
    largest, same = 0.0, 0
    for answered in live:
        expected = answered.ids[answered.start :]
        told = engine.answer(answered.prompt.removeprefix(bos), len(expected), top=_TOP)
        if told.prompt_tokens != answered.start:
            largest = float("inf")
            continue
        known = answered.logits.log_softmax(-1)
        positions = _told_positions(tokenizer, expected)
        for position, token, likeliest in zip(positions, told.tokens, told.log_probabilities, strict=False):
            gaps = [_nan_as_infinite(abs(value - float(known[position, index]))) for index, value in likeliest.items()]
            largest = max(largest, *gaps)
            if token != expected[position]:
                break
        visible = [expected[position] for position in positions]
        if visible[:-1] and not told.tokens:
            largest = float("inf")
        same += told.tokens in (visible, visible[:-1])  # the token that ends an answer is left out
    return SelfTest("llama.cpp", "log-probabilities", largest, tolerance, same, len(live))


def _nan_as_infinite(difference: float) -> float:
    """A difference that can be compared: infinite where it is no number, which ``max`` would pass over."""
    return difference if difference == difference else float("inf")


def _told_positions(tokenizer: Any, answer: Sequence[int]) -> list[int]:
    """Positions of an answer that llama.cpp's server tells of: not those that end within a character."""
    texts = (tokenizer.decode(answer[: end + 1]) for end in range(len(answer)))
    return [position for position, text in enumerate(texts) if not text.endswith("\ufffd")]
