"""Do the discriminators still matter? The health figures of a row of the log, and the warnings that they call for."""

import json
import math
import os
import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

import semshift
from examples.workbench.networks.segmentation import Segmentation
from examples.workbench.settings import GlobalSettings, SemanticSettings, Settings
from examples.workbench.training.learners import discriminator_settings
from examples.workbench.training.ranks import norm_over_ranks

__all__ = ["compact", "feature_figures", "findings", "machine_figures", "recent_rows", "term_figures", "warn", "window"]

Row = Mapping[str, float]

# docs/health.md gives the reason of each.
_CERTAIN, _CHANCE, _SILENT, _DOMINATES = 0.98, 0.55, 1e-3, 2.0
_ROWS, _SHARE = 10, 0.1


def feature_figures(
    outputs: Mapping[str, Segmentation],
    batch: Mapping[str, Mapping[str, Tensor]],
    segmentation_loss: Tensor,
    settings: Settings,
    *,
    ranks: int = 1,
) -> dict[str, float]:
    """What the features of a step on all ranks, each of which calls it, tell beside the discriminators' own figures.

    Args:
        outputs: of the segmenter, by domain, still in the graph.
        batch: with the labels of the labelled domains.
        segmentation_loss: what `gradient/segmentation` is of.
        settings: of the run.
        ranks: how many there are.

    Returns:
        `gradient/segmentation` (and `gradient/auxiliary_segmentation`), at the features of all labelled images;
        `present/DOMAIN`, the share of the classes that a domain's labels show; with two such domains `distance/mean`
        and `class_distance/CLASS` between their prototypes, without classes that are not in both.
    """
    labelled = [outputs[domain] for domain, part in batch.items() if "label" in part]
    levels = {"segmentation": [output.features for output in labelled]}
    # The second level is not reached by the features of the first.
    levels["auxiliary_segmentation"] = [output.auxiliary for output in labelled if output.auxiliary is not None]
    figures = {
        f"gradient/{name}": math.hypot(
            *(float(norm_over_ranks(semshift.gradient_norm(segmentation_loss, features), ranks)) for features in level)
        )
        for name, level in levels.items()
        if level
    }
    classes = settings.data.classes
    pooled: dict[str, semshift.ClassSums] = {}
    for domain, part in batch.items():
        if "label" in part:
            own = semshift.class_sums(
                outputs[domain].features.detach(),
                part["label"],
                len(classes),
                ignore_index=settings.data.ignore_index,
                # The cheapest: it is done for every row, and a distance is not trained with.
                resample="nearest",
            )
            pooled[domain] = semshift.ClassSums(semshift.all_reduce_sum(own.sums), semshift.all_reduce_sum(own.mass))
    figures |= {f"present/{domain}": float(sums.present.float().mean()) for domain, sums in pooled.items()}
    if len(pooled) == 2:
        source, target = pooled["source"], pooled["labelled"]
        both = source.present & target.present
        distances = semshift.prototype_distance(source.means, target.means, weight=both).tolist()
        apart = {name: value for name, value in zip(classes, distances) if math.isfinite(value)}
        if apart:
            figures["distance/mean"] = statistics.fmean(apart.values())
        figures |= {f"class_distance/{name}": value for name, value in apart.items()}
    return figures


def term_figures(
    name: str, term: Tensor, weight: float, reached: Sequence[Segmentation], *, ranks: int = 1
) -> dict[str, float]:
    """What a confusion loss is in a step on all ranks: its value, its weight, and its gradient at the features.

    Args:
        name: `global`, `auxiliary` or `semantic`.
        term: before its weight.
        weight: at this step.
        reached: outputs of the segmenter, still in the graph, of the domains that the term acts on.
        ranks: how many there are.
    """
    # The second level does not see the features of the first.
    layer = "auxiliary" if name == "auxiliary" else "features"
    norms = (float(norm_over_ranks(semshift.gradient_norm(term, getattr(output, layer)), ranks)) for output in reached)
    return {
        f"loss/{name}": float(term.detach()),
        f"weight/{name}": weight,
        f"gradient/{name}": weight * math.hypot(*norms),
    }


def machine_figures(images: int, seconds: float, device: torch.device) -> dict[str, float]:
    """How fast so many images went through, and what the process holds: memory, open files, threads, and on a GPU.

    The only figures of a row that differ between two runs of the same settings; their names begin with `machine/`.
    """
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


def compact(row: Row) -> str:
    """A row in one line: losses, accuracy on source and target, gradient over the segmentation loss's, and the rest."""
    parts = [f"segmentation {row['loss/segmentation']:.2f}"]
    if "loss/self-training" in row:
        parts.append(f"self-training {row['loss/self-training']:.2f}")
    for name in ("global", "auxiliary", "semantic"):
        if f"loss/{name}" in row:
            part = f"{name} {row[f'loss/{name}']:.2f}"
            if f"accuracy/{name}_source" in row:
                part += f" acc {row[f'accuracy/{name}_source']:.2f}/{row[f'accuracy/{name}_target']:.2f}"
            ratio = _ratio(row, name)
            parts.append(part if ratio is None else f"{part} grad {100 * ratio:.2g}%")
    if "distance/mean" in row:
        parts.append(f"apart {row['distance/mean']:.2f}")
    if "machine/images_per_second" in row:
        parts.append(f"{row['machine/images_per_second']:.0f} img/s")
    parts += [f"{row[key]:.0f} MiB" for key in ("machine/memory_mib", "machine/cuda_mib") if key in row]
    return ", ".join(parts)


