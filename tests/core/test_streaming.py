"""Streamed blocks: the same bits as resident ones, copied once a step, and no copy and no read at a wrong moment."""

import gc
import mmap
import random
import weakref
from itertools import pairwise

import pytest
import torch
from ltx2_engine.ltx2_core import streaming
from ltx2_engine.ltx2_core.av import AV
from ltx2_engine.ltx2_core.conditioning import state as tokens
from ltx2_engine.ltx2_core.config.transformer import TransformerConfig
from ltx2_engine.ltx2_core.evaluate import EVALUATIONS
from ltx2_engine.ltx2_core.loading.arena import Arena
from ltx2_engine.ltx2_core.sampling.choice import SamplerChoice
from ltx2_engine.ltx2_core.sampling.denoise import Denoiser
from ltx2_engine.ltx2_core.sampling.guidance import StreamGuidance, plan_passes
from ltx2_engine.ltx2_core.sampling.noise import SamplerNoise
from ltx2_engine.ltx2_core.sampling.samplers import SAMPLERS
from ltx2_engine.ltx2_core.shapes import ClipShape
from ltx2_engine.ltx2_core.streaming import BlockStream
from ltx2_engine.ltx2_core.tiny import tiny_config
from ltx2_engine.ltx2_core.transformer.model import Transformer
from torch import nn

CLIP = ClipShape(17, 64, 96, 24.0)
GUIDED = StreamGuidance(cfg=3.0, stg=1.0, modality=3.0, stg_blocks=(2,))
PLAIN = StreamGuidance()
BLOCKS, RESIDENT = 6, 2
STREAMED = BLOCKS - RESIDENT


class Mixed(nn.Module):
    """Tensors of every kind that a block may have."""

    def __init__(self, device="cpu"):
        super().__init__()
        self.linear = nn.Linear(5, 3, device=device)
        self.shared = nn.ModuleList([self.linear])
        self.packed = nn.Module()
        self.packed.register_buffer("data", torch.arange(77, dtype=torch.uint8).to(device))
        self.packed.register_buffer("scale", torch.tensor(0.5, device=device))
        self.codes = nn.Parameter(torch.randn(4, 8).to(torch.float8_e4m3fn).to(device), requires_grad=False)
        self.empty = nn.Parameter(torch.empty(0, 4, device=device, dtype=torch.bfloat16))
        self.register_buffer("passing", torch.ones(3, device=device, dtype=torch.int64), persistent=False)
        self.tied = self.linear.bias
        self.absent = None


def every_tensor(module):
    return [*module.parameters(), *module.buffers()]


def bits(state):
    return {
        name: (t.dtype, tuple(t.shape), t.contiguous().view(-1).view(torch.uint8).tolist()) for name, t in state.items()
    }


# arenas --------------------------------------------------------------------------------------------------------------


def test_an_arena_holds_every_tensor_aligned_and_unchanged():
    module = Mixed()
    before, objects = bits(module.state_dict()), [id(t) for t in every_tensor(module)]
    arena = Arena.of(module)
    assert bits(module.state_dict()) == before
    assert [id(t) for t in every_tensor(module)] == objects
    start, end = arena.memory.data_ptr(), arena.memory.data_ptr() + arena.size_bytes
    assert start % mmap.PAGESIZE == 0
    for tensor in every_tensor(module):
        if tensor.numel():
            assert (tensor.data_ptr() - start) % 256 == 0
            assert start <= tensor.data_ptr() <= end - tensor.nbytes
    places = sorted((p.offset, p.offset + p.size_bytes) for p in arena.layout)
    assert len(places) == 7, "the tied bias and the shared linear lie in it once"
    assert all(a[1] <= b[0] for a, b in pairwise(places)), "tensors overlap"


def test_an_arena_makes_memory_for_a_module_that_has_none():
    module = Mixed("meta")
    shapes = {name: (t.shape, t.dtype) for name, t in module.state_dict().items()}
    arena = Arena.of(module)
    assert not any(t.is_meta for t in every_tensor(module))
    assert {name: (t.shape, t.dtype) for name, t in module.state_dict().items()} == shapes
    assert module.tied is module.linear.bias
    assert "passing" not in module.state_dict(), "a buffer that is not saved stays so"
    assert isinstance(module.codes, nn.Parameter)
    for tensor in every_tensor(module):
        tensor.view(torch.uint8) if tensor.dtype == torch.float8_e4m3fn else tensor.zero_()
    module.linear.weight.fill_(3)
    place = next(p for p in arena.layout if p.shape == (3, 5))
    assert arena.memory[place.offset :][: place.size_bytes].view(torch.float32).eq(3).all()


