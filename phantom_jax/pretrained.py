"""The library in three lines: `load(path)`, `handle.generate(...)`, `save(handle, path, format=...)`."""

import dataclasses
import functools
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from phantom_jax.checkpoints import adapter_folder, model_folder
from phantom_jax.checkpoints.adapter import merge
from phantom_jax.checkpoints.arrays import layer_of, stack
from phantom_jax.checkpoints.hf import Checkpoint, Origin
from phantom_jax.checkpoints.hf_config import Published, TokenIds
from phantom_jax.checkpoints.relayout import in_layout
from phantom_jax.data.conversation import Turn
from phantom_jax.data.stop_strings import check_stops
from phantom_jax.data.text import AnswerText
from phantom_jax.errors import InputError
from phantom_jax.generation.engine import Engine
from phantom_jax.generation.settings import Settings
from phantom_jax.layouts import MODEL_LAYOUTS, check_name
from phantom_jax.models.decoder import unstack_layers
from phantom_jax.models.quantization import check_kind, quantize_kernel
from phantom_jax.models.vlm import VisionLanguageModel
from phantom_jax.processor import Processor, Prompt
from phantom_jax.sharding.mesh import make_mesh
from phantom_jax.sharding.parameters import place_parameters
from phantom_jax.sharding.placement import on_host
from phantom_jax.sharding.rules import DECODING, leaf_sharding, parameter_names
from phantom_jax.trees import flatten, unflatten

BATCH_SIZE = 32
"""Prompts that are answered at once where nothing else is said."""


