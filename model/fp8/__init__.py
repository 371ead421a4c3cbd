"""FP8 in blocks: quantisers, the oracle of what a GPU must compute, and the linear layers made of both."""
