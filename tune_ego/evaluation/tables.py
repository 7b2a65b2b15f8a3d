"""`evaluate` on screen: this result, and the published ones beside it."""

from __future__ import annotations

from typing import Any, NamedTuple

from tune_ego.console import percent, print_table, say

_WORST = 5


class Published(NamedTuple):
    model: str
    micro: float | None
    """Micro accuracy, %, on the test clips of EGTEA Gaze+; None: not published."""
    mean_class: float
    """Mean class accuracy, %."""
    source: str
    start: str
    """Weights that the training started from."""
    split: str = "1"


LU, PAPER = "Lu et al.", "Straminsky et al."
KAPIDIS, MIN, LAVILA = "Kapidis et al.", "Min, Corso", "Zhao et al."
SOURCES = {
    LU: "Lu, Liao, Li, ICCV Workshops 2019",
    PAPER: "Straminsky, Jacobo, Buemi, An efficient Action Detection from First Person Vision with Attention Model",
    KAPIDIS: "Kapidis, Poppe, van Dam, Noldus, Veltkamp, Multitask Learning to Improve Egocentric Action Recognition, "
    "ICCV Workshops 2019",
    MIN: "Min, Corso, Integrating Human Gaze into Attention for Egocentric Activity Recognition, WACV 2021",
    LAVILA: "Zhao, Misra, Kraehenbuehl, Girdhar, Learning Video Representations from Large Language Models (LaViLa), "
    "CVPR 2023",
}
PUBLISHED_CLASSES = 106

PUBLISHED = (
    Published("RGB, no attention (-o)", 62.51, 54.89, LU, "Kinetics"),
    Published("flow, no attention (-o)", 57.86, 46.96, LU, "Kinetics"),
    Published("fused, no attention (-o)", 67.56, 59.26, LU, "Kinetics"),
    Published("RGB, no gaze loss (-v)", 62.66, 55.30, LU, "Kinetics"),
    Published("flow, no gaze loss (-v)", 59.30, 49.70, LU, "Kinetics"),
    Published("fused, no gaze loss (-v)", 67.70, 59.73, LU, "Kinetics"),
    Published("RGB (-a)", 63.65, 56.34, LU, "Kinetics"),
    Published("flow (-a)", 60.09, 50.99, LU, "Kinetics"),
    Published("fused (-a)", 68.60, 60.54, LU, "Kinetics"),
    Published("fused (-a)", 65.97, 57.02, LU, "Kinetics", "mean of 1 to 3"),
    Published('RGB, "Orig."', 63.65, 56.34, PAPER, "Lu's -o"),
    Published('RGB, "Lu Model"', 63.56, 56.34, PAPER, "Lu's -o"),
    Published("(1) RGB, mixed precision", 63.3, 55.0, PAPER, "Lu's -o"),
    Published("(2) + Ranger", 61.47, 51.13, PAPER, "Lu's -o"),
    Published("(3) + Ranger, 3 stacked blocks", 62.51, 53.66, PAPER, "Lu's -o"),
    Published("RGB, hands and gaze as further tasks", 66.59, 59.44, KAPIDIS, "Kinetics"),
    Published("RGB and flow, gaze as a latent variable", 69.58, 62.84, MIN, "Kinetics"),
    Published("the same, updated by its authors", 69.73, 63.09, MIN, "Kinetics"),
    Published("RGB, TimeSformer-B", None, 70.12, LAVILA, "Ego4D with narrations"),
    Published("RGB, TimeSformer-L", 81.75, 76.00, LAVILA, "Ego4D with narrations"),
)


def show(result: dict[str, Any], *, sweep: bool = False, compare: bool = False) -> None:
    """Print the content of `evaluation.json`, or the result of `evaluate_scores`.

    Optionally also the fusion curve and the published numbers.
    """
    names: list[str] = [name for name in ("rgb", "flow", "fused") if name in result]
    columns = {"micro": "micro_accuracy", "mean class": "mean_class_accuracy"}
    columns |= {"verb": "verb_accuracy", "noun": "noun_accuracy"}
    rows = [[name, *(percent(result[name][key]) for key in columns.values())] for name in names]
    rows.append(["chance", percent(result["chance"]), percent(result["chance"]), "", ""])
    iteration = f", iteration {result['iteration']}" if "iteration" in result else ""
    print_table(f"Test of split {result['split']}: {result['clips']} clips{iteration}, accuracy", ["", *columns], rows)
    if seen := result.get("clips_trained_on"):
        say(f"NOT A TEST: trained on split {result['trained_on_split']}, which trains on {seen} of these clips.")
    _show_attention(result.get("attention", {}))
    _show_frequencies(result, names)
    _show_weakest(result, names[-1])
    if sweep:
        _show_sweep(result)
    if compare:
        _show_published(result, names)


