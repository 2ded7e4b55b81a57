"""starVLA (github.com/starVLA/starVLA), the framework of twinbrain.py: the head of its QwenOFT.

Its DiT is in twinbrain.py, as the paper's expert; the action tokens of its QwenFAST in common.py.
Letters: B batch, T tokens, D width, H chunk, A action.
"""

from torch import nn


class OFT(nn.Module):
    """QwenOFT's head (Appendix C): one action from the hidden state at each slot, all at once."""

    def __init__(self, condition, action_dim):
        super().__init__()
        D = 2 * condition
        self.enter = nn.Sequential(nn.LayerNorm(condition), nn.Linear(condition, D), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU()) for _ in range(2)
        )
        self.leave = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, action_dim))

    def forward(self, h_R, slots, horizon):
        """h_R (B, T, D), slots (B, T) with H slots a row -> (B, H, A)."""
        x = self.enter(h_R[slots].unflatten(0, (-1, horizon)))  # (B, H, 2 D)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)
