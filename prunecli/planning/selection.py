"""Which channels of a group matter to what reads it, and what all smaller widths would cost its readers.

With the views of a group (A, S; see `reader_views`), a reader that keeps the inputs P and is solved again by least
squares errs by ``trace(A S_R|P A')``, where ``S_R|P`` is what P leaves unexplained of the other inputs' moments (the
Schur complement).

* ``variance_scores``: ``sum over readers of |A_j|^2 S_jj``, the energy that goes with a channel if nothing takes its
  place.
* ``forward_scores``: greedy forward selection in the same metric, ``next = argmax_j sum |A S[:, j]|^2 / S_jj`` on the
  Schur complement of what is kept already (orthogonal least squares; Chen, Billings and Luo 1989).
* ``refit_losses``: with the kept channels first and ``S = L L'``, the error of every width at once,
  ``loss(k) = sum over c >= k of |(A L)_c|^2``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from prunecli.planning.reader_views import View

_RIDGE: Final = 1e-3  # the default of recover.ridge: selection foresees what least squares will do
_STEPS: Final = 96  # most steps of a selection; wide groups take several channels in each


def variance_scores(views: Sequence[View], width: int) -> Tensor:
    """Importance ``[width]`` of each channel by the energy that its readers get from it.

    Args:
        views: views of the group.
        width: number of channels.
    """
    scores = torch.zeros(width, dtype=torch.float64)
    for view in views:
        own_A = view.A[:, view.at].permute(1, 0, 2)  # [n, rows, r]
        own_S = view.S[view.at[:, :, None], view.at[:, None, :]]
        scores[view.channels] += ((own_A @ own_S) * own_A).sum((1, 2))
    return scores


def forward_scores(views: Sequence[View], width: int) -> Tensor:
    """Importance ``[width]`` by forward selection: the earlier a channel is taken, the higher.

    Inputs of a reader that belong to other groups (a concatenation) count as kept.

    Args:
        views: views of the group.
        width: number of channels.
    """
    states = [_State.of(view) for view in views]
    scores = torch.zeros(width, dtype=torch.float64)
    left = torch.arange(width)
    while len(left):
        gain = torch.zeros(width, dtype=torch.float64)
        for state in states:
            gain[state.channels] += state.gains()
        order = gain[left].argsort(descending=True, stable=True)[: -(-width // _STEPS)]
        scores[left[order]] = len(left) - torch.arange(len(order), dtype=torch.float64)
        taken = left[order]
        left = left[~torch.isin(left, taken)]
        states = [state.without(taken) for state in states]
    return scores


@dataclass(frozen=True, kw_only=True)
class _State:
    """What the kept inputs of one view leave unexplained, for the channels that are still to be chosen.

    Attributes:
        B: ``A S`` of these channels' inputs ``[rows, n * r]``.
        S: their remaining second moments ``[n * r, n * r]``.
        channels: the group's channels ``[n]``.
        repeats: number r of inputs of a channel.
    """

    B: Tensor
    S: Tensor
    channels: Tensor
    repeats: int

    @classmethod
    def of(cls, view: View) -> _State:
        """The state in which only inputs of other groups are kept."""
        view = view.ridged(_RIDGE)
        own = view.at.flatten()
        others = torch.ones(len(view.S), dtype=torch.bool)
        others[own] = False
        whole = cls(B=view.A @ view.S, S=view.S, channels=torch.arange(len(view.S)), repeats=1)
        whole = whole.without(others.nonzero().flatten())
        place = torch.searchsorted(whole.channels, own)  # ascending, since only others have left
        return cls(B=whole.B[:, place], S=whole.S[place][:, place], channels=view.channels, repeats=view.at.shape[1])

    def gains(self) -> Tensor:
        """The energy ``[n]`` that each channel explains in addition."""
        n, r = len(self.channels), self.repeats
        if r == 1:
            return self.B.square().sum(0) / self.S.diagonal().clamp(min=torch.finfo(torch.float64).tiny)
        own_B = self.B.reshape(len(self.B), n, r).movedim(1, 0)
        own_S = self.S.reshape(n, r, n, r).diagonal(dim1=0, dim2=2).movedim(2, 0)
        return ((own_B @ torch.linalg.pinv(own_S, hermitian=True)) * own_B).sum((1, 2))

    def without(self, taken: Tensor) -> _State:
        """The state once the channels ``taken`` are kept too; those of them that are not here are ignored."""
        leaving = torch.isin(self.channels, taken)
        if not leaving.any():
            return self
        inputs = leaving.repeat_interleave(self.repeats)
        S_PP, S_PR = self.S[inputs][:, inputs], self.S[inputs][:, ~inputs]
        jitter = 1e-10 * S_PP.diagonal().mean() * torch.eye(len(S_PP), dtype=self.S.dtype)
        K = torch.linalg.solve(S_PP + jitter, S_PR)
        return _State(
            B=self.B[:, ~inputs] - self.B[:, inputs] @ K,
            S=self.S[~inputs][:, ~inputs] - S_PR.mT @ K,
            channels=self.channels[~leaving],
            repeats=self.repeats,
        )


def refit_losses(views: Sequence[View], order: Sequence[int]) -> Tensor:
    """The error ``[width + 1]`` of the readers, solved again, when that many channels of ``order`` are gone.

    Args:
        views: views of the group; their readers' errors are added.
        order: the group's channels, least important first.
    """
    width = len(order)
    rank = torch.empty(width, dtype=torch.int64)
    rank[torch.tensor(order)] = torch.arange(width)
    total = torch.zeros(width + 1, dtype=torch.float64)
    for view in (view.ridged(_RIDGE) for view in views):
        kept_first = rank[view.channels].argsort(descending=True)
        own = view.at[kept_first].flatten()
        others = torch.ones(len(view.S), dtype=torch.bool)
        others[own] = False
        places = torch.cat([others.nonzero().flatten(), own])
        L = torch.linalg.cholesky(view.S[places][:, places])
        explained = (view.A[:, places] @ L).square().sum(0)[int(others.sum()) :].reshape(len(kept_first), -1).sum(1)
        lost = torch.zeros(width, dtype=torch.float64)
        lost[rank[view.channels[kept_first]]] = explained
        total[1:] += lost.cumsum(0)
    return total
