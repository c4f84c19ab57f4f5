"""Features that FID and KID are computed in."""

import hashlib
import pickle
import re
import time
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn

from bd_lightning.checks import UserError, positive
from bd_lightning.progress import bar
from callbacks.vision_transformer import VisionTransformer
from datamodules.cache import cache_path, load_cached, sampled, save_cached
from datamodules.images import ImageDataModule, to_unit


class ImageFeatures(nn.Module):
    """Base: maps bytes (B, C, H, W) to features (B, num_features).

    Attributes:
        num_features: size of a feature vector.
        description: what is written beside every number computed with these features.
        key: identifies the features in caches: change it whenever the features change.
        kid_scale: features are divided by it for KID, whose cubic kernel is not free of scale.
    """

    num_features: int
    description: str
    key: tuple
    kid_scale: float = 1.0
    heed: Callable[[], None] = staticmethod(lambda: None)
    """Called between the steps of what takes long to prepare; it may raise, to end it. Callbacks set it."""

    def check(self, data: ImageDataModule) -> None:
        """Refuse what can be refused before a run begins; nothing by itself. Called on every rank, on rank 0 first.

        Raises:
            UserError: if these features cannot be had for this data.
        """

    @abstractmethod
    def prepare(self, data: ImageDataModule) -> None:
        """Load or train what the features need, when they are first needed. Called on every rank, on rank 0 first.

        Raises:
            UserError: as `check`.
        """

    @property
    def protocol(self) -> str:
        """What files of statistics are told apart by; how it begins is known before the features are."""
        return " ".join(map(str, self.key))

    @property
    def facts(self) -> dict[str, float]:
        """Numbers about the features themselves, for the log."""
        return {}


def refuse_untold(features: ImageFeatures) -> None:
    """Refuse features that do not say what they are, and what they are told apart by.

    Raises:
        ValueError: naming the first that is missing.
    """
    for name in ("num_features", "description", "key"):
        if getattr(features, name, None) is None:
            raise ValueError(
                f"features: {type(features).__name__} must say its {name}, as callbacks.features.ImageFeatures"
            )


def features_of(features: ImageFeatures, images: Tensor) -> Tensor:
    """Features (B, num_features) of bytes (B, C, H, W).

    Raises:
        UserError: if they are of another shape, not finite, or no tensor.
    """
    rows = features(images)
    shape, name = (len(images), features.num_features), type(features).__name__
    if not isinstance(rows, Tensor) or tuple(rows.shape) != shape:
        got = f"the shape {list(rows.shape)}" if isinstance(rows, Tensor) else f"a {type(rows).__name__}"
        raise UserError(f"{name} of {len(images)} images must be a tensor of the shape {list(shape)}, got {got}")
    if not rows.isfinite().all():
        raise UserError(f"{name} gave features that are not finite, of images of bytes: mend it")
    return rows


