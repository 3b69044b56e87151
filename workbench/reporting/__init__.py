"""The page that a person reads, and figures published one by one. The only door to jinja2."""

from workbench.reporting.page import report
from workbench.reporting.publishing import places, publish

__all__ = ["places", "publish", "report"]