def test_a_module_keeps_its_arena_until_its_tensors_change():
    module = Mixed()
    arena = Arena.of(module)
    assert Arena.of(module) is arena
    module.linear.weight.data.fill_(2)
    assert Arena.of(module) is arena, "another value is no other tensor"
    module.packed.register_buffer("branch", torch.full((9,), 7.0))
    wider = Arena.of(module)
    assert wider is not arena
    assert wider.size_bytes >= arena.size_bytes
    assert module.packed.branch.eq(7).all()
    assert module.linear.weight.eq(2).all()


@pytest.mark.parametrize("made_in_inference_mode", [True, False])
@pytest.mark.parametrize("used_in_inference_mode", [True, False])
def test_arenas_and_streams_work_in_and_out_of_inference_mode(made_in_inference_mode, used_in_inference_mode):
    with torch.inference_mode(made_in_inference_mode):
        block = nn.Linear(3, 3).requires_grad_(False)
        Arena.of(block)
        want = block(torch.ones(1, 3))
        stream = BlockStream([block], device="cpu")
    with torch.inference_mode(used_in_inference_mode):
        assert torch.equal(block(torch.ones(1, 3)), want)
        block.weight.zero_()
        stream.release()
        assert torch.equal(block(torch.ones(1, 3))[0], block.bias)


def test_arenas_and_streams_go_with_their_modules():
    """At once, without the garbage collector: what they hold is scarce."""
    blocks = [nn.Linear(3, 3) for _ in range(3)]
    stream = BlockStream(blocks, device="cpu")
    for block in blocks:
        block(torch.ones(3))
    gone = []
    weakref.finalize(Arena.of(blocks[0]), gone.append, "arena")
    weakref.finalize(stream, gone.append, "stream")
    gc.disable()
    try:
        del block, blocks, stream
        assert sorted(gone) == ["arena", "stream"]
    finally:
        gc.enable()


# the transformer -----------------------------------------------------------------------------------------------------


def random_model(num_layers=BLOCKS):
    config = tiny_config("2.3")
    config["transformer"]["num_layers"] = num_layers
    torch.manual_seed(0)
    model = Transformer(TransformerConfig.from_config(config)).requires_grad_(False)
    for name, parameter in model.named_parameters():
        near_one = name.endswith(("q_norm.weight", "k_norm.weight"))
        parameter.data = torch.randn(parameter.shape) * 0.1 + near_one
    return model


def sampled(model, guidance, mode, sampler="euler", steps=3, each_step=lambda: None):
    """The tokens that a run ends with. Everything but the model is the same at every call."""
    generator = torch.Generator().manual_seed(1)
    device = model.video.patchify_proj.weight.device

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    states = AV(
        tokens.video_state(draw(1, 16, *CLIP.grid), CLIP).write(draw(1, 6, 16), 0, 0.7),
        tokens.audio_state(draw(1, 2, CLIP.audio_latents, 16)),
    )
    streams = model.config.streams
    prompts = [AV(draw(1, 7, streams.video.context_dim), draw(1, 7, streams.audio.context_dim)) for _ in range(2)]
    x = states.map(lambda state: draw(*state.latent.shape))
    both = AV(guidance, guidance)
    passes = plan_passes(both)
    choice = SamplerChoice(sampler)
    with torch.inference_mode():
        evaluate = EVALUATIONS[mode](model, states, passes, *prompts, lambda: None)
        denoise = Denoiser(evaluate, states, passes, both)
        sigmas = torch.linspace(1, 0.2, steps + 1).tolist()
        noise = SamplerNoise(choice, 0, device)
        return SAMPLERS[sampler](denoise, x, sigmas, noise, choice, lambda *_: each_step())


def same_bits(a, b):
    return all(torch.equal(one, other) for one, other in zip(a.present(), b.present(), strict=True))


@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["1 pass", "4 passes"])
@pytest.mark.parametrize(("mode", "sampler"), [("split", "euler"), ("split", "res_2s"), ("batched", "euler")])
@pytest.mark.parametrize("slots", [1, 2, 3])
def test_a_streamed_model_gives_the_same_bits_and_copies_each_block_once_an_evaluation(guidance, mode, sampler, slots):
    model = random_model()
    want = sampled(model, guidance, mode, sampler)
    stream = BlockStream(model.blocks[RESIDENT:], device="cpu", slots=slots)
    counts = [0]
    got = sampled(model, guidance, mode, sampler, each_step=lambda: counts.append(stream.copies))
    assert same_bits(got, want)
    made = [after - before for before, after in pairwise(counts)]
    a_step = STREAMED * (2 if sampler == "res_2s" else 1)
    # at its end a step has copied what the next one begins with
    assert made == [a_step + slots - 1, a_step, a_step]


