"""The page that a person reads, and figures published one by one. The only door to jinja2."""

from workbench.report.page import report
from workbench.report.publishing import publish

__all__ = ["publish", "report"]
