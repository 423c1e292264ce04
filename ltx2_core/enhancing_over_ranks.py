"""Prompt enhancement by several ranks, each of which holds the whole text encoder and reads its share of it.

In worker processes only: transformers' registries, which are the process's, get another attention (``helix_gemma``).
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .component import Component
from .enhancing import WORK_BYTES, see
from .host import Interrupted, host
from .loading.linear import PackedLinear
from .model_files import ModelFiles
from .parallel.helix_gemma import Split, share_model
from .parallel.helix_topology import Decoder, Ranks, Topology
from .parallel.helix_traffic import choose
from .phases import phase
from .text.encoder_files import TextEncoderFiles, build
from .text.enhance import MAX_READ_TOKENS, EnhanceError, EnhanceRequest, check_writes, write, writer
from .text.tokenizer import Tokenizer


def topology_for(files: TextEncoderFiles, ranks: int, request: EnhanceRequest) -> Topology:
    """``enhancing_topology`` from a text encoder's files. Raises EnhanceError for one that does not write."""
    check_writes(files.config)
    with torch.device("meta"):
        return enhancing_topology(build(files), ranks, request)


def enhancing_topology(text: Any, ranks: int, request: EnhanceRequest) -> Topology:
    """How at most so many ranks share a request: the topology that it names, or of which each reads the fewest bytes.

    text: a tower of ``build_gemma``, with or without weights. All ranks that ask get the same answer. Raises ValueError
    where no topology of that kind fits.
    """
    return choose(Decoder.of(text.config), ranks, MAX_READ_TOKENS + request.max_new_tokens, choice=request.topology)


def enhance_prompt_over_ranks(
    files: ModelFiles,
    encoder: Component[Any],
    tokenizer: Tokenizer,
    request: EnhanceRequest,
    dtype: torch.dtype,
    ranks: Ranks,
) -> str:
    """What ``enhancing.enhance_prompt`` does, by every rank of a topology with its own encoder, all of it on its device.

    The host of each rank shows progress and says whether it was stopped. Raises HostOutOfMemory too.
    """
    check_writes(files.text_encoder.config)
    device = torch.device(files.spec.device)
    with phase(f"prompt enhancement, {ranks.topology.name}", device), torch.no_grad():
        picture = None if request.image is None else see(files, request.image, dtype)
        text = encoder.use(WORK_BYTES, streamed=0)
        with host().progress(request.max_new_tokens, "enhancing the prompt") as progress:
            stop = _StopLater(progress.step)
            return enhance_over_ranks(
                text, tokenizer, request, ranks, picture, on_token=stop.step, interrupted=stop.asked
            )


class _StopLater:
    """Steps of a progress that notes an interrupt instead of raising it: the other ranks have to hear of it first."""

    def __init__(self, step: Callable[[], None]) -> None:
        self._step, self._stopped = step, False

    def step(self) -> None:
        try:
            self._step()
        except Interrupted:
            self._stopped = True

    def asked(self) -> bool:
        return self._stopped or host().interrupted()


def enhance_over_ranks(
    text: Any,
    tokenizer: Tokenizer,
    request: EnhanceRequest,
    ranks: Ranks,
    picture: Tensor | None = None,
    *,
    on_token: Callable[[], None] = lambda: None,
    interrupted: Callable[[], bool] = lambda: False,
) -> str:
    """The enhanced prompt, the same on every rank. All ranks of the topology call it with equal arguments.

    text: the tower with all of its weights on this rank's device; it is only read, and stays fit to encode. picture: as in
    ``text.enhance.enhance``. on_token: called after every token; must not raise. interrupted: asked after every token;
    where one rank says so, all raise Interrupted. Raises EnhanceError, ValueError and TokenizerError on all ranks alike.
    """
    _check_resident(text)
    model = writer(twin(text))
    # by tokens every rank needs the whole feed-forward, which packed weights would have to be unpacked for
    split: Split = "weights" if any(_packed(part) for part in text.modules()) else "auto"
    weight_of = partial(_weight_of, dtype=text.norm.weight.dtype)
    shared = share_model(model, ranks, split=split, copies=False, weight_of=weight_of)

    def after_token() -> None:
        _leave_together(ranks, interrupted(), text.norm.weight.device)
        on_token()

    try:
        return write(model, tokenizer, request, picture, cache=shared.new_cache(), on_token=after_token)
    finally:
        shared.forget()


def twin(text: Any) -> Any:
    """Another tower over the same weights: what is put around it leaves the first one as it is."""
    weights = {id(tensor): tensor for tensor in (*text.parameters(), *text.buffers())}
    return copy.deepcopy(text, weights)


def _packed(part: nn.Module) -> bool:
    return isinstance(part, PackedLinear) and part.packed is not None


def _weight_of(linear: Any, dtype: torch.dtype) -> Tensor:
    """[out, in]; a packed weight is unpacked, of which only this rank's share is kept for the time of a request."""
    return linear.packed.unpack(dtype) if _packed(linear) else linear.weight.detach()


def _check_resident(text: Any) -> None:
    devices = {str(parameter.device) for parameter in text.parameters()}
    if len(devices) > 1:
        raise EnhanceError(
            f"the text encoder lies on {' and '.join(sorted(devices))}: parts of it are streamed, and several GPUs share one "
            "that each of them holds. Choose topology single"
        )


def _leave_together(ranks: Ranks, leaves: bool, device: torch.device) -> None:
    """Raise Interrupted on every rank where one leaves: the others would wait for it without end."""
    asked = torch.tensor([int(leaves)], dtype=torch.int32, device=device)
    if int(ranks.everyone.all_reduce(asked)):
        raise Interrupted("the parent asked to stop")
