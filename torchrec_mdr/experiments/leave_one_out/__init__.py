"""Shows a stage its training rows as if the frozen embeddings had not been learned from them.

Embeddings of ids memorise the rows they were trained on, so that what is fitted behind them on the same rows learns to
trust them too much (docs/departures.md, the recommended recipe). Leaving row i out of an embedding's training would
move it, to first order, by a Newton step of the rows that remain (a jackknife; Cook and Weisberg 1982 do it for
regression):

    e_u without row i  ~  e_u + scale * H_u,-i^-1 g_i,    g_i = d (loss_i + l2 * |e_u|^2) / d e_u

with H_u the curvature of the loss by e_u, see :class:`Curvature`. One free number is set such that the backbone's log
loss on training rows seen so equals that on validation rows; where the quadratic picture is right it is one, and where
the backbone has not seen the rows it comes out as zero and nothing is moved.

Backbone and embeddings are frozen, so what a row sees is the same in every epoch: where it fits in memory it is
computed once and kept, and a step then looks nothing up. Otherwise every step runs the backbone once more, forward and
backward.
"""
