import torch


def clip_gradients(parameters, *, norm, value):
    grads = [p.grad for p in parameters if p.grad is not None]
    total = torch.nn.utils.get_total_norm(grads)
    if norm > 0:
        torch.nn.utils.clip_grads_with_norm_(parameters, norm, total)
    if value > 0:
        torch.nn.utils.clip_grad_value_(parameters, value)
    return total
