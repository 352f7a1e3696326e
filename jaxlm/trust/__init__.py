"""Audits and protection: bias, filters of outputs, privacy of training data.

audits             the table of audits, their arguments, and the page with their results
audit              the result of an audit, and confidence intervals
rows               the rows that audits read
bias_pairs         preferences in pairs of sentences (CrowS-Pairs)
association_tests  associations of words (WEAT) and sentences (SEAT)
bbq                answers to questions about people (BBQ)
counterfactuals    predictions after words for one group are replaced by those for another
group_gaps         gaps between groups in the errors of a classifier
"""
