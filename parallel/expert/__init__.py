"""Expert parallelism: back ends of the model's token dispatcher protocol."""
