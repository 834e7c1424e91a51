"""CLIP image similarity and CLIPScore, with transformers' model and pictures prepared as its image processor does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from intaglio.bench.learned import LearnedMetric, Pinned
from intaglio.bench.learned_pictures import FILTERS, Resize, standardized, tensor
from intaglio.profiles.errors import UsageError
from intaglio.profiles.registry import need
from intaglio.profiles.strict import from_dict, parse_json

BUFFERS = ("text_model.embeddings.position_ids", "vision_model.embeddings.position_ids")  # of older files; constants
MODELS = {  # model_type of config.json to the classes of its configuration and its model
    "clip": ("CLIPConfig", "CLIPModel"),
    "clip_vision_model": ("CLIPVisionConfig", "CLIPVisionModelWithProjection"),
}


@dataclass(frozen=True)
class Options:
    """The kinds have no keys of their own: sizes and filter are those of ``preprocessor_config.json``."""


@dataclass(frozen=True)
class Preprocessor:
    """The keys of ``preprocessor_config.json`` of a CLIP; another key, which might change the picture, is refused.

    Raises:
        UsageError: a step is off, or a size is not of the kind that CLIP has.
    """

    image_mean: tuple[float, ...]
    image_std: tuple[float, ...]
    size: int | Mapping[str, int]
    crop_size: int | Mapping[str, int]
    resample: int = 3
    do_resize: bool = True
    do_center_crop: bool = True
    do_rescale: bool = True
    rescale_factor: float = 1 / 255
    do_normalize: bool = True
    do_convert_rgb: bool = True
    feature_extractor_type: str = ""
    image_processor_type: str = ""

    def __post_init__(self) -> None:
        """Refuse what CLIP does not do."""
        steps = (self.do_resize, self.do_center_crop, self.do_rescale, self.do_normalize)
        sizes = isinstance(self.size, int) or set(self.size) == {"shortest_edge"}
        crops = isinstance(self.crop_size, int) or set(self.crop_size) == {"height", "width"}
        square = isinstance(self.crop_size, int) or len(set(self.crop_size.values())) == 1
        whole = abs(self.rescale_factor * 255 - 1) < 1e-6 and len(self.image_mean) == len(self.image_std) == 3
        if not (all(steps) and sizes and crops and square and whole and self.resample in FILTERS.values()):
            raise UsageError("expected the shorter side resized, a square crop, 1/255 and mean and std of RGB")
        if self.side > self.short:
            raise UsageError(f"a crop of {self.side} pixels does not fit into a shorter side of {self.short}")

    @property
    def short(self) -> int:
        """Pixels of the shorter side after resizing."""
        return self.size if isinstance(self.size, int) else self.size["shortest_edge"]

    @property
    def side(self) -> int:
        """Pixels of the square in the middle that the model sees."""
        return self.crop_size if isinstance(self.crop_size, int) else self.crop_size["height"]

    @property
    def resize(self) -> Resize:
        """The resize rule."""
        name = next(name for name, number in FILTERS.items() if number == self.resample)
        return Resize(f"short {self.short} {name}")

    def __call__(self, picture: np.ndarray) -> Any:
        """uint8 [H, W, 3] as float32 [1, 3, side, side]."""
        resized = self.resize(picture)
        top, left = ((length - self.side) // 2 for length in resized.shape[:2])
        middle = resized[top : top + self.side, left : left + self.side]
        return standardized(tensor(middle), self.image_mean, self.image_std)


def table(files: Pinned, name: str) -> dict[str, Any]:
    """The JSON object of the one pinned file `name`.

    Raises:
        UsageError: it is not there, altered, or no JSON object.
    """
    file = files.named(name)
    try:
        data = parse_json(files.read(file))
    except ValueError as error:
        raise UsageError(f"{files.where}: {file} cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise UsageError(f"{files.where}: {file} is no JSON object")
    return data


def model_of(files: Pinned, kinds: tuple[str, ...]) -> Any:
    """The CLIP of ``config.json`` and the safetensors files, float32, for inference.

    It is built from the configuration and filled from pinned bytes, so no file is looked for anywhere.

    Raises:
        UsageError: another kind of model, or tensors are missing or unknown.
        MissingDependency: transformers or torch is not installed.
    """
    transformers = need("transformers", extra="export")
    data = table(files, "config.json")
    kind = data.get("model_type")
    if kind not in kinds:
        raise UsageError(f"{files.where}: config.json has model_type {kind!r}; allowed: {', '.join(kinds)}")
    config, model = (getattr(transformers, name) for name in MODELS[kind])
    with need("torch", extra="export").random.fork_rng(devices=[]):  # the start values use up nobody's random numbers
        made = model(config(**data)).float().eval()
    state = {name: value for name, value in files.tensors().items() if name not in BUFFERS}
    try:
        found = made.load_state_dict(state, strict=False)
    except RuntimeError as error:  # of shapes; the text has one line a tensor
        raise UsageError(f"{files.where}: {' '.join(str(error).split())}") from error
    for names, what in ((found.missing_keys, "is missing"), (found.unexpected_keys, "is unknown")):
        if names:
            raise UsageError(f"{files.where}: tensor {names[0]} {what}")
    return made


class ClipImage(LearnedMetric):
    """Cosine of the two pictures' CLIP embeddings; 1 for identical pictures.

    Files: ``DIR/config.json``, ``DIR/preprocessor_config.json`` and the safetensors of a CLIPModel or a
    CLIPVisionModelWithProjection. Source: Radford et al., Learning Transferable Visual Models, ICML 2021.
    """

    Options: ClassVar[type[Any]] = Options
    SUFFIXES: ClassVar[tuple[str, ...]] = (".safetensors", ".json")
    higher_is_better: ClassVar[bool] = True
    models: ClassVar[tuple[str, ...]] = tuple(MODELS)

    def load(self) -> None:
        """Build the model."""
        preprocessor = table(self.files, "preprocessor_config.json")
        self.prepare = from_dict(Preprocessor, preprocessor, self.files.where, error=UsageError)
        self.model = model_of(self.files, self.models)
        self.vision = getattr(self.model.config, "vision_config", self.model.config)
        if self.vision.image_size != self.prepare.side:
            message = f"the model sees {self.vision.image_size} pixels, the crop has {self.prepare.side}"
            raise UsageError(f"{self.files.where}: {message}")

    @property
    def extractor(self) -> str:
        """The vision transformer: layers x width, patch."""
        vision = self.vision
        return f"CLIP ViT {vision.num_hidden_layers}x{vision.hidden_size}/{vision.patch_size}"

    @property
    def resize_rule(self) -> str:
        """The resize rule and the crop."""
        return f"{self.prepare.resize}, crop {self.prepare.side}"

    def _embed(self, picture: np.ndarray) -> Any:
        """The picture's embedding, float32 [D], of length 1."""
        pooled = self.model.vision_model(pixel_values=self.prepare(picture)).pooler_output
        found = self.model.visual_projection(pooled)[0]
        return found / found.norm()

    def _measure(self, image: np.ndarray, reference: np.ndarray, prompt: str | None) -> float:
        torch = need("torch", extra="export")
        with torch.inference_mode():
            return float(self._embed(image) @ self._embed(reference))


