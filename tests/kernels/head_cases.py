"""Random problems for the head's tests, and what to compare with."""

import torch

from amopo_kernels import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKENDS = ("fused", "chunked")
ALL_BACKENDS = ("torch", "fused", "chunked")


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
