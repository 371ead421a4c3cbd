"""A whole model in one process, from a checkpoint of any layout, and its loss on held-out text."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from data.stream import TokenStream
from launcher.build import DTYPES
from launcher.checkpoint.state import Reader, find
from model.fp8.apply import apply_fp8, give_weights, weight_blocks
from model.fp8.formats import QuantisedTensor
from model.fp8.weights import no_numbers
from model.loss import head_loss
from model.transformer import Microbatch, Transformer


class InferenceError(ValueError):
    """What is asked of a model does not fit it; the message names the quantity and its limit."""

    user_error = True


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


@contextmanager
def one_thread() -> Iterator[None]:
    """No torch threads inside the block: copying thousands of tensors is bound by memory, and on busy cores every one
    of the copies would wait for a second thread (measured: 15 times as long).
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def load_model(
    checkpoint: Path, *, dtype: torch.dtype | None = None, device: torch.device | str = "cpu", ema: bool = False
) -> Transformer:
    """The whole model with the weights of a checkpoint (or the newest one of a run), ready to evaluate.

    dtype: of the weights; None: what the run trained in, with its FP8 products if it had any, computed by the oracle
    where Transformer Engine or DeepGEMM did, and by plain torch where there is no g++ (the same bits, slower). Needs
    memory for the model in FP32 and `dtype` together at worst. ema: the average of the weights in their place.
    Raises CheckpointError for a missing or damaged checkpoint, InferenceError where it holds no average.
    """
    reader = Reader(find(checkpoint))
    precision, fp8 = reader.config.train.precision, reader.config.fp8
    kind = "ema" if ema else "master"
    in_fp8, dtype = dtype is None and precision == "fp8", dtype or DTYPES[precision]
    fp8 = replace(fp8, native=fp8.native and shutil.which("g++") is not None)
    with torch.device(device):
        model = Transformer(reader.config.model)
    model.eval().requires_grad_(False)
    blocks = weight_blocks(model, fp8, device=torch.device(device)) if in_fp8 else {}
    rounded: dict[str, QuantisedTensor] = {}
    for name, weight in model.named_parameters():
        if ema and not reader.has(kind, name):
            raise InferenceError(f"{reader.path}: holds no average of the weights: train with optim.ema_decay=0.999")
        flat = torch.empty(weight.numel(), dtype=torch.float32)
        reader.read(kind, name, flat)
        wide = flat.view(weight.shape).to(weight.device)
        if name in blocks:  # as the run rounds it, from FP32 at once
            rounded[name] = blocks[name].quantise(wide)
            weight.data = no_numbers(weight, dtype)
        else:
            weight.data = wide.to(dtype)
    for block, router in model.routers().items():
        reader.read("router_bias", str(block), router.e_score_correction_bias)
    if in_fp8:
        backend = "oracle_exact" if fp8.backend == "oracle_exact" else "oracle_fast"
        apply_fp8(model, replace(fp8, backend=backend, grouped="same"), device=device)
        give_weights(model, rounded)
    return model


def device_of(model: Transformer) -> torch.device:
    """Where the model's weights are."""
    return model.rotations.device


@torch.no_grad()
def normed_states(model: Transformer, tokens_BS: Tensor) -> Tensor:
    """Main model's state after the final norm at every position: tokens [B, S] -> [B, S, D].

    Raises InferenceError for sequences longer than max_position_embeddings.
    """
    limit = model.config.max_position_embeddings
    if tokens_BS.shape[1] > limit:
        raise InferenceError(f"sequences of {tokens_BS.shape[1]} tokens: max_position_embeddings is {limit}")
    assert model.norm is not None
    # a micro-batch ends with a target that is no input
    padded = torch.nn.functional.pad(tokens_BS.to(device_of(model), torch.int64), (0, 1))
    return model.norm(model.run_layers(None, Microbatch(padded)))


@torch.no_grad()
def token_losses(model: Transformer, normed_BSD: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross entropy in nats of each target given the state at its position: FP32 [B, S]."""
    assert model.lm_head is not None
    targets_BS = targets_BS.to(device_of(model), torch.int64)
    return head_loss(normed_BSD, model.lm_head.weight, targets_BS, model.lm_head.sink)


def heldout_nats(model: Transformer, prefix: str | Path, sequence_length: int, batch_size: int) -> tuple[float, int]:
    """Mean loss in nats a predicted token over a whole set of tokens, in however many files, and their number.

    Windows follow one another and share one token, the last target of one being the first input of the next: every
    token of the set is predicted exactly once but the very first, so the number is the set's tokens less one. The
    last window may be shorter. Raises InferenceError for a window that does not fit the model, fewer than two tokens
    or an id outside the vocabulary, TokenFileError for damaged files.
    """
    stream = TokenStream(prefix)
    predicted = stream.num_tokens - 1
    if predicted < 1:
        raise InferenceError(f"{prefix}: {stream.num_tokens} tokens, a loss needs at least 2")
    vocab_size = model.config.vocab_size
    for file in stream.files:
        at = file.first_outside(vocab_size)
        if at is not None:
            where = f"{file.prefix}.bin: byte {at * file.dtype.itemsize}"
            raise InferenceError(
                f"{where}: id {int(file.tokens[at])}, the model's vocab_size is {vocab_size}: score tokens of the "
                "run's own tokenizer"
            )
    total = torch.zeros((), dtype=torch.float64)
    whole = predicted // sequence_length
    starts = [list(range(first, min(first + batch_size, whole))) for first in range(0, whole, batch_size)]
    batches = [[(i * sequence_length, sequence_length) for i in batch] for batch in starts]
    if predicted % sequence_length:
        batches.append([(whole * sequence_length, predicted % sequence_length)])
    for batch in batches:
        window = torch.empty(len(batch), batch[0][1] + 1, dtype=torch.int64)
        for row, (start, _) in zip(window, batch, strict=True):
            stream.copy(start, row.numpy())
        losses_BS = token_losses(model, normed_states(model, window[:, :-1]), window[:, 1:])
        total += losses_BS.double().sum().cpu()
    return total.item() / predicted, predicted
