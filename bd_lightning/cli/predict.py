"""predict: samples of a checkpoint, or of a mixture of what it has learned."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from torch import Tensor, nn
from torch.utils.data import DataLoader

from bd_lightning import fields
from bd_lightning.checks import UserError
from bd_lightning.cli import build, objects
from bd_lightning.cli.folders import called, folder_for, keep_settings, made, short, writing
from bd_lightning.cli.plan import Plan, settings_of
from bd_lightning.combinations import choose_labels, combined, corrected
from bd_lightning.facts import Facts
from bd_lightning.latents import LatentSpace, check_codes
from callbacks import ImageWriter, TableWriter
from datamodules import SampleRequests


class Drawing(L.LightningModule):
    """Draws samples of a mixture by the sampler of a model.

    Args:
        model: the model whose sampler draws.
        mixture: what is drawn.
        others: models that the mixture takes fields of besides.
        pilot: number of samples by which the weights are first corrected (see `fields.calibrated`); 0 leaves them.
    """

    def __init__(self, model: Any, mixture: fields.Mixture, others: Sequence[nn.Module] = (), pilot: int = 0) -> None:
        super().__init__()
        self.model, self.others = model, nn.ModuleList(others)
        self.mixture, self.pilot = mixture, pilot

    def on_predict_start(self) -> None:
        """Correct the weights of the mixture."""
        self.mixture = corrected(self.model, self.mixture, self.pilot)

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """Samples for a batch of requests: "index" and "seed", each (B,)."""
        return self.model.sample(batch["index"].tolist(), seed=int(batch["seed"][0]), fields=self.mixture)


def run(plan: Plan) -> None:
    """Write samples to <run folder>/predict-<sampler>-seed<seed>[-<mixture>]/, or, if that holds others, a new one.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    config, facts = plan.config, plan.facts
    assert facts is not None  # a plan to predict has a checkpoint
    objects.prepare(config)
    model = objects.model(plan, facts)
    mixed = any(config[key] for key in ("mix", "remove", "merge"))
    model.check_predict()
    labels = choose_labels(config["labels"] or [], facts, model)
    if config["calibrate"] and not mixed:
        raise UserError("calibrate corrects the weights of a mixture: give mix, remove or merge too")
    if any(config[key] for key in ("inpaint", "upscale", "images", "draws")):
        restore(plan, facts, model, labels if config["labels"] else [])
        return
    drawing = mixing(plan, facts, model) if mixed else model
    settings = settings_of(plan, "n", "labels", "mix", "remove", "merge", "calibrate")
    trainer = objects.trainer(plan, logger=False, callbacks=progress_bars(plan))
    if model.interacting():
        settings["devices"] = trainer.world_size  # each resamples its own chains
    folder = folder_for(settings, plan.run_dir, folder_name(plan, model.sampler))
    writer = build_writer(plan, facts, folder)
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    loader = DataLoader(SampleRequests(config["n"], config["seed"], labels), batch_size=min(500, config["n"]))
    with made(folder, lambda: len(list(folder.iterdir())) > 1), writing(folder):
        keep_settings(settings, folder)
        trainer.predict(drawing, loader, return_predictions=False)
    if trainer.is_global_zero:
        print(f"{config['n']} {writer.product} in {short(folder)}")


