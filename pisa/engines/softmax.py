"""Plain softmax attention that also returns its log-sum-exp, and the merge of two such results. No blocks here."""

import torch
from torch import Tensor

MASKED = -1e30  # bias of a forbidden key; not -inf, so that a row without any allowed key stays finite


def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + bias) v with the fused operator of the device that returns the log-sum-exp.

    q: `[G, R, M, D]`; k, v: `[G, R, n, D]`; bias: None or fp32, one that expands to `[G, R, M, n]`.
    Returns o `[G, R, M, D]` in q's dtype and the natural log-sum-exp `[G, R, M]` fp32.
    """
    bias = bias if bias is None else bias.expand(*q.shape[:3], -1)
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=bias, scale=scale)
    if q.device.type == "cuda" and (bias is None or k.shape[2] % 8 == 0):  # the kernel wants an aligned bias
        bias = bias if bias is None else bias.to(q.dtype)
        operator = torch.ops.aten._scaled_dot_product_efficient_attention
        o, lse, *_ = operator(q, k, v, bias, compute_log_sumexp=True, scale=scale)
        return o, lse[..., : q.shape[2]]  # it pads the rows of lse
    logits = q.float() @ k.float().mT * scale
    logits = logits if bias is None else logits + bias
    lse = logits.logsumexp(-1)
    return ((logits - lse[..., None]).exp() @ v.float()).to(q.dtype), lse


def merge_(o: Tensor, lse: Tensor, other_o: Tensor, other_lse: Tensor) -> None:
    """One attention over the keys of both, in o and lse: each output weighs in with its share exp(lse) of the mass.

    other_o is fp32 and is overwritten.
    """
    o.copy_(other_o.lerp_(o.float(), torch.sigmoid(lse - other_lse)[..., None]))
    torch.logaddexp(lse, other_lse, out=lse)
