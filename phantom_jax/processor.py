"""From questions and images to what a model reads, and from its tokens back to text."""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence

import numpy as np
import tokenizers

from phantom_jax.data import conversation, tiles
from phantom_jax.data.conversation import Conversation, Template, Turn, template_names
from phantom_jax.data.runs import RunEncoder
from phantom_jax.data.text import answer_text
from phantom_jax.data.tokenizer import TOKENIZER, load_tokenizer, pad_token, save_tokenizer, token_bytes
from phantom_jax.errors import InputError
from phantom_jax.json_files import read_json, write_json

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

CONFIG = "phantom_jax_processor.json"
"""The name is our own: other libraries have a processor_config.json."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One question with its images, ready to be answered.

    Attributes:
      token_ids: [n] int32.
      image_slots: [n] int32, -1 for text, else an index into the features of `tiles`, tile by tile.
      tiles: [T, H, W, 3] uint8.
      prefix_length: how many leading tokens other prompts may share with this one. They reach to the end of the last
        image or of the history, whichever is later; with neither, to the end of the system text. Where the images do
        not stand inside the last question, these tokens do not depend on it. All tiles belong to them.
    """

    token_ids: np.ndarray
    image_slots: np.ndarray
    tiles: np.ndarray
    prefix_length: int


@dataclasses.dataclass(frozen=True)
class Processor:
    """Tokenizer, template and tiling of one model.

    Attributes:
      tokenizer: the fast tokenizer; the template's special tokens must be in it.
      template: the text around the turns of a conversation.
      tile_size: edge of a tile in pixels.
      max_tiles: most tiles of an image, not counting the thumbnail.
      tokens_per_tile: how many features the projector makes of a tile.
      max_length: the context: most tokens of one conversation, its answer included.
      mean, std: by which pixels (from 0 to 1) are normalised, for each channel.
      image_mode: how an image becomes tiles, one of `tiles.IMAGE_MODES`; `crop` and `pad` make one tile of it.
    """

    tokenizer: tokenizers.Tokenizer
    template: Template
    tile_size: int
    max_tiles: int
    tokens_per_tile: int
    max_length: int
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    image_mode: str = "tiles"

    def __post_init__(self):
        if self.image_mode not in tiles.IMAGE_MODES:
            raise InputError(f"image_mode is {self.image_mode!r}; it must be one of {', '.join(tiles.IMAGE_MODES)}.")
        for token in self.template.tokens:
            if self.tokenizer.token_to_id(token) is None:
                raise InputError(
                    f"The tokenizer does not have the template's token {token!r}. "
                    "Set the template to the one that the tokenizer was made for."
                )

    @property
    def image_token_id(self) -> int:
        return self.tokenizer.token_to_id(self.template.image_token)

    @property
    def end_id(self) -> int:
        """The token that ends an answer."""
        return self.tokenizer.token_to_id(self.template.end_token)

    @property
    def pad_id(self) -> int:
        return self.tokenizer.token_to_id(pad_token(self.tokenizer) or self.template.end_token)

    @functools.cached_property
    def encoder(self) -> RunEncoder:
        return RunEncoder(self.tokenizer, self.template.tokens)

    def tile_count(self, width: int, height: int) -> int:
        """Number of tiles of an image of so many pixels."""
        if self.image_mode != "tiles":
            return 1
        return tiles.tile_count(width, height, tile_size=self.tile_size, max_tiles=self.max_tiles)

    def encode_image(self, image: tiles.Source, name: str | None = None) -> np.ndarray:
        """Opens an image and makes [T, tile_size, tile_size, 3] uint8 tiles of it.

        Raises:
          InputError: as in `tiles.open_image`, or its shape is too extreme for the image mode.
        """
        opened = tiles.open_image(image, name)
        if self.image_mode == "tiles":
            return tiles.split_tiles(opened, tile_size=self.tile_size, max_tiles=self.max_tiles)
        name = name or "The image"
        if self.image_mode == "pad":
            opened = tiles.pad_square(opened, color=[int(255 * mean) for mean in self.mean], name=name)
        return tiles.crop_square(opened, tile_size=self.tile_size, name=name)

    def encode_conversation(
        self, turns: Sequence[Turn], tile_counts: Sequence[int], *, name: str = "The prompt"
    ) -> Conversation:
        """Tokens of a conversation about images with that many tiles each.

        Raises:
          InputError: it is longer than the context, or its `<image>` marks do not fit the images. Nothing is ever cut.
        """
        features = [count * self.tokens_per_tile for count in tile_counts]
        encoded = conversation.encode(turns, features, self.template, self.encoder, name=name)
        length = len(encoded.token_ids)
        if length > self.max_length:
            raise InputError(
                f"{name} has {length} tokens, {sum(features)} of them for images; the context is {self.max_length}. "
                "Shorten it, give fewer or smaller images, or set processor.max_length higher."
            )
        return encoded

    def encode_prompt(
        self, question: str, images: Sequence[tiles.Source] = (), *, history: Sequence[tuple[str, str]] = ()
    ) -> Prompt:
        """Everything up to where the answer to `question` begins.

        Args:
          question: what the user says. `<image>`, here or in a question of the history, says where an image stands;
            without any of these marks, all images come before the first question.
          images: encoded bytes, paths or open images, for all turns, in the order of the marks.
          history: earlier questions and answers.

        Raises:
          InputError: as in `encode_conversation` and `tiles.open_image`.
        """
        cut = [self.encode_image(image) for image in images]
        encoded = self.encode_conversation([*history, (question, None)], [len(image) for image in cut])
        empty = np.zeros((0, self.tile_size, self.tile_size, 3), np.uint8)
        return Prompt(
            encoded.token_ids, encoded.image_slots, np.concatenate([empty, *cut]), prefix_length=encoded.prefix_length
        )

    @functools.cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """What each token adds to a text, by id."""
        return token_bytes(self.tokenizer)

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of an answer, up to its end marker, stripped."""
        return answer_text(token_ids, self.token_bytes, end_ids=(self.end_id,))

    def save(self, directory: str | os.PathLike) -> None:
        """Writes the tokenizer in Hugging Face format, and phantom_jax_processor.json."""
        save_tokenizer(
            self.tokenizer, directory, end_of_answer=self.template.end_token, begin_of_text=self.template.begin
        )
        config = {
            field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "tokenizer"
        }
        config["template"] = dataclasses.asdict(self.template)
        config["template_names"] = template_names(self.template)
        config["tokenizer_sha256"] = _tokenizer_hash(directory)
        write_json(pathlib.Path(directory) / CONFIG, config)

    @classmethod
    def load(cls, directory: str | os.PathLike) -> "Processor":
        """Reads what `save` wrote.

        Raises:
          InputError: a file is missing or does not hold a processor, or the tokenizer is another one than was saved.
        """
        path = pathlib.Path(directory) / CONFIG
        if not path.is_file():
            raise InputError(f"There is no {path}. Give a folder that a model was saved to.")
        try:
            config = read_json(path)
            config["template"] = Template(**config["template"])
            config["mean"], config["std"] = tuple(config["mean"]), tuple(config["std"])
            # They are there to be read.
            del config["template_names"]
            saved = config.pop("tokenizer_sha256")
            tokenizer = load_tokenizer(directory)
            found = _tokenizer_hash(directory)
            if found != saved:
                raise InputError(
                    f"{pathlib.Path(directory) / TOKENIZER} is not the tokenizer that the model was saved with: its "
                    f"SHA-256 is {found}, {path} says {saved}. Put the file back that was saved beside it."
                )
            return cls(tokenizer=tokenizer, **config)
        except (KeyError, TypeError) as error:
            raise InputError(f"{path} does not describe a processor: {error!r}. Save the model again.") from error


def _tokenizer_hash(directory: str | os.PathLike) -> str:
    return hashlib.sha256((pathlib.Path(directory) / TOKENIZER).read_bytes()).hexdigest()
