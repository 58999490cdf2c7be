"""Scores token by token: of a linear layer, <g_s a_s^T, V_c> = g_s^T V_c a_s at each place s.

No example's gradient is formed, but each direction is multiplied with every token: dearer than
`WgradDot` where there are several directions, and the same sum.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_r1.influence.methods import Directions


class Ghost:
    """Exact. A token's score is what the gradients of layer outputs at its place give; they sum to the
    example's. A row holds [S, C], `per_token` keeps them (`token_scores`)."""

    squares = False

    def __init__(self, directions: Directions, capabilities: int, seq_length: int, per_token: bool = False):
        self.directions, self.capabilities, self.per_token = directions, capabilities, per_token
        self.names = frozenset(directions)
        self.width = seq_length * capabilities if per_token else capabilities

    def linear(self, name: str, a_SBI: Tensor, g_SBO: Tensor, row_BX: Tensor) -> None:
        for c, direction_OI in enumerate(self.directions[name]):
            passed_SBI = g_SBO @ direction_OI.to(g_SBO.dtype)
            self._add(row_BX, c, torch.linalg.vecdot(passed_SBI.float(), a_SBI.float()).T, 0)

    def look_up(self, name: str, index_BS: Tensor, g_BSD: Tensor, row_BX: Tensor) -> None:
        for c, direction_VD in enumerate(self.directions[name]):
            rows_BSD = F.embedding(index_BS, direction_VD)
            self._add(row_BX, c, torch.linalg.vecdot(g_BSD.float(), rows_BSD), 0)

    def norm(self, name: str, g_SBD: Tensor, first: int, row_BX: Tensor) -> None:
        for c, direction_D in enumerate(self.directions[name]):
            self._add(row_BX, c, (g_SBD @ direction_D).T, first)

    def _add(self, row_BX: Tensor, c: int, token_BS: Tensor, first: int) -> None:
        if self.per_token:
            token_BSC = row_BX.view(len(row_BX), -1, self.capabilities)
            token_BSC[:, first : first + token_BS.shape[1], c] += token_BS
        else:
            row_BX[:, c] += token_BS.double().sum(1)

    def results(self, row_NX: Tensor) -> dict[str, Tensor]:
        if not self.per_token:
            return {"scores": row_NX}
        token_NSC = row_NX.view(len(row_NX), -1, self.capabilities)
        return {"scores": token_NSC.sum(1), "token_scores": token_NSC}
