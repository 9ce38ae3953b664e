"""The two orders in which statistics of pairs come, compared."""

import torch


def assert_orders_agree(function, stats, noise, K, tolerance=1e-12, **options):
    """Loss, tables and gradient of alternating statistics are those of the same statistics, stacked."""
    by_side = torch.arange(len(stats.length), device=stats.length.device).view(-1, 2).T.flatten()
    results, gradients = [], []
    for order, index in (("alternating", slice(None)), ("stacked", by_side)):
        own = stats._replace(**{name: getattr(stats, name).detach()[index] for name in stats._fields[:4]})
        own = own._replace(logp_sum=own.logp_sum.requires_grad_())
        result = function(own, order=order, num_dimensions=K, beta=0.8, gamma=1.5, noise=noise, **options)
        result.loss.backward()
        results.append([x.detach() for x in result])
        gradients.append(own.logp_sum.grad)
    torch.testing.assert_close(*results, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(gradients[0][by_side], gradients[1], rtol=tolerance, atol=tolerance)
