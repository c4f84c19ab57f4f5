"""Configs and checkpoints of earlier versions, in today's words. Plain dictionaries; torch is not imported.

A config as it is stored, in a checkpoint or in the `config.yaml` of a run folder, says its format; the first one did
not. What only changed its place stands once, in `MOVED`, for stored configs and for words on the command line alike.
"""

from collections.abc import Mapping
from typing import Any

from bd_lightning.checks import UserError

FORMAT = 3
"""The format that this code writes, and the latest one that it reads."""

MODULE = "bd_lightning.modules."
OBJECTIVE = "bd_lightning.objectives."
OPTIMIZER = "bd_lightning.optimizers."
RECORD = ("seed", "steps", "root", "n", "data", "model", "trainer", "callbacks")
"""Keys that only a whole config has: a file with all of them is the record of a run, not a fragment."""

MOVED = {
    "trace": "objective.trace",
    "proposal": "objective.proposal",
    "scalar_weight": "objective.scalar_weight",
    "pairs": "partners.pairs",
    "queries": "partners.queries",
    "gather_partners": "partners.gather",
    "noise_mean": "noise.mean",
    "noise_std": "noise.std",
}
"""Keys of `bd_lightning.modules.BellmanDiffusion` in format 1, and where they are now."""

ADAM = ("betas", "weight_decay")
"""Keys of every model up to format 2 that belong to its optimiser now."""

ESTIMATORS = {
    "denoising": "objective.trace=stein",
    "divergence": "objective.trace=hutchinson",
    "regression": f"objective._target_={OBJECTIVE}KernelRegression",
}
"""What `model.estimator` is called now."""

CLASSES = {
    "bd_lightning.kernels.Relative": "model=relative (bd_lightning.modules.RelativeDensities)",
    "bd_lightning.divergences.Proposal": OBJECTIVE + "Proposal, and its 'uniform' is 'box'",
}
"""Classes of format 1, and what stands for them now."""


# ---- stored configs


def upgrade(stored: Mapping[str, Any], place: str = "this config") -> dict[str, Any]:
    """A stored config in today's format.

    Args:
        stored: the config of a run, with the facts of its data if it comes from a checkpoint; it is not changed.
        place: where it was stored, for messages.

    Returns:
        The config, `format` among its keys.

    Raises:
        UserError: if it was written by a later version, or its format is not a number.
    """
    given = stored.get("format", 1)
    if not isinstance(given, int) or isinstance(given, bool) or given < 1:
        raise UserError(f"{place} has the format {given!r}, which is not one of this suite's")
    if given > FORMAT:
        raise UserError(
            f"{place} was written by a later version of this suite (format {given}, this code reads up to {FORMAT}): "
            "update it"
        )
    config = dict(stored)
    if given < 3 and isinstance(config.get("model"), Mapping):
        config["model"] = _optimizer(dict(config["model"]))
    if given == 1:
        config |= {key: change(config[key]) for key, change in (("model", _model), ("facts", _facts)) if key in config}
    return {**config, "format": FORMAT}


def is_record(layer: Mapping[str, Any]) -> bool:
    """Whether a file holds the whole config of a run, as run folders keep it."""
    return all(key in layer for key in RECORD)


def _model(model: Any) -> Any:
    """A model of format 1; what it left out is what format 1 took."""
    if not isinstance(model, Mapping):
        return model
    kinds = {"BellmanDiffusion": _bellman, "ReturnLearner": _returns, "FreeReturnLearner": _returns}
    kind = kinds.get(str(model.get("_target_", "")).removeprefix(MODULE))
    return kind(dict(model)) if kind else model


def _bellman(model: dict[str, Any]) -> dict[str, Any]:
    estimator, trace = model.pop("estimator", "denoising"), model.pop("trace", "hutchinson")
    proposal, weight = model.pop("proposal", None), model.pop("scalar_weight", 0.1)
    noise = {"mean": model.pop("noise_mean", -0.8), "std": model.pop("noise_std", 1.2)}
    partners = {"pairs": model.pop("pairs", "all"), "queries": model.pop("queries", None)}
    partners["gather"] = model.pop("gather_partners", False)
    model["noise"] = {"_target_": OBJECTIVE + "NoiseLevels", **noise} if model.pop("multi_scale", True) else None
    model["samplers"] = {name: _sampler(node) for name, node in (model.get("samplers") or {}).items()}
    if _target(model.get("kernel")) == "bd_lightning.kernels.Relative":
        for key in ("kernel", "parametrisation", "scalar_network", "label_dropout"):
            model.pop(key, None)
        model["_target_"] = MODULE + "RelativeDensities"
        model["objective"] = {"_target_": OBJECTIVE + "DensityRatio", "scalar_weight": weight}
        return model
    model["partners"] = {"_target_": OBJECTIVE + "Partners", **partners}
    if estimator == "regression":
        model["objective"] = {"_target_": OBJECTIVE + "KernelRegression", "scalar_weight": weight}
        if isinstance(proposal, Mapping):
            values = {"box" if key == "uniform" else key: value for key, value in proposal.items()}
            model["objective"]["proposal"] = {**values, "_target_": OBJECTIVE + "Proposal"}
        return model
    trace = "stein" if estimator == "denoising" else trace
    model["objective"] = {"_target_": OBJECTIVE + "FieldDivergence", "trace": trace, "scalar_weight": weight}
    return model


