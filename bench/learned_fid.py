"""The Frechet distance of two sets of pictures in the features of a network that the user gives as an ONNX file."""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.bench.learned import LearnedMetric, check
from intaglio.bench.learned_pictures import Resize
from intaglio.profiles.errors import NumericsError, UsageError
from intaglio.profiles.registry import need, pick

FEWEST = 2048  # pictures a side, as many as Inception has features; below, the covariance is singular
INPUTS = {"uint8": "tensor(uint8)", "float32": "tensor(float)"}


@dataclass(frozen=True)
class Options:
    """Keys of the table.

    Attributes:
        extractor: name of the network, to be printed.
        input: ``uint8`` (0..255) or ``float32``, both [B, 3, H, W].
        resize: the rule; see `Resize`.
        range: what 0 and 255 become where the input is float32.
        batch: pictures a run.
        minimum: fewest pictures a side.

    Raises:
        UsageError: a value is not allowed.
    """

    extractor: str
    input: str
    resize: str
    range: tuple[float, ...] = ()
    batch: int = 32
    minimum: int = FEWEST

    def __post_init__(self) -> None:
        """Refuse what would be another metric than the one declared."""
        pick(INPUTS, self.input, "input")
        Resize(self.resize)
        if (self.input == "float32") != (len(self.range) == 2):
            raise UsageError("range = [low, high] goes with input = 'float32', and only with it")
        if self.batch < 1 or self.minimum < 2:
            raise UsageError(f"batch {self.batch} and minimum {self.minimum}; allowed: 1 or more, and 2 or more")


@dataclass(slots=True)
class Moments:
    """Mean [D] and sum of centred outer products [D, D] of features that come in batches, in float64.

    Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def of(cls, features: np.ndarray) -> Moments:
        """Of one batch [B, D]."""
        values = features.astype(np.float64)
        mean = values.mean(0)
        return cls(len(values), mean, (values - mean).T @ (values - mean))

    def __add__(self, other: Moments) -> Moments:
        """Of both together."""
        count = self.count + other.count
        apart = other.mean - self.mean
        scatter = self.scatter + other.scatter + np.outer(apart, apart) * (self.count * other.count / count)
        return Moments(count, self.mean + apart * (other.count / count), scatter)

    @property
    def covariance(self) -> np.ndarray:
        """The unbiased one, [D, D]."""
        return self.scatter / (self.count - 1)


def frechet(a: Moments, b: Moments) -> float:
    """``|ma - mb|^2 + tr(A + B - 2 (A B)^(1/2))`` of means m and covariances A, B.

    The eigenvalues of A B are those of the symmetric ``A^(1/2) B A^(1/2)``, so no complex root is taken; small
    negative ones are rounding and count as 0. Sources: Dowson, Landau, The Frechet Distance between Multivariate
    Normal Distributions, 1982; Heusel et al., GANs Trained by a Two Time-Scale Update Rule, NeurIPS 2017, equation 6.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(np.maximum(values, 0))) @ vectors.T
    product = np.linalg.eigvalsh(root @ b.covariance @ root)
    trace = np.trace(a.covariance) + np.trace(b.covariance) - 2 * np.sqrt(np.maximum(product, 0)).sum()
    return float(np.sum((a.mean - b.mean) ** 2) + trace)


class Fid(LearnedMetric):
    """FID in the sense of its formula; what it is comparable with depends on extractor, resize rule and N.

    The extractor is one ONNX file without external data: one input [B, 3, H, W], one output [B, D] or [B, D, 1, 1].
    """

    Options: ClassVar[type[Any]] = Options
    SUFFIXES: ClassVar[tuple[str, ...]] = (".onnx",)
    higher_is_better: ClassVar[bool] = False
    of_sets: ClassVar[bool] = True

    def load(self) -> None:
        """Load the extractor from the bytes that were compared with the digest, so external data is refused."""
        onnxruntime = need("onnxruntime", extra="onnxruntime")
        self.resize = Resize(self.options.resize)
        where, file = self.files.where, self.files.named(".onnx")
        data = self.files.read(file)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own errors share no base
            raise UsageError(f"{where}: {file} cannot be loaded ({str(error).splitlines()[0]})") from error
        inputs, outputs = self.session.get_inputs(), self.session.get_outputs()
        if len(inputs) != 1 or len(outputs) != 1 or inputs[0].type != INPUTS[self.options.input]:
            found = f"{[x.type for x in inputs]} and {len(outputs)} outputs"
            raise UsageError(f"{where}: {file} has inputs {found}; wanted: one {self.options.input} and one output")
        self.input = inputs[0].name

    @property
    def extractor(self) -> str:
        """The declared name of the network."""
        return str(self.options.extractor)

    @property
    def resize_rule(self) -> str:
        """The resize rule and the fewest pictures."""
        return f"{self.resize}, N >= {self.options.minimum}"

    def label(self, images: int, references: int) -> str:
        """The name of one measurement, which carries both N: FID is biased by it (Chong, Forsyth, CVPR 2020)."""
        return f"{self.key} ({self.extractor}, {self.files.digest}, {self.resize}, N = {images} and {references})"

    def measure_sets(self, images: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
        """The distance, 0 for equal sets. Errors as the base class."""
        for what, pictures in (("judged", images), ("reference", references)):
            if len(pictures) < self.options.minimum:
                message = f"{self.key} of {len(pictures)} {what} pictures; needs {self.options.minimum} or more"
                raise UsageError(f"{message} (minimum in {self.files.where})")
        shape = self.resize(images[0]).shape
        value = frechet(self.moments(images, shape), self.moments(references, shape))
        if not np.isfinite(value):
            raise NumericsError(f"{self.name} is {value}; look for NaN in its features")
        return value

    def moments(self, pictures: Sequence[np.ndarray], shape: tuple[int, ...]) -> Moments:
        """Of the features of one set, which is read a batch at a time. Errors as `measure_sets`."""
        parts = []
        for start in range(0, len(pictures), self.options.batch):
            chosen = [pictures[i] for i in range(start, min(start + self.options.batch, len(pictures)))]
            parts.append(Moments.of(self.features(chosen, shape)))
        return functools.reduce(operator.add, parts)

    def features(self, pictures: Sequence[np.ndarray], shape: tuple[int, ...]) -> np.ndarray:
        """The extractor's output, float32 [B, D], of pictures that have this shape once they are resized."""
        for picture in pictures:
            check(picture)
        resized = [self.resize(picture) for picture in pictures]
        if others := {x.shape for x in resized} - {shape}:
            message = f"{self.key}: pictures of shapes {shape} and {sorted(others)[0]}"
            raise UsageError(f"{message}; give them one with resize = 'square 299 bicubic' or the extractor's own rule")
        batch = np.stack(resized).transpose(0, 3, 1, 2)
        if self.options.range:
            low, high = self.options.range
            batch = (batch * ((high - low) / 255) + low).astype(np.float32)
        found = self.session.run(None, {self.input: np.ascontiguousarray(batch)})[0]
        features: np.ndarray = found.reshape(len(pictures), -1)
        if not np.isfinite(features).all():
            raise NumericsError(f"{self.name}: the extractor returned NaN or infinity")
        return features