def test_sizes_and_state_of_a_streamed_model():
    model = random_model()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    stream = BlockStream(model.blocks[RESIDENT:], device="cpu")
    block = sum(-(-t.nbytes // 256) * 256 for t in every_tensor(model.blocks[0]))
    pages = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
    assert stream.arena_bytes == STREAMED * pages
    assert stream.slot_bytes == 2 * pages
    sampled(model, GUIDED, "split")
    state = model.state_dict()
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], value) for name, value in before.items())
    memory = Arena.of(model.blocks[-1]).memory
    lies = model.blocks[-1].video.attn1.to_q.weight.data_ptr() - memory.data_ptr()
    assert 0 <= lies < memory.nbytes, "between calls a block lies in host memory"
    stream.close()
    assert stream.slot_bytes == 0
    copies = stream.copies
    want = sampled(model, GUIDED, "split")
    assert stream.copies == copies, "a closed stream copies nothing"
    assert same_bits(sampled(random_model(), GUIDED, "split"), want)


def test_weights_changed_in_host_memory_take_effect_after_release():
    model, other = random_model(), random_model()
    stream = BlockStream(model.blocks[RESIDENT:], device="cpu")
    sampled(model, PLAIN, "split")
    stream.release()
    for one in (model, other):
        for block in one.blocks[RESIDENT:]:
            block.video.ff.net[2].weight.mul_(1.5)
    assert same_bits(sampled(model, PLAIN, "split"), sampled(other, PLAIN, "split"))


def call_inside(blocks, hook):
    """Have a hook called in every block, when its tensors are those of a slot and most of them are still to be read.

    On a layer that is called as a module: attentions are not, nor layers of which several are one product.
    """
    return [block.video.attn2.to_q.register_forward_pre_hook(hook) for block in blocks]


class Stop(BaseException):
    """As an interrupt: hooks that PyTorch always calls are not called for it."""


@pytest.mark.parametrize("kind", [Stop, ValueError])
@pytest.mark.parametrize("at", range(1, 2 * BLOCKS, 2))
def test_a_run_that_ends_anywhere_leaves_host_weights_and_a_stream_that_goes_on(at, kind):
    model = random_model()
    want = sampled(model, PLAIN, "split")
    stream = BlockStream(model.blocks[RESIDENT:], device="cpu")
    home = [t.data_ptr() for t in every_tensor(model.blocks[RESIDENT:])]
    calls = 0

    def stop(module, inputs, output=None):
        nonlocal calls
        calls += 1
        if calls == at:
            raise kind

    hooks = call_inside(model.blocks, stop)
    with pytest.raises(kind):
        sampled(model, PLAIN, "split")
    for hook in hooks:
        hook.remove()
    if kind is Stop:
        stream.release()
    assert [t.data_ptr() for t in every_tensor(model.blocks[RESIDENT:])] == home
    assert same_bits(sampled(model, PLAIN, "split"), want)
    assert [t.data_ptr() for t in every_tensor(model.blocks[RESIDENT:])] == home


@pytest.mark.parametrize("slots", [1, 2, 3, 5])
def test_any_order_of_calls_is_right(slots):
    blocks = [nn.Linear(4, 4) for _ in range(4)]
    x = torch.randn(2, 4)
    want = [block(x) for block in blocks]
    BlockStream(blocks, device="cpu", slots=slots)
    generator = random.Random(slots)
    for _ in range(100):
        number = generator.randrange(4)
        assert torch.equal(blocks[number](x), want[number])


def test_blocks_that_all_fit_into_the_slots_are_copied_once():
    blocks = [nn.Linear(4, 4) for _ in range(2)]
    stream = BlockStream(blocks, device="cpu", slots=3)
    for _ in range(5):
        for block in blocks:
            block(torch.ones(4))
    assert stream.copies == 2


def test_blocks_of_different_layout():
    torch.manual_seed(0)
    blocks = [nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 64), nn.Linear(64, 4)), nn.Linear(4, 4, bias=False)]
    blocks[2].register_buffer("codes", torch.arange(5, dtype=torch.uint8))

    def run(x):
        for block in blocks:
            x = block(x)
        return x

    x = torch.randn(3, 4)
    want = run(x)
    stream = BlockStream(blocks, device="cpu")
    assert all(torch.equal(run(x), want) for _ in range(3))
    assert stream.copies == 3 * 3 + 1


def test_a_stream_needs_a_slot():
    with pytest.raises(ValueError, match="slot"):
        BlockStream([nn.Linear(2, 2)], device="cpu", slots=0)


