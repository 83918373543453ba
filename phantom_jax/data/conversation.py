"""Conversations as tokens: templates, label masks built turn by turn, and branches that share a prefix.

Every run of text between special tokens and images is tokenised whole, as it would be in the whole text. What is
supervised follows from which characters a token stands for.
"""

import bisect
import dataclasses
import difflib
import itertools
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from phantom_jax.batch import IGNORE
from phantom_jax.data.runs import WHITESPACE, Run, Special
from phantom_jax.errors import InputError

IMAGE_MARK = "<image>"
"""Where an image stands in a user's text. Without any mark all images come before the first question."""


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around a conversation's turns, as data.

    A conversation reads: begin, system, then for each turn user + question + assistant + answer_begin + answer +
    answer_end, and turn_end between turns. A prompt ends with assistant.
    """

    user: str
    """Before the user's text."""
    assistant: str
    """After the user's text, up to where a prompt ends."""
    answer_end: str
    """After an answer, supervised with it. One special token, if `stop` is not given."""
    image_token: str
    """One special token, repeated for every feature of an image."""
    image_begin: str = ""
    image_end: str = ""
    after_image: str = ""
    """Between the images and the first question, where no mark says where they stand."""
    system: str = ""
    turn_end: str = ""
    """After an answer's end where another turn follows, not supervised."""
    begin: str = ""
    """One special token before everything, which other libraries' tokenizers add by themselves."""
    answer_begin: str = ""
    """Before an answer, supervised with it."""
    stop: str = ""
    """One special token: generation stops at it. By default `answer_end`."""
    stop_text: str = ""
    """Text that generation stops at too, where turns end without a special token."""
    keep_question: bool = True
    """Whether the user's words are kept. Where they are not, only the images of a turn are."""

    @property
    def end_token(self) -> str:
        """The special token that generation stops at."""
        return self.stop or self.answer_end

    @property
    def tokens(self) -> tuple[str, ...]:
        """What must be one special token each."""
        return tuple(filter(None, (self.begin, self.image_token, self.end_token)))


_MARKS = {"image_begin": "<img>", "image_token": "<IMG_CONTEXT>", "image_end": "</img>"}

_CHATML = Template(
    user="<|im_start|>user\n", assistant="<|im_end|><|im_start|>assistant\n", answer_end="<|im_end|>", **_MARKS
)

_LLAVA = {"begin": "<s>", "image_token": IMAGE_MARK}


def _vicuna(person: str) -> Template:
    return Template(
        system=f"A chat between a curious {person} and an artificial intelligence assistant. The assistant gives "
        f"helpful, detailed, and polite answers to the {person}'s questions. ",
        user="USER: ",
        assistant=" ASSISTANT:",
        answer_begin=" ",
        answer_end="</s>",
        after_image="\n",
        **_LLAVA,
    )


_HUMAN = _vicuna("human")


def _llama_2(system: str) -> Template:
    return Template(
        # The first turn's opening stands before the system text.
        system=f"[INST] <<SYS>>\n{system}\n<</SYS>>\n\n",
        user="",
        assistant=" [/INST]",
        answer_begin=" ",
        answer_end=" </s>",
        stop="</s>",
        turn_end="<s>[INST] ",
        after_image="\n",
        **_LLAVA,
    )


TEMPLATES = {
    # The Phantoms, by their language model. None has a system turn.
    "qwen2": _CHATML,
    "internlm2": _CHATML,
    "phi3": Template(user="<|user|>\n", assistant="<|end|><|assistant|>\n", answer_end="<|end|>", **_MARKS),
    # LLaVA, by the names of its published code. With `vicuna_v1` it is trained, with `llava_v1` it was first evaluated.
    "vicuna_v1": _vicuna("user"),
    "llava_v1": _HUMAN,
    # The first LLaVA's, for answers; its training wrote turns otherwise.
    "llava_v0": Template(
        system=_HUMAN.system.removesuffix(" ") + "###",
        user="Human: ",
        assistant="###Assistant:",
        answer_begin=" ",
        answer_end="###",
        stop="</s>",
        stop_text="###",
        after_image="\n",
        **_LLAVA,
    ),
    "llava_llama_2": _llama_2(
        "You are a helpful language and vision assistant. You are able to understand the visual content that the user "
        "provides, and assist the user with a variety of tasks using natural language."
    ),
    # With LLaMA-2's own system text, two spaces in it included.
    "llama_2": _llama_2(
        "You are a helpful, respectful and honest assistant. Always answer as helpfully as possible, while being safe. "
        " Your answers should not include any harmful, unethical, racist, sexist, toxic, dangerous, or illegal "
        "content. Please ensure that your responses are socially unbiased and positive in nature.\n\nIf a question "
        "does not make any sense, or is not factually coherent, explain why instead of answering something not "
        "correct. If you don't know the answer to a question, please don't share false information."
    ),
    # The first stage: an image and its caption, which nothing but the line's end closes.
    "plain": Template(
        user="",
        assistant="",
        answer_end="\n",
        stop="</s>",
        keep_question=False,
        **_LLAVA,
    ),
}


