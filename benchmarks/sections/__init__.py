"""The pages of docs/benchmarks: their sections, and for each the file of rows and the function that writes it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sections.cpu import cpu
from sections.deploy import deploy, deploy_openvino
from sections.diversity import diversity
from sections.experts import experts
from sections.gpu import gpu
from sections.gpu_solvers import gpu_kernels, gpu_solvers
from sections.gpu_windows import gpu_windows
from sections.guidance import guidance
from sections.language import language
from sections.pruning import depthwise, images, law, peers, permutation, sentences
from sections.quality import quality
from sections.speed import speed
from sections.step_cost import training_step
from sections.streaming import streaming
from sections.training import training_finetune, training_gpt, training_resnet, training_search, training_teacher

SECTIONS = {
    "solvers.jsonl": speed,
    "streaming.jsonl": streaming,
    "cpu.jsonl": cpu,
    "gpu_solvers.jsonl": gpu_solvers,
    "gpu_kernels.jsonl": gpu_kernels,
    "gpu_windows.jsonl": gpu_windows,
    "gpu.jsonl": gpu,
    "quality.jsonl": quality,
    "diversity.jsonl": diversity,
    "training-resnet.jsonl": training_resnet,
    "training-search.jsonl": training_search,
    "training-step.jsonl": training_step,
    "training-gpt.jsonl": training_gpt,
    "training-finetune.jsonl": training_finetune,
    "training-teacher.jsonl": training_teacher,
    "pruning_minilm.jsonl": sentences,
    "pruning_smollm.jsonl": language,
    "pruning_resnet.jsonl": images,
    "pruning_law.jsonl": law,
    "pruning_efficientnet.jsonl": depthwise,
    "pruning_peers.jsonl": peers,
    "pruning_permutation.jsonl": permutation,
    "pruning_experts.jsonl": experts,
}
INSERTED = {"deploy.md": {"deploy.jsonl": deploy, "openvino.jsonl": deploy_openvino}}
"""Pages of docs that are written by hand but for tables: file of rows -> the function that writes its table, between markers."""


@dataclass(frozen=True)
class Page:
    """One page: its title, what was found in a sentence without figures, and the files of rows it shows."""

    title: str
    summary: str
    files: tuple[str, ...]
    head: Callable[[Path], list[str]] | None = None
    """A first section, from the rows of several files in a folder."""


PAGES = {
    "speed": Page(
        "How fast masks are found",
        "On CPUs the exact solver is more than ten times as fast as every other solver here.",
        ("solvers.jsonl", "streaming.jsonl"),
    ),
    "masks": Page(
        "What masks keep, and how many there are",
        "A transposable mask keeps a little less than a plain one; the difference shrinks as M grows.",
        ("quality.jsonl", "diversity.jsonl"),
    ),
    "training": Page(
        "Sparse training",
        "ResNet-20: 4:8-T is close to 2:4 and to unstructured 50 %; dynamic training from scratch is behind dense.",
        (
            "training-resnet.jsonl",
            "training-search.jsonl",
            "training-step.jsonl",
            "training-gpt.jsonl",
            "training-finetune.jsonl",
            "training-teacher.jsonl",
        ),
    ),
    "pruning": Page(
        "Pruning with data",
        "A sentence encoder at 4:8-T stays close to dense; the perplexity of a small language model rises markedly.",
        (
            "pruning_minilm.jsonl",
            "pruning_smollm.jsonl",
            "pruning_efficientnet.jsonl",
            "pruning_peers.jsonl",
            "pruning_permutation.jsonl",
            "pruning_experts.jsonl",
        ),
        guidance,
    ),
    "conversion": Page(
        "Changing a mask",
        "Least squares on calibration data recovers most of the accuracy that a conversion costs an image classifier.",
        ("pruning_resnet.jsonl", "pruning_law.jsonl"),
    ),
    "cpu": Page(
        "Packed weights on CPUs",
        "Products with packed weights against dense ones, by shape, pattern and number of tokens.",
        ("cpu.jsonl",),
    ),
    "gpu": Page(
        "GPUs",
        "Masks, packing and products on sparse tensor cores; what no GPU has measured yet is marked.",
        ("gpu_solvers.jsonl", "gpu_kernels.jsonl", "gpu_windows.jsonl", "gpu.jsonl"),
    ),
}
"""Name of the file in docs/benchmarks -> the page."""