class ClipScore(ClipImage):
    """``max(100 cos, 0)`` of the picture's and its prompt's embeddings; the reference is not looked at.

    Files: those of a CLIPModel, and ``DIR/tokenizer.json``. Source: Hessel et al., CLIPScore, EMNLP 2021, equation 1,
    with 100 in the place of its 2.5, as torchmetrics and others print it. Scores of two models are not comparable.
    """

    needs_prompt: ClassVar[bool] = True
    models: ClassVar[tuple[str, ...]] = ("clip",)

    def load(self) -> None:
        """Build model and tokenizer."""
        super().load()
        from tokenizers import Tokenizer

        file = self.files.named("tokenizer.json")
        try:
            self.tokenizer = Tokenizer.from_str(self.files.read(file).decode("utf-8"))
        except UsageError:
            raise
        except Exception as error:  # tokenizers raises bare Exception
            raise UsageError(f"{self.files.where}: {file} is no tokenizer ({error})") from error
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()

    def _measure(self, image: np.ndarray, reference: np.ndarray, prompt: str | None) -> float:
        torch = need("torch", extra="export")
        if prompt is None:
            raise UsageError(f"{self.key} compares a picture with its prompt; there is none")
        ids = self.tokenizer.encode(prompt).ids
        longest = self.model.config.text_config.max_position_embeddings
        if len(ids) > longest:
            raise UsageError(f"{self.key}: the prompt has {len(ids)} tokens, CLIP reads {longest}: {prompt[:60]!r}")
        with torch.inference_mode():
            pooled = self.model.text_model(input_ids=torch.tensor([ids])).pooler_output
            text = self.model.text_projection(pooled)[0]
            return max(100 * float(self._embed(image) @ (text / text.norm())), 0.0)
