"""Pictures, page, terminal table and files: everything that shows an `Analysis`."""

from gradflow.reporter.digest import summary, top_findings
from gradflow.reporter.figures import plot
from gradflow.reporter.files import report
from gradflow.reporter.folders import check_folder, free_folder, whole_folder
from gradflow.reporter.kinds import KINDS
from gradflow.reporter.picture import png
from gradflow.reporter.text import render

__all__ = [
    "KINDS",
    "check_folder",
    "free_folder",
    "plot",
    "png",
    "render",
    "report",
    "summary",
    "top_findings",
    "whole_folder",
]