class ClassifierFeatures(ImageFeatures):
    """The last hidden layer of a small convolutional classifier of the data set.

    Trained once on the training split, which can take minutes on a CPU, and cached with its accuracy on the validation
    split. Good for data far from photographs and where Inception's weights cannot be had; its numbers compare only with
    numbers from the same classifier.

    Args:
        width: size of the feature vector.
        steps: training steps.
        batch_size: batch size of training.
        seed: seed of its initialisation and batches.
    """

    def __init__(self, width: int = 64, steps: int = 600, batch_size: int = 128, seed: int = 0) -> None:
        super().__init__()
        positive(width=width, steps=steps, batch_size=batch_size)
        self.num_features, self.steps, self.batch_size, self.seed = width, steps, batch_size, seed
        self.key = ("classifier-2", width, steps, batch_size, seed)
        self.trunk: nn.Module = nn.Identity()
        self.head: nn.Module = nn.Identity()
        self.accuracy, self.trained = float("nan"), ""

    @property
    def protocol(self) -> str:
        """With its weights, once it has them: each data set and each training has features of its own."""
        return f"{super().protocol} {self.trained}".rstrip()

    @property
    def description(self) -> str:  # type: ignore[override]
        return f"{self.num_features} features of a classifier of the training split (accuracy {self.accuracy:.1%})"

    @property
    def facts(self) -> dict[str, float]:
        return {"features/accuracy": self.accuracy}

    def _build(self, shape: tuple[int, int, int], classes: int) -> None:
        channels, size = 32, min(shape[1:])
        layers: list[nn.Module] = [nn.Conv2d(shape[0], channels, 3, padding=1), nn.ReLU()]
        while size > 4:
            layers += [nn.MaxPool2d(2), nn.Conv2d(channels, min(2 * channels, 128), 3, padding=1), nn.ReLU()]
            channels, size = min(2 * channels, 128), size // 2
        self.trunk = nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(self.num_features), nn.ReLU())
        self.trunk(torch.zeros(1, *shape))
        self.head = nn.Linear(self.num_features, classes)

    def check(self, data: ImageDataModule) -> None:
        if len(data.class_names) < 2:
            raise UserError(
                f"a classifier needs two classes, and {data.name} has {len(data.class_names)} here: keep more of them "
                "if data.keep leaves some out, use callbacks.InceptionFeatures (callbacks=inception), or set "
                "callbacks.metrics=null"
            )

    def prepare(self, data: ImageDataModule) -> None:
        self.check(data)
        with isolate_rng():
            torch.manual_seed(self.seed)
            self._build(data.shape, len(data.class_names))
            path = cache_path(data, "classifier", self.key, *(sampled(data, split) for split in ("train", data.unseen)))
            cached = load_cached(path, "state", "accuracy", "kid_scale")
            if cached is None:
                start = time.perf_counter()
                self._train(data)
                self.accuracy, self.kid_scale = self._validate(data)
                save_cached({"state": self.state_dict(), "accuracy": self.accuracy, "kid_scale": self.kid_scale}, path)
                rank_zero_info(
                    f"Trained a classifier of {data.name} for FID in {time.perf_counter() - start:.0f} s: "
                    f"{self.accuracy:.1%} of the {data.called(data.unseen)} split right; kept in {path}"
                )
            else:
                self.load_state_dict(cached["state"])
                self.accuracy, self.kid_scale = cached["accuracy"], cached["kid_scale"]
        self.requires_grad_(False).eval()
        numbers = b"".join(p.detach().cpu().numpy().tobytes() for p in self.parameters())
        self.trained = f"trained {hashlib.sha256(numbers).hexdigest()[:12]}"

    def _train(self, data: ImageDataModule) -> None:
        loader = torch.utils.data.DataLoader(
            data.load_split("train"), self.batch_size, shuffle=True, drop_last=False, collate_fn=data.collate
        )
        optimizer = torch.optim.Adam(self.parameters(), 2e-3)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=self.steps)
        with (
            torch.enable_grad(),
            torch.inference_mode(False),
            bar(f"classifier of {data.name} for FID", self.steps) as progress,
        ):
            step = 0
            while True:
                for x, y in loader:
                    self.heed()
                    optimizer.zero_grad()
                    F.cross_entropy(self.head(self.trunk(x)), y).backward()
                    optimizer.step()
                    schedule.step()
                    progress.update(1)
                    step += 1
                    if step == self.steps:
                        return

    @torch.no_grad()
    def _validate(self, data: ImageDataModule) -> tuple[float, float]:
        """Accuracy on a split that is not trained on, and the root mean square of the features there."""
        loader = torch.utils.data.DataLoader(data.load_split(data.unseen), 500, collate_fn=data.collate)
        right, squares = [], []
        for x, y in loader:
            features = self.trunk(x)
            right.append((self.head(features).argmax(1) == y).float())
            squares.append(features.square().mean(1))
        return float(torch.cat(right).mean()), float(torch.cat(squares).mean().sqrt())

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of bytes (B, C, H, W); (B, width)."""
        return self.trunk(to_unit(images))

    @torch.no_grad()
    def classify(self, images: Tensor) -> Tensor:
        """Class indices of bytes (B, C, H, W); (B,)."""
        return self.head(self.trunk(to_unit(images))).argmax(1)


def why(error: Exception) -> str:
    """The first words of an error of torch's, without the colours of a terminal."""
    if isinstance(error, pickle.UnpicklingError):  # torch's own words advise to load it all the same
        return "it is no file of weights, or holds more than numbers"
    plain = re.sub(r"\x1b\[[0-9;]*m", "", str(error))
    return " ".join(plain.split())[:200] or type(error).__name__


def other_weights(path: str | None, published: str | None = None) -> tuple[str, ...]:
    """What features by weights from a file are told apart by: nothing without one, else the start of its SHA-256.

    Args:
        path: the file, or None.
        published: how the SHA-256 of the standard file begins, which is told apart from none.

    Raises:
        ValueError: if it is not there.
    """
    if path is None:
        return ()
    if not Path(path).is_file():
        raise ValueError(f"weights: file not found: {path}")
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()[:8]
    return () if found == published else (f"weights {found}",)