def test_no_blocks_are_no_trouble():
    stream = BlockStream([], device="cpu")
    assert (stream.arena_bytes, stream.slot_bytes) == (0, 0)
    stream.close()


# the text encoder ----------------------------------------------------------------------------------------------------


def test_the_layers_of_a_text_encoder_stream():
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3TextModel

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = Gemma3TextConfig(**sizes, head_dim=16, num_hidden_layers=7, vocab_size=50, sliding_window=8)
    model = Gemma3TextModel(config).train(False).requires_grad_(False)

    def encode():
        with torch.inference_mode():
            ids = torch.arange(20)[None]
            return torch.stack(model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states)

    want = encode()
    stream = BlockStream(model.layers[2:], device="cpu")
    assert torch.equal(encode(), want)
    assert torch.equal(encode(), want)
    assert stream.copies == 2 * 5 + 1


# what may happen at the same time -------------------------------------------------------------------------------------


class Queues:
    """Transfers of which nothing happens until ``run``: computation and copies are queues that only marks order.

    Which queue goes on is drawn at random, so a copy may be slower or faster than any computation.
    """

    def __init__(self, forgets=""):
        self.compute, self.copies, self.reached = [], [], set()
        self._marks, self._forgets = 0, forgets

    def _new_mark(self):
        self._marks += 1
        return self._marks

    def mark(self):
        mark = self._new_mark()
        self.compute.append(("reach", mark))
        return mark

    def copy(self, target, source, after):
        if self._forgets != "free":
            self.copies.append(("await", after))
        self.copies.append(("do", lambda: target.copy_(source)))
        mark = self._new_mark()
        self.copies.append(("reach", mark))
        return mark

    def wait(self, copied):
        if self._forgets != "filled":
            self.compute.append(("await", copied))

    def settle(self):
        self.run(random.Random(0))

    def run(self, generator):
        while self.compute or self.copies:
            ready = [q for q in (self.compute, self.copies) if q and (q[0][0] != "await" or q[0][1] in self.reached)]
            assert ready, "copies and computation wait for each other"
            kind, what = generator.choice(ready).pop(0)
            if kind == "do":
                what()
            elif kind == "reach":
                self.reached.add(what)


class Recorder(nn.Module):
    """A block that reads its weight when the queue of computation comes to it."""

    def __init__(self, number, queues, seen):
        super().__init__()
        self.weight = nn.Parameter(torch.full((300,), float(number)))
        self.queues, self.seen = queues, seen

    def forward(self):
        weight = self.weight.detach()
        self.queues.compute.append(("do", lambda: self.seen.append(set(weight.tolist()))))


def race(seed, slots, forgets=""):
    """What blocks read in three steps of two passes, and what they should have read."""
    queues, seen = Queues(forgets), []
    generator = random.Random(seed)
    blocks = [Recorder(number, queues, seen) for number in range(5)]
    stream = BlockStream(blocks, device="cpu", slots=slots, transfers=queues)
    expected = []
    for _ in range(3):
        for number, block in enumerate(blocks):
            for _ in range(2):
                block()
                expected.append({float(number)})
    queues.run(generator)
    stream.close()
    return seen, expected


@pytest.mark.parametrize("slots", [1, 2, 3])
def test_no_order_of_events_shows_a_block_wrong_weights(slots):
    for seed in range(300):
        seen, expected = race(seed, slots)
        assert seen == expected, f"seed {seed}"


@pytest.mark.parametrize("forgets", ["free", "filled"])
def test_a_missing_event_is_caught(forgets):
    outcomes = [race(seed, 2, forgets) for seed in range(50)]
    assert any(seen != expected for seen, expected in outcomes)


def test_copies_run_ahead_of_computation():
    """The copy of block 2 waits until block 0 is done, not for block 1, beside which it can run."""
    queues = Queues()
    blocks = [Recorder(number, queues, []) for number in range(4)]
    BlockStream(blocks, device="cpu", slots=2, transfers=queues)
    blocks[0]()
    blocks[1]()
    awaited = [mark for kind, mark in queues.copies if kind == "await"]
    assert len(awaited) == 3, "blocks 0, 1 and 2"
    reads = [index for index, (kind, _) in enumerate(queues.compute) if kind == "do"]
    assert reads[0] < queues.compute.index(("reach", awaited[-1])) < reads[1]


# on a GPU -------------------------------------------------------------------------------------------------------------


def gpu(test):
    missing = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    return pytest.mark.gpu(missing(test))


