"""Losses and objectives as nn.Modules."""

from __future__ import annotations
