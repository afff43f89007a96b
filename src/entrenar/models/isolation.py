"""Whether a model keeps documents that share a row apart. Tried, not looked up in a list of names.

transformers makes its masks block-diagonal where positions restart, in architectures that hand them to
`masking_utils.create_causal_mask`, and when there is neither attention mask nor cache. Some do not hand them on (OPT,
gpt-oss), some take none (Bloom, Mamba), and recurrent layers carry their state across documents all the same (Jamba).
"""

import torch
from transformers import PreTrainedModel

from entrenar.models.forward import takes_positions

_LENGTH = 8
# Of the largest logit. Kept apart, the three agree to the bit (the same sums, zeros between); mixed, they are off by
# 1e-3 and more, in bf16 as in float32.
_TOLERANCE = 1e-4


@torch.no_grad()
def isolates_documents(model: PreTrainedModel) -> bool:
    """Whether a document gets the logits it has alone when another one stands before it in its row.

    Two random documents a, b are run once, as rows (a b) and (b b). The three b must agree: the one that stands first
    is alone, since nothing looks ahead. The model must be in evaluation mode.
    """
    if not takes_positions(model):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    a, b = torch.randint(vocabulary, (2, _LENGTH), generator=torch.Generator().manual_seed(0)).to(model.device)
    rows = torch.stack([torch.cat([a, b]), torch.cat([b, b])])
    positions = torch.arange(_LENGTH, device=model.device).repeat(2, 2)
    logits = model(input_ids=rows, position_ids=positions, use_cache=False).logits.float()
    alone, after_a, after_b = logits[1, :_LENGTH], logits[0, _LENGTH:], logits[1, _LENGTH:]
    difference = torch.maximum((after_a - alone).abs(), (after_b - alone).abs()).max()
    return bool(difference <= _TOLERANCE * alone.abs().max())