@dataclasses.dataclass
class VisionLanguage:
    """A model with its weights and everything around it.

    Attributes:
      model: the Linen module, in its compute dtype, with `scan_layers=False`.
      params: nested dict of its arrays; each layer of the language model has its own.
      processor: tokenizer, template and tiles; None where the folder holds none.
      published: the outside layout it came from.
      tokens: special ids.
      unused: tensors that the published file holds and no computation uses.
      origin: what it was made from, as far as known.
      int8_cache: whether keys and values of past tokens are kept in 8 bits.
      mesh: the devices that weights and cache are split over; None for one device.
    """

    model: VisionLanguageModel
    params: dict[str, Any]
    processor: Processor | None
    published: Published
    tokens: TokenIds
    unused: Mapping[str, Any]
    origin: Origin = Origin()
    int8_cache: bool = False
    mesh: jax.sharding.Mesh | None = None

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        images: Sequence[Any] = (),
        history: Sequence[Turn] = (),
        batch_size: int = BATCH_SIZE,
        **settings: Any,
    ) -> Any:
        """Answers one question, or several.

        Args:
          prompt: a question, or a list of them. `<image>` says where an image stands; without it, images come first.
          images: paths, encoded bytes or open images, of all turns in order; for a list of questions, a list of such
            lists. What prompts have in common (images, history) is encoded and read once.
          history: earlier questions and answers; for one question only.
          batch_size: of a list of questions, how many are answered at once.
          **settings: fields of `generation.settings.Settings`.

        Returns:
          The answer, or one for each question. With `num_answers` above 1 each is a list.

        Raises:
          InputError: a setting is wrong, an image cannot be read, marks and images do not fit, or the prompt leaves no
            room in the context.
        """
        asked = self._settings(settings)
        _check_images(images)
        if isinstance(prompt, str):
            return self._answer([self._encode(prompt, images, history)], asked)[0]
        if not isinstance(prompt, list | tuple):
            raise InputError(f"prompt is {type(prompt).__name__}: give a question, or a list of questions")
        if history:
            raise InputError(f"{len(prompt)} prompts have no common history: ask them one by one")
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise InputError(f"batch_size is {batch_size!r}: set it to a whole number, 1 or more")
        if len(images) not in (0, len(prompt)):
            raise InputError(f"{len(prompt)} prompts need as many lists of images, got {len(images)}")
        answers: list[Any] = []
        for first in range(0, len(prompt), batch_size):
            batch = slice(first, first + batch_size)
            questions, pictures = prompt[batch], images[batch] or [()] * len(prompt[batch])
            encoded = [self._encode(question, item) for question, item in zip(questions, pictures, strict=True)]
            answers += self._answer(encoded, asked)
        return answers

    def stream(
        self, prompt: str, *, images: Sequence[Any] = (), history: Sequence[Turn] = (), **settings: Any
    ) -> Iterator[str]:
        """The answer to one question in pieces of whole code points; joined they are what `generate` returns.

        Arguments and errors as of `generate`. The prompt is checked at once, not when the first piece is asked for.

        Raises:
          InputError: also with beams, or with several answers.
        """
        asked = self._settings(settings)
        asked.check_streamable()
        tokens = self.engine.stream(self._encode(prompt, images, history), asked)
        return _pieces(tokens, self._text(asked))

    def _settings(self, given: Mapping[str, Any]) -> Settings:
        """The settings that are asked for, with the text that the template's turns end with as one more stop."""
        asked = Settings.of(given)
        end = self._processor().template.stop_text
        if not end:
            return asked
        stops = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop)
        return dataclasses.replace(asked, stop=tuple(dict.fromkeys((*stops, end))))

    def _encode(self, prompt: Any, images: Sequence[Any], history: Sequence[Turn] = ()) -> Prompt:
        _check_images(images)
        for turn in history:
            if not (isinstance(turn, tuple | list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)):
                raise InputError(f"history holds {turn!r}: give pairs of a question and its answer")
        if not isinstance(prompt, str):
            raise InputError(f"prompt is {type(prompt).__name__}: give a question as text")
        if not prompt.strip() and not images:
            raise InputError(f"prompt is {prompt!r}, and there is no image: ask something")
        for text in (prompt, *(text for turn in history for text in turn)):
            if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
                raise InputError(f"{text[:40]!r} holds half a surrogate pair, which is no text: decode it as UTF-8")
        return self._processor().encode_prompt(prompt, images, history=history)

    def _answer(self, prompts, settings: Settings) -> list[Any]:
        texts = []
        for answers in self.engine.answer(prompts, settings):
            whole = ["".join(_pieces([tokens], self._text(settings))) for tokens in answers]
            texts.append(whole if settings.num_answers > 1 else whole[0])
        return texts

    def _text(self, settings: Settings) -> AnswerText:
        """What turns the tokens of one answer into text."""
        processor = self._processor()
        stops, stop_ids = check_stops(settings.stop, processor.tokenizer)
        end_ids = {*self._end_ids, *stop_ids}
        return AnswerText(processor.token_bytes, end_ids=end_ids, stops=stops, min_new_tokens=settings.min_new_tokens)

    def _processor(self) -> Processor:
        if self.processor is None:
            raise InputError("the model has no tokenizer: load a folder with tokenizer files")
        return self.processor

    @property
    def _end_ids(self) -> tuple[int, ...]:
        return tuple(sorted({*self.tokens.eos, self._processor().end_id}))

    @functools.cached_property
    def engine(self) -> Engine:
        """What generates; holds the prefixes that later prompts may share."""
        return Engine(
            self.model,
            self.params,
            self._processor(),
            end_ids=self._end_ids,
            int8_cache=self.int8_cache,
            mesh=self.mesh,
        )

    def checkpoint(self) -> Checkpoint:
        """The model at rest, its layers stacked; parts come to host memory when they are read."""
        params = jax.tree.map(on_host, self.params)
        params["language_model"] = _stack_layers(params["language_model"])
        return Checkpoint(self.model.config, params, self.unused, self.published, self.tokens, self.origin)


