"""Compare backends, or checkpoints, layer by layer."""

from olmozoo.verify.compare import verify
from olmozoo.verify.report import Report

__all__ = ["Report", "verify"]
