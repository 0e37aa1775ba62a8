"""Reusable parts for adapting a segmentation model to a new domain with few target labels."""

__version__ = "0.1.0"
