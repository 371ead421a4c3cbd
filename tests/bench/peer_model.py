"""The recipe around transformers' DeepseekV3ForCausalLM: what its code leaves to a trainer, written outside of it.

Theirs, unchanged: embedding, attention, router, experts, norms, head, and the decoder layer inside the MTP module.
Written here: MTP (report eq. 21-25, embedding first), the sequence-wise balance loss, the update of the router's biases
and the losses' weights. Initial weights are copied from ours, so both sides begin with the same model.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from launcher.config import RunConfig
from model.config import ModelConfig
from model.convert import published_tensors
from model.init import initialise
from model.transformer import Microbatch, Transformer
from optim.router_bias import load_violation, update_bias
from tests.model.reference import reference_model, reference_parameters, tensors


@dataclass(frozen=True)
class PeerLoss:
    """loss: weighted, to differentiate; main and mtp: plain means in nats a position, mtp None without the module."""

    loss: Tensor
    main: float
    mtp: float | None


class PeerMTP(nn.Module):
    """One depth of multi-token prediction, of transformers' layer and norms."""

    def __init__(self, config: Any, ours: ModelConfig) -> None:
        from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3DecoderLayer, DeepseekV3RMSNorm

        super().__init__()
        self.ours = ours
        size, eps = config.hidden_size, config.rms_norm_eps
        self.enorm, self.hnorm = DeepseekV3RMSNorm(size, eps=eps), DeepseekV3RMSNorm(size, eps=eps)
        self.eh_proj = nn.Linear(2 * size, size, bias=False)
        self.block = DeepseekV3DecoderLayer(config, config.num_hidden_layers)
        self.norm = DeepseekV3RMSNorm(size, eps=eps)

    def published(self) -> dict[str, Tensor]:
        """Parameters and biases by the names that the published checkpoint has after `model.layers.N.`."""
        own = {"enorm.weight": self.enorm, "hnorm.weight": self.hnorm, "eh_proj.weight": self.eh_proj}
        own["shared_head.norm.weight"] = self.norm
        return {name: part.weight for name, part in own.items()} | reference_parameters(self.block, self.ours)


