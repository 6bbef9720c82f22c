"""The prompts of each case: the same for all sides, made while a server starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.registry import Case
from benchmarks.serving import shapes
from benchmarks.serving.prompts import Prompts
from benchmarks.serving.selection import (
    Selection,
    read_selections,
    select,
    wave_size,
    write_selections,
)
from benchmarks.serving.server import ServingServer

CHOSEN = "chosen.json"


class NotChosenError(RuntimeError):
    """Only an unmodified server chooses prompts, by its own answers."""


class CasePrompts:
    """Chosen by the first plain side, unless earlier; random ones for a model without weights.

    Args:
        folder: where the choice is kept.
        model: directory with a tokenizer.
        shape: of `shapes.SHAPES`, None for a model with weights.
        chooses: whether the server may choose.
        select_seconds: for choosing.
    """

    def __init__(
        self, folder: Path, model: str, shape: str | None, chooses: bool, select_seconds: float
    ) -> None:
        self.path, self.model, self.shape = folder / CHOSEN, model, shape
        self.chooses, self.select_seconds = chooses, select_seconds
        self.model_name = model_name(model)
        self._source: Prompts | None = None
        self._prepared: dict[str, Future[tuple[list[list[int]], Selection | None]]] = {}

    @contextmanager
    def preparing(self, cases: Sequence[Case]) -> Iterator[None]:
        """Make prompts beside what follows; where that fails, `of` fails for that case."""
        pool = ThreadPoolExecutor(1)
        self._prepared = {case.name: pool.submit(self._prepare, case) for case in cases}
        try:
            yield
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def wait(self) -> None:
        """Until all are made, or failed: it would slow a client that times requests."""
        wait(self._prepared.values())

    def of(
        self, case: Case, server: ServingServer, tick: Callable[[str], None]
    ) -> tuple[list[list[int]], dict[str, Any] | None]:
        """The prompts, and how they were chosen (None: they are random).

        Raises:
            NotChosenError: this server may not choose.
        """
        prepared, selection = self._prepared[case.name].result()
        if self.shape is not None:
            return prepared, None
        if selection is None:  # unless an earlier case has chosen since
            selection = self._chosen_before(case)
        if selection is None and not self.chooses:
            raise NotChosenError(missing(case))
        if selection is None:
            tick("choosing prompts")
            selection = select(
                *(self._texts(), case, server.generate, self.select_seconds, self.model_name)
            )
            server.flush()
            write_selections(self.path, self._choices() | {case.name: selection})
        return self._texts().make(case.context, selection.numbers), selection.as_json()

    def _prepare(self, case: Case) -> tuple[list[list[int]], Selection | None]:
        """Those chosen before, or the first that a choice will try."""
        if self.shape is not None:
            return shapes.random_prompts(case, shapes.SHAPES[self.shape]["vocab_size"]), None
        selection = self._chosen_before(case)
        if selection is not None:
            return self._texts().make(case.context, selection.numbers), selection
        if not self.chooses:
            return [], None
        count = min(wave_size(case), self._texts().count(case.context))
        return self._texts().make(case.context, range(count)), None

    def _texts(self) -> Prompts:
        if self._source is None:
            self._source = Prompts.of_model(self.model)
        return self._source

    def _choices(self) -> dict[str, Selection]:
        return read_selections(self.path, self.model_name)

    def _chosen_before(self, case: Case) -> Selection | None:
        """For this case, or for one of which it takes the first prompts."""
        choice = choice_for(case, self._choices())
        return choice and choice.first(self._texts(), case)


def choice_for(case: Case, choices: Mapping[str, Selection]) -> Selection | None:
    """Its own before another's; none of other lengths or fewer prompts, whatever its name is."""
    own = choices.get(case.name)
    if own is not None and own.serves(case):
        return own
    return next((choice for choice in choices.values() if choice.serves(case)), None)


def missing(case: Case) -> str:
    return f"no prompts are chosen for {case.name}: measure a plain side first, or give --chosen"


def model_name(model: str) -> str:
    """Of a checkpoint's folder; a shape as it is."""
    return model if model.startswith(shapes.PREFIX) else Path(model).name
