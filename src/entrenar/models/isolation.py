"""Whether a model keeps documents that share a row apart, and branches. Tried, not looked up in a list of names.

transformers makes its masks block-diagonal where positions restart, in architectures that hand them to
`masking_utils.create_causal_mask`, and when there is neither attention mask nor cache. Some do not hand them on (OPT,
gpt-oss), some take none (Bloom, Mamba), and recurrent layers carry their state across documents all the same (Jamba).
"""

import logging

import torch
from transformers import PreTrainedModel

from entrenar.models.forward import model_inputs, takes_positions

_LOG = logging.getLogger(__name__)
_LENGTH = 8
# Tokens of a trunk and of a branch, and how many they share.
_TRUNK, _BRANCH, _SHARED = 10, 5, 6
# Of the largest logit. Kept apart, the three agree to the bit (the same sums, zeros between); mixed, they are off by
# 1e-3 and more, in bf16 as in float32.
_TOLERANCE = 1e-4
# Of a branch, which is summed in other places of a longer row: what its dtype rounds.
_ROUNDINGS = {torch.bfloat16: 3e-2, torch.float16: 4e-3}


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


@torch.no_grad()
def isolates_branches(model: PreTrainedModel) -> bool:
    """Whether a branch of a tree (models/branches.py) gets the logits that its tokens have after what they follow
    alone, and the trunk those that it has alone. The model must be in evaluation mode."""
    if not takes_positions(model):
        return False
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    trunk, branch = (torch.randint(vocabulary, (count,), generator=generator) for count in (_TRUNK, _BRANCH))
    path = torch.cat([trunk[:_SHARED], branch])
    tree = torch.cat([trunk, path[_SHARED - 1 :]])[None]
    positions = torch.cat([torch.arange(_TRUNK), torch.arange(_SHARED - 1, len(path))])[None]
    try:
        together = model(**model_inputs(model, tree, positions)).logits[0].float()
        alone = model(**model_inputs(model, path[None], torch.arange(len(path))[None])).logits[0].float()
        plain = model(**model_inputs(model, trunk[None], torch.arange(_TRUNK)[None])).logits[0].float()
    except Exception as error:  # whatever a model says of a mask that it does not take
        _LOG.info("%s takes no mask of branches: %s", type(model).__name__, error)
        return False
    difference = torch.maximum(
        (together[:_TRUNK] - plain).abs().max(), (together[_TRUNK + 1 :] - alone[_SHARED:]).abs().max()
    )
    return bool(difference <= _ROUNDINGS.get(model.dtype, _TOLERANCE) * plain.abs().max())
