"""Pictures, page, terminal table and files: everything that shows an `Analysis`."""

from gradflow.reporter.digest import summary, top_findings
from gradflow.reporter.figures import plot
from gradflow.reporter.files import FORMATS, report
from gradflow.reporter.folders import check_folder, free_folder, whole_folder
from gradflow.reporter.kinds import KINDS
from gradflow.reporter.numbers import gone_words
from gradflow.reporter.picture import png
from gradflow.reporter.text import render, render_comparison, render_sentences

__all__ = [
    "FORMATS",
    "KINDS",
    "check_folder",
    "free_folder",
    "gone_words",
    "plot",
    "png",
    "render",
    "render_comparison",
    "render_sentences",
    "report",
    "summary",
    "top_findings",
    "whole_folder",
]
