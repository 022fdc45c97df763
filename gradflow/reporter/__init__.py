"""Pictures, page, terminal table and files: everything that shows an `Analysis` or a `History`."""

from gradflow.reporter.comparing import (
    comparison_html,
    comparison_page,
    comparison_summary,
    draw_trend,
)
from gradflow.reporter.digest import summary, top_findings
from gradflow.reporter.figures import plot, plot_narrow
from gradflow.reporter.files import FORMATS, report
from gradflow.reporter.folders import check_folder, free_folder, whole_folder
from gradflow.reporter.histories.course import Course, course, courses
from gradflow.reporter.histories.figures import draw_courses, plot_histories
from gradflow.reporter.histories.files import HISTORY_FORMATS, history_summary, report_history
from gradflow.reporter.histories.groups import GroupRow, groups_of, row_of, rows_of
from gradflow.reporter.histories.kinds import HISTORY_KINDS
from gradflow.reporter.histories.live import Followed, follow
from gradflow.reporter.histories.story import far_words, reach, sentence, updates
from gradflow.reporter.histories.text import of_groups, of_histories, render_history
from gradflow.reporter.kinds import KINDS
from gradflow.reporter.numbers import gone_words, number_words
from gradflow.reporter.picture import png
from gradflow.reporter.text import Numbers, of_runs, render, render_comparison, render_sentences

__all__ = [
    "FORMATS", "HISTORY_FORMATS", "HISTORY_KINDS", "KINDS", "Course", "Followed", "GroupRow",
    "Numbers", "check_folder", "comparison_html", "comparison_page", "comparison_summary",
    "course", "courses", "draw_courses", "draw_trend", "far_words", "follow", "free_folder",
    "gone_words", "groups_of", "history_summary", "number_words", "of_groups", "of_histories",
    "of_runs", "plot", "plot_histories", "plot_narrow", "png", "reach", "render",
    "render_comparison", "render_history", "render_sentences", "report", "report_history", "row_of",
    "rows_of", "sentence", "summary", "top_findings", "updates", "whole_folder",
]  # fmt: skip
