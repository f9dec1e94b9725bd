"""Find the first part of a model whose values or gradients are not finite."""

import torch


def first_not_finite(model, tokens, targets):
    """Run a batch again and name the first module that gives something not finite.

    Args:
        model: `moba_lab.model.Model`; its gradients are lost.
        tokens: (B, S) int64.
        targets: (B, S) int64.

    Returns:
        such as "values of layers.2.mlp.down", in the order of the forward pass; where
        all values are finite, "gradients of ..." in the order of the backward pass.
    """
    found, hooks = {}, []
    for name, module in model.named_modules():
        if not any(module.children()):
            hooks.append(module.register_forward_hook(watch(found, name)))
    try:
        model.zero_grad(set_to_none=True)
        loss = model.losses(tokens, targets).sum()
        if "values" not in found and bool(torch.isfinite(loss)):
            loss.backward()
    finally:
        for hook in hooks:
            hook.remove()
        model.zero_grad(set_to_none=True)
    for kind in ("values", "gradients"):
        if kind in found:
            return f"{kind} of {found[kind]}"
    return "values of the loss" if not torch.isfinite(loss) else "nothing, run again"


def watch(found, name):
    """Return a hook that notes the first module to give something not finite."""

    def note(kind, tensor):
        if kind not in found and not torch.isfinite(tensor).all():
            found[kind] = name

    def hook(module, inputs, output):
        note("values", output.detach())
        if output.requires_grad:
            output.register_hook(lambda gradient: note("gradients", gradient))

    return hook
