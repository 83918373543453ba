"""Data sets as records: TFDS builders that write ArrayRecord and never load TensorFlow."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from phantom_jax.data import handwritten_numbers
from phantom_jax.data.number_questions import write_questions

LAYOUTS = ((1, 1), *((count, rows) for count in range(2, 7) for rows in (1, 2)))
"""(digits, rows) of an image. Each row count of a digit count is equally frequent, and so is each digit count."""


@dataclasses.dataclass
class NumbersConfig(tfds.core.BuilderConfig):
    """How many images each split has: multiples of 12, so that the shares of the layouts are exact."""

    images: dict[str, int] = dataclasses.field(default_factory=dict)


class HandwrittenNumbers(tfds.core.GeneratorBasedBuilder):
    """Numbers of one to six digits in one or two rows, with questions about them.

    Images by split: 18,000 for training, whose digits are augmented, 240 for validation and 300 for testing, plain. A
    sixth of each has 1 digit, a sixth 2 and so on; from 2 digits on half has one row and half has two.
    `number_questions` says what is asked.
    """

    name = "handwritten_numbers"
    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = (
        NumbersConfig(name="full", images={"train": 18_000, "validation": 240, "test": 300}),
        NumbersConfig(name="tiny", images={"train": 240, "validation": 24, "test": 24}, description="To try things."),
    )
    url_infos = {}
    """Nothing is downloaded. Left to itself, TFDS looks for checksums with a package that it does not require."""

    def _info(self) -> tfds.core.DatasetInfo:
        question = {key: tfds.features.Text() for key in ("kind", "question", "chosen", "rejected")}
        return tfds.core.DatasetInfo(
            builder=self,
            description=" ".join(self.__doc__.split()),
            homepage="https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            citation="E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten Digits, 1998.",
            features=tfds.features.FeaturesDict(
                {
                    "id": tfds.features.Text(),
                    "image": tfds.features.Image(shape=(None, None, 1), dtype=np.uint8, encoding_format="png"),
                    "digits": tfds.features.Sequence(np.int32),
                    "rows": np.int32,
                    "questions": tfds.features.Sequence(question),
                }
            ),
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager) -> dict[str, Iterator]:
        scans, labels = handwritten_numbers.load_scans()
        splits = handwritten_numbers.split_scans(labels)
        return {
            split: self._generate_examples(split, scans[indices], labels[indices]) for split, indices in splits.items()
        }

    def _generate_examples(self, split: str, scans: np.ndarray, labels: np.ndarray) -> Iterator[tuple[int, dict]]:
        images = self.builder_config.images[split]
        rng = np.random.default_rng([0, list(self.builder_config.images).index(split)])
        weights = [2 if count == 1 else 1 for count, _ in LAYOUTS]
        shapes = np.repeat(np.array(LAYOUTS), np.array(weights) * (images // sum(weights)), axis=0)
        shapes = rng.permutation(shapes)
        dealt = handwritten_numbers.deal(int(shapes[:, 0].sum()), len(scans), rng)
        cells = handwritten_numbers.enlarge(scans)[dealt]
        if split == "train":
            cells = handwritten_numbers.augment(cells, rng)
        start = 0
        for index, (count, rows) in enumerate(shapes.tolist()):
            part = slice(start, start + count)
            start += count
            digits = labels[dealt[part]].tolist()
            yield (
                index,
                {
                    "id": f"{split}-{index:05d}",
                    "image": handwritten_numbers.compose(cells[part], rows),
                    "digits": digits,
                    "rows": rows,
                    "questions": write_questions(digits, rows, rng),
                },
            )