def window(settings: Settings) -> int:
    """For how many rows of the log something must last before it is warned of: a tenth of the run, and ten at least."""
    return max(_ROWS, math.ceil(_SHARE * settings.steps / settings.log_every))


def recent_rows(history: Sequence[Row], settings: Settings) -> deque[Row]:
    """The last rows of a history that `findings` may need, to be added to."""
    return deque((row for row in history if "loss/segmentation" in row), maxlen=window(settings))


def findings(rows: Sequence[Row], settings: Settings) -> dict[str, str]:
    """What the last rows of the log, as many as `window` says, show to be wrong.

    Args:
        rows: of the log, in order; earlier ones do not matter.
        settings: of the run.

    Returns:
        Kinds, such as `global certain`, to a sentence that says what to turn and which way.
    """
    last = window(settings)
    found: dict[str, str] = {}
    for name, how in discriminator_settings(settings).items():
        # A discriminator begins with learning, and is to get ahead while the weight waits or begins to rise.
        judged = [
            row
            for row in rows
            if row["step"] >= last * settings.log_every and row.get(f"weight/{name}", 0.0) >= how.weight / 2
        ]
        recent = judged[-last:]
        if len(recent) == last:
            steps = round(recent[-1]["step"] - recent[0]["step"])
            found |= {f"{name} {kind}": words for kind, words in _judge(name, how, recent, steps).items()}
    return found


def warn(out: Path, rows: Sequence[Row], settings: Settings) -> None:
    """Tell of new `findings`, each kind once in the life of a run: `warnings.jsonl` in its folder holds those told."""
    found = findings(rows, settings)
    if not found:
        return
    path = out / "warnings.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    told = {json.loads(line)["kind"] for line in lines if line.endswith("}")}
    for kind, words in found.items():
        if kind not in told:
            with path.open("a") as file:
                file.write(json.dumps({"step": rows[-1]["step"], "kind": kind, "warning": words}) + "\n")
            tqdm.write(f"warning: {words}", file=sys.stderr)


def _judge(name: str, how: GlobalSettings | SemanticSettings, rows: Sequence[Row], steps: int) -> dict[str, str]:
    where = "semantic_alignment" if name == "semantic" else "global_alignment"
    weight = f"{where}.{'auxiliary_weight' if name == 'auxiliary' else 'weight'} (now {how.weight:g})"
    rate = f"{where}.learning_rate (now {how.learning_rate:g})"
    found: dict[str, str] = {}

    judged = [row for row in rows if f"accuracy/{name}_source" in row]
    source, target = (
        [value for row in judged if math.isfinite(value := row[f"accuracy/{name}_{domain}"])]
        for domain in ("source", "target")
    )
    if len(judged) >= _ROWS and not (source and target):
        found["idle"] = (
            f"the {name} discriminator has seen no class of one of the domains for {steps} steps: look at the labels "
            f"(--check) and at data.classes, or raise labelled"
        )
        return found
    # With the Wasserstein objective the sign of a logit says nothing; only differences do.
    if min(len(source), len(target)) >= _ROWS and how.objective != "wasserstein":
        right = statistics.fmean(source), statistics.fmean(target)
        came = f"accuracy {right[0]:.2f} on source and {right[1]:.2f} on target"
        if min(right) >= _CERTAIN:
            found["certain"] = (
                f"the {name} discriminator has told the domains apart nearly without error for {steps} steps "
                f"({came}), and nothing that the segmenter does moves it: lower {rate} or set {where}.spectral_norm "
                f"to hold it back, or raise {weight} to have the segmenter answer"
            )
        elif statistics.fmean(right) <= _CHANCE:
            found["chance"] = (
                f"the {name} discriminator has been at chance for {steps} steps ({came}), and its gradient is noise: "
                f"raise {rate}, or lower {weight} if the accuracy fell as that rose; where distance/mean is near 0, "
                f"there is nothing left to tell"
            )

    ratios = [ratio for row in rows if (ratio := _ratio(row, name)) is not None]
    if len(ratios) >= _ROWS:
        ratio = statistics.median(ratios)
        came = f"the {name} term's gradient at the features has been {ratio:.2g} of the segmentation loss's"
        if ratio < _SILENT:
            found["silent"] = f"{came} for {steps} steps, and changes nothing: raise {weight}"
        elif ratio > _DOMINATES:
            found["dominates"] = f"{came} for {steps} steps, and decides what they become: lower {weight}"
    return found


def _ratio(row: Row, name: str) -> float | None:
    """The weighted gradient of a confusion loss over the segmentation loss's, where the row has both."""
    segmentation = row.get("gradient/auxiliary_segmentation" if name == "auxiliary" else "gradient/segmentation", 0.0)
    if f"gradient/{name}" not in row or not segmentation > 0:
        return None
    return row[f"gradient/{name}"] / segmentation
