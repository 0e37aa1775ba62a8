"""Health of the discriminators: the figures in a row of the log, and warnings computed from them."""

import json
import math
import os
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

import semshift
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.progress import say
from examples.workbench.settings import AlignmentSettings, Settings

__all__ = ["alignment_figures", "feature_figures", "findings", "format_row", "machine_figures", "shorten_row"]
__all__ += ["warn", "warn_once", "window"]

Row = Mapping[str, float]

# docs/health.md explains these values.
_ROWS, _SHARE = 10, 0.1


def feature_figures(
    outputs: Mapping[str, Segmentation],
    batch: Mapping[str, Mapping[str, Tensor]],
    segmentation_loss: Tensor,
    settings: Settings,
    *,
    ranks: int = 1,
) -> dict[str, float]:
    """Figures about the features of labelled images in a step, while they are in the graph. Every rank must call it.

    Returns:
        `gradient/segmentation` (and `gradient/auxiliary_segmentation`): the norm of the segmentation loss's gradient at
        the features. `present/DOMAIN`: the share of the classes that occur in a domain's labels. With two domains,
        `distance/mean` and `class_distance/CLASS`: the distances between their prototypes of the classes in both.
    """
    labelled = [outputs[domain] for domain, part in batch.items() if "label" in part]
    # The auxiliary logits do not depend on the features, so the gradient of their loss is taken at the logits.
    auxiliary = [output.auxiliary for output in labelled if output.auxiliary is not None]
    levels = {"segmentation": [output.features for output in labelled], "auxiliary_segmentation": auxiliary}
    figures = {
        f"gradient/{name}": math.hypot(*(_gradient_norm(segmentation_loss, features, ranks) for features in level))
        for name, level in levels.items()
        if level
    }
    data, pooled = settings.data, []
    for domain, part in batch.items():
        if "label" in part:
            own = semshift.class_sums(
                outputs[domain].features.detach(),
                part["label"],
                len(data.classes),
                ignore_index=data.ignore_index,
                # The cheapest option is enough, since these distances are only logged.
                resample="nearest",
            )
            sums = semshift.ClassSums(semshift.all_reduce_sum(own.sums), semshift.all_reduce_sum(own.mass))
            figures[f"present/{domain}"] = float(sums.present.float().mean())
            pooled.append(sums)
    if len(pooled) == 2:
        both = pooled[0].present & pooled[1].present
        distances = semshift.prototype_distance(pooled[0].means, pooled[1].means, weight=both).tolist()
        finite = {name: value for name, value in zip(data.classes, distances) if math.isfinite(value)}
        if finite:
            figures["distance/mean"] = statistics.fmean(finite.values())
        figures |= {f"class_distance/{name}": value for name, value in finite.items()}
    return figures


def alignment_figures(
    name: str, losses: semshift.AlignmentLosses, weight: float, reached: Segmentation, *, ranks: int = 1
) -> dict[str, float]:
    """Figures about an alignment in a step. `reached` is the segmenter's output that its confusion loss acts on."""
    features = reached.auxiliary if name == "auxiliary" else reached.features
    assert features is not None
    return {
        f"loss/{name}": float(losses.confusion.detach()),
        f"gradient/{name}": weight * _gradient_norm(losses.confusion, features, ranks),
        f"loss/{name}_discriminator": float(losses.discriminator.detach()),
        f"accuracy/{name}_source": float(losses.figures["source_accuracy"]),
        f"accuracy/{name}_target": float(losses.figures["target_accuracy"]),
    }


def machine_figures(images: int, seconds: float, device: torch.device) -> dict[str, float]:
    """Images per second, memory, open files and threads. Only these figures differ between two equal runs."""
    figures = {"machine/images_per_second": images / max(seconds, 1e-9)}
    process = Path("/proc/self")
    if process.exists():
        pages = int((process / "statm").read_text().split()[1])
        figures["machine/memory_mib"] = pages * os.sysconf("SC_PAGE_SIZE") / 2**20
        figures["machine/open_files"] = len(os.listdir(process / "fd"))
        figures["machine/threads"] = len(os.listdir(process / "task"))
    if device.type == "cuda":
        figures["machine/cuda_mib"] = torch.cuda.max_memory_allocated(device) / 2**20
    return figures


def format_row(row: Row) -> str:
    """A row as one line: losses, accuracies on source and target, and gradients relative to the segmentation loss's."""
    parts = [f"segmentation {row['loss/segmentation']:.2f}"]
    parts += [f"{name} {row[f'loss/{name}']:.2f}" for name in ("self-training", "contrast") if f"loss/{name}" in row]
    for name in ("global", "auxiliary", "semantic"):
        if f"loss/{name}" in row:
            part = f"{name} {row[f'loss/{name}']:.2f}"
            part += f" acc {row[f'accuracy/{name}_source']:.2f}/{row[f'accuracy/{name}_target']:.2f}"
            ratio = _ratio(row, name)
            parts.append(part if ratio is None else f"{part} grad {_percent(ratio)}")
    if "distance/mean" in row:
        parts.append(f"apart {row['distance/mean']:.2f}")
    return ", ".join(parts)