class Peer(nn.Module):
    """Model, losses and biases of one run. implementation: of transformers' experts; autocast: products in BF16."""

    def __init__(self, config: RunConfig, *, implementation: str = "eager", autocast: bool = False) -> None:
        super().__init__()
        c = self.run = config
        assert c.model.num_nextn_predict_layers <= 1 and c.model.mtp_hidden == "after_norm", "MTP of depth 0 or 1 only"
        ours = Transformer(c.model)
        initialise(ours, std=c.model.initializer_range, seed=c.train.seed)
        # without a padding row: theirs would keep its gradient at 0
        self.model = reference_model(ours, experts_implementation=implementation, pad_token_id=None)
        self.mtp = self._mtp_of(ours) if c.model.num_nextn_predict_layers else None
        self._autocast = autocast
        self.counts: dict[int, Tensor] = {}
        self._balance: list[Tensor] = []
        self._num_sequences = 1
        for number, gate in enumerate(self.gates()):
            self.counts[number] = torch.zeros(c.model.n_routed_experts, dtype=torch.int64)
            gate.register_forward_hook(lambda _, __, out, number=number: self._routed(number, out))
            # autocast would compute the router's logits in BF16, which its own code means to be FP32
            gate.forward = torch.autocast("cpu", enabled=False)(gate.forward)

    def gates(self) -> Iterator[Any]:
        """The routers of the main layers, then the MTP module's."""
        for module in self.modules():
            if type(module).__name__ == "DeepseekV3TopkRouter":
                yield module

    def _mtp_of(self, ours: Transformer) -> PeerMTP:
        made = PeerMTP(self.model.config, ours.config)
        mapped, sources = made.published(), tensors(ours)
        stem = f"model.layers.{ours.config.num_hidden_layers}."
        copied = set()
        with torch.no_grad():
            for published in published_tensors(ours.config):
                name = published.name.removeprefix(stem)
                if published.name.startswith(stem) and name in mapped:
                    target = mapped[name]
                    flat = sources[published.ours].flatten()[published.offset : published.offset + target.numel()]
                    target.copy_(flat.view(published.shape))
                    copied.add(name)
        assert copied == set(mapped), sorted(set(mapped) - copied)
        return made

    def _routed(self, number: int, out: tuple[Tensor, Tensor, Tensor]) -> None:
        """Counts of an expert's tokens and the sequence-wise balance loss (report eq. 17-20)."""
        if not self.training:
            return
        logits_TE, _, ids_TK = out
        c, num = self.run.model, self._num_sequences
        self.counts[number] += torch.bincount(ids_TK.flatten(), minlength=c.n_routed_experts)
        chosen_BE = F.one_hot(ids_TK, c.n_routed_experts).sum(1).unflatten(0, (num, -1)).sum(1)
        length = logits_TE.shape[0] // num
        fraction_BE = chosen_BE * (c.n_routed_experts / (c.num_experts_per_tok * length))
        scores_TE = logits_TE.sigmoid()
        share_BE = (scores_TE / (scores_TE.sum(1, keepdim=True) + 1e-20)).unflatten(0, (num, -1)).mean(1)
        self._balance.append(c.aux_loss_alpha * (fraction_BE * share_BE).sum(1).mean())

    def _states(self, inputs_BS: Tensor) -> Tensor:
        return self.model.model(input_ids=inputs_BS, use_cache=False).last_hidden_state

    def _mtp_states(self, next_BS: Tensor, states_BSD: Tensor) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        assert self.mtp is not None
        inner, embedded = self.model.model, self.model.model.embed_tokens(next_BS)
        h_BSD = self.mtp.eh_proj(torch.cat([self.mtp.enorm(embedded), self.mtp.hnorm(states_BSD)], dim=-1))
        positions = torch.arange(next_BS.shape[1])[None]
        mask = create_causal_mask(
            config=self.model.config, inputs_embeds=h_BSD, attention_mask=None, past_key_values=None,
            position_ids=positions,
        )  # fmt: skip
        turns = inner.rotary_emb(h_BSD, positions)
        h_BSD = self.mtp.block(h_BSD, attention_mask=mask, position_ids=positions, position_embeddings=turns)
        return self.mtp.norm(h_BSD)

    def losses(self, batch: Microbatch) -> PeerLoss:
        """Of tokens [B, S + 1], weighted as ours are: share * (main + lambda * MTP + balance losses)."""
        tokens = batch.tokens
        self._num_sequences, self._balance = len(tokens), []
        with torch.autocast("cpu", torch.bfloat16) if self._autocast else nullcontext():
            states_BSD = self._states(tokens[:, :-1])
            main = F.cross_entropy(self.model.lm_head(states_BSD).float().flatten(0, 1), tokens[:, 1:].flatten())
            total, mtp = main, None
            if self.mtp is not None:
                ahead_BSD = self._mtp_states(tokens[:, 1:], states_BSD)
                logits_BSV = self.model.lm_head(ahead_BSD)[:, :-1].float()
                # mean over all positions, the last of which has no target (report eq. 24)
                valid = (tokens.shape[1] - 2) / (tokens.shape[1] - 1)
                mtp = F.cross_entropy(logits_BSV.flatten(0, 1), tokens[:, 2:].flatten()) * valid
                total = total + batch.mtp_lambda * mtp
        if self.run.model.aux_loss_alpha:
            total = total + torch.stack(self._balance).sum()
        return PeerLoss(total * batch.share, main.item(), None if mtp is None else mtp.item())

    @torch.no_grad()
    def token_losses(self, windows: Tensor) -> Tensor:
        """Main model's cross entropy at every position of tokens [B, S + 1]: FP32 [B, S]."""
        with torch.autocast("cpu", torch.bfloat16) if self._autocast else nullcontext():
            logits_BSV = self.model.lm_head(self._states(windows[:, :-1])).float()
        return F.cross_entropy(logits_BSV.transpose(1, 2), windows[:, 1:], reduction="none")

    def balance_experts(self, speed: float) -> list[float]:
        """Updates every bias from the step's counts and forgets them; largest over mean load by layer, before it."""
        loads = []
        for number, gate in enumerate(self.gates()):
            loads.append(load_violation(self.counts[number]))
            update_bias(gate.e_score_correction_bias, self.counts[number], speed)
            self.counts[number].zero_()
        return loads