def restore(plan: Plan, facts: Facts, model: Any, labels: Sequence[int]) -> None:
    """Write what is missing of images (see `cli.restore`), a result for each, beside a grid of what was given.

    Raises:
        UserError: for anything that is the user's to put right.
    """
    from bd_lightning.cli import restore as tasks

    config = plan.config
    latents = latents_of(plan, facts)
    task = tasks.task_of(config, latents.image_shape if latents else facts.shape)
    given = tasks.read_images(config["images"], config["n"], task.shapes)
    if any(config[key] for key in ("mix", "remove", "merge")):
        raise UserError("inpaint and upscale draw from the model itself: leave mix, remove and merge out")
    if model.conditional and not (model.guidable or labels):
        raise UserError("this model has to be told the class: give labels=[3], say, one after the other for the images")
    if model.guidance.acts and not labels:
        raise UserError("guidance acts on classes: give labels=[3], say, or leave model.guidance out")
    if model.interacting():
        raise UserError("the weights of FeynmanKac are those of guidance alone: take another model.sampler for this")
    drawing = tasks.Restoring(model, task, given, latents, config["draws"] or 1)
    settings = settings_of(plan, "n", "labels", "inpaint", "upscale", "images", "draws")
    settings["given"] = hashlib.sha256(given.numpy().tobytes() + task.mask).hexdigest()
    name = "inpaint" if config["inpaint"] else f"upscale{config['upscale']}"
    name += f"-mean{drawing.draws}" if drawing.draws > 1 else ""
    folder = folder_for(settings, plan.run_dir, f"predict-{name}-{model.sampler}-seed{config['seed']}")
    writer = ImageWriter(folder)
    trainer = objects.trainer(plan, logger=False, callbacks=[writer, *progress_bars(plan)])
    loader = DataLoader(SampleRequests(len(given), config["seed"], labels), batch_size=min(100, len(given)))
    with made(folder, lambda: len(list(folder.iterdir())) > 1), writing(folder):
        keep_settings(settings, folder)
        trainer.predict(drawing, loader, return_predictions=False)
        if trainer.is_global_zero:
            errors = tasks.write_beside(folder, task, given)
            print(f"{len(given)} {writer.product} in {short(folder)}, beside given.png{errors}")


def mixing(plan: Plan, facts: Facts, model: Any) -> Drawing:
    """Draws from the mixture that mix, remove and merge ask for.

    Raises:
        UserError: for models without classes, checkpoints that do not fit each other, and weights without a meaning.
    """
    config = plan.config
    if config["labels"]:
        model.mixture_source()  # which a model without one refuses first
        raise UserError("labels asks for classes one by one, mix and remove for a mixture of them: give one of the two")
    keys = ("mix", "remove", "merge")
    mixture, others = combined(model, facts, config["ckpt_path"], **{key: config[key] for key in keys})
    return Drawing(model, mixture, others, config["calibrate"])


def folder_name(plan: Plan, sampler: str) -> str:
    """Name of the folder of samples: sampler, seed, and the mixture."""
    config = plan.config
    words = [f"{label}x{weight:g}" for label, weight in (config["mix"] or {}).items()]
    words += [f"without-{label}" for label in config["remove"] or []]
    merged = config["merge"] or {}
    words += (
        [f"{called(path)}x{weight:g}" for path, weight in merged.items()]
        if len(merged) < 4
        else [f"merged-{len(merged) + 1}"]
    )
    return "-".join([f"predict-{sampler}-seed{config['seed']}", *words])


def latents_of(plan: Plan, facts: Facts) -> LatentSpace | None:
    """The autoencoder that samples are decoded by, if they are codes.

    Raises:
        UserError: for one of other codes.
    """
    latents: LatentSpace | None = build.instantiate(plan.config["data"].get("autoencoder"), "data.autoencoder")
    if latents:
        check_codes(latents, facts.shape, facts.space)
    return latents


def build_writer(plan: Plan, facts: Facts, folder: Path) -> ImageWriter | TableWriter:
    """Writes images for samples that are images or codes of images, rows of a table for others."""
    latents = latents_of(plan, facts)
    if latents or (not facts.columns and len(facts.shape) == 3):
        return ImageWriter(folder, latents.decode if latents else None)
    columns = facts.columns or [f"x{k}" for k in range(facts.shape[0])]
    return TableWriter(folder, columns, facts.center, facts.scale)


def progress_bars(plan: Plan) -> list[Any]:
    """The config's progress bar, if it has one."""
    nodes = {f"callbacks.{name}": node for name, node in (plan.config["callbacks"] or {}).items() if node}
    return [
        build.instantiate(node, key)
        for key, node in nodes.items()
        if issubclass(build.locate(node["_target_"], key), ProgressBar)
    ]
