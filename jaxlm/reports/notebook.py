"""Single pictures and tables, for notebooks, which show the last value of a cell, and for scripts, which save them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxlm.devices import sharding
from jaxlm.errors import UserError, suggestion
from jaxlm.reports.charts import chart_options, chart_title, charts_of_run, family_style
from jaxlm.reports.metrics import metric_label, parse_name, points, read_metrics
from jaxlm.reports.pictures import COLORS, AttentionMap, Chart, DeviceMesh, Heatmap, Picture, Series, notebook_bundle
from jaxlm.reports.rendering import render
from jaxlm.reports.tables import MaskedText, ScoredText, Table, mistakes
from jaxlm.storage import disk


def save(picture: Picture | Table | MaskedText | ScoredText, path: Path | str) -> Path:
    """Writes a picture as a PNG, or a table or a text with colours as an HTML page.

    Args:
      picture: what is written.
      path: the file, with the suffix .png or .html.

    Returns:
      The path.

    Raises:
      UserError: if the path has another suffix, or if there is nothing to show.
    """
    path = disk.local(path, "path")
    suffix = ".html" if isinstance(picture, (Table, MaskedText, ScoredText)) else ".png"
    if path.suffix != suffix:
        raise UserError(
            f"{path} does not fit a {type(picture).__name__}, which is written as {suffix}; "
            f"give a name that ends in {suffix}"
        )
    if isinstance(picture, (Table, MaskedText, ScoredText)):
        from markupsafe import Markup

        body = Markup(picture._repr_mimebundle_()[0]["text/html"])
        disk.write(path, render("document.html.j2", title=picture.title, body=body))
    else:
        png = notebook_bundle(picture)[0].get("image/png")
        if png is None:
            raise UserError(f"{picture.title!r} has nothing to show; no picture is written to {path}")
        disk.write(path, png)
    return path


def curve(folder: Path | str, name: str = "loss") -> Chart:
    """Returns a chart of the report of the run in `folder`.

    Args:
      folder: the folder of the run.
      name: name of the chart, such as `loss`, `accuracy` or `learning_rate`.

    Raises:
      UserError: if the run has no such chart.
    """
    charts = {chart.name: chart for chart in charts_of_run(Path(folder))}
    if name not in charts:
        hint = suggestion(name, charts) if charts else "; nothing has been logged there yet"
        raise UserError(f"the run in {folder} has no picture {name!r}{hint}")
    return charts[name]


def comparison(runs: Mapping[str, Path | str], name: str = "loss") -> Chart:
    """Returns one metric of several runs in one chart.

    Args:
      runs: label -> folder of the run, at most 8.
      name: the key in `metrics.jsonl`: `loss` is the training loss, `eval/loss` the held-out loss.

    Raises:
      UserError: if a run did not log the metric, or if there are too many runs.
    """
    colors = [color for pair in COLORS for color in pair]
    if not 0 < len(runs) <= len(colors):
        raise UserError(f"{len(runs)} runs cannot be compared in one picture; give 1 to {len(colors)}")
    held_out, series = name.startswith("eval/"), []
    for (label, folder), color in zip(runs.items(), colors):
        rows = read_metrics(Path(folder))
        steps, values = points(rows, name)
        if not len(steps):
            known = {key for row in rows for key in row} - {"step"}
            raise UserError(f"the run in {folder} has no metric {name!r}{suggestion(name, known)}")
        series.append(Series(label, steps, values, held_out, color))
    metric = parse_name(name.removeprefix("eval/"))
    style = family_style(metric.family)
    title = f"{chart_title(metric_label(name.removeprefix('eval/')))}, {'held-out' if held_out else 'training'}"
    last = max(float(one.steps[-1]) for one in series)
    return Chart("compared", title, style.unit or title, tuple(series), last=max(last, 1.0), **chart_options(style))


def confusion(labels: Sequence[str], predictions: Sequence[Mapping[str, Any]]) -> Heatmap:
    """Returns the confusion matrix of the results of `jaxlm.predict` and the labels of the same examples."""
    predicted = [str(row["prediction"]) for row in predictions]
    names = tuple(sorted({*labels, *predicted}))
    counts = np.zeros((len(names), len(names)), int)
    for (label, prediction), count in Counter(zip(labels, predicted, strict=True)).items():
        counts[names.index(label), names.index(prediction)] = count
    return Heatmap("Confusion matrix", counts, names)


def misclassified(
    texts: Sequence[str], labels: Sequence[str], predictions: Sequence[Mapping[str, Any]], max_rows: int = 10
) -> Table:
    """Returns the most confident mistakes of `jaxlm.predict` on texts with these labels."""
    rows = zip(texts, labels, predictions, strict=True)
    wrong = [
        (row["confidence"], [text, label, row["prediction"]]) for text, label, row in rows if label != row["prediction"]
    ]
    return mistakes(("text", "true", "predicted"), wrong, len(texts), "examples are predicted wrong", max_rows)


def masked_text(
    tokenizer: Any, before_T: Sequence[int], after_T: Sequence[int], predicted_T: Sequence[bool], title: str = "Masking"
) -> MaskedText:
    """Returns a text before and after masking, in colour.

    Args:
      tokenizer: the tokenizer of the ids.
      before_T: token ids before masking.
      after_T: token ids after masking.
      predicted_T: which tokens are to be predicted.
      title: the title above the text.
    """
    before, after = (tuple(tokenizer.pieces(ids)) for ids in (before_T, after_T))
    return MaskedText(title, before, after, tuple(map(bool, predicted_T)), tokenizer.pieces([tokenizer.mask])[0])


def attention(lm: Any, source: str, target: str, layer: int = -1, head: int | None = None) -> AttentionMap:
    """Returns the cross-attention of an encoder-decoder from the tokens of `target` to the tokens of `source`.

    Args:
      lm: an encoder-decoder with a tokenizer.
      source: the text that the encoder reads.
      target: the text that the decoder writes.
      layer: a layer of the decoder, counted from 0, or from the end if negative.
      head: one of its heads. None: the mean of all heads.

    Raises:
      UserError: for another kind of model, and for a layer or a head that does not exist.
    """
    if lm.config.structure != "encoder_decoder" or lm.config.start_token is None or lm.tokenizer is None:
        raise UserError(
            f"cross-attention requires an encoder-decoder with a tokenizer and a start token, but the model has the "
            f"structure {lm.config.structure!r}, {'a' if lm.tokenizer else 'no'} tokenizer and the start token "
            f"{lm.config.start_token}; choose another model"
        )
    ((source_ids, _),), ((target_ids, _),) = (
        lm.tokenizer.encode_with_special_tokens([source]),
        lm.tokenizer.target.encode_with_special_tokens([target]),
    )
    shifted_BT = np.array([[lm.config.start_token, *target_ids[:-1]]], np.int32)
    out = lm([source_ids], target_tokens_BT=shifted_BT, attentions=True)
    weights_LHTS = np.asarray(out.decoder.cross_attention_LBHTS[:, 0], np.float32)
    for name, index, size in (("layer", layer, weights_LHTS.shape[0]), ("head", head or 0, weights_LHTS.shape[1])):
        if not -size <= index < size:
            raise UserError(f"{name} is {index}; the decoder has {size}, counted from 0")
    weights_HTS = weights_LHTS[layer]
    weights_TS = weights_HTS.mean(0) if head is None else weights_HTS[head]
    which = f"layer {layer % len(weights_LHTS)}, " + ("mean of the heads" if head is None else f"head {head}")
    tokens = lambda words, ids: tuple(piece.replace("\u2581", "_").replace(" ", "_") for piece in words.pieces(ids))
    sides = tokens(lm.tokenizer.target, target_ids), tokens(lm.tokenizer, source_ids)
    return AttentionMap(f"Cross-attention ({which})", weights_TS, *sides)


def mesh(
    sizes: Mapping[str, int],
    *,
    axes: tuple[str, str] = ("width", "mlp"),
    shape: tuple[int, int] = (512, 2048),
    rows: int = 32,
) -> DeviceMesh:
    """Returns the devices of a mesh, the part of a weight that each holds, and its rows of a batch.

    Args:
      sizes: sizes of the axes of the mesh (`jaxlm.devices.sharding.AXES`), 1 for an axis that is not named.
      axes: the logical axes of the weight, which `jaxlm.devices.sharding.RULES` maps to the mesh.
      shape: the shape of the weight.
      rows: number of rows of the batch.

    Raises:
      UserError: if the mesh does not divide the weight or the rows.
    """
    sizes = {name: sizes.get(name, 1) for name in sharding.AXES}
    sharding.check(sizes, axes, shape, "the weight")
    sharding.check(sizes, ("batch",), (rows,), "the batch")
    parts: list[tuple[slice, slice]] = []
    batch_rows = []
    for coordinates in np.ndindex(*sizes.values()):
        position = dict(zip(sizes, coordinates))
        first, second = (_part(position, sizes, axis, size) for axis, size in zip(axes, shape))
        parts.append((first, second))
        batch_rows.append(_part(position, sizes, "batch", rows))
    split = [name for name, size in sizes.items() if size > 1] or ["data"]
    across = sizes[split[-1]]  # the last axis changes fastest
    down = " × ".join(f"{name} {sizes[name]}" for name in split[:-1])
    what = ", ".join(f"{name} {sizes[name]}" for name in split)
    return DeviceMesh(
        f"A mesh of {math.prod(sizes.values()):,} devices: {what}",
        (math.prod(sizes.values()) // across, across),
        (down, f"{split[-1]} {across}"),
        tuple(parts),
        shape,
        axes,
        tuple(batch_rows),
    )


def _part(position: Mapping[str, int], sizes: Mapping[str, int], axis: str, size: int) -> slice:
    """Returns what the device at this position of the mesh holds of a dimension with this logical axis."""
    index, ways = 0, 1
    for name in sharding.RULES[axis]:
        index, ways = index * sizes[name] + position[name], ways * sizes[name]
    return slice(index * size // ways, (index + 1) * size // ways)


def hardware() -> str:
    """Returns a sentence about the devices that JAX found, with a warning if there is no accelerator."""
    import jax

    devices = jax.devices()
    if devices[0].platform == "cpu":
        return (
            "JAX found no accelerator: everything runs on the CPU, slowly.\n"
            "In Colab, Runtime > Change runtime type offers a TPU or a GPU."
        )
    return f"JAX runs on {len(devices)} x {devices[0].device_kind}."
