"""The sections of docs/benchmarks.md: the file of rows each is made from, and the function that writes it."""

from sections.diversity import diversity
from sections.quality import quality
from sections.speed import speed

SECTIONS = {"solvers.jsonl": speed, "quality.jsonl": quality, "diversity.jsonl": diversity}
