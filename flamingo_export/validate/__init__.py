"""Parity: do a bundle's engines compute what the PyTorch reference computes? See docs/parity.md."""

from flamingo_export.validate.parity import check_build, check_bundle
from flamingo_export.validate.report.parity_report import ParityReport

__all__ = ["ParityReport", "check_build", "check_bundle"]
