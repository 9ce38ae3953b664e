"""Random problems for the head's tests, and what to compare with."""

import torch

from amopo_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("fused", "chunked")


def problem(rows, features, vocabulary, dtype=torch.float32, scale=1.0, seed=0, bias=False, device=DEVICE):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden = (normal(rows, features) * scale).to(device, dtype).requires_grad_()
    weight = (normal(vocabulary, features) / features**0.5).to(device, dtype).requires_grad_()
    offset = normal(vocabulary).to(device, dtype).requires_grad_() if bias else None
    return hidden, weight, torch.randint(0, vocabulary, (rows,), generator=generator).to(device), offset


def in_float64(*tensors):
    return [None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors]


def relative_error(found, expected):
    return ((found.double() - expected).norm() / expected.norm().clamp(min=1e-30)).item()


def row_errors(found, expected):
    return (found.double() - expected).norm(dim=1) / expected.norm(dim=1).clamp(min=1e-30)


def exact_gradients(hidden, weight, labels, grad, bias=None, **options):
    exact = in_float64(hidden, weight, bias)
    logps = reference.linear_logps(*exact[:2], labels, exact[2], **options)
    logps.backward(grad.double())
    return logps.detach(), [x.grad for x in exact if x is not None]


def once_rounded(hidden, weight, labels, grad, bias=None, *, softcap=None, temperature=1.0):
    """(dX, dW, db) of a reference in float64 whose dS = g (1[y] - p) cap' is rounded once to the inputs' dtype."""
    x, w = hidden.detach().double(), weight.detach().double()
    z = x @ w.T if bias is None else x @ w.T + bias.detach().double()
    slope = torch.ones_like(z)
    if softcap is not None:
        slope = 1 - torch.tanh(z / softcap) ** 2
        z = softcap * torch.tanh(z / softcap)
    z = z / temperature
    at_label = z.gather(1, labels[:, None])
    others = z.scatter(1, labels[:, None], float("-inf")).logsumexp(1, keepdim=True)
    ds = -(z - torch.logaddexp(others, at_label)).exp()
    ds.scatter_(1, labels[:, None], torch.sigmoid(others - at_label))
    ds = (ds * slope * grad.double()[:, None] / temperature).to(hidden.dtype).double()
    return tuple(g.to(hidden.dtype).double() for g in (ds @ w, ds.T @ x, ds.sum(0)))
