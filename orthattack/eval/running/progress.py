"""What a person sees of a run at work: on a terminal a bar whose clock ticks, in a log a line now and then."""

from __future__ import annotations

import sys
import threading
from typing import Any

from tqdm import tqdm

from orthattack.eval.errors import printable
from orthattack.eval.running.chunk import Done
from orthattack.eval.running.plan import Plan, Todo, Unit
from orthattack.eval.storage.run_folder import shown_eps
from orthattack.eval.suite import Entry

_BAR = "{percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_noinv_fmt}] {desc}"
_LINE = "orthattack: {n_fmt} of {total_fmt} img, {elapsed} gone, {remaining} left, {rate_noinv_fmt}, {desc}"
_PERIODS = 30.0, 1.0  # seconds between two looks at the clock, in a log and on a terminal


def shown(entry: Entry) -> str:
    """An attack at a radius, as a person calls it."""
    return f"{entry.label} at {shown_eps(entry.eps, entry.norm)}"


class Watch:
    """Who is told how a run goes; this one shows it to nobody."""

    def begin(self, model: str, what: str) -> None:
        """That a model is at something now."""

    def step(self, step: str) -> None:
        """How far an attack is with the images that it has."""

    def done(self, unit: Unit, which: int, done: Done) -> None:
        """How far an attack of a unit, by its place in `Plan.entries`, is."""


class Progress(Watch):
    """A `Watch` that shows, while it is entered, images attacked, the session's rate, and what is worked on."""

    def __init__(self, plan: Plan, todo: Todo, shown: bool) -> None:
        is_terminal = sys.stderr.isatty()
        self._plan = plan
        self._model = self._what = self._step = ""
        self._done = {place: Done(images, 0, 0) for place, images in todo.kept.items()}
        form: dict[str, Any] = {"dynamic_ncols": True, "bar_format": _BAR}
        if not is_terminal:
            form = {"file": _Lines(), "mininterval": 1e9, "bar_format": _LINE}
        start = todo.done + sum(todo.kept.values())
        self._bar = tqdm(total=todo.total, initial=start, unit="img", smoothing=0, disable=not shown, **form)
        self._period = _PERIODS[is_terminal]
        self._end = threading.Event()
        self._clock = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Progress:
        if not self._bar.disable:
            try:
                self._clock.start()
            except RuntimeError:  # no memory for a thread: the bar goes before the reason is told
                self._bar.close()
                raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        if self._clock.is_alive():
            self._clock.join()
        self._tell()
        self._bar.close()

    def begin(self, model: str, what: str) -> None:
        self._model, self._what, self._step = model, what, ""
        self._tell()

    def step(self, step: str) -> None:
        self._step = step

    def done(self, unit: Unit, which: int, done: Done) -> None:
        place = unit.model, unit.chunk, which
        before = self._done.get(place, Done(0, 0, 0))
        self._done[place] = done
        found = [one for (model, _, attack), one in self._done.items() if (model, attack) == (unit.model, which)]
        robust, scored = sum(one.robust for one in found), sum(one.scored for one in found)
        share = f": {100 * robust / scored:.1f} % robust" if scored else ""
        self._model, self._what, self._step = unit.model, shown(self._plan.entries[which]) + share, ""
        self._tell()
        self._bar.update(done.images - before.images)

    def _tell(self) -> None:
        """Of what is worked on the end is cut off where the terminal is narrow."""
        at = " of ".join(filter(None, (self._step, self._what)))
        self._bar.set_description_str(printable(", ".join(filter(None, (at, self._model))), keep=""), refresh=False)

    def _tick(self) -> None:
        while not self._end.wait(self._period):
            self._tell()
            self._bar.refresh()


class _Lines:
    """A log, which is no place for an animation: of each state of a bar a line."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()
