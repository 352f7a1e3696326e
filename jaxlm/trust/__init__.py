"""Audits and protection: bias, filters of outputs, privacy of training data.

memorisation  canaries and their exposure, verbatim continuations of training texts
membership    attacks that decide whether an example was in the training data, and the privacy loss that they prove
privacy_page  chapters of a page with the results of both
"""

from jaxlm.trust.membership import Attack, attack, audited_epsilon, reference_scores
from jaxlm.trust.memorisation import Exposure, continuations, exposure, random_canaries
from jaxlm.trust.privacy_page import membership_chapter, memorisation_chapter

__all__ = [
    "Attack",
    "Exposure",
    "attack",
    "audited_epsilon",
    "continuations",
    "exposure",
    "membership_chapter",
    "memorisation_chapter",
    "random_canaries",
    "reference_scores",
]
