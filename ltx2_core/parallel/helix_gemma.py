"""Gemma 3 generation over several ranks: transformers' model and ``generate`` as they are, attention and weights shared.

``share_model`` puts three things around a finished model. Attention and masks go in through transformers' registries, the
cache through its cache interface, and what acts on tokens alone through the modules that do it and hooks on their inputs.
Every rank runs the same calls on the same tokens and gets the same scores. The registries belong to the process: this is
for worker processes, not for one that runs other models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.cache_utils import Cache
from transformers.masking_utils import sdpa_mask

from .helix import OwnerMap, merge_over_heads, partial_attention
from .helix_cache import OwnedKeys
from .helix_rows import Rows
from .helix_topology import Decoder, Ranks, Shares, check

NAME = "ltx2_helix"
# What the feed-forward is split by. auto: by tokens where a call has several per sequence, which halves the traffic and
# is bound by arithmetic; by weights for single tokens, which are bound by reading them
Split = Literal["auto", "weights", "tokens"]
# the weight [out, in] of a linear layer, which may be packed
WeightOf = Callable[[Any], Tensor]


def weight_of(linear: Any) -> Tensor:
    """That of a plain linear layer."""
    return linear.weight.detach()


class SharedModel:
    """A model whose weights ``share_model`` has shared, and what its calls on this rank have in common."""

    def __init__(self, model: Any, ranks: Ranks, split: Split, block: int, weights: _Weights) -> None:
        self.model, self.ranks, self.split, self.weights = model, ranks, split, weights
        self.owners = OwnerMap(ranks.context.rank, ranks.context.size, block)
        self.call = _Call()

    def new_cache(self) -> Cache:
        """An empty cache for ``generate(past_key_values=...)`` or a call of the model, for new sequences."""
        attentions = [layer.self_attn for layer in self.model.get_decoder().layers]
        return Cache(layers=[OwnedKeys(self.owners, attention.sliding_window) for attention in attentions])

    def forget(self) -> None:
        """Let go of the model: it knows this object too, and both would live until the collector comes."""
        self.model = None


@dataclass
class _Call:
    """One call of the text tower: the shape of its tokens [B, T], whose rows are where if they are sliced, and the
    columns of each kind of mask that this rank needs."""

    shape: tuple[int, ...] = (0, 0)
    rows: Rows | None = None
    masks: dict[int | None, Tensor] = field(default_factory=dict)


def share_model(
    model: Any,
    ranks: Ranks,
    *,
    split: Split = "auto",
    block: int = 16,
    copies: bool = True,
    weight_of: WeightOf = weight_of,
) -> SharedModel:
    """Share a Gemma 3 model of transformers (``ForCausalLM`` or ``ForConditionalGeneration``), in place.

    Every rank gives the same complete model and keeps its share of it. split: what the feed-forward is split by; with
    tokens or auto every rank keeps all of its weights. block: positions that a rank of a sequence holds in a row. copies:
    copy the shares, so that the rest of each weight goes; else they are views, and the weights stay where they are.
    Raises ValueError when the topology does not fit the model.
    """
    text = model.get_decoder()
    assert not text.config.attention_bias, "biases of attention are not shared"
    decoder = Decoder.of(text.config)
    check(ranks.topology, decoder)
    AttentionInterface.register(NAME, _attention)
    AttentionMaskInterface.register(NAME, _boolean_mask)
    model.set_attn_implementation(NAME if model.config is text.config else {"text_config": NAME})
    weights = _Weights(copies, weight_of)
    shared = SharedModel(model, ranks, split, block, weights)
    shares = Shares.of(decoder, decoder.attentions[0], ranks.topology, ranks.everyone.rank)
    for layer in text.layers:
        _share_attention(layer.self_attn, shared, shares)
        layer.mlp = _FeedForward(layer.mlp, shared, shares.inner)
    text.layers[0].register_forward_pre_hook(functools.partial(_begin, shared))
    text.norm.register_forward_pre_hook(functools.partial(_end, shared))
    model.lm_head = _Scores(model.lm_head, shared)
    return shared


def _boolean_mask(*args: Any, **kwargs: Any) -> Tensor:
    """transformers' boolean mask, also where attention could do without: columns are taken from it."""
    mask = sdpa_mask(*args, **{**kwargs, "allow_is_causal_skip": False})
    assert mask is not None
    return mask


# the hooks, in the order of a call ------------------------------------------------------------------------------------


