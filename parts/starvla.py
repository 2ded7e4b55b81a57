"""starVLA (github.com/starVLA/starVLA), the framework of twinbrain.py: its QwenOFT (Appendix C) and
how its QwenFAST (Table 2) decodes.

Its DiT is in twinbrain.py, as the paper's expert; the action tokens of QwenFAST in common.py.
Letters: B batch, T tokens, D width, H chunk, A action.
"""

import torch
import torch.nn.functional as F
from torch import nn

from parts.process import UserError
from parts.sight import read

SLOT = "🔍"  # an action is read where this stands
ASK = " Please predict the next {H} robot actions: <action>{slots}<action>."


def ask(tokenizer, horizon):
    """-> ids that close a prompt, behind the state: a slot sees what stands before it alone."""
    text = ASK.format(H=horizon, slots=SLOT * horizon)
    return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])


def slot(tokenizer):
    """-> the id of SLOT."""
    ids = tokenizer(SLOT, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise UserError(f"--head oft: this backbone has no single token for {SLOT}")
    return ids[0]


class OFT(nn.Module):
    """One action from the hidden state at each slot, all at once."""

    def __init__(self, condition, action_dim, horizon):
        super().__init__()
        D, self.horizon = 2 * condition, horizon
        self.enter = nn.Sequential(nn.LayerNorm(condition), nn.Linear(condition, D), nn.ReLU())
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(D), nn.Linear(D, D), nn.ReLU()) for _ in range(2)
        )
        self.leave = nn.Sequential(nn.LayerNorm(D), nn.Linear(D, action_dim))

    def forward(self, h_R, slots):
        """h_R (B, T, D), slots: the H of each row among B * T -> (B, H, A)."""
        h = h_R.flatten(0, 1).index_select(0, slots)
        x = self.enter(h.unflatten(0, (-1, self.horizon)))  # (B, H, 2 D)
        for block in self.blocks:
            x = x + block(x)
        return self.leave(x)


def decode(vlm, out, cache, prompt, sees, limit, end):
    """Greedy decoding behind a prompt, whose pass gave `out` and filled the cache, until all rows
    have said `end` -> (B, limit or less) ids. sees: real (B, T) -> mask, what a token sees."""
    h, ids = out.last_hidden_state, []
    real, position = prompt["real"], prompt["position_ids"][..., -1:]
    while True:
        ids.append(vlm.lm_head(h[:, -1:]).argmax(-1))  # (B, 1)
        said = torch.cat(ids, dim=1)
        if len(ids) == limit or (said == end).any(1).all():
            return said
        real, position = F.pad(real, (0, 1), value=True), position + 1
        x, text = vlm.get_input_embeddings()(ids[-1]), vlm.model.language_model
        out = read(text, x, {"position_ids": position}, sees(real)[:, :, -1:], cache=cache)
        h = out.last_hidden_state
