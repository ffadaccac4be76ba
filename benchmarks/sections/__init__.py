"""The sections of docs/benchmarks.md: the file of rows each is made from, and the function that writes it."""

from sections.diversity import diversity
from sections.gpu import gpu
from sections.gpu_solvers import gpu_kernels, gpu_solvers
from sections.gpu_windows import gpu_windows
from sections.pruning import depthwise, images, language, law, peers, permutation, sentences
from sections.quality import quality
from sections.speed import speed
from sections.training import training_finetune, training_gpt, training_resnet, training_search

SECTIONS = {
    "solvers.jsonl": speed,
    "gpu_solvers.jsonl": gpu_solvers,
    "gpu_kernels.jsonl": gpu_kernels,
    "gpu_windows.jsonl": gpu_windows,
    "gpu.jsonl": gpu,
    "quality.jsonl": quality,
    "diversity.jsonl": diversity,
    "training-resnet.jsonl": training_resnet,
    "training-search.jsonl": training_search,
    "training-gpt.jsonl": training_gpt,
    "training-finetune.jsonl": training_finetune,
    "pruning_minilm.jsonl": sentences,
    "pruning_smollm.jsonl": language,
    "pruning_resnet.jsonl": images,
    "pruning_law.jsonl": law,
    "pruning_efficientnet.jsonl": depthwise,
    "pruning_peers.jsonl": peers,
    "pruning_permutation.jsonl": permutation,
}
