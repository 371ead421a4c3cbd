"""`expertpipe generate`: a checkpoint continues a prompt. A look at what was learnt, not a serving engine."""

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from data.tokenizer_file import load_tokenizer
from data.tokenizer_training import END_OF_SENTENCE, SPECIAL_TOKENS
from launcher.checkpoint.state import TOKENIZER, find
from launcher.inference import InferenceError, default_device, load_model, normed_states
from model.transformer import Transformer

if TYPE_CHECKING:
    from tokenizers import Tokenizer


def generate(*, checkpoint: Path, prompt: str, max_new_tokens: int, temperature: float, seed: int) -> int:
    """Print the continuation of a prompt, with the tokenizer that lies in the checkpoint's folder; the exit code.

    Raises InferenceError where the folder has no tokenizer or an argument is out of range, CheckpointError for a bad
    checkpoint.
    """
    found = find(checkpoint)
    path = found / TOKENIZER
    if not path.is_file():
        raise InferenceError(f"{path}: no such file; copy the tokenizer of the model's data there")
    model = load_model(found, device=default_device())
    tokenizer = load_tokenizer(path)
    text = sample(model, tokenizer, prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    print(text)
    return 0


def sample(
    model: Transformer,
    tokenizer: "Tokenizer",
    prompt: str,
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """The continuation alone, until the document ends or max_new_tokens are there.

    temperature: 0 takes the likeliest token each time. Every token recomputes the whole text (there is no key-value
    cache): fine for samples of a few hundred tokens. Of a text longer than max_position_embeddings the model sees the
    end. Raises InferenceError for arguments out of range and a tokenizer with more tokens than the model.
    """
    if max_new_tokens < 1 or not 0 <= temperature < float("inf"):
        raise InferenceError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}: use 1 or more, and 0 or more"
        )
    vocab_size = tokenizer.get_vocab_size()
    if vocab_size > model.config.vocab_size:
        raise InferenceError(
            f"the tokenizer has {vocab_size} tokens, the model {model.config.vocab_size}: it is another model's"
        )
    ids = tokenizer.encode(prompt, add_special_tokens=False).ids
    end = tokenizer.token_to_id(SPECIAL_TOKENS[END_OF_SENTENCE])
    if end is not None:
        ids = [end, *ids]  # as in the training data, where a document follows the end of another
    if not ids:
        raise InferenceError("the prompt is empty and the tokenizer has no end-of-sentence token: give a prompt")
    generator, start = torch.Generator().manual_seed(seed), len(ids)
    while len(ids) < start + max_new_tokens:
        window = torch.tensor([ids[-model.config.max_position_embeddings :]])
        chosen = _choose(_last_logits(model, window)[:vocab_size], temperature, generator)
        if chosen == end:
            break
        ids.append(chosen)
    return tokenizer.decode(ids[start:], skip_special_tokens=False)


@torch.no_grad()
def _last_logits(model: Transformer, tokens_1S: Tensor) -> Tensor:
    """FP32 logits [vocab] of the token after the last, on the CPU."""
    assert model.lm_head is not None
    return model.lm_head(normed_states(model, tokens_1S)[0, -1:])[0].float().cpu()


def _choose(logits_V: Tensor, temperature: float, generator: torch.Generator) -> int:
    if temperature == 0:
        return int(logits_V.argmax())
    probabilities = torch.softmax(logits_V.double() / temperature, dim=-1)
    return int(torch.multinomial(probabilities, 1, generator=generator))
