"""Passes over rows of activations that no product is part of: RMSNorm, SwiGLU, cross entropy; in torch and compiled."""
