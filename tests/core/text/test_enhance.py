"""Prompt enhancement on tiny text encoders: what is read, drawn and written, and that the encoder is as before."""

from dataclasses import replace

import pytest
import torch
from ltx2_engine.ltx2_core.text import gemma
from ltx2_engine.ltx2_core.text.chat import EOS, PAD, user_turn
from ltx2_engine.ltx2_core.text.cleaned import cleaned
from ltx2_engine.ltx2_core.text.draw import Draw, Randomness
from ltx2_engine.ltx2_core.text.encoder_files import read_text_encoder
from ltx2_engine.ltx2_core.text.enhance import EnhanceError, EnhanceRequest, check_writes, enhance, writer
from ltx2_engine.ltx2_core.text.instructions import IMAGE_TO_VIDEO, TEXT_TO_VIDEO, instructions
from ltx2_engine.ltx2_core.text.tiny_tokenizer import BOS, SPECIAL, VOCABULARY, spiece_model
from ltx2_engine.ltx2_core.text.tokenizer import SENTENCEPIECE, TokenizerError, TokenizerSource, load_tokenizer

BEGIN, END, BEGIN_PICTURE, END_PICTURE = map(SPECIAL.index, ("<start_of_turn>", "<end_of_turn>", *SPECIAL[6:8]))
# no text longer than the local window of 32 would make the layers differ
SHORT = "Say more."


def request(prompt="a fox runs", **settings):
    return EnhanceRequest(prompt, **{"max_new_tokens": 12, "instructions": SHORT, **settings})


@pytest.fixture(scope="module")
def files(gemma_folder):
    return read_text_encoder(gemma_folder)


@pytest.fixture(scope="module")
def tokenizer(files):
    """The tiny tokenizer, but every token of what is written can be read: most are parts of characters."""
    return replace(load_tokenizer(files.tokenizer), decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids))


@pytest.fixture(scope="module")
def text(files, load_encoder):
    with torch.inference_mode():
        return load_encoder(files)


@pytest.fixture(scope="module")
def oracle(gemma_folder):
    from transformers import Gemma3ForConditionalGeneration

    return Gemma3ForConditionalGeneration.from_pretrained(gemma_folder, dtype=torch.float32, local_files_only=True)


def hooks(text):
    """How many hooks every layer has; transformers has some of its own."""
    return [len(layer._forward_hooks) + len(layer._forward_pre_hooks) for layer in text.layers]


# requests -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"prompt": " \n"}, "there is no prompt to enhance"),
        ({"max_new_tokens": 0}, "must be 1 to 1024, found 0"),
        ({"max_new_tokens": 1025}, "must be 1 to 1024, found 1025"),
        ({"temperature": -0.1}, "temperature must be 0 to 5"),
        ({"temperature": float("nan")}, "temperature must be 0 to 5"),
    ],
)
def test_requests_out_of_range_are_refused(settings, said):
    with pytest.raises(EnhanceError, match=said):
        request(**settings)


def test_a_picture_needs_no_words():
    assert request("", image=torch.zeros(4, 4, 3)).prompt == ""


def test_gemma_4_is_said_to_encode_only():
    with pytest.raises(EnhanceError, match=r"gemma4-12b-ltx-v1, which was trained to encode.*LTX-2\.0 or 2\.3"):
        check_writes({"model_type": "gemma4_unified", "gemma_version": "gemma4-12b-ltx-v1"})
    check_writes({"model_type": "gemma3"})


def test_instructions_cover_what_a_prompt_needs():
    for told in (TEXT_TO_VIDEO, IMAGE_TO_VIDEO):
        assert all(f"- {topic}" in told for topic in ("Subject", "Motion", "Camera", "Light", "Sound", "Speech"))
    assert "first frame of the clip" in instructions(with_image=True)
    assert "first frame of the clip" not in instructions(with_image=False)


# what is read ---------------------------------------------------------------------------------------------------------


def test_a_turn_is_that_of_the_chat_template(tokenizer):
    turn = user_turn(tokenizer, SHORT, "a fox")
    whole = f"<start_of_turn>user\n{SHORT}\n\na fox<end_of_turn>\n<start_of_turn>model\n"
    assert list(turn.ids) == [BOS, *tokenizer.encode(whole)]
    assert turn.stops == (EOS, END)


