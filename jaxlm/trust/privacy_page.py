"""Chapters of a page with the results of the privacy audits."""

from __future__ import annotations

from collections.abc import Mapping

from jaxlm.reports.pages import Chapter
from jaxlm.reports.tables import Table
from jaxlm.trust.membership import Attack
from jaxlm.trust.memorisation import Exposure


def memorisation_chapter(groups: Mapping[str, Exposure]) -> Chapter:
    """Returns the chapter about the exposure of groups of canaries, such as those that occur once and those repeated.

    Args:
      groups: the name of each group, and its exposure.
    """
    rows = [
        [
            name,
            f"{len(found.canaries):,}",
            f"{found.by_rank.mean():.2f}",
            f"{found.extrapolated.mean():.2f}",
            f"{found.extrapolated.max():.2f}",
        ]
        for name, found in groups.items()
    ]
    columns = ("canaries", "number", "mean by rank, bits", "mean extrapolated, bits", "largest, bits")
    text = (
        "A canary is a string of random digits that was inserted into the training texts. Its exposure is the number "
        "of bits by which it is more likely under the model than a random string. Without memorisation the mean is "
        "1.44.",
    )
    return Chapter("Exposure of canaries", text, (Table("Exposure", columns, rows, ""),))


def membership_chapter(attacks: Mapping[str, Attack], audited: Mapping[str, float] | None = None) -> Chapter:
    """Returns the chapter about membership inference.

    Args:
      attacks: the name of each attack or model, and its result.
      audited: lower bounds of the privacy loss, by the same names.
    """
    rows = []
    for name, found in attacks.items():
        cells = [f"{share:.1%} ({low:.1%} to {high:.1%})" for share, (low, high) in zip(found.found, found.intervals)]
        auc = f"{found.auc:.3f} ({found.auc_interval[0]:.3f} to {found.auc_interval[1]:.3f})"
        bound = [f"{audited[name]:.2f}" if name in audited else ""] if audited else []
        rows.append([name, auc, *cells, *bound])
    rates = next(iter(attacks.values())).rates if attacks else ()
    columns = ("attack", "AUC", *(f"found at {rate:.1%} errors" for rate in rates), *(["epsilon"] if audited else []))
    text = (
        "An attack scores examples by how well the model predicts them. The table shows the fraction of training "
        "examples that it finds at fixed rates of false positives, with 95 % intervals.",
    )
    return Chapter("Membership inference", text, (Table("Attacks", columns, rows, ""),))