def views_name(evaluation: dict[str, Any]) -> str:
    """Return the crops of a test in words, ", 3 crops" for example; "" for the centre crop alone."""
    crops = f", {evaluation['crops']} crops" if evaluation.get("crops", 1) != 1 else ""
    return crops + ", also mirrored" * bool(evaluation.get("flips"))


def _show_attention(attention: dict[str, dict[str, Any] | None]) -> None:
    scored = {name: scores for name, scores in attention.items() if scores is not None}
    keys = ("auc_judd", "auc", "nss", "f1", "precision", "recall")
    rows = [[name, *(f"{scores[key]:.3f}" for key in keys), f"{scores['frames']:,}"] for name, scores in scored.items()]
    if rows:
        columns = ["", "AUC (Judd)", "AUC", "NSS", "F1", "precision", "recall", "window frames"]
        print_table("Attention against gaze; centre is a Gaussian at the crop's centre", columns, rows)


def _show_frequencies(result: dict[str, Any], names: list[str]) -> None:
    """Print the mean recall of frequent and of rare classes, where they differ in size."""
    parts = result[names[-1]].get("by_frequency", {})
    if not parts or parts["many"]["training_clips"][1] == min(part["training_clips"][0] for part in parts.values()):
        return
    columns = [f"{name} ({low} to {high})" for name, part in parts.items() for low, high in [part["training_clips"]]]
    rows = [[name, *(percent(part["recall"]) for part in result[name]["by_frequency"].values())] for name in names]
    print_table("Mean recall of a third of the classes each, by training clips", ["", *columns], rows)


def _show_weakest(result: dict[str, Any], name: str) -> None:
    """Print the classes with the lowest recall, and the class that each is most often confused with."""
    classes, confusion = result["classes"], result[name]["confusion"]
    present = [index for index, recall in enumerate(result[name]["recall"]) if recall is not None]
    rows = []
    for index in sorted(present, key=lambda index: (result[name]["recall"][index], -classes[index]["clips"]))[:_WORST]:
        wrong = [0 if other == index else count for other, count in enumerate(confusion[index])]
        most_frequent = wrong.index(max(wrong))
        mostly = f"{classes[most_frequent]['action']} ({wrong[most_frequent]})" if wrong[most_frequent] else "-"
        clips = str(classes[index]["clips"])
        rows.append([classes[index]["action"], clips, percent(result[name]["recall"][index]), mostly])
    print_table(f"Weakest classes, {name}", ["action", "clips", "recall", "mostly taken for"], rows)


def _show_sweep(result: dict[str, Any]) -> None:
    if "fusion_sweep" not in result:
        say("No fusion to sweep: there is one stream.")
        return
    best = max(result["fusion_sweep"], key=lambda point: point["mean_class_accuracy"])
    rows = [
        [
            f"{point['rgb_weight']:.2f}",
            percent(point["micro_accuracy"]),
            percent(point["mean_class_accuracy"]),
            "█" * round(40 * point["mean_class_accuracy"]) + (" best" if point is best else ""),
        ]
        for point in result["fusion_sweep"]
    ]
    title = "Fused accuracy by RGB's weight (chosen on test clips: not for reporting)"
    print_table(title, ["RGB", "micro", "mean class", ""], rows)


def _show_published(result: dict[str, Any], names: list[str]) -> None:
    rows = [
        [
            f"{'these scores' if 'scores' in result else 'this checkpoint'}, {name}",
            str(result["split"]),
            f"{100 * result[name]['micro_accuracy']:.2f} %",
            f"{100 * result[name]['mean_class_accuracy']:.2f} %",
            "",
            f"measured now{views_name(result)}",
        ]
        for name in names
    ]
    rows += [
        [
            entry.model,
            entry.split,
            "-" if entry.micro is None else f"{entry.micro:.2f} %",
            f"{entry.mean_class:.2f} %",
            entry.start,
            f"published: {entry.source}",
        ]
        for entry in PUBLISHED
    ]
    title = "Beside the published results on EGTEA Gaze+"
    print_table(title, ["model", "split", "micro", "mean class", "starts from", "source"], rows)
    for key, source in SOURCES.items():
        say(f"{key}: {source}")
    if (classes := len(result["classes"])) != PUBLISHED_CLASSES:
        say(f"NOT COMPARABLE: {classes} classes here, {PUBLISHED_CLASSES} in EGTEA Gaze+.")
