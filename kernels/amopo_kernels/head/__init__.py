"""Log-probabilities of labels under a linear head, and their gradient, without materialising the logits.

logps           linear_logps: checks, choice of a backend
torch_slices    backend `torch`: vocabulary slices in plain torch
operators       backends `fused` and `chunked` as torch operators
passes          their order of work, forward and backward
  score_loop, logit_gradient, slice_gradients   the matmul kernels of `fused`
  chunked                                       the epilogues of `chunked` around vendor matmuls
  merge_strips, kept_probabilities              what both share; tiles: the device functions inside
  launch, problem                               launch configurations; what a call computes
"""

from .logps import linear_logps

__all__ = ["linear_logps"]