def _stack_layers(params: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `unstack_layers`; nothing is read."""
    params = dict(params)
    count = sum(name.startswith("layers_") for name in params)
    layers = [flatten(params.pop(f"layers_{index}")) for index in range(count)]
    stacked = {
        path: jax.tree.map(lambda *arrays: stack(arrays), *(layer[path] for layer in layers)) for path in layers[0]
    }
    return params | {"layers": unflatten(stacked)}


def _pieces(tokens: Iterable[np.ndarray], text: AnswerText) -> Iterator[str]:
    """The text of one answer, whose tokens come some at a time."""
    for some in tokens:
        piece = text.push(some)
        if piece:
            yield piece
    piece = text.finish()
    if piece:
        yield piece


def _check_images(images: Any) -> None:
    if isinstance(images, str | bytes | os.PathLike):
        raise InputError("images is one image: give a list of them, images=[path] for instance")


def load(
    path: str | os.PathLike[str],
    *,
    dtype: Any = None,
    adapter: str | os.PathLike[str] | None = None,
    template: str | None = None,
    quantize: str | None = None,
    int8_cache: bool = False,
    mesh: Mapping[str, int] | None = None,
) -> VisionLanguage:
    """Loads a model folder, ours or a Hugging Face one; the layout is recognised by its content.

    Args:
      path: the folder.
      dtype: of the computation; by default that of the embedding as stored, bfloat16 for float16.
      adapter: folder of a LoRA adapter, PEFT's, LLaVA's or ours, that is worked into the weights as they are read.
      template: name of the conversation template of a published folder; by default for a Phantom that of its language
        model, for a LLaVA `vicuna_v1`. A folder that was saved with a template takes no other one.
      quantize: `int8` or `nf4`, for the weights of the language model's layers; None leaves them as they are.
      int8_cache: keep keys and values of past tokens in 8 bits, each head with a scale of its own.
      mesh: sizes of mesh axes over which weights and cache are split, {"tensor": 8} for instance; None: one device.

    Raises:
      InputError: there is no model in the folder, it is not complete, it has another template, or there is no such
        template, quantisation or mesh.
    """
    devices = None if mesh is None else _decoding_mesh(mesh)
    if quantize is not None:
        check_kind(quantize)
    checkpoint, processor = model_folder.read(path, template=template)
    if adapter is not None:
        change = adapter_folder.read(adapter, checkpoint.description)
        change.check_template(processor)
        checkpoint = merge(checkpoint, change)
    params = checkpoint.params
    if dtype is None:
        stored = params["language_model"]["embedding"].dtype
        # float16 overflows where these models were trained in bfloat16.
        dtype = jnp.bfloat16 if stored == jnp.float16 else stored
    params = {**params, "language_model": unstack_layers(params["language_model"], layer_of)}
    model = VisionLanguageModel(checkpoint.config, dtype, scan_layers=False)
    return VisionLanguage(
        model,
        place_parameters(
            params,
            None
            if devices is None
            else functools.partial(leaf_sharding, names=parameter_names(model), mesh=devices, rules=DECODING),
            quantize=None if quantize is None else lambda path, array: quantize_kernel(path, array, quantize),
        ),
        processor,
        checkpoint.published,
        checkpoint.tokens,
        # Read now: the folder may be gone when this is saved.
        jax.tree.map(np.asarray, checkpoint.unused),
        checkpoint.origin,
        int8_cache,
        devices,
    )


def save(handle: VisionLanguage, path: str | os.PathLike[str], *, format: str = "ours") -> None:
    """Writes a model folder; it appears complete or not at all.

    Args:
      handle: what to write.
      path: a new or empty folder.
      format: `ours`, `phantom`, `llava-hf` or `llava-original`.

    Raises:
      InputError: the folder holds something, or the format cannot express the model.
    """
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(handle.params) if isinstance(leaf, jax.Array)):
        raise InputError("the weights lie on devices of several processes: load and save where one process has all")
    checkpoint, processor = handle.checkpoint(), handle.processor
    if format != "ours":
        check_name("format", format, MODEL_LAYOUTS)
        checkpoint, processor = in_layout(checkpoint, processor, format)
    model_folder.write(checkpoint, processor, path, format=format)


def _decoding_mesh(shape: Mapping[str, int]) -> jax.sharding.Mesh:
    mesh = make_mesh(shape)
    useful = {target for _, target in DECODING}
    useless = [name for name, size in mesh.shape.items() if size > 1 and name not in useful]
    if useless:
        raise InputError(
            f"generation splits nothing over mesh axis {useless[0]!r}, each of its devices would do the same work: use "
            f"{', '.join(sorted(useful))}"
        )
    return mesh
