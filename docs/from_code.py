"""What pages take from the code: the fields of dataclasses, the arguments of functions, presets, and notebooks."""

from __future__ import annotations

import ast
import inspect
import io
import json
import re
import shutil
import textwrap
import tokenize
from functools import cache
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

ROOT = Path(__file__).parent.parent


Field = tuple[str, str, str, str]


def fields(kind: type) -> list[Field]:
    """The fields of a class whose comments say what they mean."""
    found = written(kind)
    return found if any(meaning for *_, meaning in found) else []


@cache
def written(kind: type) -> list[Field]:
    """Name, type, default and meaning of each field of a class, as its source has them; the comment is the meaning.

    It is the comment that `--help` shows; one that stands alone above a field continues behind it.
    """
    try:
        source = textwrap.dedent(inspect.getsource(kind))
    except (OSError, TypeError):
        return []
    comments = {
        token.start[0]: (token.string.lstrip("# "), token.line.lstrip().startswith("#"))
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    }
    found = []
    for node in ast.parse(source).body[0].body:  # type: ignore[attr-defined]
        if not isinstance(node, ast.AnnAssign) or "ClassVar" in ast.unparse(node.annotation):
            continue
        behind = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        meaning = ". ".join([*behind, " ".join(above)] if above else behind)
        default = ast.unparse(node.value) if node.value else ""
        made = re.fullmatch(r"(?:dataclasses\.)?field\(default_factory=(?:lambda: )?(.*)\)", default)
        if made:
            default = made[1] if made[1].endswith(")") else f"{made[1]}()"
        kinds = re.sub(
            r"^Annotated\[(.*), tyro\..*\]$|^tyro\.conf\.\w+\[(.*)\]$", r"\1\2", ast.unparse(node.annotation)
        )
        found.append((ast.unparse(node.target), kinds, default, meaning))
    return found


def plain(text: str) -> str:
    """A comment as reStructuredText: what stands between backticks is code, the rest means itself."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*|_])", r"\\\1", part) for part in parts)


def document(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Docstrings as Sphinx reads them.

    They are prose: `name: meaning` of an argument becomes an entry, what is indented stays as it is, and a class lists
    its fields.
    """
    known = arguments(thing) if what in ("function", "method", "class") else []
    made: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if paragraph.startswith("    ") and made:  # a table
            made += ["::", "", *paragraph.split("\n"), ""]
        elif paragraph.startswith(("- ", ">>> ")):  # a list, an example
            made += [*(plain(paragraph) if paragraph.startswith("-") else paragraph).split("\n"), ""]
        else:
            made += [*entries(" ".join(paragraph.split("\n")), known), ""]
    lines[:] = made
    if what == "class" and isinstance(thing, type):
        for field, kind, default, meaning in fields(thing):
            lines += ["", f".. py:attribute:: {field}", f"   :type: {kind}"]
            # Those of configs are flags, which one looks for.
            lines += ["   :no-index:"] * (thing.__module__ != "jaxlm.config")
            lines += [f"   :value: {default}"] * bool(default) + ["", f"   {plain(meaning)}"]


def arguments(thing: Any) -> list[str]:
    """The names of what a function or class takes."""
    try:
        return list(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return []


def entries(text: str, known: list[str]) -> list[str]:
    """A paragraph, with an entry for each sentence that is `name: ...` or `name, name: ...` of known names."""
    names = "|".join(map(re.escape, known)) or "(?!)"
    begin = re.compile(rf"(?:^|(?<=[.;])\s+)((?:{names})(?:, (?:{names}))*): (?=\S)")
    places = list(begin.finditer(text))
    made = [plain(text[: places[0].start()] if places else text), ""]
    for place, after in zip(places, [*places[1:], None]):
        meaning = text[place.end() : after.start() if after else None].rstrip("; ")
        made += [", ".join(f"`{name}`" for name in place[1].split(", ")), f"    {plain(meaning)}", ""]
    return made


def signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """A class of fields is made of them: they are listed below it, or stand here as they are written."""
    if what != "class" or not isinstance(thing, type):
        return arguments, returns
    if fields(thing):
        return "", returns
    if "__annotations__" in vars(thing):
        own = (f"{n}: {kind}" + (f" = {default}" if default else "") for n, kind, default, _ in written(thing))
        return f"({', '.join(own)})", returns
    return arguments, returns


def skip(app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Leaves out the entries of a tuple and the defaults that are classes: both stand among the fields."""
    entry = (getattr(thing, "__doc__", None) or "").startswith("Alias for field number")
    return True if entry or (what == "class" and isinstance(thing, type)) else None


class Presets(SphinxDirective):
    """The table of all presets, by family."""

    def run(self) -> list[nodes.Node]:
        """Its rows, read from `jaxlm.families`."""
        from jaxlm.families import PRESETS
        from jaxlm.nn.transformer import count_parameters

        rows = [("preset", "structure", "layers", "width", "heads", "vocabulary", "parameters")]
        for name, model in PRESETS.items():
            both = model.structure == "encoder_decoder"
            layers = f"{model.layers} + {model.decoder_layers or model.layers}" if both else f"{model.layers}"
            sizes = (
                layers,
                f"{model.width:,}",
                f"{model.heads}",
                f"{model.vocabulary:,}",
                f"{count_parameters(model):,}",
            )
            rows.append((name, model.structure.replace("_", "-"), *sizes))
        table = nodes.table(classes=["presets"])
        group = nodes.tgroup(cols=len(rows[0]))
        group += [nodes.colspec(colwidth=1) for _ in rows[0]]
        head, body = nodes.thead(), nodes.tbody()
        for n, cells in enumerate(rows):
            row = nodes.row()
            for place, cell in enumerate(cells):
                text = nodes.literal(text=cell) if n and not place else nodes.Text(cell)
                row += nodes.entry("", nodes.paragraph("", "", text))
            (body if n else head).append(row)
        group += [head, body]
        table += group
        return [table]


def notebooks(app: Sphinx) -> None:
    """Copies the notebooks, outputs included, to where Sphinx reads.  Their links to pages stay links, those to other
    files of the checkout become plain words."""
    there = Path(app.srcdir) / "notebooks"
    shutil.rmtree(there, ignore_errors=True)
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        there.mkdir(exist_ok=True)
        text = file.read_text().replace("](../docs/", "](../")
        outside = re.compile(r"(?<!!)\[([^]]+)\]\((?!https?:|#|\.\./[a-z_/]+\.md)[^)]*\)")
        made = json.loads(text)
        for cell in made["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = outside.sub(r"\1", "".join(cell["source"]))
        (there / file.name).write_text(json.dumps(made))


def listed(app: Sphinx, page: str, source: list[str]) -> None:
    """The page of notebooks lists those that there are, the ones that it names first."""
    if page == "notebooks":
        found = [f"notebooks/{file.stem}" for file in sorted(Path(app.srcdir, "notebooks").glob("*.ipynb"))]
        lines = source[0].splitlines()
        named = [line for line in lines if line.startswith("notebooks/")]
        at = lines.index(named[0])
        some = [name for name in named if name in found] + [name for name in found if name not in named]
        source[0] = "\n".join(lines[:at] + some + lines[at + len(named) :])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.add_directive("presets", Presets)
    app.connect("builder-inited", notebooks)
    app.connect("source-read", listed)
    app.connect("autodoc-process-docstring", document)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
