"""Calibration: one scale and one bias a domain, drawn towards those of all rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

from torchrec_mdr.inference.freeze import ServingModel, known_ids

Labelled = tuple[Tensor, KeyedJaggedTensor, Tensor, Tensor]  # dense features, sparse ones, domain ids, labels

PRIOR_ROWS = 200.0  # how many rows what holds for all rows counts as, beside a domain's own
LEAST_SCALE = 0.01  # or logits that know nothing would lose their order
_STEPS = 50


def fit_calibration(logits: Tensor, labels: Tensor, domain_ids: Tensor, num_domains: int) -> Tensor:
    """Scale and bias of each domain, by validation rows: Platt scaling, shrunk.

    All rows' scale and bias minimise their log loss. A domain's minimise that of its own rows and, as if it had
    ``PRIOR_ROWS`` more, the distance to all rows' in the curvature of their loss. A domain whose own rows would have a
    worse log loss by it keeps scale 1 and bias 0, and so does one without rows.

    Args:
        logits (Tensor): [B].
        labels (Tensor): [B], 0 or 1.
        domain_ids (Tensor): int64 [B].
        num_domains (int): N.

    Returns:
        Tensor: float64 [N, 2], scale > 0 and bias.

    Example::

        >>> logits = torch.tensor([2.0, 2.0, 2.0, -2.0]).repeat(500)  # which claim more than they know
        >>> labels = torch.tensor([1.0, 1.0, 0.0, 0.0]).repeat(500)
        >>> affine = fit_calibration(logits, labels, torch.zeros(2000, dtype=torch.int64), 2)
        >>> torch.sigmoid(2 * affine[0, 0] + affine[0, 1]).round(decimals=2).item(), affine[1].tolist()
        (0.67, [1.0, 0.0])
    """
    logits, labels = logits.double().flatten(), labels.double().flatten()
    identity = logits.new_zeros(1, 2)  # the logarithm of the scale, and the bias
    everything = torch.zeros_like(domain_ids)
    common, curvature = _fit(logits, labels, everything, identity, identity.new_zeros(1, 2, 2))
    rows = max(len(logits), 1)
    prior = (curvature / rows * PRIOR_ROWS).expand(num_domains, 2, 2)
    own, _ = _fit(logits, labels, domain_ids, common.expand(num_domains, 2), prior)
    fitted = torch.stack([own[:, 0].exp().clamp(min=LEAST_SCALE), own[:, 1]], 1)
    plain = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(num_domains, 2)
    better = _losses(logits, labels, domain_ids, fitted) < _losses(logits, labels, domain_ids, plain)
    return torch.where(better.unsqueeze(1), fitted, plain)


@torch.no_grad()
def calibrate(model: ServingModel, rows: Iterable[Labelled]) -> None:
    """Gives every adapter of the natural division the calibration that labelled rows ask for.

    Args:
        model (ServingModel): a frozen model, where each domain has its own rows.
        rows (Iterable[Labelled]): batches of rows that the model was not trained on.

    Raises:
        ValueError: there are no rows.
    """
    model.calibration.get_buffer("affine")[1:] = calibration_of(model, rows, model.sizes)


@torch.no_grad()
def calibration_of(
    model: Callable[[Tensor, KeyedJaggedTensor, Tensor], Tensor], rows: Iterable[Labelled], sizes: Sequence[int]
) -> Tensor:
    """The calibration of each domain of the natural division, float64 [N, 2]; see :func:`calibrate`.

    Args:
        model (Callable): dense features, sparse ones and domain ids to logits.
        rows (Iterable[Labelled]): see :func:`calibrate`.
        sizes (Sequence[int]): number of domains of each division.

    Raises:
        ValueError: there are no rows.
    """
    logits, labels, domains = [], [], []
    for dense, sparse, ids, own in rows:
        logits.append(model(dense, sparse, ids).reshape(-1))
        labels.append(own.reshape(-1))
        domains.append(known_ids(ids, sizes)[:, 0])
    if not logits:
        raise ValueError("there are no validation rows to calibrate by; leave calibration out")
    ids = torch.cat(domains)
    known = ids >= 0
    return fit_calibration(torch.cat(logits)[known], torch.cat(labels)[known], ids[known], sizes[0])


def _losses(logits: Tensor, labels: Tensor, ids: Tensor, affine: Tensor) -> Tensor:
    """The sum of each domain's log losses, [N]."""
    calibrated = logits * affine[ids, 0] + affine[ids, 1]
    losses = F.binary_cross_entropy_with_logits(calibrated, labels, reduction="none")
    return losses.new_zeros(len(affine)).index_add_(0, ids, losses)


def _fit(logits: Tensor, labels: Tensor, ids: Tensor, start: Tensor, prior: Tensor) -> tuple[Tensor, Tensor]:
    """Newton's method for all groups of rows at once, from the prior's centre; a step that does not help is halved.

    Returns:
        tuple: logarithm of the scale and bias, [N, 2]; the loss's curvature there without the prior's, [N, 2, 2].
    """
    centre, theta = start, start.clone()

    def loss_at(point: Tensor) -> Tensor:
        away = point - centre
        pull = 0.5 * torch.einsum("ni,nij,nj->n", away, prior, away)
        return _losses(logits, labels, ids, torch.stack([point[:, 0].exp(), point[:, 1]], 1)) + pull

    loss, curvature = loss_at(theta), torch.zeros_like(prior)
    for _ in range(_STEPS):
        scaled = logits * theta[ids, 0].exp()
        probability = torch.sigmoid(scaled + theta[ids, 1])
        slopes = torch.stack([scaled, torch.ones_like(scaled)], 1)
        error, weight = probability - labels, probability * (1 - probability)
        gradient = theta.new_zeros(theta.shape).index_add_(0, ids, error.unsqueeze(1) * slopes)
        outer = weight.view(-1, 1, 1) * slopes.unsqueeze(2) * slopes.unsqueeze(1)
        curvature = prior.new_zeros(prior.shape).index_add_(0, ids, outer)
        total = curvature + prior + 1e-9 * torch.eye(2, dtype=prior.dtype)
        gradient = gradient + torch.einsum("nij,nj->ni", prior, theta - centre)
        step = torch.linalg.solve(total, gradient).clamp(-2, 2)
        for _ in range(20):
            tried = theta - step
            reached = loss_at(tried)
            good = reached <= loss
            theta, loss = torch.where(good.unsqueeze(1), tried, theta), torch.where(good, reached, loss)
            step = torch.where(good.unsqueeze(1), 0.0, step / 2)
            if bool(good.all()):
                break
        if float(gradient.abs().max()) < 1e-6:
            break
    return theta, curvature