class SlowTransfers(streaming._GpuTransfers):
    """Copies that take long, and the choice to forget what keeps them apart from computation."""

    def __init__(self, device, forgets=""):
        super().__init__(device)
        self._forgets = forgets

    def copy(self, target, source, after):
        if self._forgets == "free":
            after = torch.cuda.Event()  # never recorded: nothing to wait for
        with torch.cuda.stream(self._copies):
            torch.cuda._sleep(SLEEP if self._forgets != "free" else 0)
        return super().copy(target, source, after)

    def wait(self, copied):
        if self._forgets != "filled":
            super().wait(copied)


SLEEP = 20_000_000  # cycles, about 10 ms


def on_gpu(model):
    """The model with its resident blocks and everything else on the GPU, and its other blocks in host memory."""
    streamed = model.blocks[RESIDENT:]
    for block in streamed:
        Arena.of(block)
    for part in (model.video, model.audio, *model.blocks[:RESIDENT]):
        part.to("cuda")
    return streamed


@gpu
@pytest.mark.parametrize("guidance", [PLAIN, GUIDED], ids=["1 pass", "4 passes"])
@pytest.mark.parametrize("slow", ["copies", "computation"])
def test_a_gpu_gives_the_same_bits_whatever_is_slow(guidance, slow):
    want = sampled(random_model().to("cuda"), guidance, "split")
    model = random_model()
    streamed = on_gpu(model)
    device = torch.device("cuda", torch.cuda.current_device())
    if slow == "copies":
        stream = BlockStream(streamed, device=device, transfers=SlowTransfers(device))
    else:
        stream = BlockStream(streamed, device=device)
        call_inside(streamed, lambda *_: torch.cuda._sleep(SLEEP))
    assert same_bits(sampled(model, guidance, "split"), want)
    assert stream.copies == 3 * STREAMED + 1


@gpu
@pytest.mark.parametrize("forgets", ["free", "filled"])
def test_a_gpu_shows_a_missing_event(forgets):
    want = sampled(random_model().to("cuda"), PLAIN, "split")
    model = random_model()
    streamed = on_gpu(model)
    device = torch.device("cuda", torch.cuda.current_device())
    BlockStream(streamed, device=device, transfers=SlowTransfers(device, forgets))
    if forgets == "free":
        call_inside(streamed, lambda *_: torch.cuda._sleep(SLEEP))
    assert not same_bits(sampled(model, PLAIN, "split"), want)


@gpu
def test_a_step_on_a_gpu_waits_for_nothing():
    model = random_model()
    BlockStream(on_gpu(model), device="cuda")
    sampled(model, GUIDED, "split")
    config = model.config.streams
    states = AV(tokens.video_state(torch.zeros(1, 16, *CLIP.grid).cuda(), CLIP), None)
    prompt = AV(torch.zeros(1, 7, config.video.context_dim).cuda(), None)
    with torch.inference_mode():
        evaluate = EVALUATIONS["split"](model, states, plan_passes(AV(PLAIN, None)), prompt, None, lambda: None)
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(3):
                evaluate(AV(states.video.latent, None), 0.5, AV(True, None))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@gpu
def test_arenas_are_pinned_and_slots_are_given_back():
    model = random_model()
    streamed = on_gpu(model)
    stream = BlockStream(streamed, device="cuda")
    sampled(model, PLAIN, "split")
    assert stream.device_bytes == stream.slot_bytes > 0
    stream.release()
    assert stream.device_bytes == 0
    held = torch.cuda.memory_allocated()
    sampled(model, PLAIN, "split")
    assert torch.cuda.memory_allocated() - held >= stream.slot_bytes
    stream.release()
    assert torch.cuda.memory_allocated() == held
    stream.close()
    arena = Arena.of(streamed[0])
    assert arena.pinned
    assert streamed[0].video.attn1.to_q.weight.is_pinned()
    arena.close()
    assert not streamed[0].video.attn1.to_q.weight.is_pinned()


@gpu
def test_blocks_move_between_host_and_device():
    model = random_model()
    want = sampled(random_model().to("cuda"), PLAIN, "split")
    stream = BlockStream(on_gpu(model), device="cuda")
    sampled(model, PLAIN, "split")
    stream.close()
    moved = Arena.of(model.blocks[RESIDENT], "cuda")
    assert model.blocks[RESIDENT].video.attn1.to_q.weight.is_cuda
    assert moved.memory.is_cuda
    Arena.of(model.blocks[RESIDENT - 1])
    BlockStream([model.blocks[RESIDENT - 1], *model.blocks[RESIDENT + 1 :]], device="cuda")
    assert same_bits(sampled(model, PLAIN, "split"), want)