def get_template(name: str) -> Template:
    """A template by name.

    Raises:
      InputError: there is none of that name.
    """
    if name not in TEMPLATES:
        near = difflib.get_close_matches(name, TEMPLATES, n=3, cutoff=0.3) or list(TEMPLATES)
        raise InputError(f"there is no template {name!r}: the nearest names are {', '.join(near)}")
    return TEMPLATES[name]


def template_names(template: Template) -> list[str]:
    """The names under which a template is known, whatever its image token is called; none for one of the user's own."""
    return [
        name
        for name, known in TEMPLATES.items()
        if dataclasses.replace(template, image_token=known.image_token) == known
    ]


def describe_template(template: Template) -> str:
    """A template in words: its names, or that it is one of the user's own."""
    return " or ".join(template_names(template)) or "one of its own"


Turn = tuple[str, str | None]
"""A question and its answer; None where the model is to answer."""


class Encoder(Protocol):
    """Takes markup apart and tokenises runs of text; see `phantom_jax.data.runs.RunEncoder`."""

    def split(self, markup: str) -> Sequence[str | Special]: ...

    def encode(self, text: str, opening: bool) -> Run: ...


@dataclasses.dataclass(frozen=True)
class Conversation:
    """One conversation in tokens, all arrays [n]."""

    token_ids: np.ndarray
    image_slots: np.ndarray
    """-1 for text, else which feature of the images this token stands for."""
    supervised: np.ndarray
    """Whether the token belongs to an answer or is the end marker of one."""
    answer_start: int
    """Index of the last answer's first token; the length if it is yet to come."""
    prefix_length: int
    """How many leading tokens other questions on the same images and history may begin with: up to the end of the last
    image or of the history, whichever is later; with neither, up to the end of the system text."""


class _Tokens:
    """Collects a conversation's tokens. Text is held back until a special token or an image ends the run."""

    def __init__(self, encoder: Encoder):
        self.ids: list[int] = []
        self.slots: list[int] = []
        self.supervised: list[bool] = []
        self._encoder = encoder
        self._text = ""
        self._answers: list[tuple[int, int]] = []
        self._places: list[tuple[int, int]] = []
        self._resolved: list[int] = []
        self._opening = True
        self._strip = False

    def markup(self, text: str, *, answer: bool = False) -> None:
        for part in self._encoder.split(text):
            if isinstance(part, Special):
                self.special(part, answer=answer)
            else:
                self.text(part, answer=answer)

    def begin(self, text: str) -> None:
        """What comes before the opening run of text without ending it."""
        self.markup(text)
        self._opening, self._strip = True, False

    def text(self, text: str, *, answer: bool = False) -> None:
        if self._strip and not self._text:
            text = text.lstrip(WHITESPACE)
        if answer and text:
            self._answers.append((len(self._text), len(self._text) + len(text)))
        self._text += text

    def special(self, token: Special, *, answer: bool = False, slots: Sequence[int] = (-1,)) -> None:
        """The token, once for each of the slots."""
        if token.strips_before:
            self._text = self._text.rstrip(WHITESPACE)
        if self._text or self._places or self._answers:
            self.end_run()
        count = len(slots)
        self.ids += [token.token_id] * count
        self.slots += slots
        self.supervised += [answer] * count
        self._opening, self._strip = False, token.strips_after

    def place(self) -> int:
        """Marks this place of the text; `resolve` tells how many tokens lie wholly before it."""
        self._places.append((len(self._resolved), len(self._text)))
        self._resolved.append(len(self.ids))
        return self._places[-1][0]

    def resolve(self, place: int) -> int:
        return self._resolved[place]

    def end_run(self) -> None:
        if self._text:
            run = self._encoder.encode(self._text, self._opening)
            for place, character in self._places:
                self._resolved[place] += bisect.bisect_right(run.ends, character)
            supervised = [False] * len(run.token_ids)
            for start, end in self._answers:
                overlap = slice(bisect.bisect_right(run.ends, start), bisect.bisect_left(run.starts, end))
                supervised[overlap] = [True] * len(supervised[overlap])
            self.ids += run.token_ids
            self.slots += [-1] * len(supervised)
            self.supervised += supervised
            self._text = ""
            self._opening = False
        self._answers.clear()
        self._places.clear()