def _optimizer(model: dict[str, Any]) -> dict[str, Any]:
    """A model up to format 2, whose optimiser was always Adam."""
    adam = {key: model.pop(key) for key in ADAM if key in model}
    return {**model, "optimizer": {"_target_": OPTIMIZER + "AdamW", **adam}} if adam else model


def _returns(model: dict[str, Any]) -> dict[str, Any]:
    return {"uniform_policy" if key == "uniform" else key: value for key, value in model.items()}


def _sampler(node: Any) -> Any:
    if not _target(node).endswith(".MultistepDynamics"):
        return node
    return {"relaxation" if key == "churn" else key: value for key, value in node.items()}


def _facts(facts: Any) -> Any:
    """Facts of format 1, as `facts.Facts.plain` gives them now."""
    if not isinstance(facts, Mapping) or "kind" in facts:
        return facts
    plain = {"name": facts.get("name", ""), "shape": facts["shape"]}
    if "v_min" in facts:
        ends = {"v_min": facts["v_min"], "v_max": facts["v_max"]}
        return {"kind": "EnvironmentFacts", **plain, "actions": facts["num_classes"], **ends}
    plain |= {"sigma_data": facts["sigma_data"], "class_names": facts.get("class_names", [])}
    plain["space"] = facts.get("space")
    if "columns" in facts:
        return {"kind": "TableFacts", **plain, **{key: facts[key] for key in ("columns", "center", "scale")}}
    return {"kind": "SampleFacts", **plain}


# ---- words of earlier formats in a new config


def refuse_old(config: Mapping[str, Any]) -> None:
    """Answer a word of an earlier format in a composed config by the new one.

    Raises:
        UserError: for the first old word, with its new spelling.
    """
    model = config.get("model")
    if not isinstance(model, Mapping):
        return
    for key in ADAM:
        if key in model:
            raise UserError(f"'model.{key}' is now 'model.optimizer.{key}'")
    kind = _target(model).removeprefix(MODULE)
    if kind in ("BellmanDiffusion", "RelativeDensities"):
        for key, node in {"kernel": model.get("kernel"), "proposal": model.get("proposal")}.items():
            if _target(node) in CLASSES:
                raise UserError(f"'model.{key}' {_target(node)} is now {CLASSES[_target(node)]}")
        if "estimator" in model:
            raise UserError(_new_estimator(str(model["estimator"])))
        if "multi_scale" in model:
            raise UserError("'model.multi_scale' is now 'model.noise': model.noise=null is a single scale")
        for old, new in MOVED.items():
            if old in model:
                raise UserError(f"'model.{old}' is now 'model.{new}'")
    if kind in ("ReturnLearner", "FreeReturnLearner") and "uniform" in model:
        raise UserError("'model.uniform' is now 'model.uniform_policy'")
    _refuse_old_parts(model)


def _new_estimator(old: str) -> str:
    if old in ESTIMATORS:
        return f"'model.estimator={old}' is now 'model.{ESTIMATORS[old]}'"
    return f"'model.estimator' is now 'model.objective': {', '.join(f'model.{new}' for new in ESTIMATORS.values())}"


def _refuse_old_parts(model: Mapping[str, Any]) -> None:
    samplers = model.get("samplers")
    for name, node in samplers.items() if isinstance(samplers, Mapping) else ():
        if _target(node).endswith(".MultistepDynamics") and "churn" in node:
            raise UserError(f"'model.samplers.{name}.churn' is now 'model.samplers.{name}.relaxation'")
    objective = model.get("objective")
    proposal = objective.get("proposal") if isinstance(objective, Mapping) else None
    if _target(proposal) in CLASSES:
        raise UserError(f"'model.objective.proposal' {_target(proposal)} is now {CLASSES[_target(proposal)]}")
    if isinstance(proposal, Mapping) and "uniform" in proposal:
        raise UserError("'model.objective.proposal.uniform' is now 'model.objective.proposal.box'")


def _target(node: Any) -> str:
    return str(node.get("_target_", "")) if isinstance(node, Mapping) else ""