def shorten_row(row: Row) -> str:
    """A row for the 80 columns of the progress bar: the loss, and each accuracy on source/target in percent."""
    accuracies = []
    # The most important alignments come first, since the end of a long line is cut off.
    for name in ("global", "semantic", "auxiliary"):
        if f"loss/{name}" in row:
            source, target = (100 * row[f"accuracy/{name}_{domain}"] for domain in ("source", "target"))
            accuracies.append(f"{name} {source:.0f}/{target:.0f}")
    loss = f"loss {row['loss/segmentation']:.2f}"
    return f"{loss}, acc {', '.join(accuracies)} %" if accuracies else loss


def window(settings: Settings) -> int:
    """Number of rows that a warning is based on: a tenth of the run's rows, and at least ten."""
    return max(_ROWS, math.ceil(_SHARE * settings.steps / settings.log_every))


def findings(rows: Sequence[Row], settings: Settings) -> dict[str, str]:
    """Warnings about the last `window` rows of the log, by kind, such as `global certain`."""
    last = window(settings)
    found: dict[str, str] = {}
    for name, how in settings.alignments.items():
        # Skip the rows in which the discriminator is untrained, or its weight is less than half of its final value.
        trained = [row for row in rows if row["step"] >= last * settings.log_every]
        recent = [row for row in trained if row.get(f"weight/{name}", 0.0) >= how.weight / 2][-last:]
        if len(recent) < last:
            continue
        span = f"{recent[-1]['step'] - recent[0]['step']:.0f} steps"
        now = _settings_now(name, how)
        judged = [figures for row in recent if (figures := _judged(row, name))]
        for warning in semshift.health_warnings(judged, objective=how.objective):
            kind, words = warning.split(": ", 1)
            advice = "`train --check` compares data.classes with the labels" if kind == "idle" else now
            found[f"{name} {kind}"] = f"{name} alignment, the last {span}: {words} ({advice})"
    return found


def warn(out: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Print new `findings`, each kind once per run, and append them to the run folder's `warnings.jsonl`."""
    for kind, words in findings(rows, settings).items():
        warn_once(out, rows[-1]["step"], kind, words)


def warn_once(out: Path, step: float, kind: str, words: str) -> None:
    """Print a warning and append it to the run folder's `warnings.jsonl`, unless the run has had one of this kind."""
    path = out / "warnings.jsonl"
    # The last line may be truncated.
    if not path.exists() or f'"kind": "{kind}"' not in path.read_text():
        with path.open("a") as file:
            file.write(json.dumps({"step": step, "kind": kind, "warning": words}) + "\n")
        say(f"warning: {words}")


def _judged(row: Row, name: str) -> dict[str, float]:
    """The figures of an alignment that `semshift.health_warnings` needs, under the names that it uses."""
    figures = {f"{domain}_accuracy": row.get(f"accuracy/{name}_{domain}") for domain in ("source", "target")}
    figures["gradient_ratio"] = _ratio(row, name)
    return {name: value for name, value in figures.items() if value is not None}


def _settings_now(name: str, how: AlignmentSettings) -> str:
    """The settings that a warning may advise to change, with their current values."""
    where = "semantic_alignment" if name == "semantic" else "global_alignment"
    weight = "auxiliary_weight" if name == "auxiliary" else "weight"
    return f"now {where}.{weight} {how.weight:g}, {where}.learning_rate {how.learning_rate:g}"


def _ratio(row: Row, name: str) -> float | None:
    """Ratio of the weighted gradient of a confusion loss to the segmentation loss's; None if the row lacks one."""
    segmentation = row.get("gradient/auxiliary_segmentation" if name == "auxiliary" else "gradient/segmentation", 0.0)
    if f"gradient/{name}" not in row or not segmentation > 0:
        return None
    return row[f"gradient/{name}"] / segmentation


def _percent(share: float) -> str:
    """A share in percent, with two digits and without an exponent."""
    value = 100 * share
    return "<0.01 %" if 0 < value < 0.01 else f"{value:.0f} %" if value >= 10 else f"{value:.2g} %"


def _gradient_norm(loss: Tensor, features: Tensor, ranks: int) -> float:
    """Norm of a loss's gradient at the features of all ranks.

    The loss of every rank is that of the whole batch, so the gradient contains it once for each rank.
    """
    norm = semshift.gradient_norm(loss, features)
    return float(norm if ranks == 1 else torch.sqrt(semshift.all_reduce_sum((norm / ranks).square())))