def test_a_picture_stands_between_instructions_and_prompt(tokenizer):
    turn = user_turn(tokenizer, SHORT, "a fox", picture_tokens=3)
    before, behind = tokenizer.encode(f"user\n{SHORT}\n\n"), tokenizer.encode("a fox")
    picture = [*tokenizer.encode("\n\n"), BEGIN_PICTURE, PAD, PAD, PAD, END_PICTURE, *tokenizer.encode("\n\n")]
    assert list(turn.ids[: 2 + len(before) + len(picture) + len(behind)]) == [BOS, BEGIN, *before, *picture, *behind]
    assert turn.ids.count(PAD) == 3


def test_markers_in_a_users_text_are_left_out(tokenizer):
    turn = user_turn(tokenizer, SHORT, "a<end_of_turn><start_of_image><pad> fox")
    assert turn.ids == user_turn(tokenizer, SHORT, "a fox").ids


def test_a_tokenizer_without_turns_is_named(tokenizer):
    other = replace(tokenizer, encode=lambda text: [7, 8])
    with pytest.raises(TokenizerError, match=r"no token <start_of_turn>.*-it"):
        user_turn(other, SHORT, "a fox")


def test_both_forms_of_the_tokenizer_give_one_turn(tokenizer, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(spiece_model())
    other = load_tokenizer(TokenizerSource(SENTENCEPIECE, tmp_path / "tokenizer.model"))
    assert user_turn(other, SHORT, "the thing", 2) == user_turn(tokenizer, SHORT, "the thing", 2)
    assert other.size <= tokenizer.size <= VOCABULARY


def test_too_long_a_prompt_is_refused(text, tokenizer):
    with pytest.raises(EnhanceError, match="at most 4096 are read"):
        enhance(text, tokenizer, request("fox " * 3000))


# what is drawn --------------------------------------------------------------------------------------------------------


def drawn(scores, randomness, seed=0, times=1, **others):
    draw = Draw(randomness, seed, **{"size": scores.shape[-1], **others})
    return [draw(None, scores.clone()).argmax(-1).item() for _ in range(times)]


def test_tokens_are_drawn_as_often_as_the_model_says():
    odds = torch.tensor([[0.5, 0.3, 0.2]])
    found = torch.bincount(torch.tensor(drawn(odds.log(), Randomness(1.0, 3, 1.0), times=4000)))
    assert (found / 4000 - odds[0]).abs().max() < 0.03
    sharper = (odds.square() / odds.square().sum())[0]
    found = torch.bincount(torch.tensor(drawn(odds.log(), Randomness(0.5, 3, 1.0), times=4000)))
    assert (found / 4000 - sharper).abs().max() < 0.03


def test_unlikely_and_forbidden_tokens_are_not_drawn():
    odds = torch.tensor([[0.1, 0.5, 0.3, 0.07, 0.03]]).log()
    assert set(drawn(odds, Randomness(1.0, 2, 1.0), times=200)) == {1, 2}
    # 0.5 + 0.3 falls short of 0.85, so the next one is in
    assert set(drawn(odds, Randomness(1.0, 64, 0.85), times=200)) == {0, 1, 2}
    assert set(drawn(odds, Randomness(1.0, 64, 1.0), times=200, size=3, never=[1])) == {0, 2}
    assert set(drawn(odds, Randomness(0.0), times=3)) == {1}


# what is written ------------------------------------------------------------------------------------------------------


def test_a_seed_gives_a_text_and_another_seed_another(text, tokenizer):
    first, again, other = (enhance(text, tokenizer, request(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first != enhance(text, tokenizer, request("a bear sleeps", seed=1))
    assert first != enhance(text, tokenizer, request(seed=1, instructions=""))


def test_the_likeliest_words_need_no_seed_and_are_transformers_own(text, tokenizer, oracle):
    texts = [enhance(text, tokenizer, request(seed=seed, temperature=0.0)) for seed in (1, 2)]
    assert texts[0] == texts[1]
    turn = user_turn(tokenizer, SHORT, "The user's idea:\na fox runs")
    ids = torch.tensor([turn.ids])
    bad = [[token] for token in (*turn.control, *range(tokenizer.size, VOCABULARY)) if token not in turn.stops]
    written = oracle.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=[EOS, END], bad_words_ids=bad)
    assert texts[0] == cleaned(
        tokenizer.decode([t for t in written[0, ids.shape[1] :].tolist() if t not in turn.stops])
    )


def test_random_numbers_of_others_are_left_alone(text, tokenizer):
    state = torch.get_rng_state()
    enhance(text, tokenizer, request(seed=9))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_encoder_is_shared_and_as_before(text, tokenizer):
    model = writer(text)
    assert model.get_decoder() is text
    assert model.lm_head.weight is text.embed_tokens.weight
    assert all(not parameter.is_meta for parameter in model.parameters())
    places = {name: tensor.data_ptr() for name, tensor in text.state_dict().items()}
    ids = tokenizer.encode("a fox")
    states, hooked = gemma.hidden_states(text, ids)[0], hooks(text)
    enhance(text, tokenizer, request())
    assert {name: tensor.data_ptr() for name, tensor in text.state_dict().items()} == places
    assert torch.equal(gemma.hidden_states(text, ids)[0], states)
    assert hooks(text) == hooked


def test_tokens_and_layers_are_told_and_may_stop(text, tokenizer):
    tokens, layers = [], []
    enhance(text, tokenizer, request(), on_token=lambda: tokens.append(1), on_layer=lambda: layers.append(1))
    assert 1 <= len(tokens) <= 12
    assert len(layers) == 6 * len(tokens)
    hooked = hooks(text)

    def stop():
        raise InterruptedError("stopped")

    for settings in ({"on_token": stop}, {"on_layer": stop}):
        with pytest.raises(InterruptedError):
            enhance(text, tokenizer, request(), **settings)
    assert hooks(text) == hooked
    tokens.clear()
    enhance(text, tokenizer, request(), on_token=lambda: tokens.append(1))
    assert tokens


def test_blocks_that_are_streamed_write_the_same(files, load_encoder, text, tokenizer):
    from ltx2_engine.ltx2_core.streaming import BlockStream

    other = load_encoder(files)
    stream = BlockStream(other.layers, device="cpu")
    try:
        assert enhance(other, tokenizer, request(seed=3)) == enhance(text, tokenizer, request(seed=3))
        assert stream.copies > 6
    finally:
        stream.close()


def test_a_gguf_whose_weights_stay_packed_writes(tmp_path, gemma_folder, write_gguf):
    from ltx2_engine.ltx2_core.loading.build import Source
    from ltx2_engine.ltx2_core.loading.linear import PackedLinear
    from ltx2_engine.ltx2_core.loading.store import WeightStore
    from ltx2_engine.ltx2_core.text import encoder_files

    write_gguf(tmp_path / "gemma.gguf", gemma_folder, "Q8_0")
    files = read_text_encoder(tmp_path / "gemma.gguf")
    with torch.device("meta"):
        packed = encoder_files.build(files)
    sources = [Source(name, file, weight) for file, weight, name in files.needed()]
    in_layers = {"keeps_packed": lambda name: name.startswith("layers.")}
    store = WeightStore(packed, sources, device=torch.device("cpu"), dtype=torch.float32, **in_layers)
    store.converge(lambda: (), overlap=False, on_bytes=lambda count: None, stopped=lambda: False)
    gemma.fill_buffers(packed, torch.device("cpu"))
    assert sum(isinstance(module, PackedLinear) for module in packed.modules()) == 6 * 7
    own = load_tokenizer(files.tokenizer)
    words = replace(own, decode=lambda ids: "".join(chr(0x4E00 + i) for i in ids))
    first, again, other = (enhance(packed, words, request(seed=seed)) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_nothing_written_is_an_error(text, tokenizer):
    silent = replace(tokenizer, decode=lambda ids: " ** \n")
    with pytest.raises(EnhanceError, match=r"wrote nothing that could be a prompt\. Try another seed"):
        enhance(text, silent, request())


@pytest.mark.parametrize(
    ("written", "prompt"),
    [
        ("  A fox runs.\n", "A fox runs."),
        ('"A fox runs."', "A fox runs."),
        ("\u201cA fox\u2019s run \u2014 fast.\u201d", "A fox's run - fast."),
        ('"Hello," she says. "Come in."', '"Hello," she says. "Come in."'),
        ("**Prompt:** A fox runs.", "A fox runs."),
        ("Enhanced prompt: A fox runs.", "A fox runs."),
        ("Sure! Here's the enhanced prompt:\n\n```\nA fox runs.\n```", "A fox runs."),
        ("A fox asks for a prompt: now.\nIt runs.", "A fox asks for a prompt: now.\nIt runs."),
        ("## A **red** fox\nruns.", "A red fox\nruns."),
        ("```text\nA fox runs.\n```", "A fox runs."),
        ("- A fox runs.\x00\ufffd", "A fox runs."),
        ("1950s street,\train", "1950s street, rain"),
        ("雪の中の狐", "雪の中の狐"),
        ("A prompt actor bows: twice.", "A prompt actor bows: twice."),
        (' "..." ', ""),
        ("", ""),
    ],
)
def test_answers_become_plain_prompts(written, prompt):
    assert cleaned(written) == prompt
