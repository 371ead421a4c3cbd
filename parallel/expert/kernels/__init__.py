"""Work on rows within a rank, before and after they travel: Triton kernels with plain twins, chosen by name."""
