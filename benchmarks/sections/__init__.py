"""The sections of docs/benchmarks.md: the file of rows each is made from, and the function that writes it."""

from sections.diversity import diversity
from sections.pruning import depthwise, images, language, law, sentences
from sections.quality import quality
from sections.speed import speed

SECTIONS = {
    "solvers.jsonl": speed,
    "quality.jsonl": quality,
    "diversity.jsonl": diversity,
    "pruning_minilm.jsonl": sentences,
    "pruning_smollm.jsonl": language,
    "pruning_resnet.jsonl": images,
    "pruning_law.jsonl": law,
    "pruning_efficientnet.jsonl": depthwise,
}
