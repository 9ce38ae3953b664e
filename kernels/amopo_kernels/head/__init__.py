"""Log-probabilities of labels under a linear head, and their gradient, without materialising the logits.

logps, validation, options     linear_logps: checks, and what a call computes and how, decided once
torch_slices                   backend `torch`: vocabulary slices in plain torch
kept_scores                    what it keeps of its forward on a CPU, in the memory of the gradient of weight
operators                      backends `fused` and `chunked` as torch operators
passes, layout                 their order of work, forward and backward, and how they cut the vocabulary
engines                        the kernels of each:
  score_loop, slice_gradients  `fused`: the loop over tiles of scores, and the two matmuls of the backward
  chunked                      `chunked`: vendor matmuls, and the epilogue of a slice of logits
  log_sum_exp, logit_gradient  the epilogues of both, forward and backward
  merge_strips                 the end of the forward of both
  kept_probabilities           cached probabilities, and the frozen head's
problem, launch, tiles         what a call computes, as kernels take it; launch configurations; device functions
"""

from .logps import linear_logps

__all__ = ["linear_logps"]
