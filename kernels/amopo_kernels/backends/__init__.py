"""The ways to compute the head and the loss.

torch_slices    vocabulary slices in plain torch: any device, any dtype
head            the order of work of `fused` and `chunked`; ops makes torch operators of it
  tile_lse, dlogits, slice_gradients        the matmul kernels of `fused`
  slice_logits                              the epilogues of `chunked` around vendor matmuls
  merge_tiles, sequences, kept_probabilities  what both share; tiles: the device functions inside
  launch, problem                           launch configurations; what a call computes
"""
