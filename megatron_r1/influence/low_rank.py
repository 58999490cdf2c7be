"""Directions of matrices truncated to their largest singular values: cheaper, and no longer exact."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.influence.methods import Directions


class LowRank:
    """V_c ~ L_c R_c^T of rank `rank`, for this process's shard of each matrix: <sum_s g_s a_s^T, L_c R_c^T> =
    sum_s <L_c^T g_s, R_c^T a_s>. Norm weights and look-ups are exact."""

    squares = False

    def __init__(self, directions: Directions, capabilities: int, rank: int):
        self.capabilities = self.width = capabilities
        self.names = frozenset(directions)
        self._exact = directions
        self._factors = {
            name: truncated(direction, rank) for name, direction in directions.items() if direction.dim() == 3
        }

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        left_OR, right_IR = (factor.to(g_SBO.dtype) for factor in self._factors[name])
        product_SBR = (g_SBO @ left_OR).float() * (a_SBI @ right_IR).float()
        row_BX += product_SBR.sum(0).unflatten(-1, (self.capabilities, -1)).sum(-1)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        for c, direction_VD in enumerate(self._exact[name]):
            row_BX[:, c] += torch.linalg.vecdot(g_BSD.float(), F.embedding(index_BS, direction_VD)).sum(1)

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        row_BX += g_SBD.sum(0) @ self._exact[name].T

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        return {"scores": row_NX}


def truncated(direction_COI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Factors [O, C r] and [I, C r] of the best approximation of rank r of each direction.

    From the eigenvectors of V^T V or V V^T: a singular value decomposition of a vocabulary's matrix would
    cost more than the scores.
    """
    left, right = [], []
    for direction_OI in direction_COI:
        outputs, inputs = direction_OI.shape
        wide = direction_OI if inputs <= outputs else direction_OI.T
        vectors = torch.linalg.eigh((wide.T @ wide).double()).eigenvectors[:, -rank:].to(wide.dtype)
        factors = (wide @ vectors, vectors) if inputs <= outputs else (vectors, wide @ vectors)
        left.append(factors[0])
        right.append(factors[1])
    return torch.cat(left, 1).contiguous(), torch.cat(right, 1).contiguous()


def correlation(found_NC: Tensor, exact_NC: Tensor) -> Tensor:
    """Pearson's over examples, for each capability: [C]. 0 where one does not vary."""
    x_NC, y_NC = found_NC - found_NC.mean(0), exact_NC - exact_NC.mean(0)
    scale_C = x_NC.norm(dim=0) * y_NC.norm(dim=0)
    return torch.where(scale_C > 0, (x_NC * y_NC).sum(0) / scale_C, 0.0)
