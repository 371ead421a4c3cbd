"""What a kernel that is asked for and not there raises."""


class MissingKernel(ValueError):
    """A fused optimizer was asked for that this machine does not have, or that cannot work on these tensors."""

    user_error = True
