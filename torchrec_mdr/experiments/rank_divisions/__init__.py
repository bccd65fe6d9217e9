"""Ranks candidate auxiliary divisions of a prepared data set without training a model for each.

MultiLoRA (section 4.5) finds that an auxiliary division helps the more, the more preferences differ between its domains
*given* the natural division, and chooses one by training with each.
`python -m torchrec_mdr.experiments.rank_divisions` counts instead:

1. On the training split it fits a logit that is a sum of shrunken effects of every id of every feature, overall and in
   each natural domain: what is known without the candidate. Dense features are cut at their quantiles.
2. For each candidate and each feature it estimates by how much the auxiliary domains differ under an id within a
   natural domain: effects of (auxiliary domain, id), then of (natural domain, auxiliary domain, id), shrunken by
   empirical Bayes as far as noise explains them. Features come one after another, those with few ids first, so a
   difference is counted once. That auxiliary domains differ in their rate alone is known beforehand as well and
   does not count: a rate is no preference.
3. The score is what these effects save in log loss, in nats per row, on rows they were not learnt from: five folds of
   the training split, never validation or test rows. So it estimates the information that (auxiliary domain, id) has on
   the label beyond (natural domain, id), as far as the data suffice to learn it.

Where a feature determines the candidate, as a user determines a gender, all rows of a user are in one fold. Otherwise
the tastes of single users would pass for a difference between domains, and any random cut of the users would score.
Standard errors take such rows together, too.

A copy of the natural division, or a coarser one, scores exactly 0, and a random one about 0, rather a little below: the
price of learning from noise. Nothing in the score knows a backbone or a method; it tells which divisions to try first.
"""

from torchrec_mdr.experiments.rank_divisions.ranking import DivisionScore, DomainScore, rank_divisions

__all__ = ["DivisionScore", "DomainScore", "rank_divisions"]
