"""Threat models: what a perturbation may be, as sets with their steps, projections and random starts."""

from orthattack.threat.region import Direction, Norm, Region, ThreatModel, perturbation_norm

__all__ = ["Direction", "Norm", "Region", "ThreatModel", "perturbation_norm"]
