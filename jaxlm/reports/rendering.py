"""Rendering of HTML from the Jinja templates and style sheets in `templates/`."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import jinja2

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def render(template: str, **values: Any) -> str:
    """Returns the text of a template, such as `page.html.j2`, in which all values are escaped."""
    return _environment().get_template(template).render(**values)


def _printable(value: Any) -> Any:
    """Replaces control characters, which HTML forbids and a byte-level model may generate, by U+FFFD."""
    if hasattr(value, "__html__"):  # rendered by a macro
        return value
    return _CONTROL.sub("\ufffd", str(value).replace("\r\n", "\n"))


@functools.cache
def _environment() -> jinja2.Environment:
    import jinja2  # only here: `import jaxlm` should not load it

    def read(name: str) -> str:
        return (resources.files("jaxlm.reports") / "templates" / name).read_text(encoding="utf-8")

    return jinja2.Environment(
        loader=jinja2.FunctionLoader(read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        finalize=_printable,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
