"""A curve in a notebook that is redrawn while a run trains."""

from __future__ import annotations

import contextvars
import io
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

from jaxlm.reports.charts import charts_of_run


@contextmanager
def live(folder: Path | str, name: str = "loss") -> Iterator[None]:
    """Shows a curve of a run, and what the run prints, in a notebook while the block trains the run.

        with live("runs/mine"):
            lm = jaxlm.fit(run)

    The curve is redrawn in place from the log, so the steps before a resume are in it too. The last picture stays,
    also if the block raises an error. In a script this does nothing: a run prints its own progress.

    Args:
      folder: the folder of the run, which need not exist yet.
      name: name of the chart, as for `curve`.
    """
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if not hasattr(shell, "kernel"):
        yield
        return
    view = _LiveView(Path(folder), name)
    ended = threading.Event()

    def redraw_until_ended() -> None:
        while not ended.wait(view.pause):
            view.redraw()

    # IPython finds the cell of an output through the context.
    thread = threading.Thread(target=contextvars.copy_context().run, args=(redraw_until_ended,), daemon=True)
    try:
        with redirect_stderr(view.screen):
            thread.start()
            yield
    finally:
        ended.set()
        thread.join()
        view.redraw()


class _LiveView:
    """The two outputs of `live`: the curve, and what the run printed."""

    def __init__(self, folder: Path, name: str):
        from IPython.display import display

        self.folder, self.name, self.screen = folder, name, _Screen()
        self.pause = 1.0  # seconds until the next look at the log
        self._log_size = self._shown_text = ""
        placeholder = {"text/plain": "The picture comes with the first line of the log."}
        self._picture = display(placeholder, raw=True, display_id=True)
        self._text = display({"text/plain": ""}, raw=True, display_id=True)

    def redraw(self) -> None:
        """Shows what has changed since the last call."""
        start = time.monotonic()
        if (text := self.screen.text()) != self._shown_text:
            self._shown_text = text
            self._text.update({"text/plain": text}, raw=True)
        log = self.folder / "metrics.jsonl"
        size = str(log.stat().st_size) if log.exists() else ""
        if size != self._log_size:
            charts = {chart.name: chart for chart in charts_of_run(self.folder)}
            if self.name in charts:
                self._log_size = size
                self._picture.update(charts[self.name])
        self.pause = max(1.0, 10 * (time.monotonic() - start))  # drawing takes at most a tenth of the time


class _Screen(io.StringIO):
    """Collects what a terminal would show: only the last state of a line that is rewritten in place."""

    def isatty(self) -> bool:
        return True

    def text(self) -> str:
        """Returns the lines in their last state."""
        lines = (line.rpartition("\r\x1b[K")[2] for line in self.getvalue().split("\n"))
        return "\n".join(lines).strip("\n")