def refuse_lost(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights as they are.

    Raises:
        ValueError: if they are no tensors by name, or some are not finite.
    """
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise ValueError("it holds no tensors by name")
    for name, value in state.items():
        if not value.isfinite().all():
            raise ValueError(f"{name} is not finite")
    return state


class InceptionFeatures(ImageFeatures):
    """The pool features of Inception v3, those of the standard FID; images are resized to 299×299 as it prescribes.

    Grey images are repeated into three channels.

    Args:
        weights: path of the standard weights file (weights-inception-2015-12-05-6726825d.pth); None downloads it.

    References:
        | Heusel et al., GANs Trained by a Two Time-Scale Update Rule, arXiv 1706.08500 (FID)
        | Binkowski et al., Demystifying MMD GANs, arXiv 1801.01401 (KID)
    """

    num_features = 2048
    description = "2048 Inception v3 pool features, images resized to 299×299"
    key: tuple = ("inception-v3-compat", 2048)
    published = "6726825d"

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        other = other_weights(weights, self.published)
        self.key, self.description = (*self.key, *other), ", ".join((self.description, *other))
        self.weights, self.network, self.loaded = weights, nn.Identity(), False

    def check(self, data: ImageDataModule) -> None:
        self.read()

    def read(self) -> None:
        """Read, or download, the weights, once.

        Raises:
            UserError: if they cannot be had, or are others.
        """
        if self.loaded:
            return
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

        try:
            if self.weights:
                refuse_lost(torch.load(self.weights, weights_only=True))  # tensors only: the library would run any code
            self.network = FeatureExtractorInceptionV3(
                "inception-v3-compat", ["2048"], feature_extractor_weights_path=self.weights
            )
        except Exception as error:  # no network, or a file that is not these weights
            source = f"read from {self.weights}" if self.weights else "downloaded"
            raise UserError(
                f"the Inception weights could not be {source} ({why(error)}); "
                "give callbacks.metrics.features.weights the path of weights-inception-2015-12-05-6726825d.pth, "
                "or use callbacks.ClassifierFeatures"
            ) from error
        self.requires_grad_(False).eval()
        self.loaded = True

    def prepare(self, data: ImageDataModule) -> None:
        self.check(data)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of bytes (B, 1 or 3, H, W); (B, 2048)."""
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        return self.network(images)[0]


class DINOv2Features(ImageFeatures):
    """The class token of DINOv2 ViT-L/14, which FD_DINOv2 is computed in; images as EDM2 prepares them.

    They are resized to 224×224, bicubic and antialiased, scaled to [0, 1] and standardised by ImageNet's mean and
    deviation. Grey images are repeated into three channels.

    Args:
        weights: path of dinov2_vitl14_pretrain.pth; None downloads it.

    References:
        | Stein et al., Exposing Flaws of Generative Model Evaluation Metrics, arXiv 2306.04675 (FD in DINOv2 features)
        | Karras et al., Analyzing and Improving the Training Dynamics of Diffusion Models, arXiv 2312.02696 (EDM2)
    """

    num_features = 1024
    description = "1024 DINOv2 ViT-L/14 features, images resized to 224×224, bicubic and antialiased"
    key: tuple = ("dinov2-vitl14", 224, "bicubic antialiased")
    url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth"
    network: nn.Module
    mean: Tensor
    deviation: Tensor

    def __init__(self, weights: str | None = None) -> None:
        super().__init__()
        other = other_weights(weights)
        self.key, self.description = (*self.key, *other), ", ".join((self.description, *other))
        self.weights, self.network, self.loaded = weights, nn.Identity(), False
        for name, values in {"mean": (0.485, 0.456, 0.406), "deviation": (0.229, 0.224, 0.225)}.items():
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def check(self, data: ImageDataModule) -> None:
        if self.loaded:
            return
        try:
            if self.weights:
                state = refuse_lost(torch.load(self.weights, map_location="cpu", weights_only=True))
            else:
                state = torch.hub.load_state_dict_from_url(self.url, map_location="cpu", weights_only=True)
            network = VisionTransformer(width=self.num_features)
            network.load_state_dict(state)
        except Exception as error:  # no network, or a file that is not these weights
            source = f"read from {self.weights}" if self.weights else "downloaded"
            raise UserError(
                f"the DINOv2 weights could not be {source} ({why(error)}); "
                "give callbacks.metrics.features.weights the path of dinov2_vitl14_pretrain.pth"
            ) from error
        self.network = network
        self.requires_grad_(False).eval()
        self.loaded = True

    def prepare(self, data: ImageDataModule) -> None:
        self.check(data)

    def standardised(self, images: Tensor) -> Tensor:
        """Bytes (B, 1 or 3, H, W) as the network takes them, (B, 3, 224, 224)."""
        x = images.expand(-1, 3, -1, -1).float()
        x = F.interpolate(x, size=(224, 224), mode="bicubic", antialias=True)
        return (x / 255 - self.mean) / self.deviation

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of bytes (B, 1 or 3, H, W); (B, 1024)."""
        return self.network(self.standardised(images))
