"""The Sphinx extension of these pages: documents fields, arguments and presets from the code, and copies notebooks."""

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
    """The fields of a class, or an empty list if none of them has a comment."""
    found = source_fields(kind)
    return found if any(meaning for *_, meaning in found) else []


@cache
def source_fields(kind: type) -> list[Field]:
    """Returns name, type, default and meaning of each field of a class, as written in its source.

    The meaning is the comment that `--help` shows: the one after the field, then the ones in the lines above it.
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
        trailing = [comments[node.end_lineno][0]] if node.end_lineno in comments else []
        above: list[str] = []
        line = node.lineno - 1
        while line in comments and comments[line][1]:
            above.insert(0, comments[line][0])
            line -= 1
        meaning = ". ".join([*trailing, " ".join(above)] if above else trailing)
        default = ast.unparse(node.value) if node.value else ""
        factory = re.fullmatch(r"(?:dataclasses\.)?field\(default_factory=(?:lambda: )?(.*)\)", default)
        if factory:
            default = factory[1] if factory[1].endswith(")") else f"{factory[1]}()"
        kinds = re.sub(
            r"^Annotated\[(.*), tyro\..*\]$|^tyro\.conf\.\w+\[(.*)\]$", r"\1\2", ast.unparse(node.annotation)
        )
        found.append((ast.unparse(node.target), kinds, default, meaning))
    return found


def plain(text: str) -> str:
    """Converts a comment to reStructuredText: text in backticks is code, and all other markup is escaped."""
    parts = re.split(r"(`[^`]+`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*|_])", r"\\\1", part) for part in parts)


SECTION = re.compile(r"(Args|Returns|Yields|Raises):\n")
ITEM = re.compile(r"([\w*.]+(?:, [\w*.]+)*): (.*)", re.DOTALL)


def document(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Converts a docstring to reStructuredText.

    `Args:`, `Returns:` and `Raises:` become field lists, a sentence `name: meaning` about an argument becomes an entry,
    indented text becomes a literal block, and a class lists its fields.
    """
    known = arguments(thing) if what in ("function", "method", "class") else []
    result: list[str] = []
    for paragraph in "\n".join(lines).split("\n\n"):
        if SECTION.match(paragraph):
            result += [*section(paragraph), ""]
        elif paragraph.startswith("    ") and result:  # a table
            result += ["::", "", *paragraph.split("\n"), ""]
        elif paragraph.startswith(("- ", ">>> ")):  # a list, an example
            result += [*(plain(paragraph) if paragraph.startswith("-") else paragraph).split("\n"), ""]
        else:
            result += [*entries(" ".join(paragraph.split("\n")), known), ""]
    lines[:] = result
    if what == "class" and isinstance(thing, type):
        for field, kind, default, meaning in fields(thing):
            lines += ["", f".. py:attribute:: {field}", f"   :type: {kind}"]
            # Only the fields of configs get index entries, because readers search for flags.
            lines += ["   :no-index:"] * (thing.__module__ != "jaxlm.config")
            lines += [f"   :value: {default}"] * bool(default) + ["", f"   {plain(meaning)}"]


def section(paragraph: str) -> list[str]:
    """A section `Args:`, `Returns:`, `Yields:` or `Raises:` as a field list."""
    title, _, body = paragraph.partition(":\n")
    body = textwrap.dedent(body)
    # Continuation lines of an item are indented.
    items = [" ".join(item.split()) for item in re.split(r"\n(?=\S)", body)]
    if title in ("Returns", "Yields"):
        return [f":{title}: {plain(' '.join(items))}"]
    result = [f":{title}:"]
    for item in items:
        match = ITEM.fullmatch(item)
        if match:
            result += ["    " + ", ".join(f"`{name}`" for name in match[1].split(", ")), f"        {plain(match[2])}"]
        else:
            result += ["", f"    {plain(item)}", ""]
    return result


def arguments(thing: Any) -> list[str]:
    """The names of the arguments of a function or class."""
    try:
        return list(inspect.signature(thing).parameters)
    except (TypeError, ValueError):
        return []


def entries(text: str, known: list[str]) -> list[str]:
    """A paragraph; each sentence `name: ...` or `name, name: ...` about known arguments becomes an entry."""
    names = "|".join(map(re.escape, known)) or "(?!)"
    begin = re.compile(rf"(?:^|(?<=[.;])\s+)((?:{names})(?:, (?:{names}))*): (?=\S)")
    places = list(begin.finditer(text))
    result = [plain(text[: places[0].start()] if places else text), ""]
    for place, after in zip(places, [*places[1:], None]):
        meaning = text[place.end() : after.start() if after else None].rstrip("; ")
        result += [", ".join(f"`{name}`" for name in place[1].split(", ")), f"    {plain(meaning)}", ""]
    return result


def signature(
    app: Sphinx, what: str, name: str, thing: Any, options: Any, arguments: str | None, returns: str | None
) -> tuple[str | None, str | None]:
    """The signature of a class with fields: empty if the fields are listed below it, else the fields of its source."""
    if what != "class" or not isinstance(thing, type):
        return arguments, returns
    if fields(thing):
        return "", returns
    if "__annotations__" in vars(thing):
        own = (f"{n}: {kind}" + (f" = {default}" if default else "") for n, kind, default, _ in source_fields(thing))
        return f"({', '.join(own)})", returns
    return arguments, returns


def skip(app: Sphinx, what: str, name: str, thing: Any, skipped: bool, options: Any) -> bool | None:
    """Skips the entries of named tuples and defaults that are classes, because both are listed as fields."""
    entry = (getattr(thing, "__doc__", None) or "").startswith("Alias for field number")
    return True if entry or (what == "class" and isinstance(thing, type)) else None


class Presets(SphinxDirective):
    """The directive `presets`: a table of all presets."""

    def run(self) -> list[nodes.Node]:
        """Returns the table, read from `jaxlm.families`."""
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


def copy_notebooks(app: Sphinx) -> None:
    """Copies the notebooks with their outputs to the source folder of Sphinx.

    Links to pages stay links. Links to other files of the checkout become plain text.
    """
    target = Path(app.srcdir) / "notebooks"
    shutil.rmtree(target, ignore_errors=True)
    for file in sorted((ROOT / "notebooks").glob("*.ipynb")):
        target.mkdir(exist_ok=True)
        text = file.read_text().replace("](../docs/", "](../")
        outside = re.compile(r"(?<!!)\[([^]]+)\]\((?!https?:|#|\.\./[a-z_/]+\.md)[^)]*\)")
        notebook = json.loads(text)
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = outside.sub(r"\1", "".join(cell["source"]))
        (target / file.name).write_text(json.dumps(notebook))


def list_notebooks(app: Sphinx, page: str, source: list[str]) -> None:
    """Lists the existing notebooks on their page: first the named ones in their order, then all others."""
    if page == "notebooks":
        found = [f"notebooks/{file.stem}" for file in sorted(Path(app.srcdir, "notebooks").glob("*.ipynb"))]
        lines = source[0].splitlines()
        named = [line for line in lines if line.startswith("notebooks/")]
        at = lines.index(named[0])
        names = [name for name in named if name in found] + [name for name in found if name not in named]
        source[0] = "\n".join(lines[:at] + names + lines[at + len(named) :])


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the extension; Sphinx calls this."""
    app.add_directive("presets", Presets)
    app.connect("builder-inited", copy_notebooks)
    app.connect("source-read", list_notebooks)
    app.connect("autodoc-process-docstring", document)
    app.connect("autodoc-process-signature", signature)
    app.connect("autodoc-skip-member", skip)
    return {"parallel_read_safe": True}
