"""The report page: one self-contained HTML file that shows and plays what a run produced."""

from .page import build_report

__all__ = ["build_report"]