def _begin(shared: SharedModel, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the first layer: slice the hidden state, and with it the residual, which is the hidden state's from here."""
    hidden, *others = args
    by_tokens = shared.split == "tokens" or (shared.split == "auto" and hidden.shape[1] > 1)
    everyone = shared.ranks.everyone
    rows = Rows(hidden.shape[0] * hidden.shape[1], everyone) if by_tokens and everyone.size > 1 else None
    shared.call = _Call(hidden.shape[:2], rows)
    return (hidden if rows is None else rows.slice(hidden.flatten(0, 1)).unsqueeze(0), *others)


def _enter_attention(
    shared: SharedModel, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Before every attention: gather all tokens, cut what filled the slices up, and note which cache it writes."""
    module.owned_keys = _owned_keys(kwargs.get("past_key_values"), module.layer_idx)
    return args, {**kwargs, "hidden_states": _gathered(shared.call, kwargs["hidden_states"])}


def _owned_keys(cache: Cache | None, layer: int) -> OwnedKeys | None:
    if cache is None:
        return None
    owned = cache.layers[layer] if layer < len(cache.layers) else None
    if not isinstance(owned, OwnedKeys):
        raise ValueError(f"a shared model needs past_key_values from new_cache(), not {type(cache).__name__}")
    return owned


def _end(shared: SharedModel, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Before the last norm: gather all tokens."""
    return (_gathered(shared.call, args[0]), *args[1:])


def _gathered(call: _Call, hidden: Tensor) -> Tensor:
    return hidden if call.rows is None else call.rows.gather(hidden[0]).unflatten(0, call.shape)


# attention ------------------------------------------------------------------------------------------------------------


def _share_attention(attention: Any, shared: SharedModel, shares: Shares) -> None:
    for name, rows in (("q_proj", shares.query), ("k_proj", shares.key), ("v_proj", shares.key)):
        setattr(attention, name, _Rows(shared.weights.part(getattr(attention, name), rows)))
    attention.o_proj = _Output(attention.o_proj, shared, shares.output)
    attention.shared_model = shared
    attention.register_forward_pre_hook(functools.partial(_enter_attention, shared), with_kwargs=True)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, *, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """What transformers calls: query [B, H, T, D]; without a cache key and value [B, Hkv, T, D] of all positions.

    Returns [B, T, H / context, D], this rank's share of the heads.
    """
    shared, owned = module.shared_model, module.owned_keys
    if owned is None:
        owned = OwnedKeys(shared.owners, module.sliding_window)
        key, value = owned.update(key, value)
    if module.sliding_window not in shared.call.masks:
        columns = attention_mask if owned.is_whole else attention_mask[..., owned.positions(query.device)]
        shared.call.masks[module.sliding_window] = columns
    part = partial_attention(query, key, value, scaling, shared.call.masks[module.sliding_window])
    return merge_over_heads(part, shared.ranks.context), None


class _Output(nn.Module):
    """The projection back from heads: a part of the sum on every rank. Summed for all tokens, or each rank's own."""

    def __init__(self, linear: nn.Linear, shared: SharedModel, share: slice) -> None:
        super().__init__()
        self.shared_model = shared
        self.weight = shared.weights.part(linear, columns=share)

    def forward(self, heads: Tensor) -> Tensor:
        shared, partial = self.shared_model, F.linear(heads, self.weight)
        if shared.call.rows is None:
            return shared.ranks.everyone.all_reduce(partial)
        return shared.call.rows.reduce(partial.flatten(0, 1)).unsqueeze(0)


# what acts on tokens alone --------------------------------------------------------------------------------------------


class _FeedForward(nn.Module):
    """Gated feed-forward: all of its weights on this rank's tokens, or this rank's share of them on all tokens."""

    def __init__(self, mlp: Any, shared: SharedModel, share: slice) -> None:
        super().__init__()
        self.shared_model = shared
        keeps_all = shared.split != "weights"
        kept = slice(None) if keeps_all else share
        self.share = share if keeps_all else slice(None)
        self.act_fn = mlp.act_fn
        weights = shared.weights
        self.gate, self.up = weights.part(mlp.gate_proj, kept), weights.part(mlp.up_proj, kept)
        self.down = weights.part(mlp.down_proj, columns=kept)

    def forward(self, x: Tensor) -> Tensor:
        shared = self.shared_model
        if shared.call.rows is None:
            return shared.ranks.everyone.all_reduce(self._compute(x, self.share))
        return self._compute(x, slice(None))

    def _compute(self, x: Tensor, inner: slice) -> Tensor:
        hidden = self.act_fn(F.linear(x, self.gate[inner])) * F.linear(x, self.up[inner])
        return F.linear(hidden, self.down[:, inner])


class _Scores(nn.Module):
    """The output head: each rank scores a share of the vocabulary. Gathered, so all ranks sample from the same bits."""

    def __init__(self, linear: nn.Linear, shared: SharedModel) -> None:
        super().__init__()
        self.rows = Rows(linear.weight.shape[0], shared.ranks.everyone)
        # a view: the embeddings hold all of it
        self.weight = nn.Parameter(self.rows.slice(linear.weight.detach()), requires_grad=False)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.rows.gather(F.linear(hidden, self.weight).movedim(-1, 0)).movedim(0, -1)


# weights --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Weights:
    """How a share of a weight is taken. copies, weight_of: as in ``share_model``."""

    copies: bool
    weight_of: WeightOf

    def part(self, linear: Any, rows: slice = slice(None), columns: slice = slice(None)) -> nn.Parameter:
        """Rows and columns of a linear layer's weight."""
        weight = self.weight_of(linear)
        part = weight[rows, columns]
        # the rest of a weight that was unpacked for this call goes too
        unpacked = linear.weight is None
        if (self.copies or unpacked) and part.shape != weight.shape:
            part = part.clone(memory_format=torch.contiguous_format)
        return nn.Parameter(part, requires_grad=False)


class _Rows(nn.Module):
    """A projection to this rank's share of the heads."""

    def __init__(self, weight: nn.Parameter) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)
