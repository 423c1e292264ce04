"""A conversation with Gemma 3 as token ids: one turn of the user, and the beginning of the model's."""

from __future__ import annotations

from dataclasses import dataclass

from .tokenizer import Tokenizer, TokenizerError

PAD, EOS = 0, 1

_MARKERS = ("<start_of_turn>", "<end_of_turn>", "<start_of_image>", "<end_of_image>")


@dataclass(frozen=True)
class Turn:
    """What the model reads. ids: one leading BOS; ``PAD`` stands for every token of the picture, and nowhere else.

    stops: the ids that end the answer. control: ids that no text of the user's or the model's holds.
    """

    ids: tuple[int, ...]
    stops: tuple[int, ...]
    control: tuple[int, ...]


def user_turn(tokenizer: Tokenizer, instructions: str, text: str, picture_tokens: int = 0) -> Turn:
    """Instructions and text in one turn, as Gemma 3 was trained (it has no turn of a system), the picture between them.

    What the texts spell like a marker of turns or pictures is left out. Raises TokenizerError where the tokenizer has no
    such markers.
    """
    begin, end, begin_picture, end_picture = markers = [_marker(tokenizer, name) for name in _MARKERS]
    control = (PAD, EOS, tokenizer.bos, *markers)

    def plain(text: str) -> list[int]:
        return [token for token in tokenizer.encode(text) if token not in control]

    ids = [tokenizer.bos, begin, *plain(f"user\n{instructions}\n\n")]
    if picture_tokens:
        ids += [*plain("\n\n"), begin_picture, *[PAD] * picture_tokens, end_picture, *plain("\n\n")]
    ids += [*plain(text), end, *plain("\n"), begin, *plain("model\n")]
    return Turn(tuple(ids), (EOS, end), control)


def _marker(tokenizer: Tokenizer, name: str) -> int:
    ids = tokenizer.encode(name)
    if len(ids) != 1:
        raise TokenizerError(
            f"the text encoder's tokenizer has no token {name}, so the encoder was not made to answer: prompts are enhanced "
            "by an instruction-tuned Gemma 3 (its name has -it)"
        )
    return ids[0]