def encode(
    turns: Sequence[Turn], features: Sequence[int], template: Template, encoder: Encoder, *, name: str = "the prompt"
) -> Conversation:
    """Turns a conversation into tokens: those of the whole text, in which only the template has special tokens.

    A token is supervised where it stands for a character of an answer. A prompt's tokens are the beginning of the
    answered conversation's, unless the tokenizer has a token that spans the end of the one and the answer.

    Args:
      turns: questions and answers; only the last answer may be None.
      features: for each image how many tokens it has.
      template: the text around the turns.
      encoder: see `Encoder`.
      name: what to call the conversation in an error.

    Raises:
      InputError: the number of `<image>` marks is neither zero nor the number of images.
    """
    marks = sum(question.count(IMAGE_MARK) for question, _ in turns)
    if marks and marks != len(features):
        kind = "more" if marks > len(features) else "fewer"
        raise InputError(
            f"{name} has {kind} {IMAGE_MARK} marks than images ({marks} marks, {len(features)} images). "
            f"Write one {IMAGE_MARK} for each image, or none to put all of them first."
        )
    tokens = _Tokens(encoder)
    (image_token,) = encoder.split(template.image_token)
    first_slot = list(itertools.accumulate(features, initial=0))
    shared: list[int] = []

    def add_image(index: int):
        tokens.markup(template.image_begin)
        tokens.special(image_token, slots=range(first_slot[index], first_slot[index + 1]))
        tokens.markup(template.image_end)
        shared.append(tokens.place())

    tokens.begin(template.begin)
    if template.system:
        tokens.markup(template.system)
        shared.append(tokens.place())
    placed = opening = 0
    for number, (question, answer) in enumerate(turns):
        if number and number + 1 == len(turns):
            shared.append(tokens.place())
        tokens.markup(template.user)
        if number == 0 and not marks and features:
            for index in range(len(features)):
                add_image(index)
            tokens.markup(template.after_image)
        for part, text in enumerate(question.split(IMAGE_MARK)):
            if part:
                add_image(placed)
                placed += 1
            if template.keep_question:
                tokens.text(text)
        tokens.markup(template.assistant)
        opening = tokens.place()
        if answer is not None:
            tokens.markup(template.answer_begin, answer=True)
            tokens.text(answer, answer=True)
            tokens.markup(template.answer_end, answer=True)
            if number + 1 < len(turns):
                tokens.markup(template.turn_end)
    tokens.end_run()
    return Conversation(
        np.array(tokens.ids, np.int32),
        np.array(tokens.slots, np.int32),
        np.array(tokens.supervised, bool),
        answer_start=tokens.resolve(opening),
        prefix_length=max(map(tokens.resolve, shared), default=0),
    )


@dataclasses.dataclass(frozen=True)
class Segment:
    """Conversations on the same images, laid out as a shared prefix and branches; fields as in `Batch`, each [n]."""

    token_ids: np.ndarray
    positions: np.ndarray
    branch_ids: np.ndarray
    image_slots: np.ndarray
    targets: np.ndarray
    sft_mask: np.ndarray
    answer_slots: np.ndarray

    def __len__(self) -> int:
        return len(self.token_ids)


def lay_out(pairs: Sequence[Sequence[Conversation]]) -> Segment:
    """Lays out pairs of conversations on the same images: the chosen one and, where there is one, the rejected one.

    What all of them begin with is written once, up to where the first last answer begins; the prefix's last token opens
    every branch. So a single question's chosen and rejected answers share the whole prompt, and several questions
    share the images. The final end marker is only ever a target.

    Args:
      pairs: pair k gets answer slots 2k + 1 (chosen) and 2k + 2 (rejected).
    """
    branches = [
        (conversation, 2 * k + 1 + rejected)
        for k, pair in enumerate(pairs)
        for rejected, conversation in enumerate(pair)
    ]
    # The token before the first difference must stand in every branch: it has several successors.
    opening = max(0, shared_length([conversation for conversation, _ in branches]) - 1)
    first = branches[0][0]
    parts = [_part(first, 0, opening, branch=0, slot=0, sft=True)]
    for branch, (conversation, slot) in enumerate(branches, start=1):
        end = len(conversation.token_ids) - 1
        parts.append(_part(conversation, opening, end, branch=branch, slot=slot, sft=slot % 2 == 1))
    return Segment(**{field.name: np.concatenate([part[field.name] for part in parts]) for field in _FIELDS})


_FIELDS = dataclasses.fields(Segment)


def shared_length(conversations: Sequence[Conversation]) -> int:
    """How many tokens all begin with, at most up to where the first last answer begins."""
    length = min(conversation.answer_start for conversation in conversations)
    first = conversations[0]
    for other in conversations[1:]:
        same = (first.token_ids[:length] == other.token_ids[:length]) & (
            first.image_slots[:length] == other.image_slots[:length]
        )
        length = length if same.all() else int(np.argmin(same))
    return length


def _part(conversation: Conversation, start: int, end: int, *, branch: int, slot: int, sft: bool) -> dict:
    """Tokens start to end (exclusive); the targets are those one further on."""
    following = slice(start + 1, end + 1)
    supervised = conversation.supervised[following]
    scored = supervised & (np.arange(start + 1, end + 1) >= conversation.answer_start)
    count = end - start
    return {
        "token_ids": conversation.token_ids[start:end],
        "positions": np.arange(start, end, dtype=np.int32),
        "branch_ids": np.full(count, branch, np.int32),
        "image_slots": conversation.image_slots[start:end],
        "targets": np.where(supervised, conversation.token_ids[following], IGNORE).astype(np.int32),
        "sft_mask": supervised & sft,
        "answer_slots": np.where(scored, slot, 0).astype(np.int32),
    }
