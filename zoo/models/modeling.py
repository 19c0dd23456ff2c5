"""The model as transformers knows it: PreTrainedModel, generate(), save_pretrained and the Auto classes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.generation.utils import GenerationMode
from transformers.utils import ModelOutput

from zoo.blocks import RouterStatistics, SequenceContext
from zoo.blocks.linear import Embedding, Linear
from zoo.blocks.moe import RouterConfig
from zoo.blocks.norm import Norm
from zoo.blocks.rope import RotaryEmbedding
from zoo.config import Layer, ZooConfig
from zoo.models.cache import ZooCache
from zoo.models.decoder import Block, build_layer
from zoo.models.landmarks import LandmarkToken, take_out
from zoo.models.loss import IGNORE_INDEX, linear_cross_entropy, router_loss


@dataclass
class ZooModelOutput(ModelOutput):
    """What the decoder returns. `hidden_states` is the embedding and every layer's output, the last one normalised."""

    last_hidden_state: Tensor | None = None
    past_key_values: ZooCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    router_statistics: tuple[RouterStatistics | None, ...] | None = None


@dataclass
class ZooCausalLMOutput(ModelOutput):
    """What the language model returns.

    loss           cross entropy plus the routers' weighted losses.
    cross_entropy  the part that is about tokens, in nats per token.
    aux_loss       the routers' part; None without routers.
    logits         `[batch, length, vocab]`; None while training with labels, where they are never formed.
    expert_loads   while training, of each layer whose router has a correction_rate, how many tokens every expert got;
                   for `correct_routers`. None for the other layers, and where there is no such layer.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: ZooCache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    cross_entropy: Tensor | None = None
    aux_loss: Tensor | None = None
    expert_loads: tuple[Tensor | None, ...] | None = None


def _router_config(layer: Layer) -> RouterConfig | None:
    """What the layer's feed-forward says of its router, if it does: a registered kind need not."""
    router = getattr(layer.ffn.config, "router", None)
    return router if isinstance(router, RouterConfig) else None


class ZooPreTrainedModel(PreTrainedModel):
    config_class = ZooConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["DecoderLayer", "SharedLayer", "Block"]
    _keep_in_fp32_modules_strict = ["A_log", "D", "dt_bias", "correction_bias", "a_param"]
    _supports_sdpa = True
    _is_stateful = True  # assisted generation needs a cache that can forget, and is refused

    def _init_weights(self, module: nn.Module) -> None:
        # Every module of ours that owns parameters or buffers can fill them; transformers' initialisers inside leave
        # alone what a checkpoint has already loaded.
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()


