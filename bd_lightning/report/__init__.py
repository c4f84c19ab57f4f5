"""Run folders as pages: `folder` reads one, `curves` draws it, `page` and `comparison` put it together. Nothing but
files is read; torch is not imported."""

from bd_lightning.report.comparison import COMPARISON, compare_page, compare_text
from bd_lightning.report.folder import Run, read
from bd_lightning.report.page import run_page, short, write

__all__ = ["COMPARISON", "Run", "compare_page", "compare_text", "read", "run_page", "short", "write"]
