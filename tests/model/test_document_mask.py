"""A packed sequence with a document mask is each of its documents alone; positions need not be counted anew."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from model.attention import documents_of
from model.config import ModelConfig
from model.transformer import Microbatch, Transformer
from model.weight_grad import main_grad
from tests.model.reference import TINY, YARN, build

LENGTHS = (9, 1, 30, 17)
DEEP = replace(TINY, num_nextn_predict_layers=2, aux_loss_alpha=0.0)


def window(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """One packed sequence [1, S + 1], and the document of each of its tokens; the target belongs to the last one."""
    lengths = [*LENGTHS[:-1], LENGTHS[-1] + 1]
    tokens = torch.randint(0, config.vocab_size, (1, sum(lengths)), generator=torch.Generator().manual_seed(1))
    return tokens, torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]


def hidden(model: Transformer, tokens: Tensor, ids: Tensor | None = None) -> Tensor:
    """The state that the head reads, without the window's last token, which is a target only."""
    documents = None if ids is None else documents_of(ids[:, :-1])
    assert model.norm is not None and model.lm_head is not None
    with torch.no_grad():
        return model.lm_head(model.norm(model.run_layers(None, Microbatch(tokens, documents=documents))))


@pytest.mark.parametrize("config", [TINY, YARN])
def test_logits_of_a_packed_sequence_are_each_documents_alone(config: ModelConfig) -> None:
    model = build(config).eval()
    tokens, ids = window(config)
    together = hidden(model, tokens, ids)[0]
    parts, begin = [], 0
    for length in LENGTHS:
        parts.append(hidden(model, tokens[:, begin : begin + length + 1])[0])
        begin += length
    alone = torch.cat(parts)
    assert (together - alone).abs().max() <= 2e-5
    assert (hidden(model, tokens)[0] - alone).abs().max() > 0.01  # without the mask it is another model


def test_gradients_are_the_sum_of_each_documents_alone() -> None:
    """Over the targets that lie in the document of the position; the others are masked here for the comparison."""
    config = replace(TINY, num_nextn_predict_layers=0, aux_loss_alpha=0.0)
    tokens, ids = window(config)
    grads = []
    for packed in (True, False):
        model = build(config)
        if packed:
            documents = documents_of(ids[:, :-1])
            cut = torch.where(ids[:, 1:] == ids[:, :-1], tokens[:, 1:], -1)
            _loss(model, tokens[:, :-1], cut, documents).backward()
        else:
            begin = 0
            for length in LENGTHS:
                part = tokens[:, begin : begin + length]
                targets = torch.cat([part[:, 1:], tokens[:, begin + length :][:, :1]], dim=1)
                if begin + length < sum(LENGTHS):
                    targets[:, -1] = -1
                _loss(model, part, targets, None).backward()
                begin += length
        grads.append({name: main_grad(weight) for name, weight in model.named_parameters()})
    for name, grad in grads[0].items():
        assert (grad - grads[1][name]).norm() <= 2e-5 * grads[1][name].norm().clamp(min=1e-6), name


def _loss(model: Transformer, inputs: Tensor, targets: Tensor, documents: object) -> Tensor:
    from model.loss import head_loss

    assert model.norm is not None and model.lm_head is not None
    padded = torch.nn.functional.pad(inputs, (0, 1))
    states = model.norm(model.run_layers(None, Microbatch(padded, documents=documents)))  # type: ignore[arg-type]
    return head_loss(states, model.lm_head.weight, targets, model.lm_head.sink).sum()


def test_mtp_predicts_inside_a_document_from_that_document_alone() -> None:
    """Depth k reads k tokens ahead: a prediction whose target is in the position's document sees nothing else."""
    model, found = build(DEEP).eval(), []
    tokens, ids = window(DEEP)
    for change in (False, True):
        changed = tokens.clone()
        if change:  # every document but the third is another text
            other = ids != 2
            changed[other] = (changed[other] + 7) % DEEP.vocab_size
        found.append(_losses(model, changed, ids))
    first, end = sum(LENGTHS[:2]), sum(LENGTHS[:3])
    for depth, (before, after) in enumerate(zip(*found, strict=True)):
        inside = slice(first, end - depth - 1)  # the target of the last of these is the document's last token
        assert torch.allclose(before[0, inside], after[0, inside], atol=2e-5), depth
        assert not torch.allclose(before[0, :first], after[0, :first], atol=1e-2)


def _losses(model: Transformer, tokens: Tensor, ids: Tensor) -> list[Tensor]:
    """Loss of every position, of the main model and of each MTP depth."""
    from model import transformer

    seen: list[Tensor] = []
    plain = transformer.head_loss

    def spy(*args: object) -> Tensor:
        seen.append(plain(*args))  # type: ignore[arg-type]
        return seen[-1]

    transformer.head_loss = spy
    try:
        with torch.no_grad():
            model(None, Microbatch(tokens, documents=documents_of(ids[:, :-1])))
    finally:
        transformer.head_loss = plain
    return seen
