"""Audits and protection: bias, filters of outputs, privacy of training data.

audits             the table of audits, their arguments, and the page with their results
audit              the result of an audit, and confidence intervals
rows               the rows that audits read
bias_pairs         preferences in pairs of sentences (CrowS-Pairs)
association_tests  associations of words (WEAT) and sentences (SEAT)
bbq                answers to questions about people (BBQ)
counterfactuals    predictions after words for one group are replaced by those for another
group_gaps         gaps between groups in the errors of a classifier
filters            filters of texts: words, patterns, personal data, copies, a classifier
word_lists         lists of words and regular expressions
safe_generation    answers that pass filters
memorisation       canaries and their exposure, verbatim continuations of training texts
membership         attacks that decide whether an example was in the training data, and the privacy loss that they prove
privacy_page       chapters of a page with the results of both
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
