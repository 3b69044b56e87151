"""The straight way, stage by stage: `run` goes it in a folder."""

from workbench.pipeline.way import run

__all__ = ["run"]
