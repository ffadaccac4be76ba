"""Self-contained HTML reports about one or several pruned checkpoints, and the diversity plot."""

from bisparse.report.figures import PrunedFigures, read_figures
from bisparse.report.html import Task, write_comparison, write_report
from bisparse.report.plot import plot_diversity

__all__ = ["PrunedFigures", "Task", "plot_diversity", "read_figures", "write_comparison", "write_report"]