class ZooModel(ZooPreTrainedModel):
    """Token embedding, the pattern's layers, a final norm."""

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, std=config.initializer_range)
        block_size = config.landmark_block
        self.landmark = (
            None if block_size is None else LandmarkToken(config.hidden_size, block_size, config.initializer_range)
        )
        blocks: dict[str, Block] = {}
        self.layers = nn.ModuleList(build_layer(layer, config, i, blocks) for i, layer in enumerate(config.layers))
        self.shared = nn.ModuleList(blocks.values())  # in the order of their first use
        self.norm = Norm(config.hidden_size, config.norm_config)
        # The lengths beyond which all tokens of a sequence turn otherwise (LongRoPE).
        rotaries = [module for module in self.modules() if isinstance(module, RotaryEmbedding)]
        self.switches = sorted({rotary.switch for rotary in rotaries if rotary.switch is not None})
        self.reads_token_ids = any(layer.mixer is not None and layer.mixer.reads_token_ids for layer in self.layers)
        self.gradient_checkpointing = False
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> ZooModelOutput:
        """See ZooForCausalLM.forward."""
        if self.reads_token_ids:
            if input_ids is None:
                raise ValueError(
                    "global_token_ids needs the ids of the tokens; give input_ids, beside inputs_embeds too"
                )
        elif (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        batch, length = x.shape[:2]
        if past_key_values is None and use_cache:
            past_key_values = self.new_cache(batch, x.device, x.dtype)
        if past_key_values is not None and cu_seqlens is not None:
            raise ValueError("packed documents (cu_seqlens) and a cache do not go together; pass use_cache=False")
        if past_key_values is not None and self.gradient_checkpointing and self.training:
            raise ValueError("gradient checkpointing would run the cache's states twice; pass use_cache=False")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        if past_key_values is not None and len(past_key_values.seen) != batch:
            raise ValueError(f"the cache holds {len(past_key_values.seen)} rows, the input {batch}")
        if attention_mask is not None and attention_mask.shape not in ((batch, length), (batch, past + length)):
            got = list(attention_mask.shape)
            raise ValueError(
                f"attention_mask must be {[batch, length]}, or {[batch, past + length]} with the past, got {got}"
            )
        if past_key_values is not None and self.outgrown(past_key_values, attention_mask, length):
            raise ValueError(
                f"the cache was begun within {self.switches[0]} tokens, beyond which LongRoPE turns all of them "
                "otherwise; give the whole sequence, and no cache"
            )
        seen = None if past_key_values is None else past_key_values.seen
        context = SequenceContext.of(
            x,
            position_ids=position_ids,
            # transformers passes the mask of the whole sequence; the states remember the part that is past.
            padding_mask=None if attention_mask is None else attention_mask[:, -length:],
            cu_seqlens=cu_seqlens,
            seen=seen,
            token_ids=input_ids,
        )
        mask, columns = context.padding_mask, None
        if self.landmark is not None:
            x, context, columns = self.landmark.put_in(x, context, seen)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        states = [None] * len(self.layers) if past_key_values is None else past_key_values.layers
        hidden_states, statistics = [x], []
        embeddings = earlier = x
        for layer, state in zip(self.layers, states, strict=True):
            reads_embeddings = layer.mixer is not None and layer.mixer.reads_embeddings
            given = (embeddings if reads_embeddings else None, earlier if layer.residual.needs_earlier else None)
            earlier, (x, *router) = x, layer(x, context, state, *given)
            statistics.append(RouterStatistics(*router) if router else None)
            if output_hidden_states:
                hidden_states.append(x)
        x = self.norm(x)
        if past_key_values is not None:
            past_key_values.advance(length if mask is None else mask.sum(1), length)
        every = (*hidden_states[:-1], x) if output_hidden_states else (x,)
        if columns is not None:
            every = tuple(take_out(each, columns) for each in every)
        return ZooModelOutput(
            last_hidden_state=every[-1],
            past_key_values=past_key_values,
            hidden_states=every if output_hidden_states else None,
            router_statistics=tuple(statistics),
        )

    def outgrown(self, cache: ZooCache, attention_mask: Tensor | None, length: int) -> bool:
        """Whether a row of `cache`, `length` tokens on, is longer than what its states were made for."""
        new = length if attention_mask is None else attention_mask[:, -length:].sum(1)
        # A first token stands at position 0, which never turns.
        before, after = cache.seen, cache.seen + new
        if self.landmark is not None:
            before, after = self.landmark.in_stream(before), self.landmark.in_stream(after)
        crosses = [(cache.seen > 1) & (before <= switch) & (after > switch) for switch in self.switches]
        return any(bool(each.any()) for each in crosses)

    def new_cache(self, batch_size: int, device: torch.device | str, dtype: torch.dtype) -> ZooCache:
        """The states before the first token; keys and values in `dtype`."""
        device = torch.device(device)
        states = [layer.mixer and layer.mixer.new_state(batch_size, device, dtype) for layer in self.layers]
        return ZooCache(states, batch_size, device)


class ZooForCausalLM(ZooPreTrainedModel, GenerationMixin):
    """A hybrid language model."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: ZooConfig) -> None:
        super().__init__(config)
        self.model = ZooModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, std=config.initializer_range)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ZooCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        cu_seqlens: Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: Tensor | int | None = None,
        logits_to_keep: int = 0,
        return_dict: bool | None = None,
    ) -> ZooCausalLMOutput | tuple:
        """One forward pass.

        Args:
            input_ids: `[batch, length]` int64; or `inputs_embeds` `[batch, length, hidden]`, as `model.embed_tokens`
                returns them. A model with global_token_ids needs the ids beside the embeddings.
            attention_mask: `[batch, length]` (or with the past's columns before it), nonzero at real tokens.
            position_ids: `[batch, length]`; by default counted over real tokens, on from the cache.
            past_key_values: a cache to continue from; it is updated in place.
            labels: `[batch, length]`, the input ids themselves: position t is scored on label t+1; -100 is ignored.
            use_cache: make a cache if none is given.
            cu_seqlens: int32 `[documents + 1]`: documents packed into one row (batch 1).
            num_items_in_batch: divide the summed cross entropy by this instead of by the number of labels.
            logits_to_keep: only the last so many positions' logits; 0 is all.

        Raises:
            ValueError: arguments that exclude each other, or whose shapes do not fit.
        """
        output = self.model(
            input_ids,
            attention_mask,
            position_ids,
            past_key_values,
            inputs_embeds,
            use_cache,
            cu_seqlens,
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        )
        hidden, softcap = output.last_hidden_state, self.config.logit_softcap
        if self.config.logit_scale != 1:
            hidden = hidden * self.config.logit_scale
        loss = cross_entropy = aux_loss = logits = None
        if labels is not None:
            targets = labels[:, 1:].flatten()
            items = (targets != IGNORE_INDEX).sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            flat = hidden[:, :-1].flatten(0, 1)
            cross_entropy = linear_cross_entropy(flat, self.lm_head.weight, targets, softcap) / items
            aux_loss = self._router_loss(output.router_statistics)
            loss = cross_entropy if aux_loss is None else cross_entropy + aux_loss
        if labels is None or not self.training:
            logits = self.lm_head(hidden[:, -logits_to_keep:])
            if softcap is not None:
                logits = softcap * torch.tanh(logits / softcap)
        result = ZooCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            cross_entropy=cross_entropy,
            aux_loss=aux_loss,
            expert_loads=self._expert_loads(output.router_statistics) if self.training else None,
        )
        return result.to_tuple() if return_dict is False else result

    def _router_loss(self, statistics: Iterable[RouterStatistics | None]) -> Tensor | None:
        layers = zip(self.config.layers, statistics, strict=True)
        return router_loss(
            [(layer.ffn.config, router) for layer, router in layers if router is not None and _router_config(layer)]
        )

    def _expert_loads(self, statistics: Iterable[RouterStatistics | None]) -> tuple[Tensor | None, ...] | None:
        layers = zip(self.config.layers, statistics, strict=True)
        loads = tuple(
            router.assignments if router is not None and (c := _router_config(layer)) and c.correction_rate else None
            for layer, router in layers
        )
        return loads if any(load is not None for load in loads) else None

    def correct_routers(self, loads: Iterable[Tensor | None]) -> None:
        """After a training step, move the routers' correction biases by its `expert_loads`, summed over batches and
        ranks (train.py does)."""
        totals: dict[nn.Module, Tensor] = {}  # layers may share a router
        for layer, load in zip(self.model.layers, loads, strict=True):
            if load is not None:
                router = layer.ffn.router
                totals[router] = totals[router] + load if router in totals else load
        for router, load in totals.items():
            router.correct(load)

    def num_params(self) -> int:
        """Parameters, a tied head counted once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def num_active_params(self) -> int:
        """Parameters one token passes through; less than num_params only with experts."""
        ffns = {layer.ffn for layer in self.model.layers if layer.ffn is not None}  # a shared one once
        return self.num_params() - sum(ffn.num_params() - ffn.num_active_params() for ffn in ffns)

    def flops(self, batch: int, length: int) -> int:
        """Matrix-multiply FLOPs of one forward pass with logits; a training step takes three times as many."""
        head = 2 * batch * length * self.lm_head.weight.numel()
        length = self.config.stream_length(length)
        return head + sum(layer.flops(batch, length) for layer in self.model.layers)

    def state_bytes(self, batch: int, length: int) -> int:
        """Bytes of the cache after `length` tokens."""
        length = self.config.stream_length(length)
        mixers = [layer.mixer for layer in self.model.layers if layer.mixer is not None]
        return sum(mixer.state_bytes(batch, length) for mixer in mixers)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # generate() must not make a key/value cache; see _prepare_cache_for_generation

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: ZooCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        # A cache that LongRoPE has outgrown is made anew, of all tokens.
        if past_key_values is not None:
            past = past_key_values.get_seq_length()
            if inputs_embeds is None:
                length = input_ids.shape[1] - past
            else:  # the prompt; input_ids ends with what came after it
                length = inputs_embeds.shape[1] - past if is_first_iteration else 1
            if length > 0 and self.model.outgrown(past_key_values, attention_mask, length):
                past_key_values.reset()
                next_sequence_length = None
                if inputs_embeds is not None and not is_first_iteration:
                    added = input_ids[:, inputs_embeds.shape[1] - past - length :]
                    inputs_embeds = torch.cat([inputs_embeds, self.model.embed_tokens(added)], 1)
                    is_first_iteration = True  # transformers gives embeddings then alone
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length,
            past_key_values,
            attention_mask,
            inputs_embeds,
            is_first_iteration,
            **kwargs,
        )

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict,
        generation_mode: GenerationMode,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        if generation_config.cache_implementation not in (None, "dynamic"):
            raise ValueError(
                f"cache_implementation={generation_config.cache_implementation!r} is not available: "
                "a hybrid model keeps one state per layer; leave it out"
            )
        if generation_config.prefill_chunk_size is not None and self.model.switches:
            length, limit = int(model_kwargs["position_ids"].max()) + 1, self.model.switches[0]
            chunk = generation_config.prefill_chunk_size
            if length > chunk and self.config.stream_length(length) > limit:
                raise ValueError(
                    f"prefill_chunk_size={generation_config.prefill_chunk_size} is not available for a prompt of "
                    f"{length} tokens: LongRoPE turns all tokens otherwise where there are more than {limit}, and the "
                    "first chunk does not know it; leave it out"
                )
        if model_kwargs.get("past_key_values") is None and generation_config.use_cache:
            rows = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            model_kwargs["past_key_values"] = self.model.new_cache(rows, self.device, self.dtype)


AutoConfig.register("zoo", ZooConfig)
AutoModel.register(ZooConfig, ZooModel)
AutoModelForCausalLM.register(ZooConfig, ZooForCausalLM)
