"""Makes training text of a model's own answers in this process: prompts in batches, a file of conversations out.

The lines are those of `stitch-train answers`, drawn in the same way: by the run's seed, the prompt and the position of
each token. Prompts that are held out are answered as well, as far as a fit needs them to measure on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

from stitch.errors import InvalidRequest
from stitch_training.answers import (
    AnswersSettings,
    ChatPrompt,
    answer_line,
    answered_prompts,
    seed_of,
    training_prompts,
)
from stitch_training.data import HELD_OUT_PERCENT, Document, is_held_out, read_documents
from stitch_training.generation import generate_sampled
from stitch_training.models import LoadedPair
from stitch_training.prompt_runs import open_for_append
from stitch_training.scoring import whole


@dataclass(frozen=True)
class Written:
    """What the output holds: answers, and the tokens of prompts and answers."""

    answers: int = 0
    tokens: int = 0

    def plus(self, answers: int, tokens: int) -> Written:
        """Returns the sum."""
        return Written(self.answers + answers, self.tokens + tokens)


class OwnAnswers:
    """The answers of a pair's whole bottom model to the prompts of some files, and the output that has them."""

    def __init__(self, loaded: LoadedPair, settings: AnswersSettings, most_prompt_tokens: int) -> None:
        """Longer prompts than `most_prompt_tokens` are left out.

        Raises InvalidRequest where the data can't be read or the output was made in another way.
        """
        self._loaded, self._settings, self._most = loaded, settings, most_prompt_tokens
        self._pipeline = whole(loaded.pair.bottom)
        self._answered = answered_prompts(settings)
        # By whether the prompt is held out.
        self.written = {True: Written(), False: Written()}
        if self._answered:
            self._count()

    def _count(self) -> None:
        encoder = self._loaded.encoder
        for document in read_documents(self._settings.out):
            *prompt, answer = document.turns
            tokens = len(encoder.encode_prompt(prompt)) + len(encoder.encode(answer.content))
            held_out = is_held_out(document, HELD_OUT_PERCENT)
            self.written[held_out] = self.written[held_out].plus(1, tokens)

    def append(
        self,
        held_out: bool,
        tokens: int,
        batch_prompts: int,
        is_over: Callable[[], bool],
        progress: Callable[[int, int], None],
    ) -> None:
        """Appends answers to prompts of the held-out or of the training part.

        Ends where the output has `tokens` tokens of that part, its prompts end, or `is_over()`. `progress(done, total)`
        is called with tokens after every batch. Raises InvalidRequest where there is no prompt.
        """
        remaining = self._remaining(held_out)
        with open_for_append(self._settings.out) as out:
            while self.written[held_out].tokens < tokens and not is_over():
                batch = list(islice(remaining, batch_prompts))
                if not batch:
                    break
                lines, added = self._answer(batch, is_over)
                out.writelines(lines)
                out.flush()
                self.written[held_out] = self.written[held_out].plus(len(lines), added)
                progress(min(self.written[held_out].tokens, tokens), tokens)

    def _remaining(self, held_out: bool) -> Iterator[tuple[ChatPrompt, list[int]]]:
        """Yields prompts without an answer, with their tokens. Raises InvalidRequest where the data have no prompt."""
        everything = training_prompts(self._settings)
        prompts = [prompt for prompt in everything if is_held_out(Document(turns=prompt), HELD_OUT_PERCENT) == held_out]
        if not prompts:
            names, part = ", ".join(path.name for path in self._settings.data), "held-out" if held_out else "training"
            raise InvalidRequest("data", names, f"its {part} part must have a prompt")
        encoder = self._loaded.encoder
        encoded = ((prompt, encoder.encode_prompt(prompt)) for prompt in prompts if prompt not in self._answered)
        return (one for one in encoded if len(one[1]) <= self._most)

    def _answer(
        self, batch: Sequence[tuple[ChatPrompt, list[int]]], is_over: Callable[[], bool]
    ) -> tuple[list[str], int]:
        """Returns the lines of the answers that end before `is_over()`, and their number of tokens."""
        settings, encoder = self._settings, self._loaded.encoder
        prompts = [ids for _, ids in batch]
        seeds = [seed_of(prompt, settings.seed) for prompt, _ in batch]
        answers = generate_sampled(
            self._pipeline, prompts, seeds, self._loaded.pair.vocabulary, settings.max_tokens, encoder.ends,
            settings.temperature, is_over,
        )  # fmt: skip
        ended = [(prompt, ids, one) for (prompt, ids), one in zip(batch, answers, strict=True) if one is not None]
        lines = [
            answer_line(prompt, encoder.decode(one.token_ids), "length" if one.is_cut else "stop", settings)
            for prompt, _, one in ended
        ]
        return lines, sum(len(ids) + len(one.token_ids) for _, ids, one in ended)
