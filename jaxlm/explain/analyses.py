"""The analyses of `jaxlm explain`: each returns chapters, numbers and lines for a terminal.

An analysis is one entry of `ANALYSES`: a function that checks a request before anything is compiled, and a function
that runs it.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from jaxlm.config.arguments import check_list, check_model
from jaxlm.config.ranges import short_repr
from jaxlm.errors import UserError, suggestion
from jaxlm.explain import activation_chapters, attention_chapters, attribution_chapters, nearest_chapters
from jaxlm.explain.attention import attention_layers
from jaxlm.explain.examples import head_of, read_example
from jaxlm.explain.request import Request, Result
from jaxlm.explain.targets import EXPLAINED_HEADS
from jaxlm.lm import LM
from jaxlm.reports.pages import write_page
from jaxlm.storage import disk


class Analysis(NamedTuple):
    """An analysis of a prediction.

    Attributes:
      check: raises UserError for a request that the analysis does not support, before anything is compiled.
      run: returns the result.
      suits: whether the analysis is made if the user names none.
    """

    check: Callable[[Request], None]
    run: Callable[[Request], Result]
    suits: Callable[[LM], bool]


ANALYSES: dict[str, Analysis] = {
    "attribution": Analysis(
        attribution_chapters.check, attribution_chapters.run, lambda lm: head_of(lm) in EXPLAINED_HEADS
    ),
    "attention": Analysis(attention_chapters.check, attention_chapters.run, lambda lm: bool(attention_layers(lm))),
    "lens": Analysis(activation_chapters.check_lens, activation_chapters.run_lens, lambda lm: False),
    "patching": Analysis(activation_chapters.check_patching, activation_chapters.run_patching, lambda lm: False),
    "nearest": Analysis(nearest_chapters.check, nearest_chapters.run, lambda lm: False),
}


class Explanation(NamedTuple):
    """The results of the analyses of a text.

    Attributes:
      request: what was explained.
      results: the result of each analysis by its name.
    """

    request: Request
    results: dict[str, Result]

    @property
    def numbers(self) -> dict[str, Any]:
        """All numbers, as JSON can represent them."""
        return {"text": self.request.text, **{name: result.numbers for name, result in self.results.items()}}

    @property
    def lines(self) -> list[str]:
        """A short table for a terminal."""
        return [line for result in self.results.values() for line in result.lines]

    def write(self, folder: Path | str, model: str = "model", arguments: Any = None) -> Path:
        """Writes report.html, with its pictures, explanation.json, and explanation.npz with the attention weights.

        Args:
          folder: the folder, which is created if necessary.
          model: the name of the model, for the title.
          arguments: what the page shows at its end, as JSON; None: nothing.

        Returns:
          The path of the page.
        """
        folder = disk.local(folder, "output")
        chapters = [chapter for result in self.results.values() for chapter in result.chapters]
        facts = {"model": model, "text": short_repr(self.request.text)}
        facts |= {name: value for result in self.results.values() for name, value in result.facts.items()}
        content = json.dumps(self.numbers, indent=1, ensure_ascii=False, default=float)
        folder.mkdir(parents=True, exist_ok=True)
        disk.write(folder / "explanation.json", content)
        arrays: dict[str, Any] = {
            name: array for result in self.results.values() for name, array in result.arrays.items()
        }
        if arrays:
            file = io.BytesIO()
            np.savez_compressed(file, **arrays)
            disk.write(folder / "explanation.npz", file.getvalue())
        title = Path(model).resolve().name if Path(model).exists() else model
        end = "" if arguments is None else json.dumps(arguments, indent=2, ensure_ascii=False)
        return write_page(folder / "report.html", title, "jaxlm explain", facts, chapters, end)


def explain(lm: LM, text: Any, analyses: Sequence[str] | None = None, **choices: Any) -> Explanation:
    """Returns the analyses of a prediction.

    Args:
      lm: the model.
      text: a text, or what `jaxlm.predict` accepts as an example.
      analyses: names in `ANALYSES`; None: those that the model supports.
      **choices: fields of `Request`.

    Raises:
      UserError: for an unknown analysis, and for a request that an analysis does not support.
    """
    check_model("the model", lm)
    unknown = [name for name in choices if name not in Request._fields[2:]]
    if unknown:
        raise UserError(f"explain has no argument {unknown[0]!r}{suggestion(unknown[0], Request._fields[2:])}")
    request = Request(lm, text, **choices)
    names = analyses_for(lm, analyses)
    read_example(lm, text, request.task)
    for name in names:
        ANALYSES[name].check(request)
    return Explanation(request, {name: ANALYSES[name].run(request) for name in names})


def analyses_for(lm: LM, analyses: Sequence[str] | None) -> tuple[str, ...]:
    """Returns the names of analyses without repetitions; None: those that suit the model.

    Raises:
      UserError: for an unknown name, and for a model that no analysis suits.
    """
    if analyses is None:
        names = tuple(name for name, analysis in ANALYSES.items() if analysis.suits(lm))
        if not names:
            raise UserError(
                f"the model has the head {head_of(lm) or 'none'} and no attention; explanations require attention, or "
                f"one of the heads {', '.join(EXPLAINED_HEADS)}"
            )
        return names
    names = tuple(dict.fromkeys(check_list("analyses", analyses, "names of analyses")))
    for name in names:
        if name not in ANALYSES:
            raise UserError(f"analyses contains {name!r}{suggestion(str(name), ANALYSES)}")
    if not names:
        raise UserError(f"analyses is empty; choose some of {', '.join(ANALYSES)}")
    return tuple(name for name in ANALYSES if name in names)  # the first one reports an unknown target
